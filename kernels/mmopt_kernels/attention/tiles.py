"""Pieces that attention's forward and backward kernels share."""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmopt_kernels import _triton, tuning
from mmopt_kernels._descriptors import descriptor
from mmopt_kernels._vectors import stride_of, vector_of

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# Bytes that the heads which run side by side read again and again, and should find in the L2 cache:
# what FlashAttention-3 counts on of the 50 MB of an H100.
L2_SHARE = 32 * 2**20
# CUDA's limit of the second and the third axis of a grid.
MOST_PROGRAMS = 65535
# Programs for each multiprocessor: as many as an A100 or H100 holds beside each other by the shared
# memory of most tiles.
PROGRAMS_EACH = 2
# Multiprocessors where no GPU says its own: those of an H100 SXM (NVIDIA H100 white paper).
ASSUMED_MULTIPROCESSORS = 132


@triton.jit
def placed(n_tiles, LAST_FIRST: tl.constexpr, SIDE: tl.constexpr):
    """This program's (b, head) pair and its tile, of a grid that `grid_of` made.

    Programs start in the order of their numbers, the first axis fastest, as multiprocessors become
    free, so that the end is even when long ones start first: with a causal mask the last query
    tiles and the first key blocks. With SIDE the axes are the pairs that run side by side, their
    tiles, and groups of such pairs; without it there is one, for one pair after the other.
    """
    if SIDE:
        i_bh = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        i_tile = tl.program_id(1)
        if LAST_FIRST:
            # The remainder changes nothing but what LLVM knows: that the axis has 16 bits makes it
            # keep more addresses, which on sm_80 and sm_120 takes 40 registers more of dQ.
            i_tile = n_tiles - 1 - i_tile % n_tiles
            tl.assume(i_tile >= 0)
    else:
        i_bh = tl.program_id(0) // n_tiles
        i_tile = tl.program_id(0) % n_tiles
    return i_bh, i_tile


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
        i_b = i_b.to(tl.int64)
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
def strides_of(stride_b, stride_h, stride_n, VECTOR: tl.constexpr):
    """In elements, of VECTOR-th parts as `steps` gives them."""
    return stride_of(stride_b, VECTOR), stride_of(stride_h, VECTOR), stride_of(stride_n, VECTOR)


@triton.jit
def load_rows(
    p_x,
    strides,
    i_b,
    i_h,
    i_n,
    N,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D]: rows from i_n on of one head, zeros beyond N and D.

    p_x points to [B, H, N, D], whose strides are those of the first three; with TMA it is a
    descriptor instead: the unit needs no address registers, and fills in the zeros itself.
    Without MASKED all rows lie below N.
    """
    if TMA:
        b_x = p_x.load([i_b, i_h, i_n, 0]).reshape([BLOCK_N, BLOCK_D])
    else:
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_xh = p_x + i_b.to(tl.int64) * strides[0] + i_h.to(tl.int64) * strides[1]
        p_xt = p_xh + o_n.to(tl.int64)[:, None] * strides[2] + o_d[None, :]
        if MASKED:
            b_x = tl.load(p_xt, mask=(o_n < N)[:, None] & m_d[None, :], other=0.0)
        elif D != BLOCK_D:
            b_x = tl.load(p_xt, mask=m_d[None, :], other=0.0)
        else:
            b_x = tl.load(p_xt)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def store_rows(
    p_x,
    strides,
    b_x,
    i_b,
    i_h,
    i_n,
    N,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write what `load_rows` would read, and nothing beyond N and D."""
    b_x = b_x.to(DTYPE)
    if TMA:
        p_x.store([i_b, i_h, i_n, 0], b_x.reshape([1, 1, BLOCK_N, BLOCK_D]))
    else:
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_d = tl.arange(0, BLOCK_D)
        p_xh = p_x + i_b.to(tl.int64) * strides[0] + i_h.to(tl.int64) * strides[1]
        p_xt = p_xh + o_n.to(tl.int64)[:, None] * strides[2] + o_d[None, :]
        tl.store(p_xt, b_x, mask=(o_n < N)[:, None] & (o_d < D)[None, :])


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
def kept(seed, i_bh, o_m, i_n, threshold, BLOCK_N: tl.constexpr, BY_KEY: tl.constexpr):
    """Which probabilities dropout keeps: [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] with BY_KEY.

    Key j of row i takes word j % 4 for the counter (j // 4, i, batch * heads + head, 0): no tile
    size enters, so every pass recomputes the same mask. Four keys share a draw, which is most of
    dropout's cost. i_n is a multiple of 4; threshold is the bit pattern of an unsigned number.
    """
    b_least = threshold.to(tl.uint32, bitcast=True)
    o_4 = i_n // 4 + tl.arange(0, BLOCK_N // 4)
    if BY_KEY:
        b_0, b_1, b_2, b_3 = tl.philox(seed, o_4[:, None], o_m[None, :], i_bh, 0)
    else:
        b_0, b_1, b_2, b_3 = tl.philox(seed, o_4[None, :], o_m[:, None], i_bh, 0)
    # [.., .., 2, 2]: the last axes count 0, 1, 2, 3.
    b_x = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    if BY_KEY:
        b_x = b_x.permute(0, 2, 3, 1).reshape(BLOCK_N, o_m.shape[0])
    else:
        b_x = b_x.reshape(o_m.shape[0], BLOCK_N)
    return b_x >= b_least


