"""The linear cross-entropy written out plainly: the oracle for every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from mmopt_kernels._autocast import without_autocast


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """``[M, V]``, all at once, in float32 (float64 for float64)."""
    with without_autocast(hidden):
        logits = _wide(hidden) @ _wide(weight).mT
        if bias is not None:
            logits = logits + _wide(bias)
        if a is not None and b is not None:
            # Cast to the activation's dtype first: that rounding belongs to the contract.
            wide_a, wide_b = _wide(a.to(hidden.dtype)), _wide(b.to(hidden.dtype))
            logits = logits + (_wide(hidden) @ wide_a.mT) @ wide_b.mT
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The loss of each token, ``[M]``; differentiable."""
    logits = reference_logits(hidden, weight, bias, a, b, softcap)
    losses = cross_entropy(
        logits,
        labels.long(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    z = logits.logsumexp(1).square() * z_loss
    return losses + torch.where(labels == ignore_index, 0.0, z)


def reference_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight, bias, a and b, in float32 (float64 for float64)."""
    with without_autocast(hidden):
        x = reference_logits(hidden, weight, bias, a, b, softcap)
        V = x.shape[1]
        seen = labels != ignore_index
        target = one_hot(torch.where(seen, labels, 0).long(), V).to(x.dtype)
        target = (1.0 - label_smoothing) * target + label_smoothing / V
        slope = 1.0 + 2.0 * z_loss * x.logsumexp(1, keepdim=True)
        dx = (x.softmax(1) * slope - target) * (grad * seen)[:, None]  # [M, V]
        if softcap is not None:
            dx = dx * (1.0 - (x / softcap).square())
        dhidden, dweight = dx @ _wide(weight), dx.mT @ _wide(hidden)
        da = db = None
        if a is not None and b is not None:
            wide_a, wide_b = _wide(a.to(hidden.dtype)), _wide(b.to(hidden.dtype))
            ds = dx @ wide_b  # [M, R]
            db = dx.mT @ (_wide(hidden) @ wide_a.mT)
            da = ds.mT @ _wide(hidden)
            dhidden = dhidden + ds @ wide_a
        return dhidden, dweight, dx.sum(0), da, db
