"""The public linear cross-entropy function."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmopt_kernels._autocast import autocast_dtype
from mmopt_kernels._scale import check_scale
from mmopt_kernels._transforms import refuse_transforms
from mmopt_kernels.errors import KernelInputError

# Registers the ops too.
from mmopt_kernels.linear_cross_entropy.ops import DTYPES, IMPLS, by_columns

Impl = Literal["auto", "reference", "chunked", "triton"]
Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


class LoraFactors(NamedTuple):
    """The adapter of the output layer.

    Attributes:
        a: ``[R, H]``, any floating dtype.
        b: ``[V, R]``, any floating dtype.
        scale: ``alpha / R``, already divided; a tensor of no dimension is differentiable.
    """

    a: Tensor
    b: Tensor
    scale: float | Tensor = 1.0


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    token_weights: Tensor | None = None,
    lora: LoraFactors | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy between ``hidden @ weight.T + bias`` and labels, a chunk of rows at a time.

    The logits of a chunk are turned into their own gradient as soon as they are there, and that
    into the gradients of the arguments, so that forward does all three matmuls and backward only
    scales: no logits are kept, none are computed twice. With ``reduction="none"`` each token's
    gradient is known only in backward, which computes the logits again. So it is, on a GPU, where a
    bfloat16 weight is trained: backward then goes by chunks of the vocabulary, needs little more
    memory than the weight's gradient takes, and rounds that once.

    Every argument that requires a gradient gets one, the adapter of the output layer included; a
    frozen weight costs nothing. Gradients are bitwise equal from run to run. Under autocast,
    hidden, weight and bias (unless float64) are cast to its dtype, as ``linear`` casts them; the
    loss is computed in float32 from there.

    Args:
        hidden: ``[..., H]`` float16, bfloat16, float32 or float64.
        weight: ``[V, H]``, dtype of ``hidden``.
        labels: integers ``[...]``, each in ``[0, V)`` or ``ignore_index``. For a causal language
            model the caller has shifted them.
        bias: ``[V]``, dtype of ``hidden``, or None.
        ignore_index: the label of a token that does not count.
        softcap: c in ``c * tanh(logit / c)``, applied to the logits first, or None.
        label_smoothing: in ``[0, 1]``, as in ``torch.nn.functional.cross_entropy``.
        z_loss: weight of ``logsumexp(logits) ** 2``, added to the loss of each token.
        reduction: ``"mean"`` over the tokens that count, by their weights (when none does, NaN with
            gradients of zero, as in PyTorch); ``"sum"``, to be divided by the caller, for instance
            by the tokens of all accumulated batches; ``"none"``.
        token_weights: ``[...]`` floating, what each token's loss is multiplied with, or None for
            ones. Differentiable.
        lora: the output layer's adapter: ``scale * (hidden @ a.T) @ b.T`` is added to the logits.
        impl: ``"auto"``; ``"reference"`` (all logits at once, in float32); ``"chunked"`` (PyTorch);
            ``"triton"`` (vendor GEMMs and one kernel that replaces logits by their gradient; a
            GPU, or the CPU under ``TRITON_INTERPRET=1``; not float64). Only ``"auto"`` chooses.

    Returns:
        float32 (float64 for float64), of no dimension, or ``[...]`` for ``"none"``, where ignored
        tokens have 0.

    Raises:
        KernelInputError: a shape, dtype, device or option does not match, a label is out of range
            (on a GPU an assertion on the device says so, later), or ``impl`` cannot run here.
        NotImplementedError: a transform of `torch.func`, or forward mode, would differentiate
            the call.

    Sources: Hsu et al. 2024, arXiv:2410.10989 (gradients in forward, by chunks); Szegedy et al.
    2016, arXiv:1512.00567 (label smoothing); Chowdhery et al. 2022, arXiv:2204.02311 (z-loss).
    """
    refuse_transforms("linear_cross_entropy", hidden, weight, bias, token_weights, lora)
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden, weight, labels, bias, token_weights, lora)
    if lora is not None and isinstance(lora.scale, Tensor):
        why = "the op takes one adapter"
        check_scale("linear_cross_entropy", "lora.scale", lora.scale, None, why, "hidden", hidden)
    _check_options(softcap, label_smoothing, z_loss, reduction, impl)
    a = b = None
    if lora is not None:
        a = lora.a
        # As a tensor's, so that no value of a float compiles anything again; not rounded yet.
        b = (lora.b if lora.b.dtype == torch.float64 else lora.b.float()) * lora.scale
    rows, y = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1)
    options = (
        ignore_index,
        None if softcap is None else float(softcap),
        float(label_smoothing),
        float(z_loss),
    )
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counts = (y != ignore_index).to(wide)
    if token_weights is not None:
        counts = counts * token_weights.reshape(-1).to(wide)
    needs = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (rows, weight, bias, a, b)
    ]
    total: Tensor
    if reduction == "none" or (needs[1] and by_columns(weight, impl)):
        losses: Tensor
        losses, _ = torch.ops.mmopt.linear_cross_entropy_tokens(
            rows, weight, y, bias, a, b, *options, impl
        )
        losses = losses if token_weights is None else losses * counts
        if reduction == "none":
            return losses.view(labels.shape)
        total = losses.sum()
    else:
        total, _, _ = torch.ops.mmopt.linear_cross_entropy(
            rows, weight, y, bias, a, b, counts, *options, needs, impl
        )
    # Divided here, so that what forward keeps has the size of a gradient of the sum: divided by
    # the number of tokens, most of it would be less than float16 can hold.
    return _mean(total, counts.sum()) if reduction == "mean" else total


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """NaN where nothing counts, with gradients of zero, both as in PyTorch.

    A division by zero would hand NaN to every parameter, for one batch without a label.
    """
    some = count != 0
    return torch.where(some, total / torch.where(some, count, 1.0), torch.nan)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    lora: LoraFactors | None,
) -> None:
    op = "linear_cross_entropy"
    if hidden.dim() == 0 or hidden.dtype not in DTYPES:
        raise KernelInputError(
            f"{op}: hidden is {hidden.dtype} {tuple(hidden.shape)}, expected [..., H] in float16, "
            "bfloat16, float32 or float64. Pass what the output layer would be given."
        )
    lead, H = tuple(hidden.shape[:-1]), hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != H:
        raise KernelInputError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected [V, {H}] because hidden has "
            f"{H} features. Pass the output layer's weight as nn.Linear stores it."
        )
    V = weight.shape[0]
    if tuple(labels.shape) != lead:
        raise KernelInputError(
            f"{op}: labels have shape {tuple(labels.shape)}, expected {lead} because hidden has "
            f"shape {tuple(hidden.shape)}. Give each row one label."
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise KernelInputError(
            f"{op}: labels have dtype {labels.dtype}, expected int64 or int32. "
            "Pass class numbers; probabilities as targets are not supported."
        )
    if bias is not None and bias.shape != (V,):
        raise KernelInputError(
            f"{op}: bias has shape {tuple(bias.shape)}, expected ({V},) because weight has {V} "
            "rows. Pass weight and bias of the same layer."
        )
    if token_weights is not None and (
        tuple(token_weights.shape) != lead or not token_weights.is_floating_point()
    ):
        raise KernelInputError(
            f"{op}: token_weights are {token_weights.dtype} {tuple(token_weights.shape)}, expected "
            f"a floating dtype and {lead} like labels. Give each token one weight."
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise KernelInputError(
                f"{op}: {name} has dtype {x.dtype}, expected {hidden.dtype} like hidden. "
                "Cast hidden to the output layer's dtype, or run under torch.autocast."
            )
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    if a is not None and b is not None:
        if a.dim() != 2 or a.shape[1] != H:
            raise KernelInputError(
                f"{op}: lora.a has shape {tuple(a.shape)}, expected [R, {H}] because hidden has "
                f"{H} features. Pass the output layer's adapter, a as lora_A stores it."
            )
        if b.shape != (V, a.shape[0]):
            raise KernelInputError(
                f"{op}: lora.b has shape {tuple(b.shape)}, expected ({V}, {a.shape[0]}) because "
                f"weight has {V} rows and lora.a has rank {a.shape[0]}. Pass a and b of the same "
                "adapter."
            )
        if not (a.is_floating_point() and b.is_floating_point()):
            raise KernelInputError(
                f"{op}: lora.a is {a.dtype} and lora.b is {b.dtype}, expected floating dtypes. "
                "Dequantize the adapter first."
            )
    tensors = {
        "weight": weight,
        "labels": labels,
        "bias": bias,
        "token_weights": token_weights,
        "lora.a": a,
        "lora.b": b,
    }
    for name, t in tensors.items():
        if t is not None and t.device != hidden.device:
            raise KernelInputError(
                f"{op}: {name} is on {t.device}, expected {hidden.device} like hidden. "
                f"Move it to {hidden.device}."
            )


def _check_options(
    softcap: float | None, label_smoothing: float, z_loss: float, reduction: str, impl: str
) -> None:
    op = "linear_cross_entropy"
    if impl not in IMPLS:
        raise KernelInputError(
            f"{op}: impl is {impl!r}, expected one of {', '.join(IMPLS)}. "
            "Leave impl out to choose by what can run."
        )
    if reduction not in REDUCTIONS:
        raise KernelInputError(
            f"{op}: reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}."
            " Leave it out for the mean."
        )
    # Written so that NaN is refused.
    if softcap is not None and not 0 < softcap < math.inf:
        raise KernelInputError(
            f"{op}: softcap is {softcap}, expected a finite number above 0. For no cap, pass None."
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise KernelInputError(
            f"{op}: label_smoothing is {label_smoothing}, expected at least 0 and at most 1. "
            "Leave it out for none."
        )
    if not 0.0 <= z_loss < math.inf:
        raise KernelInputError(
            f"{op}: z_loss is {z_loss}, expected a finite number of at least 0. "
            "Leave it out for none."
        )
