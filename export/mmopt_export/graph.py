"""Traces a PyTorch model into an ONNX graph, on transformers' own exporter."""

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnx_ir
import torch
import transformers
from onnx_ir.passes.common import RemoveUnusedNodesPass
from packaging.version import Version

from mmopt_export.checkpoint import quiet_transformers
from mmopt_export.decoder.passes import drop_reshapes
from mmopt_export.device import keep_on_device
from mmopt_export.encoders import fused_attention
from mmopt_export.manifest import TensorSpec
from mmopt_export.parts import Part
from mmopt_export.quantization.half import KEPT_WIDE
from mmopt_export.repairs import repair
from mmopt_export.runtime import MODEL
from mmopt_kernels.errors import MmoptError, one_line

OPSET = 20
"""The newest opset that onnxruntime 1.30 runs in full and transformers' exporter emits."""

PROVES_SIZES = Version("2.13")
"""Older ones take sizes for open that are not: of a ResNet, of grouped heads outside decoders."""

# Targets for which ONNX Runtime's own ops are fused in; others keep to the standard ones.
_FUSED = ("cpu", "cuda")


def trace(part: Part, *, target: str) -> onnx_ir.Model:
    """Trace a part with its symbolic dimensions.

    The graph's initializers are the module's own memory, not copies.

    Args:
        part: what to trace.
        target: the target's name.

    Raises:
        MmoptError: the exporter failed, or an input or an output is not in the graph; the message
            names the part and the reason (exit 3).
    """
    graph = part.tracer(part, target) if part.tracer is not None else _traced(part, target)
    if target == "cuda":
        keep_on_device(graph)
    return graph


def _traced(part: Part, target: str) -> onnx_ir.Model:
    """Trace a part that has no tracer of its own."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    module = part.lowered if part.lowered is not None else part.module
    symbols = {name for axes in part.axes.values() for name in axes.values()}
    dims = {
        name: torch.export.Dim(name, min=part.minimums.get(name), max=part.limits.get(name))
        for name in symbols
    }
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes={
            name: {axis: dims[symbol] for axis, symbol in part.axes.get(name, {}).items()}
            for name in part.inputs
        },
        opset_version=OPSET,
        ort_fusions=target if target in _FUSED else None,
    )
    what = _architecture(module)
    if part.name != MODEL:
        what = f"the {part.name} of {what}"
    # For CUDA it stays with the exporter's fusions: nobody has run the op there.
    attention = fused_attention(module, part.inputs) if target == "cpu" else nullcontext(False)
    try:
        with quiet(), attention as fused:
            exported = OnnxExporter().export(module, dict(part.inputs), config=config)
    except Exception as error:  # whatever it is, the model could not be traced
        said = f"{what} could not be traced: {one_line(error, 500)}"
        if "Constraints violated" in said and Version(torch.__version__) < PROVES_SIZES:
            said += (
                f" torch {PROVES_SIZES} proves sizes that {torch.__version__} cannot: update it."
            )
        raise MmoptError(said) from error
    graph: onnx_ir.Model = exported.program
    _require_inputs(graph, part, what)
    repair(graph)
    wide = _wide_nodes(graph, module)
    strip_metadata(graph)
    for node, types in wide.items():
        node.metadata_props[KEPT_WIDE] = types
    _name_dimensions(graph, part)
    if fused:
        drop_reshapes(graph)
        RemoveUnusedNodesPass()(graph)
    return graph


def _wide_nodes(graph: onnx_ir.Model, module: torch.nn.Module) -> dict[onnx_ir.Node, str]:
    """Nodes of modules whose weights transformers keeps fp32 in a model in fp16, or in both halves.

    What they compute leaves the range of fp16: the second projection of a feed-forward of T5, say.
    """
    models = [one for one in module.modules() if isinstance(one, transformers.PreTrainedModel)]
    found: dict[onnx_ir.Node, str] = {}
    for attribute, types in (
        ("_keep_in_fp32_modules", "fp16"),
        ("_keep_in_fp32_modules_strict", "fp16 bf16"),
    ):
        names = {name for one in models for name in getattr(one, attribute, None) or ()}
        if names:
            # As transformers matches them: whole parts of a dotted name.
            pattern = re.compile("|".join(rf"(^|\.)({name})($|\.)" for name in sorted(names)))
            found |= {
                node: types for node in graph.graph if any(map(pattern.search, _modules(node)))
            }
    return found


def _modules(node: onnx_ir.Node) -> list[str]:
    """The modules that a node was traced in, from the outermost in."""
    scopes: list[str] = ast.literal_eval(
        node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    )
    return scopes[:-1]  # the last is the node's own


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


def _architecture(module: torch.nn.Module) -> str:
    """The name of the Hugging Face model in `module`."""
    for inner in module.modules():
        if isinstance(inner, transformers.PreTrainedModel):
            return type(inner).__name__
    return type(module).__name__


def _require_inputs(graph: onnx_ir.Model, part: Part, what: str) -> None:
    """An input that the graph does not use is an input silently lost: an attention mask, say."""
    found = {value.name: value for value in graph.graph.inputs}
    for name in part.inputs:
        if name not in found or not found[name].uses():
            raise MmoptError(f"the graph of {what} lost the input {name}; it would be ignored.")
    outputs = tuple(value.name for value in graph.graph.outputs)
    if outputs != part.outputs:
        raise MmoptError(
            f"the graph of {what} has the outputs {', '.join(map(str, outputs))}, expected "
            f"{', '.join(part.outputs)}."
        )


def _name_dimensions(graph: onnx_ir.Model, part: Part) -> None:
    """Call the symbols of the trace, such as `s43`, what they are: `batch` and `sequence`."""
    names: dict[str, str] = {}
    for value in graph.graph.inputs:
        for axis, name in part.axes.get(str(value.name), {}).items():
            if value.shape is not None and not isinstance(value.shape[axis], int):
                names[str(value.shape[axis])] = name
    for node in graph.graph.all_nodes():
        _rename(node.outputs, names)
    _rename(graph.graph.inputs, names)


def _rename(values: Any, names: dict[str, str]) -> None:
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                dim if isinstance(dim, int) else names.get(str(dim), dim) for dim in value.shape
            )


def strip_metadata(graph: onnx_ir.Model) -> None:
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
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter off stdout, which belongs to the report, and off stderr."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
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
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
