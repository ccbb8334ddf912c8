"""`mmopt.json`: what an artifact is, what it was made from, and the hash of every file in it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt_export.files import sha256
from mmopt_kernels.errors import InputError

MANIFEST_NAME = "mmopt.json"
SCHEMA_VERSION = 1


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
        adapters: for each merged adapter its path, its hash, and its scale per module.
    """

    base: str
    base_sha256: str
    adapters: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Manifest:
    """The parsed `mmopt.json`.

    Attributes:
        status: `verified`, or `failed` when parity did not hold; a failed artifact is not served.
        opset: opset version per domain; the default domain is `ai.onnx`.
        labels: class names by index.
        max_length: tokens that the tokenizer keeps of a text.
        quantization: the recipe, or None for fp32.
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
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    max_length: int
    quantization: dict[str, Any] | None
    source: Source
    tools: dict[str, str]
    files: dict[str, FileRecord]
    schema: int = SCHEMA_VERSION

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
            or lacks a field.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(
            f"{folder} is not an artifact: it has no {MANIFEST_NAME}. "
            "Pass a folder that `mmopt export` wrote."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Export the model again.") from error
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
    def specs(key: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in document[key]
        )

    source = document["source"]
    fields = {
        **document,
        "inputs": specs("inputs"),
        "outputs": specs("outputs"),
        "labels": tuple(document["labels"]),
        "source": Source(source["base"], source["base_sha256"], tuple(source["adapters"])),
        "files": {name: FileRecord(**record) for name, record in document["files"].items()},
    }
    return Manifest(**fields)


def integrity_errors(folder: Path, manifest: Manifest) -> list[str]:
    """What differs between the folder and its manifest; an empty list when nothing does.

    Missing, changed, unlisted and linked files are each named. Listed names that leave the folder
    are refused before they are opened.
    """
    errors = []
    root = folder.resolve()
    for name, record in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.resolve().is_relative_to(root):
            errors.append(f"{name} leaves the folder, expected a plain file inside it")
        elif not path.is_file():
            errors.append(f"{name} is missing")
        elif path.stat().st_size != record.size:
            errors.append(f"{name} has {path.stat().st_size} bytes, expected {record.size}")
        elif sha256(path) != record.sha256:
            errors.append(f"{name} has another SHA-256 than the manifest says")
    listed = {*manifest.files, MANIFEST_NAME}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in listed:
            errors.append(f"{name} is not listed in {MANIFEST_NAME}")
    return errors
