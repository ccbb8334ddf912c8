"""Holds an exported graph against the PyTorch model it came from.

Many figures are reported; one thing gates, per precision, in `THRESHOLDS`. Finiteness is checked
first: a NaN never passes. A figure that was not measured is None.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from mmopt_export.runtime import Tensors, runtime_errors
from mmopt_kernels.errors import MmoptError

PARITY_NAME = "parity.json"
_STORED_PER_KIND = 4
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Threshold:
    """What a stage must reach: cosine at least, and where given, max abs difference at most."""

    cosine: float
    max_abs: float | None


# fp32 as strict as onnxruntime/mobius's fp32 tier. int8: the worst that still reads as the same
# classifier on real sentences; the demo's measured value is in bench/results.
THRESHOLDS = {"fp32": Threshold(0.9999, 1e-4), "int8": Threshold(0.99, None)}


@dataclass(frozen=True)
class Sample:
    """One batch that the graph is held against.

    Attributes:
        kind: `text` for sentences, `grid` for seeded random ids over batch, length and padding.
        feeds: int64 `[B, L]` per input.
        expected: the PyTorch model's fp32 logits `[B, C]`.
    """

    kind: str
    feeds: Tensors
    expected: Logits


@dataclass(frozen=True)
class StageParity:
    """One stage held against PyTorch on one kind of samples.

    Attributes:
        stage: `fp32-unoptimized`, `fp32` or the artifact's precision.
        kind: which samples.
        rows: how many logits rows were compared.
        finite: whether every value was finite; without it nothing else counts.
        max_abs, mean_abs: difference of the logits.
        cosine: of all logits of the stage as one vector.
        worst_cosine: the smallest over rows.
        argmax_agreement: share of rows with the same winner.
        gates: whether `holds` decides the report; quantized stages gate on sentences where there
            are any, since random ids are nothing the model was trained on.
        holds: whether the stage is within its threshold.
    """

    stage: str
    kind: str
    rows: int
    finite: bool
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    worst_cosine: float | None
    argmax_agreement: float | None
    gates: bool
    holds: bool


def make_grid(
    inputs: Sequence[str], *, vocabulary: int, pad_id: int, longest: int
) -> list[Tensors]:
    """Seeded random ids over batch, length and right padding, awkward sizes included."""
    generator = np.random.default_rng(0)
    grid = []
    for batch, length in ((1, 1), (1, 17), (3, 33), (2, min(128, longest))):
        length = min(length, longest)
        lengths = generator.integers(1, length + 1, size=batch)
        lengths[0] = length
        mask = np.arange(length)[None, :] < lengths[:, None]
        ids = np.where(mask, generator.integers(0, vocabulary, (batch, length)), pad_id)
        columns = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
        }
        grid.append({name: columns[name].astype(np.int64) for name in inputs})
    return grid


def compare(
    stage: str, precision: str, kind: str, expected: Logits, actual: Logits, *, gates: bool
) -> StageParity:
    """Compare logits `[rows, C]` of one stage with PyTorch's."""
    rows = len(expected)
    if expected.shape != actual.shape or not (
        np.isfinite(expected).all() and np.isfinite(actual).all()
    ):
        return StageParity(stage, kind, rows, False, None, None, None, None, None, gates, False)
    want, got = expected.astype(np.float64), actual.astype(np.float64)
    difference = np.abs(want - got)
    cosine = _cosine(want.ravel(), got.ravel())
    threshold = THRESHOLDS[precision]
    max_abs = float(difference.max())
    return StageParity(
        stage=stage,
        kind=kind,
        rows=rows,
        finite=True,
        max_abs=max_abs,
        mean_abs=float(difference.mean()),
        cosine=cosine,
        worst_cosine=min(_cosine(a, b) for a, b in zip(want, got, strict=True)),
        argmax_agreement=float((want.argmax(1) == got.argmax(1)).mean()),
        gates=gates,
        holds=cosine >= threshold.cosine
        and (threshold.max_abs is None or max_abs <= threshold.max_abs),
    )


def compare_samples(
    stage: str, precision: str, samples: Sequence[Sample], session: Any
) -> list[StageParity]:
    """Run `samples` through an ONNX Runtime session; one result per kind of sample.

    Raises:
        MmoptError: ONNX Runtime cannot run the graph (exit 3).
    """
    kinds = sorted({sample.kind for sample in samples})
    results = []
    for kind in kinds:
        chosen = [sample for sample in samples if sample.kind == kind]
        try:
            actual = [session.run(["logits"], sample.feeds)[0] for sample in chosen]
        except runtime_errors() as error:
            raise MmoptError(f"ONNX Runtime could not run stage {stage}: {error}") from error
        results.append(
            compare(
                stage,
                precision,
                kind,
                np.concatenate([sample.expected for sample in chosen]),
                np.concatenate(actual),
                gates=precision == "fp32" or kind == "text" or "text" not in kinds,
            )
        )
    return results


def write_parity(folder: Path, stages: Sequence[StageParity], samples: Sequence[Sample]) -> None:
    """Write `parity.json`: every figure, the thresholds, and samples for `mmopt verify`."""
    kinds = sorted({sample.kind for sample in samples})
    stored = []
    for kind in kinds:
        of_kind = [sample for sample in samples if sample.kind == kind]
        # Spread evenly, so that the longest is among them: samples come sorted by length.
        count = min(_STORED_PER_KIND, len(of_kind))
        stored += [of_kind[int(i)] for i in np.linspace(0, len(of_kind) - 1, count)]
    document = {
        "thresholds": {name: dataclasses.asdict(value) for name, value in THRESHOLDS.items()},
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "samples": [
            {
                "kind": sample.kind,
                "feeds": {name: value.tolist() for name, value in sample.feeds.items()},
                "expected": sample.expected.tolist(),
            }
            for sample in stored
        ],
    }
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    (folder / PARITY_NAME).write_text(text + "\n", encoding="utf-8")


def read_samples(folder: Path) -> list[Sample]:
    """The samples stored in `parity.json`; its hash was checked with the artifact's."""
    document = json.loads((folder / PARITY_NAME).read_text(encoding="utf-8"))
    return [
        Sample(
            kind=sample["kind"],
            feeds={name: np.asarray(ids, np.int64) for name, ids in sample["feeds"].items()},
            expected=np.asarray(sample["expected"], np.float32),
        )
        for sample in document["samples"]
    ]


def parity_table(stages: Sequence[StageParity]) -> Table:
    """The stages as a table for a terminal."""
    table = Table("stage", "samples", "rows", "max abs", "cosine", "worst row", "argmax", "holds")
    for stage in stages:
        verdict = ("yes" if stage.holds else "NO") if stage.gates else "not gated"
        table.add_row(
            stage.stage,
            stage.kind,
            str(stage.rows),
            _figure(stage.max_abs, ".2e"),
            _figure(stage.cosine, ".6f"),
            _figure(stage.worst_cosine, ".6f"),
            _figure(stage.argmax_agreement, ".2%"),
            verdict,
        )
    return table


def _figure(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    # Two zero vectors are equal; one zero vector has no direction to agree with.
    if norm == 0.0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(a @ b) / norm
