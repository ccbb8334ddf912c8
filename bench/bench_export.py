"""Exporting a small adapted model: what the artifact weighs, and the steps that a user waits for.

Exact: bytes, nodes and initializers of the graph, memory that ONNX Runtime uses for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mmopt.measure.memory import ort_arena
from mmopt_export import export
from mmopt_export.manifest import integrity_errors, read_manifest
from mmopt_export.quantize import quantize_int8
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
    benchmark(lambda: quantize_int8(source, tmp_path / MODEL_NAME))


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
