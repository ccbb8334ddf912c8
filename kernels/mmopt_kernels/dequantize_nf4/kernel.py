"""Triton kernel of NF4 dequantization, and its launcher."""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton
from mmopt_kernels.quantized import NESTED_BLOCKSIZE


@triton.jit
def block_scale(
    p_absmax,
    p_nested_absmax,
    p_nested_code,
    p_offset,
    o_block,
    m_block,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """Absmax of quantization blocks in float32, dequantized itself where it is nested."""
    b_absmax = tl.load(p_absmax + o_block, mask=m_block, other=0)
    if NESTED:
        b_value = tl.load(p_nested_code + b_absmax.to(tl.int32), mask=m_block, other=0.0)
        b_outer = tl.load(p_nested_absmax + o_block // NESTED_BLOCKSIZE, mask=m_block, other=0.0)
        b_absmax = b_value * b_outer + tl.load(p_offset)
    return b_absmax


@triton.jit
def dequantize_nf4(
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_offset,
    p_out,
    n_values,
    n_bytes,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK values of the flattened weight: read once in 4 bits, written once.

    Bytes moved for each value: 1/2 read, those of the output written, and for its share of a block
    of 64 4/64 of absmax, or (1 + 4/256)/64 where that is nested; the tables stay in the cache. In
    bfloat16 2.56 bytes, or 2.52 nested. To dequantize absmax first, as bitsandbytes does, would
    write and read another 8/64 and launch twice more.
    """
    i_block = tl.program_id(0).to(tl.int64)
    # Blocks are a power of two at least 32 long, so that each begins on a byte of its own; one
    # program takes whole blocks, and its first value is even.
    o_group = i_block * (BLOCK // BLOCKSIZE) + tl.arange(0, BLOCK // BLOCKSIZE)
    m_group = o_group * BLOCKSIZE < n_values
    # [BLOCK // BLOCKSIZE]
    b_scale = block_scale(
        p_absmax,
        p_nested_absmax,
        p_nested_code,
        p_offset,
        o_group,
        m_group,
        NESTED,
        NESTED_BLOCKSIZE,
    )
    o_byte = o_group[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    # [BLOCK // BLOCKSIZE, BLOCKSIZE // 2]
    b_packed = tl.load(p_packed + o_byte, mask=o_byte < n_bytes, other=0).to(tl.int32)
    # The table is one line of the cache, where each lane picks its value: cheaper than to choose
    # among 16 constants with 15 selections.
    b_high = tl.load(p_code + (b_packed >> 4)) * b_scale[:, None]
    b_low = tl.load(p_code + (b_packed & 15)) * b_scale[:, None]
    # [BLOCK // BLOCKSIZE, BLOCKSIZE]
    b_out = tl.interleave(b_high, b_low)
    o_out = o_group[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=o_out < n_values)


# Values of a program of 4 warps: 16 packed bytes for each thread, the widest load there is. Not yet
# from a clock.
BLOCK = 4096
WARPS = 4


def launch(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(N, K, dtype=dtype)
    grid = (_triton.cdiv(N * K, BLOCK),)
    if out.numel():
        with torch.cuda.device_of(packed):  # type: ignore[no-untyped-call]
            dequantize_nf4[grid](
                packed.contiguous(),
                absmax.contiguous(),
                code.contiguous(),
                None if nested_absmax is None else nested_absmax.contiguous(),
                None if nested_code is None else nested_code.contiguous(),
                offset,
                out,
                N * K,
                packed.numel(),
                BLOCKSIZE=blocksize,
                NESTED=nested_absmax is not None,
                NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
                BLOCK=BLOCK,
                num_warps=WARPS,
                # A product and a sum are rounded each, as bitsandbytes and PyTorch do it.
                enable_fp_fusion=False,
            )
    return out
