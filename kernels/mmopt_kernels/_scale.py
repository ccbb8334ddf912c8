"""A LoRA adapter's scale that is a tensor, checked: every op with an adapter takes one."""

from __future__ import annotations

from torch import Tensor

from mmopt_kernels.errors import KernelInputError


def check_scale(
    op: str, name: str, scale: Tensor, adapters: int | None, why: str, like: str, x: Tensor
) -> None:
    """Raise unless scale is one real number, or one for each of the adapters, for a call on x.

    Args:
        name: what the op calls the scale.
        adapters: how many a stack holds; None where there is no stack.
        why: what makes it so many.
        like: the name of x, whose device counts.
    """
    if scale.dim() and tuple(scale.shape) != (adapters,):
        expected = "()" if adapters is None else f"() or ({adapters},)"
        raise KernelInputError(
            f"{op}: {name} has shape {tuple(scale.shape)}, expected {expected} because {why}. "
            "Pass one number for each adapter."
        )
    if scale.is_complex():
        raise KernelInputError(
            f"{op}: {name} is {scale.dtype}, expected a real number. Pass alpha / R."
        )
    # A tensor without dimensions may stay on the CPU, as in PyTorch's own arithmetic.
    if scale.device != x.device and (scale.dim() or scale.device.type != "cpu"):
        raise KernelInputError(
            f"{op}: {name} is on {scale.device}, expected {x.device} like {like}. "
            f"Move it to {x.device}."
        )
