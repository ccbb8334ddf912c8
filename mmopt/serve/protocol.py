"""The Open Inference Protocol (V2) in JSON: requests in, responses out. Pure functions.

Source: https://github.com/open-inference/open-inference-protocol, specification/protocol.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmopt_export.manifest import Manifest, TensorSpec
from mmopt_kernels.errors import InputError, MmoptError

Tensors = dict[str, npt.NDArray[Any]]

MAX_BODY_BYTES = 4 << 20
"""64 texts of 512 tokens as three flattened int64 tensors are about 0.6 MB of JSON."""

MAX_BATCH = 64
"""Rows in one request; more rows belong in more requests, which others can run between."""

MAX_DEPTH = 16
"""A request needs 4 levels (inputs, one input, data, rows); the rest is room for parameters."""

TEXT_INPUT = "text"

# The V2 name of each NumPy type that has a JSON form here.
_DATATYPES = {
    "bool": "BOOL",
    "int32": "INT32",
    "int64": "INT64",
    "float32": "FP32",
    "float64": "FP64",
}

# To the end of the string, or of the body when the closing quote is missing: it must match at
# every quote, or a hostile body would be scanned once per quote.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class RequestError(InputError):
    """A request that cannot be run as it is: HTTP 400."""


class ModelError(MmoptError):
    """The model failed, or its answer must not reach the client: HTTP 500."""


class Model(Protocol):
    """What serving needs of `mmopt_export.runtime.Runner`."""

    manifest: Manifest
    provider: str

    def tokenize(self, texts: Sequence[str]) -> Tensors:
        """Encode texts as the graph's inputs."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """Run the graph."""


@dataclass(frozen=True)
class InferRequest:
    """A valid request.

    Attributes:
        id: echoed in the response; None when the client gave none.
        texts: what to tokenize, when the client sent `text`.
        feeds: the graph's inputs otherwise.
        outputs: names to return, in this order.
    """

    id: str | None
    texts: tuple[str, ...] | None
    feeds: Tensors | None
    outputs: tuple[str, ...]


def parse_request(body: bytes, manifest: Manifest) -> InferRequest:
    """Parse and check the body of an infer request.

    Raises:
        RequestError: it is not JSON, nests too deep, or does not fit the model; the message says
            what was found and what was expected.
    """
    document = _object(_parse_json(body), "the body")
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError(f"id is {_shown(request_id)}, expected a string.")
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise RequestError(f"inputs is {_shown(inputs)}, expected a list of tensors.")
    tensors: dict[str, dict[str, Any]] = {}
    for position, tensor in enumerate(inputs):
        tensor = _object(tensor, f"inputs[{position}]")
        name = tensor.get("name")
        if not isinstance(name, str):
            raise RequestError(f"inputs[{position}].name is {_shown(name)}, expected a string.")
        if name in tensors:
            raise RequestError(f"input {_shown(name)} is given twice, expected it once.")
        tensors[name] = tensor

    specs = {spec.name: spec for spec in manifest.inputs}
    texts, feeds = None, None
    if set(tensors) == {TEXT_INPUT} and TEXT_INPUT not in specs:
        texts = _texts(tensors[TEXT_INPUT])
    else:
        if set(tensors) != set(specs):
            raise RequestError(
                f"the inputs are {', '.join(map(_shown, tensors))}, expected "
                f"{', '.join(specs)}, or {TEXT_INPUT} alone."
            )
        feeds = _feeds(tensors, manifest)
    return InferRequest(request_id, texts, feeds, _selected(document.get("outputs"), manifest))


def infer(model: Model, request: InferRequest) -> list[dict[str, Any]]:
    """Run a request and return the `outputs` of its response.

    Raises:
        ModelError: the model's output is not finite.
    """
    if request.texts is not None:
        feeds = model.tokenize(request.texts)
    else:
        assert request.feeds is not None
        feeds = request.feeds
    results = model.run(feeds)
    for name, value in results.items():
        # argmax and softmax land on a NaN as if it were an answer, and JSON has no NaN.
        if not np.isfinite(value).all():
            raise ModelError(
                f"the model's output {name} holds NaN or infinity for this input, expected finite "
                "numbers. Run `mmopt verify` on the artifact."
            )
    if classifies(model.manifest):
        results.update(_classification(results["logits"], model.manifest.labels))
    return [_output(name, results[name]) for name in request.outputs]


