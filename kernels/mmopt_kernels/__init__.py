"""Fused ops for multimodal training: schema, reference and Triton kernels. Needs only torch.

Imported when first used: the errors and the version cost no torch, which serving does without.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mmopt_kernels._version import __version__
from mmopt_kernels.errors import CheckFailedError, InputError, KernelInputError, MmoptError

if TYPE_CHECKING:
    from mmopt_kernels.attention import Intervals, attention
    from mmopt_kernels.dequantize_nf4 import dequantize_nf4
    from mmopt_kernels.linear_cross_entropy import LoraFactors, linear_cross_entropy
    from mmopt_kernels.lora_linear import Projection, lora_linear, lora_linear_group
    from mmopt_kernels.quantized import Int8Weight, NF4Weight

_HOME = {
    "Int8Weight": "mmopt_kernels.quantized",
    "Intervals": "mmopt_kernels.attention",
    "LoraFactors": "mmopt_kernels.linear_cross_entropy",
    "NF4Weight": "mmopt_kernels.quantized",
    "Projection": "mmopt_kernels.lora_linear",
    "attention": "mmopt_kernels.attention",
    "dequantize_nf4": "mmopt_kernels.dequantize_nf4",
    "linear_cross_entropy": "mmopt_kernels.linear_cross_entropy",
    "lora_linear": "mmopt_kernels.lora_linear",
    "lora_linear_group": "mmopt_kernels.lora_linear",
}

__all__ = [
    "CheckFailedError",
    "InputError",
    "Int8Weight",
    "Intervals",
    "KernelInputError",
    "LoraFactors",
    "MmoptError",
    "NF4Weight",
    "Projection",
    "__version__",
    "attention",
    "dequantize_nf4",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
]


class _Package(ModuleType):
    """An op's folder has the name of its function, and here the name means the function.

    Importing a submodule binds it on its package, at a time that depends on who imports what
    first. Reach into a folder with `from mmopt_kernels.attention.kernel import ...`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        setattr(sys.modules[__name__], name, value)
        return value
    raise AttributeError(f"module 'mmopt_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
