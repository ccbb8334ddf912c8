"""Runs an artifact on ONNX Runtime: the one place that opens sessions. Needs no torch."""

import contextlib
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from packaging.version import Version

from mmopt_export.huge_pages import on_huge_pages
from mmopt_export.integrity import require_integrity
from mmopt_export.manifest import Manifest, read_manifest
from mmopt_export.placement import CPU, CUDA
from mmopt_export.texts import require_texts
from mmopt_export.threads import usable_cores
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError, one_line

if TYPE_CHECKING:
    from mmopt_export.adapters.files import AdapterSet

Tensors = dict[str, npt.NDArray[Any]]

MODEL_NAME = "model.onnx"
_TOKENIZER_NAME = "tokenizer.json"
MODEL = "model"
"""The component of an artifact that has one."""


def open_session(
    model: Path,
    *,
    provider: str,
    threads: int | None = None,
    optimize: bool = True,
    profile: Path | None = None,
    huge_pages: bool = False,
) -> Any:
    """Open an `onnxruntime.InferenceSession` of `model` on one provider, with no silent fallback.

    Args:
        model: the ONNX file; external data must lie beside it.
        provider: the execution provider that must be there.
        threads: intra-op threads; None takes every core that this process may use.
        optimize: whether ONNX Runtime's graph optimizations run.
        profile: prefix of the file that `session.end_profiling()` then writes.
        huge_pages: whether weights in the CPU's memory are put on huge pages, which copies them
            once more and makes reading them faster: for a session that will run often.

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
    provider_options: dict[str, str] = {}
    if provider == "CUDAExecutionProvider":
        _load_cuda()
        # Otherwise fp32 products round their operands to TF32, and no fp32 would be proven.
        provider_options = {"use_tf32": "0"}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    # Fatal only: errors are raised as well, and a client's bad ids must not fill a server's log.
    options.log_severity_level = 4
    # A pattern is planned anew for every new shape, and kept: each step of a decoder has one.
    options.enable_mem_pattern = False
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if not optimize:
        # Nobody times such a session, and packed weights are a second copy of them.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    moves = huge_pages and provider == CPU
    moved = on_huge_pages(_bytes_of(model)) if moves else contextlib.nullcontext()
    try:
        with moved:
            session = onnxruntime.InferenceSession(
                str(model), options, providers=[(provider, provider_options)]
            )
    except runtime_errors() as error:
        raise MmoptError(f"ONNX Runtime cannot load {model}: {error}") from error
    if session.get_providers()[0] != provider:
        raise MmoptError(
            f"ONNX Runtime opened {model} on {session.get_providers()[0]}, expected {provider}. "
            "Run `mmopt doctor`."
        )
    return session


def _bytes_of(model: Path) -> int:
    """Of a graph and the weights beside it; 0 where there is none, which the session will say."""
    files = (model, model.with_name(f"{model.name}.data"))
    return sum(file.stat().st_size for file in files if file.is_file())


@functools.cache
def _load_cuda() -> None:
    """CUDA and cuDNN from NVIDIA's packages, where those are and torch has not loaded them."""
    import onnxruntime

    # It prints what it does not find, and stdout is the caller's.
    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls()


