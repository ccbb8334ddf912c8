"""Attention written out plainly: the oracle for every other implementation.

Differentiable by PyTorch itself, so its gradients do not depend on the formula in ``backward``.
"""

import torch
from torch import Tensor

from mmopt_kernels._autocast import without_autocast
from mmopt_kernels.attention.philox import keep_mask


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


def _scores(qw: Tensor, kw: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[B, Hq, S, T]``, not yet masked."""
    raw = scale * qw @ kw.transpose(2, 3)
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def _dropout(p: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """``p`` ``[B, Hq, S, T]`` with dropped keys zero and kept ones scaled up."""
    if seed is None:
        return p
    B, H, S, T = p.shape
    bh = torch.arange(B * H, device=p.device).view(B, H, 1, 1)
    i = torch.arange(S, device=p.device)[:, None]
    return p * keep_mask(seed, dropout_p, bh, i, 0, T) / (1.0 - dropout_p)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Out in the dtype of ``q`` and lse in the dtype computed in."""
    with without_autocast(q):
        B, Hq, S, _ = q.shape
        group = Hq // k.shape[1]
        # [B, Hq, S, D], [B, Hq, T, D], [B, Hq, T, D]
        qw, kw, vw = _wide(q), _wide(k), _wide(v)
        kw, vw = kw.repeat_interleave(group, 1), vw.repeat_interleave(group, 1)
        seen = _visible(q, k, lo, hi, causal)
        # [B or 1, Hq or 1, S, 1]. Empty rows see everything here and are zeroed below: a softmax
        # over no keys is NaN, and so would be its gradient.
        empty = ~seen.any(3, keepdim=True)
        if sinks is not None:
            empty = empty & (sinks == float("-inf"))[:, None, None]
        # [B, Hq, S, T]
        s = _scores(qw, kw, scale, softcap).masked_fill(~(seen | empty), float("-inf"))
        columns = s
        if sinks is not None:
            # A sink is one more key, with a score of its own and the value zero.
            columns = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(B, Hq, S, 1)], 3)
        lse = columns.logsumexp(3, keepdim=True)
        out = _dropout((s - lse).exp(), seed, dropout_p) @ vw
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
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks, the probabilities recomputed from lse; O(S * T) memory.

    dsinks is empty without sinks.
    """
    with without_autocast(q):
        B, Hkv, T, D = k.shape
        group = q.shape[1] // Hkv
        qw, kw, vw, dout = _wide(q), _wide(k), _wide(v), _wide(grad_out)
        kw, vw = kw.repeat_interleave(group, 1), vw.repeat_interleave(group, 1)
        seen = _visible(q, k, lo, hi, causal)
        s = _scores(qw, kw, scale, softcap)
        # exp(s - lse) of a hidden key may overflow before it is masked: mask the exponent.
        # [B, Hq, S, T]
        p = (s - lse[..., None]).masked_fill(~seen, float("-inf")).exp()
        # d lse / d s = p, so its gradient joins the row term of the softmax's.
        delta = (dout * _wide(out)).sum(3, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[..., None]
        dp = _dropout(dout @ vw.transpose(2, 3), seed, dropout_p)
        ds = p * (dp - delta) * scale
        if softcap is not None:
            ds = ds * (1.0 - (s / softcap).square())
        dq = ds @ kw
        dk = (ds.transpose(2, 3) @ qw).view(B, Hkv, group, T, D).sum(2)
        dv = _dropout(p, seed, dropout_p).transpose(2, 3) @ dout
        dv = dv.view(B, Hkv, group, T, D).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), sinks_backward(sinks, delta, lse)


def sinks_backward(sinks: Tensor | None, delta: Tensor, lse: Tensor) -> Tensor:
    """The gradient of the sinks ``[Hq]`` from ``delta`` ``[B, Hq, S, 1]`` and lse.

    A sink's probability is ``exp(sink - lse)`` and its value zero, so its score's gradient is
    ``-delta`` times that. A row with neither key nor sink (lse -inf) has none.
    """
    if sinks is None:
        return lse.new_empty(0)
    p = (sinks.to(lse.dtype)[:, None] - lse).exp().masked_fill(lse == float("-inf"), 0.0)
    return -(p * delta.squeeze(3)).sum((0, 2)).to(sinks.dtype)
