"""The V2 protocol as pure functions: what is accepted, what is refused and in which words."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mmopt.serve import protocol
from mmopt_export.manifest import TensorSpec
from mmopt_kernels.errors import InputError
from tiny_artifacts import make_manifest, text_component

MANIFEST = make_manifest("tiny", {"model": text_component(2)}, labels=("no", "yes"), max_length=8)


class FixedModel:
    """Answers every request with the same logits."""

    manifest = MANIFEST
    provider = "CPUExecutionProvider"

    def __init__(self, logits: Sequence[Sequence[float]]) -> None:
        self._logits = np.array(logits, np.float32)

    def tokenize(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(texts), 1), np.int64)}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": self._logits}


def tensor(name: str, data: Any, shape: Any, datatype: Any = "INT64") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def ids(data: Any, shape: Any, **fields: Any) -> dict[str, Any]:
    mask = tensor("attention_mask", [1] * 4, [2, 2])
    return {"inputs": [tensor("input_ids", data, shape, **fields), mask]}


def text(*texts: Any, **fields: Any) -> dict[str, Any]:
    return {"inputs": [tensor("text", list(texts), [len(texts)], "BYTES")], **fields}


def parse(document: Any) -> protocol.InferRequest:
    return protocol.parse_request(json.dumps(document).encode(), MANIFEST)


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]], ids=["flattened", "nested"])
def test_both_forms_of_data_give_the_same_tensor(data: Any) -> None:
    request = parse(ids(data, [2, 2]))
    assert request.feeds is not None
    assert request.feeds["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(request.feeds["input_ids"], [[1, 2], [3, 4]])


def test_text_id_and_selected_outputs_are_kept_in_order() -> None:
    request = parse(text("a", "[{", id="é", outputs=[{"name": "score"}, {"name": "logits"}]))
    assert request == protocol.InferRequest("é", ("a", "[{"), None, ("score", "logits"))


@pytest.mark.parametrize("outputs", [{}, {"outputs": []}], ids=["absent", "empty"])
def test_without_a_selection_every_output_is_returned(outputs: dict[str, Any]) -> None:
    assert parse(text("a", **outputs)).outputs == ("logits", "label", "score")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "the body is [], expected a JSON object"),
        ({}, "inputs is missing, expected a list of tensors"),
        ({"inputs": []}, "inputs is [], expected a list of tensors"),
        ({"inputs": [1]}, "inputs[0] is 1, expected a JSON object"),
        ({"inputs": [{}]}, "inputs[0].name is missing, expected a string"),
        (text("a", id=3), "id is 3, expected a string"),
        ({"inputs": text("a")["inputs"] * 2}, 'input "text" is given twice'),
        (
            {"inputs": [tensor("pixels", [1], [1])]},
            'the inputs are "pixels", expected input_ids, attention_mask, or text alone',
        ),
        (
            {"inputs": [tensor("input_ids", [1], [1, 1])]},
            'the inputs are "input_ids", expected input_ids, attention_mask',
        ),
        (
            ids([1, 2, 3, 4], [2, 2], datatype="FP32"),
            'input_ids has datatype "FP32", expected INT64',
        ),
        (ids([1, 2, 3, 4], [4]), "input_ids has shape [4], expected ['batch', 'sequence']"),
        (ids([1, 2, 3, 4], [2, -1]), "input_ids has shape [2, -1], expected a list of sizes"),
        (ids([1, 2, 3, 4], [2, True]), "input_ids has shape [2, true], expected a list of sizes"),
        (ids([], [0, 2]), "input_ids has shape [0, 2], expected a list of sizes above 0"),
        (ids([1, 2, 3], [2, 2]), "input_ids has 3 values, expected 4 for its shape [2, 2]"),
        (ids([[1, 2], [3]], [2, 2]), "data that is not nested as its shape [2, 2] says"),
        (ids([[1, 2], 3, 4], [2, 2]), "data that is not nested as its shape [2, 2] says"),
        (ids([[[1], [2]], [[3], [4]]], [2, 2]), "input_ids holds [1], expected INT64 values"),
        (ids("AAEC", [2, 2]), "expected a list of its values. Binary tensors"),
        (ids([1, 2, 3, 4.5], [2, 2]), "input_ids holds 4.5, expected INT64 values"),
        (ids([1, 2, 3, True], [2, 2]), "input_ids holds true, expected INT64 values"),
        (ids([1, 2, 3, None], [2, 2]), "expected INT64 values"),
        (ids([1, 2, 3, 2**63], [2, 2]), "input_ids holds a number that INT64 cannot hold"),
        (ids([1, 2, 3, -1], [2, 2]), "input_ids holds -1, expected 0 or more"),
        (
            ids([1] * 9, [1, 9]),
            "input_ids has shape [1, 9], expected at most 8 for sequence. Truncate",
        ),
        (
            ids([1, 2], [1, 2]),
            "attention_mask has shape [2, 2], expected batch to be 1 as in input_ids",
        ),
        (ids([1] * 65, [65, 1]), "input_ids has 65 rows, expected at most 64"),
        (text(*["a"] * 65), "text has 65 rows, expected at most 64"),
        (text("a", 3), "text holds 3, expected strings"),
        (text("\ud800"), "text holds half of a surrogate pair"),
        (
            {"inputs": [tensor("text", ["a"], [1, 1], "BYTES")]},
            "text has shape [1, 1], expected [batch]",
        ),
        (text("a", outputs={}), "outputs is {}, expected a list of output names"),
        (
            text("a", outputs=[{"name": "probs"}]),
            'outputs[0] names "probs", expected one of: logits, label, score',
        ),
        (text("a", outputs=[{"name": "label"}] * 2), "output label is asked for twice"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(document: Any, message: str) -> None:
    with pytest.raises(protocol.RequestError) as error:
        parse(document)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        ([1.0] * 8, [1, 4, 1, 2], "shape [1, 4, 1, 2], expected ['batch', 3, 1, 2]"),
        ([1.0] * 6, [1, 3, 2, 1], "shape [1, 3, 2, 1], expected ['batch', 3, 1, 2]"),
        ([1.0] * 5 + [1e39], [1, 3, 1, 2], "holds a number that FP32 cannot hold"),
        ([1.0] * 5 + [10**400], [1, 3, 1, 2], "holds a number that FP32 cannot hold"),
    ],
)
def test_pixels_have_the_sizes_of_the_graph_and_are_finite(
    values: list[float], shape: list[int], message: str
) -> None:
    pixels = TensorSpec("pixels", "float32", ("batch", 3, 1, 2))
    component = dataclasses.replace(MANIFEST.component, inputs=(pixels,))
    manifest = dataclasses.replace(MANIFEST, components={"model": component})

    def request(values: list[float], shape: list[int]) -> protocol.InferRequest:
        document = {"inputs": [tensor("pixels", values, shape, "FP32")]}
        return protocol.parse_request(json.dumps(document).encode(), manifest)

    assert request([1.0, 2, 3e38] * 4, [2, 3, 1, 2]).feeds is not None
    with pytest.raises(protocol.RequestError) as error:
        request(values, shape)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON in UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not JSON in UTF-8"),
        (b'{"inputs"', "unbalanced brackets"),
        (b'{"inputs": 1]', "not JSON in UTF-8"),
        (b'{"id": "a', "unbalanced brackets"),
        (b"[" * 17 + b"]" * 17, "nests deeper than 16 levels"),
        (b"[" * 4_000_000, "nests deeper than 16 levels"),
        (b'"\\"' * 1_000_000, "not JSON in UTF-8"),
        (b'{"inputs": [NaN]}', "holds NaN, expected finite numbers"),
        (b'{"inputs": [-Infinity]}', "holds -Infinity, expected finite numbers"),
        (b'{"inputs": [' + b"1" * 5000 + b"]}", "not JSON in UTF-8"),
    ],
    ids=[
        "empty",
        "utf16",
        "cut",
        "mismatched",
        "cut-in-string",
        "deep",
        "very-deep",
        "many-quotes",
        "nan",
        "infinity",
        "long-integer",
    ],
)
def test_a_body_that_is_no_usable_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(protocol.RequestError) as error:
        protocol.parse_request(body, MANIFEST)
    assert message in str(error.value)


def test_brackets_inside_strings_do_not_count_as_nesting() -> None:
    hostile = '[{"\\' * 100
    assert parse(text(hostile)).texts == (hostile,)


def test_label_and_score_come_from_the_logits() -> None:
    outputs = protocol.infer(FixedModel([[0.0, 0.0], [1000.0, -1000.0]]), parse(text("a", "b")))
    logits, label, score = outputs
    assert logits == {
        "name": "logits",
        "shape": [2, 2],
        "datatype": "FP32",
        "data": [0.0, 0.0, 1000.0, -1000.0],
    }
    assert label == {"name": "label", "shape": [2], "datatype": "BYTES", "data": ["no", "no"]}
    assert score == {"name": "score", "shape": [2], "datatype": "FP32", "data": [0.5, 1.0]}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_output_is_an_error_even_when_only_the_label_is_asked_for(
    value: float,
) -> None:
    request = parse(text("a", outputs=[{"name": "label"}]))
    with pytest.raises(protocol.ModelError, match="logits holds NaN or infinity"):
        protocol.infer(FixedModel([[value, 0.0]]), request)


def test_metadata_lists_every_tensor_and_limit() -> None:
    document = protocol.model_metadata(FixedModel([[0.0, 0.0]]))
    assert document["name"] == "tiny"
    assert document["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert [output["name"] for output in document["outputs"]] == ["logits", "label", "score"]
    assert document["outputs"][0]["shape"] == [-1, 2]
    assert document["parameters"]["labels"] == ["no", "yes"]
    assert document["parameters"]["max_batch_size"] == protocol.MAX_BATCH


def test_a_type_without_a_json_form_is_refused_at_start() -> None:
    outputs = (TensorSpec("logits", "float16", ("batch", 2)),)
    component = dataclasses.replace(MANIFEST.component, outputs=outputs)
    half = dataclasses.replace(MANIFEST, components={"model": component})
    with pytest.raises(InputError, match="logits of tiny is float16, expected one of"):
        protocol.require_servable(half)
