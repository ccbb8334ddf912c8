"""Triton kernel of dropout, its launcher, and the mask that the LoRA kernels draw as well."""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton
from mmopt_kernels._philox import dropout_scales


@triton.jit
def kept(seed, o_m, i_k, threshold, BLOCK_K: tl.constexpr):
    """Which columns from i_k on of the rows o_m dropout keeps: [BLOCK_M, BLOCK_K].

    Column k of row m takes word k % 4 for the counter (k // 4, low and high 32 bits of m, 1): no
    tile size enters, so every pass recomputes the same mask. Four columns share a draw, which is
    most of dropout's cost. o_m is int64, i_k int32 and a multiple of 4; threshold is the bit
    pattern of an unsigned number.
    """
    b_least = threshold.to(tl.uint32, bitcast=True)
    o_4 = i_k // 4 + tl.arange(0, BLOCK_K // 4)
    o_low = o_m.to(tl.int32)
    o_high = (o_m >> 32).to(tl.int32)
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_4[None, :], o_low[:, None], o_high[:, None], 1)
    # [.., .., 2, 2]: the last axes count 0, 1, 2, 3.
    b_x = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)).reshape(o_m.shape[0], BLOCK_K)
    return b_x >= b_least


# M changes from batch to batch; specializing on it would recompile.
@triton.jit(do_not_specialize=["M", "threshold"])
def dropout_forward(
    p_x,
    p_seed,
    p_y,
    stride_xm,
    M,
    K,
    scale_kept,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_K] tile. Moves x once in and y once out: 2 M K elements."""
    n_k = tl.cdiv(K, BLOCK_K)
    i_m = (tl.program_id(0) // n_k).to(tl.int64)
    i_k = tl.program_id(0) % n_k * BLOCK_K
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k + tl.arange(0, BLOCK_K)
    m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
    # [BLOCK_M, BLOCK_K]
    b_x = tl.load(p_x + o_m[:, None] * stride_xm + o_k[None, :], mask=m_x, other=0.0)
    m_kept = kept(tl.load(p_seed), o_m, i_k, threshold, BLOCK_K)
    b_y = tl.where(m_kept, b_x.to(tl.float32) * scale_kept, 0.0)
    p_yt = p_y + o_m[:, None] * K + o_k[None, :]
    tl.store(p_yt, b_y.to(p_y.dtype.element_ty), mask=m_x)


# 4096 elements for 128 threads: each draws 8 times four words, which hides the loads.
BLOCK_M, BLOCK_K, WARPS = 8, 512, 4


def launch(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """``[M, K]``, contiguous."""
    x = x if x.stride(1) == 1 else x.contiguous()
    M, K = x.shape
    y = x.new_empty(M, K)
    if y.numel():
        threshold, scale_kept = dropout_scales(dropout_p)
        block_k = min(BLOCK_K, max(16, _triton.next_power_of_2(K)))
        block_m = BLOCK_M * BLOCK_K // block_k
        grid = (_triton.cdiv(M, block_m) * _triton.cdiv(K, block_k),)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            dropout_forward[grid](
                x,
                seed,
                y,
                x.stride(0),
                M,
                K,
                scale_kept,
                threshold,
                BLOCK_M=block_m,
                BLOCK_K=block_k,
                num_warps=WARPS,
            )
    return y
