"""Whether a folder is what its manifest says, found out before ONNX Runtime opens a file of it.

Whoever wrote the artifact also wrote its manifest, so a right hash alone proves nothing about a
path: ONNX Runtime follows external data to wherever a graph points, and allocates what a tensor
claims. So the folder is walked without following links, every listed file is hashed, and every
graph is parsed, without its weights, and each tensor in it held against the bytes that it has.

It is a check of something received, not a lock: a process that writes into the folder afterwards
is not noticed.
"""

import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mmopt_export.files import SIGNATURE_NAME, sha256
from mmopt_export.manifest import ADAPTER_SUFFIX, MANIFEST_NAME, Manifest
from mmopt_kernels.errors import CheckFailedError, InputError, one_line

# Weights lie in external data: the largest graph seen, 124M parameters of 12 layers, has 0.3 MB,
# and one of 100 layers with a constant here and there stays below 30 MB. protobuf allows 2 GiB,
# of which a parsed message takes several times as much memory.
MOST_GRAPH_BYTES = 256 << 20

# A manifest lists what one export wrote; walking stops where a folder holds far more than that.
_MOST_ENTRIES = 100_000

_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")
_MOST_BYTES = (1 << 63) - 1
_DIGITS = re.compile(r"[0-9]{1,19}")

# Bits of one element by the number of its type in onnx.TensorProto.DataType. Strings (8) have no
# fixed size, and 0 is no type.
_BITS = {
    1: 32,  # float
    2: 8,  # uint8
    3: 8,  # int8
    4: 16,  # uint16
    5: 16,  # int16
    6: 32,  # int32
    7: 64,  # int64
    9: 8,  # bool
    10: 16,  # float16
    11: 64,  # double
    12: 32,  # uint32
    13: 64,  # uint64
    14: 64,  # complex64
    15: 128,  # complex128
    16: 16,  # bfloat16
    17: 8,  # float8e4m3fn
    18: 8,  # float8e4m3fnuz
    19: 8,  # float8e5m2
    20: 8,  # float8e5m2fnuz
    21: 4,  # uint4
    22: 4,  # int4
    23: 4,  # float4e2m1
    24: 8,  # float8e8m0
    25: 2,  # uint2
    26: 2,  # int2
}
_STRING = 8

# The typed fields of a tensor, with how many values one element takes in it: complex numbers are
# pairs, and several elements of less than a byte share one value.
_TYPED_FIELDS: dict[str, dict[int, float]] = {
    "float_data": {1: 1, 14: 2},
    "double_data": {11: 1, 15: 2},
    "int64_data": {7: 1},
    "uint64_data": {12: 1, 13: 1},
    "int32_data": {
        **dict.fromkeys((2, 3, 4, 5, 6, 9, 10, 16, 17, 18, 19, 20, 24), 1),
        **dict.fromkeys((21, 22, 23), 0.5),
        **dict.fromkeys((25, 26), 0.25),
    },
    "string_data": {_STRING: 1},
}


def require_integrity(artifact: Path, manifest: Manifest) -> None:
    """Raise CheckFailedError naming everything that `integrity_errors` finds."""
    if errors := integrity_errors(artifact, manifest):
        shown = "; ".join(errors[:20])
        more = f"; and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise CheckFailedError(
            f"{artifact} is not what was exported: {shown}{more}. "
            "Copy the artifact again or export the model again."
        )


