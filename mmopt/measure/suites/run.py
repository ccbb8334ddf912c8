"""Run benchmark suites with pytest and keep what they measured: `mmopt bench run bench/`."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.results import format_seconds
from mmopt.measure.statistics import (
    Interval,
    bootstrap_median,
    median,
    samples_for_percentile,
    supported_percentile,
)
from mmopt.measure.suites.collection import short_names
from mmopt.measure.suites.figures import Figure, parse_figures
from mmopt.measure.suites.files import write_json
from mmopt.measure.suites.process import (
    measure_figures,
    require_finished,
    require_suites,
    run_pytest,
)
from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError, MmoptError

SHORTEST_ROUND_SECONDS = 1e-4
"""What pytest-benchmark makes a round last at least: shorter calls are repeated within a round.

Reading the clock twice is then at most 0.1% of a round, and a benchmark of pytest-benchmark's one
second has at most some 10,000 samples to store.
"""


@dataclass(frozen=True)
class TimedTest:
    """One benchmark of a suite.

    Attributes:
        name: its node id.
        group: what pytest-benchmark shows side by side; None without a group.
        samples: seconds per call.
        calls: calls averaged in one sample.
    """

    name: str
    group: str | None
    samples: tuple[float, ...]
    calls: int

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


@dataclass(frozen=True)
class SuiteReport:
    """What `run_suites` returns.

    Attributes:
        document: pytest-benchmark's JSON with one key more, `mmopt`: fingerprint, conditions and
            exact figures.
    """

    document: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        """Always 0: to measure is not to judge."""
        return 0

    @cached_property
    def tests(self) -> tuple[TimedTest, ...]:
        """The benchmarks, in the order they ran."""
        return tuple(
            TimedTest(
                name=entry["fullname"],
                group=entry["group"],
                samples=tuple(entry["stats"]["data"]),
                calls=entry["stats"]["iterations"],
            )
            for entry in self.document["benchmarks"]
        )

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The exact figures, by id."""
        return parse_figures(self.document["mmopt"], "the result")

    def to_dict(self) -> dict[str, Any]:
        """The document: what `-o` writes."""
        return dict(self.document)

    def render(self) -> RenderableType:
        """A table per group, the exact figures, and below them what the numbers hold for."""
        with_p95 = any(test.p95 is not None for test in self.tests)
        parts: list[RenderableType] = []
        groups: dict[str, list[TimedTest]] = {}
        for test in self.tests:
            groups.setdefault(test.group or "", []).append(test)
        table = Table()
        table.add_column("benchmark", overflow="fold")
        for heading in ("median", "95% CI", *(["p95"] if with_p95 else []), "rounds"):
            table.add_column(heading, justify="right", no_wrap=True)
        names = short_names([test.name for test in self.tests])
        for group, tests in groups.items():
            table.add_section()
            if group:
                table.add_row(Text(group, style="bold"))
            for test in tests:
                interval = test.interval
                row = [names[test.name], format_seconds(test.median)]
                row += [f"{format_seconds(interval.low)} to {format_seconds(interval.high)}"]
                row += [format_seconds(test.p95)] * with_p95
                # Parameters stand in brackets, which rich would read as markup.
                table.add_row(*map(Text, [*row, str(len(test.samples))]))
        parts.append(table)
        if self.figures:
            parts.append(figures_table(self.figures))
        parts += map(Text, self._notes(with_p95))
        return Group(*parts)

    def _notes(self, with_p95: bool) -> list[str]:
        ours = self.document["mmopt"]
        ran_on = ours["fingerprint"]
        notes = [
            f"{ran_on['cpu'] or 'unknown CPU'}, {ran_on['cores']} cores, "
            f"{ran_on['torch_threads']} threads, torch {ran_on['torch']}"
        ]
        notes += (ours["conditions"] or {}).get("warnings", [])
        if not with_p95:
            needed = samples_for_percentile(95)
            notes.append(f"No p95: it needs {needed} rounds of single calls.")
        return notes


def figures_table(figures: Mapping[str, Figure]) -> Table:
    """The exact figures, a row each."""
    table = Table()
    table.add_column("exact figure", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name, short in short_names(list(figures)).items():
        figure = figures[name]
        table.add_row(Text(short), Text(f"{figure.value:,} {figure.unit}".rstrip()))
    return table


def run_suites(
    suites: Sequence[str],
    *,
    keyword: str | None = None,
    options: Sequence[str] = (),
    progress: Progress = silent,
) -> SuiteReport:
    """Run the benchmarks of pytest-benchmark suites, then their exact figures.

    Both run in processes of their own, in the current folder: one that is timed, and one that
    counts, in which nothing has been compiled or allocated before.

    Args:
        suites: folders, files or node ids, as pytest takes them.
        keyword: pytest's `-k`: only the tests that it selects.
        options: further options of pytest and pytest-benchmark, for the timed process; those that
            select tests (`-m`, `--deselect`, `--ignore`) reach the other one as well.

    Raises:
        InputError: no such file, no benchmark in it, or an option that pytest refuses.
        MmoptError: pytest or pytest-benchmark is missing, or a test failed or crashed (exit 3).
    """
    require_suites(suites)
    selecting = [*options, *suites]
    if keyword is not None:
        selecting = ["-k", keyword, *selecting]
    with tempfile.TemporaryDirectory(prefix="mmopt-bench-") as folder:
        timed = Path(folder) / "timed.json"
        lines = run_pytest(
            [
                "--benchmark-only",
                f"--benchmark-min-time={SHORTEST_ROUND_SECONDS}",
                f"--benchmark-json={timed}",
                *selecting,
            ],
            suites=suites,
            what=f"time {' '.join(suites)}",
            progress=progress,
        )
        if not timed.is_file():
            require_finished(lines, " ".join(suites))
            raise InputError(
                f"{' '.join(suites)}: no benchmark was collected"
                f"{f' with -k {keyword!r}' if keyword else ''}, expected functions bench_* or "
                "test_* that take pytest-benchmark's fixture `benchmark`. For a suite of exact "
                "figures only, run `mmopt bench exact`."
            )
        document = json.loads(timed.read_text("utf-8"), parse_constant=lambda _constant: None)
        _check(document, suites)
        document["mmopt"]["figures"] = {
            name: figure.to_dict()
            for name, figure in measure_figures(
                suites, keyword=keyword, options=options, progress=progress
            ).items()
        }
    return SuiteReport(document)


def write_suite_report(report: SuiteReport, path: Path) -> None:
    """Write the document to `path`: whole or not at all; MmoptError when the system refuses."""
    write_json(path, report.to_dict())


def _check(document: Any, suites: Sequence[str]) -> None:
    """What pytest-benchmark wrote must be what this module reads."""
    try:
        complete = all(
            entry["stats"]["data"] and entry["stats"]["iterations"] and entry["fullname"]
            for entry in document["benchmarks"]
        )
        document["mmopt"]["fingerprint"]
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise MmoptError(
            f"{' '.join(suites)}: pytest-benchmark wrote no samples, expected some for every "
            "benchmark. Install pytest-benchmark 5 or newer, and leave out options that disable it."
        )
