"""bench/ keeps its pattern: what is collected, what is recorded, what `make` runs."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmopt.measure.gate.config import read_config
from mmopt.measure.suites.collection import PYTEST_OPTIONS
from mmopt.measure.suites.figures import read_figures
from mmopt.measure.suites.run import run_suites
from mmopt_kernels import candidates, tuning

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
FILES = sorted(BENCH.glob("bench_*.py"))


def collected(*options: str) -> list[str]:
    """Node ids that pytest collects of bench/."""
    command = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS, "--collect-only", "-q", "-n0"]
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, "bench"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [line for line in ran.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def ids() -> list[str]:
    """Everything that pytest collects on this machine."""
    return collected()


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """The functions at the top of a file, by name."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_collected_and_has_timed_benchmarks(path: Path, ids: list[str]) -> None:
    timed = [one for one in ids if one.startswith(f"bench/{path.name}::bench_")]
    if path.name == "bench_gpu.py" and not torch.cuda.is_available():
        assert timed == []  # left out, not skipped: nothing is reported as if it could run here
    else:
        assert timed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_timed_and_exact_functions_take_their_fixture_and_name_their_group(path: Path) -> None:
    found = functions(path)
    timed = {name: node for name, node in found.items() if name.startswith("bench_")}
    assert timed
    for name, node in timed.items():
        assert "benchmark" in {argument.arg for argument in node.args.args}, name
        assert "benchmark.group =" in ast.unparse(node), f"{name} has no benchmark.group"
    for name, node in found.items():
        if name.startswith("exact_"):
            assert "figures" in {argument.arg for argument in node.args.args}, name


@pytest.mark.slow
def test_the_quick_pass_is_everything_but_slow_and_gpu(ids: list[str]) -> None:
    quick = collected("-m", "quick")
    left_out = set(ids) - set(quick)
    assert quick
    slow = {one for one in left_out if "bench_gpu" not in one}
    long = {one for one in slow if "[long-" in one}
    assert {one.partition("[")[0] for one in slow - long} == {
        "bench/bench_export.py::bench_export",
        "bench/bench_export.py::bench_peers_build_decoder",
        "bench/bench_export.py::bench_peers_build_encoder",
        "bench/bench_export.py::bench_peers_decoder",
        "bench/bench_export.py::bench_peers_encoder",
        "bench/bench_training_step.py::bench_training_step",
        "bench/bench_warm_start.py::bench_first_call",
    }
    assert {one.partition("::")[0] for one in long} == {
        "bench/bench_attention.py",
        "bench/bench_linear_cross_entropy.py",
        "bench/bench_lora.py",
    }
    assert not any("[long-" in one for one in quick)


@pytest.mark.slow
def test_the_gate_times_our_own_quick_benchmarks_alone(ids: list[str]) -> None:
    """It knows names, not marks."""
    skip = read_config(ROOT, None).skips
    timed = {one for one in ids if "::bench_" in one and not skip(one)}
    assert timed == {
        one
        for one in collected("-m", "quick")
        if "::bench_" in one and re.search(r"mmopt|addmm|bench_(serve|export|kernels)", one)
    }


def test_the_baseline_records_the_figures_of_every_exact_test_and_of_no_other(
    ids: list[str],
) -> None:
    recorded = {name.rpartition("::")[0] for name in read_figures(BENCH / "baselines/exact.json")}
    assert recorded == {one for one in ids if "::exact_" in one}


def test_the_baseline_was_recorded_with_the_pinned_versions() -> None:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    versions = json.loads((BENCH / "baselines/exact.json").read_text())["versions"]
    for library in ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxscript", "numpy"):
        assert versions[library] == pinned[library], library


def test_graphs_stay_whole_and_lengths_do_not_recompile() -> None:
    """What the baseline may never be updated to."""
    figures = read_figures(BENCH / "baselines/exact.json")
    promised = [
        figure.value for name, figure in figures.items() if re.search("breaks|recompiles", name)
    ]
    assert promised == [0, 0, 0, 0]


