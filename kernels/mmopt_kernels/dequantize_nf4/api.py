"""The public dequantization of an NF4 weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmopt_kernels.dequantize_nf4.ops import DTYPES, IMPLS  # registers the op too
from mmopt_kernels.errors import KernelInputError
from mmopt_kernels.quantized import NF4Weight, check, dense, flatten

Impl = Literal["auto", "reference", "triton"]


def dequantize_nf4(
    weight: NF4Weight, dtype: torch.dtype = torch.bfloat16, *, impl: Impl = "auto"
) -> Tensor:
    """The dense ``[N, K]`` weight, its absmax dequantized in the same pass where that is doubled.

    Each value is a float32 product, rounded once to ``dtype``. Not differentiable: a quantized base
    is frozen.

    Args:
        weight: as bitsandbytes stores it; `NF4Weight.from_bitsandbytes` takes one over.
        dtype: float16, bfloat16, float32 or float64.
        impl: ``"auto"``; ``"reference"`` (plain PyTorch, in slices of some MB); ``"triton"`` (a
            GPU, or the CPU under ``TRITON_INTERPRET=1``; not float64). Only ``"auto"`` chooses by
            what can run.

    Returns:
        ``[N, K]`` in ``dtype``, contiguous: bit by bit what bitsandbytes' ``dequantize_4bit`` gives
        on a CPU for the same dtype. Not so where K is a multiple of 32 but not of the blocksize and
        the CPU has AVX512: version 0.50.2 then takes the wrong absmax for most blocks.

    Raises:
        KernelInputError: the parts of the weight do not fit together, the dtype is none of those,
            or ``impl`` cannot run here.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    if not isinstance(weight, NF4Weight):
        raise KernelInputError(
            f"dequantize_nf4: weight is a {type(weight).__name__}, expected an NF4Weight. Make one "
            "with NF4Weight.from_bitsandbytes(layer.weight)."
        )
    if dtype not in DTYPES:
        raise KernelInputError(
            f"dequantize_nf4: dtype is {dtype}, expected float16, bfloat16, float32 or float64. "
            "Pass the dtype of the activations."
        )
    if impl not in IMPLS:
        raise KernelInputError(
            f"dequantize_nf4: impl is {impl!r}, expected one of {', '.join(IMPLS)}. "
            "Leave impl out to choose by what can run."
        )
    check("dequantize_nf4", weight)
    return dense(*flatten(weight), dtype, impl)
