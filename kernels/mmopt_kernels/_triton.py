"""Whether Triton can run here and for which target, asked without importing it; launch sizes."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
    if not on_gpu(device) and not interpreting():
        raise KernelInputError(
            f"{op}: impl is 'triton' and the tensors are on {device}, expected a GPU. Move them "
            "to one, set TRITON_INTERPRET=1 before Python starts, or leave impl out."
        )


# Set while kernels are compiled for a target that this machine need not have.
_ASSUMED: ContextVar[str | None] = ContextVar("_ASSUMED", default=None)

INTERPRETER = "interpreter"


def target(device: torch.device) -> str:
    """What kernels are built for on ``device``: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.

    Tiles are chosen by it. `assuming` overrides it.
    """
    assumed = _ASSUMED.get()
    if assumed is not None:
        return assumed
    if device.type != "cuda":
        return INTERPRETER
    return _target_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _target_of(index: int) -> str:
    if torch.version.hip is not None:
        # "gfx942:sramecc+:xnack-"
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@contextmanager
def assuming(target: str) -> Iterator[None]:
    """Launchers inside choose what they would on ``target``, whatever this machine has."""
    token = _ASSUMED.set(target)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def on_gpu(device: torch.device) -> bool:
    """Tensors of ``device`` are on a GPU, or stand for such: meta tensors inside `assuming`."""
    return device.type == "cuda" or (device.type == "meta" and _ASSUMED.get() is not None)


def dot_precision() -> str:
    """How ``tl.dot`` treats float32: as PyTorch's own matmuls are set to on this machine."""
    assumed = _ASSUMED.get()
    hip = torch.version.hip is not None if assumed is None else assumed.startswith("gfx")
    if not hip and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def must_widen(dtype: torch.dtype) -> bool:
    """Operands of ``tl.dot`` must be widened to float32 first.

    Triton's interpreter multiplies bfloat16 bit patterns as if they were integers
    (triton-lang/triton#11584). Products of bfloat16 are exact in float32, so widening them there
    changes nothing else.
    """
    return dtype == torch.bfloat16 and interpreting()


# Triton's own of these names work within kernels too, and find out at each call where they are: a
# dozen calls of 4 microseconds were a third of the Python around a launch.


def cdiv(n: int, divisor: int) -> int:
    """How many pieces of at most ``divisor`` make ``n``."""
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``, and 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
