"""Holds an exported graph against the PyTorch model it came from.

Many figures are reported; one thing gates, per precision, in `THRESHOLDS`. Finiteness is checked
first: a NaN never passes. A figure that was not measured is None.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from mmopt_export.files import read_json
from mmopt_export.runtime import Tensors, run_graph, runtime_errors
from mmopt_kernels.errors import InputError, MmoptError

PARITY_NAME = "parity.json"
SAMPLES_NAME = "samples.safetensors"
_STORED_PER_KIND = 4
_NOT_MEASURED = "not measured"
_GROUPS = ("feeds", "expected", "valid", "labels")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Threshold:
    """What a stage must reach.

    Attributes:
        cosine: at least, of an output's values as one vector.
        max_abs: where given the largest difference, for values up to 1; for larger outputs
            in proportion to the largest, as rounding errors are.
    """

    cosine: float
    max_abs: float | None


# fp32, fp16 and int4 as strict as onnxruntime/mobius's tiers; bf16 keeps three bits fewer than
# fp16. mobius also wants the same winner in fp32: within `max_abs`, two winners can only differ
# where the expected scores are within twice `max_abs` of each other. int8: the worst that still
# reads as the same classifier on real sentences; the demo's measured value is in bench/results.
THRESHOLDS = {
    "fp32": Threshold(0.9999, 1e-4),
    "fp16": Threshold(0.999, 5e-3),
    "bf16": Threshold(0.999, 4e-2),
    "int8": Threshold(0.99, None),
    "int4": Threshold(0.95, None),
}
# What a drift that was accepted may have grown by where it is measured again. The graph makes it;
# another machine only rounds otherwise, and the export measured all of the samples that it stored.
_DRIFT_RATIO, _DRIFT_ROUNDING = 1.25, 1e-4
# Random ids are nothing that a model was trained on, and weights of few bits are fitted to what is.
_FITTED = ("int8", "int4")
RANDOM = "grid"
"""The kind of seeded random values over batch, length and padding, where there is one such kind."""
REAL = ("text", "image", "audio")
"""The kinds of samples that calibration data give; all others are made up."""
GENERATED = "generated"
"""The kind of sample that a decoder generates step by step; see `mmopt_export.decoder.parity`."""


def is_random(kind: str) -> bool:
    """Whether samples of that kind are no real inputs."""
    return kind not in REAL


@dataclass(frozen=True)
class Sample:
    """One batch that a graph is held against.

    Attributes:
        component: which graph.
        kind: one of `REAL`, `GENERATED`, or what was made up.
        feeds: by input.
        expected: the PyTorch model's fp32 outputs, by name; outputs that are not here are not
            compared.
        valid: by output, which of its leading positions are compared; all where it has none.
        scores: outputs of which the largest value of a row means something.
        labels: by output, the index of the right score in each row that is compared, int64; -1 in a
            row without one.
    """

    component: str
    kind: str
    feeds: Tensors
    expected: Tensors
    valid: Tensors = field(default_factory=dict)
    scores: tuple[str, ...] = ()
    labels: Tensors = field(default_factory=dict)

    def rows(self, output: str, value: Array) -> Array:
        """The rows `[n, size]` of an output's value that are compared."""
        value = np.atleast_1d(value)
        mask = self.valid.get(output)
        size = value.shape[-1]
        if mask is None:
            return value.reshape(-1, size)
        mask = mask.reshape(mask.shape + (1,) * (value.ndim - 1 - mask.ndim))
        chosen: Array = value[np.broadcast_to(mask, value.shape[:-1])]
        return chosen


