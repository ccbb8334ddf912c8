"""Traces a decoder's Part into one ONNX graph for prefill and decode."""

from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmopt_export.caches import pasts
from mmopt_export.decoder.part import EMBEDS, IDS, LoweredDecoder, cache_map
from mmopt_export.decoder.passes import (
    drop_reshapes,
    fuse_skip_norms,
    hoist_last_token,
    pack_projections,
    sink_transposes,
    split_gemms,
    transpose_weights,
)
from mmopt_export.decoder.prelude import add_prelude
from mmopt_export.decoder.rotation import rotate_in_attention, tabulate_rotations
from mmopt_export.graph import OPSET, quiet, strip_metadata
from mmopt_export.parts import Part
from mmopt_export.providers import get_target
from mmopt_kernels.errors import InputError, MmoptError, one_line


def trace_decoder(part: Part, target: str) -> onnx_ir.Model:
    """The graph of a part that `decoder_part` made; its weights are the model's own memory.

    Args:
        part: its `lowered` module is traced.
        target: `cpu` and `portable` also drop the padding that all rows share, so that a padded
            chunk after a past is right; on `cuda` that would copy a length to the host each step.

    Raises:
        InputError: the part is of another kind.
        MmoptError: PyTorch's exporter failed; the message holds its reason (exit 3).
    """
    module = part.lowered
    if not isinstance(module, LoweredDecoder):
        raise InputError(f"the part {part.name} is no decoder; trace it with graph.trace.")
    tokens = EMBEDS if EMBEDS in part.inputs else IDS
    inner, shapes = _inner_inputs(part, module, tokens)
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                args=(),
                kwargs=inner,
                dynamic_shapes=shapes,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        if isinstance(error, MmoptError):
            raise
        cause = error.__cause__ or error
        raise MmoptError(
            f"{type(module.model).__name__} could not be traced: {one_line(cause, 500)}"
        ) from error
    if program is None:
        raise MmoptError(f"{type(module.model).__name__} could not be traced: no graph came back.")
    _name_weights(program.model, module.model)
    transpose_weights(program.model)
    program.optimize()
    model = program.model
    _name_values(model, part)
    if "total" in part.limits:
        tabulate_rotations(model, part.limits["total"])
    trim = target != "cuda"
    add_prelude(model, tokens, trim=trim)
    split_gemms(model)
    sink_transposes(model)
    drop_reshapes(model)
    if get_target(target).contrib:
        fuse_skip_norms(model)
        pack_projections(model)
        rotate_in_attention(model)
    hoist_last_token(model)
    RemoveUnusedNodesPass()(model)
    if trim:
        _name_trimmed(model)
    model.opset_imports["com.microsoft"] = 1
    _require_io(model, part)
    strip_metadata(model)
    return model


def _name_weights(graph: onnx_ir.Model, model: torch.nn.Module) -> None:
    """Give weights the names of the model's state dict; a tied one has the first of its names."""
    names: dict[int, str] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        names.setdefault(id(parameter), name)
    first = {name: names[id(parameter)] for name, parameter in parameters}
    for value in list(graph.graph.initializers.values()):
        # The trace's module holds the model as its `model`.
        name = str(value.name).removeprefix("model.")
        if name != value.name:
            graph.graph.initializers.pop(str(value.name))
            value.name = first.get(name, name)
            graph.graph.initializers[value.name] = value