def classifies(manifest: Manifest) -> bool:
    """Whether the outputs `label` and `score` exist beside the graph's own."""
    return manifest.task == "text-classification" and bool(manifest.labels)


def infer_response(name: str, request_id: str | None, outputs: list[dict[str, Any]]) -> Any:
    """The document that answers an infer request."""
    document: dict[str, Any] = {"model_name": name, "outputs": outputs}
    if request_id is not None:
        document["id"] = request_id
    return document


def model_metadata(model: Model) -> dict[str, Any]:
    """The document that describes the model: its tensors, and its limits as parameters."""
    manifest = model.manifest
    outputs = [_metadata(spec) for spec in manifest.outputs]
    if classifies(manifest):
        outputs.append({"name": "label", "datatype": "BYTES", "shape": [-1]})
        outputs.append({"name": "score", "datatype": "FP32", "shape": [-1]})
    return {
        "name": manifest.name,
        "platform": "onnxruntime_onnx",
        "inputs": [_metadata(spec) for spec in manifest.inputs],
        "outputs": outputs,
        "parameters": {
            "alternative_input": {"name": TEXT_INPUT, "datatype": "BYTES", "shape": [-1]},
            "task": manifest.task,
            "labels": list(manifest.labels),
            "precision": manifest.precision,
            "provider": model.provider,
            "max_length": manifest.max_length,
            "max_batch_size": MAX_BATCH,
        },
    }


def require_servable(manifest: Manifest) -> None:
    """Refuse an artifact whose tensors have no JSON form.

    Raises:
        InputError: names the tensor.
    """
    for spec in (*manifest.inputs, *manifest.outputs):
        if spec.dtype not in _DATATYPES:
            raise InputError(
                f"{spec.name} of {manifest.name} is {spec.dtype}, expected one of "
                f"{', '.join(_DATATYPES)}: the JSON protocol has no form for others. "
                "Export the model in another precision."
            )


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return {"name": spec.name, "datatype": _DATATYPES[spec.dtype], "shape": shape}


def _parse_json(body: bytes) -> Any:
    brackets = _JSON_STRING.sub(b"", body).translate(_BRACKETS, _ALL_BUT_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")  # peels the innermost level
    if brackets:
        raise RequestError(
            f"the body has unbalanced brackets or nests deeper than {MAX_DEPTH} levels, expected "
            "one JSON object."
        )
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise RequestError(f"the body is not JSON in UTF-8 ({error}).") from error


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the body holds {name}, expected finite numbers.")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{what} is {_shown(value)}, expected a JSON object.")
    return value


def _texts(tensor: Mapping[str, Any]) -> tuple[str, ...]:
    _require_datatype(TEXT_INPUT, tensor, "BYTES")
    shape = _shape(TEXT_INPUT, tensor)
    if len(shape) != 1:
        raise RequestError(f"{TEXT_INPUT} has shape {list(shape)}, expected [batch].")
    _require_batch(TEXT_INPUT, shape[0])
    values = _flat(TEXT_INPUT, tensor.get("data"), shape)
    for value in values:
        if not isinstance(value, str):
            raise RequestError(f"{TEXT_INPUT} holds {_shown(value)}, expected strings.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{TEXT_INPUT} holds half of a surrogate pair, expected whole characters."
            ) from error
    return tuple(values)


def _feeds(tensors: Mapping[str, Mapping[str, Any]], manifest: Manifest) -> Tensors:
    feeds = {}
    known: dict[str, tuple[str, int]] = {}
    longest = manifest.max_length
    for spec in manifest.inputs:
        tensor = tensors[spec.name]
        _require_datatype(spec.name, tensor, _DATATYPES[spec.dtype])
        shape = _shape(spec.name, tensor)
        expected = [size if isinstance(size, int) else f"{size}" for size in spec.shape]
        if len(shape) != len(expected):
            raise RequestError(f"{spec.name} has shape {list(shape)}, expected {expected}.")
        for axis, (size, want) in enumerate(zip(shape, expected, strict=True)):
            if isinstance(want, int):
                if size != want:
                    raise RequestError(f"{spec.name} has shape {list(shape)}, expected {expected}.")
                continue
            first, agreed = known.setdefault(want, (spec.name, size))
            if size != agreed:
                raise RequestError(
                    f"{spec.name} has shape {list(shape)}, expected {want} to be {agreed} as in "
                    f"{first}."
                )
            if axis > 0 and longest is not None and size > longest:
                raise RequestError(
                    f"{spec.name} has shape {list(shape)}, expected at most {longest} for {want}. "
                    "Truncate the input."
                )
        if shape:
            _require_batch(spec.name, shape[0])
        feeds[spec.name] = _array(spec, _flat(spec.name, tensor.get("data"), shape), shape)
    return feeds