@dataclass(frozen=True)
class StageParity:
    """One output of one graph at one stage, held against PyTorch on one kind of samples.

    Attributes:
        component: which graph.
        stage: `fp32-unoptimized`, `fp32` or the artifact's precision.
        kind: which samples.
        output: which output.
        rows: how many rows were compared.
        finite: whether every value was finite; without it nothing else counts.
        max_abs, mean_abs: difference of the values.
        cosine: of all values as one vector.
        worst_cosine: the smallest over rows; None for rows of one value.
        argmax_agreement: share of rows with the same winner, for scores.
        accuracy, expected_accuracy: share of labelled rows whose winner is the label, of the graph
            and of PyTorch.
        gates: whether `holds` decides the report; weights of few bits gate on real samples where
            there are any, since random ones are nothing the model was trained on. What is not
            finite always does.
        holds: whether the stage is within its threshold.
        note: what else there is to say.
    """

    component: str
    stage: str
    kind: str
    output: str
    rows: int
    finite: bool
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    worst_cosine: float | None
    argmax_agreement: float | None
    accuracy: float | None
    expected_accuracy: float | None
    gates: bool
    holds: bool
    note: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What was measured: no two stages of an artifact share it."""
        return self.component, self.stage, self.kind, self.output


class _Comparison:
    """Figures of one output over the samples of one kind, gathered one sample at a time."""

    def __init__(self) -> None:
        self._rows = self._same_winner = self._values = 0
        self._labelled = self._right = self._expected_right = 0
        self._finite = True
        self._scored = False
        self._max = self._size = self._sum = self._dot = self._want = self._got = 0.0
        self._worst: float | None = None

    def add(
        self, expected: Array, actual: Array, *, scores: bool, labels: Array | None = None
    ) -> None:
        """Compare rows `[n, size]`; another shape counts as not finite: nothing was measured."""
        self._rows += len(expected)
        self._scored = scores
        if expected.shape != actual.shape or not (
            np.isfinite(expected).all() and np.isfinite(actual).all()
        ):
            self._finite = False
            return
        want, got = expected.astype(np.float64), actual.astype(np.float64)
        difference = np.abs(want - got)
        self._max = max(self._max, float(difference.max(initial=0.0)))
        self._size = max(self._size, float(np.abs(want).max(initial=0.0)))
        self._sum += float(difference.sum())
        self._values += difference.size
        self._dot += float((want * got).sum())
        self._want += float((want * want).sum())
        self._got += float((got * got).sum())
        if scores and len(want):
            self._same_winner += int((want.argmax(-1) == got.argmax(-1)).sum())
        if labels is not None:
            known = labels >= 0
            self._labelled += int(known.sum())
            self._right += int((got.argmax(-1) == labels)[known].sum())
            self._expected_right += int((want.argmax(-1) == labels)[known].sum())
        if want.shape[-1] > 1:
            for a, b in zip(want, got, strict=True):
                cosine = _cosine(float(a @ b), float(a @ a), float(b @ b))
                self._worst = cosine if self._worst is None else min(self._worst, cosine)

    def result(self, precision: str, *, exact: bool, **names: Any) -> StageParity:
        """The figures against the threshold of `precision`; integers (`exact`) must be equal."""
        if not self._finite or not self._values:
            # Weights of few bits excuse an inaccurate value of random samples, not a missing one.
            names["gates"] = True
            return StageParity(
                rows=self._rows,
                finite=False,
                max_abs=None,
                mean_abs=None,
                cosine=None,
                worst_cosine=None,
                argmax_agreement=None,
                accuracy=None,
                expected_accuracy=None,
                holds=False,
                **names,
            )
        threshold = THRESHOLDS[precision]
        cosine = _cosine(self._dot, self._want, self._got)
        within = threshold.max_abs is None or self._max <= threshold.max_abs * max(1.0, self._size)
        return StageParity(
            rows=self._rows,
            finite=True,
            max_abs=self._max,
            mean_abs=self._sum / self._values,
            cosine=cosine,
            worst_cosine=self._worst,
            argmax_agreement=self._same_winner / self._rows if self._scored else None,
            accuracy=self._right / self._labelled if self._labelled else None,
            expected_accuracy=self._expected_right / self._labelled if self._labelled else None,
            holds=self._max == 0 if exact else cosine >= threshold.cosine and within,
            **names,
        )


def compare_values(expected: Array, actual: Array, precision: str, **names: Any) -> StageParity:
    """Hold rows `[n, ...]` that more than one graph computed against the threshold of `precision`.

    Args:
        names: those fields of the result that are no figures.
    """
    comparison = _Comparison()
    rows = (value.reshape(len(value), -1) for value in (expected, actual))
    comparison.add(*rows, scores=False)
    return comparison.result(precision, exact=False, **names)


def compare_samples(
    stage: str, precision: str, samples: Sequence[Sample], session: Any
) -> list[StageParity]:
    """Run the samples of one graph through an ONNX Runtime session.

    Returns:
        One result per kind of sample and output.

    Raises:
        MmoptError: ONNX Runtime cannot run the graph (exit 3).
    """
    kinds = sorted({sample.kind for sample in samples})
    only_random = all(is_random(kind) for kind in kinds)
    results = []
    for kind in kinds:
        comparisons: dict[str, _Comparison] = {}
        exact: dict[str, bool] = {}
        chosen = [sample for sample in samples if sample.kind == kind]
        for sample in chosen:
            names = list(sample.expected)
            try:
                values = run_graph(session, names, sample.feeds)
            except runtime_errors() as error:
                raise MmoptError(f"ONNX Runtime could not run stage {stage}: {error}") from error
            for name, value in zip(names, values, strict=True):
                if value is None:
                    # A cache in bf16: the logits of the samples that read one hold it.
                    continue
                expected = sample.expected[name]
                exact[name] = not np.issubdtype(expected.dtype, np.floating)
                same = value.shape == expected.shape
                comparisons.setdefault(name, _Comparison()).add(
                    sample.rows(name, expected),
                    # Of another shape: the mask of what is valid cannot be laid on it.
                    sample.rows(name, value) if same else np.empty((0, 0)),
                    scores=name in sample.scores,
                    labels=sample.labels.get(name),
                )
        results += [
            comparison.result(
                precision,
                exact=exact[name],
                component=chosen[0].component,
                stage=stage,
                kind=kind,
                output=name,
                gates=precision not in _FITTED or not is_random(kind) or only_random,
            )
            for name, comparison in comparisons.items()
        ]
    return results


def is_near_tie(best: float, other: float, precision: str) -> bool:
    """Whether a graph of `precision` may put `other` first, of two scores of eager's.

    Scores that are right to the threshold come out in either order where they are closer than
    twice that. In half precision it grows with the scores, as it does for outputs: fp16 has steps
    of 1/64 from 16 on. In fp32, where scores are right to far less, it stays that of values up to
    1. Weights of few bits move scores by more than any lead; their floats are taken for fp16.
    """
    tolerance = THRESHOLDS[precision if gates_tokens(precision) else "fp16"].max_abs
    assert tolerance is not None
    size = 1.0 if precision == "fp32" else max(1.0, abs(best))
    return best - other <= 2 * tolerance * size


def gates_tokens(precision: str) -> bool:
    """Whether greedy tokens decide: weights of few bits have others, which other stages judge."""
    return THRESHOLDS[precision].max_abs is not None


def tokens_stage(
    component: str,
    kind: str,
    expected: Sequence[Sequence[int]],
    leads: Sequence[Sequence[tuple[float, float]]],
    actual: Sequence[Sequence[int]],
    precision: str,
) -> StageParity:
    """Greedy tokens that several graphs generated, against those that eager generates.

    Where a winner was ahead by no more than a near-tie, either is right, and what follows in its
    row is not compared.

    Args:
        expected: ids by row.
        leads: for each of them eager's two best scores, the better first.
        actual: ids by row.
    """
    compared = same = ties = 0
    for want, scores, got in zip(expected, leads, actual, strict=True):
        for at, token in enumerate(want):
            if at < len(got) and got[at] == token:
                compared, same = compared + 1, same + 1
            elif is_near_tie(*scores[at], precision):
                ties += 1
                break
            else:
                # What follows another token says nothing.
                compared += len(want) - at
                break
        else:
            compared += abs(len(got) - len(want))
    return StageParity(
        component=component,
        stage="greedy",
        kind=kind,
        output="tokens",
        rows=compared,
        finite=True,
        max_abs=None,
        mean_abs=None,
        cosine=None,
        worst_cosine=None,
        argmax_agreement=same / compared if compared else None,
        accuracy=None,
        expected_accuracy=None,
        gates=gates_tokens(precision),
        holds=same == compared,
        note=f"{ties} near-ties" if ties else None,
    )


def stored_samples(samples: Iterable[Sample]) -> list[Sample]:
    """The samples of one graph that `mmopt verify` runs again: a few of each kind."""
    samples = list(samples)
    stored = []
    for kind in sorted({sample.kind for sample in samples}):
        of_kind = [sample for sample in samples if sample.kind == kind]
        # Spread evenly, so that the longest is among them: samples come sorted by length.
        count = min(_STORED_PER_KIND, len(of_kind))
        stored += [of_kind[int(i)] for i in np.linspace(0, len(of_kind) - 1, count)]
    return stored


def write_parity(folder: Path, stages: Sequence[StageParity], samples: Sequence[Sample]) -> None:
    """Write `parity.json`, every figure and the thresholds, and beside it the samples' arrays."""
    from safetensors.numpy import save_file

    arrays: dict[str, Array] = {}
    for index, sample in enumerate(samples):
        for group in _GROUPS:
            for name, value in getattr(sample, group).items():
                arrays[f"{index}/{group}/{name}"] = np.ascontiguousarray(value)
    save_file(arrays, folder / SAMPLES_NAME)
    document = {
        "thresholds": {name: dataclasses.asdict(value) for name, value in THRESHOLDS.items()},
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "samples": [
            {"component": sample.component, "kind": sample.kind, "scores": list(sample.scores)}
            for sample in samples
        ],
    }
    text = json.dumps(document, sort_keys=True, allow_nan=False, indent=1)
    (folder / PARITY_NAME).write_text(text + "\n", encoding="utf-8")


