"""Measure the gate itself: how often it errs on this machine, with the suite in `light_suite`.

A trial is what a user runs: a repository with two commits, and the whole gate over them. In two
thirds of the trials they are equal; in the others one benchmark of the second does 3% more work,
the next one in each trial.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmopt.measure.fingerprint import fingerprint
from mmopt.measure.gate.config import GateConfig
from mmopt.measure.gate.decision import LOOKS, Verdict
from mmopt.measure.gate.revisions import git_environment
from mmopt.measure.gate.run import gate
from mmopt.measure.gate.store import prepare_store, store_self_test
from mmopt.measure.statistics import median
from mmopt.measure.suites.collection import PYTEST_OPTIONS, pytest_environment
from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError, MmoptError

UNITS = 100
SLOWDOWN = 0.03

PEER = f"pytest-benchmark --benchmark-compare-fail=mean:{SLOWDOWN:.0%}"

# No identity, signature or hook of the user's.
_SETTINGS = (
    "user.name=mmopt",
    "user.email=mmopt@localhost",
    "commit.gpgSign=false",
    f"core.hooksPath={os.devnull}",
)
_GIT_OPTIONS = [word for setting in _SETTINGS for word in ("-c", setting)]

_SUITE = Path(__file__).with_name("light_suite")
_BENCHMARKS = [
    "integers",
    "lookups",
    "bisection",
    "sort",
    "regex",
    "json",
    "strings",
    "sha256",
    "matmul",
    "vector",
]


@dataclass(frozen=True)
class Trial:
    """One suite compared once.

    Attributes:
        slowed: the benchmark that head slows; None where the revisions are equal.
        verdict: the gate's, of the suite.
        found: the benchmarks that the gate called REGRESSED.
        undecided: those it called INCONCLUSIVE.
        seconds: how long the gate took.
        slowdowns: its estimate for each benchmark.
        peer_failed: the benchmarks that pytest-benchmark called slower; None when it did not run.
    """

    slowed: str | None
    verdict: str
    found: tuple[str, ...]
    undecided: tuple[str, ...]
    seconds: float
    slowdowns: Mapping[str, float | None]
    peer_failed: tuple[str, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return {
            "slowed": self.slowed,
            "verdict": self.verdict,
            "found": list(self.found),
            "undecided": list(self.undecided),
            "seconds": round(self.seconds, 2),
            "slowdowns": {
                name: None if value is None else round(value, 5)
                for name, value in self.slowdowns.items()
            },
            "peer_failed": None if self.peer_failed is None else list(self.peer_failed),
        }


@dataclass(frozen=True)
class SelfTestReport:
    """What `self_test` returns."""

    trials: tuple[Trial, ...]
    fingerprint: Mapping[str, Any]
    created: str

    @property
    def equal(self) -> list[Trial]:
        """Trials of equal revisions."""
        return [trial for trial in self.trials if trial.slowed is None]

    @property
    def slow(self) -> list[Trial]:
        """Trials with a slowdown."""
        return [trial for trial in self.trials if trial.slowed is not None]

    @property
    def exit_code(self) -> int:
        """Always 0: to measure is not to judge."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Rates and every trial as JSON values."""
        equal, slow = self.equal, self.slow
        return {
            "schema": 1,
            "kind": "gate self-test",
            "created": self.created,
            "trials": len(equal),
            "false_alarms": sum(bool(trial.found) for trial in equal),
            "inconclusive": sum(bool(trial.undecided) for trial in equal),
            "slow_trials": len(slow),
            "slowdown": SLOWDOWN,
            "found": sum(trial.slowed in trial.found for trial in slow),
            "missed": sum(trial.slowed not in (*trial.found, *trial.undecided) for trial in slow),
            "false_alarms_beside": sum(bool({*trial.found} - {trial.slowed}) for trial in slow),
            "seconds_per_suite": median([trial.seconds for trial in self.trials]),
            "slowest_suite_seconds": max(trial.seconds for trial in self.trials),
            "looks": list(LOOKS),
            "fingerprint": dict(self.fingerprint),
            "peer": self._peer(),
            "each": [trial.to_dict() for trial in self.trials],
        }

    def _peer(self) -> dict[str, Any] | None:
        equal = [trial for trial in self.equal if trial.peer_failed is not None]
        slow = [trial for trial in self.slow if trial.peer_failed is not None]
        if not equal or not slow:
            return None
        return {
            "name": PEER,
            "trials": len(equal),
            "false_alarms": sum(bool(trial.peer_failed) for trial in equal),
            "slow_trials": len(slow),
            "found": sum(trial.slowed in (trial.peer_failed or ()) for trial in slow),
        }

    def render(self) -> RenderableType:
        """The rates as a table."""
        rates = self.to_dict()
        table = Table(title="the gate, measured on this machine", title_justify="left")
        table.add_column("")
        for column in ("false alarms, per suite", f"found, {SLOWDOWN:.0%} slower"):
            table.add_column(column, justify="right")
        table.add_row(
            "mmopt bench gate",
            f"{rates['false_alarms']} of {rates['trials']}",
            f"{rates['found']} of {rates['slow_trials']}",
        )
        if peer := rates["peer"]:
            table.add_row(
                Text(peer["name"]),
                f"{peer['false_alarms']} of {peer['trials']}",
                f"{peer['found']} of {peer['slow_trials']}",
            )
        return Group(
            table,
            Text(
                f"{len(_BENCHMARKS)} benchmarks, {rates['seconds_per_suite']:.0f} s per suite "
                f"(median; at most {rates['slowest_suite_seconds']:.0f} s). With equal revisions "
                f"{rates['inconclusive']} suites had a benchmark left INCONCLUSIVE; of the "
                f"slowdowns {rates['missed']} passed."
            ),
        )


