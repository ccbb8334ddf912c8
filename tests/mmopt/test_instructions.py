"""`mmopt.measure.instructions`: the system call, and what is said where it is refused.

Where the kernel gives no hardware counter the same path is exercised with a software event, the
nanoseconds that threads spend on a core, which every kernel with perf events has.
"""

import ctypes
import errno
import os
import platform
import queue
import threading
import time
from pathlib import Path

import pytest

from mmopt.measure import instructions
from mmopt.measure.instructions import (
    TASK_CLOCK,
    EventAttributes,
    count_events,
    count_instructions,
    instructions_available,
)
from mmopt_kernels.errors import MmoptError


def _work(nanoseconds: int = 20_000_000) -> None:
    """Use this much CPU time in this thread."""
    end = time.thread_time_ns() + nanoseconds
    while time.thread_time_ns() < end:
        pass


def _counted(call: object) -> int:
    try:
        return count_events(TASK_CLOCK, call)  # type: ignore[arg-type]
    except MmoptError as refused:
        pytest.skip(f"perf_event_open does not work here at all: {refused}")


def test_attributes_have_the_layout_of_the_kernel_s_first_version() -> None:
    """`pahole -C perf_event_attr`; the flags are one word of bit fields."""
    assert ctypes.sizeof(EventAttributes) == 64
    offsets = {name: getattr(EventAttributes, name).offset for name, _ in EventAttributes._fields_}
    assert offsets == {
        "type": 0,
        "size": 4,
        "config": 8,
        "sample_period": 16,
        "sample_type": 24,
        "read_format": 32,
        "flags": 40,
        "wakeup_events": 48,
        "bp_type": 52,
        "config1": 56,
    }


def test_a_call_is_counted_and_what_comes_before_and_after_is_not() -> None:
    _work()
    counted = _counted(_work)
    _work()
    # At least what the thread itself saw; as much again would be the work around the call.
    assert 20_000_000 <= counted < 40_000_000


def test_waiting_does_not_count() -> None:
    assert _counted(lambda: time.sleep(0.05)) < 20_000_000


def test_threads_that_the_call_starts_are_counted() -> None:
    def call() -> None:
        threads = [threading.Thread(target=_work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert _counted(call) >= 40_000_000


def test_threads_that_were_there_before_are_counted() -> None:
    """torch's and ONNX Runtime's pools start long before anything is counted."""
    orders: queue.SimpleQueue[bool] = queue.SimpleQueue()
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def serve() -> None:
        while orders.get():
            _work()
            done.put(None)

    def call() -> None:
        orders.put(True)
        done.get()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert _counted(call) >= 20_000_000
    finally:
        orders.put(False)
        thread.join()


def test_counters_are_closed_even_when_the_call_fails() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    _counted(lambda: None)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        count_events(TASK_CLOCK, fail)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_instructions_are_counted_or_a_reason_is_given() -> None:
    reason = instructions_available()
    if reason is None:
        few = count_instructions(lambda: sum(range(1000)))
        assert 1000 < few < count_instructions(lambda: sum(range(100_000)))
    else:
        assert reason.startswith("instructions: ")
        with pytest.raises(MmoptError) as caught:
            count_instructions(lambda: None)
        assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOENT, "gives no hardware counter (ENOENT"),
        (errno.EOPNOTSUPP, "gives no hardware counter (ENOTSUP"),
        (errno.EACCES, "is 4, expected 2 or less"),
        (errno.EPERM, "the container forbids perf_event_open"),
        (errno.ENOSYS, "built without perf_event_open"),
        (errno.EMFILE, "perf_event_open failed (EMFILE"),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) else None,
)
def test_each_refusal_has_its_reason(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paranoid").write_text("4\n")
    monkeypatch.setattr(instructions, "_PARANOID", tmp_path / "paranoid")
    assert said in instructions._why(code)


def test_a_machine_without_a_known_system_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    reason = instructions_available()
    assert reason is not None
    assert "on Linux on x86_64 and aarch64, this is Linux on riscv64" in reason


def test_a_count_of_a_part_of_the_time_is_no_count() -> None:
    """The kernel shares a counter among more events than it has, and says how long each ran."""
    reader, writer = os.pipe()
    try:
        for enabled, running in ((100, 100), (100, 25)):
            os.write(writer, b"".join(n.to_bytes(8, "little") for n in (7, enabled, running)))
        assert instructions._read(reader) == 7
        with pytest.raises(MmoptError, match="counted 25% of the time only"):
            instructions._read(reader)
    finally:
        os.close(reader)
        os.close(writer)
