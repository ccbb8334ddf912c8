"""What a measurement ran on: two results compare only where these agree. Imports torch late."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt.measure._nvml import open_nvml
from mmopt.measure.machine import CPUS, cgroup_quota_cores, first_match
from mmopt_export.threads import usable_cores

_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Fingerprint:
    """The machine and the software of one measurement. None where it cannot be read.

    Nothing here changes from minute to minute: what a clock reads now, or how busy the machine is,
    belongs to `mmopt.measure.throttling`.

    Attributes:
        cpu: the processor's model name.
        microcode: its microcode revision; a virtual machine may show a placeholder.
        cores: logical cores that this process may run on.
        quota_cores: the cgroup's CPU quota in cores; None when there is no limit.
        governor: the frequency governor of the first core.
        max_mhz: the highest clock that the first core can have, boost included.
        boost: whether the clocks may rise above the base clock.
        virtual_machine: whether a hypervisor is under the system (x86 only).
        torch_threads: threads that torch uses within one op.
        gpus: the names of the GPUs that torch sees.
        gpu_driver: version of the NVIDIA kernel driver.
        gpu_max_sm_mhz: the highest multiprocessor clock of each GPU of the machine.
        gpu_power_limit_watts: the power limit in force of each GPU of the machine.
        cuda: version of CUDA that torch was built with.
        cudnn: version of cuDNN that torch loads, as one number.
        system: operating system and its kernel's release.
        python, torch, triton, onnxruntime: installed versions.
    """

    cpu: str | None
    microcode: str | None
    cores: int
    quota_cores: float | None
    governor: str | None
    max_mhz: float | None
    boost: bool | None
    virtual_machine: bool | None
    torch_threads: int
    gpus: tuple[str, ...]
    gpu_driver: str | None
    gpu_max_sm_mhz: tuple[int, ...] | None
    gpu_power_limit_watts: tuple[float, ...] | None
    cuda: str | None
    cudnn: str | None
    system: str
    python: str
    torch: str
    triton: str | None
    onnxruntime: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()}


def fingerprint() -> Fingerprint:
    """Read the fingerprint of this machine and this process."""
    import torch

    gpus = range(torch.cuda.device_count())
    max_sm_mhz, power_limits = _gpu_limits()
    max_khz = first_match(CPUS / "cpu0" / "cpufreq" / "cpuinfo_max_freq", r"^(\d+)$")
    return Fingerprint(
        cpu=first_match(_CPUINFO, r"^model name\s*:\s*(.+)$") or platform.processor() or None,
        microcode=first_match(_CPUINFO, r"^microcode\s*:\s*(\S+)$"),
        cores=usable_cores(),
        quota_cores=cgroup_quota_cores(),
        governor=first_match(CPUS / "cpu0" / "cpufreq" / "scaling_governor", r"^(\S+)$"),
        max_mhz=None if max_khz is None else int(max_khz) / 1000,
        boost=_boost(CPUS),
        virtual_machine=_virtual_machine(_CPUINFO),
        torch_threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in gpus),
        gpu_driver=first_match(_NVIDIA_VERSION, r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s"),
        gpu_max_sm_mhz=max_sm_mhz,
        gpu_power_limit_watts=power_limits,
        cuda=torch.version.cuda,
        cudnn=_cudnn(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        onnxruntime=_version("onnxruntime") or _version("onnxruntime-gpu"),
    )


def differing_fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields in which two fingerprints differ, in their order; empty when they agree.

    A field that one of them lacks, because an older version wrote it, counts as None there: it
    differs from a value, and agrees with one that could not be read.

    Args:
        a, b: as `Fingerprint.to_dict` or a result file gives them.
    """
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def _boost(cpus: Path) -> bool | None:
    no_turbo = first_match(cpus / "intel_pstate" / "no_turbo", r"^([01])$")
    if no_turbo is not None:
        return no_turbo == "0"
    boost = first_match(cpus / "cpufreq" / "boost", r"^([01])$")
    return None if boost is None else boost == "1"


def _virtual_machine(cpuinfo: Path) -> bool | None:
    flags = first_match(cpuinfo, r"^flags\s*:\s*(.+)$")
    return None if flags is None else "hypervisor" in flags.split()


def _gpu_limits() -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Highest multiprocessor clocks and power limits; None where there is no GPU to ask."""
    with open_nvml() as gpus:
        clocks = tuple(mhz for gpu in gpus if (mhz := gpu.max_sm_mhz()) is not None)
        limits = tuple(watts for gpu in gpus if (watts := gpu.power_limit_watts()) is not None)
    return clocks or None, limits or None


def _cudnn() -> str | None:
    import torch

    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None  # it is not the one that torch was built for; `mmopt doctor` says more
    return None if version is None else str(version)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
