"""The dtype that autocast asks for; ops follow it the way PyTorch's own matmuls do."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to cast to when autocast is on for the device of ``x``; float64 is left alone.

    Casting in the public function rather than with ``torch.library.register_autocast`` because
    that takes one dtype at registration, while autocast's dtype is the caller's choice.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)
