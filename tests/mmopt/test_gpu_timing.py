"""`mmopt.measure.gpu_timing`: three labelled modes; without a GPU, what they refuse and count."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from mmopt.measure import gpu_timing
from mmopt.measure.gpu_timing import (
    EVENT_RESOLUTION,
    CudaGraphTimer,
    KernelTimer,
    gpu_timer,
    kernel_seconds,
)
from mmopt.measure.timers import TIMER_MEANING, TIMERS
from mmopt.measure.timing import time_variants
from mmopt_kernels.errors import InputError, MmoptError


def _event(
    name: str,
    microseconds: float,
    *,
    device: DeviceType = DeviceType.CUDA,
    activity: str | None = "kernel",
    annotation: bool = False,
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=device,
        activity_type=activity,
        is_user_annotation=annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
    )


@pytest.mark.parametrize("name", TIMERS["cuda"])
def test_without_a_gpu_every_mode_is_refused_with_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, said in (("13.0", "sees no CUDA GPU"), (None, "is built without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(MmoptError, match=rf"{said}, so nothing.*`mmopt doctor`") as caught:
            gpu_timer(name)
        assert caught.value.exit_code == 3


def test_an_unknown_mode_is_named_before_a_gpu_is_looked_for() -> None:
    with pytest.raises(
        InputError, match=r"no GPU timer 'wall', expected one of: host-inclusive, cuda-graph-cold"
    ):
        gpu_timer("wall")


def test_every_mode_says_what_its_figure_is() -> None:
    assert set(TIMER_MEANING) == {name for names in TIMERS.values() for name in names}


def test_kernel_time_is_that_of_kernels_only() -> None:
    events = [
        _event("gemm", 100.0),
        _event("gemm", 50.0),
        _event("Memcpy HtoD (Pageable -> Device)", 1000.0, activity="gpu_memcpy"),
        _event("Memset (Device)", 1000.0, activity="gpu_memset"),
        _event("Stream Sync", 1000.0, activity="cuda_sync"),
        _event("ProfilerStep#1", 1000.0, activity="gpu_user_annotation", annotation=True),
        _event("aten::mm", 1000.0, device=DeviceType.CPU, activity="cpu_op"),
    ]
    assert kernel_seconds(events) == pytest.approx(150e-6)


def test_a_torch_that_does_not_name_activities_gives_the_same_kernels() -> None:
    events = [
        _event("gemm", 100.0, activity=None),
        _event("Memcpy DtoD (Device -> Device)", 1000.0, activity=None),
        _event("Memset (Device)", 1000.0, activity=None),
        _event("Stream Wait Event", 1000.0, activity=None),
        _event("Context Sync", 1000.0, activity=None),
        _event("my region", 1000.0, activity=None, annotation=True),
        _event("aten::mm", 1000.0, device=DeviceType.CPU, activity=None),
    ]
    assert kernel_seconds(events) == pytest.approx(100e-6)


def test_a_profile_without_kernels_is_an_error_and_never_zero_seconds() -> None:
    with pytest.raises(MmoptError, match=r"recorded no kernel.*CUPTI"):
        kernel_seconds([_event("aten::mm", 1.0, device=DeviceType.CPU, activity="cpu_op")])


def test_a_cold_sample_flushes_before_the_events_and_adds_up_their_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the order in which the host enqueues: nothing but the replay is between the events."""
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("record")

        def synchronize(self) -> None:
            seen.append("wait")

        def elapsed_time(self, _end: object) -> float:
            return 3.0  # milliseconds

    graph = SimpleNamespace(replay=lambda: seen.append("replay"))
    monkeypatch.setattr(gpu_timing, "_capture", lambda _call: graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = object.__new__(CudaGraphTimer)
    timer._other = SimpleNamespace(zero_=lambda: seen.append("flush"))  # type: ignore[assignment]
    sample = timer.prepare(lambda: None)
    assert sample(2) == pytest.approx(0.003)
    assert seen == ["flush", "record", "replay", "record", "wait"] * 2
    assert timer.shortest_sample() == 1000 * EVENT_RESOLUTION


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _product(size: int) -> Callable[[], object]:
    matrix = torch.randn(size, size, device="cuda", dtype=torch.float16)
    return lambda: matrix @ matrix


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", TIMERS["cuda"])
def test_each_mode_times_a_product_and_labels_it(name: str) -> None:
    calls = {"small": _product(256), "large": _product(8192)}
    result = time_variants(calls, rounds=5, timer=gpu_timer(name))
    for timing in result.values():
        assert timing.timer == name
        assert len(timing.samples) == 5
        assert all(sample > 0 for sample in timing.samples)
    # 32768 times the work: no noise turns these around.
    assert min(result["large"].samples) > max(result["small"].samples)


@pytest.mark.gpu
@needs_gpu
def test_kernels_take_no_longer_than_the_host_sees() -> None:
    call = _product(8192)
    kernels = time_variants({"a": call}, rounds=5, timer=KernelTimer())["a"].samples
    host = time_variants({"a": call}, rounds=5, timer=gpu_timer("host-inclusive"))["a"].samples
    assert min(kernels) < max(host)


@pytest.mark.gpu
@needs_gpu
def test_the_flush_exceeds_the_l2_cache() -> None:
    cache = torch.cuda.get_device_properties().L2_cache_size
    assert CudaGraphTimer()._other.nbytes >= 2 * cache > 0


@pytest.mark.gpu
@needs_gpu
def test_a_call_that_reads_the_gpu_on_the_host_cannot_be_captured() -> None:
    ones = torch.ones(8, device="cuda")
    with pytest.raises(MmoptError, match=r"cannot be captured as a CUDA graph.*kernel-only"):
        gpu_timer("cuda-graph-cold-l2").prepare(lambda: ones.sum().item())
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["cuda-graph-cold-l2", "kernel-only"])
def test_a_call_that_runs_on_the_cpu_is_refused(name: str) -> None:
    ones = torch.ones(8)
    with pytest.raises(MmoptError, match=r"runs nothing on the GPU"):
        gpu_timer(name).prepare(lambda: ones.sum())(1)
