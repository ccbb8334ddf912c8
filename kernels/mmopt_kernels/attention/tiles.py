"""Pieces that attention's forward and backward kernels share."""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@triton.jit
def row_bounds(
    p_lo,
    p_hi,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    i_b,
    o_m,
    m_m,
    S,
    T,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The keys [lo, hi) that each row sees, inside [0, T]; nothing when lo >= hi."""
    if INTERVALS:
        o_m64 = o_m.to(tl.int64)
        b_lo = tl.load(p_lo + i_b * stride_lob + o_m64 * stride_lom, mask=m_m, other=0)
        b_hi = tl.load(p_hi + i_b * stride_hib + o_m64 * stride_him, mask=m_m, other=0)
        b_lo = tl.maximum(b_lo, 0)
        b_hi = tl.minimum(b_hi, T)
    else:
        b_lo = tl.zeros_like(o_m)
        b_hi = tl.zeros_like(o_m) + T
    if CAUSAL:
        b_hi = tl.minimum(b_hi, o_m + (T - S + 1))
    return b_lo, b_hi


@triton.jit
def key_ranges(b_lo, b_hi, m_row, T, BLOCK_N: tl.constexpr):
    """Where a tile of rows starts and ends to need a mask: start, full, part, end.

    Some row sees a key in [start, end); every row of m_row sees all keys of [full, part), which
    is whole blocks. Empty and absent rows, outside m_row, leave the bounds to the others.
    """
    i_start = tl.min(tl.where(m_row, b_lo, T)) // BLOCK_N * BLOCK_N
    i_end = tl.max(tl.where(m_row, b_hi, 0))
    i_full = tl.cdiv(tl.max(tl.where(m_row, b_lo, 0)), BLOCK_N) * BLOCK_N
    i_part = tl.min(tl.where(m_row, b_hi, T)) // BLOCK_N * BLOCK_N
    return i_start, i_full, tl.maximum(i_part, i_full), i_end


@triton.jit
def tanh(b_x):
    """Accurate near 0 as well, where softcap magnifies an absolute error.

    The polynomial and its limit are those of Cephes (Moshier, tanhf.c), relative error 1.3e-7;
    beyond it exp2(-2 |x| log2 e) neither overflows nor cancels.
    """
    b_z = b_x * b_x
    b_near = -5.70498872745e-3 * b_z + 2.06390887954e-2
    b_near = b_near * b_z - 5.37397155531e-2
    b_near = b_near * b_z + 1.33314422036e-1
    b_near = b_near * b_z - 3.33332819422e-1
    b_near = b_near * b_z * b_x + b_x
    b_e = tl.exp2(tl.abs(b_x) * -2.8853900817779268)
    b_far = (1.0 - b_e) / (1.0 + b_e)
    return tl.where(tl.abs(b_x) < 0.625, b_near, tl.where(b_x < 0.0, -b_far, b_far))


@triton.jit
def kept(seed, i_bh, o_m, o_n, threshold):
    """Which probabilities dropout keeps, for row and key indices that broadcast.

    Counter (key, row, batch * heads + head, 0), first output word: no tile size enters, so every
    pass recomputes the same mask. threshold is the bit pattern of an unsigned number.
    """
    b_x, _, _, _ = tl.philox(seed, o_n, o_m, i_bh.to(tl.int32), 0)
    return b_x >= threshold.to(tl.uint32, bitcast=True)


def block_d(head_dim: int) -> int:
    """The head dimension as the kernels hold it: a power of two, and 16 or more for tl.dot."""
    return max(16, triton.next_power_of_2(head_dim))  # type: ignore[no-any-return]


# PyTorch's build says which vendor's GPU the launchers will meet.
HIP = torch.version.hip is not None


def warps_of(tile: dict[str, int], hip: bool) -> dict[str, int]:
    """The tile with as many threads on AMD, whose warps have 64 lanes instead of 32.

    With the warps of CUDA each would have half of the registers there, and spill hundreds.
    """
    return tile | {"num_warps": tile["num_warps"] // 2} if hip else tile


def both_bounds(
    lo: Tensor | None, hi: Tensor | None, T: int
) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int, int]]:
    """lo, hi and their strides; one bound alone gets its trivial partner.

    A batch of one serves every sequence: stride 0, without a copy.
    """
    if lo is None and hi is None:
        return None, None, (0, 0, 0, 0)
    if lo is None:
        assert hi is not None
        lo = torch.zeros_like(hi)
    if hi is None:
        hi = torch.full_like(lo, T)
    by_batch = [0 if x.shape[0] == 1 else x.stride(0) for x in (lo, hi)]
    return lo, hi, (by_batch[0], lo.stride(1), by_batch[1], hi.stride(1))


def score_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """What q . k is multiplied by, and the cap of its tanh: together scores in base 2."""
    if softcap is None:
        return scale * LOG2_E, 0.0
    return scale / softcap, softcap * LOG2_E


def dropout_scales(dropout_p: float) -> tuple[int, float]:
    """The threshold of `kept`, as a signed 32-bit integer, and what a kept probability grows by.

    Signed, because Triton would make a larger one int64 and compile the kernel again.
    """
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return threshold - (threshold >> 31 << 32), 1.0 / (1.0 - dropout_p)
