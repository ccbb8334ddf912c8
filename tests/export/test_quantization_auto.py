"""`auto`: what meets the budget, with which layers wider, and that it repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from mmopt_export.providers import get_target
from mmopt_export.quantization import (
    Recipe,
    candidates,
    choose,
    layer_sensitivities,
    quantize,
    with_wider,
    without_times,
)
from mmopt_export.quantization.packing import round_to_nearest
from mmopt_kernels.errors import InputError
from onnx_files import Arrays, ops, rng, run, table_alone, unpack, write

WIDTH, LAYERS = 64, 6
FRAGILE = "mm3"
INT4 = Recipe("int4", "weights", bits=4, accuracy_level=4)
INT8 = Recipe("int8", "dynamic")
FP32 = Recipe("fp32", "none")


def network(path: Path) -> Path:
    """Residual layers, of which one has single weights so large that its blocks lose the rest."""
    weights: Arrays = {}
    nodes = []
    for index in range(LAYERS):
        w = rng(index).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8
        if f"mm{index}" == FRAGILE:
            w[::16, :] *= 40
        weights[f"w{index}"] = w
        nodes += [
            helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"m{index}"], f"mm{index}"),
            helper.make_node("Tanh", [f"m{index}"], [f"t{index}"], f"tanh{index}"),
            helper.make_node("Add", [f"h{index}", f"t{index}"], [f"h{index + 1}"], f"add{index}"),
        ]
    return write(path, nodes, {"h0": ["rows", WIDTH]}, [f"h{LAYERS}"], weights)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return network(folder / "fp32.onnx")


def feeds() -> list[Arrays]:
    generator = rng(9)
    x = [generator.standard_normal((32, WIDTH)).astype(np.float32) for _ in range(3)]
    for each in x:
        # What the large weights read is small, so that they are no more of the output than others.
        each[:, ::16] /= 40
    return [{"h0": each} for each in x]


@pytest.mark.parametrize("recipe", [INT4, INT8], ids=["int4", "int8"])
def test_sensitivities_are_what_each_layer_alone_loses(
    source: Path, tmp_path: Path, recipe: Recipe
) -> None:
    found = layer_sensitivities(source, tmp_path, recipe, feeds())
    assert set(found) == {f"mm{index}" for index in range(LAYERS)}
    assert all(0 < value < 1 for value in found.values())
    if recipe is INT4:
        assert max(found, key=lambda name: found[name]) == FRAGILE
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_sensitivity_of_a_layer_is_its_relative_output_error(
    source: Path, tmp_path: Path
) -> None:
    recipe = Recipe("int4", "weights", bits=4)  # no rounding of activations
    (batch, *_), w = feeds(), rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8
    exact = batch["h0"] @ w
    changed = batch["h0"] @ unpack(round_to_nearest(w.copy(), 4, 32, True), WIDTH, 4, True)
    expected = np.linalg.norm(changed - exact) / np.linalg.norm(exact)
    found = layer_sensitivities(source, tmp_path, recipe, [batch])
    assert found["mm0"] == pytest.approx(expected, rel=1e-3)


def test_a_wide_budget_takes_the_narrowest_as_it_is(source: Path, tmp_path: Path) -> None:
    record = choose(source, tmp_path / "out.onnx", [INT4, INT8, FP32], feeds(), None, 0.9)
    assert record["auto"]["met"]
    assert len(record["auto"]["trials"]) == 1
    assert record["recipe"] == INT4.record()
    assert ops(tmp_path / "out.onnx").count("MatMulNBits") == LAYERS


def test_a_tighter_budget_widens_the_worst_layers_and_no_more(source: Path, tmp_path: Path) -> None:
    whole = choose(source, tmp_path / "a.onnx", [INT4, FP32], feeds(), None, 0.9)
    error = whole["auto"]["trials"][0]["relative_error"]
    record = choose(source, tmp_path / "b.onnx", [INT4, FP32], feeds(), None, 0.97 * error)
    trials = record["auto"]["trials"]
    assert record["auto"]["met"]
    assert record["recipe"]["wide"][0] == FRAGILE
    assert len(record["recipe"]["wide"]) == 1
    assert record["bits"] == {"4": LAYERS - 1, "8": 1}
    (chosen,) = [trial for trial in trials if trial["chosen"]]
    assert chosen["recipe"] == record["recipe"]
    assert chosen["relative_error"] <= 0.97 * error < trials[0]["relative_error"]
    assert chosen["bytes"] > trials[0]["bytes"], "8 bits weigh more than 4"
    assert set(trials[0]["sensitivities"]) == {f"mm{index}" for index in range(LAYERS)}
    quantize(source, tmp_path / "c.onnx", with_wider(INT4, (FRAGILE,)), feeds())
    made, again = (tmp_path / f"{name}.onnx.data" for name in "bc")
    assert made.read_bytes() == again.read_bytes(), "not the graph that was measured"


def test_nothing_within_the_budget_leaves_fp32_and_no_failure(source: Path, tmp_path: Path) -> None:
    record = choose(source, tmp_path / "out.onnx", [INT4, INT8, FP32], feeds(), None, 1e-7)
    assert record["recipe"] == FP32.record()
    assert record["auto"]["met"]
    assert [t["chosen"] for t in record["auto"]["trials"]][-1]
    assert {t["recipe"]["precision"] for t in record["auto"]["trials"]} == {
        "int4",
        "int8",
        "fp32",
    }
    x = feeds()[0]
    assert np.array_equal(run(tmp_path / "out.onnx", x)[0], run(source, x)[0])


def test_tables_that_cannot_be_wider_leave_the_next_candidate(tmp_path: Path) -> None:
    source, batches = table_alone(tmp_path / "fp32.onnx"), [{"ids": np.arange(9)}]
    record = choose(source, tmp_path / "out.onnx", [INT4, INT8, FP32], batches, None, 1e-7)
    assert record["recipe"] == FP32.record()
    assert all(trial["relative_error"] is not None for trial in record["auto"]["trials"])


def test_fp16_is_the_answer_for_a_cuda_decoder_though_it_does_not_meet_the_budget(
    source: Path, tmp_path: Path
) -> None:
    order = candidates(get_target("cuda"), "decoder")
    record = choose(source, tmp_path / "out.onnx", order, feeds(), None, 1e-7)
    assert record["recipe"]["precision"] == "fp16"
    assert not record["auto"]["met"]


def test_the_choice_repeats_to_the_byte(source: Path, tmp_path: Path) -> None:
    records, contents = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record = choose(source, tmp_path / name / "m.onnx", [INT4, FP32], feeds(), None, 0.05)
        assert all(trial["milliseconds"] > 0 for trial in record["auto"]["trials"])
        records.append(json.dumps(without_times(record), allow_nan=False))
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert records[0] == records[1]
    assert contents[0] == contents[1]


def test_a_metric_of_the_task_decides_where_there_is_one(source: Path, tmp_path: Path) -> None:
    batches = feeds()
    labels = [run(source, batch)[0].argmax(axis=1) for batch in batches]

    def accuracy(model: Any) -> float:
        hits = [
            (model(batch)[f"h{LAYERS}"].argmax(axis=1) == label).mean()
            for batch, label in zip(batches, labels, strict=True)
        ]
        return float(np.mean(hits))

    record = choose(source, tmp_path / "a.onnx", [INT4, FP32], batches, None, 0.5, metric=accuracy)
    assert record["auto"]["measure"] == "drop of the metric"
    trial = record["auto"]["trials"][0]
    assert trial["chosen"]
    assert 0 < trial["metric_drop"] <= 0.5
    record = choose(source, tmp_path / "b.onnx", [INT4, FP32], batches, None, 0.0, metric=accuracy)
    assert record["recipe"]["precision"] == "fp32" or record["recipe"]["wide"]


def test_what_keeps_to_the_budget_without_parity_is_not_taken(source: Path, tmp_path: Path) -> None:
    asked = []

    def parity(session: Any, precision: str) -> bool:
        asked.append(precision)
        return precision != "int4"

    record = choose(
        source, tmp_path / "out.onnx", [INT4, INT8, FP32], feeds(), None, 0.9, parity=parity
    )
    assert asked == ["int4", "int4", "int8"]
    assert record["recipe"] == INT8.record()
    assert record["auto"]["met"]
    assert [trial["parity"] for trial in record["auto"]["trials"]] == [False, False, True]


def test_parity_does_not_make_up_for_what_is_beyond_the_budget(
    source: Path, tmp_path: Path
) -> None:
    record = choose(
        source, tmp_path / "out.onnx", [INT4, FP32], feeds(), None, 1e-7, parity=lambda *_: True
    )
    assert record["recipe"] == FP32.record()
    *beyond, _ = [trial["parity"] for trial in record["auto"]["trials"]]
    assert set(beyond) == {None}, "is measured within the budget only"


def test_outputs_of_pytorch_are_what_the_error_is_measured_against(
    source: Path, tmp_path: Path
) -> None:
    elsewhere = [{f"h{LAYERS}": np.full((32, WIDTH), 7.0, np.float32)} for _ in feeds()]
    record = choose(source, tmp_path / "out.onnx", [FP32], feeds(), elsewhere, 0.1)
    assert not record["auto"]["met"]
    assert record["auto"]["trials"][0]["relative_error"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([INT4], [], None, 0.1), "expected at least one batch"),
        (([], feeds(), None, 0.1), "auto has no candidates"),
        (([INT4], feeds(), None, -0.1), "--max-drop -0.1 is no budget"),
        (([INT4], feeds(), None, float("nan")), "--max-drop nan is no budget"),
        (([INT4], feeds(), None, float("inf")), "--max-drop inf is no budget"),
    ],
)
def test_bad_input_is_refused(source: Path, tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(source, tmp_path / "out.onnx", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
