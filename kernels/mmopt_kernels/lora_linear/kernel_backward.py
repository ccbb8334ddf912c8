"""Triton kernels of the LoRA linear layer's backward, and their launchers.

The weight is frozen, so that the gradients are those of the adapter and of the input:

    ds = scale dy b          db = scale dyᵀ s        `up_backward`, one read of dy
    da = dsᵀ dropout(x)                              `down_backward`, one read of x
    dx = dy weight + keep / (1 - p) (ds a)           `input_backward`, one write of dx, or
                                                     `add_masked_` after a GEMM of the library

No atomics: as in the forward, sums that several programs share are added in a fixed order.
"""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton, tuning
from mmopt_kernels._philox import dropout_scales
from mmopt_kernels._vectors import stride_of, vector_of
from mmopt_kernels.dropout.kernel import kept
from mmopt_kernels.lora_linear.kernel import (
    allows_tma,
    block_r,
    block_r_down,
    config,
    described,
    factor,
    grouped_tile,
    operands,
    raw_factor,
    reduce,
    shipped_tile,
    splits,
    store_or_part,
    unit_rows,
)

# Bytes of partial sums of db that exist at once; rows beyond it are a launch of their own. They
# stay in the caches of a large GPU (50 MiB on an H200) for the most part.
MOST_PARTS = 64 * 2**20


@triton.jit(do_not_specialize=["M", "SPLITS"])
def lora_linear_up_backward(
    p_dy,
    p_s,
    p_b,
    p_index,
    p_owner,
    p_ds,
    p_db,
    stride_gm,
    stride_sm,
    stride_bn,
    stride_dsm,
    M,
    N,
    R,
    SPLITS,
    scale,
    DB: tl.constexpr,
    OWN: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] of ds over one split of N, and what these rows give to db there.

    One read of dy for both products: M N elements, where two GEMMs read it twice. What that costs
    are the parts of db, N R float32 for every BLOCK_M rows, written and read again: 8 R / BLOCK_M
    bytes for each element of dy. Below the size of an element, which is what the second read would
    be, it pays: in 16 bits R < BLOCK_M / 4. Parts of ds, where N is split, are 8 SPLITS R / N.
    """
    R = R * VECTOR
    stride_sm = stride_of(stride_sm, VECTOR)
    stride_bn = stride_of(stride_bn, VECTOR)
    stride_dsm = stride_of(stride_dsm, VECTOR)
    n_m = tl.cdiv(M, BLOCK_M)
    i_m = tl.program_id(0) % n_m
    i_split = tl.program_id(0) // n_m % SPLITS
    i_r = tl.program_id(0) // n_m // SPLITS
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R
    if DB:
        # [BLOCK_M, BLOCK_R]
        p_st = p_s + o_m[:, None] * stride_sm + o_r[None, :]
        b_s = tl.load(p_st, mask=m_m[:, None] & m_r[None, :], other=0.0)
        if WIDEN:
            b_s = b_s.to(tl.float32)
    width = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N
    b_ds = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for i_n in range(i_split * width, tl.minimum((i_split + 1) * width, N), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < N
        # [BLOCK_M, BLOCK_N] and [BLOCK_N, BLOCK_R]
        p_dyt = p_dy + o_m[:, None] * stride_gm + o_n[None, :]
        p_bt = p_b + o_n[:, None] * stride_bn + o_r[None, :]
        b_dy = tl.load(p_dyt, mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_b = tl.load(p_bt, mask=m_n[:, None] & m_r[None, :], other=0.0).to(b_dy.dtype)
        if WIDEN:
            b_dy = b_dy.to(tl.float32)
            b_b = b_b.to(tl.float32)
        b_ds = tl.dot(b_dy, b_b, b_ds, input_precision=PRECISION)
        if DB:
            b_db = tl.dot(tl.trans(b_dy), b_s, input_precision=PRECISION)
            p_dbt = p_db + (i_m.to(tl.int64) * N + o_n)[:, None] * R + o_r[None, :]
            tl.store(p_dbt, b_db, mask=m_n[:, None] & m_r[None, :])
    # fmt: off
    store_or_part(
        b_ds, p_ds, p_index, p_owner, stride_dsm, o_m, o_r, i_split, M, R, scale, PARTS, OWN,
    )
    # fmt: on


@triton.jit(do_not_specialize=["M", "SPLITS", "threshold"])
def lora_linear_down_backward(
    p_ds,
    p_x,
    p_seed,
    p_da,
    stride_dsm,
    stride_xm,
    M,
    K,
    R,
    SPLITS,
    scale_kept,
    threshold,
    DROPOUT: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_R, BLOCK_K] of da = dsᵀ dropout(x) over one split of the rows.

    One read of x for each BLOCK_R of the ranks, M K elements, and of ds for each BLOCK_K columns,
    from L2. Parts of da are SPLITS K R float32, small beside x while SPLITS R is beside M.
    """
    R = R * VECTOR
    stride_dsm = stride_of(stride_dsm, VECTOR)
    n_k = tl.cdiv(K, BLOCK_K)
    i_k = tl.program_id(0) % n_k * BLOCK_K
    i_split = tl.program_id(0) // n_k % SPLITS
    i_r = tl.program_id(0) // n_k // SPLITS
    o_k = i_k + tl.arange(0, BLOCK_K)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k = o_k < K
    m_r = o_r < R
    seed = tl.load(p_seed) if DROPOUT else 0
    height = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLITS) * BLOCK_M
    b_da = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for i_m in range(i_split * height, tl.minimum((i_split + 1) * height, M), BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M).to(tl.int64)
        m_m = o_m < M
        # [BLOCK_M, BLOCK_R] and [BLOCK_M, BLOCK_K]
        p_dst = p_ds + o_m[:, None] * stride_dsm + o_r[None, :]
        p_xt = p_x + o_m[:, None] * stride_xm + o_k[None, :]
        b_ds = tl.load(p_dst, mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_x = tl.load(p_xt, mask=m_m[:, None] & m_k[None, :], other=0.0)
        if DROPOUT:
            b_x = tl.where(kept(seed, o_m, i_k, threshold, BLOCK_K), b_x, 0.0)
        if WIDEN:
            b_ds = b_ds.to(tl.float32)
            b_x = b_x.to(tl.float32)
        b_da = tl.dot(tl.trans(b_ds), b_x, b_da, input_precision=PRECISION)
    m_da = m_r[:, None] & m_k[None, :]
    if PARTS:
        p_dat = p_da + (i_split.to(tl.int64) * R + o_r)[:, None] * K + o_k[None, :]
    else:
        b_da = b_da * scale_kept
        p_dat = p_da + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_dat, b_da, mask=m_da)


