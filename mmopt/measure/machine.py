"""What the system says of the machine, read without torch: the doctor needs it when torch fails."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def cgroup_quota_cores(root: Path = _CGROUP_ROOT, own: Path = _OWN_CGROUP) -> float | None:
    """The tightest CPU quota, in cores, of a process's control group and those above it.

    Args:
        root: where control groups are mounted (`/sys/fs/cgroup`), version 1 or 2.
        own: the process's `/proc/<pid>/cgroup`.

    Returns:
        The quota, 0.5 for half a core; None when nothing limits it or nothing can be read.
    """
    quotas = (
        _quota_v1(folder) if version == 1 else _quota_v2(folder)
        for version, folder in cpu_cgroups(root, own)
    )
    return min((quota for quota in quotas if quota is not None), default=None)


def cpu_cgroups(root: Path = _CGROUP_ROOT, own: Path = _OWN_CGROUP) -> Iterator[tuple[int, Path]]:
    """The control groups that can limit a process's CPU time: its own and those above it.

    Args:
        root: where control groups are mounted (`/sys/fs/cgroup`).
        own: the process's `/proc/<pid>/cgroup`.

    Yields:
        The version (1 or 2) and the folder, which may be hidden from us. Nothing where the system
        has no control groups.
    """
    if not own.is_file():
        return
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
            yield (1 if controllers else 2), folder


def core_numbers() -> list[int]:
    """The logical cores that this process may run on, as the system numbers them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def last_level_cache_bytes(cpus: Path = CPUS) -> int | None:
    """Bytes of the last cache level of the cores that this process may run on.

    Where these cores have several caches of that level, their sum. In a virtual machine it is what
    the hypervisor says, often the cache of the whole host. None where the system does not tell.
    """
    levels: dict[int, dict[str, int]] = {}
    for core in core_numbers():
        for index in (cpus / f"cpu{core}" / "cache").glob("index[0-9]*"):
            level = first_match(index / "level", r"^(\d+)$")
            size = first_match(index / "size", r"^(\d+)K$")
            shared = first_match(index / "shared_cpu_list", r"^(\S+)$")
            if level and size and shared:
                levels.setdefault(int(level), {})[shared] = int(size) * 1024
    return sum(levels[max(levels)].values()) if levels else None


def _quota_v1(folder: Path) -> float | None:
    quota = first_match(folder / "cpu.cfs_quota_us", r"^(\d+)$")  # -1 is no limit
    period = first_match(folder / "cpu.cfs_period_us", r"^(\d+)$")
    return int(quota) / int(period) if quota and period else None


def _quota_v2(folder: Path) -> float | None:
    # "max 100000" is no limit.
    quota = first_match(folder / "cpu.max", r"^(\d+) \d+$")
    period = first_match(folder / "cpu.max", r"^\d+ (\d+)$")
    return int(quota) / int(period) if quota and period else None


def first_match(path: Path, pattern: str) -> str | None:
    """The first group of the first line of a file that matches; None when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None  # this system does not have it, or hides it from us
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else None
