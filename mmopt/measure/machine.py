"""What the system says of the machine, read without torch: the doctor needs it when torch fails."""

import re
from pathlib import Path

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
