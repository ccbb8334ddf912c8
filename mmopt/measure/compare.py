"""Two stored results side by side: what `mmopt bench compare` calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mmopt.measure.fingerprint import differing_fields
from mmopt.measure.report.wording import (
    HOW_NAMED,
    NO_FINGERPRINT,
    change_text,
    compact_names,
    figure_text,
    machine_line,
    share,
    short_names,
    value_text,
)
from mmopt.measure.results import format_seconds
from mmopt.measure.statistics import Interval, bootstrap_ratio, holm, mann_whitney
from mmopt.measure.stored import GATE, Series, StoredResult, read_results
from mmopt.measure.suites.figures import FigureVerdict, compare_figures, parse_figures
from mmopt_kernels import __version__
from mmopt_kernels.errors import InputError

SCHEMA_VERSION = 1

CANNOT_TELL = (
    "Interval and p speak of the samples in these two files. Each file comes from a process of its "
    "own, and a process has its own speed (layout of memory, what ran beside it): a few percent, "
    "however small p is, may be no change of the program. To find out whether a change made it "
    "slower, run `mmopt bench gate`, in which that cancels."
)

# Of the bars, in characters; an odd number, so that zero has one of its own.
_BAR = 41

# Of equal figures, in the terminal's table; more of them are counted.
_MOST_SAME = 10

_FIGURE_WORDS = {
    "REGRESSED": "worse",
    "IMPROVED": "better",
    "PASSED": "same",
    "MISSING": "only in A",
    "NEW": "only in B",
}


@dataclass(frozen=True)
class Row:
    """One benchmark in both files.

    Attributes:
        name: the same in both.
        a, b: what each file has of it.
        p_value: Mann-Whitney over the samples, two-sided, Holm-adjusted over all rows.
    """

    name: str
    a: Series
    b: Series
    p_value: float

    @property
    def ratio(self) -> float:
        """Median of B over median of A: above 1, B takes longer."""
        return self.b.median / self.a.median

    @cached_property
    def interval(self) -> Interval:
        """95% bootstrap interval of `ratio`, of the samples in the two files."""
        return bootstrap_ratio(self.a.samples, self.b.samples)

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON values; times in seconds."""
        return {
            "name": self.name,
            "a_median_seconds": self.a.median,
            "b_median_seconds": self.b.median,
            "a_samples": len(self.a.samples),
            "b_samples": len(self.b.samples),
            "ratio": self.ratio,
            "ratio_ci95": [self.interval.low, self.interval.high],
            "p_value_holm": self.p_value,
        }


