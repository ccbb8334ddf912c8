"""Writes a model repository for NVIDIA Triton Inference Server and its onnxruntime backend.

One Triton model per graph of the artifact:

    REPOSITORY/NAME/config.pbtxt      inputs, outputs, batching, where it runs
    REPOSITORY/NAME/1/model.onnx      and its weights
    REPOSITORY/NAME/labels.txt        for a classifier: Triton's classification extension reads it
    REPOSITORY/NAME/client/           tokenizer and processor, with the first graph
    REPOSITORY/NAME/mmopt.json        what the artifact is
    REPOSITORY/NAME/README.md         how to call it

Tokens and pixels are made by the client. A Python backend could do it in the server, but only
where its image has the same `tokenizers`, and each request would pass through a Python process; the
client has the tokenizer at hand and knows how to cut its texts.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import RenderableType

from mmopt_export.files import require_output, require_space, staged_folders
from mmopt_export.integrity import external_files, read_graph, require_integrity
from mmopt_export.manifest import (
    ADAPTER_SUFFIX,
    MANIFEST_NAME,
    Component,
    Manifest,
    TensorSpec,
    read_manifest,
)
from mmopt_export.parity import PARITY_NAME, SAMPLES_NAME
from mmopt_export.placement import CPU, CUDA
from mmopt_export.runtime import require_proven
from mmopt_kernels.errors import InputError

CONFIG_NAME = "config.pbtxt"
LABELS_NAME = "labels.txt"
_VERSION = "1"
_CLIENT = "client"
_README = "README.md"
_OURS = {CONFIG_NAME, LABELS_NAME, MANIFEST_NAME, _README, _VERSION, _CLIENT}

# By NumPy's name; Triton's model_config.proto has no 4-bit types and no complex numbers.
_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    "object": "TYPE_STRING",
}
_KINDS = {CPU: "KIND_CPU", CUDA: "KIND_GPU"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class DeployReport:
    """What `deploy_triton` wrote.

    Attributes:
        path: the model repository.
        models: the names of the Triton models in it that are new.
        size: bytes written.
        max_batch: by model, the largest batch that Triton forms; 0 where it forms none.
    """

    path: Path
    models: tuple[str, ...]
    size: int
    max_batch: dict[str, int]

    @property
    def exit_code(self) -> int:
        """0: what does not work is raised."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def render(self) -> RenderableType:
        """A line per model and the command that serves them."""
        lines = [
            f"{self.path / name}: "
            + (
                f"batches of up to {self.max_batch[name]}"
                if self.max_batch[name]
                else "no batching"
            )
            for name in self.models
        ]
        return "\n".join([*lines, f"tritonserver --model-repository {self.path.absolute()}"])


