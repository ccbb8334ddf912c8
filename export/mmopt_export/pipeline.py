"""The export: load, merge, trace, quantize, prove, and move into place."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from rich.console import Group, RenderableType

from mmopt_export.adapters import adapter_scales, merge_adapter
from mmopt_export.checkpoint import Checkpoint, load_checkpoint, weights_sha256
from mmopt_export.files import require_new_folder, require_space, sha256, staged_folder
from mmopt_export.graph import require_text_classifier, tensor_specs, text_inputs, trace
from mmopt_export.manifest import FileRecord, Manifest, Source, record_files
from mmopt_export.parity import (
    Sample,
    StageParity,
    compare_samples,
    make_grid,
    parity_table,
    write_parity,
)
from mmopt_export.progress import Progress, silent
from mmopt_export.providers import Target, get_target
from mmopt_export.quantize import quantize_int8
from mmopt_export.runtime import MODEL_NAME, Tensors, open_session, runtime_version
from mmopt_export.texts import read_texts
from mmopt_kernels.errors import CheckFailedError, InputError

MINIMUM_ONNXRUNTIME = "1.30"
_TOOLS = ("torch", "transformers", "peft", "onnx", "onnxscript", "mmopt")
_MAX_TEXTS = 256  # sentences that parity reads of the calibration file: 8 batches
_BATCH = 32
_NO_LIMIT = 1 << 20  # transformers writes 1e30 for a tokenizer without a limit


@dataclass(frozen=True)
class ExportReport:
    """What `export` did and whether parity held."""

    path: Path
    precision: str
    status: str
    size: int
    files: dict[str, FileRecord]
    stages: tuple[StageParity, ...]
    quantization: dict[str, Any] | None

    @property
    def exit_code(self) -> int:
        """0 when every gating stage held, 1 otherwise."""
        return 0 if self.status == "verified" else 1

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def render(self) -> RenderableType:
        """A parity table and one line on the artifact."""
        return Group(
            parity_table(self.stages),
            f"{self.path}: {self.precision}, {self.size / 1e6:.1f} MB, {self.status}",
        )


def export(
    model: str,
    output: Path,
    *,
    adapters: Sequence[str] = (),
    target: str = "cpu",
    precision: str = "fp32",
    calibration: Path | None = None,
    progress: Progress = silent,
) -> ExportReport:
    """Turn a text classifier and its adapter into a verified ONNX artifact in `output`.

    The adapter is merged in fp32. Logits of the merged PyTorch model are then compared with ONNX
    Runtime without optimizations, with them, and at the target's precision. The folder appears
    only when complete; when parity does not hold it appears marked `failed`, and is not served.

    Args:
        model: a local folder or a hub id.
        output: a new or an empty folder.
        adapters: at most one PEFT LoRA folder or hub id.
        target: a name of `mmopt_export.providers.TARGETS`.
        precision: one that the target has.
        calibration: JSON Lines with a `text` per line, on which parity is measured as well;
            quantized artifacts are then gated on them, and their quantization fitted to them.

    Raises:
        InputError: bad input, before anything is written (exit 2).
        MmoptError: the trace failed, or the disk is full (exit 3).
    """
    destination = get_target(target)
    destination.require_precision(precision)
    require_new_folder(output)
    texts = read_texts(calibration).texts[:_MAX_TEXTS] if calibration else []
    fitted = {"texts": len(texts), "sha256": sha256(calibration)} if calibration else None

    with progress("load model", None):
        checkpoint = load_checkpoint(model, adapters=adapters)
    classifier, adapter_records = _merge(checkpoint)
    require_text_classifier(classifier, checkpoint.tokenizer)
    inputs = text_inputs(classifier, checkpoint.tokenizer)
    max_length = _max_length(classifier, checkpoint.tokenizer)
    weight_bytes = sum(p.numel() * p.element_size() for p in classifier.parameters())
    # The fp32 graph, the copy that quantization prepares from it, and the quantized graph.
    require_space(output, 3 * weight_bytes + (16 << 20))

    with progress("trace", None):
        graph = trace(classifier, inputs, max_length=max_length, target=target)
    with staged_folder(output) as folder:
        _write_tokenizer(checkpoint.tokenizer, folder, max_length)
        samples = list(_samples(classifier, checkpoint.tokenizer, inputs, texts, max_length))
        recipe, stages = _write_model(graph, folder, destination, precision, samples, progress)
        if recipe is not None:
            recipe["calibration"] = fitted
        write_parity(folder, stages, samples)
        holds = all(stage.holds for stage in stages if stage.gates)
        labels = classifier.config.id2label
        manifest = Manifest(
            name=output.name,
            task="text-classification",
            architecture=type(classifier).__name__,
            target=target,
            provider=destination.provider,
            precision=precision,
            status="verified" if holds else "failed",
            opset={domain or "ai.onnx": version for domain, version in graph.opset_imports.items()},
            minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
            inputs=tensor_specs(graph.graph.inputs),
            outputs=tensor_specs(graph.graph.outputs),
            labels=tuple(str(labels[index]) for index in range(len(labels))),
            max_length=max_length,
            quantization=recipe,
            source=Source(model, checkpoint.base_sha256, tuple(adapter_records)),
            tools={
                **{tool: importlib.metadata.version(tool) for tool in _TOOLS},
                # Two distributions, onnxruntime and onnxruntime-gpu, give this one package.
                "onnxruntime": runtime_version(),
            },
            files=record_files(folder),
        )
        manifest.write(folder)
    return ExportReport(
        path=output,
        precision=precision,
        status=manifest.status,
        size=sum(record.size for record in manifest.files.values()),
        files=manifest.files,
        stages=tuple(stages),
        quantization=recipe,
    )


def _merge(checkpoint: Checkpoint) -> tuple[Any, list[dict[str, Any]]]:
    if not checkpoint.adapters:
        return checkpoint.model, []
    records = [
        {
            "path": str(folder),
            "sha256": weights_sha256(folder),
            "scale": adapter_scales(checkpoint.model),
        }
        for folder in checkpoint.adapters
    ]
    return merge_adapter(checkpoint.model).eval(), records


def _max_length(model: Any, tokenizer: Any) -> int:
    """Tokens that fit: the fewer of what the tokenizer was made for and the position table has.

    Raises:
        InputError: neither says how many.
    """
    limits = [tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa and its relatives count positions from behind the padding id.
        paddings = [
            module.padding_idx
            for name, module in model.named_modules()
            if name.endswith(".position_embeddings") and isinstance(module, torch.nn.Embedding)
        ]
        offset = next((index + 1 for index in paddings if index is not None), 0)
        limits.append(positions - offset)
    longest = int(min(limits))
    if longest > _NO_LIMIT:
        raise InputError(
            "neither the tokenizer nor the config says how long a text may be. Set the "
            "tokenizer's model_max_length and save it again."
        )
    return longest


def _write_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """Save the tokenizer with padding and truncation fixed, so that serving needs no more."""
    tokenizer.save_pretrained(folder)
    fast = tokenizer.backend_tokenizer
    fast.enable_truncation(max_length=max_length)
    fast.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    fast.save(str(folder / "tokenizer.json"))


def _samples(
    model: Any, tokenizer: Any, inputs: Sequence[str], texts: Sequence[str], max_length: int
) -> Iterator[Sample]:
    """The batches of parity with the PyTorch model's logits.

    Raises:
        CheckFailedError: the PyTorch model itself gives NaN or Inf.
    """
    grid = make_grid(
        inputs,
        vocabulary=model.config.vocab_size,
        pad_id=tokenizer.pad_token_id,
        longest=max_length,
    )
    # Sorted by length, so that little of a batch is padding.
    ordered = sorted(texts, key=len)
    batches: list[tuple[str, Tensors]] = [("grid", feeds) for feeds in grid]
    for start in range(0, len(ordered), _BATCH):
        encoded = tokenizer(
            ordered[start : start + _BATCH],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="np",
        )
        batches.append(("text", {name: encoded[name].astype(np.int64) for name in inputs}))
    for kind, feeds in batches:
        with torch.no_grad():
            output = model(**{name: torch.from_numpy(ids) for name, ids in feeds.items()})
        logits = output.logits.numpy()
        if not np.isfinite(logits).all():
            raise CheckFailedError(
                f"the PyTorch model gives NaN or Inf on {kind} samples; there is nothing to hold "
                "an export against. Check its training."
            )
        yield Sample(kind, feeds, logits)


def _write_model(
    graph: onnx_ir.Model,
    folder: Path,
    target: Target,
    precision: str,
    samples: Sequence[Sample],
    progress: Progress,
) -> tuple[dict[str, Any] | None, list[StageParity]]:
    """Write `model.onnx` at `precision`; return the recipe and every parity stage."""
    model = folder / MODEL_NAME
    full = model if precision == "fp32" else folder / "fp32.onnx"
    onnx_ir.save(graph, full, external_data=f"{full.name}.data")
    stages: list[StageParity] = []

    def hold(stage: str, path: Path, *, optimize: bool) -> None:
        with progress(f"parity: {stage}", None):
            session = open_session(path, provider=target.provider, optimize=optimize)
            of = "fp32" if path == full else precision
            stages.extend(compare_samples(stage, of, samples, session))

    hold("fp32-unoptimized", full, optimize=False)
    hold("fp32", full, optimize=True)
    if precision == "fp32":
        return None, stages
    with progress("quantize", None):
        # Sentences where there are any: random ids make other activations than language does.
        sentences = [sample.feeds for sample in samples if sample.kind == "text"]
        recipe = quantize_int8(full, model, sentences or [sample.feeds for sample in samples])
    full.unlink()
    full.with_name(f"{full.name}.data").unlink()
    hold(precision, model, optimize=True)
    return recipe, stages