def _name_values(model: onnx_ir.Model, part: Part) -> None:
    """Name the buffers' inputs and outputs and every symbolic dimension."""
    cache = cache_map(part)
    layers = range(len(cache.layers))
    names = {f"keys_{layer}": cache.layers[layer][0] for layer in layers}
    names |= {f"values_{layer}": cache.layers[layer][1] for layer in layers}
    inputs = {str(value.name): value for value in model.graph.inputs}
    extras = tuple(part.inputs)[2 + 2 * len(layers) :]
    names |= {f"extra_{name}": name for name in extras}
    for old, new in names.items():
        inputs[old].name = new
    ordered = [inputs[one] for one in ("tokens", "position_ids", "seqlens_k", "total", "last")]
    by_name = {str(value.name): value for value in model.graph.inputs}
    buffers = [by_name[past] for past in pasts(cache)]
    del model.graph.inputs[:]
    model.graph.inputs.extend([*ordered, *buffers, *(by_name[name] for name in extras)])
    for value, name in zip(model.graph.outputs, part.outputs, strict=True):
        value.name = name
    named: list[tuple[onnx_ir.Value, dict[int, str]]]
    named = [(inputs["tokens"], {0: "batch", 1: "sequence"}), (buffers[0], {2: "capacity"})]
    named += [(by_name[name], part.axes.get(name, {})) for name in extras]
    symbols = {
        str(dim): axes[axis]
        for value, axes in named
        for axis, dim in enumerate(value.shape or ())
        if axis in axes
    }
    values = [value for node in model.graph for value in node.outputs] + list(model.graph.inputs)
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                dim if isinstance(dim, int) else symbols.get(str(dim), dim) for dim in value.shape
            )
    for value in model.graph.outputs[1:]:
        # Not the symbol of the past: an unshared buffer grows, and equal symbols could make ONNX
        # Runtime reuse the past's memory for it.
        value.shape = onnx_ir.Shape(["batch", cache.heads, "present", cache.head_size])


def _name_trimmed(model: onnx_ir.Model) -> None:
    """Rename the columns behind the prelude, which may be fewer than the input has.

    Under one symbol ONNX Runtime could put the input's ids where positions of another size were.
    """
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = onnx_ir.Shape(
                    "unpadded" if str(dim) == "sequence" else dim for dim in value.shape
                )


def _require_io(model: onnx_ir.Model, part: Part) -> None:
    """An input that the graph does not use is an input silently lost."""
    for value in model.graph.inputs:
        if not value.uses():
            raise MmoptError(
                f"the graph of {part.name} lost the input {value.name}; it would be ignored."
            )
    found = [value.name for value in model.graph.inputs], [v.name for v in model.graph.outputs]
    expected = list(part.inputs), list(part.outputs)
    if found != expected:
        raise MmoptError(f"the graph of {part.name} has {found}, expected {expected}.")


def _inner_inputs(
    part: Part, module: LoweredDecoder, tokens: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Examples and dynamic shapes of what `LoweredDecoder.forward` takes."""
    cache = cache_map(part)
    batch, sequence, capacity = (
        torch.export.Dim(name) for name in ("batch", "sequence", "capacity")
    )
    new = part.inputs[tokens]
    lengths = torch.full((new.shape[0],), new.shape[1], dtype=torch.int64)
    inner: dict[str, Any] = {
        "tokens": new,
        "position_ids": torch.arange(new.shape[1]).expand(new.shape[0], -1).contiguous(),
        "seqlens_k": (lengths - 1).to(torch.int32),
        "total": torch.tensor(new.shape[1], dtype=torch.int32),
        "last": lengths - 1,
        "keys": [part.inputs[layer[0]] for layer in cache.layers],
        "values": [part.inputs[layer[1]] for layer in cache.layers],
        "extra": dict(module.extra.inputs),
    }
    names = {"batch": batch, "sequence": sequence, "capacity": capacity}
    buffer = {0: batch, 2: capacity}
    shapes: dict[str, Any] = {
        "tokens": {0: batch, 1: sequence},
        "position_ids": {0: batch, 1: sequence},
        "seqlens_k": {0: batch},
        "total": {},
        "last": {0: batch},
        "keys": [buffer for _ in cache.layers],
        "values": [buffer for _ in cache.layers],
        "extra": {
            name: {
                axis: names.setdefault(symbol, torch.export.Dim(symbol))
                for axis, symbol in module.extra.axes.get(name, {}).items()
            }
            for name in module.extra.inputs
        },
    }
    return inner, shapes
