"""What the machine did to a measurement while it ran: throttling, clock changes, stolen time.

Needs no torch. What cannot be read is None, never zero.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt.measure._nvml import SLOWING, Gpu, open_nvml
from mmopt.measure.machine import CPUS, core_numbers, cpu_cgroups, first_match

_STAT = Path("/proc/stat")

# Clocks are read this often: seldom enough that reading them (some 100 microseconds of one core)
# cannot show in what is measured. Counters are read only when the watch begins and ends.
SAMPLE_SECONDS = 1.0

# A warning is due from these shares on: 1% of lost time moves a mean by as much as the smaller
# differences that one wants to see; a system's own services and clocks wander by less than 5% when
# nothing is the matter.
STEAL_SHARE = 0.01
OTHERS_SHARE = 0.05
CLOCK_SHARE = 0.05

# The system counts in ticks of 10 ms; over less than this a share of them says nothing.
SHARE_SECONDS = 1.0


@dataclass(frozen=True)
class Clock:
    """Readings of one clock, in MHz.

    Attributes:
        begin, end: when the watch began and ended. At the beginning the machine may be idle.
        lowest, highest: of the readings taken once a second between; None in a short watch.
    """

    begin: float | None
    end: float | None
    lowest: float | None
    highest: float | None

    @property
    def moved(self) -> bool:
        """Whether the readings between differ by more than `CLOCK_SHARE`."""
        if self.lowest is None or self.highest is None:
            return False
        return self.highest - self.lowest > CLOCK_SHARE * self.highest


@dataclass(frozen=True)
class GpuConditions:
    """One GPU, by NVML.

    Attributes:
        uuid: the GPU.
        sm_clock: of its multiprocessors; lowest and highest without the readings while idle. None
            where it cannot be read.
        event_reasons: why its clocks were what they were, every reason seen; None where NVML does
            not tell.
    """

    uuid: str
    sm_clock: Clock | None
    event_reasons: tuple[str, ...] | None


@dataclass(frozen=True)
class Conditions:
    """What happened between the beginning and the end of a watch.

    Attributes:
        seconds: how long it lasted.
        steal_share: of the time in which the cores of this process wanted to run, the share that
            the hypervisor gave to others.
        others_share: of these cores' time, the share that went to other processes than this one
            and those that it started and waited for; None in a watch too short to tell.
        throttled_periods, throttled_seconds: how often and how long the CPU quota of the control
            group, or of one above it, made it wait; the group that waited most.
        cpu_clock: of the fastest of these cores at each reading (an idle core's clock is low and
            says nothing).
        core_throttles, package_throttles: thermal throttling events, of all these cores together
            and of their worst package.
        gpus: every GPU of the machine; None without `nvidia-ml-py` or a driver.
    """

    seconds: float
    steal_share: float | None
    others_share: float | None
    throttled_periods: int | None
    throttled_seconds: float | None
    cpu_clock: Clock | None
    core_throttles: int | None
    package_throttles: int | None
    gpus: tuple[GpuConditions, ...] | None

    @property
    def warnings(self) -> list[str]:
        """What should make a reader doubt the numbers, in plain words; empty when nothing does."""
        found = []
        if self.steal_share is not None and self.steal_share > STEAL_SHARE:
            found.append(
                f"the hypervisor took {100 * self.steal_share:.1f}% of the CPU time (steal)"
            )
        if self.others_share is not None and self.others_share > OTHERS_SHARE:
            found.append(f"other processes had {100 * self.others_share:.0f}% of the cores' time")
        if self.throttled_periods:
            lost = "" if self.throttled_seconds is None else f", {self.throttled_seconds:.2f} s"
            found.append(
                f"the CPU quota of the control group was used up in {self.throttled_periods} "
                f"periods{lost}: fewer threads or a larger quota are needed"
            )
        if self.core_throttles or self.package_throttles:
            times = (self.core_throttles or 0) + (self.package_throttles or 0)
            found.append(f"the CPU got too hot and slowed itself down {times} times")
        if self.cpu_clock is not None and self.cpu_clock.moved:
            found.append(f"the CPU's clock moved between {_span(self.cpu_clock)}")
        for gpu in self.gpus or ():
            slowing = sorted(SLOWING.intersection(gpu.event_reasons or ()))
            if slowing:
                found.append(f"GPU {gpu.uuid} was slowed down: {', '.join(slowing)}")
            if gpu.sm_clock is not None and gpu.sm_clock.moved:
                found.append(f"the clock of GPU {gpu.uuid} moved between {_span(gpu.sm_clock)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields and `warnings` as JSON values."""
        return {**_json(dataclasses.asdict(self)), "warnings": self.warnings}


