"""The bounded queue in front of the session, and its only owner.

Every number here belongs to the event loop's thread, the session to one worker thread, so there
is nothing to lock. A request takes a place before its body is read: an overloaded server spends
nothing on what it refuses, and the bodies in memory are at most as many as the places.
"""

import asyncio
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from mmopt_kernels.errors import InputError, MmoptError

T = TypeVar("T")

# Weight of the newest run in the moving mean: the mean follows a change of load within some ten
# runs and one odd request moves it by a fifth of what it is off.
_NEWEST = 0.2

# The p50 is over this many of the latest requests, so that a server that runs for months keeps
# 80 kB of them.
_LATENCIES_KEPT = 10_000


class QueueFullError(MmoptError):
    """Every place is taken: HTTP 503.

    Attributes:
        retry_after: whole seconds after which the requests before this one should be done.
    """

    def __init__(self, places: int, retry_after: int) -> None:
        super().__init__(
            f"all {places} places in the queue are taken, expected a free one. "
            f"Try again in {retry_after} s."
        )
        self.retry_after = retry_after


class RunQueue:
    """One worker thread, one run at a time, first come first served.

    Args:
        waiting: requests that may wait besides the one that runs.
        service_seconds: how long a run takes, until runs have been observed.

    Attributes:
        served: runs that ended well.
        failed: runs that raised anything but an InputError.
        rejected: requests that found no place.
        abandoned: requests whose client left before their run began or ended.
        last_success: `time.monotonic()` of the last run that ended well since the last failure.
    """

    def __init__(self, waiting: int, service_seconds: float) -> None:
        self.served = 0
        self.failed = 0
        self.rejected = 0
        self.abandoned = 0
        self.last_success: float | None = None
        self._places = waiting + 1
        self._taken = 0
        self._service_seconds = service_seconds
        self._latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._turn = asyncio.Lock()  # its waiters are first in, first out
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mmopt-session")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place while the block runs.

        Raises:
            QueueFullError: there is none.
        """
        if self._taken >= self._places:
            self.rejected += 1
            raise QueueFullError(self._places, self.retry_after())
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    def retry_after(self) -> int:
        """Whole seconds, at least 1, that the requests now in the queue should take."""
        return max(1, math.ceil(self._taken * self._service_seconds))

    async def run(self, work: Callable[[], T], *, counts: bool = True) -> T:
        """Call `work` on the worker thread when its turn comes. The caller holds a place.

        Cancelled while it waits, it leaves the queue and never runs. Cancelled while it runs, it
        returns when the run has ended, because a run cannot be interrupted: whoever comes next
        must not start beside it.

        Args:
            work: what to call.
            counts: whether the run belongs in `served`, `failed` and the latencies.
        """
        arrived = time.monotonic()
        try:
            async with self._turn:
                result = await self._run_alone(work, counts)
        except asyncio.CancelledError:
            self.abandoned += counts
            raise
        self.served += counts
        if counts:
            self._latencies.append(time.monotonic() - arrived)
        return result

    async def _run_alone(self, work: Callable[[], T], counts: bool) -> T:
        began = time.monotonic()
        running = asyncio.get_running_loop().run_in_executor(self._worker, work)
        try:
            return await asyncio.shield(running)
        finally:
            await asyncio.wait({running})
            ended = time.monotonic()
            self._service_seconds += _NEWEST * (ended - began - self._service_seconds)
            error = running.exception()
            if error is None:
                self.last_success = ended
            elif not isinstance(error, InputError):  # the session is at fault, not the request
                self.last_success = None
                self.failed += counts

    def median_latency(self) -> float | None:
        """Seconds from arrival to result, of the latest requests; None before the first."""
        return statistics.median(self._latencies) if self._latencies else None

    def close(self) -> None:
        """End the worker thread once what runs has ended."""
        self._worker.shutdown()