@triton.jit
def _through_down(
    p_ds,
    p_a,
    stride_dsm,
    stride_ar,
    o_m,
    o_k,
    i_k,
    M,
    K,
    R,
    seed,
    scale_kept,
    threshold,
    DROPOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """keep / (1 - p) (ds a): [BLOCK_M, BLOCK_K] in float32."""
    R = R * VECTOR
    stride_dsm = stride_of(stride_dsm, VECTOR)
    m_m = o_m < M
    m_k = o_k < K
    b_dx = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        # [BLOCK_M, BLOCK_R] and [BLOCK_R, BLOCK_K]
        p_dst = p_ds + o_m[:, None] * stride_dsm + o_r[None, :]
        p_at = p_a + o_r.to(tl.int64)[:, None] * stride_ar + o_k[None, :]
        b_ds = tl.load(p_dst, mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_a = tl.load(p_at, mask=m_r[:, None] & m_k[None, :], other=0.0).to(b_ds.dtype)
        if WIDEN:
            b_ds = b_ds.to(tl.float32)
            b_a = b_a.to(tl.float32)
        b_dx = tl.dot(b_ds, b_a, b_dx, input_precision=PRECISION)
    if DROPOUT:
        m_kept = kept(seed, o_m, i_k, threshold, BLOCK_K)
        b_dx = tl.where(m_kept, b_dx * scale_kept, 0.0)
    return b_dx


@triton.jit(do_not_specialize=["M", "threshold"])
def lora_linear_input_backward(
    p_dy,
    p_w,
    p_ds,
    p_a,
    p_seed,
    p_dx,
    stride_gm,
    stride_wn,
    stride_wk,
    stride_dsm,
    stride_ar,
    M,
    N,
    K,
    R,
    scale_kept,
    threshold,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_K] tile of dx = dy w + keep / (1 - p) (ds a).

    A GEMM's traffic, M N + N K + M K elements when the tiles of a group meet in L2, and M R + K R
    for the adapter: dx is written once and never read, where addmm_ reads and writes it again. With
    TMA dy, w and dx are descriptors. a is rounded here, as b in forward.
    """
    i_m, i_k = grouped_tile(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP_M)
    i_k = i_k * BLOCK_K
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k + tl.arange(0, BLOCK_K).to(tl.int64)
    m_m = o_m < M
    m_k = o_k < K
    seed = tl.load(p_seed) if DROPOUT else 0
    # The adapter goes first, so that the mask touches its product alone.
    # fmt: off
    b_dx = _through_down(
        p_ds, p_a, stride_dsm, stride_ar, o_m, o_k, i_k, M, K, R, seed, scale_kept, threshold,
        DROPOUT, VECTOR, BLOCK_M, BLOCK_K, BLOCK_R, WIDEN, PRECISION,
    )
    # fmt: on
    for i_n in range(0, N, BLOCK_N):
        # [BLOCK_M, BLOCK_N] and [BLOCK_N, BLOCK_K]
        if TMA:
            b_dy = p_dy.load([i_m * BLOCK_M, i_n])
            b_w = p_w.load([i_n, i_k])
        else:
            o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
            m_n = o_n < N
            p_dyt = p_dy + o_m[:, None] * stride_gm + o_n[None, :]
            p_wt = p_w + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk
            b_dy = tl.load(p_dyt, mask=m_m[:, None] & m_n[None, :], other=0.0)
            b_w = tl.load(p_wt, mask=m_n[:, None] & m_k[None, :], other=0.0)
        if WIDEN:
            b_dy = b_dy.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_dx = tl.dot(b_dy, b_w, b_dx, input_precision=PRECISION)
    if TMA:
        p_dx.store([i_m * BLOCK_M, i_k], b_dx.to(p_dx.dtype))
    else:
        p_dxt = p_dx + o_m[:, None] * K + o_k[None, :]
        tl.store(p_dxt, b_dx.to(p_dx.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def lora_linear_add(
    p_dx,
    p_ds,
    p_a,
    p_seed,
    stride_dxm,
    stride_dsm,
    stride_ar,
    M,
    K,
    R,
    scale_kept,
    threshold,
    DROPOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_K] tile of dx += keep / (1 - p) (ds a).

    One read and one write of dx: 2 M K elements, as addmm_ without dropout. With it the library
    writes ds a, reads and writes it for the mask, and reads it for the sum: 6 M K in all.
    """
    n_k = tl.cdiv(K, BLOCK_K)
    i_m = tl.program_id(0) // n_k
    i_k = tl.program_id(0) % n_k * BLOCK_K
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k + tl.arange(0, BLOCK_K)
    m_dx = (o_m < M)[:, None] & (o_k < K)[None, :]
    p_dxt = p_dx + o_m[:, None] * stride_dxm + o_k[None, :]
    # First, so that it arrives while the mask is drawn.
    b_old = tl.load(p_dxt, mask=m_dx, other=0.0)
    seed = tl.load(p_seed) if DROPOUT else 0
    # fmt: off
    b_dx = _through_down(
        p_ds, p_a, stride_dsm, stride_ar, o_m, o_k, i_k, M, K, R, seed, scale_kept, threshold,
        DROPOUT, VECTOR, BLOCK_M, BLOCK_K, BLOCK_R, WIDEN, PRECISION,
    )
    # fmt: on
    b_dx += b_old.to(tl.float32)
    tl.store(p_dxt, b_dx.to(p_dx.dtype.element_ty), mask=m_dx)


def config_up_backward(dtype: torch.dtype, M: int, width: int) -> tuning.Config:
    """Of `lora_linear_up_backward`; chosen like `config`.

    As many rows as fit: their number divides what the partial sums of db cost.
    """
    if dtype == torch.float32:
        warps = 4 if width <= 16 else 8
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": warps, "num_stages": 2}
    if M <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    rows = 256 if width <= 32 else 128
    return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def config_down_backward(dtype: torch.dtype, width: int) -> tuning.Config:
    """Of `lora_linear_down_backward`; chosen like `config`."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if width <= 64:
        return {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}


def config_add(dtype: torch.dtype) -> tuning.Config:
    """Of `lora_linear_add`; chosen like `config`."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}


def up_backward(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    scale: float,
    adapter_index: Tensor | None = None,
    owner: Tensor | None = None,
    need_b: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """ds = scale dy b, ``[M, R]`` in the dtype of dy, and db = scale dyᵀ s, ``[N, R]`` in float32.

    Args:
        dy: ``[M, N]``.
        s: ``[M, R]``, zero where the column belongs to another adapter, as `down` leaves it.
        b: ``[N, R]``, any floating dtype, rounded to that of dy.
        adapter_index, owner: as of `down`; ds is 0 where s is.
        need_b: without it db is None.
    """
    dy, s, b = unit_rows(dy), unit_rows(s), raw_factor(b, dy.dtype)
    (M, N), R = dy.shape, b.shape[1]
    ds = dy.new_empty(M, R)
    if dy.numel() == 0 or R == 0:
        ds.zero_()
        return ds, dy.new_zeros(N, R, dtype=torch.float32) if need_b else None
    db = dy.new_empty(N, R, dtype=torch.float32) if need_b else None
    width = block_r(R)
    tile = shipped_tile("lora_linear_up_backward", dy, width, M) or config_up_backward(
        dy.dtype, M, width
    )
    block_m = tile["BLOCK_M"]
    most = max(1, MOST_PARTS // (4 * N * R)) * block_m if need_b else M
    for m in range(0, M, most):
        # Rows whose parts of db exist together.
        rows = slice(m, min(m + most, M))
        index = None if adapter_index is None else adapter_index[rows]
        _up_backward_rows(dy[rows], s[rows], b, ds[rows], db, scale, index, owner, tile, m > 0)
    return ds, db


def _up_backward_rows(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    ds: Tensor,
    db: Tensor | None,
    scale: float,
    adapter_index: Tensor | None,
    owner: Tensor | None,
    tile: tuning.Config,
    add: bool,
) -> None:
    """Write ds, and write db or, with add, increase it."""
    (M, N), R = dy.shape, b.shape[1]
    width = block_r(R)
    n_m = _triton.cdiv(M, tile["BLOCK_M"])
    programs = n_m * _triton.cdiv(R, width)
    number = splits(programs, _triton.cdiv(N, tile["BLOCK_N"]))
    parts = dy.new_empty(number, M, R, dtype=torch.float32) if number > 1 else None
    db_parts = None if db is None else dy.new_empty(n_m, N, R, dtype=torch.float32)
    vector = vector_of(R, s.stride(0), b.stride(0), ds.stride(0))
    with torch.cuda.device_of(dy):  # type: ignore[no-untyped-call]
        lora_linear_up_backward[(programs * number,)](
            dy,
            s,
            b,
            adapter_index,
            owner,
            ds if parts is None else parts,
            db_parts,
            dy.stride(0),
            s.stride(0) // vector,
            b.stride(0) // vector,
            ds.stride(0) // vector,
            M,
            N,
            R // vector,
            number,
            scale,
            DB=db is not None,
            OWN=owner is not None,
            PARTS=parts is not None,
            VECTOR=vector,
            BLOCK_R=width,
            **operands(dy.dtype),
            **tile,
        )
        if parts is not None:
            reduce(parts, ds, scale, adapter_index, owner)
        if db is not None and db_parts is not None:
            reduce(db_parts, db, scale, add=add)


def down_backward(ds: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """da = dsᵀ dropout(x), ``[R, K]`` in float32.

    Args:
        ds: ``[M, R]``, dtype of x.
        x: ``[M, K]``.
        seed, dropout_p: as of `down`, which drew the mask that is drawn again here.
    """
    ds, x = unit_rows(ds), unit_rows(x)
    (M, K), R = x.shape, ds.shape[1]
    if M == 0 or K == 0 or R == 0:
        return x.new_zeros(R, K, dtype=torch.float32)
    da = x.new_empty(R, K, dtype=torch.float32)
    width, dropout = block_r_down(R, x.dtype), dropout_p > 0
    tile = shipped_tile("lora_linear_down_backward", x, width, M, dropout) or config_down_backward(
        x.dtype, width
    )
    threshold, scale_kept = dropout_scales(dropout_p)
    programs = _triton.cdiv(K, tile["BLOCK_K"]) * _triton.cdiv(R, width)
    number = splits(programs, _triton.cdiv(M, tile["BLOCK_M"]))
    parts = x.new_empty(number, R, K, dtype=torch.float32) if number > 1 else None
    vector = vector_of(R, ds.stride(0))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        lora_linear_down_backward[(programs * number,)](
            ds,
            x,
            seed,
            da if parts is None else parts,
            ds.stride(0) // vector,
            x.stride(0),
            M,
            K,
            R // vector,
            number,
            scale_kept,
            threshold,
            DROPOUT=dropout,
            PARTS=parts is not None,
            VECTOR=vector,
            BLOCK_R=width,
            **operands(x.dtype),
            **tile,
        )
        if parts is not None:
            reduce(parts, da, scale_kept)
    return da


def input_backward(
    dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """dx = dy weight + keep / (1 - p) (ds a), ``[M, K]``; weight may be stored in any order."""
    dy, ds, a = unit_rows(dy), unit_rows(ds), raw_factor(a, dy.dtype)
    (M, N), (R, K) = dy.shape, a.shape
    dx = dy.new_empty(M, K)
    if dx.numel() == 0:
        return dx
    width, dropout, tma = block_r(R), dropout_p > 0, allows_tma(dy, weight, dx)
    tile = shipped_tile("lora_linear_input_backward", dy, width, M, dropout, tma) or config(
        dy.dtype, M, backward=True
    )
    threshold, scale_kept = dropout_scales(dropout_p)
    grid = (_triton.cdiv(M, tile["BLOCK_M"]) * _triton.cdiv(K, tile["BLOCK_K"]),)
    vector = vector_of(R, ds.stride(0))
    with torch.cuda.device_of(dy):  # type: ignore[no-untyped-call]
        lora_linear_input_backward[grid](
            described(dy, tile, "BLOCK_M", "BLOCK_N"),
            described(weight, tile, "BLOCK_N", "BLOCK_K"),
            ds,
            a,
            seed,
            described(dx, tile, "BLOCK_M", "BLOCK_K"),
            dy.stride(0),
            *weight.stride(),
            ds.stride(0) // vector,
            a.stride(0),
            M,
            N,
            K,
            R // vector,
            scale_kept,
            threshold,
            DROPOUT=dropout,
            VECTOR=vector,
            BLOCK_R=width,
            **operands(dy.dtype),
            **tile,
        )
    return dx


def add_masked_(dx: Tensor, ds: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float) -> None:
    """dx += keep / (1 - p) (ds a) in place; the rows of dx ``[M, K]`` are contiguous."""
    ds, a = unit_rows(ds), factor(a, dx.dtype)
    (M, K), R = dx.shape, a.shape[0]
    if dx.numel() == 0 or R == 0:
        return
    assert K == 1 or dx.stride(1) == 1
    width, dropout = block_r(R), dropout_p > 0
    tile = shipped_tile("lora_linear_add", dx, width, M, dropout) or config_add(dx.dtype)
    threshold, scale_kept = dropout_scales(dropout_p)
    grid = (_triton.cdiv(M, tile["BLOCK_M"]) * _triton.cdiv(K, tile["BLOCK_K"]),)
    vector = vector_of(R, ds.stride(0))
    with torch.cuda.device_of(dx):  # type: ignore[no-untyped-call]
        lora_linear_add[grid](
            dx,
            ds,
            a,
            seed,
            dx.stride(0),
            ds.stride(0) // vector,
            a.stride(0),
            M,
            K,
            R // vector,
            scale_kept,
            threshold,
            DROPOUT=dropout,
            VECTOR=vector,
            BLOCK_R=width,
            **operands(dx.dtype),
            **tile,
        )
