"""Which activations dropout keeps, in plain PyTorch; the LoRA kernels draw the same mask."""

from __future__ import annotations

import torch
from torch import Tensor

from mmopt_kernels._philox import keep_fours

# The last counter word of these draws; attention's is 0.
STREAM = 1
# Draws at once: int64 words of a few MiB, whatever the number of rows.
_BLOCK = 2**18


def keep_mask(seed: Tensor, dropout_p: float, M: int, K: int, start: int = 0) -> Tensor:
    """True where column k of row m is kept, with probability ``1 - dropout_p`` within ``2**-32``.

    Four neighbouring columns share a draw: column k is decided by word ``k % 4`` for the counter
    ``(k // 4, m mod 2**32, m // 2**32, 1)``.

    Args:
        seed: int64, one element; the mask is on its device.
        dropout_p: the probability of a drop.
        M: how many rows.
        K: how many columns.
        start: the first row.

    Returns:
        bool ``[M, K]``.
    """
    m = torch.arange(start, start + M, device=seed.device)[:, None]
    return keep_fours(seed, dropout_p, m & 0xFFFFFFFF, m >> 32, STREAM, 0, K)


def reference(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """``keep * x / (1 - p)`` of ``[M, K]``, rounded once."""
    M, K = x.shape
    y = x.new_zeros(M, K)
    step = max(1, 4 * _BLOCK // max(K, 1))
    for m in range(0, M, step):
        block = x[m : m + step]
        kept = keep_mask(seed, dropout_p, block.shape[0], K, m)
        wide = block if block.dtype == torch.float64 else block.float()
        # Not a product with the mask: a dropped infinity or NaN gives 0.
        y[m : m + step] = torch.where(kept, wide * (1.0 / (1.0 - dropout_p)), 0.0)
    return y
