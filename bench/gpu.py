"""What `make gpu` runs, in parts, each of which keeps a result of its own.

    python bench/gpu.py                          all of it but tune: about an hour
    python bench/gpu.py tests ops -o out         some parts, results into a folder
    python bench/gpu.py ops -k "attention and images"
    python bench/gpu.py tune -o out              tiles, into a table of its own

Exit codes: 0 done, 1 a test failed, 3 there is no GPU or a benchmark could not run. Without a GPU
nothing is written.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import gpu_tune
import gpu_warm

from mmopt.cli.output import progress_bar, stderr, stdout
from mmopt.measure.gpu_timing import require_cuda
from mmopt.measure.suites.run import run_suites, write_suite_report
from mmopt_export.threads import usable_cores
from mmopt_kernels.errors import MmoptError

RESULTS = Path("bench/results")
SUITES = {
    "ops": ("bench_gpu.py", "bench_lora.py", "bench_linear_cross_entropy.py"),
    "steps": ("bench_training_step.py",),
    "exports": ("bench_export.py",),
}
# The tests of the ops, which run on a GPU unchanged, and exports: most of their time is the CPU's.
SIDE_BY_SIDE = (
    "tests/kernels",
    "tests/test_attention_cases.py",
    "tests/test_lora_cases.py",
    "tests/export/test_on_cuda.py",
)
# Each has a CUDA context, half a GiB of the GPU.
MOST_PROCESSES = 14


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="tests, tune, ops, steps, exports")
    parser.add_argument("-k", default="", metavar="WORDS", help="of the suites, as pytest's -k")
    parser.add_argument("-o", type=Path, default=RESULTS, metavar="FOLDER", help="for the results")
    asked = parser.parse_args(arguments)
    unknown = set(asked.parts) - {"tests", "tune", *SUITES}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected tests, tune, {', '.join(SUITES)}")
    parts = asked.parts or ["tests", *SUITES]
    try:
        require_cuda()
        if "tests" in parts and not tests_pass():
            stderr.print("a test failed on the GPU; nothing was measured.", style="bold red")
            return 1
        for part in [one for one in parts if one != "tests"]:
            if part == "tune":
                tune(asked.k, asked.o / "tables")
            else:
                measure(part, asked.k, asked.o)
    except MmoptError as error:
        stderr.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return error.exit_code
    return 0


def processes() -> int:
    return min(usable_cores(), MOST_PROCESSES)


def tests_pass() -> bool:
    """Many side by side, then one after the other what else is marked gpu."""
    marked = [
        path.as_posix()
        for path in sorted(Path("tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text() and not path.as_posix().startswith(SIDE_BY_SIDE)
    ]
    runs = (
        [*SIDE_BY_SIDE, "-m", "not slow", "-n", str(processes()), "--dist", "worksteal"],
        [*marked, "-m", "gpu"],
    )
    return all(
        subprocess.run([sys.executable, "-m", "pytest", "-q", *run], check=False).returncode == 0
        for run in runs
    )


def tune(words: str, folder: Path) -> None:
    """Tune every launch whose kernel and name have all the words, and say what won by how much."""
    chosen = [
        one
        for one in gpu_tune.launches()
        if all(word in f"{one.kernel} {one.name}" for word in words.split())
    ]
    if not words:
        gpu_warm.compile_beforehand(processes(), gpu_tune.run, range(len(chosen)))
    for launch in chosen:
        found = gpu_tune.tune(launch, folder)
        (_, now), *_ = found.timings
        best = min(ms for _, ms in found.timings if isinstance(ms, float))
        config = "as it is" if found.config is None else dict(found.config)
        print(f"{launch.kernel} {launch.name}: now {now} ms, best {best} ms: {config}")
    print(f"written to {folder}")


def measure(part: str, words: str, folder: Path) -> None:
    """Run the suites of a part, and keep and show what they found."""
    if part == "ops" and not words:
        gpu_warm.compile_beforehand(processes())
    options = ["-m", "gpu and not slow", *(["-k", words] if words else [])]
    report = run_suites(
        [f"bench/{name}" for name in SUITES[part]], options=options, progress=progress_bar
    )
    path = folder / result_name(part, report.document["mmopt"]["fingerprint"]["gpus"])
    write_suite_report(report, path)
    stdout.print(report.render())
    for name, reason in report.document["mmopt"]["skipped"].items():
        stdout.print(f"not measured: {name}: {reason}", markup=False, soft_wrap=True)
    print(f"written to {path}")


def result_name(part: str, gpus: list[str]) -> str:
    """`ops-nvidia-h100-80gb-hbm3-2026-11-24.json`: part, the first GPU and the day, in UTC."""
    gpu = re.sub(r"[^a-z0-9]+", "-", gpus[0].lower()).strip("-")
    return f"{part}-{gpu}-{datetime.now(UTC):%Y-%m-%d}.json"


if __name__ == "__main__":
    sys.exit(main())
