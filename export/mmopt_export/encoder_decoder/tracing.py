"""Traces the Parts of an encoder-decoder model, whose inputs have names with dots."""

import copy
from dataclasses import replace

import onnx_ir
from torch import Tensor, nn

from mmopt_export.adapters.swap import Bound
from mmopt_export.encoder_decoder.lowering import Role
from mmopt_export.encoder_decoder.modules import LoweredDecoder, LoweredEncoder
from mmopt_export.encoder_decoder.survey import Survey
from mmopt_export.graph import trace
from mmopt_export.parts import Part
from mmopt_export.providers import get_target


def trace_part(part: Part, target: str) -> onnx_ir.Model:
    """`Part.tracer` of the parts of `encoder_decoder_parts`: the graph, whose weights are the
    model's own memory.

    Args:
        part: its `lowered` module is traced.
        target: the target's name.

    Raises:
        MmoptError: the exporter failed (exit 3).
    """
    bound = part.lowered if isinstance(part.lowered, Bound) else None
    given = part.lowered if bound is None else bound.module
    assert isinstance(given, (LoweredEncoder, LoweredDecoder))
    lowered = copy.copy(given)
    lowered.plain = _plain_roles(lowered.found, target)
    names = {name.replace(".", "__"): name for name in part.inputs}
    safe = replace(
        part,
        inputs={name: part.inputs[original] for name, original in names.items()},
        axes={name: part.axes[original] for name, original in names.items()},
        lowered=_Renamed(lowered if bound is None else bound.around(lowered), names),
        tracer=None,
    )
    graph = trace(safe, target=target)
    for value in graph.graph.inputs:
        value.name = names[str(value.name)]
    return graph


def _plain_roles(found: Survey, target: str) -> tuple[Role, ...]:
    """Whose attention is standard ops."""
    if not get_target(target).contrib:
        return ("encoder", "self", "cross")
    if target == "cuda" and any(one.biased for one in found.own):
        # ONNX Runtime's CUDA kernel refuses GroupQueryAttention's attention_bias.
        return ("self",)
    return ()


class _Renamed(nn.Module):
    """Takes inputs under names that Python's parameters can have."""

    def __init__(self, module: nn.Module, names: dict[str, str]) -> None:
        super().__init__()
        self.module = module
        self._names = names

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """What the module gives for the inputs under its own names."""
        outputs: dict[str, Tensor] = self.module(
            **{original: inputs[name] for name, original in self._names.items()}
        )
        return outputs
