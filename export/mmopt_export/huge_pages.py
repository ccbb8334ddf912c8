"""Puts memory on huge pages, where Linux lets a process ask for that.

A decoder reads all of its weights for each token. In pages of 4 KiB the processor looks up an
address for every 64 cache lines of them; in pages of 2 MiB hardly ever.
"""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_PROCESS = Path("/proc/self")
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage")
# From linux/mman.h. The first lets the kernel do it in its own time, the second, from Linux 6.1 on,
# has it done at once.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
# A part of a mapping that nothing has written to takes no memory, and would on a huge page.
_FILLED = 0.9

# The line of a mapping of anonymous memory in /proc/self/maps, and the bytes of it that are in
# memory, some lines below in /proc/self/smaps, for which the kernel counts pages.
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[heap\])?$", re.MULTILINE)
_RESIDENT = re.compile(r"^Rss: +(\d+) kB$", re.MULTILINE)

Range = tuple[int, int]
"""The addresses of a mapping: the first, and the first behind it."""


@contextlib.contextmanager
def on_huge_pages(expected: int) -> Iterator[None]:
    """Move what was allocated and filled inside to huge pages in the end, which copies it once.

    Where the system has none, or whoever runs it turned them off, nothing happens. What the
    allocator gives of memory that the process had before stays where it is.

    Args:
        expected: bytes that will be; of less than a huge page nothing is moved, or looked at.
    """
    size = _page_size()
    if not 0 < size <= expected:
        yield
        return
    before = [_range(one) for one in _MAPPING.finditer(_read("maps"))]
    yield
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _added(before, _filled(size)):
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


def _read(name: str) -> str:
    try:
        return (_PROCESS / name).read_text()
    except OSError:
        return ""


def _range(found: re.Match[str]) -> Range:
    return int(found[1], 16), int(found[2], 16)


def _filled(size: int) -> list[Range]:
    """Mappings that nearly all of is in memory, and no less than `size`."""
    text = _read("smaps")
    found = []
    for mapping in _MAPPING.finditer(text):
        start, end = _range(mapping)
        resident = _RESIDENT.search(text, mapping.end())
        if resident and 1024 * int(resident[1]) >= max(size, _FILLED * (end - start)):
            found.append((start, end))
    return found


def _added(before: list[Range], now: list[Range]) -> Iterator[Range]:
    """What of now lies in no mapping of before; both are in the order of addresses."""
    for start, end in now:
        for old_start, old_end in before:
            if old_end <= start or old_start >= end:
                continue
            if old_start > start:
                yield start, old_start
            start = max(start, old_end)
        if start < end:
            yield start, end
