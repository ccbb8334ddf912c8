"""Probability and seed of an op's dropout: checked, and the seed brought to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from mmopt_kernels.errors import KernelInputError


def check_dropout(
    op: str, dropout_p: float, seed: int | Tensor | None, like: str, x: Tensor
) -> None:
    """Raise unless both can be used. ``like`` is the name of ``x``, whose device counts."""
    # Written so that NaN is refused.
    if not 0.0 <= dropout_p < 1.0:
        raise KernelInputError(
            f"{op}: dropout_p is {dropout_p}, expected a probability in [0, 1). "
            "For no dropout, as in evaluation, pass 0."
        )
    if dropout_p == 0 or seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise KernelInputError(
                f"{op}: seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}, expected "
                f"torch.int64 of one element on {x.device} like {like}. Pass an int, or such a "
                "tensor."
            )
    elif not isinstance(seed, int | torch.SymInt):
        raise KernelInputError(
            f"{op}: seed is {seed!r} of type {type(seed).__name__}, expected an int, or a tensor "
            "of one int64. A part of a number would be lost: pass int(seed)."
        )
    elif not -(2**63) <= seed < 2**63:
        raise KernelInputError(
            f"{op}: seed is {seed}, expected 64 bits: -2**63 or more and below 2**63. "
            "Take it modulo 2**63."
        )


def seed_on(device: torch.device, seed: int | Tensor | None) -> Tensor:
    """An int64 tensor of one element; None draws one."""
    if seed is None:
        # On the device, where checkpointing and torch.compile save and replay the generator.
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, Tensor):
        return seed
    # Unlike torch.tensor, this waits for no copy to a GPU.
    return torch.full((1,), seed, dtype=torch.int64, device=device)
