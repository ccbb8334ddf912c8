"""bench/attention_cases.py: peers of a case compute the same, or their times mean nothing."""

import importlib.util
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gpu_peers
import pytest
import torch
from attention_cases import (
    CALLS,
    CPU_PEERS,
    CPU_QUICK,
    CPU_SLOW,
    GPU,
    GPU_PEERS,
    Case,
    OnePass,
    dense_mask,
    document_edges,
    runnable,
    useful_flops,
    visible_pairs,
)
from gpu_peers import Unavailable
from torch import Tensor

from mmopt.measure.suites.figures import read_figures
from mmopt.measure.timing import WallTimer
from mmopt_kernels import _triton, tuning

BENCH = Path(__file__).resolve().parent.parent / "bench"
CASES = [*CPU_QUICK, *CPU_SLOW, *GPU]

ONE_PASS = [peer for peer, build in GPU_PEERS.items() if isinstance(build, OnePass)]

# What cannot run on a CPU, in the words of whoever refuses.
REFUSALS = {
    "sdpa": "but a dense one",
    "sdpa-cudnn": "No viable backend",
    "sdpa-efficient": "No viable backend",
    "flash-attn": "flash-attn",
    "flex": "does not support backward on CPU",
    **dict.fromkeys(ONE_PASS, "with a mask at 16384 tokens"),
}


def name(case: Case) -> str:
    return f"{case.name}-{'gpu' if case in GPU else 'cpu'}"


