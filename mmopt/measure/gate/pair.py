"""A fresh pair of workers, one per revision, on the same cores, in alternating short slices."""

import contextlib
import ctypes
import json
import math
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mmopt.measure.gate.revisions import Checkout, tail
from mmopt.measure.steady import is_steady
from mmopt.measure.suites.collection import PYTEST_OPTIONS
from mmopt_kernels.errors import MmoptError

SLICE_SECONDS = 0.005
"""A slice: long beside the switch between two processes, short beside the machine's moods."""

SLICES = 8, 40
"""Fewest and most slices of each side of a benchmark in a pair, for calls shorter than a slice.
Between them they fill as much time as the pair needs besides, to start and to set up: more in a
pair that starts fast would be better spent on further pairs, fewer in one that compiles first would
throw away what it cost (docs/lab-notes.md, "Slices for what a pair costs")."""

START_SECONDS = 0.6
"""What a pair needs besides its slices, until one was seen."""

FEWEST_SLICES = 3
"""Slices of each side where single calls take longer than a slice."""

MOST_SECONDS = 1.0
"""What slices of one benchmark may take in a pair before their number is cut to FEWEST_SLICES."""

WARM_UP_WINDOW = 3
WARM_UP_SLICE = SLICE_SECONDS / 4
WARM_UP_MOST_SLICES = 40

SLOW_SETUP_SECONDS = 0.1
"""Slices that take this long although their calls do not are made no longer."""

PATIENCE_SECONDS = 600.0
"""The longest wait for one answer: importing the suite, or one slice; compilation included."""

# linux/personality.h
_PERSONALITY_QUERY = 0xFFFFFFFF
_ADDR_NO_RANDOMIZE = 0x0040000

_WORKER = Path(__file__).with_name("_worker.py")


@dataclass(frozen=True)
class PairResult:
    """What one pair says of one benchmark.

    Attributes:
        log_ratio: median of log(head / base) over adjacent slices.
        base_seconds, head_seconds: medians of seconds per call.
    """

    log_ratio: float
    base_seconds: float
    head_seconds: float


@dataclass(frozen=True)
class Stopped:
    """A benchmark that did not get as far as being timed on one side."""

    side: str
    outcome: str  # failed, skipped, or finished without calling the fixture
    text: str


class Worker:
    """One process that runs one revision's suite on command."""

    def __init__(
        self,
        checkout: Checkout,
        mode: str,
        suite: Path,
        *,
        ids: Sequence[str] = (),
        with_plugins: bool = True,
        figures_file: Path | None = None,
        threads: int = 1,
        seed: int = 0,
        home: Sequence[int] | None = None,
    ) -> None:
        self.checkout = checkout
        self.home = home
        read, self._orders = os.pipe()
        self._answers, write = os.pipe()
        self._unread = b""
        self._at: str | None = None
        # Not a pipe: nobody reads it while the worker runs.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close())
        task = {
            "mode": mode,
            "suite": str(suite),
            "options": PYTEST_OPTIONS,
            "with_plugins": with_plugins,
            "roots": list(map(str, checkout.own)),
            "repository": str(checkout.repository.resolve()),
            "ids": list(ids),
            "figures_file": None if figures_file is None else str(figures_file),
        }
        with layout_not_random():
            self._process = subprocess.Popen(
                [sys.executable, str(_WORKER), str(read), str(write)],
                cwd=checkout.root,
                env={**checkout.environment(), **_settings(threads, seed)},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(read, write),
                # To end what the suite starts as well; Ctrl-C reaches the gate, which ends all.
                process_group=0,
            )
        os.close(read)
        os.close(write)
        if home is not None:
            self.pin(home)  # before anything counts the cores to choose a number of threads
        self.send(**task)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The side, the revision, and the benchmark if it is at one, for messages."""
        at = f" at {self._at}" if self._at else ""
        return f"{self.checkout.side} ({self.checkout.revision.ref}){at}"

    def send(self, **order: Any) -> None:
        """Give an order."""
        with contextlib.suppress(BrokenPipeError):  # receive() tells why
            os.write(self._orders, json.dumps(order).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            MmoptError: the worker ended, or said nothing for PATIENCE_SECONDS.
        """
        while b"\n" not in self._unread:
            if not select.select([self._answers], [], [], PATIENCE_SECONDS)[0]:
                raise MmoptError(
                    f"gate: the suite in {self.name} said nothing for {PATIENCE_SECONDS:.0f} s and "
                    "was stopped. Make its benchmarks shorter, or skip those that hang."
                )
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                status = self._process.wait()
                raise MmoptError(
                    f"gate: the suite crashed in {self.name} with status {status} (a negative one "
                    f"is the signal that killed it):\n{self.output()}"
                )
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if answer.get("event") in ("at", "finished"):
            self._at = answer["id"] if answer["event"] == "at" else None
        if answer.get("event") == "broken":
            raise MmoptError(
                f"gate: {answer['where']} cannot be collected in {self.name}:\n"
                f"{tail(answer['text'])}"
            )
        return answer

    def expect(self, event: str) -> dict[str, Any]:
        """The next answer, which must be this event.

        Raises:
            MmoptError: it is another: pytest stopped before it came so far.
        """
        answer = self.receive()
        if answer.get("event") != event:
            raise MmoptError(f"gate: pytest did not get far in {self.name}:\n{self.output()}")
        return answer

    def pin(self, cores: Sequence[int]) -> None:
        """Put every thread of the process on these cores, and on no others."""
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that just ended
                os.sched_setaffinity(int(thread.name), cores)

    def output(self) -> str:
        """The end of what the process printed."""
        self._output.seek(0)
        return tail(self._output.read().decode(errors="replace"))

    def close(self) -> None:
        """End the process and what it started."""
        for pipe in (self._orders, self._answers):
            with contextlib.suppress(OSError):
                os.close(pipe)
        try:
            # Its next read of an order finds the pipe closed.
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            # The worker leaves no time for the ends of its own children.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._output.close()


