"""Sessions as artifacts need them, and runs whose rows each choose an adapter."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mmopt_export import runtime
from mmopt_export.adapters.files import write_adapter
from mmopt_export.adapters.swap import add_defaults
from mmopt_export.caches import new_cache_map
from mmopt_export.manifest import TensorSpec, read_manifest, record_files
from mmopt_export.runtime import Runner, open_session, run_graph
from mmopt_kernels.errors import InputError, MmoptError
from tiny_artifacts import edit_graph, make_artifact, weights

CPU = "CPUExecutionProvider"
FED = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)
A, B = "w_lora_a", "w_lora_b"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("plain") / "model")


def test_a_session_is_opened_as_artifacts_need_it(plain: Path) -> None:
    session = open_session(plain / "model.onnx", provider=CPU, threads=1)
    options = session.get_session_options()
    levels = onnxruntime.GraphOptimizationLevel
    assert session.get_providers() == [CPU]
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == levels.ORT_ENABLE_ALL
    # One pattern for every length would be kept, and a client's bad ids would fill a log.
    assert not options.enable_mem_pattern
    assert options.log_severity_level == 4
    assert not options.enable_profiling


def test_a_session_as_traced_is_not_optimized_and_keeps_no_second_copy(plain: Path) -> None:
    options = open_session(
        plain / "model.onnx", provider=CPU, threads=1, optimize=False
    ).get_session_options()
    levels = onnxruntime.GraphOptimizationLevel
    assert options.graph_optimization_level == levels.ORT_DISABLE_ALL
    assert options.get_session_config_entry("session.disable_prepacking") == "1"


def test_a_session_takes_the_cores_that_the_process_may_use_or_as_many_as_it_is_told(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "usable_cores", lambda: 1)
    options = open_session(plain / "model.onnx", provider=CPU).get_session_options()
    assert options.intra_op_num_threads == 1
    options = open_session(plain / "model.onnx", provider=CPU, threads=2).get_session_options()
    assert options.intra_op_num_threads == 2


def test_a_provider_that_is_not_there_is_named_with_those_that_are(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MmoptError, match=r"here has no NoProvider, only .*CPUExecutionProvider"):
        open_session(plain / "model.onnx", provider="NoProvider")
    # Some builds list one that they then leave out, and ONNX Runtime goes on without a word.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["DmlExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="DmlExecutionProvider"),
        pytest.raises(MmoptError, match=f"on {CPU}, expected DmlExecutionProvider"),
    ):
        open_session(plain / "model.onnx", provider="DmlExecutionProvider")


def test_a_graph_of_fp16_takes_wider_floats_and_leaves_integers_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["n"], ["m"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["x", "m"], ["y"]),
    ]
    half, whole = TensorProto.FLOAT16, TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "half",
        [
            helper.make_tensor_value_info("x", half, ["rows"]),
            helper.make_tensor_value_info("n", whole, ["rows"]),
        ],
        [helper.make_tensor_value_info("y", half, ["rows"])],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx", provider=CPU, threads=1)
    (found,) = run_graph(session, ["y"], {"x": FED[0], "n": np.arange(4)})
    assert found.dtype == np.float16
    assert np.array_equal(found, FED[0].astype(np.float16) * np.arange(4).astype(np.float16))
    with pytest.raises(runtime.runtime_errors()):
        run_graph(session, ["y"], {"x": FED[0].astype(np.float64), "n": np.arange(4)})


def arrays(seed: int, rank: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    shapes = {A: (4, rank), B: (rank, 3)}
    return {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


ADAPTERS = {"one": arrays(1, 2), "two": arrays(2, 1)}


def with_adapters(folder: Path, *, known: bool = True) -> Path:
    """An artifact whose graph adds `(input @ A) @ B`, and two adapters of it."""

    def change(model: Any) -> None:
        graph = model.graph
        graph.node[-1].output[0] = "base"
        graph.node.extend(
            [
                helper.make_node("MatMul", ["input", A], ["down"]),
                helper.make_node("MatMul", ["down", B], ["up"]),
                helper.make_node("Add", ["base", "up"], ["logits"]),
            ]
        )
        graph.input.extend(
            [
                helper.make_tensor_value_info(A, TensorProto.FLOAT, [4, "rank"]),
                helper.make_tensor_value_info(B, TensorProto.FLOAT, ["rank", 3]),
            ]
        )

    make_artifact(folder)
    edit_graph(folder, change)
    add_defaults(folder / "model.onnx")
    files = {name: {"model": f"adapters/{name}.onnx_adapter"} for name in ADAPTERS}
    (folder / "adapters").mkdir()
    for name, values in ADAPTERS.items():
        write_adapter(folder / files[name]["model"], values)
    manifest = dataclasses.replace(read_manifest(folder), adapters=files if known else {})
    dataclasses.replace(manifest, files=record_files(folder)).write(folder)
    return folder


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(with_adapters(tmp_path_factory.mktemp("adapted") / "model"), threads=1)


def expected(rows: np.ndarray, adapter: str | None) -> np.ndarray:
    result = rows.astype(np.float64) @ weights() + 1
    if adapter is not None:
        values = ADAPTERS[adapter]
        result += rows.astype(np.float64) @ values[A] @ values[B]
    return result


@pytest.mark.parametrize(
    "chosen",
    [
        ["one", "two", "one", None, "two"],
        ["two", None, "one", "two", "one"],
        [None] * 5,
        ["two"] * 5,
    ],
    ids=lambda names: "-".join(str(name) for name in names),
)
def test_rows_come_back_in_their_order_each_with_its_adapter(
    chosen: list[str | None], runner: Runner
) -> None:
    found = runner.run({"input": FED}, adapter=chosen)["logits"]
    for row, name in enumerate(chosen):
        np.testing.assert_allclose(found[row], expected(FED[row], name), atol=1e-5)
    for name in ("one", "two", None):
        same = runner.run({"input": FED}, adapter=name)["logits"]
        np.testing.assert_allclose(same, expected(FED, name), atol=1e-5)


def test_as_many_adapters_as_rows_are_expected_and_at_least_one(runner: Runner) -> None:
    for rows, names in ((5, ["one"] * 4), (5, ["one"] * 6), (0, []), (5, [])):
        message = f"input has {rows} rows and {len(names)} adapters are given, expected one for"
        with pytest.raises(InputError, match=message):
            runner.run({"input": FED[:rows]}, adapter=names)


def changed(runner: Runner, change: Callable[[Any], Any]) -> Runner:
    """The same sessions under a manifest that says something else."""
    other = Runner.__new__(Runner)
    vars(other).update(vars(runner), manifest=change(runner.manifest))
    return other


def test_rows_of_a_cache_or_of_no_batch_have_one_adapter(runner: Runner) -> None:
    caches = {"model": new_cache_map(layers=1, heads=1, head_size=8)}
    other = changed(runner, lambda manifest: dataclasses.replace(manifest, caches=caches))
    with pytest.raises(InputError, match="has a cache and takes one adapter for all rows"):
        other.run({"input": FED}, adapter=["one"] * 5)
    part = runner.manifest.components["model"]
    for sides in (
        {"outputs": (TensorSpec("logits", "float32", ("rows", 3)),)},
        {"outputs": (TensorSpec("logits", "float32", ()),)},
        {"inputs": (TensorSpec("input", "float32", ("rows", 4)),)},
    ):
        parts = {"model": dataclasses.replace(part, **sides)}
        other = changed(
            runner,
            lambda manifest, parts=parts: dataclasses.replace(manifest, components=parts),
        )
        with pytest.raises(InputError, match="has no row for each of a batch, so rows"):
            other.run({"input": FED}, adapter=["one"] * 5)


def test_a_graph_without_a_layer_of_an_adapter_runs_as_it_is(runner: Runner) -> None:
    elsewhere = {"one": {"other": "adapters/one.onnx_adapter"}}
    other = changed(runner, lambda manifest: dataclasses.replace(manifest, adapters=elsewhere))
    assert other.adapter_feeds("one") == {}
    assert sorted(runner.adapter_feeds("one")) == [A, B]
    assert runner.adapter_feeds(None) == {}


def test_a_name_that_no_adapter_has_is_refused(runner: Runner) -> None:
    for name in ("three", ["one"], 1):
        with pytest.raises(InputError, match=r"no adapter .*, expected one of: one, two"):
            runner.adapter_feeds(name)  # type: ignore[arg-type]


def test_a_graph_that_is_not_there_is_named_with_those_that_are(runner: Runner) -> None:
    with pytest.raises(InputError, match="has no graph 'decoder', expected one of: model"):
        runner.session("decoder")


def test_an_artifact_without_a_tokenizer_reads_no_text(runner: Runner) -> None:
    with pytest.raises(InputError, match="is for text-classification and reads no text"):
        runner.tokenize(["text"])
