"""What a measurement ran on: two results compare only where these agree."""

import dataclasses
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Fingerprint:
    """The machine and the software of one measurement. None where it cannot be read.

    Attributes:
        cpu: the processor's model name.
        cores: logical cores that this process may run on.
        quota_cores: the cgroup's CPU quota in cores; None when there is no limit.
        governor: the frequency governor of the first core.
        torch_threads: threads that torch uses within one op.
        gpus: the names of the GPUs that torch sees.
        gpu_driver: version of the NVIDIA kernel driver.
        cuda: version of CUDA that torch was built with.
        system: operating system and its kernel's release.
        python, torch, triton, onnxruntime: installed versions.
    """

    cpu: str | None
    cores: int
    quota_cores: float | None
    governor: str | None
    torch_threads: int
    gpus: tuple[str, ...]
    gpu_driver: str | None
    cuda: str | None
    system: str
    python: str
    torch: str
    triton: str | None
    onnxruntime: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "gpus": list(self.gpus)}


def fingerprint() -> Fingerprint:
    """Read the fingerprint of this machine and this process."""
    gpus = range(torch.cuda.device_count())
    cuda: str | None = torch.version.cuda
    return Fingerprint(
        cpu=_first_match(_CPUINFO, r"^model name\s*:\s*(.+)$") or platform.processor() or None,
        cores=_usable_cores(),
        quota_cores=cgroup_quota_cores(_CGROUP_ROOT, _OWN_CGROUP),
        governor=_first_match(_GOVERNOR, r"^(\S+)$"),
        torch_threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in gpus),
        gpu_driver=_first_match(_NVIDIA_VERSION, r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s"),
        cuda=cuda,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        onnxruntime=_version("onnxruntime") or _version("onnxruntime-gpu"),
    )


def cgroup_quota_cores(root: Path, own: Path) -> float | None:
    """The tightest CPU quota, in cores, of a process's control group and those above it.

    Args:
        root: where control groups are mounted (`/sys/fs/cgroup`), version 1 or 2.
        own: the process's `/proc/<pid>/cgroup`.

    Returns:
        The quota, 0.5 for half a core; None when nothing limits it or nothing can be read.
    """
    if not own.is_file():
        return None
    quotas = []
    for line in own.read_text(encoding="utf-8").splitlines():
        # hierarchy-ID:controllers:path; version 2 has no controllers there.
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(base):
                break
            quotas.append(_quota_v1(folder) if controllers else _quota_v2(folder))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v1(folder: Path) -> float | None:
    quota = _first_match(folder / "cpu.cfs_quota_us", r"^(\d+)$")  # -1 is no limit
    period = _first_match(folder / "cpu.cfs_period_us", r"^(\d+)$")
    return int(quota) / int(period) if quota and period else None


def _quota_v2(folder: Path) -> float | None:
    # "max 100000" is no limit.
    quota = _first_match(folder / "cpu.max", r"^(\d+) \d+$")
    period = _first_match(folder / "cpu.max", r"^\d+ (\d+)$")
    return int(quota) / int(period) if quota and period else None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_match(path: Path, pattern: str) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None  # this system does not have it, or hides it from us
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
