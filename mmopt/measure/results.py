"""What `mmopt bench` measured: plain data, its JSON and its table."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.fingerprint import Fingerprint
from mmopt.measure.memory import PeakMemory
from mmopt.measure.statistics import (
    Interval,
    bootstrap_median,
    median,
    samples_for_percentile,
    supported_percentile,
)
from mmopt.measure.suites.files import write_json
from mmopt.measure.throttling import Conditions
from mmopt.measure.timers import TIMER_MEANING
from mmopt_kernels import __version__
from mmopt_kernels.errors import InputError

SCHEMA_VERSION = 1

# What the column "peak memory" holds; the JSON has every figure.
_MEMORY_NOTES = {
    "cpu": "Peak memory: VmHWM of a fresh process that loads and runs the variant, with the "
    "interpreter and libraries, and compilation where there is one.",
    "cuda": "Peak memory: what torch had reserved on the GPU in a fresh process that loads and "
    "runs the variant, without the CUDA context.",
}


@dataclass(frozen=True)
class Measurement:
    """One backend of one model at one grid point.

    Attributes:
        source: the model or artifact as the caller named it.
        backend: what ran it: `eager`, `compile`, `mmopt` or `ort`.
        batch: sequences per call.
        length: tokens per sequence.
        samples: seconds per call, in the order taken.
        calls: calls averaged in one sample.
        first_call: seconds of the first call, compilation included; None when not measured.
        steady: whether warm-up settled before sampling began.
        memory: peaks of a fresh process that loads and runs it; None when not measured.
        timer: what took the samples, of `mmopt.measure.timers.TIMERS`; measurements of different
            timers do not compare.
        instructions: retired per call in user space; None where they cannot be counted.
    """

    source: str
    backend: str
    batch: int
    length: int
    samples: tuple[float, ...]
    calls: int = 1
    first_call: float | None = None
    steady: bool = True
    memory: PeakMemory | None = None
    timer: str = "wall"
    instructions: int | None = None

    @cached_property
    def median(self) -> float:
        """Median seconds per call."""
        return median(self.samples)

    @cached_property
    def interval(self) -> Interval:
        """95% confidence interval of the median, in seconds."""
        return bootstrap_median(self.samples)

    @cached_property
    def p95(self) -> float | None:
        """95th percentile in seconds; None unless single calls were timed, and enough of them."""
        return supported_percentile(self.samples, 95, calls=self.calls)

    @cached_property
    def p99(self) -> float | None:
        """99th percentile in seconds, as `p95`; it takes 662 samples."""
        return supported_percentile(self.samples, 99, calls=self.calls)

    @property
    def throughput(self) -> float:
        """Sequences per second at the median."""
        return self.batch / self.median

    def to_dict(self) -> dict[str, Any]:
        """Every field and statistic as JSON values; times in seconds, memory in bytes."""
        return {
            "source": self.source,
            "backend": self.backend,
            "batch": self.batch,
            "length": self.length,
            "median_seconds": self.median,
            "median_ci95_seconds": [self.interval.low, self.interval.high],
            "p95_seconds": self.p95,
            "p99_seconds": self.p99,
            "sequences_per_second": self.throughput,
            "first_call_seconds": self.first_call,
            "calls_per_sample": self.calls,
            "steady": self.steady,
            "timer": self.timer,
            "instructions_per_call": self.instructions,
            "memory": None if self.memory is None else dataclasses.asdict(self.memory),
            "samples_seconds": list(self.samples),
        }


@dataclass(frozen=True)
class BenchReport:
    """What `bench_run` returns.

    Attributes:
        measurements: by grid point, and within it in the order of sources and backends.
        fingerprint: what it ran on.
        adapter: the adapter that the checkpoints carried.
        seed: of the token ids and of the order.
        created: UTC, ISO 8601.
        device: `cpu` or `cuda`.
        conditions: what the machine did while the samples were taken; None when not watched.
    """

    measurements: tuple[Measurement, ...]
    fingerprint: Fingerprint
    adapter: str | None
    seed: int
    created: str
    device: str = "cpu"
    conditions: Conditions | None = None

    @property
    def timer(self) -> str:
        """What took the samples, of `mmopt.measure.timers.TIMERS`."""
        return self.measurements[0].timer

    @property
    def exit_code(self) -> int:
        """Always 0: to measure is not to judge."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "schema": SCHEMA_VERSION,
            "mmopt": __version__,
            "created": self.created,
            "adapter": self.adapter,
            "seed": self.seed,
            "device": self.device,
            "timer": self.timer,
            "conditions": None if self.conditions is None else self.conditions.to_dict(),
            "fingerprint": self.fingerprint.to_dict(),
            "measurements": [measurement.to_dict() for measurement in self.measurements],
        }

    def render(self) -> RenderableType:
        """A table, and below it what the numbers hold for."""
        several = len({m.source for m in self.measurements}) > 1
        table = Table(title=None if several else self.measurements[0].source, title_justify="left")
        for name in (["source"] if several else []) + ["backend"]:
            table.add_column(name, overflow="fold")
        columns = self._columns()
        for name in ["batch", "length", *columns]:
            table.add_column(name, justify="right", no_wrap=True)
        point = None
        for m in self.measurements:
            if point not in (None, (m.batch, m.length)):
                table.add_section()
            point = (m.batch, m.length)
            row = ([m.source] if several else []) + [m.backend, str(m.batch), str(m.length)]
            row += [write(m) for write in columns.values()]
            # Paths may hold brackets, which rich would read as markup.
            table.add_row(*map(Text, row))
        return Group(table, *map(Text, self._notes()))

    def _columns(self) -> dict[str, Callable[[Measurement], str]]:
        """What each column says of a measurement; without those that none of them has."""
        columns: dict[str, Callable[[Measurement], str]] = {
            "median": lambda m: format_seconds(m.median) + ("" if m.steady else "*"),
            "95% CI": format_interval,
        }
        if any(m.p95 is not None for m in self.measurements):
            columns["p95"] = lambda m: format_seconds(m.p95)
        if any(m.p99 is not None for m in self.measurements):
            columns["p99"] = lambda m: format_seconds(m.p99)
        columns["seq/s"] = lambda m: _three_digits(m.throughput)
        if any(m.instructions is not None for m in self.measurements):
            columns["instructions"] = lambda m: _format_count(m.instructions)
        columns["first call"] = lambda m: format_seconds(m.first_call)
        if any(m.memory is not None for m in self.measurements):
            columns["peak memory"] = lambda m: _format_memory(m.memory, self.device)
        return columns

    def _notes(self) -> list[str]:
        ran_on = self.fingerprint
        machine = f"{ran_on.cpu or 'unknown CPU'}, {ran_on.cores} cores, "
        machine += f"{ran_on.torch_threads} threads, torch {ran_on.torch}"
        if ran_on.onnxruntime:
            machine += f", onnxruntime {ran_on.onnxruntime}"
        if self.device == "cuda":
            machine += f", {', '.join(ran_on.gpus)}, driver {ran_on.gpu_driver}"
        notes = [machine]
        if self.timer != "wall":
            notes.append(f"Timer: {self.timer}, {TIMER_MEANING[self.timer]}.")
        if self.adapter:
            notes.append(f"Checkpoints carry the adapter {self.adapter}, not merged.")
        if not all(m.steady for m in self.measurements):
            notes.append("* warm-up had not settled: the machine was busy or the model slow.")
        if self.conditions is not None and self.conditions.warnings:
            notes.append(f"While it ran, {'; '.join(self.conditions.warnings)}.")
        columns = self._columns()
        for percent in (95, 99):
            if f"p{percent}" not in columns:
                notes.append(f"No p{percent}: {self._why_no_percentile(percent)}")
                break  # the nearest one is enough to say
        if any(m.memory is not None for m in self.measurements):
            notes.append(_MEMORY_NOTES[self.device])
        return notes

    def _why_no_percentile(self, percent: float) -> str:
        if all(m.calls > 1 for m in self.measurements):
            return "calls this short are timed several at a time, and a mean hides their tail."
        needed = samples_for_percentile(percent)
        return f"it needs {needed} samples of single calls (--rounds {needed})."


