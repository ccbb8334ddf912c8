"""Attention on this machine's CPU: mmopt::attention beside SDPA and FlexAttention.

Groups put the peers of one case side by side. Exact: what mmopt's op needs beyond its inputs.
`mmopt bench run bench/bench_attention.py` runs all of it; the quick pass leaves out the longer
cases, and FlexAttention, which takes seconds to compile for each.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from attention_cases import (
    CPU_PEERS,
    CPU_QUICK,
    CPU_SLOW,
    Case,
    Unavailable,
    backward,
    forward,
    mmopt,
    runnable,
)

from mmopt.measure.memory import peak_tensor_bytes

QUICK_PEERS = ("mmopt", "sdpa", "sdpa-mask")


def rows(direction: str) -> list[Any]:
    """Every case with every peer that has its mask; `slow` what the quick pass leaves out."""
    found = []
    for case in (*CPU_QUICK, *CPU_SLOW):
        for peer in CPU_PEERS:
            without_mask = case.mask in ("full", "causal")
            if direction != "forward" and (not case.trains or peer == "flex"):
                continue  # torch has no backward of FlexAttention on the CPU
            if (peer == "sdpa" and not without_mask) or (
                peer == "sdpa-mask" and case.mask == "full"
            ):
                continue
            name = f"{case.name}-{peer}"
            if case in CPU_QUICK and peer in QUICK_PEERS:
                found.append(pytest.param(case, peer, id=name))
            else:
                # The gate leaves out what is named so: it knows names, not marks.
                found.append(pytest.param(case, peer, id=f"long-{name}", marks=pytest.mark.slow))
    return found


def measure(benchmark: Any, case: Case, peer: str, direction: str) -> None:
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(case)}
    try:
        call = runnable(case, CPU_PEERS[peer], direction, "cpu")
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark(call)


@pytest.mark.parametrize(("case", "peer"), rows("forward"))
def bench_attention_forward(benchmark: Any, case: Case, peer: str) -> None:
    # Times the op and the layout its caller wants next; inputs and masks are made before.
    benchmark.group = f"attention forward {case.name}"
    measure(benchmark, case, peer, "forward")


@pytest.mark.parametrize(("case", "peer"), rows("forward+backward"))
def bench_attention_backward(benchmark: Any, case: Case, peer: str) -> None:
    # Times forward and backward together, as a training step runs them.
    benchmark.group = f"attention forward+backward {case.name}"
    measure(benchmark, case, peer, "forward+backward")


# float32 only: for bfloat16 the kernel's buffers depend on the processor's matrix instructions. Of
# the longer cases those with a mask of their own, at a length and at twice that.
EXACT = [
    case
    for case in (*CPU_QUICK, *CPU_SLOW)
    if case.dtype is torch.float32
    and (case in CPU_QUICK or case.name.startswith(("images", "packed", "sliding")))
]


@pytest.mark.parametrize("case", EXACT, ids=operator.attrgetter("name"))
def exact_attention_memory(figures: Any, case: Case) -> None:
    op = mmopt(case, "cpu")
    figures.record("forward peak tensor bytes", peak_tensor_bytes(forward(case, op)), unit="bytes")
    if case.trains:
        both = peak_tensor_bytes(backward(case, op))
        figures.record("forward+backward peak tensor bytes", both, unit="bytes")
