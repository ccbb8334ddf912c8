"""What the tensor memory accelerator (TMA) of a GPU is told to load and store."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


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


def descriptor(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """Of a `describable` tensor, by such blocks; Triton encodes it anew at every launch."""
    *steps, _ = x.stride()
    if 1 in x.shape:
        # No step is ever taken along a dimension of size 1, whose stride may be anything.
        pairs = list(zip(x.shape, steps, strict=False))
        widest = max((step for n, step in pairs if n > 1), default=block[-1])
        steps = [step if n > 1 else widest for n, step in pairs]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], list(block))
