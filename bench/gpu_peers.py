"""Peers of one case on a GPU: timed against each other by mmopt's timers, replayed for pytest.

The peers of a case are timed one call of each per round, in random order; each test then hands its
peer's samples to pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmopt.measure.timing import Timing, time_variants
from mmopt_kernels.errors import MmoptError

DEVICE = "cuda"

# An op is a kernel or a few, and the question is which is faster. The other timers would ask about
# the host as well, at three times the time.
TIMER = "cuda-graph-cold-l2"


class Unavailable(Exception):
    """This peer cannot run this case here; says why."""


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


@dataclass(frozen=True)
class Measured:
    """One peer on one case.

    Attributes:
        peak_bytes: what torch's allocator handed out in a call at most, beyond the inputs.
    """

    timing: Timing
    peak_bytes: int


def seeded(device: str, seed: int) -> torch.Generator | None:
    """A generator on the device; meta tensors have no values to draw."""
    return None if device == "meta" else torch.Generator(device).manual_seed(seed)


def time_peers(
    prepare: Mapping[str, Callable[[], Callable[[], Any]]], *, rounds: int, timer: str = TIMER
) -> dict[str, Measured | str]:
    """Time every peer against the others.

    Args:
        prepare: by peer, what makes its call, which must have run once; raises Unavailable.
        timer: of `mmopt.measure.gpu_timing`.

    Returns:
        By peer, what was measured, or why it was not.
    """
    from mmopt.measure.gpu_timing import gpu_timer

    found: dict[str, Measured | str] = {}
    calls, peaks = {}, {}
    for peer, make in prepare.items():
        try:
            calls[peer] = make()
            peaks[peer] = peak_allocated(calls[peer])
        except Unavailable as reason:
            found[peer] = str(reason)
    clock = gpu_timer(timer)
    for peer in list(calls):
        try:
            clock.prepare(calls[peer])  # one peer that cannot be captured must not end the others
        except MmoptError as error:
            found[peer] = str(error)
            del calls[peer]
    timings = time_variants(calls, rounds=rounds, timer=clock)
    return found | {peer: Measured(timing, peaks[peer]) for peer, timing in timings.items()}


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes that the call has allocated at most; kernels' own on-chip memory is not among them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
