"""Triton forward kernel of attention over key intervals, and its launcher."""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton, tuning
from mmopt_kernels._descriptors import describable, has_tma
from mmopt_kernels._philox import dropout_scales
from mmopt_kernels.attention.tiles import (
    LN_2,
    LOG2_E,
    block_d,
    both_bounds,
    choose,
    for_target,
    grid_of,
    kept,
    key_ranges,
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


@triton.jit
def _attend(
    b_acc,
    b_max,
    b_sum,
    b_q,
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
    """Online softmax over the keys [i_start, i_end), in base 2: exp2 is one instruction.

    Without MASKED every row of the tile sees every one of these keys, and all lie below T. The
    scale, which is positive, is left to the maximum and to one multiply-add before exp2; softcap
    needs it earlier.
    """
    for i_n in range(i_start, i_end, BLOCK_N):
        # LLVM does not see it, and takes more registers for pointers without it.
        tl.assume(i_n >= 0)
        o_n = i_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        b_k = load_rows(p_k, strides_k, i_b, i_hkv, i_n, T, D, BLOCK_N, BLOCK_D, MASKED, WIDEN, TMA)
        b_v = load_rows(p_v, strides_v, i_b, i_hkv, i_n, T, D, BLOCK_N, BLOCK_D, MASKED, WIDEN, TMA)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if SOFTCAP:
            b_s = tanh(b_s * scale)
        if MASKED:
            m_s = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        step = scale_cap if SOFTCAP else scale
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * step)
        # A row that has seen no key yet: -inf - -inf would be NaN.
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
        b_p = tl.exp2(b_s * step - b_ref[:, None])
        b_alpha = tl.exp2(b_max - b_ref)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        if DROPOUT:
            # After the sum, which dropout leaves alone.
            b_p = tl.where(kept(seed, i_bh, o_m, i_n, threshold, BLOCK_N, False), b_p, 0.0)
        b_p = b_p.to(DTYPE)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


# S and T change from batch to batch; specializing on them would recompile. Strides derive from
# the layout and keep their divisibility hint, which vectorizes the loads.
@triton.jit(do_not_specialize=["S", "T", "threshold"])
def attention_forward(
    p_q,
    p_k,
    p_v,
    p_lo,
    p_hi,
    p_sinks,
    p_seed,
    p_out,
    p_lse,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    H,
    S,
    T,
    scale,
    scale_cap,
    scale_kept,
    threshold,
    LN_2: tl.constexpr,
    LOG2_E: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    SIDE: tl.constexpr,
    TMA: tl.constexpr,
):
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
    # Whatever the other rows accumulate is replaced below.
    m_row = m_m & (b_lo < b_hi)
    i_start, i_full, i_part, i_end = key_ranges(b_lo, b_hi, m_row, T, BLOCK_N)
    seed = tl.load(p_seed) if DROPOUT else 0

    DTYPE: tl.constexpr = p_out.dtype if TMA else p_out.dtype.element_ty
    i_hkv = i_h // GROUP
    strides_q = strides_of(stride_qb, stride_qh, stride_qm, VECTOR)
    strides_k = strides_of(stride_kb, stride_kh, stride_kn, VECTOR)
    strides_v = strides_of(stride_vb, stride_vh, stride_vn, VECTOR)
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(
        p_q, strides_q, i_b, i_h, i_m * BLOCK_M, S, D, BLOCK_M, BLOCK_D, True, WIDEN, TMA
    )
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # fmt: off
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, p_k, p_v, strides_k, strides_v, b_lo, b_hi, i_start,
        tl.minimum(i_full, i_end), T, scale, scale_cap, seed, threshold, i_b, i_hkv, i_bh, o_m, D,
        BLOCK_D, BLOCK_N, DTYPE, True, SOFTCAP, DROPOUT, WIDEN, PRECISION, TMA,
    )
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, p_k, p_v, strides_k, strides_v, b_lo, b_hi, i_full,
        tl.minimum(i_part, i_end), T, scale, scale_cap, seed, threshold, i_b, i_hkv, i_bh, o_m, D,
        BLOCK_D, BLOCK_N, DTYPE, False, SOFTCAP, DROPOUT, WIDEN, PRECISION, TMA,
    )
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, p_k, p_v, strides_k, strides_v, b_lo, b_hi, i_part, i_end, T,
        scale, scale_cap, seed, threshold, i_b, i_hkv, i_bh, o_m, D, BLOCK_D, BLOCK_N, DTYPE, True,
        SOFTCAP, DROPOUT, WIDEN, PRECISION, TMA,
    )
    # fmt: on
    b_acc = tl.where(m_row[:, None], b_acc, 0.0)
    b_sum = tl.where(m_row, b_sum, 0.0)
    b_max = tl.where(m_row, b_max, float("-inf"))
    if SINKS:
        b_sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2_E
        b_new = tl.maximum(b_max, b_sink)
        # An empty row whose sink is -inf too.
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_alpha = tl.exp2(b_max - b_ref)
        b_sum = b_sum * b_alpha + tl.exp2(b_sink - b_ref)
        b_acc = b_acc * b_alpha[:, None]
        b_max = b_new
    # 0 only in an empty row: its output is then 0 and its lse -inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / b_sum[:, None]
    if DROPOUT:
        b_out = b_out * scale_kept
    b_lse = (b_max + tl.log2(b_sum)) * LN_2
    strides_o = strides_of(stride_ob, stride_oh, stride_om, VECTOR)
    store_rows(p_out, strides_o, b_out, i_b, i_h, i_m * BLOCK_M, S, D, BLOCK_M, BLOCK_D, DTYPE, TMA)
    tl.store(p_lse + i_bh.to(tl.int64) * S + o_m, b_lse, mask=m_m)


