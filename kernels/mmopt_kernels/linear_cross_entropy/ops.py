"""Schemas, fakes, autograd, FLOP formula and dispatch of the linear cross-entropy. Torch only.

`mmopt::linear_cross_entropy` sums weighted losses and returns the gradients of the sum with it.
`mmopt::linear_cross_entropy_tokens` returns each loss;
`mmopt::linear_cross_entropy_backward` is its backward, which knows the weights and computes the
logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmopt_kernels import _triton
from mmopt_kernels._autocast import without_autocast
from mmopt_kernels.errors import KernelInputError
from mmopt_kernels.linear_cross_entropy.chunked import (
    Arguments,
    Options,
    gradients_by_columns,
    run,
)
from mmopt_kernels.linear_cross_entropy.reference import reference, reference_backward

IMPLS = ("auto", "reference", "chunked", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_INPUTS = "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? a, Tensor? b"
_OPTIONS = "int ignore_index, float? softcap, float label_smoothing, float z_loss"

torch.library.define(
    "mmopt::linear_cross_entropy",
    f"({_INPUTS}, Tensor weights, {_OPTIONS}, bool[] needs, str impl)"
    " -> (Tensor total, Tensor losses, Tensor[] gradients)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mmopt::linear_cross_entropy_tokens",
    f"({_INPUTS}, {_OPTIONS}, str impl) -> (Tensor losses, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mmopt::linear_cross_entropy_backward",
    f"({_INPUTS}, Tensor weights, Tensor lse, {_OPTIONS}, bool[] needs, str impl) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def by_columns(weight: Tensor, impl: str) -> bool:
    """Whether gradients, that of this weight included, are best made in backward, by columns.

    By rows, a float32 sum as large as twice a weight of 16 bits is held beside its gradient, and
    both beside the scaled gradient in the end. In float32 the sum is the gradient. In float16 what
    is kept must be a gradient of the sum, see `_kept_dtypes`. On a CPU time is in the products.
    """
    if weight.dtype != torch.bfloat16 or impl == "reference":
        return False
    return weight.device.type != "cpu" or impl == "triton"


def _resolve(impl: str, hidden: Tensor) -> str:
    """The implementation to run. Only ``"auto"`` is free to choose; the others hold or raise."""
    if impl == "auto":
        able = _triton.on_gpu(hidden.device) and hidden.dtype != torch.float64
        return "triton" if able and _triton.installed() else "chunked"
    if impl == "triton":
        _triton.require("linear_cross_entropy", hidden.device)
        if hidden.dtype == torch.float64:
            raise KernelInputError(
                "linear_cross_entropy: impl is 'triton' and hidden is torch.float64, expected "
                "float16, bfloat16 or float32. Cast hidden and weight, or leave impl out."
            )
    return impl


def _check_labels(labels: Tensor, V: int, ignore_index: int) -> None:
    """Inside the op: Inductor turns an assertion in a graph into one that ends the process."""
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= V))
    if labels.device.type != "cpu":
        # The host must not wait for a device value.
        torch._assert_async(
            ~outside.any(),
            f"linear_cross_entropy: a label is neither in [0, {V}) nor {ignore_index}, the "
            f"ignore_index, expected one of these because weight has {V} rows.",
        )
    elif outside.any():
        place = int(outside.nonzero()[0])
        raise KernelInputError(
            f"linear_cross_entropy: label {int(labels[place])} of row {place} is out of range, "
            f"expected [0, {V}) because weight has {V} rows, or {ignore_index}, the ignore_index. "
            "Pass labels of this vocabulary, and mark what does not count with ignore_index."
        )


def _run(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    weights: Tensor | None,
    options: Options,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    hidden, weight, labels, bias, a, b = inputs
    _check_labels(labels, weight.shape[0], options.ignore_index)
    chosen = _resolve(impl, hidden)
    with without_autocast(hidden):
        cast = _cast(*inputs)
        if chosen == "reference":
            losses = reference(*cast, *options)
            lse = torch.zeros_like(losses)  # which its backward does not ask for
            found = []
            if any(needs) and weights is not None:
                gradients = reference_backward(weights, *cast, *options)
                pairs = zip(gradients, needs, strict=True)
                found = [g for g, need in pairs if need and g is not None]
        else:
            losses, lse, found = run(cast, weights, options, needs, chosen == "triton")
    dtypes = _kept_dtypes((hidden, weight, bias, a, b), needs)
    return losses, lse, [g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]


def _cast(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> Arguments:
    """Once for all chunks: the GEMMs of 16 bits want matching dtypes."""
    a, b = (None if x is None else x.to(hidden.dtype) for x in (a, b))
    return Arguments(hidden, weight, labels, bias, a, b)


def _kept_dtypes(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[torch.dtype]:
    """What forward keeps each needed gradient in.

    That of its tensor; but float16 cannot hold sums over all tokens before they are divided.
    """
    return [
        # The first is hidden, whose gradient is no sum.
        torch.float32 if i > 0 and x.dtype == torch.float16 else x.dtype
        for i, (x, need) in enumerate(zip(tensors, needs, strict=True))
        if need and x is not None
    ]


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@torch.library.register_fake("mmopt::linear_cross_entropy")
def _linear_cross_entropy_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    weights: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    wide = _wide(hidden)
    tensors = (hidden, weight, bias, a, b)
    wanted = [x for x, need in zip(tensors, needs, strict=True) if need and x is not None]
    gradients = [
        x.new_empty(x.shape, dtype=dtype)
        for x, dtype in zip(wanted, _kept_dtypes(tensors, needs), strict=True)
    ]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        gradients,
    )


@torch.library.impl("mmopt::linear_cross_entropy", "CompositeExplicitAutograd")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    weights: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    options = Options(ignore_index, softcap, label_smoothing, z_loss)
    inputs = (hidden, weight, labels, bias, a, b)
    losses, _, gradients = _run(inputs, weights, options, needs, impl)
    # A row that does not count has a loss of 0, whatever its weight.
    return (losses * weights).sum(), losses, gradients


@torch.library.register_fake("mmopt::linear_cross_entropy_tokens")
def _tokens_fake(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    losses, lse = (hidden.new_empty(hidden.shape[0], dtype=_wide(hidden)) for _ in range(2))
    return losses, lse


@torch.library.impl("mmopt::linear_cross_entropy_tokens", "CompositeExplicitAutograd")
def _tokens(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    options = Options(ignore_index, softcap, label_smoothing, z_loss)
    losses, lse, _ = _run((hidden, weight, labels, bias, a, b), None, options, [False] * 5, impl)
    return losses, lse


@torch.library.register_fake("mmopt::linear_cross_entropy_backward")
def _backward_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    weights: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    tensors = zip((hidden, weight, bias, a, b), needs, strict=True)
    return [x.new_empty(x.shape) for x, need in tensors if need and x is not None]


@torch.library.impl("mmopt::linear_cross_entropy_backward", "CompositeExplicitAutograd")
def _backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    weights: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    options = Options(ignore_index, softcap, label_smoothing, z_loss)
    inputs = (hidden, weight, labels, bias, a, b)
    if needs[1] and by_columns(weight, impl):
        triton = _resolve(impl, hidden) == "triton"
        with without_autocast(hidden):
            found = gradients_by_columns(_cast(*inputs), weights, lse, options, needs, triton)
    else:
        _, _, found = _run(inputs, weights, options, needs, impl)
    tensors = zip((hidden, weight, bias, a, b), needs, strict=True)
    wanted = [x for x, need in tensors if need and x is not None]
    return [g.to(x.dtype) for g, x in zip(found, wanted, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    hidden, weight, _, bias, a, b = inputs[:6]
    ctx.needs = inputs[11]
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, a, b)]
    _, losses, gradients = output
    ctx.save_for_backward(losses, *gradients)
    ctx.set_materialize_grads(False)


_TWICE = (
    "linear_cross_entropy: a second derivative was requested, expected first derivatives only. "
    "Drop create_graph=True, or compute the logits and use torch.nn.functional.cross_entropy."
)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor``, rounded once: in 16 bits the factor, a loss scale, could overflow."""
    if torch.is_grad_enabled():
        # To be differentiated again, which `_differentiate` refuses if it is.
        return (gradient.to(factor.dtype) * factor).to(dtype)
    # In one pass on a GPU, with no copy in float32: a factor of one dimension joins in the
    # promotion of dtypes, one of none would not.
    out = gradient.new_empty(gradient.shape, dtype=dtype)
    return torch.mul(gradient, factor.reshape(1), out=out)


