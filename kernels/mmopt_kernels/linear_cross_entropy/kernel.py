"""Triton kernel that replaces logits by their gradient, and its launcher."""

# Triton infers what a kernel's arguments are at launch; their names say it to the reader.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmopt_kernels import _triton, tuning
from mmopt_kernels.linear_cross_entropy.chunked import Options


@triton.jit
def capped(b_x, softcap):
    """softcap * tanh(b_x / softcap), as 2 sigmoid(2 z) - 1, which no large z overflows."""
    return softcap * (2.0 * tl.sigmoid(2.0 * (b_x / softcap)) - 1.0)


@triton.jit
def gradient(
    b_x, o_v, y, w, lse, V, softcap, smoothing, z_loss, SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
):  # fmt: skip
    """That of ``w * loss`` with respect to the logits b_x, the columns o_v of their row."""
    if SOFTCAP:
        b_x = capped(b_x, softcap)
    b_d = tl.exp(b_x - lse) * (1.0 + 2.0 * z_loss * lse) - tl.where(o_v == y, 1.0 - smoothing, 0.0)
    if SMOOTHING:
        b_d -= smoothing / V
    if SOFTCAP:
        b_x = b_x / softcap
        b_d *= 1.0 - b_x * b_x
    return b_d * w


@triton.jit
def cross_entropy(
    p_x,
    p_y,
    p_w,
    p_loss,
    p_lse,
    stride_xm,
    V,
    room,
    ignore_index,
    softcap,
    smoothing,
    z_loss,
    ROOM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: its loss and log-sum-exp; with GRADIENT its logits are replaced by their gradient.

    Reads the row twice, the second time mostly from L2 (256 KiB for 128k logits of 16 bits), and
    writes it once. Without GRADIENT it reads it once and writes none of it.

    A row has room for `room` logits, V or more: with ROOM those beyond V are anything, before and
    after, so that what is moved begins and ends with whole vectors.
    """
    i_m = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_m * stride_xm
    y = tl.load(p_y + i_m).to(tl.int64)
    seen = y != ignore_index
    # A label out of range is reported elsewhere; here it must not be an address.
    y = tl.where(seen & (y >= 0) & (y < V), y, 0)

    # Sum of exp(x - m) and m, the largest so far, by lane; lanes meet after the loop.
    b_m = tl.full([BLOCK_V], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_V], tl.float32)
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_x = tl.load(p_row + o_v, mask=o_v < room, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            b_x = capped(b_x, softcap)
        if SOFTCAP or ROOM:
            b_x = tl.where(o_v < V, b_x, float("-inf"))
        if SMOOTHING:
            b_sum += tl.where(o_v < V, b_x, 0.0)
        b_new = tl.maximum(b_m, b_x)
        # Of a lane that has seen nothing but -inf the difference would be NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp(b_m - b_base) + tl.exp(b_x - b_base)
        b_m = b_new
    m = tl.max(b_m, 0)
    base = tl.where(m == float("-inf"), 0.0, m)
    lse = base + tl.log(tl.sum(b_l * tl.exp(b_m - base), 0))
    target = tl.load(p_row + y).to(tl.float32)
    if SOFTCAP:
        target = capped(target, softcap)
    loss = lse - (1.0 - smoothing) * target + z_loss * lse * lse
    if SMOOTHING:
        loss -= smoothing * tl.sum(b_sum, 0) / V
    tl.store(p_loss + i_m, tl.where(seen, loss, 0.0))
    tl.store(p_lse + i_m, tl.where(seen, lse, 0.0))

    if GRADIENT:
        # The label's logit has been read by every thread before any is overwritten.
        tl.debug_barrier()
        w = tl.load(p_w + i_m)
        for i_v in range(0, V, BLOCK_V):
            o_v = i_v + tl.arange(0, BLOCK_V)
            b_x = tl.load(p_row + o_v, mask=o_v < room, other=0.0).to(tl.float32)
            b_d = gradient(
                b_x, o_v, y, w, lse, V, softcap, smoothing, z_loss, SOFTCAP, SMOOTHING
            )  # fmt: skip
            # Not a product: a row that does not count may hold anything.
            b_d = tl.where(seen, b_d, 0.0)
            tl.store(p_row + o_v, b_d.to(p_x.dtype.element_ty), mask=o_v < room)


@triton.jit
def cross_entropy_columns(
    p_x,
    p_y,
    p_w,
    p_lse,
    stride_xm,
    first,
    room,
    V,
    ignore_index,
    softcap,
    smoothing,
    z_loss,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The logits of one row, its columns from `first` on, replaced by their gradient.

    The log-sum-exp of the whole row is known, so that each is read once and written once. A row has
    room for `room` of them, see `cross_entropy`; what is beyond them becomes anything.
    """
    i_m, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    y = tl.load(p_y + i_m).to(tl.int64)
    w, lse = tl.load(p_w + i_m), tl.load(p_lse + i_m)
    o_c = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    p_part = p_x + i_m * stride_xm + o_c
    b_x = tl.load(p_part, mask=o_c < room, other=0.0).to(tl.float32)
    b_d = gradient(
        b_x, first + o_c, y, w, lse, V, softcap, smoothing, z_loss, SOFTCAP, SMOOTHING
    )  # fmt: skip
    b_d = tl.where(y != ignore_index, b_d, 0.0)
    tl.store(p_part, b_d.to(p_x.dtype.element_ty), mask=o_c < room)


def config(target: str) -> tuning.Config:
    """Columns of a step, and warps.

    Chosen from what ptxas reports, not yet from a clock (issue 5 measures): 8 elements a thread, 16
    bytes of 16 bits; with 16 and every feature sm_80 spilled. Of the 256 rows of a chunk an H100
    runs two a multiprocessor: with 16 warps each these have 16 KiB in flight, about what 3.35 TB/s
    need at a latency of 600 ns. An AMD warp has twice the threads.
    """
    return {"BLOCK_V": 4096, "num_warps": 8 if target.startswith("gfx") else 16}


def launch(
    logits: Tensor, labels: Tensor, weights: Tensor | None, options: Options, room: int
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, float32 ``[M]``, both 0 for a row that does not count.

    With weights, logits ``[M, V]`` become their gradient. In memory each row has room for ``room``
    of them, V or more, and what follows its logits there may become anything.
    """
    M, V = logits.shape
    losses, lse = (logits.new_empty(M, dtype=torch.float32) for _ in range(2))
    if M:
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            cross_entropy[(M,)](
                logits,
                labels,
                weights,
                losses,
                lse,
                logits.stride(0),
                V,
                room,
                options.ignore_index,
                ROOM=room > V,
                **_features(options),
                GRADIENT=weights is not None,
                **_tile(logits),
            )
    return losses, lse


def launch_columns(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    lse: Tensor,
    options: Options,
    first: int,
    V: int,
    room: int,
) -> None:
    """Replace logits ``[M, C]``, the columns from ``first`` on of V, by their gradient.

    room: as of `launch`, C or more.
    """
    M, C = logits.shape
    if M:
        tile = _tile(logits)
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            cross_entropy_columns[(M, _triton.cdiv(C, tile["BLOCK_V"]))](
                logits,
                labels,
                weights,
                lse,
                logits.stride(0),
                first,
                room,
                V,
                options.ignore_index,
                **_features(options),
                **tile,
            )


def _tile(logits: Tensor) -> tuning.Config:
    M, columns = logits.shape
    target, width = _triton.target(logits.device), max(16, _triton.next_power_of_2(columns))
    found = tuning.lookup("cross_entropy", target, logits.dtype, width, M)
    tile = dict(found or config(target))
    tile["BLOCK_V"] = min(tile["BLOCK_V"], width)
    return tile


def _features(options: Options) -> dict[str, float | bool]:
    return {
        "softcap": 0.0 if options.softcap is None else options.softcap,
        "smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "SOFTCAP": options.softcap is not None,
        "SMOOTHING": options.label_smoothing > 0,
    }