@contextlib.contextmanager
def layout_not_random() -> Iterator[bool]:
    """Start processes without address space randomization while the block runs, where allowed.

    Two equal programs differ in speed by where the system happened to put their memory. Without
    randomization both sides of a pair get the same places, and the settings of the next pair move
    them (Mytkowicz et al. 2009, "Producing wrong data without doing anything obviously wrong!").
    On a suite of light benchmarks that halved the scatter between pairs (docs/lab-notes.md, "Equal
    layouts"). Containers may forbid it.

    Yields:
        Whether it was allowed.
    """
    libc = ctypes.CDLL(None)
    before = libc.personality(_PERSONALITY_QUERY)
    allowed = before != -1 and libc.personality(before | _ADDR_NO_RANDOMIZE) != -1
    try:
        yield allowed
    finally:
        if allowed:
            libc.personality(before)


def _settings(threads: int, seed: int) -> dict[str, str]:
    """What both sides of a pair must have in common, or should not differ in by luck."""
    count = str(threads)
    return {
        # Equal in a pair, so that both lay out sets and dicts alike, and their stacks; new in the
        # next, so that no layout decides.
        "PYTHONHASHSEED": str(seed % 2**32),
        "MMOPT_GATE_LAYOUT": "x" * (16 * random.Random(seed).randrange(256)),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        # A side that waits for its turn must not spin on the cores of the other.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }


def time_pair(
    base: Checkout,
    head: Checkout,
    suite: Path,
    ids: Sequence[str],
    *,
    with_plugins: bool,
    cores: Sequence[int],
    number: int,
    seed: int,
    besides: float = START_SECONDS,
    on_result: Callable[[str, PairResult | list[Stopped]], bool],
) -> float:
    """Start a fresh pair and time each benchmark once.

    Both sides get the same orders, as many of each: a side that ran more calls than the other
    would have another heap, which alone was seen to change a matrix product by 0.7%.

    Args:
        suite: relative to the checkouts.
        ids: benchmarks that both revisions have, in the order to run.
        with_plugins: whether a benchmark also records exact figures; their plugin takes longer to
            import than a light suite.
        cores: where both sides run their slices. Each sets up on as many of its own, where there
            are so many: what a benchmark compiles first often takes longer than its slices.
        number: of the pair; even pairs start base first, odd ones head.
        seed: of the order of slices, and the workers' hash seed.
        besides: seconds that the pair is expected to need besides its slices.
        on_result: hears of each benchmark; answers whether to go on with the pair.

    Returns:
        The seconds that it needed besides its slices, or a little more where calls are long.

    Raises:
        MmoptError: a side crashed, hung, or could not be collected.
    """
    began = time.monotonic()
    draw = random.Random(seed)
    sides = [base, head]
    workers: list[Worker] = []
    homes = [cores, _as_many_others(cores)]
    with contextlib.ExitStack() as stack:
        for checkout, home in zip(sides if number % 2 == 0 else sides[::-1], homes, strict=True):
            worker = Worker(
                checkout,
                "time",
                suite,
                ids=ids,
                with_plugins=with_plugins,
                threads=len(cores),
                seed=seed,
                home=home,
            )
            workers.append(stack.enter_context(worker))
        if number % 2:
            workers.reverse()
        for worker in workers:
            worker.expect("ready")
        for worker in workers:
            worker.send(go=True)
        of_all = 2 * SLICE_SECONDS * len(ids)  # one slice of each side of each benchmark
        slices = max(SLICES[0], min(SLICES[1], round(besides / of_all)))
        for name in ids:
            if not on_result(name, _contest(workers, cores, name, slices, draw)):
                break
    return max(0.0, time.monotonic() - began - slices * of_all)


def _as_many_others(cores: Sequence[int]) -> Sequence[int]:
    """As many usable cores besides these, or these if there are too few."""
    others = sorted(os.sched_getaffinity(0).difference(cores))
    return others[-len(cores) :] if len(others) >= len(cores) else cores


def _contest(
    workers: Sequence[Worker], cores: Sequence[int], name: str, slices: int, draw: random.Random
) -> PairResult | list[Stopped]:
    """Bring both workers to one benchmark, time it on the same cores, and see both to its end."""
    stopped = []
    waiting = []
    for worker in workers:
        answer = worker.receive()
        if answer.get("event") == "at":
            waiting.append(worker)
        else:
            stopped.append(_stopped(worker, name, answer))
    result = None
    if not stopped:
        for worker in workers:
            worker.pin(cores)
        try:
            result = _time(workers, slices, draw)
        except _StoppedWhileTimed as stop:
            waiting.remove(stop.worker)
            stopped.append(_stopped(stop.worker, name, stop.answer))
    for worker in workers:
        worker.pin(worker.home or cores)
    for worker in waiting:
        worker.send(calls=0)
        end = _stopped(worker, name, worker.receive())
        if end.outcome != "finished":
            # It was timed, and then what it returned did not hold.
            stopped.append(end)
    return stopped or result or []


def _stopped(worker: Worker, name: str, answer: dict[str, Any]) -> Stopped:
    """Read to the end of a benchmark, from an answer on."""
    outcome, text = "finished", "it never called its benchmark fixture"
    while True:
        if answer.get("id") != name:
            raise MmoptError(
                f"gate: {worker.name} went on to {answer.get('id') or answer.get('event')} before "
                f"{name} had finished:\n{worker.output()}"
            )
        if answer["event"] == "finished":
            return Stopped(worker.checkout.side, outcome, text)
        if answer["event"] == "at":  # a plugin that runs failed tests again
            worker.send(calls=0)
            outcome, text = "failed", "it was run more than once"
        else:
            outcome, text = answer["event"], tail(answer["text"])
        answer = worker.receive()


class _StoppedWhileTimed(Exception):
    def __init__(self, worker: Worker, answer: dict[str, Any]) -> None:
        super().__init__(answer)
        self.worker = worker
        self.answer = answer


def _time(workers: Sequence[Worker], slices: int, draw: random.Random) -> PairResult:
    def both(calls: int) -> tuple[float, float]:
        """One slice of each side, in random order: seconds per call of base and head."""
        seconds = [0.0, 0.0]
        first = draw.randrange(2)
        for index in (first, 1 - first):
            workers[index].send(calls=calls)
            answer = workers[index].receive()
            if "seconds" not in answer:
                raise _StoppedWhileTimed(workers[index], answer)
            seconds[index] = float(answer["seconds"]) / calls
        return seconds[0], seconds[1]

    both(1)  # compiles, allocates, fills caches
    calls = 1
    seen: list[tuple[float, float]] = []
    setup_is_slow = False
    while len(seen) < WARM_UP_MOST_SLICES:
        began = time.monotonic()
        times = both(calls)
        # What a benchmark sets up before each call is not timed, but takes its time.
        setup_is_slow |= time.monotonic() - began > SLOW_SETUP_SECONDS
        if max(times) * calls < WARM_UP_SLICE and not setup_is_slow:
            calls *= 2
            continue
        seen.append(times)
        if sum(map(sum, seen)) * calls > MOST_SECONDS / 2 or all(
            is_steady([times[side] for times in seen], WARM_UP_WINDOW) for side in (0, 1)
        ):
            break
    one_call = statistics.median(sum(times) / 2 for times in seen[-WARM_UP_WINDOW:])
    fitting = round(SLICE_SECONDS / one_call)
    calls = max(1, min(calls, fitting) if setup_is_slow else fitting)
    affordable = int(MOST_SECONDS / (2 * one_call * calls))
    times_of_slices = [both(calls) for _ in range(max(FEWEST_SLICES, min(slices, affordable)))]
    return PairResult(
        log_ratio=statistics.median(math.log(head / base) for base, head in times_of_slices),
        base_seconds=statistics.median(base for base, _ in times_of_slices),
        head_seconds=statistics.median(head for _, head in times_of_slices),
    )
