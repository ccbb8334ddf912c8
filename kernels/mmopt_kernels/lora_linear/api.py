"""The public LoRA linear function."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmopt_kernels._autocast import autocast_dtype
from mmopt_kernels.errors import KernelInputError
from mmopt_kernels.lora_linear.ops import DTYPES, IMPLS  # registers the op too

Impl = Literal["auto", "reference", "addmm", "triton"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float,
    impl: Impl = "auto",
) -> Tensor:
    """Apply a linear layer and its adapter: ``x @ weight.T + bias + scale * (x @ a.T) @ b.T``.

    The adapter's factors are cast to the dtype of ``x``, never the activation to theirs; each
    gradient comes back in its own tensor's dtype, and only for tensors that require it. Under
    autocast, everything (unless x is float64) runs in the autocast dtype, as ``linear`` does.

    Args:
        x: ``[..., K]`` float16, bfloat16, float32 or float64; any leading dimensions, empty ones
            included.
        weight: ``[N, K]``, dtype of ``x``; usually frozen.
        a: ``[R, K]``, any floating dtype (float32 adapters over a bfloat16 base are usual).
        b: ``[N, R]``, any floating dtype.
        bias: ``[N]``, dtype of ``x``, or None.
        scale: ``alpha / R`` (``alpha / sqrt(R)`` for rsLoRA), already divided.
        impl: ``"auto"``; ``"reference"`` (plain PyTorch in float32); ``"addmm"`` (vendor GEMMs,
            the adapter added in place); ``"triton"`` (one pass over the output; a GPU, or the CPU
            under ``TRITON_INTERPRET=1``; not float64). Only ``"auto"`` chooses by what can run;
            compiled for a CPU it is traced as plain PyTorch, which Inductor fuses.

    Returns:
        ``[..., N]`` in the dtype of ``x``, contiguous.

    Raises:
        KernelInputError: a shape, dtype or device does not match, or ``impl`` cannot run here.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, a, b, bias, impl)
    if impl == "auto" and x.device.type == "cpu" and torch.compiler.is_compiling():
        # On a CPU there is no kernel that Inductor could not make itself: left open, it fuses the
        # bias, the adapter's sum and what follows, which an op of its own keeps it from.
        return _plain(x, weight, a, b, bias, scale)
    y, _ = torch.ops.mmopt.lora_linear(x, weight, a, b, bias, float(scale), impl)
    return y  # type: ignore[no-any-return]


def _plain(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    # Everything has autocast's dtype by now, or float64, which it leaves alone. To switch it off as
    # well would keep the graph out of AOTAutograd's cache.
    linear = torch.nn.functional.linear
    s = linear(x, a.to(x.dtype))
    return linear(x, weight, bias) + linear(s, b.to(x.dtype)) * scale


def _check(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, impl: str) -> None:
    if impl not in IMPLS:
        raise KernelInputError(
            f"lora_linear: impl is {impl!r}, expected one of {', '.join(IMPLS)}. "
            "Leave impl out to choose by what can run."
        )
    if x.dim() == 0 or x.dtype not in DTYPES:
        raise KernelInputError(
            f"lora_linear: x is {x.dtype} {tuple(x.shape)}, expected [..., K] in float16, "
            "bfloat16, float32 or float64. Cast x to the dtype of the base layer."
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise KernelInputError(
            f"lora_linear: weight has shape {tuple(weight.shape)}, expected [N, {x.shape[-1]}] "
            f"because x has {x.shape[-1]} features. Pass the weight as nn.Linear stores it."
        )
    if a.dim() != 2 or a.shape[1] != x.shape[-1]:
        raise KernelInputError(
            f"lora_linear: a has shape {tuple(a.shape)}, expected [R, {x.shape[-1]}] because x has "
            f"{x.shape[-1]} features. Pass the adapter made for this layer, a as lora_A stores it."
        )
    if b.shape != (weight.shape[0], a.shape[0]):
        raise KernelInputError(
            f"lora_linear: b has shape {tuple(b.shape)}, expected "
            f"({weight.shape[0]}, {a.shape[0]}) because weight has {weight.shape[0]} rows and a "
            f"has rank {a.shape[0]}. Pass a and b from the same adapter."
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise KernelInputError(
            f"lora_linear: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) "
            f"because weight has {weight.shape[0]} rows. Pass weight and bias of the same layer."
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise KernelInputError(
                f"lora_linear: {name} has dtype {t.dtype}, expected {x.dtype} like x. "
                "Cast x to the base layer's dtype, or run under torch.autocast."
            )
    for name, t in (("a", a), ("b", b)):
        if not t.is_floating_point():
            raise KernelInputError(
                f"lora_linear: {name} has dtype {t.dtype}, expected a floating dtype. "
                "Dequantize the adapter first."
            )
    for name, t in (("weight", weight), ("a", a), ("b", b), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise KernelInputError(
                f"lora_linear: {name} is on {t.device}, expected {x.device} like x. "
                f"Move {name} to {x.device}."
            )
