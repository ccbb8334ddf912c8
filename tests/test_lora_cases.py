"""bench/lora_cases.py: peers of a case compute the same, or their times mean nothing."""

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gpu_peers
import pytest
import torch
from gpu_peers import Unavailable
from lora_cases import (
    CPU_PEERS,
    CPU_QUICK,
    CPU_SLOW,
    DIRECTIONS,
    GPU,
    GPU_GRID,
    GPU_PEERS,
    NAME,
    ROWS,
    SCALE,
    SHAPES,
    Case,
    least_bytes,
    peft,
    runnable,
    tensors,
)

from mmopt.measure.timing import WallTimer
from mmopt_kernels import _triton

BENCH = Path(__file__).resolve().parent.parent / "bench"

# One of each kind: what makes a difference to what a peer runs.
KINDS = (
    Case("dense", 9, 64, (48,)),
    Case("group", 9, 64, (48, 16, 16), R=5),
    Case("adapter32", 9, 64, (48,), dtype=torch.bfloat16),
    Case("nf4", 9, 64, (48,), base="nf4"),
    Case("nf4-group", 9, 64, (48, 16, 16), base="nf4"),
    Case("one-row", 1, 64, (48,)),
)
REFUSALS = {
    "unsloth": "unsloth is not installed",
    "lorafusion": "lorafusion is not installed",
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds for each case; what is computed is the same."""
    monkeypatch.setattr(torch, "compile", lambda **_options: lambda function: function)


def flat(result: object) -> list[torch.Tensor]:
    return [x for x in result if x is not None]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", KINDS, ids=NAME)
def test_peers_agree_in_outputs_and_gradients(case: Case, direction: str) -> None:
    """All that can run here, against PEFT's form; the floor leaves the adapters out."""
    pytest.importorskip("bitsandbytes")
    expected = flat(runnable(case, peft, direction)())
    ran, refused = set(), {}
    for peer, build in GPU_PEERS.items():
        if peer == "base" or (peer == "mmopt-triton" and not _triton.interpreting()):
            continue
        try:
            got = flat(runnable(case, build, direction)())
        except Unavailable as reason:
            refused[peer] = str(reason)
            continue
        ran.add(peer)
        tolerance = 1e-4 if case.dtype is torch.float32 else 5e-2
        for one, other in zip(got, expected, strict=True):
            error = (one.float() - other.float()).norm() / other.float().norm()
            assert error <= tolerance, f"{peer}: {error}"
    for peer, said in refused.items():
        assert REFUSALS[peer] in said, f"{peer}: {said}"
    assert {"mmopt", "mmopt-addmm", "peft", "peft-compiled"} <= ran


@pytest.mark.parametrize("case", KINDS, ids=NAME)
def test_the_floor_is_the_frozen_layer_alone(case: Case) -> None:
    """What the adapters add to it makes PEFT's output; only x gets a gradient."""
    pytest.importorskip("bitsandbytes")
    t = tensors(case)
    floor = runnable(case, CPU_PEERS["base"], "forward")()
    whole = runnable(case, peft, "forward")()
    for base, y, a, b in zip(floor, whole, t.a, t.b, strict=True):
        with torch.no_grad():
            adapted = base.float() + SCALE * (t.x.float() @ a.T) @ b.T
        torch.testing.assert_close(y.float(), adapted, rtol=3e-2, atol=3e-2)
    gradients = runnable(case, CPU_PEERS["base"], "forward+backward")()
    assert [gradient is not None for gradient in gradients] == [True] + [False] * 2 * len(case.N)


def test_dropout_is_in_training_and_in_forward_alike() -> None:
    """Two calls draw two masks, whichever the peer."""
    case = replace(KINDS[0], dropout=0.5)
    for peer in ("mmopt", "mmopt-addmm", "peft"):
        call = runnable(case, GPU_PEERS[peer], "forward")
        assert not torch.equal(call()[0], call()[0]), peer


def test_the_grid_has_every_property_of_the_issue_and_the_subset_every_shape() -> None:
    assert len(GPU_GRID) == len({case.name for case in GPU_GRID}) == 576
    assert {case.M for case in GPU_GRID} == set(ROWS)
    shapes = {(K, N) for model in SHAPES.values() for K, N in model}
    assert {(case.K, case.N[0]) for case in GPU_GRID if len(case.N) == 1} == shapes
    assert set(GPU) < set(GPU_GRID)
    assert {(case.K, case.N) for case in GPU} == {(case.K, case.N) for case in GPU_GRID}
    varied = [case for case in GPU if (case.K, case.N) == (4096, (4096,))]
    assert {case.M for case in varied} == set(ROWS)
    assert {case.R for case in varied} == {8, 16, 64}
    assert Counter(case.dropout > 0 for case in varied)[True] == 1
    assert Counter(case.base for case in varied)["nf4"] == 1
    assert len(GPU) <= 30  # `make gpu` stays a matter of minutes


def test_least_bytes_are_those_of_the_tensors() -> None:
    """Counted on real tensors: x, weights, adapters and outputs once forward."""
    for case in (*KINDS, *CPU_QUICK, *CPU_SLOW):
        t = tensors(replace(case, M=min(case.M, 64)))
        case = replace(case, M=min(case.M, 64))

        def size(tensor: torch.Tensor) -> int:
            return tensor.numel() * tensor.element_size()

        x = size(t.x)
        weights = sum(
            size(w) if isinstance(w, torch.Tensor) else size(w.packed) + size(w.absmax)
            for w in t.weights
        )
        adapters = sum(map(size, [*t.a, *t.b]))
        y = case.M * sum(case.N) * t.x.element_size()
        s = case.M * case.R * len(case.N) * t.x.element_size()
        assert least_bytes(case, "forward") == x + weights + adapters + y
        both = 3 * x + 2 * weights + 3 * adapters + 2 * y + 2 * s
        assert least_bytes(case, "forward+backward") == both


# --- bench_lora.py, all but the GPU ---------------------------------------------------------------


@pytest.fixture
def bench_lora(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The suite with the CPU in place of the GPU, and the wall clock in place of its timer."""
    import mmopt.measure.gpu_timing as gpu_timing

    spec = importlib.util.spec_from_file_location("loaded_bench_lora", BENCH / "bench_lora.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(gpu_timing, "gpu_timer", lambda _name: WallTimer())
    monkeypatch.setattr(gpu_peers, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_peers, "peak_allocated", lambda _call: 123)
    monkeypatch.setattr(loaded, "ROUNDS", 3)
    chosen = ("mmopt", "peft", "unsloth")
    monkeypatch.setattr(loaded, "GPU_PEERS", {peer: GPU_PEERS[peer] for peer in chosen})
    return loaded


def test_a_gpu_case_times_its_peers_against_each_other_once(bench_lora: ModuleType) -> None:
    case = KINDS[1]
    found = bench_lora.measured(case, "forward+backward")
    assert found["unsloth"] == "unsloth is not installed"
    for peer in ("mmopt", "peft"):
        benchmark = SimpleNamespace(extra_info={}, group=None)
        benchmark.pedantic = lambda call, rounds, iterations: [
            call() for _ in range(rounds * iterations)
        ]
        before = bench_lora.CLOCK()
        bench_lora.bench_gpu_lora(benchmark, case, "forward+backward", peer)
        timing = found[peer].timing
        replayed = bench_lora.CLOCK() - before
        assert replayed == pytest.approx(sum(timing.samples) * timing.calls)
        assert benchmark.extra_info["peak_bytes"] == 123
        least = least_bytes(case, "forward+backward")
        assert benchmark.extra_info["least_bytes_per_s"] == pytest.approx(
            least / sorted(timing.samples)[1]
        )
    assert bench_lora.measured(case, "forward+backward") is found
    with pytest.raises(pytest.skip.Exception, match="unsloth is not installed"):
        bench_lora.bench_gpu_lora(benchmark, case, "forward+backward", "unsloth")
