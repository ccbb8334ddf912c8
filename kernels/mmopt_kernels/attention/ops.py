"""Schemas, fakes, autograd, FLOP formulas and dispatch of the attention ops. Needs only torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmopt_kernels import _triton
from mmopt_kernels.attention import cpu, dispatch
from mmopt_kernels.attention.reference import reference, reference_backward
from mmopt_kernels.errors import KernelInputError

IMPLS = ("auto", "reference", "cpu", "triton", "sdpa")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The widest head with a tile in kernel.config; wider ones would spill the accumulator.
TRITON_MAX_HEAD_DIM = 256

torch.library.define(
    "mmopt::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? lo, Tensor? hi, Tensor? sinks, Tensor? seed,"
    " bool causal, float scale, float? softcap, float dropout_p, bool deterministic, str impl)"
    " -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mmopt::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? lo, Tensor? hi, Tensor? sinks, Tensor? seed, bool causal, float scale,"
    " float? softcap, float dropout_p, bool deterministic, str impl)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _triton_takes(q: Tensor) -> bool:
    return q.dtype != torch.float64 and q.shape[3] <= TRITON_MAX_HEAD_DIM


def _resolve(impl: str, q: Tensor, k: Tensor) -> str:
    """The implementation to run. Only ``"auto"`` is free to choose; the others hold or raise."""
    if impl == "auto":
        if cpu.supported(q, k):
            return "cpu"
        if q.device.type == "cuda" and _triton_takes(q) and _triton.installed():
            return "triton"
        return "reference"
    if impl == "cpu" and q.device.type != "cpu":
        raise KernelInputError(
            f"attention: impl is 'cpu' and q is on {q.device}, expected tensors on the CPU. "
            "Move them, or leave impl out."
        )
    if impl == "triton":
        _triton.require("attention", q.device)
        if not _triton_takes(q):
            raise KernelInputError(
                f"attention: impl is 'triton' and q is {q.dtype} with head dimension {q.shape[3]}, "
                f"expected float16, bfloat16 or float32 and at most {TRITON_MAX_HEAD_DIM}. "
                "Cast q, k and v, or pass impl='reference'."
            )
    return impl


def _sdpa(
    step: str,
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: tuple[Tensor | float | None, ...],
    causal: bool,
    scale: float,
    deterministic: bool,
) -> str | None:
    """Which of PyTorch's CUDA kernels to run, None for an implementation of this package.

    ``others`` are what makes a call more than plain: bounds, sinks, seed, softcap and, in
    backward, the gradient of lse.
    """
    plain = all(x is None for x in others)
    # Those kernels hide keys before they scale as well, or may: none says that it does not.
    scaled = not causal or q.shape[2] == 1 or scale >= cpu.LEAST_SCALE
    if impl == "auto" and q.device.type == "cuda" and plain and scaled:
        return dispatch.fastest(step, q, k, v, causal, deterministic)
    if impl != "sdpa":
        return None
    if q.device.type != "cuda":
        raise KernelInputError(
            f"attention: impl is 'sdpa' and q is on {q.device}, expected tensors on a GPU. "
            "Move them, or leave impl out."
        )
    if not plain or deterministic:
        raise KernelInputError(
            "attention: impl is 'sdpa', expected a call without intervals, sinks, softcap, "
            "dropout, deterministic or a gradient of lse, which PyTorch's kernels do not have. "
            "Leave impl out."
        )
    if not scaled:
        raise KernelInputError(
            f"attention: impl is 'sdpa', scale is {scale} and causal is True, expected a scale of "
            f"{cpu.LEAST_SCALE:.3g} or more, because PyTorch's kernels hide keys before they "
            "scale. Leave impl out."
        )
    name, reasons = dispatch.first_able(q, k, v, causal)
    if name is None:
        raise KernelInputError(
            "attention: impl is 'sdpa', expected a call that one of PyTorch's kernels can take "
            f"({reasons}). Leave impl out."
        )
    return name


def _heads_last(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` stored as ``[B, S, H, D]``; no copy when it already is."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_heads_last(x: Tensor) -> Tensor:
    B, H, S, D = x.shape
    return x.new_empty(B, S, H, D).transpose(1, 2)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("mmopt::attention")
def _attention_fake(
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
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _empty_heads_last(q), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.impl("mmopt::attention", "CompositeExplicitAutograd")
def _attention(
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
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = cpu.unit_last_stride(q), cpu.unit_last_stride(k), cpu.unit_last_stride(v)
    others = (lo, hi, sinks, seed, softcap)
    backend = _sdpa("forward", impl, q, k, v, others, causal, scale, deterministic)
    if backend is not None:
        out, lse = dispatch.forward(backend, q, k, v, causal, scale)
        return _heads_last(out), lse.contiguous()
    chosen = _resolve(impl, q, k)
    args = (q, k, v, lo, hi, sinks, seed, causal, scale, softcap, dropout_p)
    if chosen == "triton":
        # The first import of Triton.
        from mmopt_kernels.attention import kernel, kernel_decode

        if kernel_decode.uses_decode(q, k, dropout_p):
            return kernel_decode.launch_decode(*args)
        return kernel.launch(*args)
    if chosen == "cpu" and cpu.supported(q, k):
        out, lse = cpu.forward(*args)
    else:
        out, lse = reference(*args)
    return _heads_last(out), lse.contiguous()


@torch.library.register_fake("mmopt::attention_backward")
def _attention_backward_fake(
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
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = lse.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v), dsinks


@torch.library.impl("mmopt::attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
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
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = cpu.unit_last_stride(q), cpu.unit_last_stride(k), cpu.unit_last_stride(v)
    grad_out, out = cpu.unit_last_stride(grad_out), cpu.unit_last_stride(out)
    others = (lo, hi, sinks, seed, softcap, grad_lse)
    backend = _sdpa("backward", impl, q, k, v, others, causal, scale, deterministic)
    if backend is not None:
        # Out comes from the forward as is; cuDNN wants its gradient laid out like it.
        dq, dk, dv = dispatch.backward(
            backend, _heads_last(grad_out), q, k, v, _heads_last(out), lse, causal, scale
        )
        return _heads_last(dq), _heads_last(dk), _heads_last(dv), lse.new_empty(0)
    chosen = _resolve(impl, q, k)
    inputs = (grad_out, grad_lse, q, k, v, out, lse, lo, hi, sinks, seed)
    if chosen == "triton":
        from mmopt_kernels.attention.kernel_backward import launch_backward

        return launch_backward(*inputs, causal, scale, softcap, dropout_p, deterministic)
    if chosen == "cpu" and cpu.supported(q, k):
        grads = cpu.backward(*inputs, causal, scale, softcap, dropout_p)
    else:
        grads = reference_backward(*inputs, causal, scale, softcap, dropout_p)
    dq, dk, dv, dsinks = grads
    return _heads_last(dq), _heads_last(dk), _heads_last(dv), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lo, hi, sinks, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, sinks, seed)
    # An unused lse then has no gradient, instead of zeros that would cost the fast backward.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, lo, hi, sinks, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, dsinks = torch.ops.mmopt.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, lo, hi, sinks, seed, *ctx.options
    )
    # Of q, k, v, lo, hi, sinks, seed, and the options.
    return (*grads, None, None, None if sinks is None else dsinks, None, *[None] * len(ctx.options))


torch.library.register_autograd("mmopt::attention", _differentiate, setup_context=_save)


# Without a formula PyTorch would drop the second-order term behind a warning.
torch.library.register_autograd("mmopt::attention_backward", cpu.refuse_second_derivative)


# Two FLOPs for each multiply-add; every key counts, as PyTorch counts SDPA, because which keys
# are visible is device data.
def _flops(q: Any, k: Any, products: int) -> int:
    B, Hq, S, D = q
    return products * 2 * B * Hq * S * k[2] * D  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.mmopt.attention)
def _attention_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(q, k, 2)  # scores, output


@register_flop_formula(torch.ops.mmopt.attention_backward)
def _attention_backward_flops(
    grad_out: Any, grad_lse: Any, q: Any, k: Any, *args: Any, **kwargs: Any
) -> int:
    return _flops(q, k, 5)  # scores again, dp, dq, dk, dv
