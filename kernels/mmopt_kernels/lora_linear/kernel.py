"""Triton forward kernel of the LoRA linear layer, and its launcher."""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton, tuning
from mmopt_kernels.lora_linear.ops import rows


# M changes from batch to batch; specializing on it would recompile.
@triton.jit(do_not_specialize=["M"])
def lora_linear_forward(
    p_x,
    p_w,
    p_s,
    p_b,
    p_bias,
    p_y,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_bn,
    stride_br,
    stride_ym,
    M,
    N,
    K,
    R,
    scale,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of y = x wᵀ + bias + scale s bᵀ, written once."""
    # Tiles of GROUP_M rows share weight columns while those are still in L2.
    n_m = tl.cdiv(M, BLOCK_M)
    n_n = tl.cdiv(N, BLOCK_N)
    i_group = tl.program_id(0) // (GROUP_M * n_n)
    n_rows = tl.minimum(n_m - i_group * GROUP_M, GROUP_M)
    i_m = i_group * GROUP_M + tl.program_id(0) % (GROUP_M * n_n) % n_rows
    i_n = tl.program_id(0) % (GROUP_M * n_n) // n_rows
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N

    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The adapter goes first, so that the scale touches its product alone.
    for i_r in range(0, R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        # [BLOCK_M, BLOCK_R] and [BLOCK_R, BLOCK_N]
        p_st = p_s + o_m[:, None] * stride_sm + o_r[None, :]
        p_bt = p_b + o_n[None, :] * stride_bn + o_r[:, None] * stride_br
        b_s = tl.load(p_st, mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_b = tl.load(p_bt, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_b = b_b.to(b_s.dtype)
        if WIDEN:
            b_s = b_s.to(tl.float32)
            b_b = b_b.to(tl.float32)
        b_acc = tl.dot(b_s, b_b, b_acc, input_precision=PRECISION)
    b_acc = b_acc * scale
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < K
        # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
        p_xt = p_x + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
        p_wt = p_w + o_n[None, :] * stride_wn + o_k[:, None] * stride_wk
        b_x = tl.load(p_xt, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_wt, mask=m_k[:, None] & m_n[None, :], other=0.0)
        if WIDEN:
            b_x = b_x.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    if BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    # [BLOCK_M, BLOCK_N]
    p_yt = p_y + o_m[:, None] * stride_ym + o_n[None, :]
    tl.store(p_yt, b_acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def config(dtype: torch.dtype, M: int) -> tuning.Config:
    """Tile, warps and pipeline stages.

    Chosen from what ptxas reports for sm_80 and sm_90, not yet from a clock (issue 5 measures):
    no spills, and at most the 96 KiB of shared memory that leave room in the 99 KiB that every
    target from sm_80 on gives a block (64 KiB, all there is, on gfx942).
    """
    if dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    elif M <= 64:
        tile = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    else:
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return tile | {"GROUP_M": 8}


def block_r(R: int) -> int:
    """Ranks above 64 are looped over, so that the adapter's tiles stay small."""
    return min(64, max(16, triton.next_power_of_2(R)))  # type: ignore[no-any-return]


def launch(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    x2 = rows(x)
    (M, K), N, R = x2.shape, weight.shape[0], a.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        # A skinny GEMM of R columns: the vendor's library splits it over K.
        s = x2 @ a.to(x.dtype).t()
    y = x.new_empty(M, N)
    target, width = _triton.target(x.device), block_r(R)
    tile = tuning.lookup("lora_linear_forward", target, x.dtype, width, M) or config(x.dtype, M)
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
    if y.numel():
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            lora_linear_forward[grid](
                x2,
                weight,
                s,
                b,
                bias,
                y,
                *x2.stride(),
                *weight.stride(),
                s.stride(0),
                *b.stride(),
                y.stride(0),
                M,
                N,
                K,
                R,
                scale,
                BIAS=bias is not None,
                BLOCK_R=width,
                WIDEN=_triton.must_widen(x.dtype),
                PRECISION=_triton.dot_precision(),
                **tile,
            )
    lead = x.shape[:-1]
    return y.view(*lead, N), s.view(*lead, R)
