"""Philox-4x32-10 in plain PyTorch, as ``tl.philox`` computes it: the draws of every dropout here.

Whether an element is kept follows from a seed and its place alone, so that every implementation,
tile size and pass draws the same mask, and backward recomputes it instead of storing it. The last
counter word tells the streams of different ops apart: 0 is attention's, 1 that of activations.

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


def threshold(dropout_p: float) -> int:
    """A word keeps its element when it is at least this: dropped with dropout_p, within 2**-32."""
    return min(round(dropout_p * 2**32), _WORD)


def keep_fours(
    seed: Tensor, dropout_p: float, c1: Tensor, c2: Tensor, c3: int, start: int, stop: int
) -> Tensor:
    """True where an element of the last axis is kept, by draws that four neighbours share.

    Element j is decided by word ``j % 4`` for the counter ``(j // 4, c1, c2, c3)``.

    Args:
        seed: int64, one element.
        dropout_p: the probability of a drop.
        c1, c2: int64, last axis of size 1, of shapes that broadcast.
        c3: which stream.
        start, stop: the elements, from the first to before the last.

    Returns:
        bool ``[..., stop - start]``.
    """
    least = threshold(dropout_p)
    first = start // 4
    fours = torch.arange(first, (stop + 3) // 4, device=c1.device)
    words = philox(seed, fours, c1, c2, torch.full_like(fours, c3))
    keep = torch.stack([word >= least for word in words], dim=-1).flatten(-2)
    return keep[..., start - 4 * first : stop - 4 * first]


def dropout_scales(dropout_p: float) -> tuple[int, float]:
    """What a kernel takes for dropout_p: the threshold as int32, and what a kept value grows by.

    Signed, because Triton would make a larger one int64 and compile the kernel again.
    """
    least = threshold(dropout_p)
    return least - (least >> 31 << 32), 1.0 / (1.0 - dropout_p)
