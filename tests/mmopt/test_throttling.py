"""`mmopt.measure.throttling`: what the machine did while something was measured."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fake_nvml import FakeGpu, FakeNvml
from mmopt.measure import throttling
from mmopt.measure.throttling import Clock, Conditions, GpuConditions, watch_conditions

QUIET = Conditions(
    seconds=10.0,
    steal_share=0.0,
    others_share=0.0,
    throttled_periods=0,
    throttled_seconds=0.0,
    cpu_clock=Clock(begin=1000.0, end=3000.0, lowest=2950.0, highest=3000.0),
    core_throttles=0,
    package_throttles=0,
    gpus=(GpuConditions("GPU-a", Clock(210, 1980, 1980, 1980), ("idle", "sync boost")),),
)


class Machine:
    """Files that a test changes while a watch is under way."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpus = folder / "cpu"
        self.stat = folder / "stat"
        self.group = folder / "group"
        self.group.mkdir()
        monkeypatch.setattr(throttling, "CPUS", self.cpus)
        monkeypatch.setattr(throttling, "_STAT", self.stat)
        monkeypatch.setattr(throttling, "core_numbers", lambda: [0, 1])
        monkeypatch.setattr(throttling, "cpu_cgroups", lambda: [(2, self.group)])
        self.set_stat((100, 0), (100, 0))

    def set_stat(self, *busy_and_stolen: tuple[int, int]) -> None:
        cores = [
            f"cpu{core} {busy} 0 0 900 7 0 0 {stolen} 0 0"
            for core, (busy, stolen) in enumerate((*busy_and_stolen, (5000, 5000)))
        ]
        self.stat.write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *cores, "intr 1 2"]))

    def set_throttled(self, periods: int, microseconds: int) -> None:
        text = f"usage_usec 7\nnr_throttled {periods}\nthrottled_usec {microseconds}\n"
        (self.group / "cpu.stat").write_text(text)

    def set_core(self, core: int, name: str, value: int) -> None:
        path = self.cpus / f"cpu{core}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two cores of a machine of three, without anything that can be read but /proc/stat."""
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """One GPU."""
    library = FakeNvml([FakeGpu("GPU-a")])
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def test_this_machine_can_be_watched_and_the_record_is_json() -> None:
    with watch_conditions() as watch:
        so_far = watch.to_dict()
        time.sleep(0.01)
    whole = watch.to_dict()
    assert 0 <= so_far["seconds"] < whole["seconds"]
    assert whole["seconds"] >= 0.01
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert watch.to_dict() == whole  # it does not go on after the block
    assert all(isinstance(warning, str) for warning in whole["warnings"])


def test_stolen_time_is_a_share_of_what_these_cores_wanted(machine: Machine) -> None:
    with watch_conditions() as watch:
        machine.set_stat((160, 3), (130, 7))
    assert watch.conditions.steal_share == 10 / (60 + 30 + 10)
    assert "the hypervisor took 10.0% of the CPU time (steal)" in watch.conditions.warnings