def read_samples(folder: Path) -> list[Sample]:
    """The samples stored in an artifact, whose files' hashes have been checked.

    Raises:
        InputError: the two files do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        document = read_json(folder / PARITY_NAME)
        arrays = load_file(folder / SAMPLES_NAME)
        samples = []
        for index, record in enumerate(document["samples"]):
            groups: dict[str, Tensors] = {group: {} for group in _GROUPS}
            for group, found in groups.items():
                prefix = f"{index}/{group}/"
                found |= {
                    name.removeprefix(prefix): value
                    for name, value in arrays.items()
                    if name.startswith(prefix)
                }
            samples.append(
                Sample(
                    component=record["component"],
                    kind=record["kind"],
                    scores=tuple(record["scores"]),
                    **groups,
                )
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} holds no samples that parity can be checked on: {error!r}. "
            "Export the model again."
        ) from error
    return samples


def read_stages(folder: Path) -> dict[tuple[str, str, str, str], StageParity]:
    """The stages that the export recorded in an artifact, whose files' hashes have been checked.

    Raises:
        InputError: the file holds none.
    """
    try:
        stages = [StageParity(**record) for record in read_json(folder / PARITY_NAME)["stages"]]
        for stage in stages:
            for value in _distances(stage):
                float(value)
        return {stage.key: stage for stage in stages}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder} holds no parity that can be measured again: {error!r}. "
            "Export the model again."
        ) from error


def has_grown(stage: StageParity, recorded: StageParity | None) -> bool:
    """Whether a stage is further off than it was recorded, or not finite. One that holds is not."""
    if stage.holds:
        return False
    if recorded is None or not (stage.finite and recorded.finite):
        return True
    pairs = zip(_distances(stage), _distances(recorded), strict=True)
    return any(now > _DRIFT_RATIO * before + _DRIFT_ROUNDING for now, before in pairs)


def _distances(stage: StageParity) -> tuple[float, float]:
    """How far the worst value and the worst row are off: figures that a part of the samples cannot
    have larger than all of them. 0 where there are none."""
    worst = 1.0 if stage.worst_cosine is None else stage.worst_cosine
    return stage.max_abs or 0.0, 1.0 - worst


def condensed(stages: Sequence[StageParity]) -> list[StageParity]:
    """The stages for a reader: a cache's many outputs, and all samples that were made up, become
    one row with the worst of each figure."""
    groups: dict[tuple[Any, ...], list[StageParity]] = {}
    for stage in stages:
        # Scores are what is looked at; `past.0.key` and `past.1.key` differ in a number only.
        family = stage.output if stage.argmax_agreement is not None else _family(stage.output)
        kind = "made up" if is_random(stage.kind) and stage.note is None else stage.kind
        key = (stage.component, stage.stage, kind, family, stage.gates, stage.note)
        groups.setdefault(key, []).append(stage)
    return [
        _worst(key[2], key[3], group) if len(group) > 1 else group[0]
        for key, group in groups.items()
    ]


def _family(output: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in output.split("."))


def _worst(kind: str, output: str, stages: Sequence[StageParity]) -> StageParity:
    def of(name: str, choose: Any) -> Any:
        values = [getattr(stage, name) for stage in stages]
        return None if None in values else choose(values)

    return dataclasses.replace(
        stages[0],
        kind=kind,
        output=output,
        rows=sum(stage.rows for stage in stages),
        finite=all(stage.finite for stage in stages),
        max_abs=of("max_abs", max),
        mean_abs=of("mean_abs", max),
        cosine=of("cosine", min),
        worst_cosine=of("worst_cosine", min),
        argmax_agreement=of("argmax_agreement", min),
        accuracy=of("accuracy", min),
        expected_accuracy=of("expected_accuracy", min),
        holds=all(stage.holds for stage in stages),
    )


def parity_table(stages: Sequence[StageParity]) -> Table:
    """The stages as a table for a terminal, without the columns that none of them has."""
    rows = condensed(stages)
    columns = {
        "graph": [stage.component for stage in rows],
        "stage": [stage.stage for stage in rows],
        "samples": [stage.kind for stage in rows],
        "output": [stage.output for stage in rows],
        "rows": [str(stage.rows) for stage in rows],
        "max abs": [_figure(stage.max_abs, ".2e") for stage in rows],
        "cosine": [_figure(stage.cosine, ".6f") for stage in rows],
        "worst row": [_figure(stage.worst_cosine, ".6f") for stage in rows],
        "argmax": [_figure(stage.argmax_agreement, ".2%") for stage in rows],
        "accuracy": [_accuracy(stage) for stage in rows],
        "holds": [_verdict(stage) for stage in rows],
    }
    if len(set(columns["graph"])) < 2:
        del columns["graph"]
    for optional in ("argmax", "accuracy"):
        if set(columns[optional]) <= {_NOT_MEASURED}:
            del columns[optional]
    table = Table(*columns)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _verdict(stage: StageParity) -> str:
    verdict = ("yes" if stage.holds else "NO") if stage.gates else "not gated"
    return f"{verdict} ({stage.note})" if stage.note else verdict


def _accuracy(stage: StageParity) -> str:
    if stage.accuracy is None or stage.expected_accuracy is None:
        return _NOT_MEASURED
    return f"{stage.accuracy:.2%} (PyTorch {stage.expected_accuracy:.2%})"


def _figure(value: float | None, form: str) -> str:
    return _NOT_MEASURED if value is None else format(value, form)


def _cosine(dot: float, square_a: float, square_b: float) -> float:
    norm = math.sqrt(square_a) * math.sqrt(square_b)
    # Two zero vectors are equal; one zero vector has no direction to agree with.
    if norm == 0.0:
        return 1.0 if square_a == square_b else 0.0
    return dot / norm