def integrity_errors(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the folder, a line each; an empty list when nothing is.

    Found are: files that are missing, changed, not listed, links (symbolic or hard), no plain
    files, or listed under a name that leaves the folder; graphs that are no ONNX, that refer to
    files which the manifest does not list, or whose tensors claim more or other bytes than they
    have; components whose graph, and adapters whose values, are not among the files.
    """
    errors, present = _walk(folder)
    listed = {MANIFEST_NAME, SIGNATURE_NAME, *manifest.files}
    errors += [
        f"{name} is not listed in {MANIFEST_NAME}" for name in sorted(present.keys() - listed)
    ]
    sound: dict[str, int] = {}
    for name, record in sorted(manifest.files.items()):
        if reason := _bad_name(name):
            errors.append(f"{MANIFEST_NAME} lists {name!r}, which {reason}")
        elif name in (MANIFEST_NAME, SIGNATURE_NAME):
            errors.append(f"{MANIFEST_NAME} lists {name}, which cannot hold its own hash")
        elif name not in present:
            # Links and the like were named by the walk already.
            if not os.path.lexists(folder / name):
                errors.append(f"{name} is missing")
        elif present[name] != record.size:
            errors.append(f"{name} has {present[name]} bytes, expected {record.size}")
        elif sha256(folder / name) != record.sha256:
            errors.append(f"{name} has another SHA-256 than the manifest says")
        else:
            sound[name] = record.size
    for name, component in manifest.components.items():
        # Only what ends so was looked into, and ONNX Runtime reads other formats by other endings.
        file = str(component.file)
        if file not in manifest.files or not file.endswith(".onnx"):
            errors.append(
                f"the component {name} has the graph {file!r}, expected a listed .onnx file"
            )
    for adapter, files in manifest.adapters.items():
        for name, file in files.items():
            if name not in manifest.components:
                errors.append(f"the adapter {adapter} is for {name!r}, which is no graph here")
            if file not in manifest.files or not file.endswith(ADAPTER_SUFFIX):
                errors.append(
                    f"the adapter {adapter} has the file {file!r} for {name}, expected a listed "
                    f"{ADAPTER_SUFFIX} file"
                )
    for name in sound:
        if name.endswith(".onnx"):
            errors += [f"{name}: {error}" for error in graph_errors(folder, name, sound)]
    return errors


def graph_errors(folder: Path, name: str, sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with one graph, whose weights are not read.

    Args:
        folder: the artifact.
        name: the graph's path in it.
        sizes: bytes of each file that the graph may refer to, by path in the folder.
    """
    if sizes[name] > MOST_GRAPH_BYTES:
        return [f"has {sizes[name]} bytes, expected at most {MOST_GRAPH_BYTES} without its weights"]
    try:
        model = read_graph(folder / name)
    except InputError:
        return ["is no ONNX graph"]
    errors = []
    here = PurePosixPath(name).parent
    for message in messages(model):
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto":
            if problem := _tensor_error(message, here, sizes):
                errors.append(f"the tensor {message.name!r} {problem}")
        elif kind == "SparseTensorProto":
            # ONNX Runtime makes it dense, in whatever size its dimensions claim.
            errors.append(f"the tensor {message.values.name!r} is sparse, which none of ours is")
        elif kind == "NodeProto" and message.op_type == "EPContext":
            # Its content is a compiled engine, or the path of one.
            errors.append(f"the node {message.name!r} is an EPContext, which loads other files")
    return errors


def read_graph(path: Path) -> Any:
    """Parse an ONNX file into an `onnx.ModelProto`; external data is not looked at.

    Raises:
        InputError: it is no ONNX graph.
    """
    # Not onnx.load, which would follow external data before anybody looked at it.
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import ModelProto

    model = ModelProto()
    try:
        # Also refused here: messages nested deeper than protobuf's limit of 100.
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(f"{path} is no ONNX graph ({one_line(error)}).") from error
    return model


def external_files(model: Any) -> set[str]:
    """The files that the tensors of an `onnx.ModelProto` lie in, as the graph names them."""
    return {
        entry.value
        for message in messages(model)
        if message.DESCRIPTOR.name == "TensorProto"
        for entry in message.external_data
        if entry.key == "location"
    }


def _walk(folder: Path) -> tuple[list[str], dict[str, int]]:
    """What stands in the folder, no link followed: errors, and sizes of plain files by path."""
    errors: list[str] = []
    sizes: dict[str, int] = {}
    pending = [folder]
    seen = 0
    while pending:
        for entry in sorted(os.scandir(pending.pop()), key=lambda entry: entry.name):
            name = Path(entry.path).relative_to(folder).as_posix()
            seen += 1
            if seen > _MOST_ENTRIES:
                return [f"it holds more than {_MOST_ENTRIES} files and folders"], sizes
            # Not DirEntry.stat, which gives no count of links on Windows.
            status = os.lstat(entry.path)
            if stat.S_ISDIR(status.st_mode):
                pending.append(Path(entry.path))
            elif stat.S_ISLNK(status.st_mode):
                errors.append(f"{name} is a symbolic link, expected a plain file")
            elif not stat.S_ISREG(status.st_mode):
                errors.append(f"{name} is a pipe, socket or device, expected a plain file")
            elif status.st_nlink > 1:
                # Under its other name it can be changed from outside of the folder.
                errors.append(
                    f"{name} is a hard link ({status.st_nlink} names), expected a file of its own"
                )
            else:
                sizes[name] = status.st_size
    return errors, sizes


def _bad_name(name: str) -> str | None:
    """Why a path cannot be one in the artifact; None where it can."""
    path = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name:
        return "is no path"
    if path.is_absolute() or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    if ".." in path.parts:
        return "leaves the folder"
    if path.as_posix() != name:
        return f"is a path not in its shortest form, {path.as_posix()!r}"
    return None


def messages(root: Any) -> Iterator[Any]:
    """The nodes and tensors anywhere below a message: in subgraphs, functions, attributes.

    By the schema that protobuf knows, so that no place is forgotten, and without recursion.
    """
    wanted = {"TensorProto", "SparseTensorProto", "NodeProto"}
    fields = _fields_towards(root.DESCRIPTOR, wanted)
    pending = [root]
    while pending:
        message = pending.pop()
        if message.DESCRIPTOR.name in wanted:
            yield message
        for field in fields.get(message.DESCRIPTOR.full_name, ()):
            value = getattr(message, field.name)
            # Older protobuf has no FieldDescriptor.is_repeated.
            if not hasattr(value, "DESCRIPTOR"):
                pending.extend(value)
            elif message.HasField(field.name):
                pending.append(value)


def _fields_towards(root: Any, wanted: Collection[str]) -> dict[str, list[Any]]:
    """By message type, the fields through which a message of a wanted type can be reached."""
    types: dict[str, Any] = {}
    pending = [root]
    while pending:
        kind = pending.pop()
        if kind.full_name not in types:
            types[kind.full_name] = kind
            pending.extend(f.message_type for f in kind.fields if f.message_type is not None)
    reaching = {name for name, kind in types.items() if kind.name in wanted}
    while True:
        more = {
            name
            for name, kind in types.items()
            if any(f.message_type and f.message_type.full_name in reaching for f in kind.fields)
        }
        if more <= reaching:
            break
        reaching |= more
    return {
        name: [f for f in kind.fields if f.message_type and f.message_type.full_name in reaching]
        for name, kind in types.items()
    }


def _tensor_error(tensor: Any, here: PurePosixPath, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with a tensor's claim, None when nothing is."""
    dims = list(tensor.dims)
    if any(dim < 0 for dim in dims):
        return f"has the shape {dims}, expected no negative dimension"
    kind = tensor.data_type
    if kind not in _BITS and kind != _STRING:
        return f"has the unknown type {kind}"
    if tensor.HasField("segment"):
        return "is a segment of another, which none of ours is"
    # Python's integers do not overflow, those that allocate the tensor do.
    count = math.prod(dims)
    expected = -(-count * _BITS.get(kind, 8) // 8)
    if expected > _MOST_BYTES:
        return f"claims the shape {dims}, more bytes than there can be"
    # 1 is TensorProto.EXTERNAL. Another number would be an unknown field, and read as 0.
    if tensor.data_location == 1:
        return _external_error(tensor, here, sizes, expected)
    if tensor.external_data:
        return "has its data inside and says that it lies in a file as well"
    return _embedded_error(tensor, count, expected)


def _embedded_error(tensor: Any, count: int, expected: int) -> str | None:
    present = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
    if tensor.HasField("raw_data"):
        if present:
            return f"has raw data and {present[0]}, expected one of them"
        if tensor.data_type == _STRING:
            return "has raw data, which strings have not"
        actual = len(tensor.raw_data)
        return None if actual == expected else f"has {actual} bytes, its shape claims {expected}"
    if not present:
        return None if count == 0 else f"has no data, its shape claims {count} values"
    field = present[0]
    if len(present) > 1 or tensor.data_type not in _TYPED_FIELDS[field]:
        return f"has {' and '.join(present)}, expected only what its type has"
    values = math.ceil(count * _TYPED_FIELDS[field][tensor.data_type])
    actual = len(getattr(tensor, field))
    return None if actual == values else f"has {actual} values, its shape claims {values}"


def _external_error(
    tensor: Any, here: PurePosixPath, sizes: Mapping[str, int], expected: int
) -> str | None:
    if tensor.data_type == _STRING:
        return "is of strings, which cannot lie in a file"
    if tensor.HasField("raw_data") or any(len(getattr(tensor, name)) for name in _TYPED_FIELDS):
        return "lies in a file and has data inside as well"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):
        return "says twice where its data lies"
    if unknown := sorted(entries.keys() - set(_EXTERNAL_KEYS)):
        return f"has the unknown external data key {unknown[0]!r}"
    location = entries.get("location", "")
    if location.startswith("./"):
        location = location[2:]
    if reason := _bad_name(location):
        return f"has its data in {location!r}, which {reason}"
    name = (here / location).as_posix()
    if name not in sizes:
        return f"has its data in {name!r}, which is no sound file that {MANIFEST_NAME} lists"
    numbers = {}
    for key, default in (("offset", 0), ("length", expected)):
        text = entries.get(key, str(default))
        # Not int() alone, which takes signs, spaces and underscores.
        if not _DIGITS.fullmatch(text) or int(text) > _MOST_BYTES:
            return f"has the {key} {text!r}, expected a count of bytes"
        numbers[key] = int(text)
    if numbers["length"] != expected:
        return f"has {numbers['length']} bytes in {name}, its shape claims {expected}"
    end = numbers["offset"] + expected
    if end > sizes[name]:
        return f"claims {name} up to byte {end}, which has {sizes[name]}"
    return None