def deploy_triton(
    artifact: Path,
    repository: Path,
    *,
    name: str | None = None,
    max_batch: int = 32,
    queue_delay: int = 0,
    force: bool = False,
) -> DeployReport:
    """Copy an artifact into a Triton model repository, with a configuration for every graph.

    Args:
        artifact: a folder that `mmopt export` wrote.
        repository: the model repository; other models in it are left alone.
        name: of the Triton model, the artifact's own by default; with several graphs `-` and the
            graph's name follow.
        max_batch: rows of the largest batch that Triton forms of several requests; 0 for none.
        queue_delay: microseconds that Triton waits for a batch to fill.
        force: replace models of these names that this function wrote.

    Raises:
        InputError: no artifact, a name that Triton does not take, a type that it does not have, or
            a model of that name is there (exit 2).
        CheckFailedError: the artifact failed its parity check, or its files are not what was
            exported (exit 1).
        MmoptError: no space, or no permission to write (exit 3).
    """
    if max_batch < 0 or queue_delay < 0:
        raise InputError(
            f"--max-batch {max_batch} and --queue-delay {queue_delay}: expected no negative number."
        )
    manifest = read_manifest(artifact)
    require_proven(artifact, manifest)
    require_integrity(artifact, manifest)
    base = name if name is not None else manifest.name
    if not _NAME.fullmatch(base):
        raise InputError(
            f"{base!r} cannot be the name of a Triton model, expected letters, digits, '.', '_' "
            "and '-'. Pass another with --name."
        )
    single = len(manifest.components) == 1
    models = {
        component: base if single else f"{base}-{component}" for component in manifest.components
    }
    outputs = [repository / model for model in models.values()]
    for output in outputs:
        require_output(output, sources=[artifact], replace=force, ours=_require_ours)
    require_space(repository, sum(record.size for record in manifest.files.values()))

    batches: dict[str, int] = {}
    with staged_folders(outputs, replace=force, ours=_require_ours) as folders:
        used = set()
        for (component, model), folder in zip(models.items(), folders, strict=True):
            graph = manifest.components[component]
            proto = read_graph(artifact / graph.file)
            used |= _copy_graph(artifact, graph, proto, folder / _VERSION)
            # Inputs with a default, the factors of adapters that can be swapped: the backend knows
            # only those that must be fed.
            optional = {initializer.name for initializer in proto.graph.initializer}
            inputs = [spec for spec in graph.inputs if spec.name not in optional]
            batches[model] = _batch_size(manifest, component, inputs, max_batch)
            config = model_config(
                manifest, component, model, inputs, max_batch=batches[model], delay=queue_delay
            )
            (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
            if any(_labelled(manifest, spec) for spec in graph.outputs):
                (folder / LABELS_NAME).write_text("\n".join(manifest.labels) + "\n", "utf-8")
            shutil.copyfile(artifact / MANIFEST_NAME, folder / MANIFEST_NAME)
            (folder / _README).write_text(
                _readme(manifest, component, models, inputs, batches[model]), encoding="utf-8"
            )
        _copy_client(artifact, manifest, used, folders[0] / _CLIENT)
        size = sum(
            path.stat().st_size for one in folders for path in one.rglob("*") if path.is_file()
        )
    return DeployReport(repository, tuple(models.values()), size, batches)


def model_config(
    manifest: Manifest,
    component: str,
    model: str,
    inputs: Sequence[TensorSpec],
    *,
    max_batch: int,
    delay: int,
) -> str:
    """The text of a `config.pbtxt`, in the protobuf text format of Triton's ModelConfig.

    Args:
        component: the graph.
        model: its name in Triton.
        inputs: those that a request must have.
        max_batch: 0 keeps the batch dimension as one of the tensors' own, and forms no batches.
        delay: microseconds that a batch may wait to be filled.

    Raises:
        InputError: a tensor has a type that Triton does not have.
    """
    graph = manifest.components[component]
    lines = [
        f"name: {_quoted(model)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quoted(PurePosixPath(graph.file).name)}",
        f"max_batch_size: {max_batch}",
    ]
    for field, specs in (("input", inputs), ("output", graph.outputs)):
        for spec in specs:
            lines += [f"{field} {{", *(f"  {line}" for line in _tensor(spec, max_batch > 0))]
            if field == "output" and _labelled(manifest, spec):
                lines.append(f"  label_filename: {_quoted(LABELS_NAME)}")
            lines.append("}")
    kind = _KINDS.get(manifest.provider, "KIND_AUTO")
    lines.append(f"instance_group {{ count: 1 kind: {kind} }}")
    if max_batch > 1:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}")
    if manifest.provider == CUDA and graph.precision == "fp32":
        # Parity was measured without TensorFloat-32, which ONNX Runtime turns on by default.
        lines.append(
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "cuda" '
            'parameters { key: "use_tf32" value: "0" } } } }'
        )
    return "\n".join(lines) + "\n"


def _tensor(spec: TensorSpec, batched: bool) -> list[str]:
    if spec.dtype not in _TYPES:
        raise InputError(
            f"{spec.name} is of type {spec.dtype}, which Triton does not have, expected one of: "
            f"{', '.join(_TYPES)}."
        )
    shape = [dim if isinstance(dim, int) else -1 for dim in spec.shape]
    if batched:
        shape = shape[1:]
    lines = [
        f"name: {_quoted(spec.name)}",
        f"data_type: {_TYPES[spec.dtype]}",
        # Triton has no tensors without dimensions: such a one travels as one value.
        f"dims: [ {', '.join(map(str, shape or [1]))} ]",
    ]
    return lines if shape else [*lines, "reshape { shape: [ ] }"]


def _labelled(manifest: Manifest, spec: TensorSpec) -> bool:
    """Whether an output is one score per label and row."""
    return len(spec.shape) == 2 and 1 < len(manifest.labels) == spec.shape[1]


def _batch_size(
    manifest: Manifest, component: str, inputs: Sequence[TensorSpec], wanted: int
) -> int:
    """`wanted` where rows of several requests may be put together, else 0.

    They may where every tensor has one row per row of the batch, and there is no KV cache: on the
    CPU GroupQueryAttention refuses several rows that go on from a cache with several new tokens.
    """
    if component in manifest.caches:
        return 0
    tensors = [*inputs, *manifest.components[component].outputs]
    first = {spec.shape[0] if spec.shape else None for spec in tensors}
    return wanted if len(first) == 1 and isinstance(first.pop(), str) else 0


def _copy_graph(artifact: Path, graph: Component, proto: Any, folder: Path) -> set[str]:
    """Copy a graph and its weights; returns their names in the artifact."""
    here = PurePosixPath(graph.file).parent
    used = set()
    for name in sorted({PurePosixPath(graph.file).name, *external_files(proto)}):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact / here / name, place)
        used.add((here / name).as_posix())
    return used


