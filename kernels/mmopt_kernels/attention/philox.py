"""The dropout mask of attention in plain PyTorch: Philox-4x32-10, as ``tl.philox`` computes it.

A key is kept or dropped by (seed, sequence, head, query, key) alone, so every implementation, tile
size and pass draws the same mask, and backward recomputes it instead of storing it.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
doi:10.1145/2063384.2063405 (constants: Random123, philox.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
_WORD = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * x``, for words held in int64.

    The product itself may need 64 bits and int64 has 63. ``multiplier - 2**32`` is negative and of
    less than 31 bits, so its product fits; the ``2**32 * x`` that it lacks adds x to the high word.
    """
    product = (multiplier - 2**32) * x
    return (product >> 32).add_(x), product.bitwise_and_(_WORD)


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words for each counter.

    Args:
        seed: int64, one element. Its low and high 32 bits are the key. Never read on the host.
        c0, c1, c2, c3: int64 counter words in ``[0, 2**32)``, of shapes that broadcast. What only
            some axes vary is computed once for the others, which saves the first two rounds.

    Returns:
        Words in ``[0, 2**32)`` as int64; the shape of each is that of the counters it depends on.
    """
    k0, k1 = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    for _ in range(ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        # Small operands first: they broadcast among themselves before they meet the large one.
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


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
    threshold = min(round(dropout_p * 2**32), _WORD)
    first = start // 4
    fours = torch.arange(first, (stop + 3) // 4, device=query.device)
    words = philox(seed, fours, query, sequence_head, torch.zeros_like(fours))
    keep = torch.stack([word >= threshold for word in words], dim=-1).flatten(-2)
    return keep[..., start - 4 * first : stop - 4 * first]
