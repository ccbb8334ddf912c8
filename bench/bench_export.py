"""Exporting a small adapted model: what the artifact weighs, and the steps that a user waits for.

Exact: bytes, nodes and initializers of the graph, memory that ONNX Runtime uses for it.

The slow ones hold exported models beside those of others on this machine's CPU: a Llama of 124M
against onnxruntime-genai, all-MiniLM-L6-v2 against transformers' exporters and OpenVINO. Every peer
has a process of its own, and they take turns; a peer that is not installed is skipped with its
reason (`pip install onnxruntime-genai openvino nncf`). About 15 minutes on 2 cores:
`mmopt bench run bench/bench_export.py -k peers -- -m slow`.

On a GPU, with `-m gpu`: ONNX Runtime's CUDA provider beside torch.compile, on models of the same
sizes with random weights.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_gpu_cases as gpu_cases
import gpu_peers
import numpy as np
import onnx
import pytest
import torch
from export_peers import (
    DECODERS,
    ENCODER_SHAPES,
    ENCODERS,
    NEW,
    PROMPT,
    THREADS,
    built,
    in_turns,
    save_llama,
)
from gpu_peers import CLOCK, Measured, time_peers

from mmopt.measure.memory import ort_arena
from mmopt.measure.timing import Timing
from mmopt_export import export
from mmopt_export.integrity import integrity_errors
from mmopt_export.manifest import read_manifest
from mmopt_export.quantization import Recipe, quantize
from mmopt_export.runtime import MODEL_NAME, Runner

ROWS, LENGTH = 4, 32


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def exact_artifact(figures: Any, artifacts: dict[str, Path], precision: str) -> None:
    # The graph and its weights: what the other files weigh depends on where the export ran.
    artifact = artifacts[precision]
    graph = onnx.load(artifact / MODEL_NAME, load_external_data=False).graph
    weights = [path for path in artifact.iterdir() if path.name.startswith(MODEL_NAME)]
    figures.record("model bytes", sum(path.stat().st_size for path in weights), unit="bytes")
    figures.record("nodes", len(graph.node))
    figures.record("initializers", len(graph.initializer))


def exact_runtime_memory(figures: Any, artifacts: dict[str, Path]) -> None:
    # fp32 only: the kernels for int8, and how they pack weights, differ between processors.
    shape = (ROWS, LENGTH)
    feeds = {
        spec.name: np.ones(shape, dtype=spec.dtype)
        for spec in read_manifest(artifacts["fp32"]).inputs
    }
    arena = ort_arena(artifacts["fp32"] / MODEL_NAME, feeds, threads=1)
    assert arena is not None, "this ONNX Runtime does not record its arena: use the pinned version"
    figures.record("arena bytes in use", arena.in_use_bytes, unit="bytes")


def bench_quantize(benchmark: Any, artifacts: dict[str, Path], tmp_path: Path) -> None:
    # Times reading the fp32 graph, quantizing it and writing it.
    benchmark.group = "export steps"
    source = artifacts["fp32"] / MODEL_NAME
    names = [spec.name for spec in read_manifest(artifacts["fp32"]).inputs]
    feeds = [{name: np.ones((ROWS, LENGTH), dtype=np.int64) for name in names}]
    benchmark(lambda: quantize(source, tmp_path / MODEL_NAME, Recipe("int8", "dynamic"), feeds))


def bench_check_files(benchmark: Any, artifacts: dict[str, Path]) -> None:
    # Times reading the manifest and hashing every file, warm in the page cache.
    benchmark.group = "export steps"
    artifact = artifacts["fp32"]
    assert integrity_errors(artifact, read_manifest(artifact)) == []
    benchmark(lambda: integrity_errors(artifact, read_manifest(artifact)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def bench_open(benchmark: Any, artifacts: dict[str, Path], precision: str) -> None:
    # Times what a server does before it can answer: check, open the session, load the tokenizer.
    benchmark.group = "export open"
    benchmark(lambda: Runner(artifacts[precision], threads=1))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def bench_export(benchmark: Any, tiny_bert: Any, tmp_path: Path, precision: str) -> None:
    # Times the whole export, parity and all; each into a folder of its own.
    benchmark.group = "export whole"
    model, made = str(tiny_bert.save(tmp_path / "model")), iter(range(1000))
    benchmark.pedantic(
        lambda: export(model, tmp_path / f"{precision}-{next(made)}", precision=precision),
        rounds=5,
        warmup_rounds=1,
    )


# ---------------------------------------------------------------- beside others

PROCESSES, ROUNDS = 3, 5

SHAPES = tuple(f"{batch}x{length}" for batch, length in ENCODER_SHAPES)


@functools.cache
def scratch() -> Path:
    """Where models are built; removed with the process."""
    folder = tempfile.TemporaryDirectory(prefix="mmopt-export-peers-")
    _KEPT.append(folder)
    save_llama(Path(folder.name) / "llama")
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def builds(case: str) -> dict[str, dict[str, Any] | str]:
    """What building each peer's model took, or why it was not built."""
    names = ENCODERS if case == "encoder" else DECODERS
    return {name: built(case, name, scratch() / f"{case}-{name}") for name in names}


