"""Every kernel compiles for every target, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

# Runs in a process of its own: in this one TRITON_INTERPRET may have replaced the kernels.
SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mmopt_kernels.attention.kernel import attention_forward, block_d, config as attention_config
from mmopt_kernels.lora_linear.kernel import config as lora_config, lora_linear_forward

target = GPUTarget(*json.loads(sys.argv[1]))
D = 80


def build(kernel, dtype, pointers, constants, tile):
    # Arguments as a launch with sizes divisible by 16 specializes them.
    options = {k: tile.pop(k) for k in ("num_warps", "num_stages")}
    constants = constants | tile
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            signature[name] = "*" + pointers.get(name, dtype)
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in ("S", "T", "M", "H"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return compile(source, target=target, options=options).metadata.shared


flags = dict(WIDEN=False, PRECISION="ieee")
print(json.dumps({
    "attention-bf16": build(
        attention_forward, "bf16", dict(p_lo="i32", p_hi="i32", p_lse="fp32"),
        dict(LN_2=0.7, GROUP=2, D=D, BLOCK_D=block_d(D), INTERVALS=True, CAUSAL=True,
             stride_lom=1, stride_him=1, **flags),
        attention_config(torch.bfloat16, block_d(D)),
    ),
    "lora_linear-bf16-adapter32": build(
        lora_linear_forward, "bf16", dict(p_b="fp32"),
        dict(BIAS=True, stride_xk=1, stride_wk=1, stride_br=1, **flags),
        lora_config(torch.bfloat16, 4096, 16),
    ),
    "lora_linear-fp32": build(
        lora_linear_forward, "fp32", {},
        dict(BIAS=False, stride_xk=1, stride_wk=1, stride_br=1, **flags),
        lora_config(torch.float32, 64, 64),
    ),
}))
"""

# Bytes of shared memory that one block may have: 99 KiB is the least of sm_80, sm_86 and later
# (CUDA C++ Programming Guide, compute capabilities); a CDNA 3 workgroup has 64 KiB.
TARGETS = {
    "sm_80": (("cuda", 80, 32), 99 * 1024),
    "sm_90": (("cuda", 90, 32), 99 * 1024),
    "gfx942": (("hip", "gfx942", 64), 64 * 1024),
}


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_and_fit_the_target(name: str, tmp_path: Path) -> None:
    target, limit = TARGETS[name]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # A file, because Triton reads a kernel's source; a cache of its own, to compile anew.
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(target)],
        capture_output=True,
        text=True,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout)
    assert len(shared) == 3
    assert max(shared.values()) <= limit
