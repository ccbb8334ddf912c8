"""The steps of the LoRA linear layer in PyTorch, for the vendor's GEMMs.

Each function does what the launcher of the same name in `kernel` or `kernel_backward` does, so that
`ops` chooses step by step; dx, the sum of several products, is made there. Differentiable, except
for what works in place on its own buffers. With dropout, ``dropout(x)`` and the gradient through it
each exist for a moment as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mmopt_kernels.dropout.ops  # noqa: F401, registers the op


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if seed is None:
        return x
    return torch.ops.mmopt.dropout(x, seed, dropout_p, "auto")  # type: ignore[no-any-return]


def kept(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Which elements of x dropout keeps: for who drops twice by one mask, where drawing is slow."""
    return dropout(torch.ones_like(x), seed, dropout_p) != 0


def masked(x: Tensor, kept: Tensor, dropout_p: float) -> Tensor:
    """``dropout(x)`` by a mask at hand."""
    # Not a product with the mask: a dropped infinity or NaN gives 0.
    return torch.where(kept, x * (1.0 / (1.0 - dropout_p)), 0.0)


def own(s: Tensor, index: Tensor | None, owner: Tensor | None) -> Tensor:
    """``s`` with zeros in the columns that are not of the row's own adapter."""
    if index is None or owner is None:
        return s
    # Not a product: what another adapter overflows to is nothing of this row's.
    return s.masked_fill(index[:, None] != owner[None, :], 0.0)


def down(
    x: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    index: Tensor | None,
    owner: Tensor | None,
) -> Tensor:
    """s = dropout(x) aᵀ: ``[M, C]``."""
    return own(dropout(x, seed, dropout_p) @ a.to(x.dtype).t(), index, owner)


def up(
    x: Tensor, weight: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """y = x weightᵀ + bias + scale s bᵀ: ``[M, N]``."""
    # The adapter first. Either way one GEMM accumulates on what the other wrote, as many bytes; the
    # large one reads it as its tiles end, beside the products of other tiles, and what is rounded
    # in between is the smaller part of the sum.
    bt = b.to(x.dtype).t()
    y = s @ bt if bias is None else torch.addmm(bias, s, bt, alpha=scale)
    return y.addmm_(x, weight.t(), beta=scale if bias is None else 1.0)


def up_backward(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    scale: float,
    index: Tensor | None,
    owner: Tensor | None,
    need_b: bool,
) -> tuple[Tensor, Tensor | None]:
    """ds = scale dy b where the row owns the column, db = scale dyᵀ s."""
    # The scale joins the rank-r factors, the smallest tensors in reach.
    ds = own((dy @ b.to(dy.dtype)) * scale, index, owner)
    return ds, dy.t() @ (s * scale) if need_b else None


def down_backward(ds: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """da = dsᵀ dropout(x): ``[C, K]``."""
    return ds.t() @ dropout(x, seed, dropout_p)
