"""A process that compiles kernels: one JSON request a line on stdin, one answer a line on stdout.

In a process of its own because Triton decides at import whether kernels are interpreted, reads its
settings from the environment, and its compiler may end the process that it runs in.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key

from mmopt_kernels.inspection.capture import Specialized, capture
from mmopt_kernels.inspection.cases import case_named
from mmopt_kernels.inspection.machine_code import (
    code_bytes,
    count_matrix_instructions,
    dot_bits,
    parse_amdgcn,
    parse_ptxas,
)
from mmopt_kernels.inspection.targets import TARGETS, Target


@functools.lru_cache(maxsize=4)
def _captured(target: str, case: str) -> list[Specialized]:
    return capture(case_named(case), TARGETS[target])


def plan(target: str, case: str) -> list[dict[str, Any]]:
    """What a case launches on a target: each kernel's name, and a key of all that it is made of."""
    planned = []
    for one in _captured(target, case):
        backend = make_backend(one.target)
        options = backend.parse_options(dict(one.options))
        key = get_cache_key(one.source, backend, options, get_cache_invalidating_env_vars())
        planned.append({"kernel": one.kernel, "config": one.config, "key": key})
    return planned


def build(target: str, case: str, index: int, emit: str | None) -> dict[str, Any]:
    """Compile one kernel of a case, and read what it takes."""
    one = _captured(target, case)[index]
    log = io.StringIO()
    started = _cpu_seconds()
    # Triton prints ptxas' log; it keeps it nowhere.
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(one.source, target=one.target, options=dict(one.options))
    seconds = _cpu_seconds() - started
    figures = _figures(TARGETS[target], compiled, log.getvalue())
    figures["compile_seconds"] = round(seconds, 3)
    if emit is not None:
        _write(Path(emit), one, compiled, figures)
    return figures


def _cpu_seconds() -> float:
    """Of this process and of the assemblers that it ran: a busy machine does not lengthen them."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _figures(target: Target, compiled: Any, log: str) -> dict[str, Any]:
    binary, bits = compiled.kernel, dot_bits(compiled.asm["ttir"])
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        resources = parse_amdgcn(text)
    else:
        # The disassembler takes half a second to start: not for code that cannot have any.
        text = "" if bits is None else _disassembled(binary)
        resources = parse_ptxas(log)
    metadata = compiled.metadata
    return {
        "registers": resources.registers,
        "spilled_bytes": resources.spilled_bytes,
        "shared_bytes": metadata.shared,
        "tensor_memory_columns": getattr(metadata, "tmem_size", None) or 0,
        # Warp specialization adds some to those that the launcher asked for.
        "warps": metadata.num_warps,
        "dot_bits": bits,
        "matrix_instructions": count_matrix_instructions(text, target.matrix),
        "code_bytes": code_bytes(binary),
    }


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _write(stem: Path, one: Specialized, compiled: Any, figures: Mapping[str, Any]) -> None:
    """Beside each other: the binary, its assembly, and how to launch it."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    binary, assembly = ("hsaco", "amdgcn") if one.target.backend == "hip" else ("cubin", "ptx")
    stem.with_name(f"{stem.name}.{binary}").write_bytes(compiled.kernel)
    stem.with_name(f"{stem.name}.{assembly}").write_text(compiled.asm[assembly])
    names, metadata = one.source.fn.arg_names, compiled.metadata
    document = {
        "kernel": one.kernel,
        "symbol": metadata.name,
        "target": {
            "backend": one.target.backend,
            "arch": one.target.arch,
            "warp_size": one.target.warp_size,
        },
        "triton": triton.__version__,
        "num_warps": metadata.num_warps,
        "num_ctas": metadata.num_ctas,
        "num_stages": one.config["num_stages"],
        "shared": metadata.shared,
        "tensor_memory": figures["tensor_memory_columns"],
        "global_scratch": {
            # Triton 3.6 has none on AMD.
            "size": getattr(metadata, "global_scratch_size", 0),
            "align": getattr(metadata, "global_scratch_align", 1),
        },
        "tensor_descriptors": getattr(metadata, "tensordesc_meta", None),
        # Of the sizes inspected; what else it fits follows from the attributes.
        "grid": list(one.grid),
        "signature": dict(one.source.signature),
        "constants": {_path(names, path): value for path, value in one.source.constants.items()},
        "attributes": {_path(names, path): value for path, value in one.source.attrs.items()},
        "figures": dict(figures),
    }
    text = json.dumps(document, indent=2, default=str) + "\n"
    stem.with_name(f"{stem.name}.json").write_text(text)


def _path(names: list[str], path: tuple[int, ...]) -> str:
    """Triton's path to an argument, (3,) or (3, 0) inside a tuple, with the argument's name."""
    return ".".join([names[path[0]], *map(str, path[1:])])


def main() -> None:
    """Answer requests until stdin ends."""
    # What the compiler prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    knobs.nvidia.dump_ptxas_log = True
    requests: dict[str, Callable[..., Any]] = {"plan": plan, "build": build}
    for line in sys.stdin:
        request = json.loads(line)
        do = requests[request.pop("do")]
        try:
            answer: dict[str, Any] = {"result": do(**request)}
        except Exception as error:  # noqa: BLE001 - one kernel's failure is one line of the report
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
