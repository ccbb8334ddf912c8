"""From a checkpoint and its adapter to a verified ONNX artifact, and the runtime that runs it.

`Runner` and `verify` need neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmopt_export.checkpoint import Checkpoint, load_checkpoint
    from mmopt_export.manifest import Manifest, read_manifest
    from mmopt_export.pipeline import ExportReport, export
    from mmopt_export.runtime import Runner
    from mmopt_export.verification import VerifyReport, verify

_MODULES = {
    "Checkpoint": "checkpoint",
    "ExportReport": "pipeline",
    "Manifest": "manifest",
    "Runner": "runtime",
    "VerifyReport": "verification",
    "export": "pipeline",
    "load_checkpoint": "checkpoint",
    "read_manifest": "manifest",
    "verify": "verification",
}

__all__ = [
    "Checkpoint",
    "ExportReport",
    "Manifest",
    "Runner",
    "VerifyReport",
    "export",
    "load_checkpoint",
    "read_manifest",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import on first use: serving must not pay for torch."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
