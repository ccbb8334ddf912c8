"""Schema, fake, autograd, FLOP formula and dispatch of the LoRA linear op. Needs only torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmopt_kernels import _triton
from mmopt_kernels.errors import KernelInputError
from mmopt_kernels.lora_linear.reference import reference

IMPLS = ("auto", "reference", "addmm", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

torch.library.define(
    "mmopt::lora_linear",
    "(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? bias, float scale, str impl)"
    " -> (Tensor y, Tensor s)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _resolve(impl: str, x: Tensor) -> str:
    """The implementation to run. Only ``"auto"`` is free to choose; the others hold or raise."""
    if impl == "auto":
        # A fused kernel 10% slower than the vendor's GEMM loses all that fusion saves, and the
        # fused one has not been timed on a GPU yet (issue 5).
        return "addmm"
    if impl == "triton":
        _triton.require("lora_linear", x.device)
        if x.dtype == torch.float64:
            raise KernelInputError(
                "lora_linear: impl is 'triton' and x is torch.float64, expected float16, bfloat16 "
                "or float32. Cast x and weight, or leave impl out."
            )
    return impl


def rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``; the product because -1 is ambiguous for an empty tensor."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _addmm(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        x2 = rows(x)
        s = x2 @ a.to(x.dtype).t()
        y = torch.nn.functional.linear(x2, weight, bias)
        # Scaled and accumulated by the GEMM itself: no temporary the size of y.
        y.addmm_(s, b.to(x.dtype).t(), alpha=scale)
        lead = x.shape[:-1]
        return y.view(*lead, weight.shape[0]), s.view(*lead, a.shape[0])


@torch.library.register_fake("mmopt::lora_linear")
def _lora_linear_fake(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty(*lead, weight.shape[0]), x.new_empty(*lead, a.shape[0])


@torch.library.impl("mmopt::lora_linear", "CompositeExplicitAutograd")
def _lora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    chosen = _resolve(impl, x)
    if chosen == "triton":
        from mmopt_kernels.lora_linear.kernel import launch  # first Triton import

        return launch(x, weight, a, b, bias, scale)
    if chosen == "addmm":
        return _addmm(x, weight, a, b, bias, scale)
    y, s = reference(x, weight, a, b, bias, scale)
    return y.contiguous(), s.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, a, b, _, ctx.scale, _ = inputs
    ctx.save_for_backward(x, weight, a, b, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    """Plain PyTorch, so that AOTAutograd and Inductor see through it.

    ds = scale dy b, db = scale dyᵀ s, da = dsᵀ x, dx = dy weight + ds a. The op's second output
    carries a gradient only when the backward itself is differentiated.
    """
    x, weight, a, b, s = ctx.saved_tensors
    need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    dx = dweight = da = db = dbias = None
    with torch.autocast(x.device.type, enabled=False):
        x2 = rows(x)
        a_cast = a.to(x.dtype)
        ds2 = None if ds is None else rows(ds)
        if dy is not None:
            dy2 = rows(dy)
            # scale joins the rank-r factor, the smallest tensor in reach.
            from_y = (dy2 @ b.to(x.dtype)) * ctx.scale
            ds2 = from_y if ds2 is None else ds2 + from_y
            if need_b:
                db = (dy2.t() @ (rows(s) * ctx.scale)).to(b.dtype)
            if need_weight:
                dweight = dy2.t() @ x2
            if need_bias:
                dbias = dy2.sum(0)
            if need_x:
                dx = (dy2 @ weight).addmm_(ds2, a_cast)
        elif need_x and ds2 is not None:
            dx = ds2 @ a_cast
        if need_a and ds2 is not None:
            da = (ds2.t() @ x2).to(a.dtype)
        if dx is not None:
            dx = dx.view(x.shape)
    return dx, dweight, da, db, dbias, None, None


torch.library.register_autograd("mmopt::lora_linear", _differentiate, setup_context=_save)


@register_flop_formula(torch.ops.mmopt.lora_linear)
def _lora_linear_flops(x: Any, weight: Any, a: Any, *args: Any, **kwargs: Any) -> int:
    N, K = weight
    R = a[0]
    # Two FLOPs for each multiply-add of x weightᵀ, x aᵀ and s bᵀ.
    return 2 * math.prod(x[:-1]) * (N * K + R * K + N * R)  # type: ignore[no-any-return]
