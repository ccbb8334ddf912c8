"""The dtype that autocast asks for; ops follow it the way PyTorch's own matmuls do."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to cast to when autocast is on for the device of ``x``; float64 is left alone.

    Casting in the public function rather than with ``torch.library.register_autocast`` because
    that takes one dtype at registration, while autocast's dtype is the caller's choice.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off for the device of ``x``; there is none for meta tensors."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
