"""The dropout mask of attention in plain PyTorch, by the draws of `mmopt_kernels._philox`."""

from __future__ import annotations

from torch import Tensor

from mmopt_kernels._philox import keep_fours

# The last counter word of attention's draws.
STREAM = 0


def keep_mask(
    seed: Tensor, dropout_p: float, sequence_head: Tensor, query: Tensor, start: int, stop: int
) -> Tensor:
    """True where a key is kept, with probability ``1 - dropout_p`` to within ``2**-32``.

    Four neighbouring keys share a draw: key j is decided by word ``j % 4`` for the counter
    ``(j // 4, query, sequence_head, 0)``.

    Args:
        seed: int64, one element.
        dropout_p: the probability of a drop.
        sequence_head: ``b * Hq + h``, int64, last axis of size 1.
        query: the positions i, int64, of a shape that broadcasts with it, last axis of size 1.
        start, stop: the keys, from the first to before the last.

    Returns:
        bool ``[..., stop - start]``.
    """
    return keep_fours(seed, dropout_p, query, sequence_head, STREAM, start, stop)