@dataclass(frozen=True)
class CompareReport:
    """What `compare` returns.

    Attributes:
        a, b: the files.
        rows: the benchmarks that both have, in the order of A.
        only_a, only_b: names that one file has alone.
        figures: exact figures of both, `base` of A and `head` of B.
        different: where the fingerprints differ, as (field, value in A, value in B); `fingerprint`
            itself where a file has none. Empty unless different machines were allowed.
    """

    a: StoredResult
    b: StoredResult
    rows: tuple[Row, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    figures: tuple[FigureVerdict, ...]
    different: tuple[tuple[str, Any, Any], ...]

    @property
    def exit_code(self) -> int:
        """Always 0: to look is not to judge."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "schema": SCHEMA_VERSION,
            "kind": "compare",
            "mmopt": __version__,
            "a": _side(self.a),
            "b": _side(self.b),
            "different": [{"field": f, "a": a, "b": b} for f, a, b in self.different],
            "benchmarks": [row.to_dict() for row in self.rows],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "figures": [
                {"name": f.name, "unit": f.unit, "better": f.better, "a": f.base, "b": f.head}
                for f in self.figures
            ],
            "cannot_tell": CANNOT_TELL,
        }

    def render(self) -> RenderableType:
        """What differs between the machines, a table, bars, exact figures, and the caution."""
        parts: list[RenderableType] = [Text(line, style="bold yellow") for line in self.cautions]
        parts += [Text(f"{side}: {_file_line(file)}") for side, file in self._sides]
        if self.rows:
            parts += [self._table(), _Bars(self.rows, self.names)]
        if any(row.a.backend for row in self.rows):
            parts.append(Text(HOW_NAMED))
        parts += self._figures()
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            parts += [Text(f"Only in {side}: {name}") for name in names]
        for side, file in self._sides:
            parts += [Text(f"Warning, {side}: {one}", style="yellow") for one in file.warnings]
        parts.append(Text(CANNOT_TELL))
        return Group(*parts)

    @property
    def names(self) -> list[str]:
        """A short name for each row."""
        return compact_names([row.a for row in self.rows])

    @property
    def cautions(self) -> list[str]:
        """What stands above everything else: that the machines differ, and where."""
        if not self.different:
            return []
        lines = ["Machine or versions differ: the ratios mix that with what the program changed."]
        return lines + [f"  {line}" for line in _differences(self.different)]

    @property
    def _sides(self) -> tuple[tuple[str, StoredResult], tuple[str, StoredResult]]:
        return ("A", self.a), ("B", self.b)

    def _table(self) -> Table:
        table = Table()
        table.add_column("benchmark", overflow="fold", min_width=16)
        for heading in ("A", "B", "B/A", "95% CI", "p"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row, name in zip(self.rows, self.names, strict=True):
            cells = [name, format_seconds(row.a.median), format_seconds(row.b.median)]
            cells += [f"{row.ratio:.3f}", f"{row.interval.low:.3f}-{row.interval.high:.3f}"]
            # Parameters stand in brackets, which rich would read as markup.
            table.add_row(*map(Text, [*cells, p_text(row.p_value)]))
        return table

    def _figures(self) -> list[RenderableType]:
        rows = figure_rows(self.figures)
        told = [row for row in rows if row[-1] != _FIGURE_WORDS["PASSED"]]
        same = len(rows) - len(told)
        if same <= _MOST_SAME:
            told, same = rows, 0
        parts: list[RenderableType] = []
        if told:
            table = Table()
            table.add_column("exact figure", overflow="fold", min_width=16)
            for heading in ("A", "B", "change"):
                table.add_column(heading, justify="right", no_wrap=True)
            table.add_column("", no_wrap=True)
            for row in told:
                table.add_row(*map(Text, row))
            parts.append(table)
        if same:
            parts.append(Text(f"{same} exact figures are the same in both; --json lists them."))
        return parts


@dataclass(frozen=True)
class _Bars:
    """One bar per row from equal times to its ratio, its interval as a thin line."""

    rows: Sequence[Row]
    names: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        reach = _reach(self.rows)
        room = max(12, options.max_width - _BAR - 10)
        half = _BAR // 2
        yield Text(f"{'B faster':<{half}}│{'B slower':>{half}}", style="dim")
        for row, name in zip(self.rows, self.names, strict=True):
            bar = _bar(row.ratio - 1, row.interval.low - 1, row.interval.high - 1, reach)
            style = "dim" if row.p_value > 0.05 else "red" if row.ratio > 1 else "green"
            # The end of a name is what tells it from its neighbours.
            shown = name if len(name) <= room else f"…{name[1 - room :]}"
            line = Text(bar, style=style, no_wrap=True, overflow="ellipsis")
            yield line.append(f" {share(row.ratio - 1):>7}  {shown}", style="default not dim")
        yield Text(f"{f'{-reach:+.0%}':<{half}}0{f'{reach:+.0%}':>{half}}", style="dim")


def compare(a: Path, b: Path, *, allow_different: bool = False) -> CompareReport:
    """Hold two stored results against each other, benchmark by benchmark and figure by figure.

    Args:
        a, b: results of `mmopt bench run` or of pytest-benchmark.
        allow_different: look even where the fingerprints differ, and say so.

    Raises:
        InputError: a file that `read_result` refuses, a gate's report, one file twice, different or
            unknown fingerprints, or nothing that both files have.
    """
    first, second = read_results([a, b])
    for file in (first, second):
        if file.kind == GATE:
            raise InputError(
                f"{file.path} is a gate's report, expected results with samples. A gate has "
                "compared two revisions already: show it with `mmopt bench report`."
            )
    different = _different(first, second)
    if different and not allow_different:
        raise InputError(
            f"{a} and {b} were not measured on the same machine with the same versions, so their "
            "times do not compare:\n"
            + "\n".join(f"  {line}" for line in _differences(different))
            + "\nMeasure both on one machine, or pass --allow-different to look anyway."
        )
    rows = _rows(first, second)
    figures = compare_figures(
        *(parse_figures({"figures": f.figures}, str(f.path)) for f in (first, second))
    )
    both = {row.name for row in rows}
    if not both and not any(f.base is not None and f.head is not None for f in figures):
        raise InputError(
            f"{a} and {b} have no benchmark and no exact figure in common: A has "
            f"{first.series[0].name!r}, B {second.series[0].name!r}, say. Pass two results of the "
            "same suite, or of the same models by the same names."
        )
    return CompareReport(
        a=first,
        b=second,
        rows=rows,
        only_a=tuple(one.name for one in first.series if one.name not in both),
        only_b=tuple(one.name for one in second.series if one.name not in both),
        figures=tuple(figures),
        different=different,
    )


def p_text(p_value: float) -> str:
    """A p value with the digits that matter."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def figure_rows(figures: Sequence[FigureVerdict]) -> list[tuple[str, str, str, str, str]]:
    """Name, A, B, change and a word for each figure, those that differ first."""
    ordered = sorted(figures, key=lambda figure: figure.verdict == "PASSED")
    names = short_names(figure.name for figure in ordered)
    return [
        (
            names[f.name],
            figure_text(f.base, f.unit),
            figure_text(f.head, f.unit),
            change_text(f.base, f.head),
            _FIGURE_WORDS[f.verdict],
        )
        for f in ordered
    ]


def _rows(a: StoredResult, b: StoredResult) -> tuple[Row, ...]:
    theirs = {one.name: one for one in b.series}
    pairs = [(one, theirs[one.name]) for one in a.series if one.name in theirs]
    p_values = holm([mann_whitney(one.samples, other.samples).p_value for one, other in pairs])
    return tuple(
        Row(one.name, one, other, p) for (one, other), p in zip(pairs, p_values, strict=True)
    )


def _different(a: StoredResult, b: StoredResult) -> tuple[tuple[str, Any, Any], ...]:
    if a.fingerprint is None or b.fingerprint is None:
        # Nothing is known to be equal, not even where neither file has one.
        return (("fingerprint", machine_line(a.fingerprint), machine_line(b.fingerprint)),)
    fields = differing_fields(a.fingerprint, b.fingerprint)
    return tuple((field, a.fingerprint.get(field), b.fingerprint.get(field)) for field in fields)


def _differences(different: Sequence[tuple[str, Any, Any]]) -> list[str]:
    lines = [f"{name}: {value_text(a)} in A, {value_text(b)} in B" for name, a, b in different]
    return lines + [NO_FINGERPRINT] * (different[0][0] == "fingerprint")


def _side(result: StoredResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "kind": result.kind,
        "created": result.created,
        "commit": result.commit,
        "fingerprint": result.fingerprint,
        "warnings": list(result.warnings),
    }


def _file_line(file: StoredResult) -> str:
    commit = f", commit {file.commit[:12]}" if file.commit else ""
    return f"{file.path} ({file.when:%Y-%m-%d %H:%M}{commit})"


def _reach(rows: Sequence[Row]) -> float:
    """The change at either end of the bars: all ratios, and at least 5%."""
    largest = max(abs(row.ratio - 1) for row in rows)
    return next((end for end in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if largest <= end), largest)


def _bar(value: float, low: float, high: float, reach: float) -> str:
    half = _BAR // 2

    def place(change: float) -> int:
        return half + round(min(max(change / reach, -1), 1) * half)

    cells = [" "] * _BAR
    for index in range(place(low), place(high) + 1):
        cells[index] = "─"
    start, end = sorted((half, place(value)))
    for index in range(start, end + 1):
        cells[index] = "█"
    cells[half] = "│"
    return "".join(cells)
