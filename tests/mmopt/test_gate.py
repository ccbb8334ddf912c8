"""`mmopt bench gate` over small real repositories: two commits, real workers, real verdicts."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gate_repository import CONFIG, EXACT, SUITE, Repository, verdicts
from mmopt.cli.bench import bench_app
from mmopt.measure.gate.config import GateConfig
from mmopt.measure.gate.decision import Verdict
from mmopt.measure.gate.run import gate
from mmopt_kernels.errors import InputError, MmoptError

app = typer.Typer()
app.add_typer(bench_app, name="bench")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "project")


BASE = """
import time
import pytest

def bench_same(benchmark):
    benchmark(sum, range(1000))

def bench_slower(benchmark):
    benchmark(sum, range(1000))

def bench_faster(benchmark):
    benchmark(sum, range(4000))

def bench_with_setup(benchmark):
    benchmark.pedantic(sum, setup=lambda: ((range(1000),), {}), rounds=5)

def bench_renamed_in_head(benchmark):
    benchmark(sum, range(1000))

def bench_dropped(benchmark):
    benchmark(sum, range(1000))

def bench_fails_in_head(benchmark):
    assert benchmark(lambda: 1) == 1

def bench_skipped_in_head(benchmark):
    benchmark(lambda: 1)

def bench_skipped(benchmark):
    pytest.skip("no GPU here")

@pytest.mark.parametrize("size", [10, 20], ids=["small size", "a[b]"])
def bench_parametrized(benchmark, size):
    benchmark(sum, range(100 * size))
