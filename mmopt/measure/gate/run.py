"""Compare two revisions of a suite: what `mmopt bench gate` calls."""

import difflib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from mmopt.measure.fingerprint import fingerprint
from mmopt.measure.gate.config import GateConfig
from mmopt.measure.gate.decision import LOOKS, Contest, Verdict, judge
from mmopt.measure.gate.pair import (
    START_SECONDS,
    PairResult,
    Stopped,
    Worker,
    layout_not_random,
    time_pair,
)
from mmopt.measure.gate.report import GateReport
from mmopt.measure.gate.revisions import (
    Checkout,
    changed_files,
    checked_out,
    repository_root,
    require_clean,
    resolve,
    tail,
)
from mmopt.measure.gate.store import stored_self_test
from mmopt.measure.suites.figures import Figure, compare_figures, read_figures
from mmopt.measure.suites.process import require_pytest
from mmopt.measure.throttling import watch_conditions
from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError, MmoptError

# Between a renamed benchmark's ids, difflib's ratio is at least this.
RENAMED_LIKENESS = 0.6


def gate(
    base: str,
    *,
    head: str | None = None,
    config: GateConfig,
    folder: Path,
    timed: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> GateReport:
    """Compare two revisions of the suite, benchmark by benchmark and figure by figure.

    Both revisions are checked out in a temporary folder and built before anything is measured; the
    repository's own files are not touched. Exact figures are counted once on each side. Timed
    benchmarks run in fresh pairs of processes on the same cores (`pair`) until each is decided
    (`decision`), 40 pairs have run, or the budget is spent.

    Args:
        base: the revision to compare with: any name that git knows.
        head: the revision in question; None is HEAD, which must then hold every change.
        config: suite, margins, budget and what else the comparison depends on.
        folder: where the repository is looked for.
        timed: False compares the exact figures only.
        seed: of the order of slices and of the workers' hash seeds.

    Raises:
        InputError: no repository, no such revision, changes that HEAD does not hold, no benchmark
            in a revision, or fewer cores than threads.
        MmoptError: pytest is missing, a build failed, or a suite could not be collected, crashed or
            hung (exit 3).
    """
    began = time.monotonic()
    require_pytest()
    root = repository_root(folder)
    revisions = resolve(root, base, "--base"), resolve(root, head or "HEAD", "--head")
    if head is None:
        require_clean(root, config.suite)
    cores = _cores(config.threads)
    notes = []
    with layout_not_random() as equal_layouts:
        if timed and not equal_layouts:
            notes.append(
                "This system does not let the gate turn address space randomization off (some "
                "containers forbid it), so pairs scatter more, and more of them are needed."
            )
    if revisions[0].commit == revisions[1].commit:
        notes.append(
            f"{revisions[0].ref} and {revisions[1].ref} are the same commit: nothing differs that "
            "could be found."
        )
    changed = changed_files(root, *revisions, config.suite)
    if changed:
        notes.append(
            f"The suite itself differs between the revisions ({', '.join(changed)}): a benchmark "
            "that was changed is held against what it was."
        )
    with (
        watch_conditions() as conditions,
        checked_out(root, *revisions, config, progress) as (old, new),
    ):
        with progress("collect", 2) as advance:
            found = []
            for checkout in (old, new):
                found.append(_collect(checkout, config.suite))
                advance(1)
        _require_benchmarks(found, (old, new), config)
        figures = [
            _figures(checkout, config.suite, exact)
            for checkout, (_, exact) in zip((old, new), found, strict=True)
        ]
        contests = _contests(found[0][0], found[1][0], config) if timed else []
        if not contests and not any(figures):
            raise InputError(
                f"gate: {config.suite} has benchmarks, but none that is compared: "
                + ("all are skipped." if timed else "no exact figures, and --exact times nothing.")
            )
        if contests:
            both = any({*timed_ids} & {*exact_ids} for timed_ids, exact_ids in found)
            notes += _run_pairs((old, new), contests, config, both, cores, seed, progress)
    machine = fingerprint().to_dict()
    return GateReport(
        base=revisions[0],
        head=revisions[1],
        margin=config.margin,
        alpha=config.alpha,
        contests=tuple(contests),
        figures=tuple(compare_figures(*figures)),
        fingerprint=machine,
        conditions=conditions.to_dict(),
        notes=tuple(notes),
        self_test=stored_self_test(machine),
        seconds=time.monotonic() - began,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cores(threads: int) -> tuple[int, ...]:
    if not hasattr(os, "sched_getaffinity"):
        raise MmoptError("gate: this system cannot pin processes to cores. Run the gate on Linux.")
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < threads:
        raise InputError(
            f"gate: threads is {threads}, but this process may use {len(usable)} cores. "
            "Set threads lower, or give the process more cores."
        )
    # The last ones: systems send their interrupts to the first.
    return tuple(usable[-threads:])


def _collect(checkout: Checkout, suite: Path) -> tuple[list[str], list[str]]:
    """Ids of the timed and of the exact benchmarks of one side."""
    where = f"{checkout.side} ({checkout.revision.ref})"
    if not (checkout.root / suite).exists():
        raise InputError(
            f"gate: {where} has no {suite}, so there are no benchmarks to compare. "
            "Name a folder or a file that both revisions have."
        )
    with Worker(checkout, "collect", suite) as worker:
        answer = worker.expect("collected")
    if answer["foreign"]:
        raise MmoptError(
            f"gate: {where} imports {', '.join(answer['foreign'])} from outside its checkout, so "
            "both sides would measure the same code. Set sources in [tool.mmopt.gate] to the "
            "folders that hold the packages."
        )
    return answer["timed"], answer["exact"]


def _require_benchmarks(
    found: Sequence[tuple[list[str], list[str]]], sides: Sequence[Checkout], config: GateConfig
) -> None:
    for (timed, exact), checkout in zip(found, sides, strict=True):
        if not timed and not exact:
            raise InputError(
                f"gate: {checkout.side} ({checkout.revision.ref}) has no benchmark in "
                f"{config.suite}, expected functions bench_* that take the benchmark fixture, or "
                "exact_* that take figures, in files bench_*.py."
            )


def _figures(checkout: Checkout, suite: Path, exact: Sequence[str]) -> Mapping[str, Figure]:
    """The exact figures of one side, counted once."""
    if not exact:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        with Worker(checkout, "figures", suite, figures_file=file) as worker:
            failed = []
            while (answer := worker.receive()).get("event") != "end":
                if answer.get("event") == "failed":
                    failed.append(f"{answer['id']}:\n{tail(answer['text'])}")
            if failed or not file.is_file():
                raise MmoptError(
                    f"gate: the exact figures cannot be counted in {worker.name}:\n"
                    f"{failed[0] if failed else worker.output()}"
                )
        return read_figures(file)


def _contests(base: list[str], head: list[str], config: GateConfig) -> list[Contest]:
    """A contest per benchmark of either side, those on one side only decided already."""
    contests = []
    added = [name for name in head if name not in base]
    for name in base:
        if config.skips(name):
            continue
        contest = Contest(name, config.margin_of(name))
        if name not in head:
            contest.verdict = Verdict.MISSING
            like = difflib.get_close_matches(name, added, 1, RENAMED_LIKENESS)
            contest.note = f"{name} is in base but not in head" + (
                f"; renamed to {like[0]}?" if like else "."
            )
        contests.append(contest)
    for name in added:
        if not config.skips(name):
            contests.append(Contest(name, config.margin_of(name), verdict=Verdict.NEW))
    return contests


def _run_pairs(
    sides: tuple[Checkout, Checkout],
    contests: list[Contest],
    config: GateConfig,
    with_plugins: bool,
    cores: Sequence[int],
    seed: int,
    progress: Progress,
) -> list[str]:
    """Add pairs until every contest is decided; returns notes. Drops what both sides skip."""
    notes = []
    skipped: list[str] = []
    by_name = {contest.name: contest for contest in contests}
    deadline = time.monotonic() + config.budget
    longest, besides = 0.0, START_SECONDS

    def on_result(name: str, result: PairResult | list[Stopped]) -> bool:
        contest = by_name[name]
        if isinstance(result, PairResult):
            contest.log_ratios.append(result.log_ratio)
            contest.base_seconds.append(result.base_seconds)
            contest.head_seconds.append(result.head_seconds)
        else:
            _stop(contest, result)
            if contest.verdict is None:
                contests.remove(contest)
                skipped.append(name)
        advance(1)
        return time.monotonic() < deadline

    with progress("pairs", LOOKS[-1] * sum(c.verdict is None for c in contests)) as advance:
        for number in range(LOOKS[-1]):
            undecided = [contest.name for contest in contests if contest.verdict is None]
            if not undecided:
                break
            began = time.monotonic()
            if began + longest > deadline:
                notes.append(
                    f"The budget of {config.budget:.0f} s was spent after {number} pairs; "
                    f"{len(undecided)} benchmarks are undecided."
                )
                break
            besides = time_pair(
                *sides,
                config.suite,
                undecided,
                with_plugins=with_plugins,
                cores=cores,
                number=number,
                seed=seed + number,
                besides=besides,
                on_result=on_result,
            )
            longest = max(longest, time.monotonic() - began)
            judge(contests, alpha=config.alpha, beta=config.beta)
    if skipped:
        notes.append(f"Skipped on both sides, so not compared: {', '.join(skipped)}.")
    for contest in contests:
        contest.verdict = contest.verdict or Verdict.INCONCLUSIVE
    return notes


def _stop(contest: Contest, stopped: Sequence[Stopped]) -> None:
    """Decide a benchmark that was not timed; both sides skipping it leaves it undecided."""
    skips = [stop.side for stop in stopped if stop.outcome == "skipped"]
    if len(skips) == len(stopped) == 2:
        return
    (first, *_) = [stop for stop in stopped if stop.side not in skips] or stopped
    if skips == [first.side]:
        # Not to run it is the same as not to have it.
        contest.verdict = Verdict.MISSING if first.side == "head" else Verdict.NEW
    else:
        contest.verdict = Verdict.FAILED
    contest.note = f"{contest.name} {first.outcome} in {first.side}: {first.text}"