def test_kept_artifacts_belong_to_one_state_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # conftest.py sets some
    conftest = module(BENCH / "conftest.py")
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    for package in ("kernels", "export", "bench"):
        (tmp_path / package).mkdir()
    keys = [conftest.source_key()]
    (tmp_path / "export" / "graph.py").write_text("a = 1\n")
    keys.append(conftest.source_key())
    (tmp_path / "export" / "graph.py").write_text("a = 2\n")
    keys.append(conftest.source_key())
    (tmp_path / "export" / "graph.py").rename(tmp_path / "export" / "trace.py")
    keys.append(conftest.source_key())
    assert len(set(keys)) == 4
    assert conftest.source_key() == keys[-1]
    monkeypatch.setattr(conftest, "library_versions", lambda: {"onnx": "99.0"})
    assert conftest.source_key() not in keys


def test_make_runs_the_suites_and_ci_the_exact_figures() -> None:
    made = (ROOT / "Makefile").read_text()
    for command in (
        "mmopt bench run bench -o build/bench.json -- -m quick",
        "mmopt bench gate --base HEAD~1 bench",
        "mmopt bench exact bench --baseline bench/baselines/exact.json\n",
        "python bench/gpu.py",
    ):
        assert command in made
    assert "make bench-exact\n" in (ROOT / ".ci/run").read_text()


