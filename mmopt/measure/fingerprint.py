"""What a measurement ran on: two results compare only where these agree."""

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmopt.measure.machine import cgroup_quota_cores, first_match
from mmopt_export.threads import usable_cores

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


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
        cpu=first_match(_CPUINFO, r"^model name\s*:\s*(.+)$") or platform.processor() or None,
        cores=usable_cores(),
        quota_cores=cgroup_quota_cores(),
        governor=first_match(_GOVERNOR, r"^(\S+)$"),
        torch_threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in gpus),
        gpu_driver=first_match(_NVIDIA_VERSION, r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s"),
        cuda=cuda,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        onnxruntime=_version("onnxruntime") or _version("onnxruntime-gpu"),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