def self_test(
    *,
    trials: int = 200,
    peer_every: int = 0,
    seed: int = 0,
    log: Path | None = None,
    progress: Progress = silent,
) -> SelfTestReport:
    """Run the gate `trials` times on equal revisions and half as often with one slowed by 3%.

    The result is kept for this machine (`store`), and every later report carries it.

    Args:
        trials: of equal revisions; a slowed one follows every second.
        peer_every: also let pytest-benchmark compare the revisions of every so many trials of each
            kind, at its defaults, one run after the other; 0 never does.
        seed: of the order of slices.
        log: a file to which each finished trial is added as a line of JSON.

    Raises:
        InputError: fewer than two trials, or a negative peer_every.
        MmoptError: the gate could not run, or the result could not be kept.
    """
    if trials < 2 or peer_every < 0:
        raise InputError(
            f"self-test: trials is {trials} and peer_every {peer_every}, expected 2 or more and 0 "
            "or more. 200 trials tell a rate of 1% from none."
        )
    prepare_store()
    draw = random.Random(seed)
    slow_trials = trials // 2
    schedule: list[str | None] = []
    for number in range(trials):
        schedule.append(None)
        if number % 2:
            schedule.append(_BENCHMARKS[number // 2 % len(_BENCHMARKS)])
    done: list[Trial] = []
    with (
        tempfile.TemporaryDirectory(prefix="mmopt-self-test-") as folder,
        progress("trials", trials + slow_trials) as advance,
    ):
        root = Path(folder)
        commits = _repository(root)
        for slowed in schedule:
            alike = sum((trial.slowed is None) == (slowed is None) for trial in done)
            peer = peer_every > 0 and alike % peer_every == 0
            done.append(_trial(root, commits, slowed, draw.randrange(2**30), peer))
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[-1].to_dict()) + "\n")
            advance(1)
    report = SelfTestReport(
        trials=tuple(done),
        fingerprint=fingerprint().to_dict(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store_self_test({key: value for key, value in report.to_dict().items() if key != "each"})
    return report


def _repository(root: Path) -> dict[str | None, str]:
    """Commit the suite, an equal revision, and one per slowed benchmark; their names."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(
            ["git", *_GIT_OPTIONS, *arguments],
            cwd=root,
            env=git_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise MmoptError(f"self-test: git {arguments[0]} failed: {ran.stderr.strip()}")
        return ran.stdout.strip()

    def commit(slowed: str | None) -> str:
        work = dict.fromkeys(_BENCHMARKS, UNITS)
        if slowed is not None:
            work[slowed] = round(UNITS * (1 + SLOWDOWN))
        (suite / "work.json").write_text(json.dumps(work), encoding="utf-8")
        git("add", "--all")
        git("commit", "--quiet", "--allow-empty", "--message", f"slowed: {slowed}")
        return git("rev-parse", "HEAD")

    git("init", "--quiet")
    suite = root / "bench"
    shutil.copytree(_SUITE, suite, ignore=shutil.ignore_patterns("__pycache__"))
    commits: dict[str | None, str] = {name: commit(name) for name in _BENCHMARKS}
    commits["base"] = commit(None)
    commits[None] = commit(None)
    return commits


def _trial(
    root: Path, commits: Mapping[str | None, str], slowed: str | None, seed: int, peer: bool
) -> Trial:
    config = GateConfig()
    report = gate(commits["base"], head=commits[slowed], config=config, folder=root, seed=seed)
    called = {contest.name.rpartition("[")[2][:-1]: contest for contest in report.contests}
    if set(called) != set(_BENCHMARKS):
        raise MmoptError(f"self-test: the suite has {sorted(called)}, expected {_BENCHMARKS}.")
    return Trial(
        slowed=slowed,
        verdict=report.verdict.value,
        found=_named(called, Verdict.REGRESSED),
        undecided=_named(called, Verdict.INCONCLUSIVE),
        seconds=report.seconds,
        slowdowns={name: contest.slowdown for name, contest in called.items()},
        peer_failed=_peer_trial(root, commits, slowed) if peer else None,
    )


def _named(called: Mapping[str, Any], verdict: Verdict) -> tuple[str, ...]:
    return tuple(name for name, contest in called.items() if contest.verdict is verdict)


def _peer_trial(
    root: Path, commits: Mapping[str | None, str], slowed: str | None
) -> tuple[str, ...]:
    """Benchmarks that pytest-benchmark calls slower, run as its users run it."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "base.json"
        _pytest(root, commits["base"], f"--benchmark-json={stored}")
        return _pytest(
            root,
            commits[slowed],
            f"--benchmark-compare={stored}",
            f"--benchmark-compare-fail=mean:{SLOWDOWN:.0%}",
        )


def _pytest(root: Path, commit: str, *options: str) -> tuple[str, ...]:
    checkout = ["git", *_GIT_OPTIONS, "checkout", "--quiet", "--force", "--detach", commit]
    subprocess.run(checkout, cwd=root, env=git_environment(), check=True)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *PYTEST_OPTIONS, *options, "-q"],
        cwd=root,
        env=pytest_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    said = (ran.stdout + ran.stderr).partition("Performance has regressed:")[2]
    failed = tuple(name for name in _BENCHMARKS if f"[{name}]" in said)
    if ran.returncode not in (0, 1) or bool(ran.returncode) != bool(failed):
        raise MmoptError(f"self-test: pytest-benchmark did not run:\n{ran.stdout}{ran.stderr}")
    return failed