# --- the GPU suite, as far as a machine without a GPU can tell ------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_make_gpu_exits_3_and_writes_nothing() -> None:
    before = sorted((BENCH / "results").iterdir())
    ran = subprocess.run(
        [sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 3
    assert "Traceback" not in ran.stderr
    assert "GPU" in ran.stderr
    assert sorted((BENCH / "results").iterdir()) == before


def test_a_gpu_result_is_named_for_its_gpu_and_day() -> None:
    name = module(BENCH / "gpu.py").result_name("ops", ["NVIDIA H100 80GB HBM3"])
    assert re.fullmatch(r"ops-nvidia-h100-80gb-hbm3-\d{4}-\d\d-\d\d\.json", name)


def test_what_is_compiled_beforehand_are_the_cases_of_the_suites() -> None:
    """Each with every peer that compiles, and each reaches a process."""
    warm = importlib.import_module("gpu_warm")  # other processes import it too
    found = warm.suite_tasks()
    assert len(found) == len(set(found))
    for suite, (cases, directions, peers) in warm.SUITES.items():
        assert set(peers) <= set(cases.GPU_PEERS)
        never = sum(not getattr(case, "trains", True) for case in cases.GPU)
        calls = len(cases.GPU) * len(directions) - never
        assert sum(one[0] == suite for one in found) == calls * len(peers)
    warm.compile_beforehand(1, run=len)


def test_compiling_beforehand_runs_a_case_or_says_why_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm = importlib.import_module("gpu_warm")
    cases, lora = warm.attention_cases, warm.lora_cases
    monkeypatch.setattr(cases, "GPU", (replace(cases.CPU_QUICK[0], S=16, T=16, Hq=2, Hkv=2),))
    monkeypatch.setattr(lora, "GPU", (replace(lora.CPU_QUICK[0], M=8, K=16, N=(16,)),))
    monkeypatch.setattr(warm.losses, "GPU", (replace(warm.losses.CPU_QUICK[0], M=8, H=16, V=32),))
    assert warm.run(("attention", 0, "forward+backward", "mmopt"), "cpu") is None
    assert warm.run(("lora", 0, "forward", "mmopt"), "cpu") is None
    assert warm.run(("losses", 0, "", "mmopt"), "cpu") is None
    assert "liger_kernel is not installed" in str(warm.run(("losses", 0, "", "liger"), "cpu"))


def small(launch: Any) -> Any:
    """The same kernel at a size for the interpreter."""
    tuner = importlib.import_module("gpu_tune")
    if launch.kernel.startswith("lora"):
        dropout_p = 0.1 if "dropout" in launch.name else 0.0
        return tuner.lora(launch.kernel, 8, 16, 16, 4, dropout_p)
    if launch.kernel.startswith("attention"):
        return tuner.attention(launch.kernel, 16, 16, "packed", heads=1)
    return tuner.cross_entropy(4, 32)


def test_what_is_tuned_launches_its_kernel_and_is_tried_with_every_candidate(
    tmp_path: Path,
) -> None:
    """Every kernel that has tiles, but the one of 4 bits, which no GPU was tuned for yet."""
    tuner = importlib.import_module("gpu_tune")
    kernels = {one.kernel: one for one in tuner.launches()}
    assert set(kernels) == set(tuning.FIELDS) - {"lora_linear_nf4"}
    for kernel, launch in kernels.items():
        calls: list[object] = []

        def clock(call: Any, calls: list[object] = calls) -> float:
            calls.append(call)
            call()
            return float(len(calls))  # the first is the fastest

        found = tuner.tune(small(launch), tmp_path, "cpu", clock, "a clock")
        width = found.key.width
        assert len(calls) == len(found.timings) == len(candidates.candidates(kernel, width))
        assert found.key.kernel == kernel
    table = json.loads((tmp_path / "interpreter.json").read_text())
    assert {entry["kernel"] for entry in table["entries"]} == set(kernels)
    assert all(entry["config"] is None for entry in table["entries"])


def test_tuning_says_what_won_and_where_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner, gpu = importlib.import_module("gpu_tune"), module(BENCH / "gpu.py")
    launches = [one for one in tuner.launches() if one.name == "1024x128256"]
    inner, tuned = tuner.tune, []

    def tune(launch: Any, folder: Path) -> Any:
        tuned.append(launch.name)
        slow = iter((2.0, 1.0, *[3.0] * 99))

        def clock(call: Any) -> float:
            call()
            return next(slow)

        return inner(small(launch), folder, "cpu", clock, "a clock")

    monkeypatch.setattr(
        tuner, "launches", lambda: [*launches, tuner.lora("lora_linear_add", 8, 8, 8, 2)]
    )
    monkeypatch.setattr(tuner, "tune", tune)
    gpu.tune("cross 1024", tmp_path / "tables")
    assert tuned == ["1024x128256"]
    said = capsys.readouterr().out
    assert "cross_entropy 1024x128256: now 2.0 ms, best 1.0 ms: {'BLOCK_V'" in said
    assert f"written to {tmp_path / 'tables'}" in said
    assert (tmp_path / "tables" / "interpreter.json").exists()


def test_every_candidate_of_a_launch_is_compiled_beforehand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuner = importlib.import_module("gpu_tune")
    launches = [small(one) for one in tuner.launches() if one.kernel == "lora_linear_down"][:1]
    monkeypatch.setattr(tuner, "launches", lambda: launches)
    known = candidates.candidates("lora_linear_down", 16)
    tried = [None, {"BLOCK_M": 3}, known[1], {"num_stages": 0}]
    monkeypatch.setattr(candidates, "candidates", lambda kernel, width: tried)
    first, last = tuner.run(0, "cpu")
    assert "BLOCK_M" in first
    assert "num_stages" in last


@pytest.mark.slow
def test_samples_of_our_timers_reach_pytest_benchmark_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU suite hands its samples over through a clock; here with samples made up."""
    (tmp_path / "bench_replayed.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('gpu', {str(BENCH / 'bench_gpu.py')!r})\n"
        "gpu = importlib.util.module_from_spec(spec)\n"
        f"sys.path.insert(0, {str(BENCH)!r})\n"  # where it finds its neighbour
        "sys.modules['gpu'] = gpu\n"  # where its dataclass looks itself up
        "spec.loader.exec_module(gpu)\n"
        "import pytest\n"
        "pytestmark = pytest.mark.benchmark(timer=gpu.CLOCK)\n"
        "from mmopt.measure.timing import Timing\n"
        "def bench_single(benchmark):\n"
        "    gpu.CLOCK.replay(benchmark, Timing([3.0, 1.0, 2.0], 1, 9.0, True))\n"
        "def bench_averaged(benchmark):\n"
        "    gpu.CLOCK.replay(benchmark, Timing([0.5, 0.25], 4, 9.0, True))\n"
    )
    monkeypatch.chdir(tmp_path)
    single, averaged = run_suites(["bench_replayed.py"]).tests
    assert single.samples == (3.0, 1.0, 2.0)
    assert single.calls == 1
    assert averaged.samples == (0.5, 0.25)
    assert averaged.calls == 4