def test_time_of_other_processes_is_what_is_busy_and_not_ours(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 10 s on two cores: busy 8 s, 2 s of it ours, so 6 of 20 core seconds are not."""
    clock = iter((0.0, 10.0))
    own = iter((1.0, 3.0))
    tick = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(throttling, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(throttling, "_own_seconds", lambda: next(own))
    with watch_conditions() as watch:
        machine.set_stat((100 + 5 * tick, 0), (100 + 3 * tick, 0))
    assert watch.conditions.others_share == pytest.approx(0.3)
    assert "other processes had 30% of the cores' time" in watch.conditions.warnings


def test_a_watch_too_short_for_ticks_says_nothing_of_others(machine: Machine) -> None:
    with watch_conditions() as watch:
        machine.set_stat((110, 0), (100, 0))
    assert watch.conditions.others_share is None


def test_a_used_up_quota_is_counted_from_the_beginning_of_the_watch(machine: Machine) -> None:
    machine.set_throttled(periods=5, microseconds=1_000_000)
    with watch_conditions() as watch:
        machine.set_throttled(periods=9, microseconds=3_500_000)
    assert watch.conditions.throttled_periods == 4
    assert watch.conditions.throttled_seconds == 2.5
    (warning,) = watch.conditions.warnings
    assert "used up in 4 periods, 2.50 s" in warning


def test_version_1_of_control_groups_counts_in_nanoseconds(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttling, "cpu_cgroups", lambda: [(1, machine.group)])
    stat = machine.group / "cpu.stat"
    stat.write_text("nr_periods 9\nnr_throttled 1\nthrottled_time 1000000000\n")
    with watch_conditions() as watch:
        stat.write_text("nr_periods 9\nnr_throttled 2\nthrottled_time 1250000000\n")
    assert watch.conditions.throttled_periods == 1
    assert watch.conditions.throttled_seconds == pytest.approx(0.25)


def test_heat_is_counted_over_cores_and_once_per_package(machine: Machine) -> None:
    for core in (0, 1, 2):
        machine.set_core(core, "thermal_throttle/core_throttle_count", 10)
        machine.set_core(core, "thermal_throttle/package_throttle_count", 10)
    with watch_conditions() as watch:
        for core in (0, 1, 2):
            machine.set_core(core, "thermal_throttle/core_throttle_count", 11)
            machine.set_core(core, "thermal_throttle/package_throttle_count", 13)
    # The third core is not ours; the two others share a package.
    assert watch.conditions.core_throttles == 2
    assert watch.conditions.package_throttles == 3
    assert watch.conditions.warnings == ["the CPU got too hot and slowed itself down 5 times"]


def test_clocks_are_sampled_while_the_watch_is_under_way(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttling, "SAMPLE_SECONDS", 0.005)
    machine.set_core(0, "cpufreq/scaling_cur_freq", 800_000)
    machine.set_core(1, "cpufreq/scaling_cur_freq", 900_000)
    with watch_conditions() as watch:
        for khz in (3_000_000, 2_000_000):
            machine.set_core(1, "cpufreq/scaling_cur_freq", khz)
            _wait_for(lambda khz=khz: khz / 1000 in watch._cpu_mhz)
        machine.set_core(1, "cpufreq/scaling_cur_freq", 1_000_000)
    clock = watch.conditions.cpu_clock
    assert clock is not None
    assert (clock.begin, clock.end, clock.highest) == (900.0, 1000.0, 3000.0)
    assert clock.moved
    assert any("the CPU's clock moved between" in said for said in watch.conditions.warnings)


def test_nothing_runs_beside_the_measurement_where_no_clock_can_be_read(machine: Machine) -> None:
    with watch_conditions() as watch:
        assert watch._thread is None
    assert watch.conditions.cpu_clock is None
    assert watch.conditions.gpus is None


def test_what_cannot_be_read_is_none_and_no_reason_to_warn(machine: Machine) -> None:
    machine.stat.unlink()
    with watch_conditions() as watch:
        pass
    record = watch.to_dict()
    assert record.pop("seconds") > 0
    assert record.pop("warnings") == []
    assert set(record.values()) == {None}


def test_a_gpu_that_was_slowed_down_is_named_with_the_reasons(
    machine: Machine, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttling, "SAMPLE_SECONDS", 0.005)
    gpu = nvml.gpus[0]
    gpu.sm_mhz, gpu.reasons = 210, 0x001
    with watch_conditions() as watch:
        _wait_for(lambda: "idle" in watch._reasons["GPU-a"])
        for mhz, reasons in ((1980, 0x010), (1200, 0x004 | 0x020)):
            gpu.sm_mhz, gpu.reasons = mhz, reasons
            _wait_for(lambda mhz=mhz: mhz in watch._gpu_mhz["GPU-a"])
        gpu.reasons, gpu.sm_mhz = 0x001, 210
    assert nvml.opened == 0
    (seen,) = watch.conditions.gpus or ()
    assert seen.event_reasons == ("idle", "power cap", "sync boost", "thermal slowdown (software)")
    # The clock of an idle GPU is low, and no reason for anything.
    assert seen.sm_clock == Clock(begin=210, end=210, lowest=1200, highest=1980)
    assert watch.conditions.warnings == [
        "GPU GPU-a was slowed down: power cap, thermal slowdown (software)",
        "the clock of GPU GPU-a moved between 1200 and 1980 MHz",
    ]


def test_a_gpu_that_tells_nothing_is_listed_with_none(machine: Machine, nvml: FakeNvml) -> None:
    gpu = nvml.gpus[0]
    gpu.sm_mhz = gpu.reasons = None
    with watch_conditions() as watch:
        pass
    assert watch.conditions.gpus == (GpuConditions("GPU-a", sm_clock=None, event_reasons=None),)


def test_a_library_without_a_driver_is_no_gpu(machine: Machine, nvml: FakeNvml) -> None:
    nvml.driver = False
    with watch_conditions() as watch:
        pass
    assert watch.conditions.gpus is None


def test_the_watch_ends_when_the_block_fails(machine: Machine, nvml: FakeNvml) -> None:
    with pytest.raises(ZeroDivisionError), watch_conditions() as watch:
        raise ZeroDivisionError
    assert watch._thread is not None
    assert not watch._thread.is_alive()
    assert nvml.opened == 0


def test_a_quiet_machine_gives_no_warning() -> None:
    """Clocks are low before and idle GPUs say so; neither is a reason to doubt a number."""
    assert QUIET.warnings == []


def test_importing_it_costs_no_torch() -> None:
    code = (
        "import sys\n"
        "import mmopt.measure.throttling, mmopt.measure.fingerprint, mmopt.measure.results\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


def _wait_for(seen: object) -> None:
    deadline = time.monotonic() + 30
    while not seen():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the sampling thread never looked"
        time.sleep(0.001)
