"""Verifies an artifact where it stands: signature, integrity, parity, placement, accuracy."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from mmopt_export.card import CARD_NAME, restated
from mmopt_export.decoder.parity import prove_greedy
from mmopt_export.files import SIGNATURE_NAME
from mmopt_export.integrity import require_integrity
from mmopt_export.manifest import (
    MANIFEST_NAME,
    CacheMap,
    Manifest,
    read_manifest,
    record_files,
)
from mmopt_export.parity import (
    GENERATED,
    Sample,
    StageParity,
    compare_samples,
    has_grown,
    parity_table,
    read_samples,
    read_stages,
)
from mmopt_export.placement import Placement, measure_placement
from mmopt_export.progress import Progress, silent
from mmopt_export.runtime import Runner, open_session, require_runtime
from mmopt_export.signing import is_signed, read_private_key, require_signature, sign
from mmopt_export.texts import LabelledTexts, read_texts
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        status: the manifest's, after `record`.
        signature: `holds`, `not checked` without a public key, None when there is none.
        files: how many files have the hash that the manifest says.
        placement: of each graph, where its nodes ran.
        stages: parity of each output on the stored samples.
        grown: where drift was accepted, the gating stages that are further off than at export.
        accuracy: share of right labels on the data given, None without data.
        examples: how many texts accuracy was measured on.
    """

    path: Path
    precision: str
    provider: str
    status: str
    signature: str | None
    files: int
    placement: tuple[Placement, ...]
    stages: tuple[StageParity, ...]
    grown: tuple[StageParity, ...]
    accuracy: float | None
    examples: int

    @property
    def placed(self) -> bool:
        """Whether every node ran where its provider promises."""
        return all(placement.holds for placement in self.placement)

    @property
    def agrees(self) -> bool:
        """Whether every gating stage of parity holds on the stored samples."""
        return all(stage.holds for stage in self.stages if stage.gates)

    @property
    def exit_code(self) -> int:
        """0 when placement and parity hold, or drift is what the export accepted; 1 otherwise."""
        if self.status == "accepted":
            proven = not self.grown
        else:
            proven = self.status != "failed" and self.agrees
        return 0 if self.placed and proven else 1

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            **asdict(self),
            "path": str(self.path),
            "placement": [placement.to_dict() for placement in self.placement],
            "holds": self.exit_code == 0,
        }

    def render(self) -> RenderableType:
        """Lines for signature, integrity and placement, the parity table, and accuracy."""
        lines = [
            f"signature: {self.signature or 'none'}",
            f"integrity: {self.files} files have their SHA-256",
            *(line for placement in self.placement for line in placement.lines()),
        ]
        if self.accuracy is not None:
            lines.append(f"accuracy: {self.accuracy:.2%} of {self.examples} texts")
        notes = {
            "accepted": "parity did not hold at export; its drift was accepted"
            + (", and has grown" if self.grown else ""),
            "failed": "marked failed at export",
            "unproven": "not recorded as verified: pass --record",
        }
        verdict = "holds" if self.exit_code == 0 else "DOES NOT HOLD"
        note = f" ({notes[self.status]})" if self.status in notes else ""
        return Group(*lines, parity_table(self.stages), f"{self.path}: {verdict}{note}")


def verify(
    artifact: Path,
    *,
    data: Path | None = None,
    public_key: Path | None = None,
    record: bool = False,
    sign_key: Path | None = None,
    progress: Progress = silent,
) -> VerifyReport:
    """Check the signature, every file, parity on stored samples, and where each node runs.

    Nothing of the artifact is opened by ONNX Runtime before its files were found sound.

    Args:
        artifact: a folder that `mmopt export` wrote.
        data: JSON Lines with `text` and `label`, to measure accuracy on.
        public_key: an Ed25519 key in PEM, whose signature the artifact must carry.
        record: mark an `unproven` artifact `verified` when everything holds here.
        sign_key: signs the manifest again that `record` changes.

    Raises:
        InputError: not an artifact, a key that cannot be used, or data that cannot be read or has
            unknown labels (exit 2).
        CheckFailedError: the signature does not hold, or a file differs from the manifest, is
            missing, or reaches out of the folder (exit 1).
        MmoptError: ONNX Runtime is missing, too old, or cannot load the model (exit 3).
    """
    if sign_key is not None and not record:
        raise InputError("--sign signs what --record writes, expected both. Pass --record as well.")
    key = read_private_key(sign_key) if sign_key is not None else None
    if public_key is not None:
        require_signature(artifact, public_key)
    manifest = read_manifest(artifact)
    if record and key is None and is_signed(artifact):
        raise InputError(
            f"{artifact} is signed and --record changes what was signed. Pass --sign KEY as well."
        )
    with progress("check files", None):
        require_integrity(artifact, manifest)
    examples = _examples(manifest, data)
    require_runtime(manifest)
    samples = read_samples(artifact)
    recorded = read_stages(artifact) if manifest.status == "accepted" else None
    stages: list[StageParity] = []
    placements = []
    for name in manifest.components:
        with progress(f"parity and placement: {name}", None):
            held, placement = _run(
                artifact, manifest, name, [one for one in samples if one.component == name]
            )
        stages += held
        placements.append(placement)
    report = VerifyReport(
        path=artifact,
        precision=manifest.precision,
        provider=manifest.provider,
        status=manifest.status,
        signature=("holds" if public_key else "not checked") if is_signed(artifact) else None,
        files=len(manifest.files),
        placement=tuple(placements),
        stages=tuple(stages),
        grown=tuple(
            stage
            for stage in stages
            if recorded is not None and stage.gates and has_grown(stage, recorded.get(stage.key))
        ),
        accuracy=None,
        examples=len(examples.texts) if examples else 0,
    )
    if record and manifest.status == "unproven" and report.exit_code == 0:
        manifest = _record(artifact, manifest, key)
        report = dataclasses.replace(report, status=manifest.status)
    if examples is not None and report.exit_code == 0:
        report = dataclasses.replace(report, accuracy=_accuracy(artifact, examples, progress))
    return report


def _run(
    artifact: Path, manifest: Manifest, name: str, samples: list[Sample]
) -> tuple[list[StageParity], Placement]:
    """Run a graph's stored samples."""
    component = manifest.components[name]
    if all(sample.kind == GENERATED for sample in samples):
        raise CheckFailedError(
            f"{artifact} holds no samples of the graph {name}, so its parity cannot be checked. "
            "Export the model again."
        )
    return prove_component(
        name,
        artifact / component.file,
        component.precision,
        samples,
        provider=manifest.provider,
        cache=manifest.caches.get(name),
        longest=manifest.max_length,
    )


def prove_component(
    name: str,
    model: Path,
    precision: str,
    samples: Sequence[Sample],
    *,
    provider: str,
    cache: CacheMap | None,
    longest: int | None,
) -> tuple[list[StageParity], Placement]:
    """Run a graph's samples in one session, under ONNX Runtime's profiler.

    Then, where what it should generate is among them, generate that in another.

    Args:
        cache: of a decoder.
        longest: tokens that a decoder has positions for; None where it has no end.
    """
    fed = [sample for sample in samples if sample.kind != GENERATED]
    stages, placement = _run_profiled(name, model, precision, fed, provider)
    stages += [
        prove_greedy(sample, model, precision, provider=provider, cache=cache, longest=longest)
        for sample in samples
        if sample.kind == GENERATED
    ]
    return stages, placement


def _run_profiled(
    name: str, model: Path, precision: str, samples: Sequence[Sample], provider: str
) -> tuple[list[StageParity], Placement]:
    """A function, so that its session is gone before there is another."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(model, provider=provider, profile=Path(scratch) / "profile")
        stages = compare_samples(precision, precision, samples, session)
        placement = measure_placement(name, model, session, provider=provider)
    return stages, placement


def _record(artifact: Path, manifest: Manifest, key: Any) -> Manifest:
    """Mark the artifact verified: its card, its manifest, and the signature where there is a key.

    All of them change or none does. In between the hashes do not fit, and nobody runs it.
    """
    changed = [CARD_NAME] if CARD_NAME in manifest.files else []
    changed += [MANIFEST_NAME, *([SIGNATURE_NAME] if key is not None else [])]
    done: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix=f".{artifact.name}.", dir=artifact.parent) as made:
            new, old = Path(made) / "new", Path(made) / "old"
            new.mkdir()
            old.mkdir()
            if CARD_NAME in changed:
                text = (artifact / CARD_NAME).read_text(encoding="utf-8")
                text = restated(text, manifest.status, "verified")
                (new / CARD_NAME).write_text(text, encoding="utf-8")
            files = {**manifest.files, **record_files(new)}
            manifest = dataclasses.replace(manifest, status="verified", files=files)
            manifest.write(new)
            if key is not None:
                sign(new, key)
            for name in changed:
                if (artifact / name).exists():
                    shutil.copy2(artifact / name, old / name)
            try:
                for name in changed:
                    os.replace(new / name, artifact / name)
                    done.append(name)
            except OSError:
                for name in done:
                    os.replace(old / name, artifact / name)
                raise
    except OSError as error:
        raise MmoptError(
            f"{artifact} holds, but that could not be recorded in it: {error}. "
            "Run it where you may write to the folder."
        ) from error
    return manifest


def _examples(manifest: Manifest, data: Path | None) -> LabelledTexts | None:
    if data is None:
        return None
    if manifest.task != "text-classification":
        raise InputError(
            f"{data}: accuracy is measured of text-classification, and this artifact is for "
            f"{manifest.task}. Leave --data out."
        )
    examples = read_texts(data, label="label")
    known = manifest.labels
    if unknown := sorted(set(examples.labels or ()) - set(known)):
        raise InputError(
            f"the data has the label {unknown[0]!r}, expected one of: {', '.join(known)}."
        )
    return examples


def _accuracy(artifact: Path, examples: LabelledTexts, progress: Progress) -> float:
    with progress(f"accuracy on {len(examples.texts)} texts", None):
        runner = Runner(artifact)
        predicted = runner.classify(examples.texts).argmax(axis=1)
    known, labels = runner.manifest.labels, examples.labels or []
    return float(np.mean([known[i] == label for i, label in zip(predicted, labels, strict=True)]))
