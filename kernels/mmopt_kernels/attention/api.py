"""The public attention function."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from mmopt_kernels._autocast import autocast_dtype
from mmopt_kernels._seed import check_dropout, seed_on
from mmopt_kernels._transforms import refuse_transforms
from mmopt_kernels.attention import cpu
from mmopt_kernels.attention.bounds import require_tensor
from mmopt_kernels.attention.intervals import Intervals
from mmopt_kernels.attention.ops import DTYPES, IMPLS  # registers the op too
from mmopt_kernels.errors import KernelInputError

Impl = Literal["auto", "reference", "cpu", "triton", "sdpa"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    intervals: Intervals | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = ...,
    impl: Impl = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    intervals: Intervals | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
    impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    intervals: Intervals | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees one contiguous range of keys.

    ``dropout(softmax(cap(scale * q @ k.T))) @ v``, with accumulation in float32. Differentiable
    once, through ``lse`` and ``sinks`` as well. Under autocast, q, k and v (unless float64) are
    cast to the autocast dtype, as ``scaled_dot_product_attention`` does, and sinks to float32.

    Args:
        q: ``[B, Hq, S, D]`` float16, bfloat16, float32 or float64. Strides are free, but a
            tensor whose last stride is not 1 is copied first.
        k, v: ``[B, Hkv, T, D]``, dtype and device of ``q``; ``Hkv`` divides ``Hq`` and query head
            ``h`` reads key head ``h // (Hq // Hkv)``. Keys that nothing sees must be finite too.
        intervals: the visible keys of each query, ``[B or 1, S]`` bounds; all keys when None.
            Bounds outside ``[0, T]`` act as if clamped to it: reading them to refuse them would
            make the host wait for the device.
        causal: also hide the keys ``j > i + T - S`` from query ``i`` (aligned at the bottom
            right, so that a decode step's last query sees the whole cache).
        scale: of the scores, ``D ** -0.5`` when None.
        softcap: bound the scaled scores to ``softcap * tanh(score / softcap)``; above 0.
        sinks: ``[Hq]``, float32 or the dtype of ``q``: a learned score of each head that joins
            the normalizer and has no value. ``-inf`` is no sink.
        dropout_p: probability in ``[0, 1)``, to within ``2**-32``, of dropping a (query, key)
            pair after the softmax; what stays is scaled by ``1 / (1 - dropout_p)``.
        seed: of the dropout, an int of 64 bits or an int64 tensor of one element on the device of
            ``q``, which the host never reads. The mask depends on it and on the positions alone:
            the same for every ``impl``. None draws one from torch's generator of that device, so
            ``torch.manual_seed`` governs it and checkpointing replays it. Ignored without dropout,
            so that one call serves training and evaluation.
        deterministic: promise bitwise equal results from call to call, gradients included. What
            could break it runs no backward then: PyTorch's CUDA kernels, and our one pass, which
            adds up the gradient of q in no certain order. That one runs only where a table asks
            for it, and none that ships does: yours may, of `tuning.tune` and MMOPT_TABLES, and
            without ``deterministic`` the gradient of q may then differ in its last bits. A
            dropout whose seed is drawn cannot keep the promise, and is refused.
        return_lse: also return the log-sum-exp of each row's scores, the sink's included.
        impl: ``"auto"``; ``"reference"`` (plain PyTorch, any device); ``"cpu"`` (blocks of rows,
            in PyTorch's CPU flash kernel where that can do it); ``"triton"`` (a GPU, or the CPU
            under ``TRITON_INTERPRET=1``; float16, bfloat16, float32 with ``D <= 256``);
            ``"sdpa"`` (PyTorch's CUDA kernels: no intervals, softcap, sinks, dropout or gradient
            of lse, and causal only for ``S`` equal to ``T`` or 1). Only ``"auto"`` chooses by
            what can run and by which is faster.

    Returns:
        ``[B, Hq, S, D]`` in the dtype of ``q``, stored as ``[B, S, Hq, D]`` so that
        ``.transpose(1, 2)`` is contiguous. With ``return_lse`` also ``lse``, ``[B, Hq, S]``
        float32 (float64 for float64 inputs). A row that sees no key gives zeros, ``lse = -inf``
        (with sinks: the sink) and zero gradients to q, k and v.

    Raises:
        KernelInputError: a type, shape, dtype, device or option does not match, or ``impl`` cannot
            run here.
        NotImplementedError: a transform of `torch.func`, or forward mode, would differentiate more
            than one call of PyTorch's CPU kernel without intervals.

    Sources: Dao 2023, arXiv:2307.08691 (online softmax, recomputation in backward); Gemma Team
    2024, arXiv:2408.00118 (softcap); Xiao et al. 2023, arXiv:2309.17453 (sinks); Salmon et al.
    2011, doi:10.1145/2063384.2063405 (Philox, the dropout's generator).
    """
    _check_types(q, k, v, intervals, causal, sinks)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        sinks = None if sinks is None else sinks.float()
    _check(q, k, v, intervals, impl)
    _check_options(q, softcap, sinks, dropout_p, seed, deterministic)
    lo, hi = (None, None) if intervals is None else (intervals.lo, intervals.hi)
    # A head of no dimension has no scores to scale.
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    plain = softcap is None and sinks is None and dropout_p == 0
    if plain and impl == "auto" and not return_lse and cpu.supported(q, k):
        out = cpu.direct(q, k, v, lo, hi, causal, scale)
        if out is not None:
            return out
    refuse_transforms("attention", q, k, v, sinks)
    out, lse = torch.ops.mmopt.attention(
        q,
        k,
        v,
        lo,
        hi,
        sinks,
        seed_on(q.device, seed) if dropout_p > 0 else None,
        causal,
        scale,
        None if softcap is None else float(softcap),
        float(dropout_p),
        deterministic,
        impl,
    )
    return (out, lse) if return_lse else out


