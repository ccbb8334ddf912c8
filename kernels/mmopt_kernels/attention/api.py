"""The public attention function."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mmopt_kernels._autocast import autocast_dtype
from mmopt_kernels.attention.intervals import Intervals
from mmopt_kernels.attention.ops import DTYPES, IMPLS  # registers the op too
from mmopt_kernels.errors import KernelInputError

Impl = Literal["auto", "reference", "cpu", "triton"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    intervals: Intervals | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
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
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees one contiguous range of keys.

    ``softmax(scale * q @ k.T) @ v``, with accumulation in float32. Differentiable once, through
    ``lse`` as well. Under autocast, q, k and v (unless float64) are cast to the autocast dtype,
    as ``scaled_dot_product_attention`` does.

    Args:
        q: ``[B, Hq, S, D]`` float16, bfloat16, float32 or float64. Strides are free, but a
            tensor whose last stride is not 1 is copied first.
        k, v: ``[B, Hkv, T, D]``, dtype and device of ``q``; ``Hkv`` divides ``Hq`` and query head
            ``h`` reads key head ``h // (Hq // Hkv)``. Keys that nothing sees must be finite too.
        intervals: the visible keys of each query, ``[B or 1, S]`` bounds; all keys when None.
        causal: also hide the keys ``j > i + T - S`` from query ``i`` (aligned at the bottom
            right, so that a decode step's last query sees the whole cache).
        scale: of the scores, ``D ** -0.5`` when None.
        return_lse: also return the log-sum-exp of each row's scaled scores.
        impl: ``"auto"``; ``"reference"`` (plain PyTorch, any device); ``"cpu"`` (PyTorch's CPU
            flash kernel); ``"triton"`` (a GPU, or the CPU under ``TRITON_INTERPRET=1``; float16,
            bfloat16, float32 with ``D <= 256``). Only ``"auto"`` chooses by what can run.

    Returns:
        ``[B, Hq, S, D]`` in the dtype of ``q``, stored as ``[B, S, Hq, D]`` so that
        ``.transpose(1, 2)`` is contiguous. With ``return_lse`` also ``lse``, ``[B, Hq, S]``
        float32 (float64 for float64 inputs). A row that sees no key gives zeros, ``lse = -inf``
        and zero gradients.

    Raises:
        KernelInputError: a shape, dtype or device does not match, or ``impl`` cannot run here.

    Source: Dao 2023, arXiv:2307.08691 (online softmax, recomputation in backward).
    """
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, intervals, impl)
    out, lse = torch.ops.mmopt.attention(
        q,
        k,
        v,
        None if intervals is None else intervals.lo,
        None if intervals is None else intervals.hi,
        causal,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        impl,
    )
    return (out, lse) if return_lse else out


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
