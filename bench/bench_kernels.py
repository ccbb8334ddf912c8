"""Triton kernels, as far as no GPU is needed: what they are compiled to, what a launch costs.

Exact: spilled bytes, shared memory and warps that fit a multiprocessor, of attention's heavy
kernels at head dimension 128. Registers are left to `mmopt kernels --check`, which allows a tenth:
here one more than before would be a regression.
"""

from __future__ import annotations

from typing import Any

import pytest

from mmopt_kernels.inspection import TARGETS, inspect
from mmopt_kernels.inspection.cases import case_named

CAUSAL = "attention/bf16-d128-causal"
EVERYTHING = "attention/bf16-d128-everything"
DECODE = "decode/bf16-d128-g4-causal"


@pytest.mark.parametrize(
    ("target", "case"),
    [("sm_80", CAUSAL), ("sm_90", CAUSAL), ("sm_90", EVERYTHING)],
    ids=["sm_80-causal", "sm_90-causal", "sm_90-everything"],
)
def exact_attention(figures: Any, target: str, case: str) -> None:
    # Compiled anew: what another revision compiled is none of this one's figures.
    found = inspect([TARGETS[target]], cases=[case_named(case)], jobs=1)
    assert not found.failures, found.failures
    heavy = [kernel for kernel in found.kernels if kernel.dot_bits is not None]
    assert heavy
    for kernel in heavy:
        figures.record(f"{kernel.kernel} spilled", kernel.spilled_bytes, unit="bytes")
        figures.record(f"{kernel.kernel} shared", kernel.shared_bytes, unit="bytes")
        resident = kernel.occupancy.warps
        figures.record(f"{kernel.kernel} resident", resident, unit="warps", better="higher")


@pytest.mark.parametrize("case", [CAUSAL, DECODE], ids=["attention", "decode"])
def bench_launch(benchmark: Any, case: str) -> None:
    # Times the host's side of a call, forward and backward in attention's case: outputs, the choice
    # of tiles, descriptors, arguments. Kernels are recorded instead of launched.
    from mmopt_kernels import _triton
    from mmopt_kernels.inspection.capture import recording

    benchmark.group = "kernel launch"
    launch = case_named(case).launch
    with _triton.assuming("sm_90"), recording() as launches:
        benchmark(launch)
        assert launches
