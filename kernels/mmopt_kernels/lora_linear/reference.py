"""LoRA linear layers written out plainly: the oracle for every other implementation.

Notation: M rows, K features in, N features out, C columns of s, the ranks of all adapters of all
projections in one row. Everything here is dense and masked; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmopt_kernels._autocast import without_autocast
from mmopt_kernels.dropout.reference import keep_mask


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _kept(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | float:
    """What multiplies x [M, K] in dropout: 0 or 1 / (1 - p)."""
    if seed is None:
        return 1.0
    kept = keep_mask(seed, dropout_p, x.shape[0], x.shape[1])
    return kept.to(_wide(x).dtype) / (1.0 - dropout_p)


def _own(
    index: Tensor | None, adapters: int, a: Sequence[Tensor], like: Tensor
) -> list[Tensor | float]:
    """For each projection 1 where a row of the batch uses the column of s, 0 elsewhere."""
    if index is None:
        return [1.0] * len(a)
    own: list[Tensor | float] = []
    for factor in a:
        R = factor.shape[0] // max(adapters, 1)
        adapter = torch.arange(adapters, device=index.device).repeat_interleave(R)
        own.append((index[:, None] == adapter[None, :]).to(_wide(like).dtype))  # [M, E * R]
    return own


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    index: Tensor | None,
    seed: Tensor | None,
    adapters: int,
    scale: float,
    dropout_p: float,
) -> tuple[list[Tensor], Tensor]:
    """``y`` of each projection and ``s`` of all, in the dtype of ``x``; differentiable.

    Args:
        x: ``[M, K]``.
        weights: each ``[N, K]``, dense.
        a, b: each ``[E * R, K]`` and ``[N, E * R]``, one adapter after the other.
        biases: each ``[N]`` or None.
        index: ``[M]``, the adapter of each row, -1 for none; or None, for all of them.
        seed: int64, one element, or None without dropout.
        adapters: E.
    """
    with without_autocast(x):
        # The adapter is cast to the activation's dtype before anything is multiplied: that
        # rounding belongs to the contract, the widening to the oracle.
        wide_a = [_wide(factor.to(x.dtype)) for factor in a]
        wide_b = [_wide(factor.to(x.dtype)) for factor in b]
        dropped = _wide(x) * _kept(x, seed, dropout_p)  # [M, K]
        own = _own(index, adapters, a, x)
        s = [(dropped @ f.mT) * o for f, o in zip(wide_a, own, strict=True)]  # [M, E * R] each
        y = []
        for weight, s_i, b_i, bias in zip(weights, s, wide_b, biases, strict=True):
            y_i = _wide(x) @ _wide(weight).mT + scale * (s_i @ b_i.mT)  # [M, N]
            y.append((y_i if bias is None else y_i + _wide(bias)).to(x.dtype))
        return y, torch.cat(s, dim=1).to(x.dtype)


def reference_backward(
    dy: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    index: Tensor | None,
    seed: Tensor | None,
    adapters: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x, weights, a, b and biases, in float32 (float64 for float64).

    ``dy`` has None for an output that nothing depends on. s is computed again, unrounded.
    """
    with without_autocast(x):
        kept = _kept(x, seed, dropout_p)
        wide_x = _wide(x)
        dropped = wide_x * kept
        dx = torch.zeros_like(wide_x)
        dweights: list[Tensor] = []
        da: list[Tensor] = []
        db: list[Tensor] = []
        dbiases: list[Tensor] = []
        own = _own(index, adapters, a, x)
        for dy_i, weight, a_i, b_i, o in zip(dy, weights, a, b, own, strict=True):
            g = wide_x.new_zeros(x.shape[0], weight.shape[0]) if dy_i is None else _wide(dy_i)
            wide_a, wide_b = _wide(a_i.to(x.dtype)), _wide(b_i.to(x.dtype))
            s = (dropped @ wide_a.mT) * o  # [M, E * R]
            ds = scale * (g @ wide_b) * o  # [M, E * R]
            dx = dx + g @ _wide(weight) + (ds @ wide_a) * kept
            dweights.append(g.mT @ wide_x)
            da.append(ds.mT @ dropped)
            db.append(scale * (g.mT @ s))
            dbiases.append(g.sum(0))
        return dx, dweights, da, db, dbiases
