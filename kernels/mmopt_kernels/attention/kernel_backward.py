"""Triton backward kernels of attention over key intervals, and their launcher.

Four launches without atomics, so that gradients are bitwise equal run to run: row terms and a
summary of each query tile; from the summaries, which query tiles each key block meets; dK and dV
by key block; dQ by query tile. The last two make seven products of tiles: both make the scores and
dP, four products, and of these dV, dK and dQ.

Where a table has an entry for one pass, and nobody asked for equal bits, the pass over key blocks
adds its part of dQ to a float32 sum of each query tile, in whatever order blocks come: five
products. The sum costs 4 bytes an element of dQ to zero, 4 to read at the end, and for each key
block that a tile meets 4 that are added in the L2 cache.
"""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmopt_kernels import _triton, tuning
from mmopt_kernels._descriptors import describable, has_tma
from mmopt_kernels._philox import dropout_scales
from mmopt_kernels.attention.tiles import (
    LOG2_E,
    block_d,
    both_bounds,
    choose,
    for_target,
    grid_of,
    kept,
    key_ranges,
    listed,
    load_rows,
    operand,
    placed,
    row_bounds,
    score_scales,
    steps,
    store_rows,
    strides_of,
    tanh,
    vector_of_rows,
)

# Runs of query tiles kept for a key block. Where bounds never decrease from row to row, two are
# exact; a third allows for one gap, and the last takes all that is left, behind a mask.
RUNS = 4
# Tile summaries that the search for runs reads at once.
SEARCH = 256


