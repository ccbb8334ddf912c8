"""Triton kernels of attention for a few queries against many keys, and their launcher.

The ordinary kernel has a program for each tile of queries: one query against a long cache would
leave most of the GPU idle, and each head of a group would read the same keys again. Here the
queries of a whole group fill the rows of one tile, the keys are split over programs, and a second
kernel merges what the splits found. Forward only: out and lse are those of the ordinary kernel,
and so is backward.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference"
(crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton
from mmopt_kernels.attention.tiles import (
    LN_2,
    LOG2_E,
    PROGRAMS_EACH,
    block_d,
    both_bounds,
    multiprocessors,
    row_bounds,
    score_scales,
    steps,
    strides_of,
    tanh,
    vector_of_rows,
)

# Rows of a tile, GROUP * S. More of them are work for the ordinary kernel's larger tiles.
MAX_ROWS = 64
# A split reads this many keys or more, a few tiles: below, its start costs more than its loads.
LEAST_KEYS = 256
# Bounds the partial results to this many times the output, and what the merge loads at once.
MAX_SPLITS = 128
# Splits whose outputs the merge adds at once.
CHUNK = 16


# S and T change from step to step; specializing on them would recompile.
@triton.jit(do_not_specialize=["S", "T", "n_splits"])
def attention_decode(
    p_q,
    p_k,
    p_v,
    p_lo,
    p_hi,
    p_acc,
    p_max,
    p_sum,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    H,
    S,
    T,
    n_splits,
    scale,
    scale_cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One split of the keys of one (b, key head): maximum, sum and unnormalized output of each row.

    H counts key heads. Row r of the tile is query r % S of the group's head r // S. The splits
    share what the rows of this (b, key head) see, not all T keys: a short sequence of a padded
    batch and a sliding window are spread over the GPU as well.
    """
    i_split = tl.program_id(0) % n_splits
    i_bh = (tl.program_id(0) // n_splits).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_r = tl.arange(0, BLOCK_M)
    o_g = o_r // S
    o_m = o_r % S
    m_r = o_r < GROUP * S
    o_m64 = o_m.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D

    # fmt: off
    b_lo, b_hi = row_bounds(
        p_lo, p_hi, stride_lob, stride_lom, stride_hib, stride_him, i_b, o_m, m_r, S, T,
        INTERVALS, CAUSAL,
    )
    # fmt: on
    m_row = m_r & (b_lo < b_hi)
    i_first = tl.min(tl.where(m_row, b_lo, T))
    i_last = tl.max(tl.where(m_row, b_hi, 0))
    # Tiles as even as can be: the first `more` splits have one more. Multiplying first and
    # dividing then would overflow.
    n_tiles = tl.cdiv(tl.maximum(i_last - i_first, 0), BLOCK_N)
    n_each = n_tiles // n_splits
    more = n_tiles % n_splits
    i_start = i_first + (i_split * n_each + tl.minimum(i_split, more)) * BLOCK_N
    i_end = i_start + (n_each + (i_split < more).to(tl.int32)) * BLOCK_N
    i_end = tl.minimum(i_end, i_last)

    stride_qb, stride_qh, stride_qm = strides_of(stride_qb, stride_qh, stride_qm, VECTOR)
    stride_kb, stride_kh, stride_kn = strides_of(stride_kb, stride_kh, stride_kn, VECTOR)
    stride_vb, stride_vh, stride_vn = strides_of(stride_vb, stride_vh, stride_vn, VECTOR)
    # [BLOCK_M, BLOCK_D]
    p_qt = p_q + i_b * stride_qb + (i_h * GROUP + o_g)[:, None] * stride_qh
    p_qt += o_m64[:, None] * stride_qm + o_d[None, :]
    b_q = tl.load(p_qt, mask=m_r[:, None] & m_d[None, :], other=0.0)
    if WIDEN:
        b_q = b_q.to(tl.float32)
    p_kh = p_k + i_b * stride_kb + i_h * stride_kh
    p_vh = p_v + i_b * stride_vb + i_h * stride_vh
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # Reading keys and values takes the time here, so that every tile can afford its masks.
    for i_n in range(i_start, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_n64 = o_n.to(tl.int64)
        # Nothing beyond what some row sees is read: a cache holds anything there.
        m_n = o_n < i_end
        # [BLOCK_D, BLOCK_N] and [BLOCK_N, BLOCK_D]
        p_kt = p_kh + o_n64[None, :] * stride_kn + o_d[:, None]
        p_vt = p_vh + o_n64[:, None] * stride_vn + o_d[None, :]
        b_k = tl.load(p_kt, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
        if WIDEN:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        # [BLOCK_M, BLOCK_N], in base 2
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        if SOFTCAP:
            b_s = tanh(b_s) * scale_cap
        m_s = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A row that has seen no key yet: -inf - -inf would be NaN.
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_ref[:, None])
        b_alpha = tl.exp2(b_max - b_ref)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_p = b_p.to(p_v.dtype.element_ty)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new
    # [B, H, GROUP * S, n_splits], the rows of q in order. A split that sees nothing: -inf, 0, 0.
    o_part = (i_bh * (GROUP * S) + o_r) * n_splits + i_split
    tl.store(p_max + o_part, b_max, mask=m_r)
    tl.store(p_sum + o_part, b_sum, mask=m_r)
    p_at = p_acc + o_part[:, None] * D + o_d[None, :]
    tl.store(p_at, b_acc, mask=m_r[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["S", "n_splits"])
def attention_decode_merge(
    p_acc,
    p_max,
    p_sum,
    p_sinks,
    p_out,
    p_lse,
    stride_ob,
    stride_oh,
    stride_om,
    H,
    S,
    n_splits,
    LN_2: tl.constexpr,
    LOG2_E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Output and lse of one query, its splits added in their order. H counts query heads."""
    i_row = tl.program_id(0).to(tl.int64)
    i_bh = i_row // S
    i_m = i_row % S
    i_b = i_bh // H
    i_h = i_bh % H
    p_max += i_row * n_splits
    p_sum += i_row * n_splits
    p_acc += i_row * n_splits * D
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [MAX_SPLITS]
    o_s = tl.arange(0, MAX_SPLITS)
    b_max = tl.load(p_max + o_s, mask=o_s < n_splits, other=float("-inf"))
    b_sum = tl.load(p_sum + o_s, mask=o_s < n_splits, other=0.0)
    b_top = tl.max(b_max, 0)
    if SINKS:
        b_sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2_E
        b_top = tl.maximum(b_top, b_sink)
    # A row that sees nothing: -inf - -inf would be NaN.
    b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_total = tl.sum(b_sum * tl.exp2(b_max - b_ref), 0)
    if SINKS:
        # One more score, without a value.
        b_total += tl.exp2(b_sink - b_ref)
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    for i_s in range(0, n_splits, CHUNK):
        o_c = i_s + tl.arange(0, CHUNK)
        m_c = o_c < n_splits
        b_w = tl.exp2(tl.load(p_max + o_c, mask=m_c, other=float("-inf")) - b_ref)
        # [CHUNK, BLOCK_D]
        p_at = p_acc + o_c[:, None] * D + o_d[None, :]
        b_part = tl.load(p_at, mask=m_c[:, None] & m_d[None, :], other=0.0)
        b_acc += tl.sum(b_part * b_w[:, None], 0)
    # 0 only in an empty row: its output is then 0 and its lse -inf.
    b_total = tl.where(b_total == 0.0, 1.0, b_total)
    stride_ob, stride_oh, stride_om = strides_of(stride_ob, stride_oh, stride_om, VECTOR)
    p_ot = p_out + i_b * stride_ob + i_h * stride_oh + i_m * stride_om + o_d
    tl.store(p_ot, (b_acc / b_total).to(p_out.dtype.element_ty), mask=m_d)
    tl.store(p_lse + i_row, (b_top + tl.log2(b_total)) * LN_2)


def uses_decode(q: Tensor, k: Tensor, dropout_p: float) -> bool:
    """Whether these kernels take the call rather than the ordinary one.

    They do where a group's queries fit one tile, so that few programs would read many keys, and
    where the keys make two splits or more; below, nothing is split and the merge is a second
    launch for nothing. Dropout is for training, where such shapes are rare: the ordinary kernel
    has it.
    """
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    return rows <= MAX_ROWS and k.shape[2] >= 2 * LEAST_KEYS and dropout_p == 0


def splits(programs: int, T: int, multiprocessors: int) -> int:
    """How many splits let ``programs`` (b, key head) pairs fill the GPU once.

    From shapes alone, because how many keys are visible is device data.
    """
    wanted = multiprocessors * PROGRAMS_EACH // max(programs, 1)
    return max(1, min(wanted, T // LEAST_KEYS, MAX_SPLITS))


def config(dtype: torch.dtype, block_d: int, rows: int, target: str) -> dict[str, int]:
    """Tile, warps and pipeline stages for so many rows.

    Chosen from what Triton 3.9 reports for sm_80 to sm_120 and gfx942, not yet from a clock:
    nothing spills, 16 bits use matrix instructions, and shared memory stays within 97 KiB; within
    76 KiB for up to 16 rows, so that an A100 or H100 multiprocessor holds two programs. Measured
    again with Triton 3.7.1 for up to 16 rows.
    """
    block_m = max(16, _triton.next_power_of_2(rows))
    # 64 KiB of shared memory on CDNA 3 hold two stages; so do 64 rows of registers elsewhere.
    stages = 2 if block_m > 32 or target.startswith("gfx") else 3
    warps = 8 if block_m > 32 or block_m * block_d > 32 * 128 else 4
    block_n = 64 if block_d <= 128 else 32
    if dtype == torch.float32:
        block_n = max(16, block_n // (2 if block_m <= 32 else 4))
        stages -= block_d > 128
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """As `kernel.launch`, for at most `MAX_ROWS` queries in a group and without dropout."""
    assert dropout_p == 0, "see uses_decode"
    B, H, S, D = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    out = q.new_empty(B, S, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    lo, hi, bound_strides = both_bounds(lo, hi, T)
    vector = vector_of_rows(q, k, v, out)
    n_splits = splits(B * Hkv, T, multiprocessors(q.device))
    # The kernel's rows are those of lse: a group's heads are neighbours.
    acc = q.new_empty(B, H, S, n_splits, D, dtype=torch.float32)
    most, total = (q.new_empty(B, H, S, n_splits, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        attention_decode[(n_splits * B * Hkv,)](
            q,
            k,
            v,
            lo,
            hi,
            acc,
            most,
            total,
            *(stride for x in (q, k, v) for stride in steps(x, vector)),
            *bound_strides,
            Hkv,
            S,
            T,
            n_splits,
            *score_scales(scale, softcap),
            GROUP=H // Hkv,
            D=D,
            BLOCK_D=block_d(D),
            INTERVALS=lo is not None,
            CAUSAL=causal,
            SOFTCAP=softcap is not None,
            WIDEN=_triton.must_widen(q.dtype),
            PRECISION=_triton.dot_precision(),
            VECTOR=vector,
            **config(q.dtype, block_d(D), S * (H // Hkv), _triton.target(q.device)),
        )
        attention_decode_merge[(B * H * S,)](
            acc,
            most,
            total,
            None if sinks is None else sinks.contiguous(),
            out,
            lse,
            *steps(out, vector),
            H,
            S,
            n_splits,
            LN_2=LN_2,
            LOG2_E=LOG2_E,
            D=D,
            BLOCK_D=block_d(D),
            MAX_SPLITS=MAX_SPLITS,
            CHUNK=CHUNK,
            SINKS=sinks is not None,
            VECTOR=vector,
            num_warps=1 if D <= 128 else 2,
        )
    return out, lse
