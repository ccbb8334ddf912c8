"""The ops on a GPU at the sizes of large models, beside their peers, with the GPU timers.

Left out where there is no GPU. `make gpu` runs it and keeps the result in bench/results/. Of it:
`mmopt bench run bench/bench_gpu.py -k "attention and images" -- -m gpu`; the directions are called
`forward` and `both` there.

The peers of a case are timed against each other, one call of each per round in random order; the
first test of a case that runs times them all, and each test hands over its peer's samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_cases import CALLS, GPU, GPU_PEERS, Case, Unavailable, runnable, useful_flops
from torch.nn.functional import linear

from mmopt.measure.statistics import median
from mmopt.measure.timers import TIMERS
from mmopt.measure.timing import Timing, time_variants
from mmopt_kernels import lora_linear
from mmopt_kernels.errors import MmoptError

SCALE = 0.5

DEVICE = "cuda"

# 20 rounds of 8 peers on 17 cases, 33 with the directions: at 10 ms a call less than a minute.
# FlexAttention's compilation, for each case and direction, is expected to take longer.
ATTENTION_ROUNDS = 20
LORA_ROUNDS = 50

# Attention is a kernel or two, and the question is which is faster. The other timers would ask
# about the host as well, at three times the time.
ATTENTION_TIMER = "cuda-graph-cold-l2"


class Replayed:
    """A clock for pytest-benchmark that stands still but for the samples that others took.

    pytest-benchmark knows wall clocks only. The samples are mmopt's own; this hands them over, so
    that they are stored, shown and compared like any other.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def replay(self, benchmark: Any, timing: Timing) -> None:
        """Make `timing` what `benchmark` measured."""
        seconds = iter([sample for sample in timing.samples for _ in range(timing.calls)])

        def call() -> None:
            self._now += next(seconds, 0.0)

        benchmark.pedantic(call, rounds=len(timing.samples), iterations=timing.calls)


CLOCK = Replayed()

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=CLOCK)]


@dataclass(frozen=True)
class Measured:
    """One peer on one case.

    Attributes:
        peak_bytes: what torch's allocator handed out in a call at most, beyond inputs and masks.
    """

    timing: Timing
    peak_bytes: int


@functools.lru_cache(maxsize=1)
def measured(case: Case, direction: str) -> dict[str, Measured | str]:
    """Every peer, timed against the others; a string says why a peer is not among them."""
    from mmopt.measure.gpu_timing import gpu_timer

    found: dict[str, Measured | str] = {}
    calls, peaks = {}, {}
    for peer, build in GPU_PEERS.items():
        try:
            calls[peer] = runnable(case, build, direction, DEVICE)
            peaks[peer] = peak_allocated(calls[peer])
        except Unavailable as reason:
            found[peer] = str(reason)
    timer = gpu_timer(ATTENTION_TIMER)
    for peer in list(calls):
        try:
            timer.prepare(calls[peer])  # one peer that cannot be captured must not end the others
        except MmoptError as error:
            found[peer] = str(error)
            del calls[peer]
    timings = time_variants(calls, rounds=ATTENTION_ROUNDS, timer=timer)
    return found | {peer: Measured(timing, peaks[peer]) for peer, timing in timings.items()}


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes that the call has allocated at most; kernels' own on-chip memory is not among them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("peer", GPU_PEERS)
@pytest.mark.parametrize("direction", CALLS, ids=["forward", "both"])
@pytest.mark.parametrize("case", GPU, ids=lambda case: case.name)
def bench_gpu_attention(benchmark: Any, case: Case, direction: str, peer: str) -> None:
    # Times the op and the layout its caller wants next; inputs, masks and block masks are made
    # before. Forward and backward are timed together: a captured backward runs on the stream of its
    # forward. Backward alone is the difference of the two medians.
    benchmark.group = f"gpu attention {direction} {case.name}"
    if direction != "forward" and not case.trains:
        pytest.skip("a decode step has no backward")
    result = measured(case, direction)[peer]
    if isinstance(result, str):
        pytest.skip(result)
    flops = useful_flops(case, direction)
    benchmark.extra_info |= {
        "timer": ATTENTION_TIMER,
        "case": str(case),
        "peak_bytes": result.peak_bytes,
        "useful_flops": flops,
        "useful_tflops_per_s": flops / median(result.timing.samples) / 1e12,
    }
    CLOCK.replay(benchmark, result.timing)


def randn(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("timer", TIMERS["cuda"])
@pytest.mark.parametrize("peer", ["addmm", "triton", "peft"])
@pytest.mark.parametrize("rows", [16, 2048])
def bench_gpu_lora_linear_forward(benchmark: Any, rows: int, peer: str, timer: str) -> None:
    from mmopt.measure.gpu_timing import gpu_timer

    benchmark.group = f"gpu lora_linear forward {rows} {timer}"
    benchmark.extra_info |= {"timer": timer}
    x, weight, a, b = randn(rows, 4096), randn(4096, 4096), randn(16, 4096), randn(4096, 16)
    calls = {
        "addmm": lambda: lora_linear(x, weight, a, b, scale=SCALE, impl="addmm"),
        "triton": lambda: lora_linear(x, weight, a, b, scale=SCALE, impl="triton"),
        "peft": lambda: linear(x, weight) + linear(linear(x, a), b) * SCALE,
    }
    with torch.no_grad():
        timings = time_variants({peer: calls[peer]}, rounds=LORA_ROUNDS, timer=gpu_timer(timer))
    CLOCK.replay(benchmark, timings[peer])
