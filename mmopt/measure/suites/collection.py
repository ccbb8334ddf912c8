"""Which files and functions of a suite pytest collects: one answer for every caller."""

import os
from collections.abc import Sequence
from pathlib import Path

PLUGIN = "mmopt.measure.suites.plugin"
"""The pytest plugin that suites run with; `-p` with this name."""

PYTEST_OPTIONS: tuple[str, ...] = (
    "-o",
    "python_files=bench_*.py test_*.py *_test.py",
    "-o",
    "python_classes=Bench* Test*",
    "-o",
    "python_functions=bench_* exact_* test_*",
    "-p",
    PLUGIN,
)
"""What makes pytest collect a suite and know the `figures` fixture.

`bench_*` functions take pytest-benchmark's `benchmark` fixture and are timed; `exact_*` functions
take `figures` and count. pytest's own names stay, so that suites of other projects are found.
"""


def pytest_environment() -> dict[str, str]:
    """The environment of a pytest process that times.

    Without the variables of a pytest-xdist worker above it, as of a suite run in a test: with them
    pytest-benchmark turns itself off.
    """
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}


BENCHMARK_FIXTURES = frozenset({"benchmark", "benchmark_weave"})
"""A test that takes one of these is timed."""

FIGURES_FIXTURE = "figures"
"""A test that takes this one records exact figures."""

FIGURES_OPTION = "--mmopt-figures"
"""`--mmopt-figures=FILE` of the plugin: run the tests with figures only, once, and write them."""

# What a folder with a model in it has at its top; a suite has none of them.
_MODEL_FILES = (
    "mmopt.json",
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.bin",
    "*.onnx",
)


def is_suite(source: str) -> bool:
    """Whether `source` names a benchmark suite rather than a checkpoint or an artifact.

    A suite is a Python file (also one that does not exist: a misspelt name is no hub id), a node id
    in one, or a folder that holds Python files and no model.
    """
    path = Path(source.split("::")[0])
    if path.suffix == ".py":
        return True
    if not path.is_dir() or any(next(path.glob(name), None) for name in _MODEL_FILES):
        return False
    return next(path.rglob("*.py"), None) is not None


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Node ids without their files, where that tells them apart."""
    short = {name: name.partition("::")[2] or name for name in names}
    return short if len(set(short.values())) == len(set(names)) else {name: name for name in names}
