"""Instructions that a call retires in user space, where the kernel lets a process count them.

A count depends neither on the clock nor on what else the machine does, so it shows a change that
time hides in noise. It is no time: instructions that wait for memory count like any others.
Source: man 2 perf_event_open; include/uapi/linux/perf_event.h.
"""

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mmopt_kernels.errors import MmoptError

# arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h.
SYSCALLS = {"x86_64": 298, "aarch64": 241}

# (type, config) of an event.
INSTRUCTIONS = (0, 1)  # PERF_TYPE_HARDWARE, PERF_COUNT_HW_INSTRUCTIONS
TASK_CLOCK = (1, 1)  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_TASK_CLOCK: nanoseconds on a core

_DISABLED, _INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 0, 1 << 1, 1 << 5, 1 << 6
_TIMES = 1 << 0 | 1 << 1  # PERF_FORMAT_TOTAL_TIME_ENABLED, PERF_FORMAT_TOTAL_TIME_RUNNING
_CLOSE_ON_EXEC = 1 << 3  # PERF_FLAG_FD_CLOEXEC
_ENABLE, _DISABLE, _RESET = 0x2400, 0x2401, 0x2403  # PERF_EVENT_IOC_*

_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


class EventAttributes(ctypes.Structure):
    """`struct perf_event_attr` as of its first version (PERF_ATTR_SIZE_VER0, 64 bytes)."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),  # bit fields in C
        ("wakeup_events", ctypes.c_uint32),
        ("bp_type", ctypes.c_uint32),
        ("config1", ctypes.c_uint64),
    )


def instructions_available() -> str | None:
    """Why instructions cannot be counted here, in plain words; None when they can."""
    try:
        with _opened(INSTRUCTIONS, threads=False):
            return None
    except MmoptError as refused:
        return str(refused)


def count_instructions(call: Callable[[], object]) -> int:
    """Instructions that this process retires in user space while `call` runs once.

    Counted are all threads that the process has, and those that they start meanwhile. Threads
    that wait by spinning retire instructions for as long as they wait, so the count repeats (to
    some parts in ten thousand) only with one thread. Some hundred instructions of Python around
    the call are in it. Call it once before: a first call compiles and sets up.

    Raises:
        MmoptError: the kernel does not let this process count, or it had to share the counter with
            others and counted only a part of the time (exit 3).
    """
    return count_events(INSTRUCTIONS, call)


def count_events(event: tuple[int, int], call: Callable[[], object]) -> int:
    """Occurrences in user space, while `call` runs, of an event of `perf_event_open`.

    Args:
        event: its type and its config.
        call: run once.

    Raises:
        MmoptError: as `count_instructions`.
    """
    with _opened(event) as counters:
        for counter in counters:
            fcntl.ioctl(counter, _RESET, 0)
        for counter in counters:
            fcntl.ioctl(counter, _ENABLE, 0)
        try:
            call()
        finally:
            for counter in counters:
                fcntl.ioctl(counter, _DISABLE, 0)
        return sum(map(_read, counters))


@contextmanager
def _opened(event: tuple[int, int], *, threads: bool = True) -> Iterator[list[int]]:
    """One stopped counter for each thread of this process, or for this thread only."""
    system, machine = platform.system(), platform.machine()
    number = SYSCALLS.get(machine)
    if system != "Linux" or number is None:
        raise MmoptError(
            f"instructions: they are counted on Linux on {' and '.join(SYSCALLS)}, this is "
            f"{system} on {machine}."
        )
    attributes = EventAttributes(
        type=event[0],
        size=ctypes.sizeof(EventAttributes),
        config=event[1],
        read_format=_TIMES,
        flags=_DISABLED | _INHERIT | _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR,
    )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    with ExitStack() as stack:
        counters = []
        for thread in sorted(map(int, os.listdir("/proc/self/task"))) if threads else [0]:
            # This thread or that one (0 is this one), any core (-1), no group (-1).
            counter = libc.syscall(
                ctypes.c_long(number),
                ctypes.byref(attributes),
                ctypes.c_int(thread),
                ctypes.c_int(-1),
                ctypes.c_int(-1),
                ctypes.c_ulong(_CLOSE_ON_EXEC),
            )
            if counter < 0:
                code = ctypes.get_errno()
                if code == errno.ESRCH and threads:
                    continue  # it ended while we looked
                raise MmoptError(f"instructions: {_why(code)}")
            stack.callback(os.close, counter)
            counters.append(counter)
        yield counters


def _read(counter: int) -> int:
    """The count; its thread's descendants are in it."""
    count, enabled, running = struct.unpack("QQQ", os.read(counter, 24))
    if running < enabled:
        raise MmoptError(
            f"instructions: the counter was shared and counted {100 * running / enabled:.0f}% of "
            "the time only. End other programs that count (perf, a profiler) and repeat."
        )
    return int(count)


def _why(code: int) -> str:
    said = f"{errno.errorcode.get(code, code)}, {os.strerror(code)}"
    if code in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        return (
            f"this kernel gives no hardware counter ({said}), as in most virtual machines. "
            "Use a machine that passes its performance counters on."
        )
    if code in (errno.EACCES, errno.EPERM):
        level = _PARANOID.read_text(encoding="ascii").strip() if _PARANOID.is_file() else "unknown"
        return (
            f"this process may not count ({said}): {_PARANOID} is {level}, expected 2 or less, or "
            "the container forbids perf_event_open. Ask whoever runs the machine."
        )
    if code == errno.ENOSYS:
        return f"this kernel is built without perf_event_open ({said}), or a sandbox hides it."
    return f"perf_event_open failed ({said})."
