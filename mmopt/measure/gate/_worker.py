"""One side of a pair: runs one revision's suite in pytest and times slices on command.

The gate starts this file by its path, never as a module: the checkout under test may hold another
revision of mmopt, which must be what the suite imports. So it uses the standard library and pytest
only. Orders come and answers go as JSON lines over two inherited pipes, whose numbers are the
command line's arguments. The first order is the task (a suite may have more ids than a command line
holds):

    mode      "collect": answer what there is; "time": serve slices of the tests in `ids`;
              "figures": run the tests with exact figures and let their plugin write `figures_file`
    suite, options   for pytest; the options in pairs
    with_plugins   whether the plugins among them are needed
    roots     folders of the checkout whose packages must be imported from there
    repository   the user's own tree, from which nothing may be imported
    ids       tests to run, in this order
"""

import contextlib
import gc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest


class Link:
    """JSON lines to and from the gate."""

    def __init__(self, read: int, write: int) -> None:
        self._orders = os.fdopen(read, "r", encoding="utf-8")
        self._answers = os.fdopen(write, "w", encoding="utf-8")

    def send(self, **answer: Any) -> None:
        try:
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()
        except BrokenPipeError:
            os._exit(0)  # the gate is gone

    def receive(self) -> dict[str, Any]:
        line = self._orders.readline()
        if not line:
            os._exit(0)  # the gate is gone
        order: dict[str, Any] = json.loads(line)
        return order


class Side:
    """The pytest plugin: chooses the tests, and reports what fails."""

    def __init__(self, task: dict[str, Any], link: Link) -> None:
        self.task = task
        self.link = link

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.task["mode"] == "collect":
            self.link.send(
                event="collected",
                timed=[item.nodeid for item in items if "benchmark" in item.fixturenames],
                exact=[item.nodeid for item in items if "figures" in item.fixturenames],
                foreign=foreign_modules(
                    [Path(root) for root in self.task["roots"]], Path(self.task["repository"])
                ),
            )
            items.clear()
        elif self.task["mode"] == "time":
            found = {item.nodeid: item for item in items}
            items[:] = [found[wanted] for wanted in self.task["ids"] if wanted in found]
            self.link.send(event="ready")
            self.link.receive()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.link.send(event="broken", where=report.nodeid, text=report.longreprtext)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.link.send(event="failed", id=report.nodeid, text=report.longreprtext)
        elif report.skipped:
            self.link.send(event="skipped", id=report.nodeid, text=str(report.longrepr))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.task["mode"] == "time":
            self.link.send(event="finished", id=nodeid)


def foreign_modules(roots: list[Path], repository: Path) -> list[str]:
    """Packages that the checkout has too but that come from elsewhere, or from the user's tree."""
    origins = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    own = set()
    for root in roots:
        for entry in root.iterdir():
            is_package = entry.is_dir() and (entry / "__init__.py").is_file()
            if (is_package or entry.suffix == ".py") and entry.stem.isidentifier():
                own.add(entry.stem)
    for name in own - origins.keys():
        # A benchmark may import it later.
        spec = importlib.util.find_spec(name)
        origins[name] = spec.origin if spec is not None and spec.has_location else None
    foreign: dict[str, str] = {}
    for name, origin in sorted(origins.items()):
        if not origin or (path := Path(origin).resolve()).is_relative_to(Path.cwd()):
            continue
        if path == Path(__file__).resolve():  # under the names __main__ and __mp_main__
            continue
        # The user's tree may hold the environment.
        in_tree = path.is_relative_to(repository) and "site-packages" not in path.parts
        if name in own or in_tree:
            foreign.setdefault(name.partition(".")[0], origin)
    return [f"{name} ({origin})" for name, origin in foreign.items()]


def serve_slices(link: Link, fixture: Any, run: Any) -> None:
    """Time as many calls as each order wants, until one wants none."""
    # pytest-benchmark warns where its fixture was not used, and refuses to be used twice.
    if fixture._mode is not None:
        raise RuntimeError("The benchmark fixture can only be used once in a test.")
    fixture._mode = "mmopt bench gate"
    link.send(event="at", id=fixture.fullname)
    while calls := link.receive()["calls"]:
        collecting = gc.isenabled()
        gc.disable()
        try:
            seconds = run(calls)
        finally:
            if collecting:
                gc.enable()
        link.send(seconds=seconds)


