"""`mmopt kernels`: what fails a check and what does not, the committed baseline, the command."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmopt.cli.main import app
from mmopt.measure.kernels import gate
from mmopt.measure.kernels.baseline import (
    Baseline,
    Recorded,
    compare,
    read_baseline,
    write_baseline,
)
from mmopt.measure.kernels.rules import Problem, broken_rules
from mmopt_kernels import InputError, tuning
from mmopt_kernels.inspection import TARGETS, Failure, Inspection, KernelFigures
from mmopt_kernels.inspection.occupancy import occupancy

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "bench" / "baselines" / "kernels.json"
WHERE = Path("kernels.json")

FORWARD = KernelFigures(
    target="sm_90",
    name="attention/bf16-d128-causal/attention_forward",
    kernel="attention_forward",
    dtype="bf16",
    head_dim=128,
    config={"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    registers=200,
    spilled_bytes=0,
    shared_bytes=60_000,
    tensor_memory_columns=0,
    warps=8,
    dot_bits=16,
    matrix_instructions={"HGMMA": 30},
    code_bytes=35_840,
    occupancy=occupancy(TARGETS["sm_90"], registers=200, shared=60_000, warps=8),
    compile_seconds=2.5,
)


def kernel(**changes: Any) -> KernelFigures:
    return replace(FORWARD, **changes)


def inspection(*kernels: KernelFigures, **changes: Any) -> Inspection:
    targets = tuple(dict.fromkeys(one.target for one in kernels)) or ("sm_90",)
    return replace(Inspection("3.9.0", targets, kernels, ()), **changes)


def recorded(*kernels: KernelFigures, triton: str = "3.9.0") -> Baseline:
    by_target: dict[str, dict[str, Recorded]] = {}
    for one in kernels:
        by_target.setdefault(one.target, {})[one.name] = Recorded.of(one)
    return Baseline(triton, by_target)


def problems(before: KernelFigures, now: KernelFigures) -> list[Problem]:
    comparison = compare(recorded(before), inspection(now), WHERE)
    assert comparison.undecided is None
    return list(comparison.problems)


# --- the committed baseline -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed() -> str:
    """The version of Triton here; another than the baseline's compiles other code."""
    pytest.importorskip("triton", reason="compiles Triton kernels")
    version = importlib.metadata.version("triton")
    if version != read_baseline(BASELINE).triton:
        pytest.skip(f"the baseline is not of the Triton {version} that is installed here")
    return version


@pytest.mark.parametrize(
    "targets",
    # All take three minutes in a clean checkout: `.ci/run` runs `make kernels`.
    [("sm_90",), pytest.param(tuple(TARGETS), marks=pytest.mark.slow)],
    ids=["sm_90", "all"],
)
def test_the_committed_kernels_hold(installed: str, targets: tuple[str, ...]) -> None:
    """What `make kernels` checks. Figures are kept in build/ by all that they depend on, so that
    only changed kernels are compiled again."""
    report = gate.check_kernels(BASELINE, targets, kept=ROOT / "build" / "kernels")
    assert [str(problem) for problem in report.problems] == []
    assert report.exit_code == 0
    assert report.inspection.targets == targets
    assert report.comparison is not None
    assert report.comparison.stale == (), "run `make kernels-update`"


