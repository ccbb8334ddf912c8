"""Traces encoders with one op for attention, where their masks say no more than what is padding."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmopt_export.encoder_decoder.lowering import Lowering
from mmopt_export.generation import MASK
from mmopt_export.lowering import answered_by
from mmopt_kernels.errors import InputError


@contextlib.contextmanager
def fused_attention(module: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[bool]:
    """Let attention that a trace of `module` meets be `com.microsoft::MultiHeadAttention`.

    The module runs once before: where it attends in another way (a window, causal, with a bias of
    its own, fewer heads of keys) everything stays as it is.

    Yields:
        Whether it is so.
    """
    name = type(module).__name__
    if not _fits(module, inputs, Lowering(name, surveys=True)):
        yield False
        return
    with answered_by(Lowering(name), module):
        yield True


def _fits(module: nn.Module, inputs: Mapping[str, Tensor], survey: Lowering) -> bool:
    inputs = dict(inputs)
    if MASK in inputs:
        # Where all is real transformers may leave masks out, and a trace would meet others.
        inputs[MASK] = inputs[MASK].clone()
        inputs[MASK][0, -1] = 0
    try:
        with torch.no_grad(), answered_by(survey, module):
            module(**inputs)
    except (InputError, TypeError, AttributeError, ValueError, IndexError, RuntimeError):
        # Refused, or something of the model's own that only the plain trace can do or name.
        return False
    return bool(survey.found)