def block_d(head_dim: int) -> int:
    """The head dimension as the kernels hold it: a power of two, and 16 or more for tl.dot."""
    return max(16, _triton.next_power_of_2(head_dim))


def vector_of_rows(*tensors: Tensor) -> int:
    """What the kernels take as VECTOR for these tensors ``[B, H, N, D]``, see `vector_of`."""
    return vector_of(*(stride for x in tensors for stride in steps(x)))


def steps(x: Tensor, vector: int = 1) -> list[int]:
    """Strides of batch, head and row by vector elements; 0 where there is nowhere to step."""
    B, H, N, _ = x.shape
    b, h, n, _ = x.stride()
    return [b // vector if B > 1 else 0, h // vector if H > 1 else 0, n // vector if N > 1 else 0]


def operand(x: Tensor, tile: tuning.Config, rows: str) -> Tensor | TensorDescriptor:
    """What `load_rows` and `store_rows` take of ``[B, H, N, D]``, by tile[rows] rows at a time.

    With TMA a descriptor, in whatever order x is stored.
    """
    return descriptor(x, [1, 1, tile[rows], block_d(x.shape[3])]) if tile["TMA"] else x


def grid_of(uneven: bool, n_bh: int, n_tiles: int, read: Tensor) -> tuple[int, ...]:
    """The grid of a launch, as `placed` takes it: of three axes for SIDE, of one without.

    Side by side run about as many pairs as the L2 cache holds, or as run anyway twice over. With
    fewer the end stays uneven: by the count of tests/kernels/test_attention_order.py up to 30% of a
    pass over key blocks are waited for with one pair after the other, and 9% like this.

    Args:
        uneven: tiles differ in what they cost, by a mask. Else the order is of no use.
        n_bh: pairs of sequence and head.
        n_tiles: of a pair, a program each.
        read: one of the two tensors, of one size, that the programs of a pair all go through.
    """
    if uneven and n_tiles <= MOST_PROGRAMS:
        bytes_each = 2 * read.numel() * read.element_size() // n_bh
        running = PROGRAMS_EACH * multiprocessors(read.device)
        side = nearest_divisor(n_bh, max(1, L2_SHARE // max(1, bytes_each), 2 * running // n_tiles))
        if n_bh // side <= MOST_PROGRAMS:
            return side, n_tiles, n_bh // side
    return (n_bh * n_tiles,)


@functools.lru_cache(maxsize=1024)
def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of ``n`` that is fewest times as large or as small as ``wanted``.

    Groups are of one size because a rest that comes last is what makes an end uneven.
    """
    low = (d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    divisors = {one for d in low for one in (d, n // d)}
    return min(divisors, key=lambda d: (max(d / wanted, wanted / d), d))


def multiprocessors(device: torch.device) -> int:
    """Of the GPU that ``device`` names, or of an H100 where there is none to ask."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return _multiprocessors_of(device.index)


@functools.cache
def _multiprocessors_of(index: int | None) -> int:
    # Tensors can be on a GPU that is only assumed: see _triton.assuming.
    if not torch.cuda.is_available():
        return ASSUMED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(index).multi_processor_count


def listed(
    kernel: str, q: Tensor, T: int, softcap: float | None, dropout_p: float, tma: bool
) -> tuning.Config | None:
    """What the tables say for this launch. tma: descriptors are possible."""
    target, width = _triton.target(q.device), block_d(q.shape[3])
    features = (("dropout",) if dropout_p > 0 else ()) + (() if softcap is None else ("softcap",))
    return tuning.lookup(kernel, target, q.dtype, width, max(q.shape[2], T), features, tma)


def choose(
    kernel: str,
    q: Tensor,
    T: int,
    softcap: float | None,
    dropout_p: float,
    tma: bool,
    heuristic: Callable[[torch.dtype, int, str], tuning.Config],
) -> tuning.Config:
    """What the tables say for this launch, or else the heuristic."""
    found = listed(kernel, q, T, softcap, dropout_p, tma)
    return found or heuristic(q.dtype, block_d(q.shape[3]), _triton.target(q.device))


def for_target(tile: dict[str, int], target: str) -> tuning.Config:
    """A heuristic's tile, which loads through pointers, with as many threads on AMD's GPUs.

    Their warps have 64 lanes instead of 32: with the warps of CUDA each would have half of the
    registers there, and spill hundreds.
    """
    warps = tile["num_warps"] // (2 if target.startswith("gfx") else 1)
    return tile | {"num_warps": warps, "TMA": False}


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
