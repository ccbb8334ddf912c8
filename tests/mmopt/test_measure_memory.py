"""`mmopt.measure.memory`: peaks of a fresh process."""

import math
import os
import shutil

import pytest

from mmopt.measure import memory
from mmopt.measure.memory import peak_memory, peak_resident_bytes
from mmopt_kernels.errors import InputError, MmoptError

MEGABYTES = 1_000_000


def test_peak_counts_what_the_call_allocates_even_when_freed() -> None:
    peak = peak_memory(bytearray, 200 * MEGABYTES)
    assert peak.process_bytes is not None
    assert peak.process_before_bytes is not None
    # bytearray fills its pages; a few megabytes more come from the interpreter.
    grown = peak.process_bytes - peak.process_before_bytes
    assert 195 * MEGABYTES < grown < 230 * MEGABYTES


def test_memory_of_the_calling_process_does_not_count() -> None:
    before = peak_memory(abs, -1)
    ballast = bytearray(400 * MEGABYTES)
    after = peak_memory(abs, -1)
    assert len(ballast) == 400 * MEGABYTES
    assert before.process_bytes is not None
    assert after.process_bytes is not None
    assert after.process_bytes - before.process_bytes < 50 * MEGABYTES


def test_torch_peaks_are_none_without_cuda_in_use() -> None:
    peak = peak_memory(abs, -1)
    assert (peak.torch_allocated_bytes, peak.torch_reserved_bytes) == (None, None)


def test_resident_peak_is_none_where_proc_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "absent")  # type: ignore[operator]
    assert peak_resident_bytes() is None


def test_what_the_call_prints_does_not_disturb_the_answer() -> None:
    assert peak_memory(print, "hello").process_bytes is not None


def test_a_call_that_fails_is_an_error_with_its_last_line() -> None:
    with pytest.raises(MmoptError, match=r"status 1 \(ValueError: .*\)"):
        peak_memory(math.sqrt, -1.0)


def test_a_process_that_is_killed_is_an_error_that_names_the_signal() -> None:
    with pytest.raises(MmoptError, match="status -6"):
        peak_memory(os.abort)


def test_a_function_that_no_module_defines_is_refused() -> None:
    with pytest.raises(InputError, match="Pass a function that a module defines"):
        peak_memory(lambda: None)


def test_worker_sees_the_caller_s_import_path(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peak_memory(shutil.which, "sh").process_bytes is not None
