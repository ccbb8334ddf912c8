"""Attention on the CPU in memory linear in the length, by blocks of query rows.

PyTorch's flash kernel, the one that SDPA runs there, computes each block where it can; softcap,
dropout and the gradient of lse, which it has not, are written out in PyTorch. Either way a block
reads only the keys between the first and the last that its rows see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmopt_kernels._transforms import transforming
from mmopt_kernels.attention.philox import keep_mask
from mmopt_kernels.attention.reference import sinks_backward

# PyTorch's kernel is given blocks of MASK_ROWS rows, or more while the mask of one sequence has no
# more than MASK_ROW_ELEMENTS: taller ones compute more of what the mask hides, lower ones are too
# thin for its matmuls. A block is of several sequences while its mask has no more than
# MASK_ELEMENTS.
MASK_ROWS = 64
MASK_ROW_ELEMENTS = 2**14
MASK_ELEMENTS = 2**16
# Masks of no more elements in all are kept for the next call with equal bounds: the next layer's,
# or the backward's. KEPT_MASKS of them take 4 MiB in float32.
KEPT_ELEMENTS = 2**18
KEPT_MASKS = 4
# The least scale of PyTorch's own causal mask: it hides keys before it scales, and -inf times 0, or
# a negative number, is NaN or inf. A smaller one than the least normal float32 may become 0.
LEAST_SCALE = torch.finfo(torch.float32).tiny
# Elements of a block of scores where they are written out (a dozen tensors of that size with
# dropout, whose words are int64), and the fewest rows: below, matmuls are too thin to run at speed.
SCORE_ELEMENTS = 2**18
SCORE_ROWS = 16

# What has values to look at; subclasses may be fake.
_PLAIN = (Tensor, torch.nn.Parameter)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supported(q: Tensor, k: Tensor) -> bool:
    """PyTorch's kernel needs at least one query, one key and one head."""
    return q.device.type == "cpu" and q.numel() > 0 and k.numel() > 0


def direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor | None:
    """Out of one call of PyTorch's kernel, with PyTorch's derivative; None where that is not all.

    Everything else is an op of this package, to which PyTorch comes through Python, forward and
    backward: small batches would notice. Modes see that op too, since PyTorch's has no FLOP
    formula.
    """
    S, T = q.shape[2], k.shape[2]
    compiling = torch.compiler.is_compiling()
    if not compiling and is_in_torch_dispatch_mode():
        return None
    blocks: tuple[MaskedBlock, ...] = ()
    if lo is None and hi is None:
        maskless = _maskless(S, T, None, causal, scale >= LEAST_SCALE)
    elif compiling or any(type(x) not in _PLAIN for x in (q, k, v)) or transforming():
        return None  # bounds have no values
    elif _keeps(lo, hi, T):
        maskless, blocks = _kept(
            _values(lo), _values(hi), S, T, causal, q.dtype, scale >= LEAST_SCALE
        )
    else:
        return None
    mask = None
    if maskless is None:
        if len(blocks) != 1 or blocks[0].empty is not None or not blocks[0].is_all(q):
            return None
        keys, mask = blocks[0].keys, blocks[0].mask
        if keys != slice(0, T):
            k, v = k[:, :, keys], v[:, :, keys]
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    out, _ = _forward(q, k, v, 0.0, maskless == "causal", attn_mask=mask, scale=scale)
    if not compiling and out.grad_fn is not None:
        out.grad_fn.register_hook(_differentiable_once)
    # The kernel leaves it in the order of q. Asked of symbolic sizes it would be one more guard.
    if compiling or not out.transpose(1, 2).is_contiguous():
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out  # type: ignore[no-any-return]


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse_second_derivative()


