"""Triton kernels of the LoRA linear layer's forward, their launchers, and what backward shares.

`down` multiplies the activations by the adapter's first factor and `up` adds the second to the
layer itself. All sums are in float32 and in an order that only sizes and tiles decide: where
several programs share one, each writes its part and `lora_linear_reduce` adds the parts.

Sizes that change from batch to batch are not specialized on: one compiled kernel serves them all.
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
from mmopt_kernels._descriptors import describable, descriptor, has_tma
from mmopt_kernels._philox import dropout_scales
from mmopt_kernels._vectors import stride_of, vector_of
from mmopt_kernels.dropout.kernel import kept

# Programs that occupy every multiprocessor of a large GPU (132 of an H200) twice. The same on every
# GPU, so that sums are split alike and give the same bits.
PROGRAMS = 264
# Ranks that one program multiplies at once; more are looped over or spread on the grid.
MOST_RANKS = 64
# In 16 bits as many as fit the accumulator of `lora_linear_down`, so that x is read once.
MOST_RANKS_DOWN = 256
# Results of a program of `lora_linear_reduce`: those of 4096 x 16 make 256 programs.
REDUCED = 256


@triton.jit
def own(b_s, p_index, p_owner, o_m, o_r, M, R):
    """b_s, with zeros where the column o_r belongs to another adapter than the row o_m."""
    b_index = tl.load(p_index + o_m, mask=o_m < M, other=-1).to(tl.int32)
    b_owner = tl.load(p_owner + o_r, mask=o_r < R, other=-2)
    return tl.where(b_index == b_owner, b_s, 0.0)


@triton.jit(do_not_specialize=["M", "SPLITS"])
def lora_linear_reduce(
    p_parts,
    p_index,
    p_owner,
    p_out,
    stride_om,
    M,
    R,
    SPLITS,
    scale,
    OWN: tl.constexpr,
    ADD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Out [M, R] is, or with ADD grows by, scale times the sum of parts [SPLITS, M, R].

    Reads every part and writes out once: 4 (SPLITS + 1) M R bytes in float32. BLOCK_S parts are
    loaded at once, because one after the other would wait for memory as often as there are parts.
    """
    R = R * VECTOR
    stride_om = stride_of(stride_om, VECTOR)
    # To int64 before it is multiplied: SPLITS M R may pass 2**31.
    size = tl.cast(M, tl.int64) * R
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_o = o < size
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_s in range(0, SPLITS, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S).to(tl.int64)
        # [BLOCK_S, BLOCK]
        p_part = p_parts + o_s[:, None] * size + o[None, :]
        b_part = tl.load(p_part, mask=(o_s < SPLITS)[:, None] & m_o[None, :], other=0.0)
        b_sum += tl.sum(b_part, 0)
    b_sum = b_sum * scale
    o_m = o // R
    o_r = o % R
    if OWN:
        b_sum = own(b_sum, p_index, p_owner, o_m, o_r, M, R)
    p_ot = p_out + o_m * stride_om + o_r
    if ADD:
        b_sum += tl.load(p_ot, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_ot, b_sum.to(p_out.dtype.element_ty), mask=m_o)


@triton.jit
def store_or_part(
    b_s,
    p_s,
    p_index,
    p_owner,
    stride_sm,
    o_m,
    o_r,
    i_split,
    M,
    R,
    scale,
    PARTS: tl.constexpr,
    OWN: tl.constexpr,
):
    """Write a tile of s, or with PARTS the split's share of it for `lora_linear_reduce`."""
    m_s = (o_m < M)[:, None] & (o_r < R)[None, :]
    if PARTS:
        p_st = p_s + (i_split.to(tl.int64) * M + o_m)[:, None] * R + o_r[None, :]
    else:
        b_s = b_s * scale
        if OWN:
            b_s = own(b_s, p_index, p_owner, o_m[:, None], o_r[None, :], M, R)
        p_st = p_s + o_m[:, None] * stride_sm + o_r[None, :]
    tl.store(p_st, b_s.to(p_s.dtype.element_ty), mask=m_s)


