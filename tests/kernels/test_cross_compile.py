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
from mmopt_kernels.attention import kernel_backward as backward
from mmopt_kernels.attention.kernel import attention_forward, config as attention_config
from mmopt_kernels.attention.tiles import block_d
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
            if name not in ("S", "T", "M", "H", "threshold"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return compile(source, target=target, options=options).metadata.shared


flags = dict(WIDEN=False, PRECISION="ieee")
hip = target.backend == "hip"
visible = dict(D=D, BLOCK_D=block_d(D), INTERVALS=True, CAUSAL=True, stride_lom=1, stride_him=1)
pointers = dict(
    p_lo="i32", p_hi="i32", p_tiles="i32", p_runs="i32", p_seed="i64", p_lse="fp32",
    p_lse2="fp32", p_dlse="fp32", p_delta="fp32", p_sinks="fp32",
)
over_keys = backward.config_dkdv(torch.bfloat16, block_d(D), hip)
over_queries = backward.config_dq(torch.bfloat16, block_d(D), hip)
blocks = {k: over_keys[k] for k in ("BLOCK_M", "BLOCK_N")}
few = dict(num_warps=4, num_stages=1)


def attention(kernel, tile, **constants):
    return build(kernel, "bf16", pointers, visible | constants, dict(tile))


# With every feature: each adds code and none takes any away.
switches = dict(GROUP=2, SOFTCAP=True, DROPOUT=True, **flags)
print(json.dumps({
    "attention-bf16": attention(
        attention_forward, attention_config(torch.bfloat16, block_d(D), hip),
        LN_2=0.7, LOG2_E=1.4, SINKS=True, **switches,
    ),
    "attention_backward_dkdv-bf16": attention(
        backward.attention_backward_dkdv, over_keys, RUNS=backward.RUNS, **switches
    ),
    "attention_backward_dq-bf16": attention(
        backward.attention_backward_dq, over_queries, **switches
    ),
    "attention_backward_rows-bf16": attention(
        backward.attention_backward_rows, few, BLOCK_M=blocks["BLOCK_M"], LOG2_E=1.4, DLSE=True,
    ),
    "attention_backward_runs": attention(
        backward.attention_backward_runs, few, RUNS=backward.RUNS, SEARCH=backward.SEARCH, **blocks,
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
    assert len(shared) == 7
    assert max(shared.values()) <= limit
