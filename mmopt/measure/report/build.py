"""Read results and write what is asked for: what `mmopt bench report` calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.report.junit import junit_report
from mmopt.measure.report.markdown import markdown_report
from mmopt.measure.report.page import html_report
from mmopt.measure.report.wording import (
    HOW_NAMED,
    by_machine,
    change_text,
    compact_names,
    counts_text,
    figure_text,
    interval_text,
    machine_line,
    margin_text,
    revision_text,
    self_test_lines,
    share,
    short_names,
    worst_first,
)
from mmopt.measure.results import format_seconds, require_output_file
from mmopt.measure.stored import StoredResult, read_results
from mmopt.measure.suites.files import write_text
from mmopt_kernels import __version__
from mmopt_kernels.errors import InputError

SCHEMA_VERSION = 1

FORMS: Mapping[str, tuple[str, Callable[[Sequence[StoredResult]], str]]] = {
    "html": ("report.html", html_report),
    "markdown": ("report.md", markdown_report),
    "junit": ("report.xml", junit_report),
}
"""By the name of its option: a file name to propose, and what makes its text."""

_STYLES = {
    "REGRESSED": "bold red",
    "MISSING": "bold red",
    "FAILED": "bold red",
    "INCONCLUSIVE": "bold yellow",
    "IMPROVED": "bold green",
    "PASSED": "green",
    "NEW": "cyan",
}


@dataclass(frozen=True)
class ResultsReport:
    """What `report` returns.

    Attributes:
        results: in the order given.
        written: the files written, by the name of the option.
    """

    results: tuple[StoredResult, ...]
    written: Mapping[str, Path]

    @property
    def exit_code(self) -> int:
        """Always 0, whatever a gate in it decided: to report is not to judge."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """What was read and what was written, as JSON values."""
        machines = by_machine(self.results)
        number = {
            result.path: index
            for index, machine in enumerate(machines, start=1)
            for result in machine.results
        }
        return {
            "schema": SCHEMA_VERSION,
            "kind": "report",
            "mmopt": __version__,
            "files": [
                {
                    "path": str(result.path),
                    "kind": result.kind,
                    "created": result.created,
                    "machine": number[result.path],
                    "verdict": None if result.gate is None else result.gate["verdict"],
                    "benchmarks": {one.name: one.median for one in result.series},
                    "figures": {name: one["value"] for name, one in result.figures.items()},
                    "warnings": list(result.warnings),
                }
                for result in self.results
            ],
            "machines": [machine.fingerprint for machine in machines],
            "written": {form: str(path) for form, path in self.written.items()},
        }

    def render(self) -> RenderableType:
        """The verdict of each gate and what did not pass; a table of each other file."""
        parts: list[RenderableType] = []
        for machine in by_machine(self.results):
            for result in machine.results:
                title = f"{result.path}, {result.when:%Y-%m-%d %H:%M} ({result.kind})"
                parts += _gate(result.gate) if result.gate else [_table(result, title)]
                parts += [Text(f"Warning: {w}", style="yellow") for w in result.warnings]
            parts.append(Text(f"On {machine_line(machine.fingerprint)}."))
        if any(one.backend for result in self.results for one in result.series):
            parts.append(Text(HOW_NAMED))
        parts += [Text(f"Wrote {path}.") for path in self.written.values()]
        return Group(*parts)


def report(
    paths: Sequence[Path],
    *,
    html: Path | None = None,
    markdown: Path | None = None,
    junit: Path | None = None,
) -> ResultsReport:
    """Read results and write the forms that a path is given for; each file whole or not at all.

    Args:
        paths: results of `mmopt bench run`, of pytest-benchmark, and of `mmopt bench gate`.
        html: one page that holds all it shows.
        markdown: a summary fit for a pull request.
        junit: XML for a CI system.

    Raises:
        InputError: an output that is a folder, could not be written, is given twice or is an input;
            a file given twice, or one that `read_result` refuses.
        MmoptError: the file system refused (exit 3).
    """
    asked = {"html": html, "markdown": markdown, "junit": junit}
    outputs = {form: path for form, path in asked.items() if path is not None}
    _check_outputs(paths, outputs)
    results = read_results(list(paths))
    # All are made before the first is written: a fault in one leaves no half of a report.
    texts = {form: FORMS[form][1](results) for form in outputs}
    for form, text in texts.items():
        write_text(outputs[form], text)
    return ResultsReport(tuple(results), outputs)


def _check_outputs(paths: Sequence[Path], outputs: Mapping[str, Path]) -> None:
    inputs = {path.resolve() for path in paths}
    seen: dict[Path, str] = {}
    for form, path in outputs.items():
        require_output_file(path, f"--{form}", FORMS[form][0])
        whole = path.resolve()
        if whole in inputs:
            raise InputError(
                f"--{form} {path} is one of the results, which it would replace. Choose another "
                "file."
            )
        if whole in seen:
            raise InputError(
                f"--{form} {path} is what --{seen[whole]} writes as well. Choose another file."
            )
        seen[whole] = form


def _gate(gate: Mapping[str, Any]) -> list[RenderableType]:
    verdict = Text(gate["verdict"], style=_STYLES[gate["verdict"]])
    parts: list[RenderableType] = [verdict + Text(f": {counts_text(gate)}")]
    parts.append(Text(f"{revision_text(gate['base'])} → {revision_text(gate['head'])}"))
    told = [one for one in worst_first(gate["benchmarks"]) if one["verdict"] != "PASSED"]
    if told:
        table = Table()
        table.add_column("benchmark", overflow="fold")
        for heading in ("slower by", "95% CI", "margin"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        names = short_names(one["name"] for one in told)
        for one in told:
            cells = [share(one.get("slowdown")), interval_text(one.get("interval"))]
            table.add_row(
                # Node ids hold brackets, which rich would read as markup.
                Text(names[one["name"]]),
                *map(Text, [*cells, margin_text(one["margin"])]),
                Text(one["verdict"], style=_STYLES[one["verdict"]]),
            )
        parts.append(table)
    changed = [one for one in worst_first(gate["figures"]) if one["verdict"] != "PASSED"]
    if changed:
        table = Table()
        table.add_column("exact figure", overflow="fold")
        for heading in ("base", "head", "change"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        names = short_names(one["name"] for one in changed)
        for one in changed:
            base, head = one.get("base"), one.get("head")
            cells = [figure_text(base, one["unit"]), figure_text(head, one["unit"])]
            table.add_row(
                Text(names[one["name"]]),
                *map(Text, [*cells, change_text(base, head)]),
                Text(one["verdict"], style=_STYLES[one["verdict"]]),
            )
        parts.append(table)
    parts += [Text(note) for note in gate["notes"]]
    return parts + [Text(line) for line in self_test_lines(gate)]


def _table(result: StoredResult, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("benchmark", overflow="fold")
    for heading in ("median", "95% CI", "samples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one, name in zip(result.series, compact_names(result.series), strict=True):
        ends = f"{format_seconds(one.interval.low)} to {format_seconds(one.interval.high)}"
        row = [name, format_seconds(one.median), ends, f"{len(one.samples):,}"]
        table.add_row(*map(Text, row))
    if result.figures:
        table.add_section()
        figures = short_names(result.figures)
        for name, figure in result.figures.items():
            value = figure_text(figure["value"], figure["unit"])
            table.add_row(Text(figures[name]), Text(value))
    return table
