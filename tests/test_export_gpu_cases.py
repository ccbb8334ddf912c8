"""bench/export_gpu_cases.py on the CPU: peers of a case compute the same."""

import functools
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import export_gpu_cases
import gpu_peers
import numpy as np
import pytest
import torch
from export_gpu_cases import (
    DECODER_CASES,
    DECODER_PEERS,
    ENCODER_CASES,
    ENCODER_PEERS,
    Case,
    runnable,
)
from gpu_peers import Unavailable

from mmopt.measure.timing import WallTimer

BENCH = Path(__file__).resolve().parent.parent / "bench"

TINY = (
    ("vocab_size", 96),
    ("hidden_size", 32),
    ("num_hidden_layers", 2),
    ("num_attention_heads", 4),
    ("intermediate_size", 48),
    ("max_position_embeddings", 64),
)
EMBED = Case("embed", 3, 7, changes=TINY)
PREFILL = Case("prefill", 2, 6, 4, changes=(*TINY, ("num_key_value_heads", 4)))
DECODE = replace(PREFILL, action="decode")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Dynamo traces what is compiled, which runs op by op: Inductor would take seconds for each."""
    torch.compiler.reset()
    real = torch.compile

    def compile_(function: Any, *, mode: str, **options: Any) -> Any:
        assert mode in ("default", "reduce-overhead")
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.parametrize("build", ENCODER_PEERS.values(), ids=ENCODER_PEERS)
def test_encoders_embed_alike(build: Any) -> None:
    """`runnable` compares them with eager; inputs and output stay where they are."""
    call = runnable(EMBED, build, "cpu")
    eager = runnable(EMBED, ENCODER_PEERS["eager"], "cpu")()
    torch.testing.assert_close(call(), eager, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_decoders_choose_the_same_tokens_call_after_call() -> None:
    """In fp32; a call begins where the one before it began."""
    for case in (PREFILL, DECODE):
        found = {}
        for peer, build in DECODER_PEERS.items():
            call = runnable(case, build, "cpu")
            found[peer] = call()
            assert call() == found[peer], peer
        assert found["compiled"] == found["eager"]
        new = case.new if case is DECODE else 1
        ours = [[step[row] for step in found["mmopt"]] for row in range(case.batch)]
        assert np.shape(ours) == (case.batch, new)
        assert ours == np.reshape(found["eager"], (case.batch, new)).tolist()


def test_a_peer_that_disagrees_or_fails_says_so() -> None:
    def other(case: Case, device: str) -> Any:
        peer = ENCODER_PEERS["eager"](case, device)
        return replace(peer, check=lambda: peer.check().flip(0))

    def broken(case: Case, device: str) -> Any:
        raise RuntimeError("no such\nkernel")

    with pytest.raises(Unavailable, match=r"cosine with eager is -?0\.\d+, expected above 0\.999"):
        runnable(EMBED, other, "cpu")
    with pytest.raises(Unavailable, match="RuntimeError: no such kernel"):
        runnable(EMBED, broken, "cpu")


def test_an_artifact_that_is_not_whole_on_the_device_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement = SimpleNamespace(lines=lambda: ["ArgMax ran on CPUExecutionProvider"])
    report = SimpleNamespace(exit_code=1, status="failed", placement=(placement,))
    monkeypatch.setattr(export_gpu_cases, "exported", lambda _model, _device: report)
    with pytest.raises(Unavailable, match="the artifact is failed: ArgMax ran on CPU"):
        runnable(PREFILL, DECODER_PEERS["mmopt"], "cpu")


def test_the_cases_are_those_that_the_question_names() -> None:
    shapes = {(case.batch, case.length) for case in ENCODER_CASES}
    assert shapes == {(1, 16), (8, 128), (32, 64), (32, 512)}
    decoded = {(case.action, case.batch, case.length, case.new) for case in DECODER_CASES}
    assert decoded == {(a, b, 512, 32) for a in ("prefill", "decode") for b in (1, 8)}


# --- bench_export.py, all but the GPU -------------------------------------------------------------


@pytest.fixture
def bench_export(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The suite with the CPU in place of the GPU, and the wall clock in place of its timer."""
    import mmopt.measure.gpu_timing as gpu_timing

    spec = importlib.util.spec_from_file_location("loaded_bench_export", BENCH / "bench_export.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(gpu_timing, "gpu_timer", WallTimer)
    monkeypatch.setattr(gpu_peers, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_peers, "peak_allocated", lambda _call: 0)
    monkeypatch.setattr(loaded, "GPU_ROUNDS", 3)
    return loaded


@pytest.mark.parametrize("case", [EMBED, PREFILL, DECODE], ids=lambda case: case.action)
def test_samples_are_those_of_a_call_or_of_one_of_its_tokens(
    bench_export: ModuleType, case: Case
) -> None:
    found = bench_export.measured(case)
    assert set(found) == set(ENCODER_PEERS if case is EMBED else DECODER_PEERS)
    for peer in found:
        replayed: list[float] = []
        benchmark = SimpleNamespace(extra_info={}, group=None)
        benchmark.pedantic = functools.partial(clocked, bench_export.CLOCK, replayed)
        bench_export.bench_gpu_export(benchmark, case, peer)
        each, tokens = (case.new, 1) if case is DECODE else (1, case.length)
        expected = [seconds / each for seconds in found[peer].timing.samples]
        assert replayed == pytest.approx(expected)
        assert benchmark.extra_info["timer"] == found[peer].timing.timer == "host-inclusive"
        rate = case.batch * tokens / sorted(expected)[1]
        assert benchmark.extra_info["tokens_per_s"] == pytest.approx(rate)
        assert benchmark.extra_info.get("artifact") == ("verified" if peer == "mmopt" else None)


def clocked(clock: Any, into: list[float], call: Any, rounds: int, iterations: int) -> None:
    """What pytest-benchmark does: seconds of a call, by its clock."""
    for _ in range(rounds):
        before = clock()
        for _ in range(iterations):
            call()
        into.append((clock() - before) / iterations)
