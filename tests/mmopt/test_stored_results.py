"""Results read back from disk: each kind, and what is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench_results import CONDITIONS, MACHINE, SELF_TEST, bench_run, contest, gate, save, suite
from mmopt.measure import results, stored
from mmopt.measure.gate import report as gate_report
from mmopt.measure.results import BenchReport, Measurement
from mmopt.measure.stored import read_result, read_results
from mmopt.measure.suites import plugin
from mmopt_kernels.errors import InputError


def test_bench_run_results_keep_samples_memory_and_conditions(tmp_path: Path) -> None:
    document = bench_run(batches=(1, 8))
    found = read_result(save(tmp_path / "run.json", document))
    assert found.kind == "mmopt bench run"
    assert found.created == document["created"]
    assert found.fingerprint == MACHINE
    assert found.warnings == tuple(CONDITIONS["warnings"])
    assert len(found.series) == 8
    last = found.series[-1]
    assert last.name == "ort of models/tiny-onnx, batch 8, 16 tokens"
    assert last.group == "batch 8, 16 tokens"
    assert list(last.samples) == document["measurements"][-1]["samples_seconds"]
    assert (last.backend, last.batch, last.length, last.calls) == ("ort", 8, 16, 1)
    assert last.peak_bytes == 400_000_000
    assert last.memory == {"process_bytes": 400_000_000}  # not the base that it grew from
    assert last.throughput == 8 / last.median
    assert last.interval.low <= last.median <= last.interval.high
    assert last.percentile(95) is None  # 30 samples do not make one
    assert found.series[0].memory == {}


def test_what_bench_run_writes_today_is_read(tmp_path: Path) -> None:
    """Not a document made by hand: the writer's own."""
    from mmopt.measure.fingerprint import fingerprint

    measurement = Measurement("models/tiny", "eager", 2, 8, (1e-3, 1.1e-3, 1.2e-3))
    report = BenchReport(
        measurements=(measurement,),
        fingerprint=fingerprint(),
        adapter=None,
        seed=0,
        created="2026-11-24T12:00:00+00:00",
    )
    found = read_result(save(tmp_path / "run.json", report.to_dict()))
    assert found.series[0].samples == measurement.samples
    assert found.series[0].median == measurement.median
    assert found.fingerprint == report.to_dict()["fingerprint"]


def test_schema_versions_are_those_that_are_written() -> None:
    assert stored.BENCH_RUN_SCHEMA == results.SCHEMA_VERSION
    assert stored.SUITE_SCHEMA == plugin.RESULT_SCHEMA_VERSION
    assert stored.GATE_SCHEMA == gate_report.SCHEMA_VERSION


def test_another_timer_or_adapter_makes_another_benchmark(tmp_path: Path) -> None:
    document = bench_run(batches=(1,))
    usual = {one.name for one in read_result(save(tmp_path / "a.json", document)).series}
    document["adapter"] = "adapters/lora"
    for entry in document["measurements"]:
        entry["timer"] = "kernel-only"
    other = {one.name for one in read_result(save(tmp_path / "b.json", document)).series}
    assert not usual & other
    assert "eager of models/tiny with adapters/lora, batch 1, 16 tokens, kernel-only" in other
    assert "ort of models/tiny-onnx, batch 1, 16 tokens, kernel-only" in other


def test_files_from_before_timers_are_read_as_wall_clock(tmp_path: Path) -> None:
    document = bench_run(batches=(1,))
    new = read_result(save(tmp_path / "new.json", document))
    for entry in document["measurements"]:
        del entry["timer"], entry["instructions_per_call"]
    del document["conditions"], document["device"], document["timer"]
    old = read_result(save(tmp_path / "old.json", document))
    assert [one.name for one in old.series] == [one.name for one in new.series]
    assert old.conditions is None


def test_suites_keep_groups_figures_and_extra_info(tmp_path: Path) -> None:
    document = suite()
    extra = {"batch": 4, "length": 128, "peak_bytes": 12345, "other": [1]}
    document["benchmarks"][0]["extra_info"] = extra
    found = read_result(save(tmp_path / "suite.json", document))
    assert found.kind == "pytest-benchmark"
    assert found.fingerprint == MACHINE
    assert found.commit == "0123456789abcdef0123"
    first = found.series[0]
    assert first.name == "bench/bench_op.py::bench_forward[mmopt]"
    assert first.group == "bench_forward"
    assert (first.batch, first.length, first.peak_bytes) == (4, 128, 12345)
    assert found.figures["bench/bench_op.py::exact_op::bytes"]["value"] == 2048