def tiny(case: Case) -> Case:
    """The case at some 20 tokens, with every number that its mask knows made as small."""
    shrink = max(case.S, case.T) // 20
    return replace(
        case,
        B=min(case.B, 3),
        Hq=case.Hq // case.Hkv * min(case.Hkv, 2),
        Hkv=min(case.Hkv, 2),
        S=max(1, case.S // shrink),
        T=max(1, case.T // shrink),
        span=max(1, case.span // shrink) if case.span else 0,
        dtype=torch.float32,
    )


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, FlexAttention takes seconds for each case; what it computes is the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_peers_agree_in_output_and_gradients(case: Case) -> None:
    """All that can run here, at small sizes, against SDPA with the dense mask."""
    peers = {**CPU_PEERS, **GPU_PEERS}
    if case not in GPU or not _triton.interpreting():
        for peer in ("mmopt-triton", *ONE_PASS):
            del peers[peer]  # slow in the interpreter
    case = tiny(case)
    ran: dict[str, set[str]] = {direction: set() for direction in CALLS}
    refused: dict[str, str] = {}
    for direction in CALLS:
        expected = runnable(case, CPU_PEERS["sdpa-mask"], direction, "cpu")()
        expected = [expected] if direction == "forward" else expected
        for peer, build in peers.items():
            try:
                got = runnable(case, build, direction, "cpu")()
            except Unavailable as reason:
                refused[peer] = str(reason)
                continue
            ran[direction].add(peer)
            got = [got] if direction == "forward" else got
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(
                    one, other, rtol=1e-4, atol=1e-4, msg=lambda m, p=peer: f"{p}: {m}"
                )
    for peer, reason in refused.items():
        assert REFUSALS[peer] in reason, f"{peer}: {reason}"
    unmasked = {"sdpa"} if case.mask in ("full", "causal") else set()
    for found in ran.values():
        assert {"mmopt", "sdpa-mask", "sdpa-math"} | unmasked <= found
    assert "flex" in ran["forward"]
    if "mmopt-triton" in peers and case.trains:
        long = case.mask in ("images", "packed", "sliding") and case.name.endswith("16k")
        assert (set(ONE_PASS) <= ran["forward+backward"]) is long


@pytest.mark.skipif(not _triton.interpreting(), reason="tiny cases run in Triton's interpreter")
def test_one_pass_is_what_its_peers_launch_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd launches backward, which must find the tile as well."""
    case = tiny(next(case for case in GPU if case.name == "packed-16k"))
    given: dict[str, Any] = {}
    lookup = tuning.lookup

    def spy(kernel: str, *key: Any) -> tuning.Config | None:
        given[kernel] = lookup(kernel, *key)
        return given[kernel]

    monkeypatch.setattr(tuning, "lookup", spy)
    tiles = []
    for peer in ("mmopt-triton", *ONE_PASS):
        given.clear()
        runnable(case, GPU_PEERS[peer], "forward+backward", "cpu")
        tile = given["attention_backward_one_pass"]
        tiles.append(tile and f"{tile['BLOCK_M']}x{tile['BLOCK_N']}")
    assert tiles == [None, *(peer.removeprefix("mmopt-one-pass-") for peer in ONE_PASS)]


@pytest.fixture
def documented_flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """flash-attn's two functions after its README, in plain torch; says which were called."""
    called = []

    def one(q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int) -> Tensor:
        # [H, S, D]; "the query at i attends to keys between i - window_size[0] and ..."
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        hidden = (j > i) & causal | (left >= 0) & (j < i - left)
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        scores = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(hidden, -torch.inf)
        return scores.softmax(2) @ v

    def flash_attn_func(q, k, v, *, causal, window_size):  # type: ignore[no-untyped-def]
        called.append("dense")
        rows = [
            one(*(x[b].transpose(0, 1) for x in (q, k, v)), causal, window_size[0])
            for b in range(len(q))
        ]
        return torch.stack(rows).transpose(1, 2)

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal
    ):
        called.append("varlen")
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        edges = cu_seqlens_q.tolist()
        parts = [
            one(*(x[a:b].transpose(0, 1) for x in (q, k, v)), causal, -1).transpose(0, 1)
            for a, b in pairwise(edges)
        ]
        return torch.cat(parts)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    package.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return called


@pytest.mark.parametrize("case", GPU, ids=name)
def test_flash_attn_is_given_the_same_mask(case: Case, documented_flash_attn: list[str]) -> None:
    """It is not installed here: what it is called with is held against its documentation."""
    case = tiny(case)
    try:
        got = runnable(case, GPU_PEERS["flash-attn"], "forward", "cpu")()
    except Unavailable:
        assert case.mask in ("images", "padded")
        return
    expected = runnable(case, CPU_PEERS["sdpa-mask"], "forward", "cpu")()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert set(documented_flash_attn) == {"varlen" if case.mask == "packed" else "dense"}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_useful_work_counts_the_pairs_of_the_dense_mask(case: Case) -> None:
    case = tiny(case)
    mask = dense_mask(case, "cpu")
    seen = torch.ones(case.S, case.T) if mask is None else mask
    pairs = int(seen.expand(case.B, case.Hq, case.S, case.T).sum())
    assert visible_pairs(case) == pairs
    assert useful_flops(case, "forward") == 4 * case.D * pairs
    assert useful_flops(case, "forward+backward") == 14 * case.D * pairs


def test_documents_are_skewed_and_images_leave_text_around_them() -> None:
    packed, images = (next(c for c in GPU if c.mask == mask) for mask in ("packed", "images"))
    lengths = torch.tensor(document_edges(packed)).diff().tolist()
    assert sum(lengths) == packed.S
    assert lengths[0] == packed.S // 2
    assert lengths[0] >= 16 * lengths[-1] > 0
    mask = dense_mask(images, "cpu")[0, 0]
    forward = mask.triu(1).sum(1) > 0  # queries that see a later key
    assert 0.2 < float(forward.float().mean()) < 0.3
    assert not forward[: images.span].any()


def test_memory_of_the_op_is_linear_in_the_length() -> None:
    """Recorded at a length and at twice that: what grew with its square would be four times."""
    figures = read_figures(BENCH / "baselines/exact.json")
    bytes_of = {
        found.groups(): figure.value
        for key, figure in figures.items()
        if (found := re.search(r"attention_memory\[(\w+)-(1024|2048)\]::(.*)", key))
    }
    at_length = {key: value for key, value in bytes_of.items() if key[1] == "1024"}
    assert len(at_length) == 6
    for (mask, _, what), value in at_length.items():
        assert bytes_of[mask, "2048", what] <= 2.1 * value


# --- bench_gpu.py, all but the GPU ----------------------------------------------------------------


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The suite with the CPU in place of the GPU, and the wall clock in place of its timer."""
    import mmopt.measure.gpu_timing as gpu_timing

    spec = importlib.util.spec_from_file_location("loaded_bench_gpu", BENCH / "bench_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)  # dataclasses look themselves up
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(gpu_timing, "gpu_timer", lambda _name: WallTimer())
    monkeypatch.setattr(gpu_peers, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_peers, "peak_allocated", lambda _call: 123)
    monkeypatch.setattr(loaded, "ATTENTION_ROUNDS", 3)
    monkeypatch.setattr(
        loaded, "GPU_PEERS", {x: GPU_PEERS[x] for x in ("mmopt", "sdpa-cudnn", "sdpa-math")}
    )
    return loaded


def test_a_gpu_case_times_its_peers_against_each_other_once(bench_gpu: ModuleType) -> None:
    case = tiny(next(case for case in GPU if case.mask == "images"))
    found = bench_gpu.measured(case, "forward+backward")
    assert "No viable backend" in found["sdpa-cudnn"]
    replayed = {}
    for peer in ("mmopt", "sdpa-math"):
        benchmark = SimpleNamespace(extra_info={}, group=None)
        benchmark.pedantic = lambda call, rounds, iterations: [
            call() for _ in range(rounds * iterations)
        ]
        before = bench_gpu.CLOCK()
        bench_gpu.bench_gpu_attention(benchmark, case, "forward+backward", peer)
        replayed[peer] = bench_gpu.CLOCK() - before
        timing = found[peer].timing
        assert len(timing.samples) == 3
        assert replayed[peer] == pytest.approx(sum(timing.samples) * timing.calls)
        assert benchmark.extra_info["peak_bytes"] == 123
        assert benchmark.extra_info["useful_tflops_per_s"] == pytest.approx(
            14 * case.D * visible_pairs(case) / sorted(timing.samples)[1] / 1e12
        )
    assert bench_gpu.measured(case, "forward+backward") is found
    with pytest.raises(pytest.skip.Exception, match="No viable backend"):
        bench_gpu.bench_gpu_attention(benchmark, case, "forward+backward", "sdpa-cudnn")
