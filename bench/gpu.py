"""What `make gpu` runs: the tests that need a GPU, then the GPU suites, whose result is kept.

Exit codes: 0 done, 1 a test failed, 3 there is no GPU or a benchmark could not run. Without a GPU
nothing is written.
"""

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from mmopt.cli.output import progress_bar, stderr, stdout
from mmopt.measure.gpu_timing import require_cuda
from mmopt.measure.suites.run import run_suites, write_suite_report
from mmopt_kernels.errors import MmoptError

RESULTS = Path("bench/results")


def main() -> int:
    try:
        require_cuda()
        if subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], check=False).returncode:
            stderr.print("a test failed on the GPU; nothing was measured.", style="bold red")
            return 1
        report = run_suites(["bench"], options=["-m", "gpu and not slow"], progress=progress_bar)
        path = RESULTS / result_name(report.document["mmopt"]["fingerprint"]["gpus"])
        write_suite_report(report, path)
    except MmoptError as error:
        stderr.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return error.exit_code
    stdout.print(report.render())
    for name, reason in report.document["mmopt"]["skipped"].items():
        stdout.print(f"not measured: {name}: {reason}", markup=False, soft_wrap=True)
    print(f"written to {path}")
    return 0


def result_name(gpus: list[str]) -> str:
    """`nvidia-h100-80gb-hbm3-2026-11-24.json`: the first GPU and the day, in UTC."""
    gpu = re.sub(r"[^a-z0-9]+", "-", gpus[0].lower()).strip("-")
    return f"{gpu}-{datetime.now(UTC):%Y-%m-%d}.json"


if __name__ == "__main__":
    sys.exit(main())
