"""What `mmopt bench` measured: plain data, its JSON and its table."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
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
    percentile,
    samples_for_percentile,
)
from mmopt_kernels import __version__
from mmopt_kernels.errors import InputError, MmoptError

SCHEMA_VERSION = 1


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
        if self.calls > 1 or len(self.samples) < samples_for_percentile(95):
            return None
        return percentile(self.samples, 95)

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
            "sequences_per_second": self.throughput,
            "first_call_seconds": self.first_call,
            "calls_per_sample": self.calls,
            "steady": self.steady,
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
    """

    measurements: tuple[Measurement, ...]
    fingerprint: Fingerprint
    adapter: str | None
    seed: int
    created: str

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
            "fingerprint": self.fingerprint.to_dict(),
            "measurements": [measurement.to_dict() for measurement in self.measurements],
        }

    def render(self) -> RenderableType:
        """A table, and below it what the numbers hold for."""
        several = len({m.source for m in self.measurements}) > 1
        with_p95 = any(m.p95 is not None for m in self.measurements)
        with_memory = any(m.memory is not None for m in self.measurements)
        table = Table(title=None if several else self.measurements[0].source, title_justify="left")
        for name in (["source"] if several else []) + ["backend"]:
            table.add_column(name, overflow="fold")
        names = ["batch", "length", "median", "95% CI"] + ["p95"] * with_p95
        names += ["seq/s", "first call"] + ["peak memory"] * with_memory
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        point = None
        for m in self.measurements:
            if point not in (None, (m.batch, m.length)):
                table.add_section()
            point = (m.batch, m.length)
            row = ([m.source] if several else []) + [m.backend, str(m.batch), str(m.length)]
            row += [format_seconds(m.median) + ("" if m.steady else "*"), format_interval(m)]
            row += [format_seconds(m.p95)] * with_p95
            row += [_three_digits(m.throughput), format_seconds(m.first_call)]
            row += [_format_memory(m.memory)] * with_memory
            # Paths may hold brackets, which rich would read as markup.
            table.add_row(*map(Text, row))
        return Group(table, *map(Text, self._notes(with_p95, with_memory)))

    def _notes(self, with_p95: bool, with_memory: bool) -> list[str]:
        ran_on = self.fingerprint
        machine = f"{ran_on.cpu or 'unknown CPU'}, {ran_on.cores} cores, "
        machine += f"{ran_on.torch_threads} threads, torch {ran_on.torch}"
        if ran_on.onnxruntime:
            machine += f", onnxruntime {ran_on.onnxruntime}"
        notes = [machine]
        if self.adapter:
            notes.append(f"Checkpoints carry the adapter {self.adapter}, not merged.")
        if not all(m.steady for m in self.measurements):
            notes.append("* warm-up had not settled: the machine was busy or the model slow.")
        if not with_p95:
            needed = samples_for_percentile(95)
            notes.append(f"No p95: it needs {needed} samples of single calls (--rounds {needed}).")
        if with_memory:
            notes.append(
                "Peak memory: VmHWM of a fresh process that loads and runs the variant, with the "
                "interpreter and libraries, and compilation where there is one."
            )
        return notes


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


def require_output_file(path: Path) -> None:
    """Refuse, before anything is measured, an output that could not be written afterwards.

    Raises:
        InputError: the path is a folder, or its folder is missing or read-only.
    """
    if path.is_dir():
        raise InputError(f"-o {path} is a folder, expected a file. Pass {path / 'bench.json'}.")
    if not path.parent.is_dir():
        raise InputError(f"-o {path}: the folder {path.parent} does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"-o {path}: the folder {path.parent} is not writable. Choose another.")


def write_report(report: BenchReport, path: Path) -> None:
    """Write the report's JSON to `path`: the whole document appears there, or nothing changes.

    Raises:
        MmoptError: the file system refused (disk full, read-only); exit 3.
    """
    text = json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
    staged: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            staged = Path(file.name)
            file.write(text)
        # NamedTemporaryFile is private to the user; a result is read by others too.
        staged.chmod(0o644)
        staged.replace(path)
        staged = None
    except OSError as error:
        raise MmoptError(f"could not write {path}: {error.strerror or error}.") from error
    finally:
        if staged is not None:
            staged.unlink(missing_ok=True)


def source_labels(measurements: Sequence[Measurement]) -> dict[str, str]:
    """The shortest name that tells each source apart: its last path part where that suffices."""
    sources = list(dict.fromkeys(m.source for m in measurements))
    short = {source: Path(source).name or source for source in sources}
    return short if len(set(short.values())) == len(sources) else {s: s for s in sources}


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}"


def _format_memory(memory: PeakMemory | None) -> str:
    if memory is None or memory.process_bytes is None:
        return "-"
    return f"{memory.process_bytes / 1e6:,.0f} MB"