def _differentiate(
    ctx: Any, dtotal: Tensor | None, dlosses: Tensor | None, dgradients: list[Tensor | None]
) -> tuple[Any, ...]:
    if dlosses is not None or any(d is not None for d in dgradients):
        raise NotImplementedError(_TWICE)
    losses, *gradients = ctx.saved_tensors
    found: list[Tensor | None] = [None] * 5
    if dtotal is not None:
        kept = iter(gradients)
        for i, need in enumerate(ctx.needs):
            if need:
                found[i] = _scaled(next(kept), dtotal, ctx.dtypes[i])
    dhidden, dweight, dbias, da, db = found
    dweights = losses * dtotal if ctx.needs_input_grad[6] and dtotal is not None else None
    return dhidden, dweight, None, dbias, da, db, dweights, *[None] * 6


torch.library.register_autograd("mmopt::linear_cross_entropy", _differentiate, setup_context=_save)


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, labels, bias, a, b, *ctx.options, ctx.impl = inputs
    _, lse = output
    ctx.save_for_backward(hidden, weight, labels, bias, a, b, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate_tokens(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    hidden, weight, labels, bias, a, b, lse = ctx.saved_tensors
    need_hidden, need_weight, _, *need_others = ctx.needs_input_grad[:6]
    needs = [need_hidden, need_weight, *need_others]
    gradients = torch.ops.mmopt.linear_cross_entropy_backward(
        hidden, weight, labels, bias, a, b, grad, lse, *ctx.options, needs, ctx.impl
    )
    kept = iter(gradients)
    dhidden, dweight, dbias, da, db = (next(kept) if need else None for need in needs)
    return dhidden, dweight, None, dbias, da, db, *[None] * 5


torch.library.register_autograd(
    "mmopt::linear_cross_entropy_tokens", _differentiate_tokens, setup_context=_save_tokens
)


def _refuse_second(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError(_TWICE)


torch.library.register_autograd("mmopt::linear_cross_entropy_backward", _refuse_second)


# Two FLOPs for each multiply-add.


def _flops(hidden: Any, weight: Any, a: Any, needs: Any) -> int:
    M, H = hidden
    V = weight[0]
    need_hidden, need_weight, _, need_a, need_b = needs
    products = M * V * H * (1 + need_hidden + need_weight)
    if a is not None:
        R = a[0]
        products += M * R * (H + V)  # s, its product with b
        products += M * R * V * ((need_hidden or need_a) + need_b)  # ds, db
        products += M * R * H * (need_hidden + need_a)
    return 2 * products  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.mmopt.linear_cross_entropy)
def _linear_cross_entropy_flops(
    hidden: Any,
    weight: Any,
    labels: Any,
    bias: Any,
    a: Any,
    b: Any,
    weights: Any,
    ignore_index: Any,
    softcap: Any,
    label_smoothing: Any,
    z_loss: Any,
    needs: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _flops(hidden, weight, a, needs)


@register_flop_formula(torch.ops.mmopt.linear_cross_entropy_tokens)
def _tokens_flops(
    hidden: Any, weight: Any, labels: Any, bias: Any, a: Any, *args: Any, **kwargs: Any
) -> int:
    return _flops(hidden, weight, a, [False] * 5)


@register_flop_formula(torch.ops.mmopt.linear_cross_entropy_backward)
def _backward_flops(
    hidden: Any,
    weight: Any,
    labels: Any,
    bias: Any,
    a: Any,
    b: Any,
    weights: Any,
    lse: Any,
    ignore_index: Any,
    softcap: Any,
    label_smoothing: Any,
    z_loss: Any,
    needs: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _flops(hidden, weight, a, needs)
