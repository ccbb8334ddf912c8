"""`mmopt.json`: what an artifact is, what it was made from, and the hash of every file in it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from mmopt_export.files import ARTIFACT_MARKER, read_json, sha256
from mmopt_kernels.errors import InputError

MANIFEST_NAME = ARTIFACT_MARKER
ADAPTER_SUFFIX = ".onnx_adapter"
SCHEMA_VERSION = 2
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
"""What a graph can have, from wide to narrow."""
STATUSES = ("verified", "accepted", "failed", "unproven")
"""What is known of an artifact's parity; `Manifest` says what each means."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output.

    Attributes:
        name: its name in the graph.
        dtype: NumPy's name of its type, such as `int64`.
        shape: fixed dimensions as integers, symbolic ones by name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Component:
    """One graph of the artifact.

    Attributes:
        file: its path in the folder.
        inputs, outputs: in the order of the graph.
        precision: of its weights and of what it computes with them.
        quantization: the recipe, or None for fp32.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    quantization: dict[str, Any] | None


@dataclass(frozen=True)
class CacheMap:
    """The KV cache of a decoder: graph inputs and outputs that one buffer per layer and side is.

    Attributes:
        layers: for each layer the names of past key, past value, present key and present value.
        heads: key and value heads.
        head_size: of each.
        dtype: NumPy's name of the buffers' type. A buffer is `[batch, heads, capacity, head_size]`.
    """

    layers: tuple[tuple[str, str, str, str], ...]
    heads: int
    head_size: int
    dtype: str


@dataclass(frozen=True)
class FileRecord:
    """A file of the artifact: its SHA-256 in hex and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Source:
    """What the artifact was made from.

    Attributes:
        base: the model as the user named it.
        base_sha256: over the base's weight files.
        adapters: for each adapter its path, its hash, its weight and its scale per module.
        quantized: how the base's weights were stored, when they were dequantized to be merged onto
            and exported; None for plain ones.
    """

    base: str
    base_sha256: str
    adapters: tuple[dict[str, Any], ...]
    quantized: dict[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """The parsed `mmopt.json`.

    Attributes:
        status: `verified`; `failed` when parity did not hold, or `accepted` when it was wanted all
            the same; `unproven` when the target's provider was not there to run it. Only verified
            and accepted artifacts are served.
        opset: opset version per domain; the default domain is `ai.onnx`.
        components: the graphs, by name; where there is one it is called `model`.
        caches: the KV cache of each component that has one.
        adapters: adapters that a run may choose: by name and component the `.onnx_adapter` file.
        labels: class names by index.
        max_length: tokens that the tokenizer keeps of a text, and that a decoder has positions for;
            None without text or without an end.
        preprocessing: constants that a runtime needs before and after the graphs.
        tools: versions that wrote the artifact.
    """

    name: str
    task: str
    architecture: str
    target: str
    provider: str
    precision: str
    status: str
    opset: dict[str, int]
    minimum_onnxruntime: str
    components: dict[str, Component]
    caches: dict[str, CacheMap]
    adapters: dict[str, dict[str, str]]
    labels: tuple[str, ...]
    max_length: int | None
    preprocessing: dict[str, Any]
    source: Source
    tools: dict[str, str]
    files: dict[str, FileRecord]
    schema: int = SCHEMA_VERSION

    @property
    def component(self) -> Component:
        """The graph of an artifact that has one.

        Raises:
            InputError: it has several.
        """
        if len(self.components) != 1:
            raise InputError(
                f"{self.name} has the graphs {', '.join(self.components)}, expected one: this "
                f"cannot be done with a model for {self.task}."
            )
        return next(iter(self.components.values()))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the only graph."""
        return self.component.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs of the only graph."""
        return self.component.outputs

    def with_files(self, files: dict[str, FileRecord]) -> "Manifest":
        """The same with the hashes of the folder's files."""
        return dataclasses.replace(self, files=files)

    def write(self, folder: Path) -> None:
        """Write `mmopt.json` into `folder`, keys in a fixed order so that exports compare equal."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, allow_nan=False)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Hash and size of every file under `folder` but the manifest itself, by relative path."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(sha256(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def read_manifest(folder: Path) -> Manifest:
    """Parse `folder/mmopt.json`.

    Raises:
        InputError: the folder or the file is missing, is not JSON, is of another schema version,
            or lacks a field or has one of no meaning.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(
            f"{folder} is not an artifact: it has no {MANIFEST_NAME}. "
            "Pass a folder that `mmopt export` wrote."
        )
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no JSON object. Export the model again.")
    if document.get("schema") != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {document.get('schema')!r}, expected {SCHEMA_VERSION}. "
            "Export the model again with this version of mmopt."
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Export the model again.") from error


def _parse(document: Mapping[str, Any]) -> Manifest:
    source = document["source"]
    Version(document["minimum_onnxruntime"])  # raises a ValueError
    for one in (document, *document["components"].values()):
        if one["precision"] not in PRECISIONS:
            raise ValueError(f"precision {one['precision']!r}")
    if document["status"] not in STATUSES:
        raise ValueError(f"status {document['status']!r}")
    longest = document["max_length"]
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise ValueError(f"max_length {longest!r}")
    fields = {
        **document,
        "components": {
            name: Component(
                file=component["file"],
                inputs=_specs(component["inputs"]),
                outputs=_specs(component["outputs"]),
                precision=component["precision"],
                quantization=component["quantization"],
            )
            for name, component in document["components"].items()
        },
        "caches": {
            name: CacheMap(
                layers=tuple((one[0], one[1], one[2], one[3]) for one in cache["layers"]),
                heads=int(cache["heads"]),
                head_size=int(cache["head_size"]),
                dtype=str(cache["dtype"]),
            )
            for name, cache in document["caches"].items()
        },
        "adapters": {
            name: {component: str(file) for component, file in files.items()}
            for name, files in document["adapters"].items()
        },
        "labels": tuple(document["labels"]),
        "source": Source(**{**source, "adapters": tuple(source["adapters"])}),
        "files": {name: FileRecord(**record) for name, record in document["files"].items()},
    }
    return Manifest(**fields)


def _specs(records: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in records)
