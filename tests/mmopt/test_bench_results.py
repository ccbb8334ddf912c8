"""`mmopt.measure.results`: the table, the JSON and what stands below."""

import dataclasses
import json

import pytest
from rich.console import Console

from mmopt.measure.fingerprint import fingerprint
from mmopt.measure.memory import PeakMemory
from mmopt.measure.results import BenchReport, Measurement
from mmopt.measure.throttling import Conditions

CONDITIONS = Conditions(
    seconds=3.0,
    steal_share=0.0,
    others_share=0.0,
    throttled_periods=0,
    throttled_seconds=0.0,
    cpu_clock=None,
    core_throttles=None,
    package_throttles=None,
    gpus=None,
)


def _measurement(samples: int, **fields: object) -> Measurement:
    values = tuple(0.010 + 1e-6 * index for index in range(samples))
    return Measurement("model", "eager", 4, 16, values, **fields)  # type: ignore[arg-type]


def _report(*measurements: Measurement, **fields: object) -> BenchReport:
    return BenchReport(
        measurements=measurements,
        fingerprint=fingerprint(),
        adapter=None,
        seed=0,
        created="2026-11-24T12:00:00+00:00",
        **fields,  # type: ignore[arg-type]
    )


def _rendered(report: BenchReport) -> str:
    console = Console(width=400)
    with console.capture() as capture:
        console.print(report.render())
    return capture.get()


@pytest.mark.parametrize(
    ("samples", "p95", "p99"), [(129, False, False), (130, True, False), (662, True, True)]
)
def test_a_percentile_is_shown_from_as_many_samples_as_it_needs(
    samples: int, p95: bool, p99: bool
) -> None:
    """130 and 662 are the early-stopping counts of MLPerf at 95% confidence."""
    shown = _rendered(_report(_measurement(samples)))
    assert (" p95 " in shown, " p99 " in shown) == (p95, p99)
    assert ("No p95: it needs 130 samples" in shown) is not p95
    assert ("No p99: it needs 662 samples" in shown) is (p95 and not p99)
    document = _report(_measurement(samples)).to_dict()["measurements"][0]
    assert (document["p95_seconds"] is not None) is p95
    assert (document["p99_seconds"] is not None) is p99


def test_means_over_several_calls_make_no_percentile() -> None:
    measurement = _measurement(1000, calls=2)
    assert (measurement.p95, measurement.p99) == (None, None)
    shown = _rendered(_report(measurement))
    assert "No p95: calls this short are timed several at a time" in shown
    assert "--rounds" not in shown  # more of them would not help


def test_p99_lies_above_p95_among_the_samples() -> None:
    measurement = _measurement(700)
    assert measurement.p95 is not None
    assert measurement.p99 is not None
    assert measurement.median < measurement.p95 < measurement.p99 <= max(measurement.samples)


def test_instructions_have_a_column_only_where_they_were_counted() -> None:
    assert "instructions" not in _rendered(_report(_measurement(5)))
    counted = _rendered(_report(_measurement(5, instructions=123_456_789), _measurement(5)))
    assert "instructions" in counted
    assert "123.5 M" in counted


def test_doubts_about_the_machine_stand_below_the_table_and_in_the_document() -> None:
    stolen = dataclasses.replace(CONDITIONS, steal_share=0.031)
    report = _report(_measurement(5), conditions=stolen)
    assert "While it ran, the hypervisor took 3.1% of the CPU time (steal)." in _rendered(report)
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))["conditions"]
    assert written["steal_share"] == 0.031
    assert written["warnings"] == ["the hypervisor took 3.1% of the CPU time (steal)"]
    assert "While it ran" not in _rendered(_report(_measurement(5), conditions=CONDITIONS))


def test_a_timer_other_than_the_wall_clock_is_explained() -> None:
    report = _report(_measurement(5, timer="kernel-only"), device="cuda")
    assert "Timer: kernel-only, the durations of the kernels" in _rendered(report)
    document = report.to_dict()
    assert (document["device"], document["timer"]) == ("cuda", "kernel-only")
    assert document["measurements"][0]["timer"] == "kernel-only"
    assert "Timer:" not in _rendered(_report(_measurement(5)))


def test_peak_memory_is_named_for_what_it_is_on_each_device() -> None:
    peak = PeakMemory(500_000_000, 300_000_000, 70_000_000, 80_000_000)
    on_cpu = _rendered(_report(_measurement(5, memory=peak)))
    assert "500 MB" in on_cpu
    assert "Peak memory: VmHWM of a fresh process" in on_cpu
    on_gpu = _rendered(_report(_measurement(5, memory=peak), device="cuda"))
    assert "80 MB" in on_gpu
    assert "Peak memory: what torch had reserved on the GPU" in on_gpu
    assert "No GPU" not in on_gpu


def test_every_memory_figure_is_in_the_document() -> None:
    document = _report(_measurement(5, memory=PeakMemory(1, 2, 3, 4, 5, 6, 7, 8))).to_dict()
    assert document["measurements"][0]["memory"] == {
        "process_bytes": 1,
        "process_before_bytes": 2,
        "torch_allocated_bytes": 3,
        "torch_reserved_bytes": 4,
        "device_bytes": 5,
        "tensor_bytes": 6,
        "ort_arena_bytes": 7,
        "ort_in_use_bytes": 8,
    }
