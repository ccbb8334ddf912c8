"""The LoRA linear layer written out plainly: the oracle for every other implementation."""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``y`` and ``s = x @ a.T``, both in the dtype of ``x``."""
    with torch.autocast(x.device.type, enabled=False):
        # The adapter is cast to the activation's dtype before anything is multiplied: that
        # rounding belongs to the contract, the widening to the oracle.
        a, b = a.to(x.dtype), b.to(x.dtype)
        s = _wide(x) @ _wide(a).mT  # [..., R]
        y = _wide(x) @ _wide(weight).mT + scale * (s @ _wide(b).mT)  # [..., N]
        if bias is not None:
            y = y + _wide(bias)
        return y.to(x.dtype), s.to(x.dtype)
