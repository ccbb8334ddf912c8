"""Triton kernel of the LoRA linear layer over an NF4 base, for few rows, and its launcher.

With many rows the dense weight is worth making: dequantized once, it serves all of them, and the
vendor's GEMM multiplies it. With at most 64 the time goes into reading the weight, and here that is
a quarter of what it is in 16 bits.
"""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton, tuning
from mmopt_kernels._vectors import stride_of, vector_of
from mmopt_kernels.dequantize_nf4.kernel import block_scale
from mmopt_kernels.lora_linear.kernel import block_r, operands, reduce, unit_rows
from mmopt_kernels.quantized import NESTED_BLOCKSIZE, NF4Weight, flatten

MOST_ROWS = 64
# Four for each of an H100's 132 multiprocessors, 16 warps to hide latency with. The same on every
# GPU, so that sums are split alike and give the same bits.
PROGRAMS = 528


@triton.jit
def load_tile(
    p_packed,
    p_absmax,
    p_nested_absmax,
    p_nested_code,
    p_offset,
    o_n,
    i_k,
    end,
    n_words,
    N,
    K,
    BLOCK_K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What [rows of o_n, BLOCK_K] of the weight is made of: packed values and scales.

    With WORDS 8 values to an int32, otherwise each in a byte of its own; with ALIGNED a scale for
    each block, otherwise one for each word or value. What is masked is finite.
    """
    # The tile after a split's last is another program's to read.
    m_n = ((o_n < N) & (i_k < end))[:, None]
    # 64 bits for the rows, 32 within them.
    o_row = o_n * K
    if WORDS:
        # No word crosses a block: both begin on a multiple of 8 values.
        o_word = i_k // 8 + tl.arange(0, BLOCK_K // 8)
        o_k = o_word * 8
        p_words = (p_packed + o_n * n_words)[:, None] + o_word[None, :]
        b_packed = tl.load(p_words, mask=m_n & (o_word < n_words)[None, :], other=0)
    else:
        # A row begins with the high or the low half of a byte.
        o_k = i_k + tl.arange(0, BLOCK_K)
        o_half = (o_row % 2).to(tl.int32)[:, None] + o_k[None, :]
        p_bytes = (p_packed + o_row // 2)[:, None] + o_half // 2
        b_packed = tl.load(p_bytes, mask=m_n & (o_k < K)[None, :], other=0)
        b_packed = b_packed.to(tl.int32) >> (1 - o_half % 2) * 4
    if ALIGNED:
        o_scale = tl.arange(0, max(BLOCK_K // BLOCKSIZE, 1))
        o_block = ((o_row + i_k) // BLOCKSIZE)[:, None] + o_scale[None, :]
        m_block = m_n & (i_k + o_scale * BLOCKSIZE < K)[None, :]
    else:
        o_block = (o_row % BLOCKSIZE).to(tl.int32)[:, None] + o_k[None, :]
        o_block = (o_row // BLOCKSIZE)[:, None] + o_block // BLOCKSIZE
        m_block = m_n & (o_k < K)[None, :]
    b_scale = block_scale(
        p_absmax,
        p_nested_absmax,
        p_nested_code,
        p_offset,
        o_block,
        m_block,
        NESTED,
        NESTED_BLOCKSIZE,
    )
    return b_packed, b_scale


@triton.jit
def looked_up(p_code, b_packed, b_scale, dtype: tl.constexpr):
    """Values of the lowest nibbles, rounded as `dequantize_nf4` rounds."""
    return (tl.load(p_code + (b_packed & 15)) * b_scale).to(dtype)


@triton.jit
def dequantized(
    b_packed, b_scale, p_code, dtype: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr
):
    """The tile of the weight, from what `load_tile` loaded."""
    if ALIGNED:
        n_rows: tl.constexpr = b_packed.shape[0]
        n_scales: tl.constexpr = b_scale.shape[1]
        length: tl.constexpr = b_packed.shape[1] // n_scales
        b_scale = tl.broadcast_to(b_scale[:, :, None], n_rows, n_scales, length)
        b_scale = tl.reshape(b_scale, n_rows, n_scales * length)
    if WORDS:
        # Bytes are in little-endian order, and in each the high nibble comes first. Looked up in
        # the layout of the words: interleaved first, the addresses of all values would be
        # rearranged in shared memory.
        b_0 = looked_up(p_code, b_packed >> 4, b_scale, dtype)
        b_1 = looked_up(p_code, b_packed, b_scale, dtype)
        b_2 = looked_up(p_code, b_packed >> 12, b_scale, dtype)
        b_3 = looked_up(p_code, b_packed >> 8, b_scale, dtype)
        b_4 = looked_up(p_code, b_packed >> 20, b_scale, dtype)
        b_5 = looked_up(p_code, b_packed >> 16, b_scale, dtype)
        b_6 = looked_up(p_code, b_packed >> 28, b_scale, dtype)
        b_7 = looked_up(p_code, b_packed >> 24, b_scale, dtype)
        b_even = tl.interleave(tl.interleave(b_0, b_4), tl.interleave(b_2, b_6))
        b_odd = tl.interleave(tl.interleave(b_1, b_5), tl.interleave(b_3, b_7))
        b_w = tl.interleave(b_even, b_odd)
    else:
        b_w = looked_up(p_code, b_packed, b_scale, dtype)
    return b_w


# M changes from batch to batch; specializing on it would recompile.
@triton.jit(do_not_specialize=["M", "SPLITS"])
def lora_linear_nf4(
    p_x,
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_offset,
    p_s,
    p_b,
    p_bias,
    p_y,
    stride_xm,
    n_words,
    stride_sm,
    stride_bn,
    stride_ym,
    M,
    N,
    K,
    R,
    SPLITS,
    scale,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N columns of y = x wᵀ + bias + scale s bᵀ over one split of K, all rows at once.

    The floor is one read of the weight, N K (1/2 + 4/64) bytes with a float32 absmax for each 64
    values and N K (1/2 + 1/64 + 4/16384) with a nested one: 9.4 MB and 8.7 MB for 4096 by 4096,
    2.8 us and 2.6 us at an H100's 3.35 TB/s. Every byte of it is read by one program. Besides: x
    by each program, from L2; N R for b; y once. Splits add 8 M N bytes each for their parts,
    written and read again, which the launcher keeps below the weight's and mostly meet in L2.

    The tile is held transposed, [BLOCK_N, BLOCK_M]: matrix instructions take 64 rows or more, and
    the weight has them; and the weight, which is made in registers, may stay there as their first
    operand.
    """
    R = R * VECTOR
    stride_sm = stride_of(stride_sm, VECTOR)
    stride_bn = stride_of(stride_bn, VECTOR)
    n_n = tl.cdiv(N, BLOCK_N)
    i_n = tl.program_id(0) % n_n
    i_split = tl.program_id(0) // n_n
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < M
    m_n = o_n < N

    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if i_split == 0:
        for i_r in range(0, R, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < R
            # [BLOCK_N, BLOCK_R] and [BLOCK_R, BLOCK_M]
            p_bt = p_b + o_n[:, None] * stride_bn + o_r[None, :]
            p_st = p_s + o_m[None, :] * stride_sm + o_r[:, None]
            b_b = tl.load(p_bt, mask=m_n[:, None] & m_r[None, :], other=0.0)
            b_s = tl.load(p_st, mask=m_r[:, None] & m_m[None, :], other=0.0)
            b_b = b_b.to(b_s.dtype)
            if WIDEN:
                b_b = b_b.to(tl.float32)
                b_s = b_s.to(tl.float32)
            b_acc = tl.dot(b_b, b_s, b_acc, input_precision=PRECISION)
        b_acc = b_acc * scale
        if BIAS:
            b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    width = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start = i_split * width
    end = tl.minimum(start + width, K)
    # fmt: off
    b_packed, b_scale = load_tile(
        p_packed, p_absmax, p_nested_absmax, p_nested_code, p_offset, o_n, start, end,
        n_words, N, K, BLOCK_K, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, WORDS, ALIGNED,
    )
    # fmt: on
    for i_k in range(start, end, BLOCK_K):
        # [BLOCK_K, BLOCK_M]
        o_k = i_k + tl.arange(0, BLOCK_K)
        p_xt = p_x + o_m[None, :] * stride_xm + o_k[:, None]
        b_x = tl.load(p_xt, mask=(o_k < K)[:, None] & m_m[None, :], other=0.0)
        # The next tile is on its way while this one is multiplied. Triton's own pipeline would
        # take the look-up of each value for a load to prefetch, and copy it to shared memory.
        # fmt: off
        b_packed_next, b_scale_next = load_tile(
            p_packed, p_absmax, p_nested_absmax, p_nested_code, p_offset, o_n, i_k + BLOCK_K,
            end, n_words, N, K, BLOCK_K, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, WORDS, ALIGNED,
        )
        # fmt: on
        # [BLOCK_N, BLOCK_K]
        b_w = dequantized(b_packed, b_scale, p_code, b_x.dtype, WORDS, ALIGNED)
        if WIDEN:
            b_w = b_w.to(tl.float32)
            b_x = b_x.to(tl.float32)
        b_acc = tl.dot(b_w, b_x, b_acc, input_precision=PRECISION)
        b_packed, b_scale = b_packed_next, b_scale_next
    m_y = m_n[:, None] & m_m[None, :]
    if PARTS:
        p_y += i_split.to(tl.int64) * M * N
    # [BLOCK_N, BLOCK_M]
    p_yt = p_y + o_m.to(tl.int64)[None, :] * stride_ym + o_n[:, None]
    tl.store(p_yt, b_acc.to(p_y.dtype.element_ty), mask=m_y)


def config(dtype: torch.dtype, words: bool, aligned: bool) -> tuning.Config:
    """Tile and warps.

    Chosen from what ptxas reports, not yet from a clock: no spills at 64 rows and, for aligned
    words and rank 16, registers for four programs on a multiprocessor of an H100. What is not
    aligned needs more addresses for each value.
    """
    if not words:
        width = 16
    elif dtype == torch.float32 or not aligned:
        width = 32
    else:
        width = 128
    # Of 64 rows, Triton 3.7.1 multiplies float32 on sm_100 in TF32, whatever precision is asked.
    height = 32 if dtype == torch.float32 else 64
    return {"BLOCK_N": height, "BLOCK_K": width, "num_warps": 4}


def up_nf4(
    x: Tensor, weight: NF4Weight, s: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """y = x dequantize(weight)ᵀ + bias + scale s bᵀ, ``[M, N]`` in the dtype of x.

    The dense weight is nowhere. Sums are in float32, in an order that only sizes decide.

    Args:
        x: ``[M, K]``, M up to 64.
        weight: of shape ``(N, K)``, its parts checked.
        s: ``[M, R]``, dtype of x.
        b: ``[N, R]``, any floating dtype, rounded to that of x.
        bias: ``[N]`` or None.
    """
    x, s, b = unit_rows(x), unit_rows(s), unit_rows(b)
    bias = None if bias is None else bias.contiguous()
    (M, K), N, R = x.shape, weight.shape[0], b.shape[1]
    assert M <= MOST_ROWS, "the launcher's caller dequantizes for more rows"
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    # Rows may be as far apart as the last tokens of long sequences are. To copy the few there are
    # costs less than offsets of 64 bits, which take registers that a fourth program needs.
    x, s = (t.contiguous() if M * t.stride(0) >= 2**31 else t for t in (x, s))
    flat, (absmax, code, *nested), _ = flatten(weight)
    nested_absmax, nested_code, offset = nested or (None, None, None)
    packed = flat.contiguous()
    rows = max(16, _triton.next_power_of_2(M))
    target = _triton.target(x.device)
    # A row begins on 4 bytes, as every weight of a model does.
    words = K % 8 == 0 and packed.storage_offset() % 4 == 0 and packed.data_ptr() % 4 == 0
    aligned = K % weight.blocksize == 0
    # An entry is for aligned words; others need more registers.
    plain = words and aligned
    entry = tuning.lookup("lora_linear_nf4", target, x.dtype, rows, N) if plain else None
    tile = entry or config(x.dtype, words, aligned)
    # Rows and tiles of K begin with a block, or lie within one.
    aligned = K % min(weight.blocksize, tile["BLOCK_K"]) == 0
    programs = _triton.cdiv(N, tile["BLOCK_N"])
    # At least two tiles for each, and no more parts than weigh as much as the weight.
    number = min(PROGRAMS // programs, _triton.cdiv(K, tile["BLOCK_K"]) // 2, K // (16 * M))
    number = max(1, number)
    parts = x.new_empty(number, M, N, dtype=torch.float32) if number > 1 else None
    out = y if parts is None else parts
    vector = vector_of(R, s.stride(0), b.stride(0))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        lora_linear_nf4[(programs * number,)](
            x,
            packed.view(torch.int32) if words else packed,
            absmax.contiguous(),
            code.contiguous(),
            None if nested_absmax is None else nested_absmax.contiguous(),
            None if nested_code is None else nested_code.contiguous(),
            offset,
            s,
            b,
            bias,
            out,
            x.stride(0),
            K // 8,
            s.stride(0) // vector,
            b.stride(0) // vector,
            N,
            M,
            N,
            K,
            R // vector,
            number,
            scale,
            BIAS=bias is not None,
            PARTS=parts is not None,
            BLOCKSIZE=weight.blocksize,
            NESTED=bool(nested),
            NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
            WORDS=words,
            ALIGNED=aligned,
            VECTOR=vector,
            BLOCK_M=rows,
            BLOCK_R=block_r(R),
            num_stages=1,
            **operands(x.dtype),
            **tile,
        )
        if parts is not None:
            reduce(parts, y, 1.0)
    return y
