"""Small git repositories with a benchmark suite, and the gate over them."""

import subprocess
from pathlib import Path
from typing import Any

from mmopt.measure.gate.config import GateConfig
from mmopt.measure.gate.report import GateReport
from mmopt.measure.gate.run import gate

# Differences here are large, and a wide margin is decided soon.
CONFIG = GateConfig(margin=0.5)

# One benchmark of one pair, where what matters happens before a verdict.
SHORT = GateConfig(budget=0.01)

SUITE = """
def bench_steady(benchmark):
    benchmark(sum, range(1000))
"""


EXACT = """
def exact_size(figures):
    figures.record("bytes", {}, unit="bytes")
"""


class Repository:
    """A git repository in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
        ran = subprocess.run(
            ["git", *identity, *arguments],
            cwd=self.root,
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout.strip()

    def commit(self, **files: str) -> str:
        """Write files (`bench__bench_x` is bench/bench_x.py) and commit; the commit's name."""
        for name, text in files.items():
            path = self.root / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "change")
        return self.git("rev-parse", "HEAD")

    def compare(self, config: GateConfig = CONFIG, **options: Any) -> GateReport:
        """HEAD against its parent."""
        return gate("HEAD~1", config=config, folder=self.root, **options)


def verdicts(report: GateReport) -> dict[str, str]:
    return {contest.name.rpartition("::")[2]: str(contest.verdict) for contest in report.contests}