def test_what_a_table_says_of_its_static_tiles_is_what_is_recorded() -> None:
    """Of the cases that both have; what is recorded is compiled again, above."""
    baseline = read_baseline(BASELINE)
    held = 0
    for target, kernels in baseline.kernels.items():
        for entry in tuning.entries(target):
            why = re.fullmatch(r"triton (.+): (.+) \((.+)\)", entry.provenance.get("why", ""))
            known = kernels.get(f"attention/{why[3]}/{entry.kernel}") if why else None
            if why is None or known is None:
                continue
            assert entry.config is not None
            tile = {name: value for name, value in entry.config.items() if name != "SPLIT"}
            assert tile.items() <= known.config.items()
            spills = f"spills {known.spilled_bytes} bytes" if known.spilled_bytes else "no spill"
            shared = -(-known.shared_bytes // 1024)
            matrix = "+".join(sorted(known.matrix_instructions))
            assert why[1] == baseline.triton
            assert why[2] == f"{known.registers} registers, {spills}, {shared} KiB shared, {matrix}"
            held += 1
    assert held >= 10


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_recorded_for_every_target(target: str) -> None:
    """All that a launcher launches; what only kernels call is compiled within them."""
    recorded = read_baseline(BASELINE).kernels[target]
    built = {name.rpartition("/")[2] for name in recorded}
    written: set[str] = set()
    for path in (ROOT / "kernels" / "mmopt_kernels").glob("*/kernel*.py"):
        text = path.read_text()
        jit = r"^@triton\.jit(?:\(.*\))?\ndef (\w+)\("
        compiled = re.findall(jit, text, re.MULTILINE)
        launched = {name for name in compiled if re.search(rf"\b{name}\[.*\]\(", text)}
        assert launched, f"{path.name} launches nothing"
        written |= launched
    assert len(written) >= 16
    assert written <= built


# --- what fails, and what does not ----------------------------------------------------------------


def test_an_unchanged_kernel_has_no_problem() -> None:
    assert problems(kernel(), kernel()) == []
    assert broken_rules(inspection(kernel())) == []


@pytest.mark.parametrize(("before", "now", "fails"), [
    (0, 0, False), (0, 8, True), (8, 8, False), (8, 12, True), (12, 8, False),
])  # fmt: skip
def test_a_spill_that_appears_or_grows_fails(before: int, now: int, fails: bool) -> None:
    wide = kernel(head_dim=256)
    found = problems(replace(wide, spilled_bytes=before), replace(wide, spilled_bytes=now))
    assert [problem.rule for problem in found] == (["spill"] if fails else [])
    if fails:
        assert (found[0].value, found[0].recorded, found[0].limit) == (now, before, before)
        assert f"spills {now} bytes, {before} were recorded" in str(found[0])


@pytest.mark.parametrize(("before", "now", "fails"), [
    (200, 219, False), (200, 220, False), (200, 221, True), (200, 222, True), (200, 100, False),
    # A tenth of 35 is 3.5: 38 are within it, 39 are more.
    (35, 38, False), (35, 39, True),
])  # fmt: skip
def test_registers_may_grow_by_a_tenth(before: int, now: int, fails: bool) -> None:
    found = problems(kernel(registers=before), kernel(registers=now))
    assert [problem.rule for problem in found] == (["registers"] if fails else [])
    if fails:
        assert (found[0].value, found[0].recorded) == (now, before)
        assert found[0].limit is not None
        assert before <= found[0].limit < now


@pytest.mark.parametrize(("now", "fails"), [
    ({"HGMMA": 29}, False), ({"HGMMA": 60, "HMMA": 4}, False), ({"HMMA": 240}, True), ({}, True),
])  # fmt: skip
def test_matrix_instructions_that_vanish_fail(now: dict[str, int], fails: bool) -> None:
    """One kind in place of another as well: HMMA on Hopper is half as fast."""
    found = problems(kernel(), kernel(matrix_instructions=now))
    assert [problem.rule for problem in found] == (["matrix"] if fails else [])
    if fails:
        assert "HGMMA 30 was recorded" in str(found[0])


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_past_the_architectures_limit_fails_whatever_is_recorded(
    target: str,
) -> None:
    limit = TARGETS[target].shared_per_block
    fits = kernel(target=target, shared_bytes=limit, head_dim=None)
    over = replace(fits, shared_bytes=limit + 1)
    assert broken_rules(inspection(fits)) == []
    (problem,) = broken_rules(inspection(over))
    assert (problem.rule, problem.value, problem.limit) == ("shared", limit + 1, limit)
    assert compare(recorded(over), inspection(over), WHERE).problems == ()


def test_a_block_that_fits_no_multiprocessor_fails() -> None:
    none = occupancy(TARGETS["sm_90"], registers=255, shared=0, warps=16)
    assert none.blocks == 0
    (problem,) = broken_rules(inspection(kernel(registers=255, warps=16, occupancy=none)))
    assert problem.rule == "launches"
    assert "for want of registers" in str(problem)


@pytest.mark.parametrize(("changes", "rules"), [
    ({"spilled_bytes": 8}, ["spill"]),
    ({"spilled_bytes": 8, "dtype": "fp16", "head_dim": 64}, ["spill"]),
    ({"matrix_instructions": {"HMMA": 240}}, ["matrix"]),
    ({"matrix_instructions": {}, "spilled_bytes": 4}, ["spill", "matrix"]),
    # Without a matrix product there is nothing to show.
    ({"matrix_instructions": {}, "dot_bits": None}, []),
    ({"matrix_instructions": {}, "dot_bits": 32, "dtype": "fp32"}, []),
    # Outside of what was promised.
    ({"spilled_bytes": 8, "head_dim": 256}, []),
    ({"spilled_bytes": 8, "dtype": "fp32"}, []),
    ({"spilled_bytes": 8, "target": "sm_80"}, []),
    # A decode step has fewer rows than wgmma, and may no more spill than others.
    ({"matrix_instructions": {"HMMA": 32}, "kernel": "attention_decode"}, []),
    ({"spilled_bytes": 8, "kernel": "attention_decode"}, ["spill"]),
])  # fmt: skip
def test_hopper_kernels_up_to_128_neither_spill_nor_miss_wgmma(
    changes: dict[str, Any], rules: list[str]
) -> None:
    """Whatever is recorded: a baseline cannot bless it."""
    assert [one.rule for one in broken_rules(inspection(kernel(**changes)))] == rules


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("changes", [{}, {"kernel": "attention_decode"}, {"head_dim": None}])
def test_a_matrix_product_without_matrix_instructions_fails_on_every_target(
    target: str, changes: dict[str, Any]
) -> None:
    """Whatever is promised or recorded, and once: a compiler left out the loop, or the tile fits
    no matrix unit."""
    empty = kernel(**{"target": target, "head_dim": 256, "matrix_instructions": {}} | changes)
    report = report_of(recorded(empty), inspection(empty))
    (problem,) = report.problems
    assert (problem.rule, problem.value, problem.limit) == ("matrix", 0, 1)
    assert f"expected {' or '.join(TARGETS[target].matrix)}" in str(problem)
    for fine in ({"dot_bits": 32}, {"dot_bits": None}, {"matrix_instructions": {"HMMA": 1}}):
        assert broken_rules(inspection(replace(empty, **fine))) == []


def test_a_kernel_that_does_not_compile_fails_once_and_is_not_called_missing() -> None:
    reason = Failure("sm_90", FORWARD.name, "RuntimeError: PassManager::run failed")
    run = inspection(targets=("sm_90",), failures=(reason,))
    (problem,) = broken_rules(run)
    assert "does not compile: RuntimeError: PassManager::run failed" in str(problem)
    assert compare(recorded(FORWARD), run, WHERE).problems == ()
    # A case whose launcher failed stands for all of its kernels.
    case = Failure("sm_90", "attention/bf16-d128-causal", "TypeError: launch()")
    run = inspection(targets=("sm_90",), failures=(case,))
    assert compare(recorded(FORWARD), run, WHERE).problems == ()


def test_kernels_that_are_gone_or_not_recorded_fail_and_say_what_to_do() -> None:
    other = kernel(name="attention/bf16-d64-causal/attention_forward", head_dim=64)
    comparison = compare(recorded(FORWARD), inspection(other), WHERE)
    assert [problem.rule for problem in comparison.problems] == ["missing", "new"]
    for problem in comparison.problems:
        assert "--update kernels.json" in str(problem)


def test_targets_that_were_not_asked_for_are_not_missing() -> None:
    ampere = kernel(target="sm_80", matrix_instructions={"HMMA": 192})
    comparison = compare(recorded(FORWARD, ampere), inspection(FORWARD), WHERE)
    assert comparison.problems == ()


def test_code_size_alone_does_not_make_a_record_stale() -> None:
    """The assembler does not give the same kernel the same size every time."""
    larger = replace(FORWARD, code_bytes=FORWARD.code_bytes + 256)
    assert compare(recorded(FORWARD), inspection(larger), WHERE).stale == ()


def test_what_differs_without_being_worse_is_named_as_stale() -> None:
    better = kernel(registers=180, config={**FORWARD.config, "num_stages": 2})
    comparison = compare(recorded(FORWARD), inspection(better), WHERE)
    assert comparison.problems == ()
    assert comparison.stale == (f"sm_90 {FORWARD.name}",)
    # Seconds belong to the machine.
    slower = kernel(compile_seconds=60.0)
    assert compare(recorded(FORWARD), inspection(slower), WHERE).stale == ()


def test_another_triton_leaves_figures_undecided_and_the_rest_decided() -> None:
    before = recorded(FORWARD, triton="3.6.0")
    worse = kernel(registers=255, spilled_bytes=0)
    report = report_of(before, inspection(worse))
    assert report.exit_code == 3
    assert report.verdict == "INCONCLUSIVE"
    assert "recorded with Triton 3.6.0, here is 3.9.0" in report.notes[0]
    # Rules that need no record, and which kernels there are, hold or not all the same.
    assert report_of(before, inspection(kernel(shared_bytes=240_000))).exit_code == 1
    assert report_of(before, inspection(targets=("sm_90",))).exit_code == 1


def test_a_spill_that_breaks_a_rule_and_is_new_is_told_once() -> None:
    report = report_of(recorded(FORWARD), inspection(kernel(spilled_bytes=8)))
    assert [problem.rule for problem in report.problems] == ["spill"]
    assert report.exit_code == 1


def report_of(before: Baseline, run: Inspection) -> gate.KernelsReport:
    comparison = compare(before, run, WHERE)
    return gate.KernelsReport(run, tuple(broken_rules(run)), WHERE, comparison)


# --- the file -------------------------------------------------------------------------------------


def test_a_baseline_reads_back_as_it_was_written_one_line_a_kernel(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    other = kernel(target="gfx942", matrix_instructions={"MFMA": 288}, registers=309)
    written = recorded(FORWARD, kernel(name="attention/bf16-d64-causal/x"), other)
    write_baseline(path, written)
    assert read_baseline(path) == written
    lines = path.read_text().splitlines()
    assert sum('"registers"' in line for line in lines) == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("text", "message"), [
    ("{broken", "cannot be read as JSON"),
    ("[" * 100_000, "cannot be read as JSON"),
    ("[]", "has schema None, expected 1"),
    ('{"schema": 2}', "has schema 2, expected 1"),
    ('{"schema": 1, "triton": 3, "targets": {}}', "has no Triton version or no targets"),
    ('{"schema": 1, "triton": "3.9.0", "targets": {"sm_90": []}}', "sm_90 is []"),
    ('{"schema": 1, "triton": "3.9.0", "targets": {"sm_90": {"a/b/c": {}}}}',
     "sm_90 a/b/c has registers None"),
    ('{"schema": 1, "triton": "3.9.0", "targets": {"sm_90": {"a/b/c": {"registers": 1, '
     '"spilled_bytes": 0, "shared_bytes": 0, "code_bytes": 1, "matrix_instructions": ["HGMMA"], '
     '"config": {}}}}}', "has matrix_instructions ['HGMMA']"),
])  # fmt: skip
def test_a_corrupt_baseline_is_one_message(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_baseline(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of minutes of compiling: what it would find, and what it was asked."""
    asked: list[Any] = []

    def inspect(targets: Any, *, emit: Path | None, **options: Any) -> Inspection:
        asked.append({"targets": [one.name for one in targets], **options})
        if emit is not None:
            (emit / "made").write_text("here")
        kernels = [replace(found[0], target=one.name) for one in targets]
        return replace(inspection(*kernels), failures=tuple(failures))

    found, failures = [kernel()], []
    asked += [found, failures]
    monkeypatch.setattr(gate, "inspect", inspect)
    return asked


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["kernels", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_targets_are_all_by_default_and_each_once(compiled: list[Any]) -> None:
    assert run()[0] == 0
    assert compiled[-1]["targets"] == list(TARGETS)
    assert run("--target", "gfx942", "--target", "sm_90", "--target", "sm_90")[0] == 0
    assert compiled[-1]["targets"] == ["sm_90", "gfx942"]
    assert compiled[-1]["jobs"] in (1, 2)
    assert run("--jobs", "5")[0] == 0
    assert compiled[-1]["jobs"] == 5


def test_one_json_document_has_every_figure(compiled: list[Any]) -> None:
    code, out, _ = run("--target", "sm_90", "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 0
    assert document["verdict"] == "PASSED"
    assert document["triton"] == "3.9.0"
    (entry,) = document["kernels"]
    assert entry["registers"] == 200
    assert entry["matrix_instructions"] == {"HGMMA": 30}
    assert entry["occupancy"]["share"] == 0.125
    assert entry["compile_seconds"] == 2.5


def test_the_table_fits_80_columns(compiled: list[Any]) -> None:
    compiled[0][0] = kernel(
        name="attention/bf16-d128-everything/attention_backward_dkdv",
        registers=255, spilled_bytes=2552, shared_bytes=232_448, code_bytes=169_856,
        matrix_instructions={"UTCHMMA": 294}, compile_seconds=11.4, head_dim=256,
    )  # fmt: skip
    code, out, _ = run("--target", "sm_100")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    row = next(line for line in out.splitlines() if "backward_dkdv" in line)
    assert row.split() == [
        "backward_dkdv", "255", "2552", "227.0", "12%", "UTCHMMA", "294", "166", "11.4",
    ]  # fmt: skip


def test_the_table_takes_a_case_whose_name_has_parts(compiled: list[Any]) -> None:
    compiled[0][0] = kernel(name="attention/one_pass/bf16-d64-causal/attention_backward_dkdv")
    code, out, _ = run("--target", "sm_100")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert "attention/one_pass/bf16-d64-causal" in "".join(lines)  # folded
    assert any(line.startswith("backward_dkdv ") for line in lines)


def test_update_then_check_holds_and_a_spill_then_fails(
    compiled: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "kernels.json"
    assert run("--update", str(path))[0] == 0
    assert run("--check", str(path))[0] == 0
    compiled[0][0] = kernel(spilled_bytes=8, head_dim=256)
    code, out, _ = run("--check", str(path), "--target", "sm_80", "--json")
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert (problem["rule"], problem["value"], problem["recorded"]) == ("spill", 8, 0)
    # One target recorded again, the others as they were.
    assert run("--update", str(path), "--target", "sm_80")[0] == 0
    assert run("--check", str(path), "--target", "sm_80")[0] == 0
    assert run("--check", str(path))[0] == 1


def test_update_records_nothing_where_a_kernel_does_not_compile(
    compiled: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "kernels.json"
    compiled[1].append(Failure("sm_90", FORWARD.name, "no"))
    assert run("--update", str(path))[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_one_target_cannot_be_recorded_with_another_triton(
    compiled: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "kernels.json"
    write_baseline(path, recorded(kernel(target="sm_80"), triton="3.6.0"))
    before = path.read_bytes()
    code, _, err = run("--update", str(path), "--target", "sm_90")
    assert code == 2
    assert "leave --target out" in err
    assert path.read_bytes() == before
    assert run("--update", str(path))[0] == 0
    assert read_baseline(path).triton == "3.9.0"


def test_emitted_kernels_appear_whole(compiled: list[Any], tmp_path: Path) -> None:
    code, out, _ = run("--emit", str(tmp_path / "out"), "--json")
    assert code == 0
    assert json.loads(out)["emitted"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "made").read_text() == "here"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--target", "sm_75"], "--target sm_75 is not known, expected one of: sm_80, sm_90"),
    (["--check", "a", "--update", "b"], "expected one of them"),
    (["--all", "--check", "a"], "Leave --all out"),
    (["--check", "{tmp}/none.json"], "none.json does not exist"),
    (["--update", "{tmp}/none/kernels.json"], "expected a file in a folder that exists"),
    (["--emit", "{tmp}/full"], "a folder that is not empty"),
    (["--emit", "{tmp}/full/file/out"], "lies below the file"),
    (["--emit", "/proc/none/out"], "cannot be written"),
    (["--update", "/proc/kernels.json"], "cannot be written"),
    (["--update", "{tmp}/full"], "expected a file in a folder that exists"),
])  # fmt: skip
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, compiled: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something")
    asked = len(compiled)
    code, _, err = run(*(one.format(tmp=tmp_path) for one in arguments))
    assert code == 2
    assert message in err
    assert err.count("error:") == 1
    assert len(compiled) == asked  # before anything is compiled
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_without_triton_it_cannot_run() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "sys.argv = ['mmopt', 'kernels', '--json']\n"
        "from mmopt.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "triton is not installed" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr
