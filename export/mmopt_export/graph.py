"""Traces a PyTorch model into an ONNX graph, on transformers' own exporter."""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir
import torch

from mmopt_export.checkpoint import quiet_transformers
from mmopt_export.manifest import TensorSpec
from mmopt_kernels.errors import InputError, MmoptError, one_line

OPSET = 20
"""The newest opset that onnxruntime 1.30 runs in full and transformers' exporter emits."""

# What the tokenizer gives that a text encoder may take; all int64 [batch, sequence].
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def require_text_classifier(model: Any, tokenizer: Any) -> None:
    """Refuse, by name, an architecture whose export has not been proven.

    Raises:
        InputError: not a sequence classification model over text, or one without tokenizer.
    """
    name = type(model).__name__
    if not name.endswith("ForSequenceClassification") or "input_ids" not in _parameters(model):
        raise InputError(
            f"{name} cannot be exported, expected a text classifier "
            "(a ...ForSequenceClassification architecture). Fine-tune one with `mmopt train`."
        )
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        raise InputError(f"{name} is a multi-label classifier, expected one label per text.")
    if tokenizer is None:
        raise InputError(f"the {name} has no tokenizer. Save one beside it with save_pretrained.")


def text_inputs(model: Any, tokenizer: Any) -> list[str]:
    """The inputs of the graph: what the tokenizer gives and the model's forward takes."""
    accepted = _parameters(model)
    return [
        name
        for name in _TEXT_INPUTS
        if name in accepted and name in (*tokenizer.model_input_names, "attention_mask")
    ]


def trace(model: Any, inputs: list[str], *, max_length: int, target: str) -> onnx_ir.Model:
    """Trace `model` with dynamic batch and sequence length.

    Args:
        model: a merged text classifier, eval mode, fp32, on the CPU.
        inputs: names of its int64 `[batch, sequence]` inputs.
        max_length: the longest sequence that the model has positions for.
        target: the target's name, for which ONNX Runtime's own ops are fused in.

    Raises:
        MmoptError: the exporter failed; the message holds its reason (exit 3).
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    length = min(16, max_length)
    ids = torch.arange(2 * length).reshape(2, length) % model.config.vocab_size
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=max_length)}
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=dict.fromkeys(inputs, axes),
        opset_version=OPSET,
        ort_fusions=target,
    )
    try:
        with _quiet():
            exported = OnnxExporter().export(
                model, {name: values[name] for name in inputs}, config=config
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise MmoptError(
            f"{type(model).__name__} could not be traced: {one_line(error, 500)}"
        ) from error
    graph: onnx_ir.Model = exported.program
    _require_inputs(graph, inputs)
    _strip_metadata(graph)
    _name_dimensions(graph, inputs)
    return graph


def tensor_specs(values: Any) -> tuple[TensorSpec, ...]:
    """The names, NumPy types and shapes of a graph's inputs or outputs."""
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=np.dtype(value.dtype.numpy()).name,
            shape=tuple(
                dim if isinstance(dim, int) else str(dim.value) for dim in value.shape.dims
            ),
        )
        for value in values
    )


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _require_inputs(graph: onnx_ir.Model, inputs: list[str]) -> None:
    """An input that the graph does not use is an input silently lost: an attention mask, say."""
    found = {value.name: value for value in graph.graph.inputs}
    for name in inputs:
        if name not in found or not found[name].uses():
            raise MmoptError(f"the exported graph lost the input {name}; it would be ignored.")


def _name_dimensions(graph: onnx_ir.Model, inputs: list[str]) -> None:
    """Call the symbols of the trace, such as `s43`, what they are: `batch` and `sequence`."""
    names: dict[str, str] = {}
    for value in graph.graph.inputs:
        if value.name in inputs and value.shape is not None:
            batch, sequence = (str(dim) for dim in value.shape)
            names |= {batch: "batch", sequence: "sequence"}
    for node in graph.graph.all_nodes():
        _rename(node.outputs, names)
    _rename(graph.graph.inputs, names)


def _rename(values: Any, names: dict[str, str]) -> None:
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                dim if isinstance(dim, int) else names.get(str(dim), dim) for dim in value.shape
            )


def _strip_metadata(graph: onnx_ir.Model) -> None:
    """Drop stack traces and trace names: they hold paths and make two exports differ."""
    graph.metadata_props.clear()
    for part in graph.graphs():
        part.metadata_props.clear()
        part.doc_string = None
        for value in (*part.inputs, *part.initializers.values()):
            value.metadata_props.clear()
        for node in part.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' chatter off stdout, which belongs to the report, and off stderr."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            quiet_transformers(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