@triton.jit(do_not_specialize=["M", "SPLITS", "threshold"])
def lora_linear_down(
    p_x,
    p_a,
    p_seed,
    p_index,
    p_owner,
    p_s,
    stride_xm,
    stride_ar,
    stride_sm,
    M,
    K,
    R,
    SPLITS,
    scale_kept,
    threshold,
    DROPOUT: tl.constexpr,
    OWN: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] of s = dropout(x) aᵀ over one split of K.

    One read of x for each BLOCK_R of the ranks: M K elements. s is written once: M R. The factor is
    read by every row of tiles, K R elements for BLOCK_M rows, from L2. Dropout costs no bytes,
    where the library reads x, writes dropout(x) and reads that; what it costs is a draw of 67
    integer instructions for four elements (in Triton 3.7.1's code for sm_90).
    """
    R = R * VECTOR
    stride_sm = stride_of(stride_sm, VECTOR)
    n_m = tl.cdiv(M, BLOCK_M)
    i_m = tl.program_id(0) % n_m
    i_split = tl.program_id(0) // n_m % SPLITS
    i_r = tl.program_id(0) // n_m // SPLITS
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R
    seed = tl.load(p_seed) if DROPOUT else 0
    width = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    b_s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for i_k in range(i_split * width, tl.minimum((i_split + 1) * width, K), BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_R]
        p_xt = p_x + o_m[:, None] * stride_xm + o_k[None, :]
        p_at = p_a + o_r[None, :] * stride_ar + o_k[:, None]
        b_x = tl.load(p_xt, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_at, mask=m_k[:, None] & m_r[None, :], other=0.0)
        if DROPOUT:
            b_x = tl.where(kept(seed, o_m, i_k, threshold, BLOCK_K), b_x, 0.0)
        if WIDEN:
            b_x = b_x.to(tl.float32)
            b_a = b_a.to(tl.float32)
        b_s = tl.dot(b_x, b_a, b_s, input_precision=PRECISION)
    # fmt: off
    store_or_part(
        b_s, p_s, p_index, p_owner, stride_sm, o_m, o_r, i_split, M, R, scale_kept, PARTS, OWN,
    )
    # fmt: on


@triton.jit(do_not_specialize=["M"])
def lora_linear_forward(
    p_x,
    p_w,
    p_s,
    p_b,
    p_bias,
    p_y,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_bn,
    stride_ym,
    M,
    N,
    K,
    R,
    scale,
    BIAS: tl.constexpr,
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
    """One [BLOCK_M, BLOCK_N] tile of y = x wᵀ + bias + scale s bᵀ.

    A GEMM's traffic, M K + N K + M N elements when the tiles of a group meet in L2, and M R + N R
    for the adapter: y is written once and never read, where addmm_ reads and writes it again. With
    TMA x, w and y are descriptors. b is rounded here: a launch less, for a tile of it a program.
    """
    R = R * VECTOR
    stride_sm = stride_of(stride_sm, VECTOR)
    stride_bn = stride_of(stride_bn, VECTOR)
    i_m, i_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    DTYPE: tl.constexpr = p_y.dtype if TMA else p_y.dtype.element_ty

    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The adapter goes first, so that the scale touches its product alone. Nothing is prefetched:
    # few have more than one block of ranks, and the memory for it would be the large sum's.
    for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        # [BLOCK_M, BLOCK_R] and [BLOCK_R, BLOCK_N]
        p_st = p_s + o_m[:, None] * stride_sm + o_r[None, :]
        p_bt = p_b + o_n[None, :] * stride_bn + o_r[:, None]
        b_s = tl.load(p_st, mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_b = tl.load(p_bt, mask=m_r[:, None] & m_n[None, :], other=0.0).to(DTYPE)
        if WIDEN:
            b_s = b_s.to(tl.float32)
            b_b = b_b.to(tl.float32)
        b_acc = tl.dot(b_s, b_b, b_acc, input_precision=PRECISION)
    b_acc = b_acc * scale
    for i_k in range(0, K, BLOCK_K):
        # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
        if TMA:
            b_x = p_x.load([i_m * BLOCK_M, i_k])
            b_w = tl.trans(p_w.load([i_n * BLOCK_N, i_k]))
        else:
            o_k = i_k + tl.arange(0, BLOCK_K).to(tl.int64)
            m_k = o_k < K
            p_xt = p_x + o_m[:, None] * stride_xm + o_k[None, :]
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
    if TMA:
        p_y.store([i_m * BLOCK_M, i_n * BLOCK_N], b_acc.to(DTYPE))
    else:
        p_yt = p_y + o_m[:, None] * stride_ym + o_n[None, :]
        tl.store(p_yt, b_acc.to(DTYPE), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def grouped_tile(i, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of the i-th tile: GROUP_M rows share columns while those are in L2."""
    n_m = tl.cdiv(M, BLOCK_M)
    n_n = tl.cdiv(N, BLOCK_N)
    i_group = i // (GROUP_M * n_n)
    n_rows = tl.minimum(n_m - i_group * GROUP_M, GROUP_M)
    i_m = i_group * GROUP_M + i % (GROUP_M * n_n) % n_rows
    return i_m, i % (GROUP_M * n_n) // n_rows


def config(dtype: torch.dtype, M: int, backward: bool = False) -> tuning.Config:
    """Tile, warps and pipeline stages of the large products: y is N wide, and dx K.

    Chosen from what ptxas reports for sm_80 and sm_90, not yet from a clock: no spills, and at most
    the 96 KiB of shared memory that leave room in the 99 KiB that every target from sm_80 on gives
    a block (64 KiB, all there is, on gfx942).
    """
    if dtype == torch.float32:
        # The mask of dx takes registers.
        warps = 8 if backward else 4
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": warps, "num_stages": 2}
    elif M <= 64:
        tile = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    else:
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    if backward:
        tile["BLOCK_N"], tile["BLOCK_K"] = tile["BLOCK_K"], tile["BLOCK_N"]
    return tile | {"GROUP_M": 8, "TMA": False}


def config_down(dtype: torch.dtype, M: int, width: int) -> tuning.Config:
    """Of `lora_linear_down`; chosen like `config`."""
    if dtype == torch.float32:
        warps = 4 if width <= 16 else 8
        return {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": warps, "num_stages": 3}
    if M <= 64:
        return {"BLOCK_M": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    if width <= 64:
        return {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}


def block_r(R: int, most: int = MOST_RANKS) -> int:
    """The ranks that a program holds: a power of two, and 16 or more for tl.dot."""
    return min(most, max(16, _triton.next_power_of_2(R)))


def block_r_down(R: int, dtype: torch.dtype) -> int:
    """Of the kernels that read x: the more ranks, the fewer reads."""
    return block_r(R, MOST_RANKS if dtype == torch.float32 else MOST_RANKS_DOWN)


def splits(programs: int, blocks: int) -> int:
    """Over how many programs to share a sum of that many blocks: at least two blocks for each."""
    return max(1, min(PROGRAMS // max(programs, 1), blocks // 2))


def unit_rows(x: Tensor) -> Tensor:
    """``[M, K]`` whose rows are contiguous, as the kernels read them; mostly x itself."""
    return x if x.stride(1) == 1 else x.contiguous()


def factor(a: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter's factor where programs read much of it: rounded once, rather than by each."""
    return unit_rows(a.to(dtype))


def shipped_tile(
    kernel: str, x: Tensor, width: int, M: int, dropout: bool = False, tma: bool = False
) -> tuning.Config | None:
    """What the tables have for a launch on x; None leaves it to the heuristic beside the kernel."""
    features = ("dropout",) if dropout else ()
    return tuning.lookup(kernel, _triton.target(x.device), x.dtype, width, M, features, tma)


def allows_tma(*tensors: Tensor) -> bool:
    """This GPU has TMA, and descriptors can describe all of these."""
    return has_tma(_triton.target(tensors[0].device)) and describable(*tensors)


def described(x: Tensor, tile: tuning.Config, rows: str, columns: str) -> Tensor | TensorDescriptor:
    """x ``[M, N]`` as the kernels take it: with TMA a descriptor, by tile[rows] x tile[columns]."""
    return descriptor(x, [tile[rows], tile[columns]]) if tile["TMA"] else x


def raw_factor(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor that the kernel itself rounds to dtype.

    But for Triton's interpreter, which rounds to bfloat16 towards zero.
    """
    return factor(a, dtype) if _triton.must_widen(dtype) else unit_rows(a)


def operands(dtype: torch.dtype) -> dict[str, object]:
    """How every kernel here multiplies."""
    return {"WIDEN": _triton.must_widen(dtype), "PRECISION": _triton.dot_precision()}


def reduce(
    parts: Tensor,
    out: Tensor,
    scale: float,
    adapter_index: Tensor | None = None,
    owner: Tensor | None = None,
    add: bool = False,
) -> None:
    """Out ``[M, R]`` from float32 parts ``[splits, M, R]``, for the kernels that made them."""
    number, M, R = parts.shape
    vector = vector_of(R, out.stride(0))
    lora_linear_reduce[(_triton.cdiv(M * R, REDUCED),)](
        parts,
        adapter_index,
        owner,
        out,
        out.stride(0) // vector,
        M,
        R // vector,
        number,
        scale,
        OWN=owner is not None,
        ADD=add,
        VECTOR=vector,
        BLOCK=REDUCED,
        BLOCK_S=8,
        num_warps=4,
    )


def down(
    x: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    adapter_index: Tensor | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    """s = dropout(x) aᵀ, ``[M, R]`` in the dtype of x.

    Args:
        x: ``[M, K]``.
        a: ``[R, K]``, any floating dtype, rounded to that of x.
        seed: int64, one element; read only where dropout_p > 0.
        dropout_p: of the mask that `mmopt_kernels.dropout` draws.
        adapter_index: ``[M]`` integers, with owner; s is 0 where the row's differs from the
            column's.
        owner: int32 ``[R]``, which adapter each column belongs to.
    """
    x, a = unit_rows(x), factor(a, x.dtype)
    (M, K), R = x.shape, a.shape[0]
    s = x.new_empty(M, R)
    if s.numel() == 0:
        return s
    width, dropout = block_r_down(R, x.dtype), dropout_p > 0
    tile = shipped_tile("lora_linear_down", x, width, M, dropout) or config_down(x.dtype, M, width)
    threshold, scale_kept = dropout_scales(dropout_p)
    programs = _triton.cdiv(M, tile["BLOCK_M"]) * _triton.cdiv(R, width)
    number = splits(programs, _triton.cdiv(K, tile["BLOCK_K"]))
    parts = x.new_empty(number, M, R, dtype=torch.float32) if number > 1 else None
    out = s if parts is None else parts
    vector = vector_of(R)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        lora_linear_down[(programs * number,)](
            x,
            a,
            seed,
            adapter_index,
            owner,
            out,
            x.stride(0),
            a.stride(0),
            R // vector,
            M,
            K,
            R // vector,
            number,
            scale_kept,
            threshold,
            DROPOUT=dropout,
            OWN=owner is not None,
            PARTS=number > 1,
            VECTOR=vector,
            BLOCK_R=width,
            **operands(x.dtype),
            **tile,
        )
        if parts is not None:
            reduce(parts, s, scale_kept, adapter_index, owner)
    return s


def up(
    x: Tensor, weight: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """y = x weightᵀ + bias + scale s bᵀ, ``[M, N]``; weight may be stored in any order."""
    x, s, b = unit_rows(x), unit_rows(s), raw_factor(b, x.dtype)
    # The kernel walks it by one element. A part of a fused layer's may be strided, or expanded.
    bias = None if bias is None else bias.contiguous()
    (M, K), N, R = x.shape, weight.shape[0], b.shape[1]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    width, tma = block_r(R), allows_tma(x, weight, y)
    tile = shipped_tile("lora_linear_forward", x, width, M, tma=tma) or config(x.dtype, M)
    grid = (_triton.cdiv(M, tile["BLOCK_M"]) * _triton.cdiv(N, tile["BLOCK_N"]),)
    vector = vector_of(R, s.stride(0), b.stride(0))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        lora_linear_forward[grid](
            described(x, tile, "BLOCK_M", "BLOCK_K"),
            described(weight, tile, "BLOCK_N", "BLOCK_K"),
            s,
            b,
            bias,
            described(y, tile, "BLOCK_M", "BLOCK_N"),
            x.stride(0),
            *weight.stride(),
            s.stride(0) // vector,
            b.stride(0) // vector,
            y.stride(0),
            M,
            N,
            K,
            R // vector,
            scale,
            BIAS=bias is not None,
            VECTOR=vector,
            BLOCK_R=width,
            **operands(x.dtype),
            **tile,
        )
    return y
