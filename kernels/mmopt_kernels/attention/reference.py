"""Attention written out plainly: the oracle for every other implementation.

Differentiable by PyTorch itself, so its gradients do not depend on the formula in ``backward``.
"""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _visible(q: Tensor, k: Tensor, lo: Tensor | None, hi: Tensor | None, causal: bool) -> Tensor:
    """``[B or 1, 1, S, T]``, true where the query sees the key."""
    S, T = q.shape[2], k.shape[2]
    j = torch.arange(T, device=q.device)
    seen = torch.ones(1, 1, S, T, dtype=torch.bool, device=q.device)
    if causal:
        i = torch.arange(S, device=q.device)
        seen = seen & (j <= i[:, None] + (T - S))
    if lo is not None:
        seen = seen & (j >= lo[:, None, :, None])
    if hi is not None:
        seen = seen & (j < hi[:, None, :, None])
    return seen


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out in the dtype of ``q`` and lse in the dtype computed in."""
    with torch.autocast(q.device.type, enabled=False):
        group = q.shape[1] // k.shape[1]
        # [B, Hq, S, D], [B, Hq, T, D], [B, Hq, T, D]
        qw, kw, vw = _wide(q), _wide(k), _wide(v)
        kw, vw = kw.repeat_interleave(group, 1), vw.repeat_interleave(group, 1)
        seen = _visible(q, k, lo, hi, causal)
        empty = ~seen.any(3, keepdim=True)
        # [B, Hq, S, T]. Empty rows see everything here and are zeroed below: a softmax over no
        # keys is NaN, and so would be its gradient.
        s = (scale * qw @ kw.transpose(2, 3)).masked_fill(~(seen | empty), float("-inf"))
        lse = s.logsumexp(3, keepdim=True)
        out = (s - lse).exp() @ vw
        out = out.masked_fill(empty, 0.0)
        lse = lse.masked_fill(empty, float("-inf"))
        return out.to(q.dtype), lse.squeeze(3)


def reference_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
    """dq, dk and dv, the probabilities recomputed from lse; O(S * T) memory."""
    with torch.autocast(q.device.type, enabled=False):
        B, Hkv, T, D = k.shape
        group = q.shape[1] // Hkv
        qw, kw, vw, dout = _wide(q), _wide(k), _wide(v), _wide(grad_out)
        kw, vw = kw.repeat_interleave(group, 1), vw.repeat_interleave(group, 1)
        seen = _visible(q, k, lo, hi, causal)
        # exp(s - lse) of a hidden key may overflow before it is masked: mask the exponent.
        # [B, Hq, S, T]
        p = scale * qw @ kw.transpose(2, 3) - lse[..., None]
        p = p.masked_fill(~seen, float("-inf")).exp()
        # d lse / d s = p, so its gradient joins the row term of the softmax's.
        delta = (dout * _wide(out)).sum(3, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[..., None]
        ds = p * (dout @ vw.transpose(2, 3) - delta) * scale
        dq = ds @ kw
        dk = (ds.transpose(2, 3) @ qw).view(B, Hkv, group, T, D).sum(2)
        dv = (p.transpose(2, 3) @ dout).view(B, Hkv, group, T, D).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
