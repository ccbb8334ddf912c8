"""The model card: the artifact's `README.md`, what a person needs to know before running it."""

from collections.abc import Sequence
from pathlib import Path

from mmopt_export.manifest import Manifest, TensorSpec
from mmopt_export.parity import StageParity, condensed

CARD_NAME = "README.md"

_STATUS = {
    "verified": "Parity with the PyTorch model holds.",
    "accepted": "Parity with the PyTorch model does NOT hold; the drift was accepted at export.",
    "failed": "Parity with the PyTorch model does NOT hold. It is not served.",
    "unproven": "It was never run on the provider it is made for. "
    "`mmopt verify --record` there proves it.",
}


def write_card(folder: Path, manifest: Manifest, stages: Sequence[StageParity]) -> None:
    """Write `README.md` into `folder`.

    Args:
        manifest: without the hashes of files, which come after this one.
        stages: every parity stage.
    """
    lines = [
        "---",
        "library_name: onnxruntime",
        f"pipeline_tag: {manifest.task}",
        "---",
        "",
        f"# {manifest.name}",
        "",
        f"{manifest.architecture} for {manifest.task}, {manifest.precision}, for ONNX Runtime's "
        f"{manifest.provider}. {_STATUS[manifest.status]}",
        "",
        f"Needs onnxruntime {manifest.minimum_onnxruntime} or newer. `mmopt verify` checks the "
        "files, the placement and parity again; `mmopt serve` serves it.",
        "",
        "## Graphs",
        "",
    ]
    for name, component in manifest.components.items():
        lines += [f"### {name}: `{component.file}`, {component.precision}", ""]
        lines += ["| | name | type | shape |", "|---|---|---|---|"]
        lines += [_row("in", spec) for spec in component.inputs]
        lines += [_row("out", spec) for spec in component.outputs]
        lines.append("")
    lines += [
        "## Parity with PyTorch",
        "",
        "| graph | stage | samples | output | rows | max abs | cosine | same winner | holds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in condensed(stages):
        holds = ("yes" if stage.holds else "**no**") if stage.gates else "not gated"
        figures = (
            _figure(stage.max_abs, ".2e"),
            _figure(stage.cosine, ".6f"),
            _figure(stage.argmax_agreement, ".2%"),
        )
        cells = (stage.component, stage.stage, stage.kind, stage.output, str(stage.rows))
        lines.append(f"| {' | '.join((*cells, *figures, holds))} |")
    lines += ["", "## Made from", "", f"- base: {manifest.source.base}"]
    lines += [f"- adapter: {record['path']}" for record in manifest.source.adapters]
    if manifest.labels:
        lines.append(f"- labels: {', '.join(manifest.labels)}")
    (folder / CARD_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(side: str, spec: TensorSpec) -> str:
    shape = ", ".join(str(size) for size in spec.shape)
    return f"| {side} | {spec.name} | {spec.dtype} | {shape} |"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def restated(text: str, before: str, after: str) -> str:
    """The text of a card after the artifact's status has changed."""
    return text.replace(_STATUS[before], _STATUS[after], 1)