def _differentiable_once(
    grads: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """A node's hook: gradients that somebody may differentiate again say that they cannot be."""
    if not torch.is_grad_enabled():
        return None
    once = iter(_Once.apply(*(grad for grad in grads if grad is not None)))  # type: ignore[no-untyped-call]
    return tuple(None if grad is None else next(once) for grad in grads)


def refuse_second_derivative(*_: object) -> NoReturn:
    raise NotImplementedError(
        "attention: a second derivative was requested, expected first derivatives only. "
        "Drop create_graph=True, or use torch's attention for this term."
    )


def unit_last_stride(x: Tensor) -> Tensor:
    """`x`, or a copy: the kernels walk a row one element at a time, PyTorch's without checking."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Block:
    """Some rows of some sequences, and the keys that they see.

    ``hidden`` is bool ``[n or 1, rows, keys]``, None where every row sees every key.
    ``has_empty`` is False where no row hides all of them.
    """

    sequences: slice
    rows: slice
    keys: slice
    hidden: Tensor | None
    has_empty: bool


def _bounds(
    S: int, T: int, lo: Tensor | None, hi: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """The visible keys of each row, ``[B or 1, S]`` each, within ``[0, T]``."""
    lower = torch.zeros(1, S, dtype=torch.int32) if lo is None else lo.clamp(0, T)
    upper = torch.full((1, S), T, dtype=torch.int32) if hi is None else hi.clamp(0, T)
    if causal:
        diagonal = torch.arange(T - S + 1, T + 1, dtype=torch.int32)[None]
        upper = torch.minimum(upper, diagonal).clamp(min=0)
    B = max(lower.shape[0], upper.shape[0])
    return lower.expand(B, -1), upper.expand(B, -1)


def _extremes(bound: Tensor, n_sequences: int, n_rows: int, least: bool) -> list[list[int]]:
    """The least or greatest of a bound over each block, by sequences and rows."""
    reduce = np.minimum if least else np.maximum
    B, S = bound.shape
    by_rows = reduce.reduceat(bound.numpy(), range(0, S, n_rows), axis=1)
    found: list[list[int]] = reduce.reduceat(by_rows, range(0, B, n_sequences), axis=0).tolist()
    return found


def _blocks(lower: Tensor, upper: Tensor, T: int, n_sequences: int, n_rows: int) -> Iterator[Block]:
    """Blocks of so many sequences and rows. Rows that see nothing are in no block, or hidden.

    The bounds are in host memory here, so looking at them costs no synchronisation. All that is
    looked at is found before the first block, in NumPy, whose calls cost less than PyTorch's.
    """
    B, S = lower.shape
    # An empty row leaves the range of keys to the others.
    empty = lower >= upper
    some_empty = bool(empty.any())
    first = lower.masked_fill(empty, T) if some_empty else lower
    last = upper.masked_fill(empty, 0) if some_empty else upper
    starts, stops = (
        _extremes(x, n_sequences, n_rows, least) for x, least in ((first, True), (last, False))
    )
    # Whether some row sees less: a row that sees nothing does, by the end it is given here.
    ends, begins = (
        _extremes(x, n_sequences, n_rows, least) for x, least in ((last, True), (lower, False))
    )
    keys = torch.arange(T, dtype=torch.int32)
    for b, sequences in enumerate(range(0, B, n_sequences)):
        # Bounds that the batch shares make one mask for all of it.
        chosen = slice(None) if B == 1 else slice(sequences, sequences + n_sequences)
        for i, row in enumerate(range(0, S, n_rows)):
            start, stop = starts[b][i], stops[b][i]
            if start >= stop:
                continue
            rows = slice(row, row + n_rows)
            j = keys[start:stop]
            hidden = None
            if ends[b][i] < stop:
                hidden = j >= last[chosen, rows, None]
            if begins[b][i] > start:
                before = j < lower[chosen, rows, None]
                hidden = before if hidden is None else hidden.logical_or_(before)
            yield Block(chosen, rows, slice(start, stop), hidden, some_empty)


def forward(
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
    if softcap is None and seed is None:
        out, lse = _flash_forward(q, k, v, lo, hi, causal, scale)
    else:
        lower, upper = _bounds(q.shape[2], k.shape[2], lo, hi, causal)
        out, lse = _written_forward(q, k, v, lower, upper, seed, scale, softcap, dropout_p)
    if sinks is not None:
        # One more term in the normalizer: the probabilities shrink by what it takes.
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        # A row with neither key nor sink: -inf - -inf.
        out.mul_((lse - total).exp_().nan_to_num_(0.0)[..., None])
        lse = total
    return out, lse


def backward(
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
    if softcap is None and seed is None and grad_lse is None:
        # With sinks too: the kernel recomputes p = exp(s - lse) and takes grad_out . out for
        # delta, and both hold for any lse and out that include the sink. Its other terms are the
        # keys' alone.
        grads = _flash_backward(grad_out, q, k, v, out, lse, lo, hi, causal, scale)
        if sinks is None:
            return *grads, lse.new_empty(0)
        return *grads, sinks_backward(sinks, _delta(grad_out, out, None), lse)
    lower, upper = _bounds(q.shape[2], k.shape[2], lo, hi, causal)
    delta = _delta(grad_out, out, grad_lse)
    grads = _written_backward(
        grad_out, delta, q, k, v, lse, lower, upper, seed, scale, softcap, dropout_p
    )
    return *grads, sinks_backward(sinks, delta, lse)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _zeros_heads_last(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` zeros, stored as ``[B, S, H, D]``."""
    return torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def _delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """``[B, Hq, S, 1]``: what the softmax's normalization takes off each score's gradient."""
    delta = (_wide(grad_out) * _wide(out)).sum(3, keepdim=True)
    return delta if grad_lse is None else delta - grad_lse[..., None]


# PyTorch's kernel


def _maskless(
    S: int, T: int, bounds: tuple[Tensor, Tensor] | None, causal: bool, scaled: bool
) -> str | None:
    """``"full"`` or ``"causal"`` where PyTorch's kernel needs no mask; no bounds see every key.

    ``scaled``: the scale is no less than `LEAST_SCALE`.
    """
    # PyTorch aligns its causal mask at the top left: the same only for S == T.
    if bounds is None:
        # The last query of a causal mask sees every key.
        return "full" if not causal or S == 1 else "causal" if S == T and scaled else None
    lower, upper = bounds
    if lower.any():
        return None
    if int(upper.min()) == T:
        return "full"
    if S != T or not scaled:
        return None
    diagonal = torch.arange(1, S + 1, dtype=torch.int32)
    return "causal" if torch.equal(upper, diagonal.expand_as(upper)) else None


@dataclass(frozen=True)
class MaskedBlock:
    """A block as PyTorch's kernel takes it.

    ``mask`` is additive, ``[n or 1, 1, rows, keys]``, None where every row sees every key.
    ``empty`` says which rows see no key, ``[n or 1, 1, rows]``, None where all see some.
    """

    sequences: slice
    rows: slice
    keys: slice
    mask: Tensor | None
    empty: Tensor | None

    def is_all(self, q: Tensor) -> bool:
        """Whether the block has every row: then what the kernel returns is the result."""
        B, S = q.shape[0], q.shape[2]
        return self.sequences.indices(B) == (0, B, 1) and self.rows.indices(S) == (0, S, 1)


def _masked(block: Block, dtype: torch.dtype) -> MaskedBlock:
    mask = empty = None
    if block.hidden is not None:
        hidden = block.hidden[:, None]
        # As tensors of no dimension, or the mask would be float32 and be converted.
        mask = torch.where(
            hidden, torch.tensor(float("-inf"), dtype=dtype), torch.zeros((), dtype=dtype)
        )
        empty = hidden.all(3) if block.has_empty else None
    return MaskedBlock(block.sequences, block.rows, block.keys, mask, empty)


def _flash_blocks(
    lower: Tensor, upper: Tensor, T: int, dtype: torch.dtype
) -> Iterator[MaskedBlock]:
    S = lower.shape[1]
    n_rows = min(S, max(MASK_ROWS, MASK_ROW_ELEMENTS // T))
    n_sequences = max(1, MASK_ELEMENTS // (T * n_rows))
    return (_masked(block, dtype) for block in _blocks(lower, upper, T, n_sequences, n_rows))


def _flash_work(
    q: Tensor, k: Tensor, lo: Tensor | None, hi: Tensor | None, causal: bool, scale: float
) -> tuple[str | None, Iterable[MaskedBlock]]:
    """What PyTorch's kernel does without a mask (see `_maskless`), else None, and the blocks.

    The blocks of a small mask are kept by the *values* of its bounds. By their storage they could
    be another mask's: Inductor reuses buffers.
    """
    S, T, scaled = q.shape[2], k.shape[2], scale >= LEAST_SCALE
    if lo is None and hi is None:
        maskless = _maskless(S, T, None, causal, scaled)
        return maskless, () if maskless else _flash_blocks(
            *_bounds(S, T, lo, hi, causal), T, q.dtype
        )
    if _keeps(lo, hi, T):
        return _kept(_values(lo), _values(hi), S, T, causal, q.dtype, scaled)
    bounds = _bounds(S, T, lo, hi, causal)
    maskless = _maskless(S, T, bounds, causal, scaled)
    return maskless, () if maskless else _flash_blocks(*bounds, T, q.dtype)


def _keeps(lo: Tensor | None, hi: Tensor | None, T: int) -> bool:
    """Whether the mask of these bounds is small enough to be kept."""
    return T * max(bound.numel() for bound in (lo, hi) if bound is not None) <= KEPT_ELEMENTS


def _values(bound: Tensor | None) -> bytes | None:
    return None if bound is None else bound.numpy().tobytes()


@lru_cache(KEPT_MASKS)
def _kept(
    lo: bytes | None,
    hi: bytes | None,
    S: int,
    T: int,
    causal: bool,
    dtype: torch.dtype,
    scaled: bool,
) -> tuple[str | None, tuple[MaskedBlock, ...]]:
    # Masks are used in backward too, which takes no tensor that was made in inference mode.
    with torch.inference_mode(False):
        bounds = _bounds(S, T, _tensor(lo, S), _tensor(hi, S), causal)
        maskless = _maskless(S, T, bounds, causal, scaled)
        return maskless, () if maskless else tuple(_flash_blocks(*bounds, T, dtype))


def _tensor(values: bytes | None, S: int) -> Tensor | None:
    """`_values` undone; ``[B or 1, S]``."""
    if values is None:
        return None
    return torch.from_numpy(np.frombuffer(values, np.int32).reshape(-1, S).copy())


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    maskless, blocks = _flash_work(q, k, lo, hi, causal, scale)
    if maskless is not None:
        return _forward(q, k, v, 0.0, maskless == "causal", scale=scale)  # type: ignore[no-any-return]
    out = lse = None
    for block in blocks:
        n, rows, keys = block.sequences, block.rows, block.keys
        b_out, b_lse = _forward(
            q[n, :, rows],
            k[n, :, keys],
            v[n, :, keys],
            0.0,
            False,
            attn_mask=block.mask,
            scale=scale,
        )
        if block.empty is not None:
            b_out = b_out.masked_fill(block.empty[..., None], 0.0)
            b_lse = b_lse.masked_fill(block.empty, float("-inf"))
        if block.is_all(q):
            return b_out, b_lse
        if out is None or lse is None:
            out, lse = _nothing_seen(q)
        out[n, :, rows], lse[n, :, rows] = b_out, b_lse
    return _nothing_seen(q) if out is None or lse is None else (out, lse)


def _nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse of rows that see no key."""
    return _zeros_heads_last(q), _wide(q.new_empty(0)).new_full(q.shape[:3], float("-inf"))


def _flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    maskless, blocks = _flash_work(q, k, lo, hi, causal, scale)
    if maskless is not None:
        return _backward(  # type: ignore[no-any-return]
            grad_out, q, k, v, out, lse, 0.0, maskless == "causal", scale=scale
        )
    sums = None
    for block in blocks:
        n, rows, keys = block.sequences, block.rows, block.keys
        b_grad, b_lse = grad_out[n, :, rows], lse[n, :, rows]
        if block.empty is not None:
            b_grad = b_grad.masked_fill(block.empty[..., None], 0.0)
            # exp(s - inf) is 0 where exp(s + inf) would be inf or NaN.
            b_lse = b_lse.masked_fill(block.empty, float("inf"))
        b_dq, b_dk, b_dv = _backward(
            b_grad, q[n, :, rows], k[n, :, keys], v[n, :, keys], out[n, :, rows], b_lse,
            0.0, False, attn_mask=block.mask, scale=scale,
        )  # fmt: skip
        if block.is_all(q) and b_dk.shape == k.shape:
            return b_dq, b_dk, b_dv
        dq, dk, dv = sums = sums or _no_gradients(q, k, v)
        dq[n, :, rows] = b_dq
        dk[n, :, keys] += b_dk
        dv[n, :, keys] += b_dv
    dq, dk, dv = sums or _no_gradients(q, k, v)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _no_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros to write dq to and to add up dk and dv in, wider than 16-bit inputs."""
    return _zeros_heads_last(q), _zeros_heads_last(_wide(k)), _zeros_heads_last(_wide(v))


# Written out. The heads that share a key head are folded into its rows, which makes grouped
# queries one matmul and their sum in dK and dV another: R = group * rows.


def _fold(x: Tensor, Hkv: int, block: Block) -> Tensor:
    """The rows of ``[B, Hq, S, X]`` as ``[n, Hkv, R, X]``."""
    x = x[block.sequences, :, block.rows]
    n, Hq, rows, X = x.shape
    return _wide(x.reshape(n, Hkv, Hq // Hkv * rows, X))


def _unfold(x: Tensor, Hq: int) -> Tensor:
    """``[n, Hkv, R, X]`` as ``[n, Hq, rows, X]``."""
    n, Hkv, R, X = x.shape
    return x.view(n, Hq, R * Hkv // Hq, X)


def _scores(b_q: Tensor, b_k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[n, Hkv, R, keys]``, not yet masked."""
    s = (b_q @ b_k.mT).mul_(scale)
    return s if softcap is None else s.div_(softcap).tanh_().mul_(softcap)


def _hide(s: Tensor, Hq: int, hidden: Tensor | None) -> Tensor:
    """``s`` with -inf at hidden keys, in place."""
    if hidden is not None:
        _unfold(s, Hq).masked_fill_(hidden[:, None], float("-inf"))
    return s


def _drops(
    s: Tensor, q: Tensor, block: Block, seed: Tensor | None, dropout_p: float
) -> Tensor | None:
    """What dropout multiplies the probabilities with, in the shape of ``s``: 0, or 1 / (1 - p)."""
    if seed is None:
        return None
    B, Hq, S, _ = q.shape
    bh = torch.arange(B * Hq).view(B, Hq, 1, 1)[block.sequences]
    i = torch.arange(S)[block.rows, None]
    keep = keep_mask(seed, dropout_p, bh, i, block.keys.start, block.keys.stop)
    return keep.reshape(s.shape).to(s.dtype).mul_(1.0 / (1.0 - dropout_p))


def _written_blocks(q: Tensor, k: Tensor, lower: Tensor, upper: Tensor) -> Iterator[Block]:
    B, Hq, S, _ = q.shape
    T = k.shape[2]
    n_rows = min(S, max(SCORE_ROWS, SCORE_ELEMENTS // (Hq * T)))
    n_sequences = max(1, SCORE_ELEMENTS // (Hq * T * n_rows))
    return _blocks(lower.expand(B, S), upper.expand(B, S), T, n_sequences, n_rows)


def _written_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lower: Tensor,
    upper: Tensor,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    Hq, Hkv = q.shape[1], k.shape[1]
    kw, vw = _wide(k), _wide(v)
    out = _zeros_heads_last(q)
    lse = kw.new_full(q.shape[:3], float("-inf"))
    for block in _written_blocks(q, k, lower, upper):
        n, rows, keys = block.sequences, block.rows, block.keys
        s = _scores(_fold(q, Hkv, block), kw[n, :, keys], scale, softcap)
        s = _hide(s, Hq, block.hidden)
        # [n, Hkv, R, 1]
        b_lse = s.logsumexp(3, keepdim=True)
        # Any finite number for a row that sees nothing: its p is exp(-inf).
        p = s.sub_(b_lse.masked_fill(b_lse == float("-inf"), 0.0)).exp_()
        d = _drops(p, q, block, seed, dropout_p)
        if d is not None:
            p.mul_(d)
        out[n, :, rows] = _unfold(p @ vw[n, :, keys], Hq).to(q.dtype)
        lse[n, :, rows] = _unfold(b_lse, Hq).squeeze(3)
    return out, lse


def _written_backward(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    lower: Tensor,
    upper: Tensor,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    Hq, Hkv = q.shape[1], k.shape[1]
    kw, vw = _wide(k), _wide(v)
    dq, dk, dv = _no_gradients(q, k, v)
    for block in _written_blocks(q, k, lower, upper):
        n, rows, keys = block.sequences, block.rows, block.keys
        # [n, Hkv, R, D] twice, [n, Hkv, R, 1] twice
        b_q, b_grad = _fold(q, Hkv, block), _fold(grad_out, Hkv, block)
        b_lse, b_delta = _fold(lse[..., None], Hkv, block), _fold(delta, Hkv, block)
        s = _scores(b_q, kw[n, :, keys], scale, softcap)
        # d s / d raw, before s is masked and becomes p
        slope = None if softcap is None else (s / softcap).square_().neg_().add_(1.0)
        # exp(s - lse) of a hidden key may overflow before it is masked: mask the exponent.
        p = _hide(s.sub_(b_lse), Hq, block.hidden).exp_()
        ds = b_grad @ vw[n, :, keys].mT
        d = _drops(p, q, block, seed, dropout_p)
        if d is not None:
            ds.mul_(d)
        ds.sub_(b_delta).mul_(p).mul_(scale)
        if slope is not None:
            ds.mul_(slope)
        if d is not None:
            p.mul_(d)
        dq[n, :, rows] = _unfold(ds @ kw[n, :, keys], Hq).to(q.dtype)
        dk[n, :, keys] += ds.mT @ b_q
        dv[n, :, keys] += p.mT @ b_grad
    return dq, dk.to(k.dtype), dv.to(v.dtype)