def _array(spec: TensorSpec, values: list[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    # bool is an int to Python, and NumPy would round a float to an int without a word.
    accepted = {"b": (bool,), "i": (int,), "f": (int, float)}[dtype.kind]
    for value in values:
        if type(value) not in accepted:
            raise RequestError(
                f"{spec.name} holds {_shown(value)}, expected {_DATATYPES[spec.dtype]} values."
            )
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=dtype).reshape(shape)
    except OverflowError as error:
        raise RequestError(
            f"{spec.name} holds a number that {_DATATYPES[spec.dtype]} cannot hold."
        ) from error
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestError(f"{spec.name} holds a number that {_DATATYPES[spec.dtype]} cannot hold.")
    # ONNX's Gather reads a negative id from the end of the table without a word.
    if dtype.kind == "i" and array.min() < 0:
        raise RequestError(f"{spec.name} holds {array.min()}, expected 0 or more.")
    return array


def _shape(name: str, tensor: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise RequestError(f"{name} has shape {_shown(shape)}, expected a list of sizes above 0.")
    return tuple(shape)


def _require_datatype(name: str, tensor: Mapping[str, Any], expected: str) -> None:
    datatype = tensor.get("datatype")
    if datatype != expected:
        raise RequestError(f"{name} has datatype {_shown(datatype)}, expected {expected}.")


def _require_batch(name: str, size: int) -> None:
    if size > MAX_BATCH:
        raise RequestError(
            f"{name} has {size} rows, expected at most {MAX_BATCH}. Send more, smaller requests."
        )


def _flat(name: str, data: Any, shape: tuple[int, ...]) -> list[Any]:
    """The values of `data`, which is flattened in row order or nested as `shape` says."""
    if not isinstance(data, list):
        raise RequestError(
            f"{name} has data {_shown(data)}, expected a list of its values. Binary tensors are "
            "not supported: with tritonclient pass binary_data=False."
        )
    values = data
    if any(isinstance(value, list) for value in data):
        level: list[Any] = [data]
        for size in shape:
            if not all(isinstance(row, list) and len(row) == size for row in level):
                raise RequestError(
                    f"{name} has data that is not nested as its shape {list(shape)} says. Nest it "
                    "so, or flatten it."
                )
            level = [value for row in level for value in row]
        values = level
    if len(values) != math.prod(shape):
        raise RequestError(
            f"{name} has {len(values)} values, expected {math.prod(shape)} for its shape "
            f"{list(shape)}."
        )
    return values


def _selected(outputs: Any, manifest: Manifest) -> tuple[str, ...]:
    available = [spec.name for spec in manifest.outputs]
    if classifies(manifest):
        available += ["label", "score"]
    if outputs is None or outputs == []:
        return tuple(available)
    if not isinstance(outputs, list):
        raise RequestError(f"outputs is {_shown(outputs)}, expected a list of output names.")
    names: list[str] = []
    for position, output in enumerate(outputs):
        name = _object(output, f"outputs[{position}]").get("name")
        if name not in available:
            raise RequestError(
                f"outputs[{position}] names {_shown(name)}, expected one of: "
                f"{', '.join(available)}."
            )
        if name in names:
            raise RequestError(f"output {name} is asked for twice, expected it once.")
        names.append(name)
    return tuple(names)


def _classification(logits: npt.NDArray[Any], labels: Sequence[str]) -> Tensors:
    """Label and softmax probability of each row of logits `[B, C]`."""
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max(axis=1, keepdims=True))
    best = weights.argmax(axis=1)
    return {
        "label": np.array([labels[index] for index in best], dtype=object),
        "score": (weights.max(axis=1) / weights.sum(axis=1)).astype(np.float32),
    }


def _output(name: str, value: npt.NDArray[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(value.shape),
        "datatype": "BYTES" if value.dtype == object else _DATATYPES[value.dtype.name],
        "data": value.ravel().tolist(),
    }


def _shown(value: Any) -> str:
    """A client's value in a message, short enough to read."""
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