@triton.jit(do_not_specialize=["S", "T"])
def attention_backward_rows(
    p_out,
    p_do,
    p_lse,
    p_dlse,
    p_lo,
    p_hi,
    p_delta,
    p_lse2,
    p_tiles,
    stride_ob,
    stride_oh,
    stride_om,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    H,
    S,
    T,
    LOG2_E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DLSE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Row terms of every (b, head, query tile), and the tile's bounds once for each b.

    delta = dout . out - dlse. lse2 is lse in base 2, and +inf where the row sees no key:
    exp2(s - lse2) is then 0 without a mask, whether its lse is -inf or its sink.
    """
    n_m = tl.cdiv(S, BLOCK_M)
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_m = tl.program_id(0) % n_m
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < S
    o_m64 = o_m.to(tl.int64)
    # fmt: off
    b_lo, b_hi = row_bounds(
        p_lo, p_hi, stride_lob, stride_lom, stride_hib, stride_him, i_b, o_m, m_m, S, T,
        INTERVALS, CAUSAL,
    )
    # fmt: on
    m_row = m_m & (b_lo < b_hi)
    # [BLOCK_M, BLOCK_D]
    strides_o = strides_of(stride_ob, stride_oh, stride_om, VECTOR)
    strides_g = strides_of(stride_gb, stride_gh, stride_gm, VECTOR)
    i_row = i_m * BLOCK_M
    b_out = load_rows(
        p_out, strides_o, i_b, i_h, i_row, S, D, BLOCK_M, BLOCK_D, True, False, False
    ).to(tl.float32)
    b_do = load_rows(
        p_do, strides_g, i_b, i_h, i_row, S, D, BLOCK_M, BLOCK_D, True, False, False
    ).to(tl.float32)
    # [BLOCK_M]
    b_delta = tl.sum(b_out * b_do, 1)
    if DLSE:
        b_delta -= tl.load(p_dlse + i_bh * S + o_m64, mask=m_m, other=0.0)
    b_lse = tl.load(p_lse + i_bh * S + o_m64, mask=m_m, other=float("-inf"))
    # Where lse is -inf nothing can be differentiated, whatever gradient arrives.
    b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
    tl.store(p_delta + i_bh * S + o_m64, b_delta, mask=m_m)
    b_lse2 = tl.where(m_row, b_lse * LOG2_E, float("inf"))
    tl.store(p_lse2 + i_bh * S + o_m64, b_lse2, mask=m_m)
    if INTERVALS and i_h == 0:
        # Least and greatest of both bounds, over the rows that see something.
        p_tile = p_tiles + (i_b * n_m + i_m) * 4
        tl.store(p_tile, tl.min(tl.where(m_row, b_lo, T)))
        tl.store(p_tile + 1, tl.max(tl.where(m_row, b_hi, 0)))
        tl.store(p_tile + 2, tl.max(tl.where(m_row, b_lo, 0)))
        tl.store(p_tile + 3, tl.min(tl.where(m_row, b_hi, T)))


@triton.jit
def _next_tile(
    p_tiles, i_from, n_m, i_n, S, KIND, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """The first query tile from i_from on that does not meet key block i_n in the way KIND.

    0: no row of the tile sees a key of the block. 2: all rows see all of its keys, and tile and
    block are whole. 1: anything between.
    """
    i_found = n_m
    for i in range(i_from, n_m, SEARCH):
        o = i + tl.arange(0, SEARCH)
        m = o < n_m
        p_tile = p_tiles + o * 4
        m_touch = tl.load(p_tile, mask=m, other=0) < (i_n + 1) * BLOCK_N
        m_touch &= tl.load(p_tile + 1, mask=m, other=0) > i_n * BLOCK_N
        m_full = m_touch & (tl.load(p_tile + 2, mask=m, other=0) <= i_n * BLOCK_N)
        m_full &= tl.load(p_tile + 3, mask=m, other=0) >= (i_n + 1) * BLOCK_N
        m_full &= (o + 1) * BLOCK_M <= S
        b_kind = m_touch.to(tl.int32) + m_full.to(tl.int32)
        i_found = tl.minimum(i_found, tl.min(tl.where(m & (b_kind != KIND), o, n_m)))
    return i_found


@triton.jit(do_not_specialize=["S", "T"])
def attention_backward_runs(
    p_tiles,
    p_runs,
    S,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """For each (b, key block) RUNS records (start, free, end) of query tiles that meet it.

    Tiles of [start, free) need a mask, those of [free, end) do not, and records are in order.
    """
    n_m = tl.cdiv(S, BLOCK_M)
    n_n = tl.cdiv(T, BLOCK_N)
    i_n = tl.program_id(0) % n_n
    p_tiles += (tl.program_id(0) // n_n).to(tl.int64) * n_m * 4
    p_runs += tl.program_id(0).to(tl.int64) * (RUNS * 3)
    i_end = 0
    for i_run in range(RUNS):
        i_start = _next_tile(p_tiles, i_end, n_m, i_n, S, 0, BLOCK_M, BLOCK_N, SEARCH)
        i_free = _next_tile(p_tiles, i_start, n_m, i_n, S, 1, BLOCK_M, BLOCK_N, SEARCH)
        i_end = _next_tile(p_tiles, i_free, n_m, i_n, S, 2, BLOCK_M, BLOCK_N, SEARCH)
        if i_run == RUNS - 1:
            i_free = n_m
            i_end = n_m
        tl.store(p_runs + i_run * 3, i_start)
        tl.store(p_runs + i_run * 3 + 1, i_free)
        tl.store(p_runs + i_run * 3 + 2, i_end)


@triton.jit
def _add_tile(p_sums, b_x, i_tile, BULK: tl.constexpr):
    """Add a tile to the one at place i_tile of contiguous tiles, while others may do the same.

    With BULK p_sums is a descriptor of all their rows, and the tensor memory accelerator adds up;
    32 bits count the rows of 2^36 elements where they are 32 wide.
    """
    ROWS: tl.constexpr = b_x.shape[0]
    COLUMNS: tl.constexpr = b_x.shape[1]
    if BULK:
        p_sums.atomic_add([i_tile * ROWS, 0], b_x)
    else:
        o_x = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        p_tile = p_sums + tl.cast(i_tile, tl.int64) * (ROWS * COLUMNS)
        tl.atomic_add(p_tile + o_x, b_x, sem="relaxed")


@triton.jit
def _key_gradients(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_do,
    p_lse2,
    p_delta,
    p_lo,
    p_hi,
    p_sums,
    strides_q,
    strides_g,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    i_start,
    i_end,
    i_b,
    i_h,
    i_bh,
    S,
    T,
    scale,
    scale_cap,
    scale_kept,
    seed,
    threshold,
    i_col,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DQ: tl.constexpr,
    BULK: tl.constexpr,
    MASKED: tl.constexpr,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add what query tiles [i_start, i_end) of the group's heads give to a key block's gradients.

    i_h, i_bh and the pointers of the row terms are those of the group's first head. One loop over
    heads and tiles, so that loads are prefetched across heads. Without MASKED the tiles are whole
    and see the whole block. With DQ their dQ, unscaled, is added to p_sums, see `_add_tile`.
    """
    BLOCK_N: tl.constexpr = b_k.shape[0]
    o_n = i_col + tl.arange(0, BLOCK_N)
    n_tiles = i_end - i_start
    for i_t in range(n_tiles * GROUP):
        i_g = i_t // n_tiles if GROUP > 1 else 0 * i_t
        i_qh = i_h + i_g
        i_m = i_start + (i_t % n_tiles if GROUP > 1 else i_t)
        i_row = i_m * BLOCK_M
        o_m = i_row + tl.arange(0, BLOCK_M)
        m_m = o_m < S
        # [BLOCK_M, BLOCK_D]
        b_q = load_rows(
            p_q, strides_q, i_b, i_qh, i_row, S, D, BLOCK_M, BLOCK_D, MASKED, WIDEN, TMA
        )
        b_do = load_rows(
            p_do, strides_g, i_b, i_qh, i_row, S, D, BLOCK_M, BLOCK_D, MASKED, WIDEN, TMA
        )
        o_lt = tl.cast(i_g, tl.int64) * S + o_m
        p_lt = p_lse2 + o_lt
        p_dt = p_delta + o_lt
        if MASKED:
            # An absent row has lse2 = inf like an empty one: its probabilities are 0.
            b_lse2 = tl.load(p_lt, mask=m_m, other=float("inf"))
            b_delta = tl.load(p_dt, mask=m_m, other=0.0)
        else:
            b_lse2 = tl.load(p_lt)
            b_delta = tl.load(p_dt)
        # [BLOCK_N, BLOCK_M], transposed so that both products below take their left side from
        # registers.
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        if SOFTCAP:
            b_tanh = tanh(b_s)
            b_s = b_tanh * scale_cap
        if MASKED:
            # fmt: off
            b_lo, b_hi = row_bounds(
                p_lo, p_hi, stride_lob, stride_lom, stride_hib, stride_him, i_b, o_m, m_m, S, T,
                INTERVALS, CAUSAL,
            )
            # fmt: on
            m_s = (o_n[:, None] >= b_lo[None, :]) & (o_n[:, None] < b_hi[None, :])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse2[None, :])
        # [BLOCK_N, BLOCK_M]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if DROPOUT:
            m_kept = kept(seed, i_bh + i_g, o_m, i_col, threshold, BLOCK_N, True)
            b_dp = tl.where(m_kept, b_dp * scale_kept, 0.0)
            b_pv = tl.where(m_kept, b_p, 0.0)
        else:
            b_pv = b_p
        if DV:
            b_pv = b_pv.to(DTYPE).to(b_do.dtype)
            b_dv = tl.dot(b_pv, b_do, b_dv, input_precision=PRECISION)
        if DK:
            b_ds = b_p * (b_dp - b_delta[None, :])
            if SOFTCAP:
                b_ds = b_ds * (1.0 - b_tanh * b_tanh)
            b_ds = b_ds.to(DTYPE).to(b_q.dtype)
            b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
            if DQ:
                # [BLOCK_D, BLOCK_M], transposed so that its left side is not BLOCK_M high: wgmma
                # multiplies 64 rows.
                b_dq = tl.dot(tl.trans(b_k), b_ds, input_precision=PRECISION)
                _add_tile(p_sums, b_dq, (i_bh + i_g) * tl.cdiv(S, BLOCK_M) + i_m, BULK)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def attention_backward_dkdv(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse2,
    p_delta,
    p_lo,
    p_hi,
    p_runs,
    p_seed,
    p_dk,
    p_dv,
    p_sums,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    H,
    S,
    T,
    scale,
    scale_cap,
    scale_dk,
    scale_kept,
    threshold,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DQ: tl.constexpr,
    BULK: tl.constexpr,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    SIDE: tl.constexpr,
    TMA: tl.constexpr,
):
    """dK and dV of one (b, key head, key block), summed over the group's query heads.

    Without DK or without DV only the other: what nothing uses is not computed. With DQ p_sums,
    [B, H * GROUP, query tile, BLOCK_D, BLOCK_M], gets what the block gives to dQ.
    """
    n_n = tl.cdiv(T, BLOCK_N)
    i_bh, i_n = placed(n_n, False, SIDE)
    i_b = i_bh // H
    i_h = i_bh % H
    DTYPE: tl.constexpr = p_dk.dtype if TMA else p_dk.dtype.element_ty
    strides_q = strides_of(stride_qb, stride_qh, stride_qm, VECTOR)
    strides_k = strides_of(stride_kb, stride_kh, stride_kn, VECTOR)
    strides_v = strides_of(stride_vb, stride_vh, stride_vn, VECTOR)
    strides_g = strides_of(stride_gb, stride_gh, stride_gm, VECTOR)
    # [BLOCK_N, BLOCK_D]
    b_k = load_rows(
        p_k, strides_k, i_b, i_h, i_n * BLOCK_N, T, D, BLOCK_N, BLOCK_D, True, WIDEN, TMA
    )
    b_v = load_rows(
        p_v, strides_v, i_b, i_h, i_n * BLOCK_N, T, D, BLOCK_N, BLOCK_D, True, WIDEN, TMA
    )
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # The group's first query head, of H * GROUP; heads of one sequence lie S rows apart in lse2.
    i_qbh = i_bh * GROUP
    p_lse2 += i_qbh.to(tl.int64) * S
    p_delta += i_qbh.to(tl.int64) * S
    seed = tl.load(p_seed) if DROPOUT else 0
    n_m = tl.cdiv(S, BLOCK_M)
    for i_run in range(RUNS):
        if INTERVALS:
            p_run = p_runs + ((i_b.to(tl.int64) * n_n + i_n) * RUNS + i_run) * 3
            i_start = tl.load(p_run)
            i_free = tl.load(p_run + 1)
            i_end = tl.load(p_run + 2)
        else:
            # Masked, free up to the last whole tile, and in a second run the partial one.
            i_start = 0
            i_free = 0
            if CAUSAL:
                # Row i sees the keys below i + T - S + 1.
                i_start = tl.maximum(i_n * BLOCK_N - (T - S), 0) // BLOCK_M
                i_free = tl.cdiv(tl.maximum((i_n + 1) * BLOCK_N - 1 - (T - S), 0), BLOCK_M)
            # A partial key block needs its mask everywhere.
            i_free = tl.where((i_n + 1) * BLOCK_N <= T, tl.minimum(i_free, n_m), n_m)
            i_end = tl.maximum(i_free, S // BLOCK_M)
            if i_run == 1:
                i_start = i_end
                i_free = n_m
                i_end = n_m
        # fmt: off
        b_dk, b_dv = _key_gradients(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, p_lo, p_hi, p_sums, strides_q,
            strides_g, stride_lob, stride_lom, stride_hib, stride_him, i_start, i_free, i_b,
            i_h * GROUP, i_qbh, S, T, scale, scale_cap, scale_kept, seed, threshold, i_n * BLOCK_N,
            D, BLOCK_D, BLOCK_M, DTYPE, GROUP, DK, DV, DQ, BULK, True, INTERVALS, CAUSAL, SOFTCAP,
            DROPOUT, WIDEN, PRECISION, TMA,
        )
        b_dk, b_dv = _key_gradients(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, p_lo, p_hi, p_sums, strides_q,
            strides_g, stride_lob, stride_lom, stride_hib, stride_him, i_free, i_end, i_b,
            i_h * GROUP, i_qbh, S, T, scale, scale_cap, scale_kept, seed, threshold, i_n * BLOCK_N,
            D, BLOCK_D, BLOCK_M, DTYPE, GROUP, DK, DV, DQ, BULK, False, INTERVALS, CAUSAL, SOFTCAP,
            DROPOUT, WIDEN, PRECISION, TMA,
        )
        # fmt: on
    strides_dk = strides_of(stride_dkb, stride_dkh, stride_dkn, VECTOR)
    strides_dv = strides_of(stride_dvb, stride_dvh, stride_dvn, VECTOR)
    if DK:
        b_dk = b_dk * scale_dk
        store_rows(
            p_dk, strides_dk, b_dk, i_b, i_h, i_n * BLOCK_N, T, D, BLOCK_N, BLOCK_D, DTYPE, TMA
        )
    if DV:
        if DROPOUT:
            b_dv = b_dv * scale_kept
        store_rows(
            p_dv, strides_dv, b_dv, i_b, i_h, i_n * BLOCK_N, T, D, BLOCK_N, BLOCK_D, DTYPE, TMA
        )


@triton.jit
def _query_gradient(
    b_dq,
    b_q,
    b_do,
    b_lse2,
    b_delta,
    p_k,
    p_v,
    strides_k,
    strides_v,
    b_lo,
    b_hi,
    i_start,
    i_end,
    T,
    scale,
    scale_cap,
    scale_kept,
    seed,
    threshold,
    i_b,
    i_hkv,
    i_bh,
    o_m,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add what the keys [i_start, i_end) give to a query tile's gradient.

    Without MASKED every row of the tile that sees a key sees all of these, and all lie below T.
    """
    for i_n in range(i_start, i_end, BLOCK_N):
        if BLOCK_D > 64:  # narrow heads spill with it on sm_120
            tl.assume(i_n >= 0)  # see _attend in kernel.py
        o_n = i_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        b_k = load_rows(p_k, strides_k, i_b, i_hkv, i_n, T, D, BLOCK_N, BLOCK_D, MASKED, WIDEN, TMA)
        b_v = load_rows(p_v, strides_v, i_b, i_hkv, i_n, T, D, BLOCK_N, BLOCK_D, MASKED, WIDEN, TMA)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if SOFTCAP:
            b_tanh = tanh(b_s)
            b_s = b_tanh * scale_cap
        if MASKED:
            m_s = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse2[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if DROPOUT:
            m_kept = kept(seed, i_bh, o_m, i_n, threshold, BLOCK_N, False)
            b_dp = tl.where(m_kept, b_dp * scale_kept, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if SOFTCAP:
            b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        b_ds = b_ds.to(DTYPE).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def attention_backward_dq(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse2,
    p_delta,
    p_lo,
    p_hi,
    p_seed,
    p_dq,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    H,
    S,
    T,
    scale,
    scale_cap,
    scale_dq,
    scale_kept,
    threshold,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    SIDE: tl.constexpr,
    TMA: tl.constexpr,
):
    """dQ of one (b, head, query tile)."""
    i_bh, i_m = placed(tl.cdiv(S, BLOCK_M), True, SIDE)
    i_b = i_bh // H
    i_h = i_bh % H
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < S
    # fmt: off
    b_lo, b_hi = row_bounds(
        p_lo, p_hi, stride_lob, stride_lom, stride_hib, stride_him, i_b, o_m, m_m, S, T,
        INTERVALS, CAUSAL,
    )
    # fmt: on
    i_start, i_full, i_part, i_end = key_ranges(b_lo, b_hi, m_m & (b_lo < b_hi), T, BLOCK_N)
    seed = tl.load(p_seed) if DROPOUT else 0

    DTYPE: tl.constexpr = p_dq.dtype if TMA else p_dq.dtype.element_ty
    i_hkv = i_h // GROUP
    strides_q = strides_of(stride_qb, stride_qh, stride_qm, VECTOR)
    strides_k = strides_of(stride_kb, stride_kh, stride_kn, VECTOR)
    strides_v = strides_of(stride_vb, stride_vh, stride_vn, VECTOR)
    strides_g = strides_of(stride_gb, stride_gh, stride_gm, VECTOR)
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(
        p_q, strides_q, i_b, i_h, i_m * BLOCK_M, S, D, BLOCK_M, BLOCK_D, True, WIDEN, TMA
    )
    b_do = load_rows(
        p_do, strides_g, i_b, i_h, i_m * BLOCK_M, S, D, BLOCK_M, BLOCK_D, True, WIDEN, TMA
    )
    # Absent rows like empty ones: all probabilities 0.
    b_lse2 = tl.load(p_lse2 + i_bh.to(tl.int64) * S + o_m, mask=m_m, other=float("inf"))
    b_delta = tl.load(p_delta + i_bh.to(tl.int64) * S + o_m, mask=m_m, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # fmt: off
    b_dq = _query_gradient(
        b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, strides_k, strides_v, b_lo, b_hi, i_start,
        tl.minimum(i_full, i_end), T, scale, scale_cap, scale_kept, seed, threshold, i_b, i_hkv,
        i_bh, o_m, D, BLOCK_D, BLOCK_N, DTYPE, True, SOFTCAP, DROPOUT, WIDEN, PRECISION, TMA,
    )
    b_dq = _query_gradient(
        b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, strides_k, strides_v, b_lo, b_hi, i_full,
        tl.minimum(i_part, i_end), T, scale, scale_cap, scale_kept, seed, threshold, i_b, i_hkv,
        i_bh, o_m, D, BLOCK_D, BLOCK_N, DTYPE, False, SOFTCAP, DROPOUT, WIDEN, PRECISION, TMA,
    )
    b_dq = _query_gradient(
        b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, strides_k, strides_v, b_lo, b_hi, i_part, i_end,
        T, scale, scale_cap, scale_kept, seed, threshold, i_b, i_hkv, i_bh, o_m, D, BLOCK_D,
        BLOCK_N, DTYPE, True, SOFTCAP, DROPOUT, WIDEN, PRECISION, TMA,
    )
    # fmt: on
    strides_dq = strides_of(stride_dqb, stride_dqh, stride_dqm, VECTOR)
    b_dq = b_dq * scale_dq
    store_rows(p_dq, strides_dq, b_dq, i_b, i_h, i_m * BLOCK_M, S, D, BLOCK_M, BLOCK_D, DTYPE, TMA)


@triton.jit(do_not_specialize=["S"])
def attention_backward_dq_store(
    p_sums,
    p_dq,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    H,
    S,
    scale_dq,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """dQ of one (b, head, query tile) from the sum of one pass, which it reads once."""
    n_m = tl.cdiv(S, BLOCK_M)
    i_bh = tl.program_id(0) // n_m
    i_m = tl.program_id(0) % n_m
    o_x = tl.arange(0, BLOCK_D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    # [BLOCK_D, BLOCK_M]
    b_dq = tl.load(p_sums + tl.program_id(0).to(tl.int64) * (BLOCK_D * BLOCK_M) + o_x)
    b_dq = tl.trans(b_dq * scale_dq)
    strides_dq = strides_of(stride_dqb, stride_dqh, stride_dqm, VECTOR)
    DTYPE: tl.constexpr = p_dq.dtype.element_ty
    store_rows(
        p_dq, strides_dq, b_dq, i_bh // H, i_bh % H, i_m * BLOCK_M, S, D, BLOCK_M, BLOCK_D, DTYPE,
        False,
    )  # fmt: skip


def config_dkdv(dtype: torch.dtype, block_d: int, target: str) -> tuning.Config:
    """Tile, warps and pipeline stages of the dK/dV pass, where no table has any.

    Chosen like the forward's for sm_120, in at most 83 KiB of shared memory: with Triton 3.7.1
    nothing spills in 16 bits, but 20 bytes in a head of up to 64 with every feature, for which
    there is a table.
    """
    if dtype == torch.float32:
        if block_d <= 64:
            tile = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
        elif block_d <= 128:
            tile = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
        else:
            tile = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    elif block_d <= 64:
        tile = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    elif block_d <= 128:
        tile = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    else:
        tile = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    tile["SPLIT"] = False
    if target.startswith("gfx"):
        # Prefetching takes registers there, not shared memory.
        tile["num_stages"] = 1
    return for_target(tile, target)


def _one_pass(m: int, n: int, warps: int, stages: int) -> tuning.Config:
    tile = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    return tile | {"TMA": True, "BULK": True}


# What to tune one pass with on sm_90, in 16 bits without dropout and softcap, by `block_d`:
#   tuning.tune("attention_backward_one_pass", [None, *ONE_PASS[128]], call)
# Nothing is measured yet. All multiply with wgmma alone. With Triton 3.7.1 those of 64 and the
# first of 128 spill nothing, the second 4 bytes where queries share keys. The others, whose key
# blocks are twice as large and so add half as often to dQ, spill 64 to 440 bytes a thread.
ONE_PASS = {
    64: (_one_pass(64, 128, 8, 2), _one_pass(32, 128, 8, 3), _one_pass(64, 64, 4, 3)),
    128: (
        _one_pass(32, 64, 4, 2),
        _one_pass(32, 64, 4, 3),
        _one_pass(32, 128, 8, 2),
        _one_pass(64, 128, 8, 1),
        _one_pass(64, 128, 8, 2),
    ),
}


def config_dq(dtype: torch.dtype, block_d: int, target: str) -> tuning.Config:
    """Tile, warps and pipeline stages of the dQ pass.

    Chosen like the forward's, in at most 97 KiB of shared memory. With Triton 3.7.1 nothing spills
    in 16 bits on sm_80 and sm_120 without dropout and softcap; with them a head of up to 128 does,
    for which there are tables.
    """
    if dtype == torch.float32:
        if block_d <= 64:
            tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
        elif block_d <= 128:
            tile = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
        else:
            tile = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    elif block_d <= 64:
        tile = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    elif block_d <= 128:
        tile = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    else:
        tile = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    return for_target(tile, target)


def launch_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK and dV stored as ``[B, S, H, D]``, and dsinks, empty without sinks.

    The last stride of grad_out, q, k, v and out is 1. One pass makes all three where a table has an
    entry for it, but for deterministic, or `torch.use_deterministic_algorithms`: it adds up dQ in
    no certain order, in ``4 * block_d(D)`` bytes for each row of q.
    """
    B, H, S, D = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    dq = q.new_empty(B, S, H, D).transpose(1, 2)
    # Without queries no program writes them.
    new = k.new_zeros if q.numel() == 0 else k.new_empty
    dk = new(B, T, Hkv, D).transpose(1, 2)
    dv = new(B, T, Hkv, D).transpose(1, 2)
    if q.numel() == 0:
        return dq, dk, dv, q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    lo, hi, bound_strides = both_bounds(lo, hi, T)
    intervals = lo is not None
    threshold, scale_kept = dropout_scales(dropout_p)
    scales = (*score_scales(scale, softcap), scale, scale_kept, threshold)
    tma = has_tma(_triton.target(q.device)) and describable(q, k, v, grad_out, dq, dk, dv)
    asked = (q, T, softcap, dropout_p, tma)
    one_pass = over_queries = None
    if not (deterministic or torch.are_deterministic_algorithms_enabled()):
        one_pass = listed("attention_backward_one_pass", *asked)
    if one_pass is None:
        over_keys = dict(choose("attention_backward_dkdv", *asked, config_dkdv))
        over_queries = choose("attention_backward_dq", *asked, config_dq)
    else:
        over_keys = dict(one_pass)
    passes = ("dv", "dk") if over_keys.pop("SPLIT", False) else ("both",)
    # Triton's interpreter has no reduction through a descriptor.
    bulk = over_keys.pop("BULK", False) and not _triton.interpreting()
    block_m, block_n = over_keys["BLOCK_M"], over_keys["BLOCK_N"]
    n_m, n_n = _triton.cdiv(S, block_m), _triton.cdiv(T, block_n)
    # As the kernels store them, whatever the order of lse.
    lse = lse.contiguous()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    tiles = runs = None
    if intervals:
        tiles = q.new_empty(B, n_m, 4, dtype=torch.int32)
        runs = q.new_empty(B, n_n, RUNS, 3, dtype=torch.int32)
    sums = None
    if one_pass is not None:
        sums = q.new_zeros(B, H, n_m, block_d(D), block_m, dtype=torch.float32)
    padded = {"D": D, "BLOCK_D": block_d(D)}
    visible = {"INTERVALS": intervals, "CAUSAL": causal}
    switches = {
        **padded,
        **visible,
        "GROUP": H // Hkv,
        "SOFTCAP": softcap is not None,
        "DROPOUT": dropout_p > 0,
        "WIDEN": _triton.must_widen(q.dtype),
        "PRECISION": _triton.dot_precision(),
    }
    vector = vector_of_rows(q, k, v, grad_out, out, dq, dk, dv)
    switches["VECTOR"] = vector
    strides = [stride for x in (q, k, v, grad_out) for stride in steps(x, vector)]
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        attention_backward_rows[(n_m * B * H,)](
            out,
            grad_out,
            lse,
            None if grad_lse is None else grad_lse.contiguous(),
            lo,
            hi,
            delta,
            lse2,
            tiles,
            *steps(out, vector),
            *steps(grad_out, vector),
            *bound_strides,
            H,
            S,
            T,
            LOG2_E=LOG2_E,
            BLOCK_M=block_m,
            DLSE=grad_lse is not None,
            VECTOR=vector,
            **padded,
            **visible,
        )
        if T > 0:
            if intervals:
                attention_backward_runs[(n_n * B,)](
                    tiles, runs, S, T, BLOCK_M=block_m, BLOCK_N=block_n, RUNS=RUNS, SEARCH=SEARCH
                )
            grid = grid_of(causal or intervals, B * Hkv, n_n, q)
            for outputs in passes:
                attention_backward_dkdv[grid](
                    operand(q, over_keys, "BLOCK_M"),
                    operand(k, over_keys, "BLOCK_N"),
                    operand(v, over_keys, "BLOCK_N"),
                    operand(grad_out, over_keys, "BLOCK_M"),
                    lse2,
                    delta,
                    lo,
                    hi,
                    runs,
                    seed,
                    operand(dk, over_keys, "BLOCK_N"),
                    operand(dv, over_keys, "BLOCK_N"),
                    _rows_of_tiles(sums) if bulk else sums,
                    *strides,
                    *steps(dk, vector),
                    *steps(dv, vector),
                    *bound_strides,
                    Hkv,
                    S,
                    T,
                    *scales,
                    RUNS=RUNS if intervals else 2,
                    DK=outputs != "dv",
                    DV=outputs != "dk",
                    DQ=sums is not None,
                    BULK=bulk,
                    SIDE=len(grid) > 1,
                    **over_keys,
                    **switches,
                )
        if over_queries is not None:
            n_q = _triton.cdiv(S, over_queries["BLOCK_M"])
            grid = grid_of(causal or intervals, B * H, n_q, k)
            attention_backward_dq[grid](
                operand(q, over_queries, "BLOCK_M"),
                operand(k, over_queries, "BLOCK_N"),
                operand(v, over_queries, "BLOCK_N"),
                operand(grad_out, over_queries, "BLOCK_M"),
                lse2,
                delta,
                lo,
                hi,
                seed,
                operand(dq, over_queries, "BLOCK_M"),
                *strides,
                *steps(dq, vector),
                *bound_strides,
                H,
                S,
                T,
                *scales,
                SIDE=len(grid) > 1,
                **over_queries,
                **switches,
            )
        else:
            attention_backward_dq_store[(n_m * B * H,)](
                sums,
                dq,
                *steps(dq, vector),
                H,
                S,
                scale,
                BLOCK_M=block_m,
                VECTOR=vector,
                **padded,
            )
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    # [B, Hq, S]; a row whose lse is -inf has no sink either, and exp(-inf - -inf) would be NaN.
    weight = (sinks.float()[:, None] - lse).exp().masked_fill(lse == float("-inf"), 0.0)
    return dq, dk, dv, -(weight * delta).sum((0, 2)).to(sinks.dtype)


def _rows_of_tiles(sums: Tensor | None) -> TensorDescriptor:
    """What `_add_tile` takes with BULK: rows of all tiles one below the other, by the tile."""
    assert sums is not None
    height, width = sums.shape[-2:]
    return TensorDescriptor.from_tensor(sums.view(-1, width), [height, width])
