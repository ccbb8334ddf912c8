"""Hold a suite's exact figures against a committed file: `mmopt bench exact`."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.suites.figures import (
    Figure,
    FigureVerdict,
    compare_figures,
    parse_figures,
    read_document,
    write_figures,
)
from mmopt.measure.suites.process import measure_figures
from mmopt_export.progress import Progress, silent
from mmopt_kernels import __version__
from mmopt_kernels.errors import InputError

SCHEMA_VERSION = 1

# What a figure can depend on besides the code: how a graph is traced, stored and broken.
_LIBRARIES = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)

_FAILS = ("REGRESSED", "MISSING", "NEW")

_STYLE = {"REGRESSED": "red", "MISSING": "red", "NEW": "red", "IMPROVED": "green"}


@dataclass(frozen=True)
class ExactReport:
    """What `exact_gate` and `update_baseline` return.

    Attributes:
        suites: what was run.
        baseline: the file that the figures were held against, or recorded in.
        verdicts: one per figure that either side has.
        notes: what the reader should know, library versions that differ, say.
        updated: whether the baseline now holds the figures of the head.
    """

    suites: tuple[str, ...]
    baseline: Path
    verdicts: tuple[FigureVerdict, ...]
    notes: tuple[str, ...]
    updated: bool = False

    @property
    def failures(self) -> tuple[FigureVerdict, ...]:
        """The figures that are worse, missing, or not recorded in the baseline."""
        return tuple(one for one in self.verdicts if one.verdict in _FAILS)

    @property
    def exit_code(self) -> int:
        """0 when every figure is as recorded or better, or was just recorded; 1 otherwise."""
        return 1 if self.failures and not self.updated else 0

    @property
    def verdict(self) -> str:
        """`REGRESSED`, `IMPROVED` or `PASSED`, for all figures together."""
        if self.failures:
            return "REGRESSED"
        better = any(one.verdict == "IMPROVED" for one in self.verdicts)
        return "IMPROVED" if better else "PASSED"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "schema": SCHEMA_VERSION,
            "kind": "exact",
            "mmopt": __version__,
            "suites": list(self.suites),
            "baseline": str(self.baseline),
            "updated": self.updated,
            "verdict": None if self.updated else self.verdict,
            "exit_code": self.exit_code,
            "figures": [one.to_dict() for one in self.verdicts],
            "notes": list(self.notes),
        }

    def render(self) -> RenderableType:
        """A table of what changed, and one line that says whether it holds."""
        changed = [one for one in self.verdicts if one.verdict != "PASSED"]
        if self.updated and all(one.verdict == "NEW" for one in changed):
            changed = []  # the first recording: there is nothing to compare it with
        # The worst first.
        changed.sort(key=lambda one: [*_FAILS, "IMPROVED"].index(one.verdict))
        parts: list[RenderableType] = []
        if changed:
            parts.append(_table(changed))
        parts += map(Text, self.notes)
        parts.append(Text(self._summary(len(changed))))
        return Group(*parts)

    def _summary(self, changed: int) -> str:
        count = len(self.verdicts)
        if self.updated:
            return f"{self.baseline} now records {_measured(self.verdicts)} exact figures."
        if self.failures:
            return (
                f"{self.verdict}: {len(self.failures)} of {count} exact figures are worse than in "
                f"{self.baseline}, missing or not recorded there. If the change is meant, "
                f"record it: mmopt bench exact {' '.join(self.suites)} --baseline {self.baseline} "
                "--update"
            )
        if changed:
            return (
                f"{self.verdict}: {changed} of {count} exact figures are better than in "
                f"{self.baseline}. Record them with --update, so that they stay so."
            )
        return f"{self.verdict}: all {count} exact figures are as in {self.baseline}."


def exact_gate(
    suites: Sequence[str], baseline: Path, *, progress: Progress = silent
) -> ExactReport:
    """Count the exact figures of suites and hold them against a committed file.

    Args:
        suites: folders, files or node ids, as pytest takes them.
        baseline: what `update_baseline` wrote.

    Raises:
        InputError: the baseline is missing, corrupt or empty, or the suites have no exact figures.
        MmoptError: a test failed or crashed (exit 3).
    """
    # Before the figures are counted: whoever has to mend the file should not wait for them.
    if not baseline.exists():
        raise InputError(
            f"{baseline} does not exist, expected the committed figures. Record them with --update."
        )
    document = read_document(baseline)
    recorded = parse_figures(document, str(baseline))
    if not recorded:
        raise InputError(
            f"{baseline} records no figures, expected one or more. Record them with --update."
        )
    measured = _measure(suites, progress)
    return ExactReport(
        suites=tuple(suites),
        baseline=baseline,
        verdicts=tuple(compare_figures(recorded, measured)),
        notes=_version_notes(document.get("versions")),
    )


def update_baseline(
    suites: Sequence[str], baseline: Path, *, progress: Progress = silent
) -> ExactReport:
    """Count the exact figures of suites and record them; the file changes whole or not at all.

    The report says what became of the figures that the file held before, if it could be read.

    Raises:
        InputError: the suites have no exact figures, or the baseline's folder does not exist.
        MmoptError: a test failed or crashed, or the file cannot be written (exit 3).
    """
    if baseline.is_dir() or not baseline.parent.is_dir():
        raise InputError(f"{baseline}: expected a file in a folder that exists. Create it first.")
    before: dict[str, Figure] = {}
    notes: tuple[str, ...] = ()
    if baseline.exists():
        try:
            before = parse_figures(read_document(baseline), str(baseline))
        except InputError as error:
            notes = (f"What was there before is lost: {error}",)
    measured = _measure(suites, progress)
    write_figures(baseline, measured, versions=library_versions())
    verdicts = tuple(compare_figures(before, measured))
    return ExactReport(tuple(suites), baseline, verdicts, notes, updated=True)


def library_versions() -> dict[str, str | None]:
    """The versions that exact figures can depend on, None where a library is not installed.

    Without the local part: `2.13.0+cpu` and `2.13.0` trace the same graph.
    """
    versions: dict[str, str | None] = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
    }
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def _measure(suites: Sequence[str], progress: Progress) -> dict[str, Figure]:
    measured = measure_figures(suites, progress=progress)
    if not measured:
        raise InputError(
            f"{' '.join(suites)}: no exact figure was recorded, expected functions exact_* that "
            "take the fixture `figures` and record some."
        )
    return measured


def _version_notes(recorded: object) -> tuple[str, ...]:
    if not isinstance(recorded, Mapping):
        return ("The baseline does not say which library versions it was recorded with.",)
    here = library_versions()
    differing = [
        f"{name} {recorded.get(name) or 'none'} (here {here[name] or 'none'})"
        for name in here
        if recorded.get(name) != here[name]
    ]
    if not differing:
        return ()
    return (
        f"The baseline was recorded with {', '.join(differing)}: a figure may differ for that "
        "reason alone.",
    )


def _measured(verdicts: Sequence[FigureVerdict]) -> int:
    return sum(one.head is not None for one in verdicts)


def _table(changed: Sequence[FigureVerdict]) -> Table:
    table = Table(title="exact figures that changed", title_justify="left")
    table.add_column("verdict", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for heading in ("recorded", "now"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in changed:
        row = [one.name, _shown(one.base, one.unit), _shown(one.head, one.unit)]
        table.add_row(Text(one.verdict, style=_STYLE[one.verdict]), *map(Text, row))
    return table


def _shown(value: int | None, unit: str) -> str:
    return "-" if value is None else f"{value:,} {unit}".rstrip()
