"""Whether Triton can run here, asked without importing it."""

import importlib.util
import os

import torch

from mmopt_kernels.errors import KernelInputError


def installed() -> bool:
    """Triton's package can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Kernels run in Triton's interpreter; read by Triton when it decorates a kernel."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def require(op: str, device: torch.device) -> None:
    """Raise unless a Triton kernel can run on tensors of ``device``."""
    if not installed():
        raise KernelInputError(
            f"{op}: impl is 'triton', expected an impl that can run here, because triton is not "
            "installed. Install triton, or leave impl out."
        )
    if device.type != "cuda" and not interpreting():
        raise KernelInputError(
            f"{op}: impl is 'triton' and the tensors are on {device}, expected a GPU. Move them "
            "to one, set TRITON_INTERPRET=1 before Python starts, or leave impl out."
        )


def dot_precision() -> str:
    """How ``tl.dot`` treats float32: as PyTorch's own matmuls are set to on this machine."""
    if torch.version.hip is None and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def must_widen(dtype: torch.dtype) -> bool:
    """Operands of ``tl.dot`` must be widened to float32 first.

    Triton's interpreter multiplies bfloat16 bit patterns as if they were integers
    (triton-lang/triton#11584). Products of bfloat16 are exact in float32, so widening them there
    changes nothing else.
    """
    return dtype == torch.bfloat16 and interpreting()
