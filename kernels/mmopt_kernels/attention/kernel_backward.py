"""Triton backward kernels of attention over key intervals, and their launcher.

Four launches without atomics, so that gradients are bitwise equal run to run: row terms and a
summary of each query tile; from the summaries, which query tiles each key block meets; dK and dV
by key block; dQ by query tile.
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
    HIP,
    LOG2_E,
    block_d,
    both_bounds,
    dropout_scales,
    kept,
    key_ranges,
    row_bounds,
    score_scales,
    tanh,
    warps_of,
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
    o_d = tl.arange(0, BLOCK_D)
    m_md = m_m[:, None] & (o_d < D)[None, :]
    # fmt: off
    b_lo, b_hi = row_bounds(
        p_lo, p_hi, stride_lob, stride_lom, stride_hib, stride_him, i_b, o_m, m_m, S, T,
        INTERVALS, CAUSAL,
    )
    # fmt: on
    m_row = m_m & (b_lo < b_hi)
    # [BLOCK_M, BLOCK_D]
    p_ot = p_out + i_b * stride_ob + i_h * stride_oh + o_m64[:, None] * stride_om + o_d[None, :]
    p_gt = p_do + i_b * stride_gb + i_h * stride_gh + o_m64[:, None] * stride_gm + o_d[None, :]
    b_out = tl.load(p_ot, mask=m_md, other=0.0).to(tl.float32)
    b_do = tl.load(p_gt, mask=m_md, other=0.0).to(tl.float32)
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
    stride_qh,
    stride_qm,
    stride_gh,
    stride_gm,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    i_start,
    i_end,
    i_b,
    i_bh,
    S,
    T,
    scale,
    scale_cap,
    scale_kept,
    seed,
    threshold,
    o_n,
    o_d,
    m_d,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what query tiles [i_start, i_end) of the group's heads give to a key block's gradients.

    Pointers are those of the group's first head. One loop over heads and tiles, so that loads
    are prefetched across heads. Without MASKED the tiles are whole and see the whole block.
    """
    n_tiles = i_end - i_start
    for i_t in range(n_tiles * GROUP):
        i_g = (i_t // n_tiles).to(tl.int64) if GROUP > 1 else 0
        i_m = i_start + (i_t % n_tiles if GROUP > 1 else i_t)
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_m64 = o_m.to(tl.int64)
        m_m = o_m < S
        # [BLOCK_M, BLOCK_D]
        p_qt = p_q + i_g * stride_qh + o_m64[:, None] * stride_qm + o_d[None, :]
        p_gt = p_do + i_g * stride_gh + o_m64[:, None] * stride_gm + o_d[None, :]
        p_lt = p_lse2 + i_g * S + o_m64
        p_dt = p_delta + i_g * S + o_m64
        if MASKED:
            # An absent row has lse2 = inf like an empty one: its probabilities are 0.
            b_q = tl.load(p_qt, mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_do = tl.load(p_gt, mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_lse2 = tl.load(p_lt, mask=m_m, other=float("inf"))
            b_delta = tl.load(p_dt, mask=m_m, other=0.0)
        else:
            if PADDED:
                b_q = tl.load(p_qt, mask=m_d[None, :], other=0.0)
                b_do = tl.load(p_gt, mask=m_d[None, :], other=0.0)
            else:
                b_q = tl.load(p_qt)
                b_do = tl.load(p_gt)
            b_lse2 = tl.load(p_lt)
            b_delta = tl.load(p_dt)
        if WIDEN:
            b_q = b_q.to(tl.float32)
            b_do = b_do.to(tl.float32)
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
            m_kept = kept(seed, i_bh + i_g, o_m[None, :], o_n[:, None], threshold)
            b_dp = tl.where(m_kept, b_dp * scale_kept, 0.0)
            b_pv = tl.where(m_kept, b_p, 0.0)
        else:
            b_pv = b_p
        b_pv = b_pv.to(p_do.dtype.element_ty).to(b_do.dtype)
        b_dv = tl.dot(b_pv, b_do, b_dv, input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if SOFTCAP:
            b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        b_ds = b_ds.to(p_q.dtype.element_ty).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
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
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of one (b, key head, key block), summed over the group's query heads."""
    n_n = tl.cdiv(T, BLOCK_N)
    i_bh = (tl.program_id(0) // n_n).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_n = tl.program_id(0) % n_n
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n64 = o_n.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_nd = (o_n < T)[:, None] & m_d[None, :]
    # [BLOCK_N, BLOCK_D]
    p_kt = p_k + i_b * stride_kb + i_h * stride_kh + o_n64[:, None] * stride_kn + o_d[None, :]
    p_vt = p_v + i_b * stride_vb + i_h * stride_vh + o_n64[:, None] * stride_vn + o_d[None, :]
    b_k = tl.load(p_kt, mask=m_nd, other=0.0)
    b_v = tl.load(p_vt, mask=m_nd, other=0.0)
    if WIDEN:
        b_k = b_k.to(tl.float32)
        b_v = b_v.to(tl.float32)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # The group's first query head, of H * GROUP; heads of one sequence lie S rows apart in lse2.
    i_qbh = i_bh * GROUP
    p_q += i_b * stride_qb + i_h * GROUP * stride_qh
    p_do += i_b * stride_gb + i_h * GROUP * stride_gh
    p_lse2 += i_qbh * S
    p_delta += i_qbh * S
    seed = tl.load(p_seed) if DROPOUT else 0
    n_m = tl.cdiv(S, BLOCK_M)
    for i_run in range(RUNS):
        if INTERVALS:
            p_run = p_runs + ((i_b * n_n + i_n) * RUNS + i_run) * 3
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
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, p_lo, p_hi, stride_qh, stride_qm,
            stride_gh, stride_gm, stride_lob, stride_lom, stride_hib, stride_him, i_start, i_free,
            i_b, i_qbh, S, T, scale, scale_cap, scale_kept, seed, threshold, o_n, o_d, m_d,
            BLOCK_M, GROUP, True, INTERVALS, CAUSAL, D != BLOCK_D, SOFTCAP, DROPOUT, WIDEN,
            PRECISION,
        )
        b_dk, b_dv = _key_gradients(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, p_lo, p_hi, stride_qh, stride_qm,
            stride_gh, stride_gm, stride_lob, stride_lom, stride_hib, stride_him, i_free, i_end,
            i_b, i_qbh, S, T, scale, scale_cap, scale_kept, seed, threshold, o_n, o_d, m_d,
            BLOCK_M, GROUP, False, INTERVALS, CAUSAL, D != BLOCK_D, SOFTCAP, DROPOUT, WIDEN,
            PRECISION,
        )
        # fmt: on
    b_dk = b_dk * scale_dk
    if DROPOUT:
        b_dv = b_dv * scale_kept
    p_kt = p_dk + i_b * stride_dkb + i_h * stride_dkh + o_n64[:, None] * stride_dkn + o_d[None, :]
    p_vt = p_dv + i_b * stride_dvb + i_h * stride_dvh + o_n64[:, None] * stride_dvn + o_d[None, :]
    tl.store(p_kt, b_dk.to(p_dk.dtype.element_ty), mask=m_nd)
    tl.store(p_vt, b_dv.to(p_dv.dtype.element_ty), mask=m_nd)


@triton.jit
def _query_gradient(
    b_dq,
    b_q,
    b_do,
    b_lse2,
    b_delta,
    p_k,
    p_v,
    stride_kn,
    stride_vn,
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
    i_bh,
    o_m,
    o_d,
    m_d,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the keys [i_start, i_end) give to a query tile's gradient.

    Without MASKED every row of the tile that sees a key sees all of these, and all lie below T.
    """
    for i_n in range(i_start, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_n64 = o_n.to(tl.int64)
        # [BLOCK_N, BLOCK_D]
        p_kt = p_k + o_n64[:, None] * stride_kn + o_d[None, :]
        p_vt = p_v + o_n64[:, None] * stride_vn + o_d[None, :]
        if MASKED:
            m_n = o_n < T
            b_k = tl.load(p_kt, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_v = tl.load(p_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
        elif PADDED:
            b_k = tl.load(p_kt, mask=m_d[None, :], other=0.0)
            b_v = tl.load(p_vt, mask=m_d[None, :], other=0.0)
        else:
            b_k = tl.load(p_kt)
            b_v = tl.load(p_vt)
        if WIDEN:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
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
            m_kept = kept(seed, i_bh, o_m[:, None], o_n[None, :], threshold)
            b_dp = tl.where(m_kept, b_dp * scale_kept, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if SOFTCAP:
            b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        b_ds = b_ds.to(p_k.dtype.element_ty).to(b_k.dtype)
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
):
    """dQ of one (b, head, query tile)."""
    n_m = tl.cdiv(S, BLOCK_M)
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_m = tl.program_id(0) % n_m
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < S
    o_m64 = o_m.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_md = m_m[:, None] & m_d[None, :]
    # fmt: off
    b_lo, b_hi = row_bounds(
        p_lo, p_hi, stride_lob, stride_lom, stride_hib, stride_him, i_b, o_m, m_m, S, T,
        INTERVALS, CAUSAL,
    )
    # fmt: on
    i_start, i_full, i_part, i_end = key_ranges(b_lo, b_hi, m_m & (b_lo < b_hi), T, BLOCK_N)
    seed = tl.load(p_seed) if DROPOUT else 0

    # [BLOCK_M, BLOCK_D]
    p_qt = p_q + i_b * stride_qb + i_h * stride_qh + o_m64[:, None] * stride_qm + o_d[None, :]
    p_gt = p_do + i_b * stride_gb + i_h * stride_gh + o_m64[:, None] * stride_gm + o_d[None, :]
    b_q = tl.load(p_qt, mask=m_md, other=0.0)
    b_do = tl.load(p_gt, mask=m_md, other=0.0)
    if WIDEN:
        b_q = b_q.to(tl.float32)
        b_do = b_do.to(tl.float32)
    # Absent rows like empty ones: all probabilities 0.
    b_lse2 = tl.load(p_lse2 + i_bh * S + o_m64, mask=m_m, other=float("inf"))
    b_delta = tl.load(p_delta + i_bh * S + o_m64, mask=m_m, other=0.0)
    p_kh = p_k + i_b * stride_kb + (i_h // GROUP) * stride_kh
    p_vh = p_v + i_b * stride_vb + (i_h // GROUP) * stride_vh
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # fmt: off
    b_dq = _query_gradient(
        b_dq, b_q, b_do, b_lse2, b_delta, p_kh, p_vh, stride_kn, stride_vn, b_lo, b_hi,
        i_start, tl.minimum(i_full, i_end), T, scale, scale_cap, scale_kept, seed, threshold,
        i_bh, o_m, o_d, m_d, BLOCK_N, True, D != BLOCK_D, SOFTCAP, DROPOUT, WIDEN, PRECISION,
    )
    b_dq = _query_gradient(
        b_dq, b_q, b_do, b_lse2, b_delta, p_kh, p_vh, stride_kn, stride_vn, b_lo, b_hi,
        i_full, tl.minimum(i_part, i_end), T, scale, scale_cap, scale_kept, seed, threshold,
        i_bh, o_m, o_d, m_d, BLOCK_N, False, D != BLOCK_D, SOFTCAP, DROPOUT, WIDEN, PRECISION,
    )
    b_dq = _query_gradient(
        b_dq, b_q, b_do, b_lse2, b_delta, p_kh, p_vh, stride_kn, stride_vn, b_lo, b_hi,
        i_part, i_end, T, scale, scale_cap, scale_kept, seed, threshold,
        i_bh, o_m, o_d, m_d, BLOCK_N, True, D != BLOCK_D, SOFTCAP, DROPOUT, WIDEN, PRECISION,
    )
    # fmt: on
    p_qt = p_dq + i_b * stride_dqb + i_h * stride_dqh + o_m64[:, None] * stride_dqm + o_d[None, :]
    tl.store(p_qt, (b_dq * scale_dq).to(p_dq.dtype.element_ty), mask=m_md)


def config_dkdv(dtype: torch.dtype, block_d: int, hip: bool = HIP) -> dict[str, int]:
    """Tile, warps and pipeline stages of the dK/dV pass.

    Chosen like the forward's: the largest tiles, 64 keys or more in 16 bits because Hopper's
    wgmma needs 64 rows, that spill nothing or next to it, in at most 99 KiB of shared memory.
    sm_90 spills nothing up to 128 (8 to 32 bytes with dropout); above, 104 bytes (152 with every
    feature) are the price of wgmma: 32 x 32 spills nothing but falls back to mma.sync. sm_80
    spills 16 to 32 bytes up to 128, where half as many queries would spill nothing but wait
    twice as often.
    """
    if dtype == torch.float32:
        if block_d <= 64:
            tile = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
        elif block_d <= 128:
            tile = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
        else:
            tile = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    elif block_d <= 64:
        tile = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    elif block_d <= 128:
        tile = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    else:
        tile = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    if hip:
        # Prefetching two tiles takes registers there, not shared memory: 700 spill at 64 x 128.
        tile["num_stages"] = 1
    return warps_of(tile, hip)


def config_dq(dtype: torch.dtype, block_d: int, hip: bool = HIP) -> dict[str, int]:
    """Tile, warps and pipeline stages of the dQ pass.

    Chosen like the forward's: nothing spills on sm_80 and sm_90 (dropout above 128: 8 bytes), in
    at most 97 KiB of shared memory.
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
    return warps_of(tile, hip)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK and dV stored as ``[B, S, H, D]``, and dsinks, empty without sinks.

    The last stride of grad_out, q, k, v and out is 1.
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
    over_keys, over_queries = config_dkdv(q.dtype, block_d(D)), config_dq(q.dtype, block_d(D))
    block_m, block_n = over_keys["BLOCK_M"], over_keys["BLOCK_N"]
    n_m, n_n = triton.cdiv(S, block_m), triton.cdiv(T, block_n)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    tiles = runs = None
    if intervals:
        tiles = q.new_empty(B, n_m, 4, dtype=torch.int32)
        runs = q.new_empty(B, n_n, RUNS, 3, dtype=torch.int32)
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
    operands = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        attention_backward_rows[(n_m * B * H,)](
            out,
            grad_out,
            lse.contiguous(),
            None if grad_lse is None else grad_lse.contiguous(),
            lo,
            hi,
            delta,
            lse2,
            tiles,
            *out.stride()[:3],
            *grad_out.stride()[:3],
            *bound_strides,
            H,
            S,
            T,
            LOG2_E=LOG2_E,
            BLOCK_M=block_m,
            DLSE=grad_lse is not None,
            **padded,
            **visible,
        )
        if T > 0:
            if intervals:
                attention_backward_runs[(n_n * B,)](
                    tiles, runs, S, T, BLOCK_M=block_m, BLOCK_N=block_n, RUNS=RUNS, SEARCH=SEARCH
                )
            attention_backward_dkdv[(n_n * B * Hkv,)](
                q,
                k,
                v,
                grad_out,
                lse2,
                delta,
                lo,
                hi,
                runs,
                seed,
                dk,
                dv,
                *operands,
                *dk.stride()[:3],
                *dv.stride()[:3],
                *bound_strides,
                Hkv,
                S,
                T,
                *scales,
                RUNS=RUNS if intervals else 2,
                **over_keys,
                **switches,
            )
        attention_backward_dq[(triton.cdiv(S, over_queries["BLOCK_M"]) * B * H,)](
            q,
            k,
            v,
            grad_out,
            lse2,
            delta,
            lo,
            hi,
            seed,
            dq,
            *operands,
            *dq.stride()[:3],
            *bound_strides,
            H,
            S,
            T,
            *scales,
            **over_queries,
            **switches,
        )
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    # [B, Hq, S]; a row whose lse is -inf has no sink either, and exp(-inf - -inf) would be NaN.
    weight = (sinks.float()[:, None] - lse).exp().masked_fill(lse == float("-inf"), 0.0)
    return dq, dk, dv, -(weight * delta).sum((0, 2)).to(sinks.dtype)
