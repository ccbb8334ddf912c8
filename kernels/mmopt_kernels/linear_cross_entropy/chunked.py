"""The linear cross-entropy by chunks: vendor GEMMs around one step per chunk of logits.

The step turns the logits of a chunk into their gradient: in PyTorch here, or in a kernel of
`kernel`, which does it in place. Chunks are of rows (`run`); the gradients with that of a bfloat16
weight on a GPU are made by chunks of columns (`gradients_by_columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Logits of a chunk. On a GPU, 1024 rows of a vocabulary of 128k, 256 MiB in 16 bits: 256 rows give
# the GEMM of the hidden gradient a few tens of tiles for 132 multiprocessors and read the weight
# four times as often (arithmetic, not measured). On a CPU, 512 rows of 32k: 64 MiB in float32.
# There each GEMM reads the whole weight and packs it anew, and from 64 to 512 rows more were always
# faster (the case llama-124m of bench/bench_linear_cross_entropy.py).
GPU_ELEMENTS = 2**27
CPU_ELEMENTS = 2**24
# By columns there are more launches of smaller GEMMs: 4096 columns of 8192 rows, 64 MiB in 16 bits,
# so that the chunk and the float32 sum of the hidden gradient, which each chunk reads and writes,
# stay a small part of the weight's gradient.
COLUMN_ELEMENTS = 2**25
# Of a frozen weight a chunk on a GPU has at most a fourth of the rows, or this many: its logits are
# then a 24th of what an eager loss keeps, some 12 bytes for each. By rows the float32
# sum of a trained weight's gradient is larger, and each chunk reads and writes it, 8 V H
# bytes beside 6 rows V H FLOPs: at the 3.35 TB/s and some 600 TFLOP/s of an H100 as long as the
# GEMMs with 240 rows, a quarter of that with 1024.
GPU_PARTS = 4
LEAST_ROWS = 256
# GEMMs like their rows in multiples of a tile's.
ROWS = 64
# On a GPU each row of logits has room for whole 16, whatever the vocabulary (GPT-2's has 50257
# tokens, Whisper's 51865): where rows begin anywhere, no 16 bytes are loaded at once.
WHOLE = 16


class Options(NamedTuple):
    ignore_index: int
    softcap: float | None
    label_smoothing: float
    z_loss: float


class Arguments(NamedTuple):
    """hidden ``[M, H]``, weight ``[V, H]``, labels ``[M]``, bias ``[V]``, a, b of its dtype."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None


