"""What the gate found: plain data, its JSON and its table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.gate.decision import Contest, Verdict, of_suite
from mmopt.measure.gate.revisions import Revision
from mmopt.measure.statistics import median
from mmopt.measure.suites.collection import short_names
from mmopt.measure.suites.figures import FigureVerdict
from mmopt_kernels._version import __version__

SCHEMA_VERSION = 1

_STYLES = {
    Verdict.REGRESSED: "bold red",
    Verdict.MISSING: "bold red",
    Verdict.FAILED: "bold red",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.IMPROVED: "bold green",
    Verdict.PASSED: "green",
    Verdict.NEW: "cyan",
}


@dataclass(frozen=True)
class GateReport:
    """What `gate` returns.

    Attributes:
        base, head: the revisions compared.
        margin: of the benchmarks without one of their own.
        alpha: of all suites without a slowdown, the share that may be called REGRESSED.
        contests: one per timed benchmark, in the suite's order, each with a verdict.
        figures: one per exact figure.
        fingerprint, conditions: the machine, and what it did meanwhile.
        notes: what a reader should know.
        self_test: what `--self-test` last measured on this machine; None when it never did.
        seconds: how long it took.
        created: UTC, ISO 8601.
    """

    base: Revision
    head: Revision
    margin: float
    alpha: float
    contests: tuple[Contest, ...]
    figures: tuple[FigureVerdict, ...]
    fingerprint: Mapping[str, Any]
    conditions: Mapping[str, Any] | None
    notes: tuple[str, ...]
    self_test: Mapping[str, Any] | None
    seconds: float
    created: str

    @property
    def verdict(self) -> Verdict:
        """The suite's."""
        timed = [contest.verdict or Verdict.INCONCLUSIVE for contest in self.contests]
        return of_suite(timed + [Verdict(figure.verdict) for figure in self.figures])

    @property
    def exit_code(self) -> int:
        """0 passed or improved, 1 regressed or a benchmark is missing, 3 not decided."""
        return {Verdict.REGRESSED: 1, Verdict.INCONCLUSIVE: 3}.get(self.verdict, 0)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; times in seconds, slowdowns as shares."""
        return {
            "schema": SCHEMA_VERSION,
            "kind": "gate",
            "mmopt": __version__,
            "created": self.created,
            "seconds": round(self.seconds, 3),
            "base": {"ref": self.base.ref, "commit": self.base.commit},
            "head": {"ref": self.head.ref, "commit": self.head.commit},
            "margin": self.margin,
            "alpha": self.alpha,
            "verdict": self.verdict.value,
            "exit_code": self.exit_code,
            "benchmarks": [_contest_dict(contest) for contest in self.contests],
            "figures": [figure.to_dict() for figure in self.figures],
            "fingerprint": dict(self.fingerprint),
            "conditions": None if self.conditions is None else dict(self.conditions),
            "notes": list(self.notes),
            "self_test": None if self.self_test is None else dict(self.self_test),
        }

    def render(self) -> RenderableType:
        """A table of benchmarks, one of the figures that changed, and the verdict."""
        parts: list[RenderableType] = []
        if self.contests:
            parts.append(self._contests_table())
        changed = [figure for figure in self.figures if figure.verdict != Verdict.PASSED]
        if self.figures:
            parts.append(_figures_table(changed, len(self.figures)))
        parts += [Text(note) for note in self.notes]
        parts += [Text(c.note) for c in self.contests if c.note]
        parts += [
            Text(f"Meanwhile {warning}.") for warning in (self.conditions or {}).get("warnings", ())
        ]
        parts.append(Text(self_test_line(self.self_test)))
        verdict = self.verdict
        parts.append(Text(f"{verdict} in {self.seconds:.0f} s", style=_STYLES[verdict]))
        return Group(*parts)

    def _contests_table(self) -> Table:
        """A row per benchmark; the long names last, and its margin only where it has its own."""
        title = f"{self.base.ref} -> {self.head.ref}, margin {self.margin:.1%}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("verdict", no_wrap=True)
        for column in ("slower by", "95% CI", "pairs"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("benchmark", overflow="fold")
        names = short_names([contest.name for contest in self.contests])
        for contest in self.contests:
            name = names[contest.name]
            if contest.margin != self.margin:
                name += f" (margin {contest.margin:.1%})"
            table.add_row(*_row(contest, name))
        return table


def self_test_line(self_test: Mapping[str, Any] | None) -> str:
    """How far the gate can be believed on this machine, in one sentence."""
    if self_test is None:
        return (
            "How often the gate errs was not measured on this machine: "
            "mmopt bench gate --self-test does."
        )
    return (
        f"Self-test on this machine ({self_test['created'][:10]}): "
        f"{self_test['false_alarms']} false alarms in {self_test['trials']} suites of equal "
        f"revisions; found {self_test['found']} of {self_test['slow_trials']} slowdowns by "
        f"{self_test['slowdown']:.0%}."
    )


def _contest_dict(contest: Contest) -> dict[str, Any]:
    interval = contest.interval
    return {
        "name": contest.name,
        "verdict": (contest.verdict or Verdict.INCONCLUSIVE).value,
        "margin": contest.margin,
        "slowdown": contest.slowdown,
        "interval": None if interval is None else [interval.low, interval.high],
        "pairs": len(contest.log_ratios),
        "base_seconds": median(contest.base_seconds) if contest.base_seconds else None,
        "head_seconds": median(contest.head_seconds) if contest.head_seconds else None,
        "p_slower": min(1.0, contest.p_slower),
        "p_faster": min(1.0, contest.p_faster),
        "p_within": min(1.0, contest.p_within),
        "log_ratios": list(contest.log_ratios),
        "note": contest.note,
    }


def _row(contest: Contest, name: str) -> list[Text]:
    interval = contest.interval
    verdict = contest.verdict or Verdict.INCONCLUSIVE
    return [
        Text(verdict, style=_STYLES[verdict]),
        Text("-" if contest.slowdown is None else f"{contest.slowdown:+.1%}"),
        Text("-" if interval is None else f"{interval.low:+.1%} to {interval.high:+.1%}"),
        Text(str(len(contest.log_ratios))),
        # Node ids hold brackets, which rich would read as markup.
        Text(name),
    ]


def _figures_table(changed: list[FigureVerdict], count: int) -> RenderableType:
    if not changed:
        return Text(f"{count} exact figures, none changed for the worse or better.")
    title = f"exact figures that changed, of {count}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("verdict", no_wrap=True)
    for column in ("base", "head"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("figure", overflow="fold")
    names = short_names([figure.name for figure in changed])
    for figure in changed:
        values = [
            Text("-" if value is None else f"{value:,} {figure.unit}".strip())
            for value in (figure.base, figure.head)
        ]
        verdict = Verdict(figure.verdict)
        table.add_row(Text(verdict, style=_STYLES[verdict]), *values, Text(names[figure.name]))
    return table
