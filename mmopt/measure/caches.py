"""What lies in the CPU's caches when a call begins: inputs in rotation, and sweeps."""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import psutil
import torch

from mmopt.measure.machine import last_level_cache_bytes
from mmopt_kernels.errors import InputError, MmoptError

T = TypeVar("T")

# Other data of this many times the last-level cache pushes out what was there. Once would do if
# caches always dropped what was used longest ago; those that keep a part of what passes through
# (adaptive insertion) keep at most half of a working set of twice their size.
PAST_CACHE = 2


def rotate(
    prepare: Callable[[T], Callable[[], object]], inputs: Sequence[T]
) -> Callable[[], object]:
    """A call that takes the next of `inputs` each time, in turn, for `time_variants`.

    A call that always reads the same input finds it in the caches, as no program does that has
    work of its own between two calls. With copies that exceed the last-level cache together
    (`copies_past_cache` says how many) an input has left the caches when its turn comes again.
    Weights and other data that every call shares stay there, as they do in a server; the timer
    `wall-cold-cache` is for the question what a call costs without them.

    Args:
        prepare: turns one input into a call; it is called here, so that it is not timed.
        inputs: alike in shape and cost.

    Raises:
        InputError: there are no inputs.
    """
    calls = [prepare(chosen) for chosen in inputs]
    if not calls:
        raise InputError("timing: there are no inputs to rotate, expected at least one.")
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)

    def call() -> object:
        return next(turns)()

    return call


def copies_past_cache(input_bytes: int) -> int:
    """How many inputs of this size exceed the last-level cache `PAST_CACHE` times; 2 or more.

    Raises:
        InputError: the size is not above 0.
        MmoptError: the system does not tell the size of its caches (exit 3).
    """
    if input_bytes < 1:
        raise InputError(f"timing: an input has {input_bytes} bytes, expected more than 0.")
    cache = _cache_bytes("Choose the number of copies yourself.")
    return max(2, -(-PAST_CACHE * cache // input_bytes))


class CacheSweep:
    """Fills the caches with other data each time it is called.

    It reads: lines that were written would have to be written back while the next call is timed.
    torch's threads share the work, so that each passes its part through the caches of its core.

    Raises:
        MmoptError: the system does not tell the size of its caches, or `PAST_CACHE` times that
            does not fit into the free memory (exit 3).
    """

    def __init__(self) -> None:
        swept = PAST_CACHE * _cache_bytes("Use the timer wall.")
        free = psutil.virtual_memory().available
        if swept > free:
            raise MmoptError(
                f"timing: to fill the CPU's caches takes {swept >> 20} MiB of other data, and "
                f"only {free >> 20} MiB of memory are free. Use the timer wall."
            )
        # Written once: pages that were never written are all the same page of zeros.
        self._other = torch.ones(swept // 8, dtype=torch.float64)

    def __call__(self) -> None:
        """Read all of the other data once."""
        self._other.sum()


def _cache_bytes(instead: str) -> int:
    cache = last_level_cache_bytes()
    if cache is None:
        raise MmoptError(
            "timing: the size of the CPU's last-level cache cannot be read in "
            f"/sys/devices/system/cpu, so nothing can be made to exceed it. {instead}"
        )
    return cache
