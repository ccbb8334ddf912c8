"""What `mmopt doctor` tries, each in a process of its own: `python -m mmopt._doctor_probes NAME`.

A probe prints its detail as the last line of stdout and exits 0. Where it fails it raises
`ProbeError` with what to say, or whatever the broken library raises; a library that kills the
process harms nobody else. Nothing here is imported by `mmopt doctor` itself.
"""

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ProbeError(Exception):
    """The probe found what is wrong; the message names it."""


def imports(*packages: str) -> str:
    """Import packages, and print the name of each once it is in."""
    for package in packages:
        importlib.import_module(package)
        print(package, flush=True)
    return "all import"


def cuda() -> str:
    """Multiply two matrices on the GPU through torch."""
    import torch

    if torch.version.cuda is None:
        raise ProbeError(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise ProbeError(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU")
    ones = torch.ones(64, 64, device="cuda")
    if float((ones @ ones).sum()) != 64.0**3:
        raise ProbeError("a matrix product on the GPU came out wrong")
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB)"
        )
    return f"{', '.join(gpus)}; CUDA {torch.version.cuda}; a matrix product came out right"


def onnxruntime_provider(provider: str) -> str:
    """Run one node on an execution provider and read in the profile that it ran there."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ProbeError(f"this build of ONNX Runtime has only {', '.join(available)}")
    if provider == "CUDAExecutionProvider":
        onnxruntime.preload_dlls()  # CUDA and cuDNN from the nvidia wheels, where they are
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ("a", "b", "c")
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])], "probe", value[:2], value[2:]
    )
    # IR version 10 and opset 20 are what onnxruntime 1.30 surely reads.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[provider]
        )
        opened = session.get_providers()
        ones = np.ones((4, 4), np.float32)
        (product,) = session.run(None, {"a": ones, "b": ones})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran_on = {
        event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    }
    if provider not in opened or ran_on != {provider}:
        raise ProbeError(f"the node ran on {', '.join(sorted(ran_on))} instead")
    if not (product == 4.0).all():
        raise ProbeError("the node gave a wrong result")
    return "a node ran there and gave the right result"


def triton_compiles() -> str:
    """Run a kernel on the GPU where there is one, compile it for sm_90 otherwise."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmopt._doctor_kernel import add_one

    if torch.cuda.is_available():
        x = torch.arange(1000, dtype=torch.float32, device="cuda")
        y = torch.empty_like(x)
        add_one[(1,)](x, y, 1000, BLOCK=1024)
        if not torch.equal(y, x + 1.0):
            raise ProbeError("a kernel ran on the GPU and gave a wrong result")
        return "a kernel ran on the GPU and gave the right result"
    signature = {"p_x": "*fp32", "p_y": "*fp32", "N": "i32", "BLOCK": "constexpr"}
    source = ASTSource(add_one, signature, constexprs={"BLOCK": 1024})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    size = len(kernel.asm["cubin"])
    return f"a kernel compiled for sm_90 ({size} bytes of machine code); no GPU to run it on"


def torch_compile(device: str) -> str:
    """Compile a function with Inductor and compare it with eager."""
    import torch

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * 2.0 + 1.0

    x = torch.linspace(-3.0, 3.0, 100, device=device)
    compiled: Any = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    return f"a function compiled for {device} and agrees with eager"


PROBES: dict[str, Callable[..., str]] = {
    "cuda": cuda,
    "imports": imports,
    "onnxruntime_provider": onnxruntime_provider,
    "torch_compile": torch_compile,
    "triton_compiles": triton_compiles,
}


def main() -> None:
    """Run the probe that the command line names."""
    # Cached results would hide a compiler that has gone missing.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        # The interpreter would answer instead of the compiler.
        os.environ.pop("TRITON_INTERPRET", None)
        name, *arguments = sys.argv[1:]
        try:
            detail = PROBES[name](*arguments)
        except ProbeError as error:
            sys.exit(str(error))
    print(detail)


if __name__ == "__main__":
    main()
