"""`mmopt.measure.fingerprint`: what a measurement ran on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fake_nvml import FakeGpu, FakeNvml
from mmopt.measure import fingerprint as module
from mmopt.measure.fingerprint import differing_fields, fingerprint
from mmopt.measure.machine import cgroup_quota_cores


def test_fingerprint_reads_this_machine_and_is_json() -> None:
    found = fingerprint()
    assert found.cores >= 1
    assert found.torch == torch.__version__
    assert found.torch_threads == torch.get_num_threads()
    assert found.python.startswith("3.")
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_fingerprint_of_one_machine_is_stable() -> None:
    assert fingerprint() == fingerprint()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 0.5),
        ({"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "200000 100000\n"}, "0::/a/b\n", 2.0),
        (
            {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            "4:cpu,cpuacct:/x\n3:memory:/y\n0::/\n",
            3.0,
        ),
        (
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            "1:cpu:/\n",
            None,
        ),
        ({}, "0::/gone\n", None),
    ],
    ids=["v2", "v2-max", "v2-parent", "v2-tightest", "v1", "v1-none", "unreadable"],
)
def test_quota_is_the_tightest_of_the_group_and_its_parents(
    tmp_path: Path, files: dict[str, str], own: str, quota: float | None
) -> None:
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        _write(root / name, text)
    _write(tmp_path / "own", own)
    assert cgroup_quota_cores(root, tmp_path / "own") == quota


def test_quota_is_none_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_quota_cores(tmp_path, tmp_path / "absent") is None


def test_nothing_in_it_changes_from_minute_to_minute() -> None:
    """A clock that reads otherwise at the next look would make every pair of results differ."""
    fields = set(fingerprint().to_dict())
    assert not [name for name in fields if "current" in name or "load" in name or "free" in name]
    before = fingerprint().to_dict()
    sum(range(3_000_000))  # a busy core clocks higher than an idle one
    assert fingerprint().to_dict() == before


def test_importing_it_costs_no_torch() -> None:
    code = "import sys, mmopt.measure.fingerprint; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


def test_differing_fields_are_named_in_their_order() -> None:
    here = fingerprint().to_dict()
    assert differing_fields(here, here) == []
    assert differing_fields(here, json.loads(json.dumps(here))) == []
    there = {**here, "torch": "2.0.0", "cpu": "another"}
    assert differing_fields(here, there) == ["cpu", "torch"]
    assert differing_fields(there, here) == ["cpu", "torch"]


def test_a_field_that_an_older_result_lacks_differs_only_from_a_value() -> None:
    assert differing_fields({"cpu": "x", "boost": None}, {"cpu": "x"}) == []
    assert differing_fields({"cpu": "x", "boost": True}, {"cpu": "x"}) == ["boost"]
    assert differing_fields({"cpu": "x"}, {"cpu": "x", "boost": False}) == ["boost"]


@pytest.mark.parametrize(
    ("files", "boost"),
    [
        ({"intel_pstate/no_turbo": "0\n"}, True),
        ({"intel_pstate/no_turbo": "1\n", "cpufreq/boost": "1\n"}, False),
        ({"cpufreq/boost": "1\n"}, True),
        ({"cpufreq/boost": "0\n"}, False),
        ({}, None),
    ],
    ids=["intel-on", "intel-off", "on", "off", "unreadable"],
)
def test_boost_is_read_where_the_driver_tells(
    tmp_path: Path, files: dict[str, str], boost: bool | None
) -> None:
    for name, text in files.items():
        _write(tmp_path / name, text)
    assert module._boost(tmp_path) is boost


def test_limits_of_a_gpu_are_read_with_nvml_and_none_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [FakeGpu("GPU-a", max_sm_mhz=1980, milliwatts=700_000), FakeGpu("GPU-b", 0, 1, 1410)]
    library = FakeNvml(gpus)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert module._gpu_limits() == ((1980, 1410), (700.0, 700.0))
    gpus[0].max_sm_mhz = gpus[1].max_sm_mhz = None
    assert module._gpu_limits() == (None, (700.0, 700.0))
    assert library.opened == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert module._gpu_limits() == (None, None)


def test_the_processor_is_read_from_cpuinfo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "_CPUINFO", cpuinfo)
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: A Chip\nmicrocode\t: 0x2b0\nflags\t\t: fpu hypervisor avx\n"
    )
    found = fingerprint()
    assert (found.cpu, found.microcode, found.virtual_machine) == ("A Chip", "0x2b0", True)
    cpuinfo.write_text("model name\t: A Chip\nflags\t\t: fpu avx hypervisor_not\n")
    assert fingerprint().virtual_machine is False
    assert fingerprint().microcode is None
    cpuinfo.write_text("CPU implementer\t: 0x41\n")  # ARM has no such line
    assert fingerprint().virtual_machine is None
