"""`mmopt.measure.memory`: peaks of a fresh process, of torch's allocator and of ORT's arena."""

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fake_nvml import FakeGpu, FakeNvml
from mmopt.measure import memory
from mmopt.measure.memory import (
    OrtArena,
    ort_arena,
    peak_memory,
    peak_resident_bytes,
    peak_tensor_bytes,
    watch_device_memory,
)
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


FLOAT = 4


def test_tensor_peak_is_the_most_that_was_live_at_once() -> None:
    def call() -> None:
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        c = torch.empty(500)  # 2500 live now, 3000 before
        del b, c

    assert peak_tensor_bytes(call) == 3000 * FLOAT


def test_tensor_peak_of_a_layer_is_its_output_and_repeats_exactly() -> None:
    layer = torch.nn.Linear(64, 96)
    x = torch.randn(7, 64)

    def call() -> None:
        with torch.inference_mode():
            layer(x)

    assert {peak_tensor_bytes(call) for _ in range(5)} == {7 * 96 * FLOAT}


def test_tensor_peak_has_the_backward_and_tells_an_extra_copy_apart() -> None:
    x = torch.randn(128, 128)
    weight = torch.randn(128, 128, requires_grad=True)

    def step(copies: int) -> None:
        y = x @ weight
        kept = [y.clone() for _ in range(copies)]
        torch.autograd.grad(y.sum(), weight)
        del kept

    square = 128 * 128 * FLOAT
    plain = peak_tensor_bytes(lambda: step(0))
    # y and the gradient of the weight, at the least; sum's gradient is expanded, not stored.
    assert plain >= 2 * square
    assert peak_tensor_bytes(lambda: step(1)) == plain + square


def test_tensor_peak_leaves_out_what_was_there_before_and_what_is_not_torch_s() -> None:
    before = [torch.zeros(100_000)]

    def call() -> None:
        before.clear()  # released in the first run; nothing to release in the second
        np.ones(1_000_000)
        torch.empty(10)

    assert peak_tensor_bytes(call) == 10 * FLOAT


def test_tensor_peak_of_nothing_is_zero() -> None:
    assert peak_tensor_bytes(lambda: None) == 0


def test_tensor_peak_counts_the_second_run_only() -> None:
    sizes = iter((1000, 10))
    assert peak_tensor_bytes(lambda: torch.empty(next(sizes))) == 10 * FLOAT


def test_release_of_a_block_from_before_is_not_subtracted() -> None:
    allocations = [(1, 0xA, 100), (2, 0xB, -5000), (3, 0xC, 50), (4, 0xA, -100), (5, 0xD, 120)]
    assert memory._peak(allocations) == 170


def test_the_profiler_keeps_stderr_and_the_environment_clean() -> None:
    """Progress and errors go to stderr; Kineto would write its stages there."""
    code = (
        "import os, torch\n"
        "from mmopt.measure.memory import peak_tensor_bytes\n"
        "print(peak_tensor_bytes(lambda: torch.empty(3)), 'KINETO_LOG_LEVEL' in os.environ)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("12 False\n", "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """`exp(x @ w) @ w` with w `[64, 64]`, as an ONNX file."""
    shape = ["rows", 64]
    w = numpy_helper.from_array(np.full((64, 64), 0.01, np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Exp", ["y"], ["z"]),
        helper.make_node("MatMul", ["z", "w"], ["out"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "out")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [w])
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def test_ort_arena_holds_what_a_run_needs_and_repeats_exactly(model: Path) -> None:
    rows = 4096
    feeds = {"x": np.ones((rows, 64), np.float32)}
    found = [ort_arena(model, feeds) for _ in range(3)]
    if found[0] is None:
        pytest.skip("this ONNX Runtime does not record its arena in the profile")
    assert found[0] == found[1] == found[2]
    # y and z at once: two activations of rows x 64; the whole graph has three of them.
    activation = rows * 64 * FLOAT
    assert 2 * activation <= found[0].in_use_bytes <= 4 * activation
    assert found[0].held_bytes >= found[0].in_use_bytes


def test_ort_arena_of_a_model_that_cannot_run_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MmoptError, match=r"cannot run .*model\.onnx"):
        ort_arena(model, {"x": np.ones((2, 3), np.float32)})
    with pytest.raises(MmoptError, match=r"cannot load .*absent\.onnx"):
        ort_arena(tmp_path / "absent.onnx", {})


def test_ort_arena_adds_up_providers_and_is_none_where_nothing_is_recorded() -> None:
    def node(provider: str, held: int, in_use: int) -> dict[str, object]:
        figures = {"mem_arena_held": str(held), "mem_in_use_peak": str(in_use)}
        return {"args": {"provider": provider, **figures}}

    events = [{"args": {}}, {}, node("A", 10, 5), node("A", 30, 9), node("B", 7, 7)]
    assert memory._arena_peaks(events) == OrtArena(held_bytes=37, in_use_bytes=16)
    assert memory._arena_peaks([{"args": {"provider": "A"}}, {"name": "model_run"}]) is None


def _cuda_in_use(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    """Let the code believe that torch uses the GPU with this uuid."""
    cuda = SimpleNamespace(
        is_initialized=lambda: True, get_device_properties=lambda: SimpleNamespace(uuid=uuid)
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_device_memory_is_the_growth_on_torch_s_gpu_with_what_was_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, ours = FakeGpu("GPU-other", used=900), FakeGpu("GPU-ours", used=100)
    library = FakeNvml([other, ours])
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(memory, "DEVICE_SAMPLE_SECONDS", 0.001)
    _cuda_in_use(monkeypatch, "ours")
    before = threading.active_count()
    with watch_device_memory() as growth:
        other.used, ours.used = 5000, 750
        deadline = time.monotonic() + 30
        while growth() != 650:
            assert time.monotonic() < deadline, "the sampling thread never looked"
            time.sleep(0.001)
        ours.used = 300
    assert growth() == 650
    assert library.opened == 0
    assert threading.active_count() == before


def test_device_memory_is_none_without_the_library_or_without_cuda_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    _cuda_in_use(monkeypatch, "ours")
    with watch_device_memory() as growth:
        pass
    assert growth() is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([FakeGpu("GPU-ours")]))
    monkeypatch.setitem(sys.modules, "torch", None)
    with watch_device_memory() as growth:
        pass
    assert growth() is None


@pytest.mark.gpu
def test_device_memory_and_torch_s_peaks_see_a_tensor_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    peak = peak_memory(exec, "import torch; torch.ones(64 << 20, device='cuda')")
    assert peak.torch_allocated_bytes is not None
    assert peak.torch_reserved_bytes is not None
    assert 256 << 20 <= peak.torch_allocated_bytes <= peak.torch_reserved_bytes
    try:
        import pynvml  # noqa: F401
    except ImportError:
        assert peak.device_bytes is None
    else:
        assert peak.device_bytes is not None
        assert peak.device_bytes >= 256 << 20