class Stopwatch:
    """Seconds of wall time, without those in which another process had the core.

    Two runs that a third keeps pushing aside are slower by its time slices, which are the same for
    both: their ratio moves towards 1, and a regression hides. The scheduler counts how long the
    thread was ready to run and did not; what of that the process did not spend computing itself, in
    its other threads, is taken off. Sleeping and waiting for a device still count, as they should.
    """

    def __init__(self) -> None:
        self._scheduler: int | None = None
        with contextlib.suppress(OSError):  # a kernel without CONFIG_SCHED_INFO
            self._scheduler = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def start(self) -> None:
        self._synchronize()
        self._waited = self._read_waited()
        self._computed = time.process_time()
        self._began = time.perf_counter()  # last here and first below: nearest to what is timed

    def stop(self) -> float:
        self._synchronize()
        seconds = time.perf_counter() - self._began
        idle = seconds - (time.process_time() - self._computed)
        waited = self._read_waited() - self._waited
        return seconds - min(waited, max(0.0, idle))

    def _read_waited(self) -> float:
        if self._scheduler is None:
            return 0.0
        # Documentation/scheduler/sched-stats: nanoseconds run, nanoseconds waited, time slices.
        return int(os.pread(self._scheduler, 64, 0).split()[1]) * 1e-9

    @staticmethod
    def _synchronize() -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()


def replace_timing(link: Link) -> None:
    """Let pytest-benchmark's fixture serve slices in place of timing on its own."""
    from pytest_benchmark.fixture import BenchmarkFixture

    watch = Stopwatch()

    def call(fixture: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        def run(calls: int) -> float:
            watch.start()
            for _ in range(calls):
                function(*args, **kwargs)
            return watch.stop()

        serve_slices(link, fixture, run)
        return function(*args, **kwargs)

    def pedantic(
        fixture: Any,
        target: Any,
        args: Any = (),
        kwargs: Any = None,
        setup: Any = None,
        teardown: Any = None,
        **_counts: Any,
    ) -> Any:
        if setup is None and teardown is None:
            return call(fixture, target, *args, **(kwargs or {}))

        def once() -> tuple[float, Any]:
            # As pytest-benchmark does: what setup returns replaces the arguments.
            made = setup() if setup else None
            these, named = made or (args, kwargs or {})
            watch.start()
            result = target(*these, **named)
            seconds = watch.stop()
            if teardown:
                teardown(*these, **named)
            return seconds, result

        serve_slices(link, fixture, lambda calls: sum(once()[0] for _ in range(calls)))
        return once()[1]

    for name, replacement in (("__call__", call), ("pedantic", pedantic)):
        setattr(BenchmarkFixture, name, replacement)


def usable_options(options: list[str], with_plugins: bool) -> list[str]:
    """The options without plugins that are not needed, or that this checkout does not have yet."""
    usable = []
    for option, value in zip(options[::2], options[1::2], strict=True):
        if option != "-p" or (with_plugins and is_there(value)):
            usable += [option, value]
    return usable


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that would hold it
        return False


def main() -> None:
    link = Link(*map(int, sys.argv[1:]))
    task = link.receive()
    if task["mode"] == "time":
        replace_timing(link)
    # The script's own folder must not shadow what the suite imports.
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    options = usable_options(task["options"], task["with_plugins"])
    options += ["-q", "--no-header", "-p", "no:cacheprovider"]
    if task["mode"] == "time":
        # Plugins that many environments have, that take longer to import than a light suite.
        options += ["-p", "no:hypothesispytest", "-p", "no:anyio"]
    elif task["mode"] == "figures":
        options.append(f"--mmopt-figures={task['figures_file']}")
    if importlib.util.find_spec("xdist"):
        options.append("-n0")  # over whatever the project's own options say
    status = pytest.main([*options, task["suite"]], plugins=[Side(task, link)])
    link.send(event="end", status=int(status))
    # pytest has torn its fixtures down; taking the interpreter apart costs a light suite as much
    # as a benchmark.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
