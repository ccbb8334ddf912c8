"""What the gate measures is each checkout and nothing else, and nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gate_repository import EXACT, SHORT, SUITE, Repository, verdicts
from mmopt.measure.gate import _worker
from mmopt.measure.gate._worker import foreign_modules, usable_options
from mmopt.measure.gate.config import GateConfig
from mmopt.measure.gate.decision import Verdict
from mmopt_kernels.errors import MmoptError


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "project")


def test_a_failed_build_shows_its_output(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    config = GateConfig(build=("echo compiling", "echo no such header; exit 3"))
    with pytest.raises(MmoptError, match=r"(?s)exit 3` failed in base .*status 3.*no such header"):
        repository.compare(config)
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_each_side_imports_its_own_code(repository: Repository) -> None:
    """The package of the checkout, not one that is installed or in the user's tree."""
    suite = "import product\n\ndef bench_product(benchmark):\n    benchmark(product.work)\n"
    work = "def work():\n    sum(range({}))\n"
    repository.commit(bench__bench_x=suite, src__product=work.format(1000))
    repository.commit(src__product=work.format(4000))
    report = repository.compare(GateConfig(margin=0.5, sources=(Path("src"),)))
    assert verdicts(report) == {"bench_product": "REGRESSED"}


def test_sides_set_up_on_a_core_each_and_are_timed_on_the_same(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "cores"
    log.touch()
    monkeypatch.setenv("CORES_LOG", str(log))
    suite = """
import os

def note(what):
    with open(os.environ["CORES_LOG"], "a") as file:
        file.write(f"{os.getpid()} {what} {sorted(os.sched_getaffinity(0))}\\n")

note("imported")

def bench_a(benchmark):
    note("set up")
    benchmark(note, "timed")
"""
    repository.commit(bench__bench_x=suite)
    repository.commit()
    repository.compare(SHORT)
    seen: dict[str, dict[str, list[str]]] = {}
    for line in log.read_text().splitlines():
        process, what, cores = re.match(r"(\d+) (.*) \[(.*)\]", line).groups()
        seen.setdefault(process, {}).setdefault(what, []).append(cores)
    base, head = [notes for notes in seen.values() if "timed" in notes]
    last = sorted(os.sched_getaffinity(0))[-2:]
    assert sorted(base["set up"] + head["set up"]) == sorted(map(str, last))
    for notes in (base, head):
        assert notes["imported"] == notes["set up"]
        *timed, after = notes["timed"]  # the last call is for the test's own assertions
        assert {*timed} == {str(last[-1])}
        assert [after] == notes["set up"]


def test_code_from_outside_the_checkout_is_refused(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "product.py").write_text("def work():\n    pass\n")
    suite = (
        "import os, sys\nsys.path.insert(0, os.environ['ELSEWHERE'])\nimport product\n"
        "def bench_product(benchmark):\n    benchmark(product.work)\n"
    )
    repository.commit(bench__bench_x=suite, src__product="def work():\n    pass\n")
    repository.commit()
    monkeypatch.setenv("ELSEWHERE", str(elsewhere))
    with pytest.raises(MmoptError, match=r"imports product \(.*elsewhere.*the same code"):
        repository.compare(GateConfig(sources=(Path("src"),)))


def test_a_package_imported_late_from_outside_the_checkout_is_refused(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "product.py").write_text("def work():\n    pass\n")
    suite = (
        "import os, sys\nsys.path.insert(0, os.environ['ELSEWHERE'])\n"
        "def bench_product(benchmark):\n    import product\n    benchmark(product.work)\n"
    )
    repository.commit(bench__bench_x=suite, src__product="def work():\n    pass\n")
    repository.commit()
    monkeypatch.setenv("ELSEWHERE", str(elsewhere))
    with pytest.raises(MmoptError, match=r"imports product \(.*elsewhere.*the same code"):
        repository.compare()


def test_a_package_in_an_unusual_folder_is_not_measured_as_it_is_installed(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """python/product is the project's own, and nothing says so: an installed copy must not pass."""
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "product.py").write_text("def work():\n    pass\n")
    suite = "import product\n\ndef bench_product(benchmark):\n    benchmark(product.work)\n"
    package = "def work():\n    sum(range({}))\n"
    repository.commit(bench__bench_x=suite, python__product=package.format(10))
    repository.commit(python__product=package.format(10000))
    monkeypatch.setenv("PYTHONPATH", str(installed))
    with pytest.raises(MmoptError, match=r"imports product \(.*Set sources"):
        repository.compare()


def test_code_of_the_users_own_tree_is_refused(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed in editable mode, in a folder that `sources` does not name."""
    suite = "import product\n\ndef bench_product(benchmark):\n    benchmark(product.work)\n"
    repository.commit(bench__bench_x=suite, code__product="def work():\n    pass\n")
    repository.commit()
    monkeypatch.setenv("PYTHONPATH", str(repository.root / "code"))
    with pytest.raises(MmoptError, match=r"imports product \(.*code.product.py.*the same code"):
        repository.compare()


@pytest.mark.slow
def test_a_src_folder_needs_no_configuration(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = "import product\n\ndef exact_size(figures):\n    figures.record('n', product.N)\n"
    repository.commit(bench__bench_x=suite, src__product="N = 1\n")
    repository.commit(src__product="N = 2\n")
    monkeypatch.setenv("PYTHONPATH", str(repository.root / "src"))
    assert repository.compare(timed=False).exit_code == 1


def test_a_plugin_whose_package_is_not_there_either_is_left_out() -> None:
    """As in an older checkout of mmopt itself."""
    options = ["-o", "x=1", "-p", "no_such_package.suites.plugin", "-p", "json.tool"]
    assert usable_options(options, True) == ["-o", "x=1", "-p", "json.tool"]
    assert usable_options(options, False) == ["-o", "x=1"]


@pytest.mark.slow
def test_a_failing_benchmark_leaves_garbage_collection_as_it_was(repository: Repository) -> None:
    suite = (
        "import gc\n"
        "def bench_fails(benchmark):\n    benchmark(lambda: 1 / 0)\n"
        "def bench_next(benchmark):\n    assert gc.isenabled()\n    benchmark(sum, range(10))\n"
    )
    repository.commit(bench__bench_x=suite)
    repository.commit()
    found = verdicts(repository.compare())
    assert found == {"bench_fails": "FAILED", "bench_next": "PASSED"}


def test_a_project_that_turns_warnings_into_errors_can_be_timed(repository: Repository) -> None:
    (repository.root / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    assert verdicts(repository.compare(SHORT)) == {"bench_steady": "INCONCLUSIVE"}


def test_more_ids_than_a_command_line_holds_can_be_timed(repository: Repository) -> None:
    many = (
        "import pytest\n@pytest.mark.parametrize('n', range(300), ids=lambda n: f'{n:0500}')\n"
        "def bench_one(benchmark, n):\n    benchmark(sum, range(1000))\n"
    )
    repository.commit(bench__bench_x=many)
    repository.commit()
    assert len(repository.compare(SHORT).contests) == 300


def test_processes_that_a_suite_leaves_behind_are_ended(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = (
        "import os, subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "with open(os.environ['CHILDREN'], 'a') as file:\n    print(child.pid, file=file)\n"
    )
    repository.commit(bench__bench_x=suite + SUITE)
    repository.commit()
    children = tmp_path / "children"
    monkeypatch.setenv("CHILDREN", str(children))
    repository.compare(SHORT)
    pids = children.read_text().split()
    assert len(pids) == 4
    assert not any(map(is_running, pids))


def is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended; whoever adopted it has yet to notice


def test_a_suite_that_hangs_is_stopped(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmopt.measure.gate.pair.PATIENCE_SECONDS", 4)
    repository.commit(bench__bench_x=SUITE)
    repository.commit(
        bench__bench_x="import time\n" + SUITE.replace("sum, range(1000)", "time.sleep, 600")
    )
    with pytest.raises(MmoptError, match=r"head \(HEAD\) at .*::bench_steady said nothing for 4 s"):
        repository.compare()


@pytest.mark.slow
def test_hooks_and_settings_of_git_in_the_environment_do_not_matter(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.commit(bench__bench_x=EXACT.format(1))
    repository.commit(bench__bench_x=EXACT.format(2))
    hook = repository.root / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    other = Repository(tmp_path / "other").root
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert repository.compare(timed=False).exit_code == 1


def test_a_job_that_is_ended_leaves_nothing(repository: Repository, tmp_path: Path) -> None:
    suite = "import time\n\ndef bench_long(benchmark):\n    benchmark(time.sleep, 600)\n"
    repository.commit(bench__bench_x=suite)
    repository.commit()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmopt", "bench", "gate", "--base", "HEAD~1"],
        cwd=repository.root,
        env={**os.environ, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("pairs") for line in process.stderr)
    process.terminate()
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert len(repository.git("worktree", "list").splitlines()) == 1
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_of_the_checkouts(repository: Repository) -> None:
    repository.commit(bench__bench_x=SUITE)
    repository.commit()
    before = repository.git("status", "--porcelain", "--branch")
    assert repository.compare().verdict is Verdict.PASSED
    assert len(repository.git("worktree", "list").splitlines()) == 1
    assert repository.git("stash", "list") == ""
    assert repository.git("status", "--porcelain", "--branch") == before


def test_the_worker_itself_is_not_taken_for_code_of_the_users_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmopt's own gate: the worker lies in the tree, and multiprocessing gives it another name."""
    monkeypatch.chdir(tmp_path)
    file = Path(_worker.__file__)
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, _worker)
    found = {name.split()[0] for name in foreign_modules([], file.parent)}
    assert found == {"mmopt"}  # its other modules are in that folder, and are told