def _copy_client(artifact: Path, manifest: Manifest, used: set[str], folder: Path) -> None:
    """Copy what is neither a graph nor a proof of it: the tokenizer's and processor's files."""
    for name in sorted(manifest.files.keys() - used - {PARITY_NAME, SAMPLES_NAME, _README}):
        if name.endswith(ADAPTER_SUFFIX):
            continue
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact / name, place)


def _require_ours(folder: Path) -> None:
    """Refuse to replace a model that this module did not write, or that got more versions since."""
    names = {path.name for path in folder.iterdir()}
    if not {CONFIG_NAME, MANIFEST_NAME} <= names or not names <= _OURS:
        strange = sorted(names - _OURS)
        what = f"holds {strange[0]}" if strange else f"lacks {CONFIG_NAME} or {MANIFEST_NAME}"
        raise InputError(
            f"{folder} {what}, so mmopt did not write it as it is and --force does not replace it. "
            "Choose another --name or repository."
        )


def _quoted(text: str) -> str:
    """A string in protobuf's text format: what is not plain ASCII as octal bytes."""
    letters = [
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03o}"
        for byte in text.encode()
    ]
    return f'"{"".join(letters)}"'


def _readme(
    manifest: Manifest,
    component: str,
    models: dict[str, str],
    inputs: Sequence[TensorSpec],
    max_batch: int,
) -> str:
    graph = manifest.components[component]
    model = models[component]
    first = next(iter(models.values()))
    rows = [
        f"| {kind} | `{spec.name}` | {spec.dtype} | {', '.join(map(str, spec.shape)) or 'scalar'} |"
        for kind, specs in (("input", inputs), ("output", graph.outputs))
        for spec in specs
    ]
    where = f"`{_CLIENT}/`" if model == first else f"`../{first}/{_CLIENT}/`"
    parts = [
        f"# {model}",
        f"`{component}` of the {manifest.task} artifact {manifest.name} ({manifest.architecture}, "
        f"{graph.precision}) for Triton Inference Server, written by `mmopt deploy triton`. "
        f"It needs a Triton whose onnxruntime backend is {manifest.minimum_onnxruntime} or newer.",
        "    tritonserver --model-repository PATH/TO/REPOSITORY",
        "\n".join(["| | name | type | shape |", "|---|---|---|---|", *rows]),
        "## Before and after",
        "The server runs the graph and nothing else. Whoever calls it turns text, pictures or "
        f"sound into the inputs with the files in {where}: each request then carries tensors only, "
        "and the server needs no Python. `mmopt.json` has the constants, the labels and the "
        "longest input.",
        "## Batches",
    ]
    if max_batch:
        parts.append(
            f"Triton puts up to {max_batch} rows of waiting requests together, those of one shape. "
            "Pad to a few lengths, such as multiples of 32, to let requests of different lengths "
            "meet."
        )
    else:
        parts.append(
            "Triton forms no batches of its own here; the batch is the first dimension of each "
            "request."
        )
    if component in manifest.caches:
        parts.append(
            "The KV cache travels with every request: the `past` inputs of a step are the "
            "`present` outputs of the one before. `mmopt serve` keeps it in the server."
        )
    if manifest.adapters:
        parts.append(
            "The base answers: Triton's onnxruntime backend cannot feed inputs that have a "
            f"default, which the adapters {', '.join(manifest.adapters)} are. Export with "
            "`--adapters merge` to serve one of them here, or use `mmopt serve`."
        )
    if manifest.max_length is not None and {spec.name for spec in inputs} >= {"input_ids"}:
        parts += ["## A call", _example(model, inputs, graph.outputs)]
    return "\n\n".join(parts) + "\n"


def _example(model: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    attributes = {
        "input_ids": "ids",
        "attention_mask": "attention_mask",
        "token_type_ids": "type_ids",
    }
    known = [spec for spec in inputs if spec.name in attributes]
    names = ", ".join(f'("{spec.name}", encoded.{attributes[spec.name]})' for spec in known)
    return "\n".join(
        [
            "```python",
            "import numpy as np",
            "import tritonclient.http as triton",
            "from tokenizers import Tokenizer",
            "",
            f'encoded = Tokenizer.from_file("{_CLIENT}/tokenizer.json").encode("a text")',
            "inputs = []",
            f"for name, ids in [{names}]:",
            '    inputs.append(triton.InferInput(name, [1, len(ids)], "INT64"))',
            "    inputs[-1].set_data_from_numpy(np.array([ids], np.int64))",
            'client = triton.InferenceServerClient("localhost:8000")',
            f'print(client.infer("{model}", inputs).as_numpy("{outputs[0].name}"))',
            "```",
        ]
    )
