"""Verifies an artifact where it stands: integrity, placement, parity, and accuracy on data."""

import json
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from mmopt_export.manifest import Manifest
from mmopt_export.parity import Sample, StageParity, compare_samples, parity_table, read_samples
from mmopt_export.progress import Progress, silent
from mmopt_export.runtime import MODEL_NAME, Runner, open_session
from mmopt_export.texts import read_texts
from mmopt_kernels.errors import InputError


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        files: how many files have the hash that the manifest says.
        placement: graph nodes that ran, by execution provider.
        accuracy: share of right labels on the data given, None without data.
        examples: how many texts accuracy was measured on.
    """

    path: Path
    precision: str
    provider: str
    files: int
    placement: dict[str, int]
    stages: tuple[StageParity, ...]
    accuracy: float | None
    examples: int

    @property
    def placed(self) -> bool:
        """Whether every node ran on the declared provider."""
        return set(self.placement) == {self.provider}

    @property
    def exit_code(self) -> int:
        """0 when placement and parity hold, 1 otherwise."""
        return 0 if self.placed and all(s.holds for s in self.stages if s.gates) else 1

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "path": str(self.path), "holds": self.exit_code == 0}

    def render(self) -> RenderableType:
        """Lines for integrity and placement, the parity table, and accuracy where measured."""
        placed = ", ".join(f"{name} {count}" for name, count in self.placement.items())
        lines = [
            f"integrity: {self.files} files have their SHA-256",
            f"placement: {placed}{'' if self.placed else f' (expected {self.provider} only)'}",
        ]
        if self.accuracy is not None:
            lines.append(f"accuracy: {self.accuracy:.2%} of {self.examples} texts")
        verdict = "holds" if self.exit_code == 0 else "DOES NOT HOLD"
        return Group(*lines, parity_table(self.stages), f"{self.path}: {verdict}")


def verify(
    artifact: Path, *, data: Path | None = None, progress: Progress = silent
) -> VerifyReport:
    """Check hashes, that every node runs on the declared provider, and parity on stored samples.

    Args:
        artifact: a folder that `mmopt export` wrote.
        data: JSON Lines with `text` and `label`, to measure accuracy on.

    Raises:
        InputError: not an artifact, or data that cannot be read or has unknown labels (exit 2).
        CheckFailedError: a file is missing or differs from the manifest (exit 1).
        MmoptError: ONNX Runtime is missing, too old, or cannot load the model (exit 3).
    """
    with progress("check files and open", None):
        runner = Runner(artifact)
    manifest = runner.manifest
    examples = read_texts(data, label="label") if data else None
    samples = read_samples(artifact)
    with progress("parity", None):
        session = open_session(artifact / MODEL_NAME, provider=manifest.provider)
        stages = compare_samples(manifest.precision, manifest.precision, samples, session)
    with progress("placement", None):
        placement = _placement(artifact, manifest, samples[0])
    accuracy = None
    if examples is not None and examples.labels is not None:
        accuracy = _accuracy(runner, examples.texts, examples.labels, progress)
    return VerifyReport(
        path=artifact,
        precision=manifest.precision,
        provider=manifest.provider,
        files=len(manifest.files),
        placement=placement,
        stages=tuple(stages),
        accuracy=accuracy,
        examples=len(examples.texts) if examples else 0,
    )


def _accuracy(runner: Runner, texts: list[str], labels: list[str], progress: Progress) -> float:
    known = runner.manifest.labels
    if unknown := sorted(set(labels) - set(known)):
        raise InputError(
            f"the data has the label {unknown[0]!r}, expected one of: {', '.join(known)}."
        )
    with progress(f"accuracy on {len(texts)} texts", None):
        predicted = runner.classify(texts).argmax(axis=1)
    return float(np.mean([known[i] == label for i, label in zip(predicted, labels, strict=True)]))


def _placement(artifact: Path, manifest: Manifest, sample: Sample) -> dict[str, int]:
    """Run once under ONNX Runtime's profiler and count the nodes that each provider ran."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(
            artifact / MODEL_NAME, provider=manifest.provider, profile=Path(scratch) / "profile"
        )
        session.run(["logits"], sample.feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = {
        (event["name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    return dict(Counter(provider for _, provider in sorted(nodes)))
