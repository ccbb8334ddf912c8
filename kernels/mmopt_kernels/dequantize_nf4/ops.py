"""Schema, fake, FLOP formula and dispatch of NF4 dequantization. Needs only torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmopt_kernels import _triton
from mmopt_kernels.dequantize_nf4.reference import reference
from mmopt_kernels.errors import KernelInputError

if TYPE_CHECKING:
    from mmopt_kernels.quantized import NF4Weight

IMPLS = ("auto", "reference", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

torch.library.define(
    "mmopt::dequantize_nf4",
    "(Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code,"
    " Tensor? offset, SymInt N, SymInt K, int blocksize, ScalarType dtype, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def dequantize(weight: NF4Weight, dtype: torch.dtype, impl: str) -> Tensor:
    """Call the op on a weight whose parts fit together and that has its own table."""
    return torch.ops.mmopt.dequantize_nf4(  # type: ignore[no-any-return]
        weight.packed,
        weight.absmax,
        weight.code,
        weight.nested_absmax,
        weight.nested_code,
        weight.offset,
        *weight.shape,
        weight.blocksize,
        dtype,
        impl,
    )


def _resolve(impl: str, packed: Tensor, dtype: torch.dtype) -> str:
    """The implementation to run. Only ``"auto"`` is free to choose; the others hold or raise."""
    if impl == "auto":
        able = _triton.on_gpu(packed.device) and dtype != torch.float64 and _triton.installed()
        return "triton" if able else "reference"
    if impl == "triton":
        _triton.require("dequantize_nf4", packed.device)
        if dtype == torch.float64:
            raise KernelInputError(
                "dequantize_nf4: impl is 'triton' and dtype is torch.float64, expected float16, "
                "bfloat16 or float32. Leave impl out."
            )
    return impl


@torch.library.register_fake("mmopt::dequantize_nf4")
def _dequantize_nf4_fake(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return packed.new_empty(N, K, dtype=dtype)


@torch.library.impl("mmopt::dequantize_nf4", "CompositeExplicitAutograd")
def _dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    args = (packed, absmax, code, nested_absmax, nested_code, offset, N, K, blocksize, dtype)
    if _resolve(impl, packed, dtype) == "triton":
        from mmopt_kernels.dequantize_nf4.kernel import launch  # first Triton import

        return launch(*args)
    return reference(*args)


def _refuse_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise NotImplementedError(
        "dequantize_nf4: a gradient of the quantized weight was requested, expected a frozen one: "
        "its bytes cannot be trained. Train an adapter beside it, and leave requires_grad off for "
        "the weight and its state."
    )


torch.library.register_autograd("mmopt::dequantize_nf4", _refuse_gradient)


@register_flop_formula(torch.ops.mmopt.dequantize_nf4)
def _dequantize_nf4_flops(
    packed: Any,
    absmax: Any,
    code: Any,
    nested_absmax: Any,
    nested_code: Any,
    offset: Any,
    N: int,
    K: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    # A product for each value; those of the nested absmax, 1 in 64, do not count.
    return N * K
