"""`mmopt.measure.caches`: inputs in rotation, and sweeps."""

import os
from pathlib import Path

import pytest

from mmopt.measure import caches
from mmopt.measure.caches import CacheSweep, copies_past_cache, rotate
from mmopt.measure.machine import last_level_cache_bytes
from mmopt_kernels.errors import InputError, MmoptError


def _cache(cpus: Path, core: int, index: int, level: int, size: str, shared: str) -> None:
    folder = cpus / f"cpu{core}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


def test_a_rotation_takes_each_input_in_turn_and_prepares_none_while_it_runs() -> None:
    prepared: list[str] = []

    def prepare(name: str) -> object:
        prepared.append(name)
        return lambda: name

    call = rotate(prepare, ["a", "b", "c"])  # type: ignore[arg-type]
    assert prepared == ["a", "b", "c"]
    assert [call() for _ in range(7)] == ["a", "b", "c", "a", "b", "c", "a"]
    assert prepared == ["a", "b", "c"]


def test_one_input_is_called_without_a_detour() -> None:
    def only() -> str:
        return "only"

    assert rotate(lambda _: only, [1]) is only


def test_a_rotation_without_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="no inputs to rotate, expected at least one"):
        rotate(lambda _: print, [])


def test_last_level_cache_is_the_sum_over_the_instances_of_these_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clusters of two cores with 32 MiB each; the process may use one core of each."""
    for core in range(4):
        cluster = "0-1" if core < 2 else "2-3"
        _cache(tmp_path, core, 0, 1, "48K", str(core))
        _cache(tmp_path, core, 2, 2, "2048K", str(core))
        _cache(tmp_path, core, 3, 3, "32768K", cluster)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    assert last_level_cache_bytes(tmp_path) == 2 * 32 * 2**20
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20


def test_last_level_cache_is_none_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) is None


def test_copies_exceed_the_cache_twice_and_there_are_at_least_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caches, "last_level_cache_bytes", lambda: 1000)
    assert copies_past_cache(100) == 20
    assert copies_past_cache(300) == 7
    assert copies_past_cache(10**6) == 2
    with pytest.raises(InputError, match="an input has 0 bytes, expected more than 0"):
        copies_past_cache(0)


def test_a_sweep_reads_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "last_level_cache_bytes", lambda: 1 << 20)
    sweep = CacheSweep()
    assert sweep._other.nbytes == 2 << 20
    # Pages that nobody wrote are one page of zeros, whatever their number.
    assert bool((sweep._other == 1).all())
    sweep()


def test_a_cache_of_unknown_size_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caches, "last_level_cache_bytes", lambda: None)
    with pytest.raises(MmoptError, match=r"cannot be read in /sys.*Use the timer wall"):
        CacheSweep()
    with pytest.raises(MmoptError, match="Choose the number of copies yourself"):
        copies_past_cache(8)


def test_a_sweep_that_does_not_fit_into_memory_is_refused_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caches, "last_level_cache_bytes", lambda: 1 << 50)
    with pytest.raises(MmoptError, match=r"takes 2147483648 MiB of other data.*Use the timer wall"):
        CacheSweep()