def run_graph(session: Any, names: Sequence[str], feeds: Tensors) -> list[Any]:
    """Run a graph on feeds whose floats may be wider than its inputs: a KV cache in fp16, say.

    Args:
        names: of the outputs.
        feeds: by input; fp32 arrays become the graph's fp16 or bf16.

    Returns:
        The outputs in their order; None for one in bf16, which NumPy has no type for.
    """
    types = {one.name: one.type for one in session.get_inputs()}
    if "tensor(bfloat16)" not in types.values():
        typed = {
            name: value.astype(np.float16)
            if types.get(name) == "tensor(float16)" and value.dtype == np.float32
            else value
            for name, value in feeds.items()
        }
        values: list[Any] = session.run(list(names), typed)
        return values
    from ml_dtypes import bfloat16
    from onnx import TensorProto
    from onnxruntime import OrtValue

    values = session.run_with_ort_values(
        list(names),
        {
            name: OrtValue.ortvalue_from_numpy_with_onnx_type(
                value.astype(bfloat16).view(np.uint16), TensorProto.BFLOAT16
            )
            if types.get(name) == "tensor(bfloat16)"
            else OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for name, value in feeds.items()
        },
    )
    return [None if "bfloat16" in one.data_type() else one.numpy() for one in values]


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
        huge_pages: as `open_session` takes it.

    Raises:
        InputError: the folder is not an artifact, or its tokenizer cannot be read.
        CheckFailedError: its parity check had failed or was never made on its target, or a file
            differs from the manifest.
        MmoptError: ONNX Runtime is missing or older than the artifact needs.
    """

    def __init__(
        self, artifact: Path, *, threads: int | None = None, huge_pages: bool = True
    ) -> None:
        self.path = artifact
        self.manifest: Manifest = read_manifest(artifact)
        require_proven(artifact, self.manifest)
        require_integrity(artifact, self.manifest)
        require_runtime(self.manifest)
        self.provider = self.manifest.provider
        self._tokenizer = _load_tokenizer(artifact, self.manifest)
        self._sessions = {
            name: open_session(
                artifact / part.file,
                provider=self.provider,
                threads=threads,
                huge_pages=huge_pages,
            )
            for name, part in self.manifest.components.items()
        }
        self._adapters: dict[str, AdapterSet] = {}

    def session(self, component: str = MODEL) -> Any:
        """The ONNX Runtime session of a component.

        Raises:
            InputError: the artifact has no component of that name.
        """
        if component not in self._sessions:
            raise InputError(
                f"{self.path} has no graph {component!r}, expected one of: "
                f"{', '.join(self._sessions)}."
            )
        return self._sessions[component]

    def tokenize(self, texts: Sequence[str], component: str = MODEL) -> Tensors:
        """Encode texts as the inputs of a graph, int64 `[B, L]`, padded to the longest of them.

        Raises:
            InputError: the artifact is not for text, or `texts` is a string.
        """
        require_texts(texts)
        if self._tokenizer is None:
            raise InputError(f"{self.path} is for {self.manifest.task} and reads no text.")
        encodings = self._tokenizer.encode_batch(list(texts))
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        return {
            spec.name: np.asarray(columns[spec.name], dtype=np.int64)
            for spec in self.manifest.components[component].inputs
            if spec.name in columns
        }

    def adapters(self, component: str = MODEL) -> "AdapterSet":
        """The adapters that runs of a graph may choose; read when they are first asked for."""
        if component not in self._adapters:
            from mmopt_export.adapters.files import AdapterSet

            files = {
                name: self.path / parts[component]
                for name, parts in self.manifest.adapters.items()
                if component in parts
            }
            device = "cuda" if self.provider == CUDA else "cpu"
            self._adapters[component] = AdapterSet(self.session(component), files, device=device)
        return self._adapters[component]

    def adapter_feeds(self, adapter: str | None, component: str = MODEL) -> Tensors:
        """The inputs by which a graph runs an adapter, one for all rows: `AdapterFeeds`.

        None, and where other graphs of the artifact have all of its layers, are no inputs.

        Raises:
            InputError: the artifact has no such adapter, or none at all.
        """
        if adapter is None:
            return {}
        known = self.manifest.adapters
        if known and (not isinstance(adapter, str) or adapter not in known):
            raise InputError(
                f"there is no adapter {adapter!r}, expected one of: {', '.join(known)}."
            )
        if known and component not in known[adapter]:
            return {}
        return self.adapters(component).feeds(adapter)

    def run(
        self,
        feeds: Mapping[str, npt.NDArray[Any]],
        component: str = MODEL,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Tensors:
        """Run a graph on named inputs and return its named outputs.

        Args:
            adapter: one of `adapters(component).names`; None runs the base alone. Or one for each
                row of the batch: rows of one adapter run together, and come back in their order.

        Raises:
            InputError: there is no such adapter, or rows of this graph cannot have one each.
        """
        session = self.session(component)
        if adapter is None:
            names = [spec.name for spec in self.manifest.components[component].outputs]
            values = session.run(names, dict(feeds))
            return dict(zip(names, values, strict=True))
        if isinstance(adapter, str):
            return self._adapted(feeds, component, adapter)
        from mmopt_export.adapters.files import group_rows

        self._require_rows(feeds, component, len(adapter))
        groups = group_rows(adapter)
        parts = [
            self._adapted({key: value[rows] for key, value in feeds.items()}, component, name)
            for name, rows in groups
        ]
        places = np.argsort(np.concatenate([rows for _, rows in groups]))
        return {key: np.concatenate([part[key] for part in parts])[places] for key in parts[0]}

    def _adapted(
        self, feeds: Mapping[str, npt.NDArray[Any]], component: str, adapter: str | None
    ) -> Tensors:
        """Outputs with one adapter, whose values stay on the device from one run to the next."""
        session, adapters = self.session(component), self.adapters(component)
        binding = session.io_binding()
        adapters.bind(binding, adapter)
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        names = [spec.name for spec in self.manifest.components[component].outputs]
        for name in names:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def _require_rows(
        self, feeds: Mapping[str, npt.NDArray[Any]], component: str, count: int
    ) -> None:
        """Raise InputError unless the feeds are `count` rows that can be run apart."""
        if component in self.manifest.caches:
            raise InputError(
                f"the graph {component} has a cache and takes one adapter for all rows. Run rows "
                "of another adapter with a cache of their own."
            )
        graph = self.manifest.components[component]
        for spec in (*(one for one in graph.inputs if one.name in feeds), *graph.outputs):
            if not spec.shape or spec.shape[0] != "batch":
                raise InputError(
                    f"{spec.name} of the graph {component} has no row for each of a batch, so rows "
                    "cannot have an adapter each. Pass one name for all."
                )
        for name, value in feeds.items():
            if len(value) != count or count == 0:
                raise InputError(
                    f"{name} has {len(value)} rows and {count} adapters are given, expected one "
                    "for each row, None for the base alone, and at least one row."
                )

    def classify(self, texts: Sequence[str], *, batch_size: int = 32) -> npt.NDArray[np.float32]:
        """Logits `[len(texts), labels]`, batched by length so that little of it is padding.

        Raises:
            InputError: the artifact is not for text, or `texts` is a string.
        """
        require_texts(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        logits = np.empty((len(texts), len(self.manifest.labels)), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logits[chosen] = self.run(self.tokenize([texts[i] for i in chosen]))["logits"]
        return logits


def require_proven(artifact: Path, manifest: Manifest) -> None:
    """Raise CheckFailedError unless parity was checked and holds, or its drift was accepted."""
    if manifest.status in ("verified", "accepted"):
        return
    if manifest.status == "unproven":
        raise CheckFailedError(
            f"{artifact} was never run on {manifest.provider}. "
            f"Run `mmopt verify --record {artifact}` on a machine that has it."
        )
    raise CheckFailedError(
        f"{artifact} is marked {manifest.status}: its parity check did not hold. "
        "Read parity.json there and export again."
    )


def has_provider(provider: str) -> bool:
    """Whether the ONNX Runtime that is installed has an execution provider."""
    try:
        import onnxruntime
    except ImportError:
        return False  # open_session says it better
    return provider in onnxruntime.get_available_providers()


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


def _load_tokenizer(artifact: Path, manifest: Manifest) -> Any:
    """The tokenizer of an artifact that reads text; None for another."""
    if _TOKENIZER_NAME not in manifest.files:
        return None
    from tokenizers import Tokenizer

    path = artifact / _TOKENIZER_NAME
    try:
        # Truncation, padding token and side were fixed in the file at export.
        return Tokenizer.from_file(str(path))
    except Exception as error:  # of no type of its own
        raise InputError(
            f"{path} holds no tokenizer ({one_line(error)}). Export the model again."
        ) from error