def config(dtype: torch.dtype, block_d: int, target: str) -> tuning.Config:
    """Tile, warps and pipeline stages.

    Chosen from what ptxas reports, not yet from a clock (issue 4 measures): with Triton 3.7.1 the
    largest tiles that spill nothing in 16 bits on sm_80 and sm_120, with dropout, softcap and sinks
    either, in at most 98 KiB of shared memory; every target from sm_80 on gives a block 99 KiB.
    float32 in ieee precision runs without matrix instructions, and with every feature spills 24
    bytes on sm_90 in a head of up to 64.
    """
    if dtype == torch.float32:
        if block_d <= 64:
            tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
        elif block_d <= 128:
            tile = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
        else:
            tile = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    elif block_d <= 64:
        tile = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    elif block_d <= 128:
        tile = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
    else:
        tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return for_target(tile, target)


def launch(
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
    """Out stored as ``[B, S, H, D]``, and lse. The last stride of q, k and v is 1."""
    B, H, S, D = q.shape
    T = k.shape[2]
    out = q.new_empty(B, S, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    if not scale > 0:
        # The kernel takes a positive one: its sign and its zero go to the queries.
        q, scale = (-q, -scale) if scale < 0 else (q * scale, 1.0)
    lo, hi, bound_strides = both_bounds(lo, hi, T)
    threshold, scale_kept = dropout_scales(dropout_p)
    tma = has_tma(_triton.target(q.device)) and describable(q, k, v, out)
    tile = choose("attention_forward", q, T, softcap, dropout_p, tma, config)
    vector = vector_of_rows(q, k, v, out)
    grid = grid_of(causal or lo is not None, B * H, _triton.cdiv(S, tile["BLOCK_M"]), k)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        attention_forward[grid](
            operand(q, tile, "BLOCK_M"),
            operand(k, tile, "BLOCK_N"),
            operand(v, tile, "BLOCK_N"),
            lo,
            hi,
            None if sinks is None else sinks.contiguous(),
            seed,
            operand(out, tile, "BLOCK_M"),
            lse,
            *(stride for x in (q, k, v, out) for stride in steps(x, vector)),
            *bound_strides,
            H,
            S,
            T,
            *score_scales(scale, softcap),
            scale_kept,
            threshold,
            LN_2=LN_2,
            LOG2_E=LOG2_E,
            GROUP=H // k.shape[1],
            D=D,
            BLOCK_D=block_d(D),
            INTERVALS=lo is not None,
            CAUSAL=causal,
            SOFTCAP=softcap is not None,
            SINKS=sinks is not None,
            DROPOUT=dropout_p > 0,
            WIDEN=_triton.must_widen(q.dtype),
            PRECISION=_triton.dot_precision(),
            VECTOR=vector,
            SIDE=len(grid) > 1,
            **tile,
        )
    return out, lse