class Watch:
    """A watch that is under way or over; made by `watch_conditions`."""

    def __init__(self, gpus: list[Gpu]) -> None:
        self._gpus = gpus
        self._cores = core_numbers()
        self._began = time.monotonic()
        self._first = self._read()
        self._cpu_mhz: list[float] = []
        self._gpu_mhz: dict[str, list[float]] = {gpu.uuid: [] for gpu in gpus}
        self._reasons: dict[str, set[str]] = {gpu.uuid: set() for gpu in gpus}
        self._ended: Conditions | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if gpus or self._first.cpu_mhz is not None:
            self._thread = threading.Thread(target=self._sample, name="conditions", daemon=True)
            self._thread.start()

    @property
    def conditions(self) -> Conditions:
        """What happened so far, or in the whole block once it is left."""
        return self._ended or self._compare()

    def to_dict(self) -> dict[str, Any]:
        """`conditions` as JSON values."""
        return self.conditions.to_dict()

    def end(self) -> None:
        """Take the last readings and stop."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
        self._ended = self._compare()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            mhz = _cpu_mhz(self._cores)
            if mhz is not None:
                self._cpu_mhz.append(mhz)
            for gpu in self._gpus:
                # On both sides of the clock: the GPU may fall idle or wake up between.
                before, clock, after = gpu.event_reasons(), gpu.sm_mhz(), gpu.event_reasons()
                reasons = (before or frozenset()) | (after or frozenset())
                self._reasons[gpu.uuid] |= reasons
                if clock is not None and "idle" not in reasons:
                    self._gpu_mhz[gpu.uuid].append(clock)

    def _read(self) -> "_Readings":
        return _Readings(
            ticks=_ticks(self._cores),
            own_seconds=_own_seconds(),
            throttled=_throttled(),
            cpu_mhz=_cpu_mhz(self._cores),
            core_throttles=_thermal(self._cores, "core_throttle_count"),
            package_throttles=_thermal(self._cores, "package_throttle_count"),
            gpu_mhz={gpu.uuid: gpu.sm_mhz() for gpu in self._gpus},
            reasons={gpu.uuid: gpu.event_reasons() for gpu in self._gpus},
        )

    def _compare(self) -> Conditions:
        first, last = self._first, self._read()
        periods, seconds = _most_throttled(first.throttled, last.throttled)
        cores = _growth(first.core_throttles, last.core_throttles)
        packages = _growth(first.package_throttles, last.package_throttles)
        elapsed = time.monotonic() - self._began
        return Conditions(
            seconds=elapsed,
            steal_share=_steal_share(first, last),
            others_share=_others_share(first, last, elapsed * len(self._cores)),
            throttled_periods=periods,
            throttled_seconds=seconds,
            cpu_clock=_clock(first.cpu_mhz, last.cpu_mhz, self._cpu_mhz),
            core_throttles=None if cores is None else sum(cores),
            package_throttles=None if packages is None else max(packages),
            gpus=tuple(self._gpu(gpu.uuid, first, last) for gpu in self._gpus) or None,
        )

    def _gpu(self, uuid: str, first: "_Readings", last: "_Readings") -> GpuConditions:
        ends = (first.reasons[uuid], last.reasons[uuid])
        seen = self._reasons[uuid].union(*(reasons or () for reasons in ends))
        readable = any(reasons is not None for reasons in ends)
        return GpuConditions(
            uuid=uuid,
            sm_clock=_clock(first.gpu_mhz[uuid], last.gpu_mhz[uuid], self._gpu_mhz[uuid]),
            event_reasons=tuple(sorted(seen)) if readable else None,
        )


@contextmanager
def watch_conditions() -> Iterator[Watch]:
    """Watch the machine while the block runs.

    The counters are read at both ends. A thread reads clocks once a second where there are any to
    be read; on a machine that hides them (most virtual ones) there is no thread.

    Yields:
        The watch: `to_dict()` and `conditions` answer for the whole block once it is left, and for
        the time so far within it.
    """
    with ExitStack() as stack:
        watch = Watch(stack.enter_context(open_nvml()))
        stack.callback(watch.end)
        yield watch


@dataclass(frozen=True)
class _Readings:
    """One look at the machine; see the functions below for the forms."""

    ticks: tuple[int, int] | None
    own_seconds: float
    throttled: Mapping[Path, tuple[int, float | None]]
    cpu_mhz: float | None
    core_throttles: tuple[int, ...] | None
    package_throttles: tuple[int, ...] | None
    gpu_mhz: Mapping[str, int | None]
    reasons: Mapping[str, frozenset[str] | None]


def _ticks(cores: list[int]) -> tuple[int, int] | None:
    """(busy, stolen) ticks of these cores since boot; `man 5 proc_stat` has the columns."""
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    busy = stolen = 0
    for line in lines:
        name, *columns = line.split()
        if not name.startswith("cpu") or name[3:] not in map(str, cores) or len(columns) < 8:
            continue
        # Guest time, in later columns, is part of user and nice.
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, columns[:8])
        busy += user + nice + system + irq + softirq
        stolen += steal
    return (busy, stolen) if busy else None


def _own_seconds() -> float:
    """CPU seconds of this process, and of those that it started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _steal_share(first: _Readings, last: _Readings) -> float | None:
    if first.ticks is None or last.ticks is None:
        return None
    busy, stolen = (now - then for then, now in zip(first.ticks, last.ticks, strict=True))
    return stolen / (busy + stolen) if busy + stolen > 0 else 0.0


