"""Puts memory on huge pages, where Linux lets a process ask for that.

A decoder reads all of its weights for each token. In pages of 4 KiB the processor looks up an
address for every 64 cache lines of them; in pages of 2 MiB hardly ever.
"""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAPPINGS = Path("/proc/self/smaps")
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage")
# From linux/mman.h. The first lets the kernel do it in its own time, the second, from Linux 6.1 on,
# has it done at once.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
# A part of a mapping that nothing has written to takes no memory, and would on a huge page.
_FILLED = 0.9

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(\[heap\])?$")


@dataclass(frozen=True)
class _Mapping:
    """Anonymous memory of this process: addresses, and bytes that are in memory."""

    start: int
    end: int
    resident: int

    @property
    def size(self) -> int:
        return self.end - self.start


@contextlib.contextmanager
def on_huge_pages() -> Iterator[None]:
    """Move what was allocated and filled inside to huge pages in the end, which copies it once.

    Where the system has none, or whoever runs it turned them off, nothing happens.
    """
    size = _page_size()
    if not size:
        yield
        return
    before = _mappings()
    yield
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    filled = [one for one in _mappings() if one.resident >= max(size, _FILLED * one.size)]
    for start, end in _added(before, filled):
        # The huge pages that lie in it as a whole.
        first, last = -(-start // size) * size, end // size * size
        if first < last:
            for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
                libc.madvise(first, last - first, advice)  # advice may be refused


def _page_size() -> int:
    """Bytes of a huge page; 0 where there are none to be had."""
    try:
        if "[never]" in (_KERNEL / "enabled").read_text():
            return 0
        return int((_KERNEL / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _mappings() -> list[_Mapping]:
    found: list[_Mapping] = []
    place: tuple[int, int] | None = None
    try:
        lines = _MAPPINGS.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        if header := _HEADER.match(line):
            place = int(header[1], 16), int(header[2], 16)
        elif line[:1].islower() or line[:1].isdigit():
            place = None  # the header of a mapping of another kind
        elif place is not None and line.startswith("Rss:"):
            found.append(_Mapping(*place, 1024 * int(line.split()[1])))
            place = None
    return found


def _added(before: list[_Mapping], now: list[_Mapping]) -> Iterator[tuple[int, int]]:
    """What of now lies in no mapping of before; both are in the order of addresses."""
    for mapping in now:
        start = mapping.start
        for old in before:
            if old.end <= start or old.start >= mapping.end:
                continue
            if old.start > start:
                yield start, old.start
            start = max(start, old.end)
        if start < mapping.end:
            yield start, mapping.end