def format_seconds(seconds: float | None) -> str:
    """Three significant digits with a unit: `1.23 ms`; a dash for None."""
    if seconds is None:
        return "-"
    unit, scale = unit_of(seconds)
    return f"{_three_digits(seconds / scale)} {unit}"


def unit_of(seconds: float) -> tuple[str, float]:
    """The unit to write a time in, and how many seconds it is."""
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)


def format_interval(measurement: Measurement) -> str:
    """The confidence interval of the median, both ends with their units."""
    ends = measurement.interval
    return f"{format_seconds(ends.low)} to {format_seconds(ends.high)}"


def require_output_file(path: Path, option: str = "-o", name: str = "bench.json") -> None:
    """Refuse, before anything is measured, an output that could not be written afterwards.

    Args:
        path: what was given with `option`.
        option: its name, for the message.
        name: a file name to propose where `path` is a folder.

    Raises:
        InputError: the path is a folder, or its folder is missing or read-only.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder, expected a file. Pass {path / name}.")
    where = f"{option} {path}: the folder {path.parent}"
    if not path.parent.is_dir():
        raise InputError(f"{where} does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{where} is not writable. Choose another.")


def write_report(report: BenchReport, path: Path) -> None:
    """Write the report's JSON to `path`: the whole document appears there, or nothing changes.

    Raises:
        MmoptError: the file system refused (disk full, read-only); exit 3.
    """
    write_json(path, report.to_dict())


def source_labels(measurements: Sequence[Measurement]) -> dict[str, str]:
    """The shortest name that tells each source apart: its last path part where that suffices."""
    sources = list(dict.fromkeys(m.source for m in measurements))
    short = {source: Path(source).name or source for source in sources}
    return short if len(set(short.values())) == len(sources) else {s: s for s in sources}


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}"


def _format_count(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} M"


def _format_memory(memory: PeakMemory | None, device: str) -> str:
    if memory is None:
        return "-"
    shown = memory.process_bytes if device == "cpu" else memory.torch_reserved_bytes
    return "-" if shown is None else f"{shown / 1e6:,.0f} MB"
