"""What the tensor memory accelerator (TMA) of a GPU can be told to load and store."""

from __future__ import annotations

from torch import Tensor


def has_tma(target: str) -> bool:
    """The target has a tensor memory accelerator: NVIDIA's from compute capability 9.0 on."""
    return target.startswith("sm_") and int(target[3:]) >= 90


def describable(*tensors: Tensor) -> bool:
    """A TMA descriptor can describe each of these, as it is stored.

    The last stride must be 1, and the base and every other stride multiples of 16 bytes (CUDA
    driver API, cuTensorMapEncodeTiled). Of an expanded tensor, with a stride of 0, it says nothing.
    """
    for x in tensors:
        if x.numel() == 0 or x.data_ptr() % 16 or (x.stride(-1) != 1 and x.shape[-1] > 1):
            return False
        step = 16 // x.element_size()
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size > 1 and (stride % step or stride == 0):
                return False
    return True
