"""`mmopt.measure.fingerprint`: what a measurement ran on."""

import json
from pathlib import Path

import pytest
import torch

from mmopt.measure.fingerprint import fingerprint
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
