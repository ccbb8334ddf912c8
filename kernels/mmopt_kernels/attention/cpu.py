"""Attention on the CPU through PyTorch's flash kernel, the one that SDPA runs there."""

from __future__ import annotations

import torch
from torch import Tensor

# The lower bound of a mask that has none.
_ZERO = torch.zeros(1, 1, dtype=torch.int32)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supported(q: Tensor, k: Tensor) -> bool:
    """PyTorch's kernel needs at least one query, one key and one head."""
    return q.device.type == "cpu" and q.numel() > 0 and k.numel() > 0


def _mask(
    q: Tensor, k: Tensor, lo: Tensor | None, hi: Tensor | None, causal: bool
) -> tuple[bool, Tensor | None, Tensor | None]:
    """``is_causal``, additive mask or None, and the empty rows ``[B or 1, 1, S, 1]`` or None.

    The bounds are in host memory here, so looking at them costs no synchronisation.
    """
    S, T = q.shape[2], k.shape[2]
    if lo is None and hi is None:
        # The last query of a causal mask sees every key.
        if not causal or S == 1:
            return False, None, None
        # PyTorch aligns its causal mask at the top left: the same only for S == T.
        if S == T:
            return True, None, None
    # Row bounds [B or 1, S or 1]; PyTorch broadcasts what does not vary.
    lower = _ZERO if lo is None else lo.clamp(min=0)
    upper = torch.full((1, 1), T, dtype=torch.int32) if hi is None else hi.clamp(max=T)
    if causal:
        diagonal = torch.arange(T - S + 1, T + 1, dtype=torch.int32)[None]
        upper = torch.minimum(upper, diagonal)
        if S == T and not lower.any() and torch.equal(upper, diagonal.expand_as(upper)):
            return True, None, None
    j = torch.arange(T, dtype=torch.int32)
    hidden = j >= upper[..., None]
    if lower.any():
        hidden = hidden | (j < lower[..., None])
    elif not causal and not hidden.any():
        return False, None, None
    additive = torch.where(hidden, float("-inf"), torch.zeros((), dtype=q.dtype))
    empty = lower >= upper
    if not empty.any():
        return False, additive[:, None], None
    return False, additive[:, None], empty[:, None, :, None]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    is_causal, mask, empty = _mask(q, k, lo, hi, causal)
    out, lse = _forward(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
        lse = lse.masked_fill(empty[..., 0], float("-inf"))
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    is_causal, mask, empty = _mask(q, k, lo, hi, causal)
    if empty is not None:
        grad_out = grad_out.masked_fill(empty, 0.0)
        # exp(s - inf) is 0 where exp(s + inf) would be inf or NaN.
        lse = lse.masked_fill(empty[..., 0], float("inf"))
    return _backward(  # type: ignore[no-any-return]
        grad_out, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )
