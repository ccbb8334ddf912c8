"""Time several callables against each other so that the machine's moods hit all of them alike."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch

from mmopt.measure.caches import CacheSweep
from mmopt.measure.steady import is_steady
from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError

# A sample lasts at least this many times the cost of reading the clock (with CUDA: of
# synchronizing and reading it), so that the two reads are at most 0.1% of a sample.
CLOCK_READS_PER_SAMPLE = 1000

# Samples in a window of `is_steady`.
WARM_UP_WINDOW = 5

# Where steadiness is not reached, warm-up ends after this long, not counting the first call
# (which may compile for minutes).
WARM_UP_MOST_SECONDS = 5.0


@dataclass(frozen=True)
class Timing:
    """The samples of one variant.

    Attributes:
        samples: seconds per call, in the order taken; each is one sample's time over `calls`. The
            loop that repeats a call adds some 25 ns to each.
        calls: calls in one sample: the fewest, in powers of two, that rise above clock noise.
        first_call: wall seconds of the very first call, where compilation and lazy set-up show.
        steady: whether warm-up was seen to settle before its time was spent.
        timer: what took the samples, of `mmopt.measure.timers.TIMERS`.
    """

    samples: list[float]
    calls: int
    first_call: float
    steady: bool
    timer: str = "wall"


Sampler = Callable[[int], float]
"""Takes one sample of so many calls; answers seconds per call."""


class Timer(Protocol):
    """How samples are taken."""

    name: str
    """Of `mmopt.measure.timers.TIMERS`."""

    def prepare(self, call: Callable[[], object]) -> Sampler:
        """Make ready to sample `call`, which has been called before."""

    def shortest_sample(self) -> float:
        """Seconds that a sample must last to rise above noise; 0 where one call always does."""


class WallTimer:
    """The wall clock around calls; with CUDA in use, around the work that they started.

    Args:
        name: `wall`, or `host-inclusive` where the calls run on a GPU.
    """

    def __init__(self, name: str = "wall") -> None:
        self.name = name

    def prepare(self, call: Callable[[], object]) -> Sampler:
        """Calls run in a row; nothing is done between them."""
        return partial(_sample, call)

    def shortest_sample(self) -> float:
        """`CLOCK_READS_PER_SAMPLE` times what reading the clock costs now."""
        return CLOCK_READS_PER_SAMPLE * _cost_of_reading_the_clock()


class ColdWallTimer:
    """The wall clock around single calls, with other data in the caches before each.

    Python's own code and data leave the caches as well: some tens of microseconds that a program
    woken for one call pays too.

    Raises:
        MmoptError: what `CacheSweep` raises (exit 3).
    """

    name = "wall-cold-cache"

    def __init__(self) -> None:
        self._sweep = CacheSweep()

    def prepare(self, call: Callable[[], object]) -> Sampler:
        """Each call is timed on its own, after a sweep that is not."""

        def sample(calls: int) -> float:
            seconds = 0.0
            for _ in range(calls):
                self._sweep()
                seconds += _sample(call, 1)
            return seconds / calls

        return sample

    def shortest_sample(self) -> float:
        """Single calls only: a mean over several would hide how they differ."""
        return 0.0


def read_clock() -> float:
    """Seconds of a monotonic clock, read after the current CUDA device has finished its work.

    Without CUDA in use in this process nothing is synchronized, and CUDA is not initialized.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def time_variants(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    timer: Timer | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Timing]:
    """Time every variant once per round, in an order drawn anew for each round.

    Every variant is first called until its times are steady. Before each sample the variant
    runs once untimed: the variant before it left its own data in the caches and may have
    left threads spinning. Python's garbage collector waits during a sample, so that no variant
    pays for another's garbage. A variant that `rotate` made has another input at each call.

    Args:
        variants: what to time, by name. Each is called without arguments.
        rounds: samples per variant.
        timer: how to take a sample; None is the wall clock.
        seed: of the order.
        progress: hears of each warm-up and of each sample.

    Raises:
        InputError: no variant, or fewer than one round; or what the timer raises.
    """
    if not variants:
        raise InputError("timing: there is nothing to time. Pass at least one variant.")
    if rounds < 1:
        raise InputError(f"timing: rounds is {rounds}, expected 1 or more. Pass rounds=20, say.")
    timer = timer or WallTimer()

    warmed: dict[str, tuple[Timing, Sampler]] = {}
    with progress("warm up", len(variants)) as advance:
        for name, variant in variants.items():
            warmed[name] = _warm_up(variant, timer)
            advance(1)

    order = list(variants)
    draw = random.Random(seed)
    with progress("time", rounds * len(variants)) as advance:
        for _ in range(rounds):
            draw.shuffle(order)
            for name in order:
                variants[name]()
                timing, sample = warmed[name]
                timing.samples.append(sample(timing.calls))
                advance(1)
    return {name: warmed[name][0] for name in variants}


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Seconds per call of every variant: the samples of `time_variants`, nothing else."""
    timings = time_variants(variants, rounds=rounds, seed=seed, progress=progress)
    return {name: timing.samples for name, timing in timings.items()}


def _warm_up(variant: Callable[[], object], timer: Timer) -> tuple[Timing, Sampler]:
    """Call until steady; returns a `Timing` without samples, and what takes them."""
    first_call = _sample(variant, 1)
    sample = timer.prepare(variant)
    began = time.perf_counter()

    # The clock is judged after the first call: it may have been the one that started CUDA.
    shortest = timer.shortest_sample()
    calls = 1
    seen: list[float] = []
    while True:
        seconds = sample(calls)
        if seconds * calls < shortest:
            calls *= 2
            seen.clear()
            continue
        seen.append(seconds)
        steady = is_steady(seen, WARM_UP_WINDOW)
        if steady or time.perf_counter() - began > WARM_UP_MOST_SECONDS:
            break
    return Timing([], calls, first_call, steady, timer.name), sample


def _sample(variant: Callable[[], object], calls: int) -> float:
    """Seconds per call over `calls` calls in a row."""
    with no_garbage_collection():
        start = read_clock()
        for _ in range(calls):
            variant()
        return (read_clock() - start) / calls


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let Python's garbage collector wait until the block is over."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _cost_of_reading_the_clock() -> float:
    """Seconds between two reads with nothing between them: the median of many."""
    reads = [read_clock() for _ in range(200)]
    return statistics.median(later - earlier for earlier, later in pairwise(reads))
