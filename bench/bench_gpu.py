"""The ops on a GPU at the sizes of a 7B model, beside their peers, with each of the GPU timers.

Left out where there is no GPU. `make gpu` runs it and keeps the result in bench/results/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from mmopt.measure.timers import TIMERS
from mmopt.measure.timing import Timing, time_variants
from mmopt_kernels import attention, lora_linear

ROUNDS = 50
SCALE = 0.5


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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.parametrize("timer", TIMERS["cuda"]),
]


def measure(benchmark: Any, call: Callable[[], object], timer: str) -> None:
    """Time `call` with a GPU timer of mmopt's."""
    from mmopt.measure.gpu_timing import gpu_timer

    benchmark.extra_info |= {"timer": timer}
    timings = time_variants({"call": call}, rounds=ROUNDS, timer=gpu_timer(timer))
    CLOCK.replay(benchmark, timings["call"])


def randn(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("peer", ["mmopt", "sdpa"])
@pytest.mark.parametrize("length", [512, 2048])
def bench_gpu_attention_forward(benchmark: Any, length: int, peer: str, timer: str) -> None:
    benchmark.group = f"gpu attention forward {length} {timer}"
    benchmark.extra_info |= {"batch": 4, "length": length}
    q, k, v = randn(4, 32, length, 128), randn(4, 8, length, 128), randn(4, 8, length, 128)
    calls = {
        "mmopt": lambda: attention(q, k, v, causal=True),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    with torch.no_grad():
        measure(benchmark, calls[peer], timer)


@pytest.mark.parametrize("peer", ["addmm", "triton", "peft"])
@pytest.mark.parametrize("rows", [16, 2048])
def bench_gpu_lora_linear_forward(benchmark: Any, rows: int, peer: str, timer: str) -> None:
    benchmark.group = f"gpu lora_linear forward {rows} {timer}"
    x, weight, a, b = randn(rows, 4096), randn(4096, 4096), randn(16, 4096), randn(4096, 16)
    calls = {
        "addmm": lambda: lora_linear(x, weight, a, b, scale=SCALE, impl="addmm"),
        "triton": lambda: lora_linear(x, weight, a, b, scale=SCALE, impl="triton"),
        "peft": lambda: linear(x, weight) + linear(linear(x, a), b) * SCALE,
    }
    with torch.no_grad():
        measure(benchmark, calls[peer], timer)