@functools.cache
def runs(case: str) -> dict[str, dict[str, tuple[list[float], Any]]]:
    """What each peer that was built needed."""
    folders = {
        name: scratch() / f"{case}-{name}"
        for name, said in builds(case).items()
        if not isinstance(said, str)
    }
    encoder = case == "encoder"
    return in_turns(
        case,
        folders,
        SHAPES if encoder else ("prefill", "decode"),
        rounds=ROUNDS,
        processes=PROCESSES,
        warm=2 if encoder else 0,
        once=("sentences",) if encoder else (),
    )


def found(case: str, peer: str) -> dict[str, tuple[list[float], Any]]:
    """The runs of a peer; skips where it was not built."""
    said = builds(case)[peer]
    if isinstance(said, str):
        pytest.skip(said)
    return runs(case)[peer]


def replay(benchmark: Any, samples: list[float]) -> None:
    """Hand the samples over."""
    benchmark.extra_info["threads"] = THREADS
    CLOCK.replay(benchmark, Timing(samples, 1, 0.0, False))


@pytest.mark.slow
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("peer", DECODERS)
@pytest.mark.parametrize("action", ["prefill", "decode"])
def bench_peers_decoder(benchmark: Any, action: str, peer: str) -> None:
    # Times the prompt up to the first new token, or 64 more tokens, one row.
    benchmark.group = f"llama-124m {action}"
    samples, tokens = found("decoder", peer)[action]
    # Those that quantize the same weights as this peer.
    alike = "mmopt-float-embeddings-int4" if "genai" in peer and "int4" in peer else None
    ours = runs("decoder").get(alike or f"mmopt-{peer.rpartition('-')[2]}")
    same = None
    if ours is not None:
        pairs = list(zip(tokens, ours[action][1], strict=True))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    benchmark.extra_info |= {
        "tokens": PROMPT if action == "prefill" else NEW,
        "tokens_per_s": (PROMPT if action == "prefill" else NEW) / float(np.median(samples)),
        "equal_tokens": same,
    }
    replay(benchmark, samples)


@pytest.mark.slow
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("peer", ENCODERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_peers_encoder(benchmark: Any, shape: str, peer: str) -> None:
    # Times ids to normalized sentence embeddings.
    benchmark.group = f"minilm {shape}"
    samples, _ = found("encoder", peer)[shape]
    embeddings = np.array(found("encoder", peer)["sentences"][1])
    plain = np.array(found("encoder", "exporters-fp32")["sentences"][1])
    cosines = (embeddings * plain).sum(1)
    benchmark.extra_info |= {"cosine": float(cosines.mean()), "worst_cosine": float(cosines.min())}
    replay(benchmark, samples)


@pytest.mark.slow
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("peer", ENCODERS)
def bench_peers_build_encoder(benchmark: Any, peer: str) -> None:
    # Times the export in a fresh process, after its imports; ours with parity and calibration.
    benchmark.group = "build minilm"
    build(benchmark, "encoder", peer)


@pytest.mark.slow
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("peer", [peer for peer in DECODERS if not peer.startswith("eager")])
def bench_peers_build_decoder(benchmark: Any, peer: str) -> None:
    # Times the export in a fresh process; ours with parity.
    benchmark.group = "build llama-124m"
    build(benchmark, "decoder", peer)


def build(benchmark: Any, case: str, peer: str) -> None:
    said = builds(case)[peer]
    if isinstance(said, str):
        pytest.skip(said)
    benchmark.extra_info["peak_bytes"] = said["peak_bytes"]
    replay(benchmark, [said["seconds"]])


# ---------------------------------------------------------------- beside torch.compile, on a GPU

GPU_ROUNDS = 20
# What a caller waits for: decoding has a part on the host, which no CUDA graph shows.
GPU_TIMER = "host-inclusive"


@functools.lru_cache(maxsize=1)
def measured(case: gpu_cases.Case) -> dict[str, Measured | str]:
    """Every peer, timed against the others; a string says why a peer is not among them."""
    torch.compiler.reset()
    return time_peers(
        {
            peer: functools.partial(gpu_cases.runnable, case, build, gpu_peers.DEVICE)
            for peer, build in gpu_cases.PEERS[case.action].items()
        },
        rounds=GPU_ROUNDS,
        timer=GPU_TIMER,
    )


def gpu_runs() -> list[Any]:
    """Each case with each of its peers."""
    return [
        pytest.param(case, peer, id=f"{case.name}-{peer}")
        for case in gpu_cases.CASES
        for peer in gpu_cases.PEERS[case.action]
    ]


@pytest.mark.gpu
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "peer"), gpu_runs())
def bench_gpu_export(benchmark: Any, case: gpu_cases.Case, peer: str) -> None:
    # Times ids to embeddings, both on the GPU; a prompt up to the first new token; or one of the
    # tokens after it, of which a call decodes all. What can be compiled or allocated is, before.
    benchmark.group = f"gpu export {case.name}"
    result = measured(case)[peer]
    if isinstance(result, str):
        pytest.skip(result)
    samples = [seconds / case.steps for seconds in result.timing.samples]
    benchmark.extra_info |= {
        "timer": GPU_TIMER,
        "case": str(case),
        "tokens_per_s": case.tokens / float(np.median(samples)),
    }
    if peer == "mmopt":
        report = gpu_cases.exported(gpu_cases.checkpoint(case), gpu_peers.DEVICE)
        benchmark.extra_info["artifact"] = report.status
    CLOCK.replay(benchmark, replace(result.timing, samples=samples))
