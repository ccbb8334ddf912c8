"""From a checkpoint and its adapter to a verified ONNX artifact, and the runtime that runs it.

`Runner` and `verify` need neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmopt_export.adapters.files import AdapterSet
    from mmopt_export.adapters.spec import AdapterSpec
    from mmopt_export.checkpoint import Checkpoint, load_checkpoint
    from mmopt_export.encoder_decoder.speech import Transcriber
    from mmopt_export.encoder_decoder.text import TextGenerator
    from mmopt_export.generation import Generator, Sampling
    from mmopt_export.manifest import Manifest, read_manifest
    from mmopt_export.multimodal import MultimodalGenerator
    from mmopt_export.pipeline import ExportReport, export
    from mmopt_export.runtime import Runner
    from mmopt_export.verification import VerifyReport, verify

_MODULES = {
    "AdapterSet": "adapters.files",
    "AdapterSpec": "adapters.spec",
    "Checkpoint": "checkpoint",
    "ExportReport": "pipeline",
    "Generator": "generation",
    "Manifest": "manifest",
    "MultimodalGenerator": "multimodal",
    "Runner": "runtime",
    "Sampling": "generation",
    "TextGenerator": "encoder_decoder.text",
    "Transcriber": "encoder_decoder.speech",
    "VerifyReport": "verification",
    "export": "pipeline",
    "load_checkpoint": "checkpoint",
    "read_manifest": "manifest",
    "verify": "verification",
}

__all__ = [
    "AdapterSet",
    "AdapterSpec",
    "Checkpoint",
    "ExportReport",
    "Generator",
    "Manifest",
    "MultimodalGenerator",
    "Runner",
    "Sampling",
    "TextGenerator",
    "Transcriber",
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
