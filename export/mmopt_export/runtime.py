"""Runs an artifact on ONNX Runtime: the one place that opens sessions. Needs no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from packaging.version import Version

from mmopt_export.manifest import Manifest, integrity_errors, read_manifest
from mmopt_export.threads import usable_cores
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError

Tensors = dict[str, npt.NDArray[Any]]

MODEL_NAME = "model.onnx"


def open_session(
    model: Path,
    *,
    provider: str,
    threads: int | None = None,
    optimize: bool = True,
    profile: Path | None = None,
) -> Any:
    """Open an `onnxruntime.InferenceSession` of `model` on one provider, with no silent fallback.

    Args:
        model: the ONNX file; external data must lie beside it.
        provider: the execution provider that must be there.
        threads: intra-op threads; None takes every core that this process may use.
        optimize: whether ONNX Runtime's graph optimizations run.
        profile: prefix of the file that `session.end_profiling()` then writes.

    Raises:
        MmoptError: onnxruntime is missing, lacks the provider, or cannot load the file (exit 3).
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MmoptError(
            f"onnxruntime cannot be imported ({error}). Run `pip install 'mmopt[cpu]'`, or "
            "`pip install 'mmopt[cuda]'` on a machine with an NVIDIA GPU."
        ) from error
    if provider not in onnxruntime.get_available_providers():
        raise MmoptError(
            f"ONNX Runtime {onnxruntime.__version__} here has no {provider}, only "
            f"{', '.join(onnxruntime.get_available_providers())}. Run `mmopt doctor`."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    # Fatal only: errors are raised as well, and a client's bad ids must not fill a server's log.
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=[provider])
    except runtime_errors() as error:
        raise MmoptError(f"ONNX Runtime cannot load {model}: {error}") from error
    if session.get_providers()[0] != provider:
        raise MmoptError(
            f"ONNX Runtime opened {model} on {session.get_providers()[0]}, expected {provider}. "
            "Run `mmopt doctor`."
        )
    return session


def runtime_errors() -> tuple[type[Exception], ...]:
    """Every exception that ONNX Runtime raises of its own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(
        value
        for value in vars(state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    )


def runtime_version() -> str:
    """The version of the installed ONNX Runtime, whichever distribution it came from."""
    import onnxruntime

    return str(onnxruntime.__version__)


class Runner:
    """An artifact, checked and opened, ready to run.

    Args:
        artifact: a folder that `mmopt export` wrote.
        threads: intra-op threads; None takes every core that this process may use.

    Raises:
        InputError: the folder is not an artifact.
        CheckFailedError: its parity check had failed, or a file differs from the manifest.
        MmoptError: ONNX Runtime is missing or older than the artifact needs.
    """

    def __init__(self, artifact: Path, *, threads: int | None = None) -> None:
        self.path = artifact
        self.manifest: Manifest = read_manifest(artifact)
        if self.manifest.status != "verified":
            raise CheckFailedError(
                f"{artifact} is marked {self.manifest.status}: its parity check did not hold. "
                "Read parity.json there and export again."
            )
        require_integrity(artifact, self.manifest)
        require_runtime(self.manifest)
        self.provider = self.manifest.provider
        self._session = open_session(artifact / MODEL_NAME, provider=self.provider, threads=threads)
        self._tokenizer = _load_tokenizer(artifact)

    def tokenize(self, texts: Sequence[str]) -> Tensors:
        """Encode texts as the graph's inputs, int64 `[B, L]`, padded to the longest of them."""
        encodings = self._tokenizer.encode_batch(list(texts))
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        return {
            spec.name: np.asarray(columns[spec.name], dtype=np.int64)
            for spec in self.manifest.inputs
        }

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """Run the graph on named inputs and return its named outputs."""
        names = [spec.name for spec in self.manifest.outputs]
        values = self._session.run(names, dict(feeds))
        return dict(zip(names, values, strict=True))

    def classify(self, texts: Sequence[str], *, batch_size: int = 32) -> npt.NDArray[np.float32]:
        """Logits `[len(texts), labels]`, batched by length so that little of it is padding."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        logits = np.empty((len(texts), len(self.manifest.labels)), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logits[chosen] = self.run(self.tokenize([texts[i] for i in chosen]))["logits"]
        return logits


def require_integrity(artifact: Path, manifest: Manifest) -> None:
    """Raise CheckFailedError naming each file that differs from the manifest."""
    if errors := integrity_errors(artifact, manifest):
        raise CheckFailedError(
            f"{artifact} is not what was exported: {'; '.join(errors)}. "
            "Copy the artifact again or export the model again."
        )


def require_runtime(manifest: Manifest) -> None:
    """Raise MmoptError when the installed ONNX Runtime is older than the artifact needs."""
    try:
        import onnxruntime
    except ImportError:
        return  # open_session says it better
    if Version(onnxruntime.__version__) < Version(manifest.minimum_onnxruntime):
        raise MmoptError(
            f"the artifact needs onnxruntime {manifest.minimum_onnxruntime} or newer, found "
            f"{onnxruntime.__version__}. Run `pip install -U onnxruntime`."
        )


def _load_tokenizer(artifact: Path) -> Any:
    from tokenizers import Tokenizer

    path = artifact / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{artifact} has no tokenizer.json. Export the model again.")
    # Truncation, padding token and side were fixed in the file at export.
    return Tokenizer.from_file(str(path))
