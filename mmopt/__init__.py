"""Take a multimodal Hugging Face model from fine-tuning to a verified, served ONNX artifact.

Everything here is imported when first used: `import mmopt` costs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmopt.attach import OptimizationReport, optimize
    from mmopt.compilation import CompiledModel, compile, load_compiled
    from mmopt_kernels._version import __version__

# No submodule of mmopt may carry one of these names: importing it would replace the function.
_HOME = {
    "CompiledModel": "mmopt.compilation",
    "OptimizationReport": "mmopt.attach",
    "__version__": "mmopt_kernels._version",
    "compile": "mmopt.compilation",
    "load_compiled": "mmopt.compilation",
    "optimize": "mmopt.attach",
}

__all__ = [
    "CompiledModel",
    "OptimizationReport",
    "__version__",
    "compile",
    "load_compiled",
    "optimize",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
