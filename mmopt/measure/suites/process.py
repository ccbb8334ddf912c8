"""Run pytest on suites in a process of its own, and say in one message what went wrong."""

import importlib.util
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmopt.measure.suites.collection import FIGURES_OPTION, PYTEST_OPTIONS, pytest_environment
from mmopt.measure.suites.figures import Figure, read_figures
from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError, MmoptError

_PERCENT = re.compile(r"\[\s*(\d+)%\]")

# Enough for the message of one failure and its place; the command that shows the rest is named.
_LINES_SHOWN = 12


def measure_figures(
    suites: Sequence[str],
    *,
    keyword: str | None = None,
    options: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Figure]:
    """Run the tests that record exact figures, in a process of their own, and return them by id.

    Without such tests there are none, which is no error.

    Args:
        suites, keyword, options: as `run_suites` takes them.

    Raises:
        InputError: no such file, or an option that pytest refuses.
        MmoptError: pytest is missing, or a test failed or crashed (exit 3).
    """
    require_suites(suites)
    selecting = [*options, *suites]
    if keyword is not None:
        selecting = ["-k", keyword, *selecting]
    with tempfile.TemporaryDirectory(prefix="mmopt-figures-") as folder:
        written = Path(folder) / "figures.json"
        lines = run_pytest(
            [f"{FIGURES_OPTION}={written}", *selecting],
            suites=suites,
            what=f"count the exact figures of {' '.join(suites)}",
            progress=progress,
        )
        if not written.is_file():  # a test ended the process, and claimed success
            raise MmoptError(f"{' '.join(suites)}: {_ended_early(lines)}")
        return read_figures(written)


def require_suites(suites: Sequence[str]) -> None:
    """Refuse, before a process is started, what cannot run.

    Raises:
        InputError: no suite, or a path that does not exist.
        MmoptError: pytest or pytest-benchmark is missing (exit 3).
    """
    if not suites:
        raise InputError("bench: no suite was given. Pass a folder or a file with benchmarks.")
    for suite in suites:
        path = Path(suite.split("::")[0])
        if not path.exists():
            raise InputError(f"{path} does not exist, expected a benchmark suite. Check the path.")
    require_pytest()


def require_pytest() -> None:
    """Refuse to go on without what suites run with.

    Raises:
        MmoptError: pytest or pytest-benchmark is missing (exit 3).
    """
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise MmoptError(
                f"{package} is not installed, and suites run with it. "
                "Run `pip install 'mmopt[bench]'`."
            )


def run_pytest(
    arguments: Sequence[str], *, suites: Sequence[str], what: str, progress: Progress
) -> list[str]:
    """Run pytest on suites in a fresh process.

    Args:
        arguments: of pytest, the suites among them.
        suites: what the messages name.
        what: what the progress bar says.

    Returns:
        The lines of its output, when every test passed or none was selected.

    Raises:
        InputError: pytest refuses the arguments.
        MmoptError: a file cannot be imported, a test failed, or the process died (exit 3).
    """
    import pytest

    command = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS]
    # One line a test, for the bar; over whatever the project's own options say.
    command += ["-v", "--tb=short", "--color=no", "--no-header", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command.append("-n0")  # pytest-benchmark times nothing in several processes
    command += arguments
    storage = Path(".benchmarks")
    had_storage = storage.exists()
    status, lines = _watch(command, what, progress)
    if not had_storage and storage.is_dir() and not any(storage.iterdir()):
        storage.rmdir()  # pytest-benchmark makes it whether or not it stores anything
    if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return lines
    named = " ".join(suites)
    if status == pytest.ExitCode.USAGE_ERROR:
        refused = [line for line in lines if re.search(r"^ERROR: (?!usage)|: error: ", line)]
        raise InputError(
            f"{named}: pytest refuses the call, expected one that it takes:\n{_indented(refused)}"
        )
    if status == pytest.ExitCode.TESTS_FAILED:
        found = "a test failed"
    elif status == pytest.ExitCode.INTERRUPTED:
        found = "a file cannot be collected"
    else:
        found = f"the process ended with status {status}"
        if status < 0:
            found = f"the process was killed by signal {-status} ({signal.strsignal(-status)})"
    # Without the file that is gone by then.
    again = [word for word in command if not word.startswith("--benchmark-json")]
    again = [re.sub(f"^{FIGURES_OPTION}=.*", f"{FIGURES_OPTION}=figures.json", w) for w in again]
    raise MmoptError(
        f"{named}: {found}, expected every test to pass; nothing was kept:\n"
        f"{_indented(telling_lines(lines))}\nTo see all of it: {shlex.join(again)}"
    )


def require_finished(lines: Sequence[str], named: str) -> None:
    """Raise MmoptError unless pytest's output ends with its summary: `1 passed in 0.02s`."""
    if not any(re.search(r" in \d+\.\d+s\b", line) for line in lines[-3:]):
        raise MmoptError(f"{named}: {_ended_early(lines)}")


def _ended_early(lines: Sequence[str]) -> str:
    return (
        "the process ended before its last test had, expected it to go on; nothing was kept:\n"
        f"{_indented(telling_lines(lines))}"
    )


def telling_lines(lines: Sequence[str], most: int = _LINES_SHOWN) -> list[str]:
    """The lines of pytest's output that say what went wrong.

    They are the first ones of a fatal error's report, which ends with pytest's own frames; else the
    names and messages of failures; else the last lines, which say what ran.
    """
    said = [line for line in lines if line.strip()]
    for index, line in enumerate(said):
        if "Fatal Python error:" in line:
            return said[index : index + most]
    told = [line for line in said if line.startswith(("E  ", "FAILED ", "ERROR "))]
    return (told or said)[-most:]


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _watch(command: Sequence[str], what: str, progress: Progress) -> tuple[int, list[str]]:
    """The exit status of a pytest process and the lines of its output."""
    lines = []
    environment = {**pytest_environment(), "PYTHONUNBUFFERED": "1"}
    with progress(what, 100) as advance:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=environment,
        )
        assert process.stdout is not None
        done = 0
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if found := _PERCENT.search(line):
                    advance(int(found[1]) - done)
                    done = int(found[1])
            return process.wait(), lines
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