def test_plain_pytest_benchmark_results_have_no_fingerprint(tmp_path: Path) -> None:
    found = read_result(save(tmp_path / "suite.json", suite(ours=False)))
    assert found.fingerprint is None
    assert found.figures == {}
    assert len(found.series) == 3


def test_batches_of_one_test_are_one_variant(tmp_path: Path) -> None:
    document = suite(names=("bench_f[1-a]", "bench_f[8-a]", "bench_f[8-b]"))
    for entry, (batch, kind) in zip(
        document["benchmarks"], ((1, "a"), (8, "a"), (8, "b")), strict=True
    ):
        entry["params"] = {"batch": batch, "kind": kind}
        entry["extra_info"] = {"batch": batch}
    one, two, other = read_result(save(tmp_path / "suite.json", document)).series
    assert one.variant == two.variant != other.variant


def test_a_gate_keeps_its_report_and_has_no_series(tmp_path: Path) -> None:
    document = gate(self_test=SELF_TEST)
    found = read_result(save(tmp_path / "gate.json", document))
    assert found.kind == "gate"
    assert found.gate == document
    assert found.series == ()
    assert found.commit == "b" * 40


def test_times_without_a_zone_are_utc(tmp_path: Path) -> None:
    found = read_result(save(tmp_path / "a.json", suite(created="2026-11-24T12:00:00")))
    assert found.when.isoformat() == "2026-11-24T12:00:00+00:00"


def test_texts_become_printable_whatever_they_hold(tmp_path: Path) -> None:
    document = suite(names=("bench_x[\x1b[31m\ud800\u202e日本]",))
    (one,) = read_result(save(tmp_path / "a.json", document)).series
    assert one.name == "bench/bench_op.py::bench_x[\ufffd[31m\ufffd\ufffd日本]"