"""

HEAD = (
    BASE.replace("def bench_slower(benchmark):\n    benchmark(sum, range(1000))",
                 "def bench_slower(benchmark):\n    benchmark(sum, range(4000))")
    .replace("range(4000))\n\ndef bench_with", "range(1000))\n\ndef bench_with")
    .replace("renamed_in_head", "renamed_in_this_head")
    .replace("def bench_dropped", "def helper_dropped")
    .replace("lambda: 1) == 1", "lambda: 1) == 2")
    .replace("    benchmark(lambda: 1)\n", "    pytest.skip('too slow')\n")
)  # fmt: skip


def test_every_kind_of_change_gets_its_verdict(repository: Repository) -> None:
    repository.commit(bench__bench_x=BASE)
    repository.commit(bench__bench_x=HEAD)
    report = repository.compare()
    assert verdicts(report) == {
        "bench_same": "PASSED",
        "bench_slower": "REGRESSED",
        "bench_faster": "IMPROVED",
        "bench_with_setup": "PASSED",
        "bench_renamed_in_head": "MISSING",
        "bench_dropped": "MISSING",
        "bench_fails_in_head": "FAILED",
        "bench_skipped_in_head": "MISSING",
        "bench_parametrized[small size]": "PASSED",
        "bench_parametrized[a[b]]": "PASSED",
        "bench_renamed_in_this_head": "NEW",
    }
    assert (report.verdict, report.exit_code) == (Verdict.REGRESSED, 1)
    slowdown = next(c.slowdown for c in report.contests if c.name.endswith("slower"))
    assert slowdown is not None
    assert slowdown > 1
    said = "\n".join([*report.notes, *(c.note for c in report.contests if c.note)])
    assert "bench/bench_x.py::bench_skipped" in said
    assert "bench_renamed_in_head is in base but not in head; renamed to" in said
    assert "The suite itself differs" in said
    assert "assert 1 == 2" in said
    assert "too slow" in said
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_failing_benchmark_is_never_a_pass(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit(bench__bench_x=SUITE + "    raise RuntimeError('after timing')\n")
    report = repository.compare()
    assert verdicts(report) == {"bench_steady": "FAILED"}
    assert report.exit_code == 3


def test_a_fixture_never_called_is_never_a_pass(repository: Repository) -> None:
    repository.commit(bench__bench_x="def bench_idle(benchmark):\n    pass\n")
    repository.commit()
    report = repository.compare()
    assert verdicts(report) == {"bench_idle": "FAILED"}
    assert report.exit_code == 3


@pytest.mark.parametrize("side", ["base", "head"])
def test_a_crash_names_the_side_and_the_benchmark(repository: Repository, side: str) -> None:
    crash = SUITE.replace("sum, range(1000)", "__import__('os')._exit, 7")
    repository.commit(bench__bench_x=crash if side == "base" else SUITE)
    repository.commit(bench__bench_x=crash if side == "head" else SUITE)
    with pytest.raises(
        MmoptError,
        match=rf"crashed in {side} \(.*\) at bench/bench_x.py::bench_steady with status 7",
    ) as caught:
        repository.compare()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("side", ["base", "head"])
def test_a_suite_that_cannot_be_imported_names_file_and_fault(
    repository: Repository, side: str
) -> None:
    broken = "import a_module_that_is_not_there\n" + SUITE
    repository.commit(bench__bench_x=broken if side == "base" else SUITE)
    repository.commit(bench__bench_x=broken if side == "head" else SUITE)
    with pytest.raises(MmoptError, match=rf"(?s)bench_x.py cannot be .* {side} .*a_module_that"):
        repository.compare()


@pytest.mark.parametrize("side", ["base", "head"])
def test_no_benchmark_at_all_is_bad_input(repository: Repository, side: str) -> None:
    empty = "def helper():\n    pass\n"
    repository.commit(bench__bench_x=empty if side == "base" else SUITE)
    repository.commit(bench__bench_x=empty if side == "head" else SUITE)
    with pytest.raises(InputError, match=rf"{side} \(.*has no benchmark in bench"):
        repository.compare()


def test_a_revision_without_the_suite_is_bad_input(repository: Repository) -> None:
    repository.commit(readme="")
    repository.commit(bench__bench_x=SUITE)
    with pytest.raises(InputError, match=r"base \(HEAD~1\) has no bench"):
        repository.compare()


def test_no_such_revision_is_bad_input(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE)
    with pytest.raises(InputError, match="--base nowhere: the repository has no such revision"):
        gate("nowhere", config=CONFIG, folder=repository.root)
    with pytest.raises(InputError, match="--head --output=x: the repository has no such revision"):
        gate("HEAD", head="--output=x", config=CONFIG, folder=repository.root)


def test_a_shallow_clone_says_how_to_get_the_base(repository: Repository, tmp_path: Path) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    shallow = tmp_path / "shallow"
    url = repository.root.as_uri()
    subprocess.run(["git", "clone", "--quiet", "--depth=1", url, str(shallow)], check=True)
    with pytest.raises(InputError, match=r"shallow.*fetch-depth: 0"):
        gate("HEAD~1", config=CONFIG, folder=shallow)


def test_outside_a_repository_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not in a git repository"):
        gate("HEAD~1", config=CONFIG, folder=tmp_path)


def edit(repository: Repository) -> None:
    (repository.root / "bench" / "bench_x.py").write_text("# edited\n" + SUITE)


def add(repository: Repository) -> None:
    (repository.root / "bench" / "bench_y.py").write_text(SUITE)


@pytest.mark.parametrize(("dirty", "name"), [(edit, "bench_x.py"), (add, "bench_y.py")])
def test_a_dirty_tree_is_refused_and_left_as_it_is(
    repository: Repository, dirty: Callable[[Repository], None], name: str
) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    dirty(repository)
    before = repository.git("status", "--porcelain")
    with pytest.raises(InputError, match=rf"{name}.*Nothing was stashed or changed"):
        repository.compare()
    assert repository.git("status", "--porcelain") == before


def test_a_fixture_used_twice_fails_by_name(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE + "    benchmark(sum, range(10))\n")
    repository.commit()
    report = repository.compare()
    assert verdicts(report) == {"bench_steady": "FAILED"}
    assert "can only be used once" in str(report.contests[0].note)


def test_a_benchmark_that_a_plugin_runs_again_fails_by_name(repository: Repository) -> None:
    again = (
        "from _pytest.runner import runtestprotocol\n"
        "def pytest_runtest_protocol(item, nextitem):\n"
        "    for _ in range(2):\n"
        "        item._initrequest()\n"
        "        runtestprotocol(item, nextitem=nextitem)\n"
        "    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)\n"
        "    return True\n"
    )
    repository.commit(bench__bench_x=SUITE, bench__conftest=again)
    repository.commit()
    report = repository.compare()
    assert verdicts(report) == {"bench_steady": "FAILED"}
    assert "run more than once" in str(report.contests[0].note)


def test_a_commit_held_against_itself_says_so(repository: Repository) -> None:
    repository.commit(bench__bench_x=EXACT.format(1))
    report = gate("HEAD", config=CONFIG, folder=repository.root, timed=False)
    assert "HEAD and HEAD are the same commit" in " ".join(report.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": GateConfig(skip=("*",))}, "none that is compared: all are skipped"),
        ({"timed": False}, "no exact figures, and --exact times nothing"),
    ],
)
def test_benchmarks_none_of_which_is_compared_are_bad_input(
    repository: Repository, options: dict[str, Any], said: str
) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    with pytest.raises(InputError, match=said):
        repository.compare(**options)


def test_an_exhausted_budget_is_inconclusive(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    report = repository.compare(GateConfig(budget=0.01))
    assert verdicts(report) == {"bench_steady": "INCONCLUSIVE"}
    assert report.exit_code == 3
    assert "budget" in " ".join(report.notes)


def test_more_threads_than_cores_is_bad_input(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(InputError, match=f"threads is {cores + 1}, but"):
        repository.compare(GateConfig(threads=cores + 1))


@pytest.mark.parametrize(
    ("head", "verdict", "code"),
    [
        pytest.param(100, "PASSED", 0, marks=pytest.mark.slow),
        (101, "REGRESSED", 1),
        pytest.param(99, "IMPROVED", 0, marks=pytest.mark.slow),
    ],
)
def test_exact_figures_are_held_to_the_unit(
    repository: Repository, head: int, verdict: str, code: int
) -> None:
    repository.commit(bench__bench_x=EXACT.format(100))
    repository.commit(bench__bench_x=EXACT.format(head))
    report = repository.compare(timed=False)
    (figure,) = report.figures
    assert (figure.name, figure.base, figure.head) == (
        "bench/bench_x.py::exact_size::bytes",
        100,
        head,
    )
    assert (figure.verdict, report.exit_code) == (verdict, code)


def test_a_lost_figure_is_missing_by_name(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE + EXACT.format(1))
    repository.commit(bench__bench_x=SUITE)
    report = repository.compare(timed=False)
    assert [(f.name, f.verdict) for f in report.figures] == [
        ("bench/bench_x.py::exact_size::bytes", "MISSING")
    ]
    assert report.exit_code == 1


def test_figures_that_cannot_be_counted_stop_the_gate(repository: Repository) -> None:
    repository.commit(bench__bench_x=EXACT.format(1))
    repository.commit(bench__bench_x=EXACT.format(1.5))
    with pytest.raises(MmoptError, match=r"(?s)cannot be counted in head.*expected a whole number"):
        repository.compare(timed=False)


def test_the_command_prints_one_document_and_exits_by_verdict(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository.commit(bench__bench_x=EXACT.format(1))
    repository.commit(bench__bench_x=EXACT.format(2))
    monkeypatch.chdir(repository.root)
    file = tmp_path / "gate.json"
    arguments = ["bench", "gate", "--base", "HEAD~1", "--exact", "--json", "-o", str(file)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 1, ran.output
    document = json.loads(ran.stdout)
    assert document == json.loads(file.read_text())
    assert (document["kind"], document["verdict"]) == ("gate", "REGRESSED")


@pytest.mark.parametrize(
    "suite", [pytest.param("../bench", marks=pytest.mark.slow), "{root}/bench/bench_x.py"]
)
def test_the_suite_is_named_from_the_working_directory(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, suite: str
) -> None:
    """An absolute path too: joined to a checkout, it would be the user's tree on both sides."""
    repository.commit(bench__bench_x=EXACT.format(1), sub__module="")
    repository.commit(bench__bench_x=EXACT.format(2))
    monkeypatch.chdir(repository.root / "sub")
    arguments = ["--base", "HEAD~1", "--exact", suite.format(root=repository.root)]
    ran = CliRunner().invoke(app, ["bench", "gate", *arguments])
    assert ran.exit_code == 1, ran.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--base is missing"),
        (["--base", "HEAD", "../elsewhere"], "is outside the repository"),
        (["--base", "HEAD", "--margin", "3"], "no share"),
        (["--base", "HEAD", "--config", "nowhere.toml"], "there is no such file"),
        (["--self-test", "--base", "HEAD"], "a suite of its own"),
        (["--self-test", "--margin", "5%"], "with the gate's defaults"),
        (["--self-test", "--trials", "1"], "expected 2 or more"),
    ],
)
def test_bad_usage_is_one_message_and_exit_2(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    repository.commit(bench__bench_x=SUITE)
    monkeypatch.chdir(repository.root)
    ran = CliRunner().invoke(app, ["bench", "gate", *arguments])
    assert ran.exit_code == 2
    assert said in " ".join(ran.stderr.split())


@pytest.mark.slow
def test_a_slow_setup_does_not_run_away_with_the_budget(repository: Repository) -> None:
    """A call of a microsecond behind a setup of 5 ms: not thousands of calls for one slice."""
    repository.commit(
        bench__bench_x="import time\n\ndef bench_setup(benchmark):\n"
        "    benchmark.pedantic(lambda: None, setup=lambda: time.sleep(0.005), rounds=3)\n"
    )
    repository.commit()
    report = repository.compare(GateConfig(margin=0.5, budget=1))
    (contest,) = report.contests
    assert contest.log_ratios
    assert report.seconds < 60
