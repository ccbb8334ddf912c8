"""Schema, fake, autograd and dispatch of the dropout op. Needs only torch.

It has no FLOP formula: nothing is multiplied as matrices, and PyTorch counts none either.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmopt_kernels import _triton
from mmopt_kernels.dropout.reference import reference
from mmopt_kernels.errors import KernelInputError

IMPLS = ("auto", "reference", "triton")
_TRITON = (torch.float16, torch.bfloat16, torch.float32)

torch.library.define(
    "mmopt::dropout",
    "(Tensor x, Tensor seed, float dropout_p, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _resolve(impl: str, x: Tensor) -> str:
    if impl not in IMPLS:
        raise KernelInputError(
            f"dropout: impl is {impl!r}, expected one of {', '.join(IMPLS)}. "
            "Leave impl out to choose by what can run."
        )
    if impl == "auto":
        able = _triton.on_gpu(x.device) and _triton.installed() and x.dtype in _TRITON
        return "triton" if able else "reference"
    if impl == "triton":
        _triton.require("dropout", x.device)
        if x.dtype not in _TRITON:
            raise KernelInputError(
                f"dropout: impl is 'triton' and x is {x.dtype}, expected float16, bfloat16 or "
                "float32. Cast x, or leave impl out."
            )
    return impl


def _check(x: Tensor, seed: Tensor, dropout_p: float) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise KernelInputError(
            f"dropout: x is {x.dtype} {tuple(x.shape)}, expected [..., K] of a floating dtype. "
            "Cast x, or give it a last axis."
        )
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise KernelInputError(
            f"dropout: seed is {seed.dtype} {tuple(seed.shape)}, expected one int64. "
            "Draw it with torch.randint(2**63 - 1, (1,))."
        )
    if seed.device != x.device:
        raise KernelInputError(
            f"dropout: seed is on {seed.device}, expected {x.device} like x. Move it there."
        )
    if not 0.0 <= dropout_p < 1.0:
        raise KernelInputError(
            f"dropout: dropout_p is {dropout_p}, expected at least 0 and less than 1. "
            "Multiply by zero to drop everything."
        )


@torch.library.register_fake("mmopt::dropout")
def _dropout_fake(x: Tensor, seed: Tensor, dropout_p: float, impl: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("mmopt::dropout", "CompositeExplicitAutograd")
def _dropout(x: Tensor, seed: Tensor, dropout_p: float, impl: str) -> Tensor:
    """``keep * x / (1 - p)``, contiguous; keep as `reference.keep_mask` of x seen as [M, K]."""
    _check(x, seed, dropout_p)
    chosen = _resolve(impl, x)
    # The product because -1 is ambiguous for an empty tensor.
    x2 = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if chosen == "triton":
        from mmopt_kernels.dropout.kernel import launch  # first Triton import

        return launch(x2, seed, dropout_p).view(x.shape)
    return reference(x2, seed, dropout_p).view(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.dropout_p, ctx.impl = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Linear in x, with a diagonal matrix: the gradient goes through the same mask and factor."""
    (seed,) = ctx.saved_tensors
    return torch.ops.mmopt.dropout(dy, seed, ctx.dropout_p, ctx.impl), None, None, None


torch.library.register_autograd("mmopt::dropout", _differentiate, setup_context=_save)