def test_reading_imports_no_torch() -> None:
    code = "import sys, mmopt.measure.stored; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b'{"schema": 1, "measurem', "is no whole JSON document"),
        (b"[1, 2]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b"{}", "of no known kind (its keys: none)"),
        (b'{"name": "package", "version": "1"}', "its keys: name, version"),
        (b'{"kind": "exact", "figures": []}', "of the kind 'exact'"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 100_000, "is no whole JSON document"),
    ],
)
def test_what_is_no_result_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_result(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = json.dumps(bench_run(batches=(1,)))
    for length in range(1, len(whole), len(whole) // 40):
        path = tmp_path / "cut.json"
        path.write_text(whole[:length])
        with pytest.raises(InputError, match="is no whole JSON document"):
            read_result(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no.json does not exist, expected a result"):
        read_result(tmp_path / "no.json")
    with pytest.raises(InputError, match="is a folder"):
        read_result(tmp_path)


def _spoil(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with `value` at a path such as `measurements.0.batch`; `...` removes what is there."""
    copied = copy.deepcopy(document)
    *way, last = path.split(".")
    at: Any = copied
    for key in way:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is ...:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return copied


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema", 2, "schema is 2, expected 1"),
        ("schema", True, "schema is True, expected 1"),
        ("schema", ..., "schema is None, expected 1"),
        ("created", "yesterday", "created is 'yesterday', expected a date in ISO 8601"),
        ("created", None, "created is None"),
        ("fingerprint", None, "fingerprint is None, expected an object"),
        ("measurements", [], "holds no benchmark"),
        ("measurements", {}, "measurements is {}, expected a list"),
        ("measurements.0", 7, "measurements[0] is 7, expected an object"),
        ("measurements.1.samples_seconds", [], "measurements[1].samples_seconds is []"),
        ("measurements.1.samples_seconds", ..., "samples_seconds is None"),
        ("measurements.1.samples_seconds.2", -1e-3, "samples_seconds[2] is -0.001, expected sec"),
        ("measurements.1.samples_seconds.2", 0, "samples_seconds[2] is 0, expected seconds above"),
        ("measurements.1.samples_seconds.2", float("nan"), "is nan, expected a finite number"),
        ("measurements.1.samples_seconds.2", float("inf"), "is inf, expected a finite number"),
        ("measurements.1.samples_seconds.2", 1e300, "is 1e+300, expected seconds above 0"),
        ("measurements.1.samples_seconds.2", 10**400, "expected a finite number"),
        ("measurements.1.samples_seconds.2", "1", "is '1', expected a finite number"),
        ("measurements.1.samples_seconds.2", True, "is True, expected a finite number"),
        ("measurements.0.batch", 0, "measurements[0].batch is 0, expected a whole number above 0"),
        ("measurements.0.batch", 1.5, "measurements[0].batch is 1.5, expected a whole number"),
        ("measurements.0.source", "", "measurements[0].source is '', expected a text"),
        ("measurements.0.backend", "compile", "is in it 2 times, expected each benchmark once"),
        ("measurements.0.memory", 5, "measurements[0].memory is 5, expected an object"),
        ("measurements.0.memory", {"process_bytes": -1}, "process_bytes is -1, expected bytes"),
        ("conditions", {"warnings": "hot"}, "conditions.warnings is 'hot', expected a list"),
    ],
)
def test_a_fault_in_a_run_is_named_with_its_place(
    path: str, value: object, said: str, tmp_path: Path
) -> None:
    spoiled = save(tmp_path / "run.json", _spoil(bench_run(batches=(1,)), path, value))
    with pytest.raises(InputError) as caught:
        read_result(spoiled)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{spoiled}: ")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("benchmarks", [], "holds no benchmark"),
        ("benchmarks.0.stats.data", ..., "--benchmark-save-data"),
        ("benchmarks.0.stats.data.0", float("nan"), "benchmarks[0].stats.data[0] is nan"),
        ("benchmarks.0.stats", None, "benchmarks[0].stats is None, expected an object"),
        ("benchmarks.0.fullname", 3, "benchmarks[0].fullname is 3, expected a text"),
        ("benchmarks.0.extra_info", {"batch": 0}, "extra_info.batch is 0, expected a whole"),
        ("datetime", ..., "datetime is None"),
        ("mmopt", "0.1.0", "mmopt is '0.1.0', expected an object"),
        ("mmopt.schema", 9, "mmopt.schema is 9, expected 1"),
        ("mmopt.figures", None, "mmopt.figures is None, expected an object"),
        ("mmopt.figures", {"x": {"value": 1.5}}, "'x' has the value 1.5, expected a whole number"),
        ("mmopt.fingerprint", ..., "fingerprint is None, expected an object"),
    ],
)
def test_a_fault_in_a_suite_is_named_with_its_place(
    path: str, value: object, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        read_result(save(tmp_path / "suite.json", _spoil(suite(), path, value)))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema", 2, "schema is 2, expected 1"),
        ("benchmarks.0.verdict", "GOOD", "benchmarks[0].verdict is 'GOOD', expected one of"),
        ("benchmarks.0.verdict", [], "benchmarks[0].verdict is [], expected one of"),
        ("benchmarks.0.interval", [0.1], "benchmarks[0].interval is [0.1], expected two numbers"),
        ("benchmarks.0.interval", [0.2, 0.1], "expected the lower end first"),
        ("benchmarks.0.slowdown", float("nan"), "benchmarks[0].slowdown is nan"),
        ("benchmarks.0.name", None, "benchmarks[0].name is None, expected a text"),
        ("figures.0.head", 1.5, "figures[0].head is 1.5, expected a whole number"),
        ("base", ..., "base is None, expected an object"),
        ("notes", [1], "notes[0] is 1, expected a text"),
        ("self_test", {"trials": 3}, "self_test.false_alarms is None, expected a whole number"),
        ("verdict", "PASSED", "the verdict is PASSED, but its benchmarks and figures make it REGR"),
    ],
)
def test_a_fault_in_a_gate_is_named_with_its_place(
    path: str, value: object, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        read_result(save(tmp_path / "gate.json", _spoil(gate(), path, value)))
    assert said in str(caught.value)


def test_a_gate_that_compared_nothing_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the gate compared nothing"):
        read_result(save(tmp_path / "g.json", gate("PASSED", benchmarks=[], figures=[])))


def test_a_verdict_that_only_new_benchmarks_carry_is_not_passed(tmp_path: Path) -> None:
    new = [contest("b.py::bench_new", "NEW", None)]
    with pytest.raises(InputError, match="make it INCONCLUSIVE"):
        read_result(save(tmp_path / "g.json", gate("PASSED", benchmarks=new, figures=[])))


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", suite())
    link = tmp_path / "b.json"
    link.symlink_to(path)
    with pytest.raises(InputError, match=r"a\.json was given twice, expected each file once"):
        read_results([path, path])
    with pytest.raises(InputError, match=r"b\.json was given twice, as .*a\.json too"):
        read_results([path, link])
    with pytest.raises(InputError, match="No result was given"):
        read_results([])