def _others_share(first: _Readings, last: _Readings, core_seconds: float) -> float | None:
    if first.ticks is None or last.ticks is None or core_seconds < SHARE_SECONDS:
        return None
    busy = (last.ticks[0] - first.ticks[0]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, busy - (last.own_seconds - first.own_seconds)) / core_seconds


def _throttled() -> dict[Path, tuple[int, float | None]]:
    """By control group: periods in which its quota was used up, and seconds that it waited."""
    found = {}
    for version, folder in cpu_cgroups():
        periods = first_match(folder / "cpu.stat", r"^nr_throttled (\d+)$")
        if periods is None:
            continue
        unit = ("throttled_time", 1e-9) if version == 1 else ("throttled_usec", 1e-6)
        waited = first_match(folder / "cpu.stat", rf"^{unit[0]} (\d+)$")
        found[folder] = (int(periods), None if waited is None else int(waited) * unit[1])
    return found


def _most_throttled(
    first: Mapping[Path, tuple[int, float | None]], last: Mapping[Path, tuple[int, float | None]]
) -> tuple[int | None, float | None]:
    grown = []
    for folder in first.keys() & last.keys():
        (periods, waited), (periods_now, waited_now) = first[folder], last[folder]
        more = None
        if waited is not None and waited_now is not None:
            more = waited_now - waited
        grown.append((periods_now - periods, more))
    if not grown:
        return None, None
    return max(grown, key=lambda growth: (growth[0], growth[1] or 0.0))


def _cpu_mhz(cores: list[int]) -> float | None:
    """The clock of the fastest of these cores.

    /proc/cpuinfo is no substitute: in a virtual machine its MHz is a constant of the boot.
    """
    found = [
        first_match(CPUS / f"cpu{core}" / "cpufreq" / "scaling_cur_freq", r"^(\d+)$")
        for core in cores
    ]
    return max((int(khz) / 1000 for khz in found if khz is not None), default=None)


def _thermal(cores: list[int], counter: str) -> tuple[int, ...] | None:
    """One thermal counter of each of these cores (Intel's driver has them)."""
    found = [
        first_match(CPUS / f"cpu{c}" / "thermal_throttle" / counter, r"^(\d+)$") for c in cores
    ]
    return tuple(int(x) for x in found if x is not None) if any(found) else None


def _growth(first: tuple[int, ...] | None, last: tuple[int, ...] | None) -> list[int] | None:
    if first is None or last is None or len(first) != len(last):
        return None
    return [now - then for then, now in zip(first, last, strict=True)]


def _clock(begin: float | None, end: float | None, between: list[float]) -> Clock | None:
    if begin is None and end is None and not between:
        return None
    return Clock(begin, end, min(between, default=None), max(between, default=None))


def _span(clock: Clock) -> str:
    return f"{clock.lowest:.0f} and {clock.highest:.0f} MHz"


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value
