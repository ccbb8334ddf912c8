"""`mmopt kernels`: compile every kernel for GPUs that need not be here, report, check, record."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.kernels.baseline import (
    Baseline,
    Comparison,
    Recorded,
    compare,
    read_baseline,
    write_baseline,
)
from mmopt.measure.kernels.rules import Problem, broken_rules, shown_matrix
from mmopt_export.files import require_new_folder, staged_folder
from mmopt_export.progress import Progress, silent
from mmopt_export.threads import usable_cores
from mmopt_kernels import __version__
from mmopt_kernels.errors import InputError
from mmopt_kernels.inspection import (
    CASES,
    TARGETS,
    Inspection,
    KernelFigures,
    inspect,
    target_named,
)

SCHEMA_VERSION = 1

# Names of kernels are long, and stale ones are all mended by one command.
_STALE_SHOWN = 3


@dataclass(frozen=True)
class KernelsReport:
    """What `inspect_kernels`, `check_kernels` and `record_kernels` return.

    Attributes:
        inspection: what was compiled.
        broken: what does not hold whatever was recorded.
        baseline: the file that the run was held against, or recorded in; None without one.
        comparison: with what was recorded; None without a baseline and after recording.
        recorded: the baseline now holds this run.
        emitted: the folder with the compiled kernels; None where none were asked for.
    """

    inspection: Inspection
    broken: tuple[Problem, ...]
    baseline: Path | None = None
    comparison: Comparison | None = None
    recorded: bool = False
    emitted: Path | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that does not hold; what breaks a rule and is worse than recorded once."""
        told = {(one.target, one.name, one.rule) for one in self.broken}
        compared = self.comparison.problems if self.comparison else ()
        more = [one for one in compared if (one.target, one.name, one.rule) not in told]
        return (*self.broken, *more)

    @property
    def exit_code(self) -> int:
        """1 when something does not hold, 3 when it could not be compared, 0 otherwise."""
        if self.problems:
            return 1
        return 3 if self.comparison and self.comparison.undecided else 0

    @property
    def verdict(self) -> str:
        """`PASSED`, `FAILED` or `INCONCLUSIVE`."""
        return {0: "PASSED", 1: "FAILED", 3: "INCONCLUSIVE"}[self.exit_code]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know besides."""
        if self.comparison is None:
            return ()
        notes = [self.comparison.undecided] if self.comparison.undecided else []
        if stale := self.comparison.stale:
            more = f" and {len(stale) - _STALE_SHOWN} more" if len(stale) > _STALE_SHOWN else ""
            notes.append(
                f"{len(stale)} kernels differ from {self.baseline} and are no worse: "
                f"{', '.join(stale[:_STALE_SHOWN])}{more}. Record them with --update "
                f"{self.baseline}, so that they stay so."
            )
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "schema": SCHEMA_VERSION,
            "kind": "kernels",
            "mmopt": __version__,
            "triton": self.inspection.triton,
            "targets": list(self.inspection.targets),
            "baseline": None if self.baseline is None else str(self.baseline),
            "recorded": self.recorded,
            "emitted": None if self.emitted is None else str(self.emitted),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "problems": [problem.to_dict() for problem in self.problems],
            "notes": list(self.notes),
            "kernels": [_values(kernel) for kernel in self.inspection.kernels],
            "failures": [asdict(failure) for failure in self.inspection.failures],
        }

    def render(self) -> RenderableType:
        """One table for each target, then what does not hold."""
        parts: list[RenderableType] = []
        # Whoever checks wants to know what is wrong; the figures are in the baseline.
        if self.baseline is None:
            for target in self.inspection.targets:
                kernels = [one for one in self.inspection.kernels if one.target == target]
                if kernels:
                    parts += [_table(target, kernels), Text()]
        parts += [Text(str(problem), style="red") for problem in self.problems]
        parts += map(Text, self.notes)
        parts.append(Text(self._summary()))
        return Group(*parts)

    def _summary(self) -> str:
        kernels, targets = len(self.inspection.kernels), ", ".join(self.inspection.targets)
        summary = (
            f"{self.verdict}: {kernels} kernels for {targets}, Triton {self.inspection.triton}"
        )
        if self.problems:
            summary += f": {len(self.problems)} things do not hold"
        elif self.comparison is not None and not self.comparison.undecided:
            summary += f": no worse than in {self.baseline}"
        summary += "."
        if self.recorded:
            summary += f" {self.baseline} now records them."
        if self.emitted is not None:
            summary += f" They are in {self.emitted}."
        return summary


def inspect_kernels(
    targets: Sequence[str] = (),
    *,
    every_case: bool = False,
    jobs: int | None = None,
    emit: Path | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> KernelsReport:
    """Compile the kernels for targets, no GPU needed, and report what each takes.

    Args:
        targets: names of them; all that are known where empty.
        every_case: more dtypes, head dimensions and features than the grid that is checked.
        jobs: processes at once; at most two where None, since others use the machine too.
        emit: a new folder for the compiled kernels and how to launch them.
        kept: see `mmopt_kernels.inspection.inspect`.
        progress: hears of each kernel that is compiled.

    Raises:
        InputError: an unknown target, or a folder that cannot be written.
        MmoptError: no Triton, or its process does not start (exit 3).
    """
    # Each once, in the order of TARGETS.
    wanted = {target_named(name).name for name in targets} or set(TARGETS)
    chosen = [target for target in TARGETS.values() if target.name in wanted]
    if emit is not None:
        _require_writable(emit)
    with ExitStack() as stack:
        staged = None if emit is None else stack.enter_context(staged_folder(emit))
        inspection = inspect(
            chosen,
            cases=CASES if every_case else None,
            jobs=jobs or min(2, usable_cores()),
            emit=staged,
            kept=kept,
            progress=progress,
        )
    return KernelsReport(inspection, tuple(broken_rules(inspection)), emitted=emit)


def check_kernels(
    baseline: Path,
    targets: Sequence[str] = (),
    *,
    jobs: int | None = None,
    emit: Path | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> KernelsReport:
    """Compile the kernels and hold them against what `record_kernels` wrote.

    Raises:
        InputError: as `inspect_kernels`, and where the baseline cannot be read.
        MmoptError: as `inspect_kernels`.
    """
    # Before anything is compiled: whoever has to mend the file should not wait for it.
    known = read_baseline(baseline)
    report = inspect_kernels(targets, jobs=jobs, emit=emit, kept=kept, progress=progress)
    return KernelsReport(
        report.inspection,
        report.broken,
        baseline=baseline,
        comparison=compare(known, report.inspection, baseline),
        emitted=emit,
    )


def record_kernels(
    baseline: Path,
    targets: Sequence[str] = (),
    *,
    jobs: int | None = None,
    emit: Path | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> KernelsReport:
    """Compile the kernels and record them; other targets in the file stay as they are.

    Where a kernel does not compile nothing is recorded. Other rules that do not hold are reported,
    and hold no better for being recorded.

    Raises:
        InputError: as `inspect_kernels`; the file's folder does not exist or cannot be written; or
            other targets were recorded with another Triton.
        MmoptError: as `inspect_kernels`, or the file could not be written in the end.
    """
    if baseline.is_dir() or not baseline.parent.is_dir():
        raise InputError(f"{baseline}: expected a file in a folder that exists. Create it first.")
    _require_scratch(baseline.parent, baseline, "file")
    chosen = {target_named(name).name for name in targets} or set(TARGETS)
    others: dict[str, Any] = {}
    before: Baseline | None = None
    if chosen != set(TARGETS) and baseline.exists():
        before = read_baseline(baseline)
        others = {name: one for name, one in before.kernels.items() if name not in chosen}
    report = inspect_kernels(targets, jobs=jobs, emit=emit, kept=kept, progress=progress)
    inspection = report.inspection
    if before is not None and others and before.triton != inspection.triton:
        raise InputError(
            f"{baseline} records {', '.join(others)} with Triton {before.triton}, here is "
            f"{inspection.triton}, and a baseline has one compiler. Record all targets at once: "
            "leave --target out."
        )
    if not inspection.failures:
        recorded: dict[str, dict[str, Recorded]] = {name: {} for name in inspection.targets}
        for kernel in inspection.kernels:
            recorded[kernel.target][kernel.name] = Recorded.of(kernel)
        write_baseline(baseline, Baseline(inspection.triton, {**others, **recorded}))
    return KernelsReport(
        inspection,
        report.broken,
        baseline=baseline,
        recorded=not inspection.failures,
        emitted=emit,
    )


def _require_writable(folder: Path) -> None:
    """Refuse before minutes of compiling what would fail at their end."""
    require_new_folder(folder)
    existing = next(one for one in folder.absolute().parents if one.exists())
    _require_scratch(existing, folder, "folder")


def _require_scratch(place: Path, output: Path, kind: str) -> None:
    """Refuse an output, a ``kind``, where nothing can be made in the folder ``place``."""
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{output.name}."):
            pass
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror}), expected a {kind} that can be. "
            "Choose another one."
        ) from error


def _values(kernel: KernelFigures) -> dict[str, Any]:
    values = asdict(kernel)
    values["occupancy"]["share"] = round(kernel.occupancy.share, 4)
    return values


def _table(target: str, kernels: Sequence[KernelFigures]) -> Table:
    """In 80 columns: kernels below the case that launches them."""
    table = Table(
        title=f"{target}: registers and spilled bytes of a thread, KiB shared, occupancy",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("kernel", overflow="fold")
    for heading in ("regs", "spill", "shared", "occ."):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("matrix", no_wrap=True)
    for heading in ("code", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    above = ""
    for kernel in kernels:
        case, name = kernel.name.rsplit("/", 1)
        op = case.split("/")[0]
        if case != above:
            above = case
            table.add_row(Text(case, style="bold"))
        matrix = shown_matrix(kernel.matrix_instructions) if kernel.matrix_instructions else ""
        table.add_row(
            Text(f"  {name.removeprefix(f'{op}_')}"),
            str(kernel.registers),
            Text(str(kernel.spilled_bytes), style="red" if kernel.spilled_bytes else ""),
            f"{kernel.shared_bytes / 1024:.1f}",
            f"{kernel.occupancy.share:.0%}",
            Text(matrix),
            f"{kernel.code_bytes / 1024:.0f}",
            f"{kernel.compile_seconds:.1f}",
        )
    return table
