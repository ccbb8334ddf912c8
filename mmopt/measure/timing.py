"""Time several callables against each other so that the machine's moods hit all of them alike."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError

# A sample lasts at least this many times the cost of reading the clock (with CUDA: of
# synchronizing and reading it), so that the two reads are at most 0.1% of a sample.
CLOCK_READS_PER_SAMPLE = 1000

# Steady: the medians of the last two windows of this many samples differ by less than
# STEADY_SHARE, or by less than the samples of either window scatter among themselves (a noisy
# machine never gets within a fixed share, and more warm-up would not help).
WARM_UP_WINDOW = 5
STEADY_SHARE = 0.05

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
        first_call: seconds of the very first call, where compilation and lazy set-up show.
        steady: whether warm-up was seen to settle before its time was spent.
    """

    samples: list[float]
    calls: int
    first_call: float
    steady: bool


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
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Timing]:
    """Time every variant once per round, in an order drawn anew for each round.

    Every variant is first called until its times are steady. Before each sample the variant
    runs once untimed: the variant before it left its own data in the caches and may have
    left threads spinning. Python's garbage collector waits during a sample, so that no variant
    pays for another's garbage.

    Args:
        variants: what to time, by name. Each is called without arguments.
        rounds: samples per variant.
        seed: of the order.
        progress: hears of each warm-up and of each sample.

    Raises:
        InputError: no variant, or fewer than one round.
    """
    if not variants:
        raise InputError("timing: there is nothing to time. Pass at least one variant.")
    if rounds < 1:
        raise InputError(f"timing: rounds is {rounds}, expected 1 or more. Pass rounds=20, say.")

    warmed = {}
    with progress("warm up", len(variants)) as advance:
        for name, variant in variants.items():
            warmed[name] = _warm_up(variant)
            advance(1)

    order = list(variants)
    draw = random.Random(seed)
    with progress("time", rounds * len(variants)) as advance:
        for _ in range(rounds):
            draw.shuffle(order)
            for name in order:
                variants[name]()
                warmed[name].samples.append(_sample(variants[name], warmed[name].calls))
                advance(1)
    return {name: warmed[name] for name in variants}


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


def _warm_up(variant: Callable[[], object]) -> Timing:
    """Call until steady; returns a `Timing` without samples."""
    first_call = _sample(variant, 1)
    began = time.perf_counter()

    # The clock is judged after the first call: it may have been the one that started CUDA.
    shortest = CLOCK_READS_PER_SAMPLE * _cost_of_reading_the_clock()
    calls = 1
    seen: list[float] = []
    while True:
        seconds = _sample(variant, calls)
        if seconds * calls < shortest:
            calls *= 2
            seen.clear()
            continue
        seen.append(seconds)
        steady = _is_steady(seen)
        if steady or time.perf_counter() - began > WARM_UP_MOST_SECONDS:
            break
    return Timing(samples=[], calls=calls, first_call=first_call, steady=steady)


def _is_steady(seen: list[float]) -> bool:
    if len(seen) < 2 * WARM_UP_WINDOW:
        return False
    before = sorted(seen[-2 * WARM_UP_WINDOW : -WARM_UP_WINDOW])
    last = sorted(seen[-WARM_UP_WINDOW:])
    # The second lowest to the second highest: one outlier does not count as scatter.
    scatter = max(before[-2] - before[1], last[-2] - last[1])
    middle = statistics.median(last)
    return abs(statistics.median(before) - middle) < max(STEADY_SHARE * middle, scatter)


def _sample(variant: Callable[[], object], calls: int) -> float:
    """Seconds per call over `calls` calls in a row."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = read_clock()
        for _ in range(calls):
            variant()
        return (read_clock() - start) / calls
    finally:
        if collecting:
            gc.enable()


def _cost_of_reading_the_clock() -> float:
    """Seconds between two reads with nothing between them: the median of many."""
    reads = [read_clock() for _ in range(200)]
    return statistics.median(later - earlier for earlier, later in pairwise(reads))
