"""The pytest plugin of benchmark suites; load it with `-p mmopt.measure.suites.plugin`.

It gives tests the `figures` fixture, writes figures with `--mmopt-figures=FILE`, and adds what a
run was measured on to the JSON of pytest-benchmark. Importing it imports no torch.
"""

from collections.abc import Callable, Generator
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import pytest

from mmopt.measure.suites.collection import FIGURES_FIXTURE, FIGURES_OPTION
from mmopt.measure.suites.figures import Better, Figure, write_figures
from mmopt.measure.throttling import watch_conditions
from mmopt_kernels import __version__
from mmopt_kernels.errors import InputError, MmoptError

RESULT_SCHEMA_VERSION = 1
"""Of the key `mmopt` in pytest-benchmark's JSON."""

# A report carries the user properties of its test, from pytest-xdist's workers too.
_PROPERTY = "mmopt figure"

# How pytest-benchmark skips the tests that are not its own.
_NOT_TIMED = "--benchmark-only active"


class Figures:
    """Records the exact figures of one test."""

    def __init__(self, keep: Callable[[str, Figure], None]) -> None:
        self._keep = keep
        self._names: set[str] = set()

    def record(
        self, name: str, value: int | Integral, *, unit: str = "", better: Better = "lower"
    ) -> None:
        """Record one figure; its id is the test's node id, two colons and `name`.

        Args:
            name: what was counted; unique within the test.
            value: a whole number. A float is refused even where it is whole: what is exact was
                never a float.
            unit: what is counted, `bytes`; empty where the name says it.
            better: which way is better, `lower` or `higher`.

        Raises:
            InputError: one of these does not hold.
        """
        __tracebackhide__ = True  # the failing line is the test's
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"figures.record: the name is {name!r}, expected one line of text.")
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(
                f"figures.record: {name} is {value!r}, expected a whole number (int). "
                "Round or count before recording; what has noise belongs to a timed benchmark."
            )
        if not isinstance(unit, str) or better not in get_args(Better):
            raise InputError(
                f"figures.record: {name} has the unit {unit!r} and better {better!r}, expected a "
                f"text and one of {', '.join(get_args(Better))}."
            )
        if name in self._names:
            raise InputError(
                f"figures.record: {name} was recorded before in this test, expected each name once."
            )
        self._names.add(name)
        self._keep(name, Figure(int(value), unit, better))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Record exact figures of this test: `figures.record(name, value, unit="bytes")`."""
    node = request.node

    def keep(name: str, figure: Figure) -> None:
        node.user_properties.append((_PROPERTY, {"name": name, **figure.to_dict()}))

    return Figures(keep)


class _Selector:
    """Leaves the tests that record figures."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        counted: list[pytest.Item] = []
        others: list[pytest.Item] = []
        for item in items:
            takes = getattr(item, "fixturenames", ())
            (counted if FIGURES_FIXTURE in takes else others).append(item)
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = counted


class _Writer:
    """Keeps what tests record and writes it when the session ends well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: dict[str, Figure] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or report.outcome != "passed":
            return
        for key, value in report.user_properties:
            if key == _PROPERTY and isinstance(value, dict):
                entry: dict[str, Any] = dict(value)
                name = f"{report.nodeid}::{entry.pop('name')}"
                self._figures[name] = Figure(**entry)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        ended_well = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if not ended_well or session.config.option.collectonly:
            return
        try:
            write_figures(self._path, self._figures)
        except MmoptError as error:
            pytest.exit(str(error), returncode=int(pytest.ExitCode.INTERNAL_ERROR))


class _Conditions:
    """Watches the machine while tests run, and adds what it saw to pytest-benchmark's JSON.

    So does why a test was skipped: who reads the result must not take a peer that broke down for
    one that nobody thought of.
    """

    def __init__(self) -> None:
        self._watched: Any = None
        self._skipped: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        with watch_conditions() as self._watched:
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if _NOT_TIMED not in reason:
                self._skipped[report.nodeid] = reason

    # pytest-benchmark's own hook, called for --benchmark-json and for its storage.
    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        from mmopt.measure.fingerprint import fingerprint  # imports torch

        output_json["mmopt"] = {
            "schema": RESULT_SCHEMA_VERSION,
            "version": __version__,
            # In this process: the suite may have set its threads.
            "fingerprint": fingerprint().to_dict(),
            "conditions": None if self._watched is None else self._watched.to_dict(),
            "figures": {},
            "skipped": self._skipped,
        }


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--mmopt-figures`."""
    parser.getgroup("mmopt").addoption(
        FIGURES_OPTION,
        metavar="FILE",
        type=Path,
        default=None,
        help="Run only the tests that record exact figures, each once and untimed, and write the "
        "figures to FILE as JSON. A file that is there is removed first, and FILE appears only "
        "when every test passed (without such tests it holds no figures).",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register what the options ask for.

    With `--mmopt-figures` pytest-benchmark calls each function once and untimed.
    """
    path: Path | None = config.getoption(FIGURES_OPTION)
    if path is None:
        kept = ("benchmark_json", "benchmark_save", "benchmark_autosave")
        if any(getattr(config.option, name, None) for name in kept):
            config.pluginmanager.register(_Conditions(), "mmopt-conditions")
        return
    # Whatever a project's own addopts ask of pytest-benchmark, nothing is timed here.
    config.option.benchmark_disable = True
    config.option.benchmark_enable = False
    config.option.benchmark_only = False
    config.option.benchmark_skip = False
    config.pluginmanager.register(_Selector(), "mmopt-figures-selector")
    if hasattr(config, "workerinput"):
        return  # pytest-xdist's worker: the process that started it writes
    # Found before the tests run, not after them.
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise pytest.UsageError(f"{FIGURES_OPTION}={path}: expected a file in a folder that exists")
    path.unlink(missing_ok=True)
    config.pluginmanager.register(_Writer(path), "mmopt-figures-writer")