def _check_types(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals | None,
    causal: bool,
    sinks: Tensor | None,
) -> None:
    """What would otherwise fail without its name, or be taken for something else."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor("attention", name, x)
    if sinks is not None:
        require_tensor("attention", "sinks", sinks)
    if intervals is not None and not isinstance(intervals, Intervals):
        raise KernelInputError(
            f"attention: intervals is of type {type(intervals).__name__}, expected Intervals. "
            "Make them of a mask with Intervals.from_dense, of bounds with Intervals(lo, hi)."
        )
    if not isinstance(causal, bool | torch.SymBool):
        raise KernelInputError(
            f"attention: causal is of type {type(causal).__name__}, expected a bool. "
            "Pass a mask as intervals."
        )


def _check(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals | None, impl: str) -> None:
    if impl not in IMPLS:
        raise KernelInputError(
            f"attention: impl is {impl!r}, expected one of {', '.join(IMPLS)}. "
            "Leave impl out to choose by what can run."
        )
    if q.dim() != 4:
        raise KernelInputError(
            f"attention: q has shape {tuple(q.shape)}, expected [B, Hq, S, D]. "
            "Split the heads and put them before the sequence: q.view(B, S, Hq, D).transpose(1, 2)."
        )
    if q.dtype not in DTYPES:
        raise KernelInputError(
            f"attention: q has dtype {q.dtype}, expected float16, bfloat16, float32 or float64. "
            "Cast q, k and v to one of them."
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise KernelInputError(
                f"attention: {name} is {x.dtype} on {x.device}, expected {q.dtype} on {q.device} "
                f"like q. Cast or move {name} before the call."
            )
    if k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise KernelInputError(
            f"attention: k has shape {tuple(k.shape)}, expected [{q.shape[0]}, Hkv, T, "
            f"{q.shape[3]}] because q has shape {tuple(q.shape)}. "
            "Take q and k from the same layer and batch."
        )
    if v.shape != k.shape:
        raise KernelInputError(
            f"attention: v has shape {tuple(v.shape)}, expected {tuple(k.shape)} like k. "
            "Pad v to the head dimension of k, and slice the output, if only that differs."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise KernelInputError(
            f"attention: k has {k.shape[1]} heads, expected a divisor of the {q.shape[1]} heads of "
            "q. Pass grouped keys and values as the model stores them."
        )
    if intervals is None:
        return
    lo = intervals.lo
    if lo.shape[1] != q.shape[2] or (lo.shape[0] != 1 and lo.shape[0] != q.shape[0]):
        raise KernelInputError(
            f"attention: intervals have shape {tuple(lo.shape)}, expected [{q.shape[0]} or 1, "
            f"{q.shape[2]}] because q has shape {tuple(q.shape)}. Give each query one interval."
        )
    if lo.device != q.device:
        raise KernelInputError(
            f"attention: intervals are on {lo.device}, expected {q.device} like q. "
            "Build them with device=q.device."
        )


def _check_options(
    q: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    deterministic: bool,
) -> None:
    # Comparisons alone: under torch.compile a float may be symbolic, which math.isfinite breaks on.
    if softcap is not None and not 0 < softcap < math.inf:
        raise KernelInputError(
            f"attention: softcap is {softcap}, expected a finite number above 0. "
            "For no cap, pass None."
        )
    if sinks is not None:
        if sinks.shape != q.shape[1:2]:
            raise KernelInputError(
                f"attention: sinks have shape {tuple(sinks.shape)}, expected [{q.shape[1]}] "
                "because q has that many heads. Give each query head one sink."
            )
        if sinks.dtype not in (torch.float32, q.dtype) or sinks.device != q.device:
            raise KernelInputError(
                f"attention: sinks are {sinks.dtype} on {sinks.device}, expected torch.float32 or "
                f"{q.dtype} on {q.device} like q. Cast or move them before the call."
            )
    check_dropout("attention", dropout_p, seed, "q", q)
    if deterministic and dropout_p > 0 and seed is None:
        raise KernelInputError(
            f"attention: seed is None, expected an int or a tensor because deterministic is "
            f"True and dropout_p is {dropout_p}. Pass a seed of your own for each step."
        )