def chunk_rows(M: int, V: int, device: torch.device, trained: bool = False) -> int:
    """How many rows a chunk has; trained: whether the weight is."""
    found = (CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS) // max(V, 1)
    if device.type != "cpu" and not trained:
        found = min(found, max(M // GPU_PARTS, LEAST_ROWS))
    found = found // ROWS * ROWS if found >= ROWS else found
    return max(1, min(M, found))


def chunk_columns(M: int, V: int) -> int:
    """How many columns a chunk of all M rows has."""
    found = COLUMN_ELEMENTS // max(M, 1)
    return max(1, min(V, found // ROWS * ROWS if found >= ROWS else found))


def run(
    args: Arguments,
    weights: Tensor | None,
    options: Options,
    needs: Sequence[bool],
    triton: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of each token, its log-sum-exp, and gradients of the sum of ``weights * losses``.

    Args:
        weights: ``[M]`` in the dtype of the losses, zero for ignored tokens; None where no gradient
            is needed.
        needs: of hidden, weight, bias, a and b, whether a gradient is needed.

    Returns:
        Losses and log-sum-exps ``[M]``, float32 (float64 for float64), 0 for ignored tokens, and
        the needed gradients: each in the dtype of its tensor, but those of weight, bias, a and b in
        float32 where that has 16 bits: they are sums over all tokens.
    """
    hidden, weight, labels, _, a, b = args
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    M, V = hidden.shape[0], weight.shape[0]
    want = any(needs)
    need_hidden, _, _, need_a, _ = needs
    # A row that does not count would cost as much as any other. Of a CPU's tensors the host may ask
    # which those are, and leave them out. The kernel is run as on a GPU.
    picked = None
    if hidden.device.type == "cpu" and not triton:
        seen = labels != options.ignore_index
        picked = None if seen.all() else seen.nonzero()[:, 0]
    make = hidden.new_empty if picked is None else hidden.new_zeros
    losses, lse = (make(M, dtype=wide) for _ in range(2))
    dhidden = make(hidden.shape if need_hidden else 0)
    sums = [
        x.new_zeros(x.shape, dtype=wide) if need and x is not None else None
        for x, need in zip((weight, args.bias, a, b), needs[1:], strict=True)
    ]
    dweight, dbias, da, db = sums
    # The kernel walks both by one element. A gradient of a sum is expanded.
    labels = labels.contiguous()
    weights = None if weights is None else weights.to(wide).contiguous()
    count = M if picked is None else picked.shape[0]
    step = chunk_rows(count, V, hidden.device, dweight is not None)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = rows if picked is None else picked[rows]
        h = hidden[part]
        logits, s = _logits(h, args, triton)
        y, w = labels[part], weights[part] if want and weights is not None else None
        if triton:
            from mmopt_kernels.linear_cross_entropy.kernel import launch  # first Triton import

            losses[part], lse[part] = launch(logits, y, w, options, _room(V))
            d = logits
        else:
            losses[part], lse[part], found = _step(logits, y, w, options)
            d = logits if found is None else found.to(hidden.dtype)
        del logits
        if not want:
            continue
        ds = None
        if a is not None and b is not None and (need_hidden or need_a):
            ds = d @ b  # [rows, R]
        if need_hidden:
            dh = dhidden[part] if picked is None else h.new_empty(h.shape)
            torch.mm(d, weight, out=dh)
            if ds is not None and a is not None:
                dh.addmm_(ds, a)
            if picked is not None:
                dhidden[part] = dh
        if dweight is not None:
            _add_product(dweight, d.t(), h)
        if dbias is not None:
            dbias += d.sum(0, dtype=wide)
        if da is not None and ds is not None:
            _add_product(da, ds.t(), h)
        if db is not None and s is not None:
            _add_product(db, d.t(), s)
    return losses, lse, [x for x in (dhidden if need_hidden else None, *sums) if x is not None]


def gradients_by_columns(
    args: Arguments,
    weights: Tensor,
    lse: Tensor,
    options: Options,
    needs: Sequence[bool],
    triton: bool,
) -> list[Tensor]:
    """Gradients of the sum of ``weights * losses``, all rows of some columns at a time.

    A chunk's part of the weight's gradient is then one product over all tokens, summed in the GEMM
    and rounded once, where by rows a float32 sum of its whole size takes part in each. The price is
    a product: the log-sum-exps must be known, so that the logits were computed before.

    Args:
        weights, lse: ``[M]`` in the dtype of the losses; lse as `run` returns it.
        needs: as for `run`.

    Returns:
        The needed gradients: those of hidden and weight in their dtype, the others, which are
        small, in that of the losses.
    """
    hidden, weight, labels, bias, a, b = args
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    V = weight.shape[0]
    need_hidden, need_weight, need_bias, need_a, need_b = needs
    labels, weights, lse = labels.contiguous(), weights.to(wide).contiguous(), lse.contiguous()
    dhidden = hidden.new_zeros(hidden.shape, dtype=wide) if need_hidden else None
    # Each row of these belongs to one column of the logits.
    dweight = weight.new_empty(weight.shape) if need_weight else None
    dbias, da, db = (
        x.new_zeros(x.shape, dtype=wide) if need and x is not None else None
        for x, need in ((bias, need_bias), (a, need_a), (b, need_b))
    )
    s = None if a is None else hidden @ a.t()  # [M, R]
    ds = None if s is None or not (need_hidden or need_a) else torch.zeros_like(s, dtype=wide)
    step = chunk_columns(hidden.shape[0], V)
    for first in range(0, V, step):
        part = slice(first, first + step)
        d = _layer(hidden, weight[part], None if bias is None else bias[part], triton)
        if s is not None and b is not None:
            d.addmm_(s, b[part].t())
        if triton:
            from mmopt_kernels.linear_cross_entropy.kernel import launch_columns  # as above

            launch_columns(d, labels, weights, lse, options, first, V, _room(d.shape[1]))
        else:
            d = _step_columns(d, labels, weights, lse, options, first, V).to(hidden.dtype)
        if dhidden is not None:
            _add_product(dhidden, d, weight[part])
        if ds is not None and b is not None:
            _add_product(ds, d, b[part])
        if dweight is not None:
            torch.mm(d.t(), hidden, out=dweight[part])
        if dbias is not None:
            dbias[part] = d.sum(0, dtype=wide)
        if db is not None and s is not None:
            _add_product(db[part], d.t(), s)
        del d
    if ds is not None and a is not None:
        ds = ds.to(hidden.dtype)
        if dhidden is not None:
            _add_product(dhidden, ds, a)
        if da is not None:
            _add_product(da, ds.t(), hidden)
    dhidden = None if dhidden is None else dhidden.to(hidden.dtype)
    return [x for x in (dhidden, dweight, dbias, da, db) if x is not None]


def _logits(h: Tensor, args: Arguments, triton: bool) -> tuple[Tensor, Tensor | None]:
    """``[rows, V]`` in the dtype of h, before softcap, and the adapter's ``[rows, R]``."""
    logits = _layer(h, args.weight, args.bias, triton)
    if args.a is None or args.b is None:
        return logits, None
    s = h @ args.a.t()
    return logits.addmm_(s, args.b.t()), s


def _room(columns: int) -> int:
    """How many logits a row of so many has room for."""
    return -(-columns // WHOLE) * WHOLE


def _layer(h: Tensor, weight: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
    """``h weightᵀ + bias``; for the kernel each row has its room, see `_room`."""
    M, V = h.shape[0], weight.shape[0]
    if not triton or _room(V) == V:
        return torch.nn.functional.linear(h, weight, bias)
    out = h.new_empty(M, _room(V))[:, :V]
    if bias is None:
        return torch.mm(h, weight.t(), out=out)
    return torch.addmm(bias, h, weight.t(), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left right``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and torch.version.hip is None:
        # Summed by the GEMM: no product of the size of the weight, rounded to 16 bits.
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right


def _step(
    logits: Tensor, labels: Tensor, weights: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and log-sum-exp of each row, and with weights the gradient of the logits.

    Works in place, on the logits themselves where they are float32 or float64: nothing else of
    their size exists, but for softcap's second factor.
    """
    ignore_index, _, smoothing, z_loss = options
    x, slope = _capped(logits, options, weights is not None)
    seen = labels != ignore_index
    y = torch.where(seen, labels, 0).long()
    target = x.gather(1, y[:, None])[:, 0]
    mean = x.mean(1) if smoothing else None
    # Of a row of only -inf the difference would be NaN.
    top = x.amax(1).clamp_(min=torch.finfo(x.dtype).min)
    e = x.sub_(top[:, None]).exp_()
    total = e.sum(1)
    # A row that does not count may hold anything, its infinities times 0 being NaN.
    lse = torch.where(seen, top + total.log(), 0.0)
    losses = lse - (1.0 - smoothing) * target + z_loss * lse.square()
    if mean is not None:
        losses -= smoothing * mean
    losses = torch.where(seen, losses, 0.0)
    if weights is None:
        return losses, lse, None
    w = torch.where(seen, weights, 0.0)
    d = e.mul_((w * (1.0 + 2.0 * z_loss * lse) / total)[:, None])
    return losses, lse, _less_target(d, y, w, smoothing, x.shape[1], slope)


def _step_columns(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    lse: Tensor,
    options: Options,
    first: int,
    V: int,
) -> Tensor:
    """The gradient of logits ``[M, C]``, of V columns those from ``first`` on; in place too."""
    ignore_index, _, smoothing, z_loss = options
    x, slope = _capped(logits, options, True)
    seen = labels != ignore_index
    w = torch.where(seen, weights, 0.0)
    d = x.sub_(lse[:, None]).exp_().mul_((w * (1.0 + 2.0 * z_loss * lse))[:, None])
    y = labels.long() - first
    d = _less_target(d, y, w, smoothing, V, slope)
    # As above: of a row that does not count exp may be infinite.
    return d.masked_fill_(~seen[:, None], 0.0)


def _capped(logits: Tensor, options: Options, want: bool) -> tuple[Tensor, Tensor | None]:
    """Logits after softcap, in float32 or float64, and if wanted softcap's derivative."""
    x, softcap = logits if logits.dtype == torch.float64 else logits.float(), options.softcap
    if softcap is None:
        return x, None
    x = x.div_(softcap).tanh_().mul_(softcap)
    return x, x.div(softcap).square_().neg_().add_(1.0) if want else None


def _less_target(
    d: Tensor, y: Tensor, w: Tensor, smoothing: float, V: int, slope: Tensor | None
) -> Tensor:
    """d less what the labels take off; y: the columns in d of the labels, which may be outside."""
    inside = (y >= 0) & (y < d.shape[1])
    taken = torch.where(inside, w * (smoothing - 1.0), 0.0)
    d.scatter_add_(1, torch.where(inside, y, 0)[:, None], taken[:, None])
    if smoothing:
        d.sub_((w * (smoothing / V))[:, None])
    return d if slope is None else d.mul_(slope)
