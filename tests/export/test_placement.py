"""Where nodes ran: ONNX Runtime's own profiles on the CPU, and profiles of CUDA written by hand.

The events of CUDA have the form of those that ONNX Runtime 1.32 writes on the CPU, with CUDA's
provider name; a run on a GPU is marked `gpu`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt_export.placement import (
    CPU,
    CUDA,
    FUSED_OPERATORS,
    PROMISES,
    PlacedNode,
    count_operators,
    judge_placement,
    measure_placement,
    read_profile,
)
from mmopt_export.runtime import has_provider, open_session
from mmopt_kernels.errors import MmoptError


def shape_graph(path: Path) -> Path:
    """Flattens its input by a shape computed from its own, then a matrix product with a bias."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], name="gather"),
        helper.make_node("Concat", ["batch", "rest"], ["flat"], axis=0, name="concat"),
        helper.make_node("Reshape", ["x", "flat"], ["rows"], name="reshape"),
        helper.make_node("MatMul", ["rows", "w"], ["product"], name="matmul"),
        helper.make_node("Add", ["product", "b"], ["y"], name="add"),
    ]
    tensors = {
        "zero": np.zeros(1, np.int64),
        "rest": np.full(1, -1, np.int64),
        "w": np.ones((300, 4), np.float32),
        "b": np.ones(4, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "flatten",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 150])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def profile_of(model: Path, provider: str, scratch: Path, batches: tuple[int, ...] = (3,)) -> Path:
    session = open_session(model, provider=provider, profile=scratch / "profile")
    for batch in batches:
        session.run(None, {"x": np.ones((batch, 2, 150), np.float32)})
    return Path(session.end_profiling())


def write_profile(path: Path, *nodes: tuple[str, str, str, list[Any], list[Any]]) -> Path:
    """A profile of nodes given as name, operator, provider, input and output types and shapes."""
    events = [{"cat": "Session", "name": "session_initialization", "ph": "X", "args": {}}]
    for index, (name, operator, provider, inputs, outputs) in enumerate(nodes):
        arguments = {
            "op_name": operator,
            "provider": provider,
            "node_index": str(index),
            "input_type_shape": inputs,
            "output_type_shape": outputs,
        }
        events.append({"cat": "Node", "name": f"{name}_kernel_time", "ph": "X", "args": arguments})
    path.write_text(json.dumps(events))
    return path


IDS, HIDDEN, DIMS = {"int64": [2, 7]}, {"float16": [2, 7, 32]}, {"int64": [2]}
ONE = {"int64": [1]}
RIGHT = (
    ("shape", "Shape", CUDA, [IDS], [DIMS]),
    ("gather", "Gather", CPU, [DIMS, ONE], [ONE]),
    ("concat", "Concat", CPU, [ONE, ONE], [DIMS]),
    ("embed", "Gather", CUDA, [{"float16": [99, 32]}, IDS], [HIDDEN]),
    ("norm", "SkipLayerNormalization", CUDA, [HIDDEN, HIDDEN], [HIDDEN]),
)


def judge(path: Path, *nodes: Any, provider: str = CUDA) -> Any:
    profile = write_profile(path, *nodes)
    return judge_placement("model", read_profile(profile), {"Add": 2}, provider=provider)


def test_a_real_profile_names_every_node_once_with_its_largest_tensor(tmp_path: Path) -> None:
    model = shape_graph(tmp_path / "model.onnx")
    nodes = read_profile(profile_of(model, CPU, tmp_path, batches=(1, 5, 2)))
    found = {node.name: node for node in nodes}
    assert len(nodes) == 5
    assert found["gather"] == PlacedNode("gather", "Gather", CPU, 3, ("int64",))
    assert found["reshape"].values == 5 * 300
    (fused,) = [node for node in nodes if node.operator == "Gemm"]
    assert "matmul" in fused.name


def test_on_the_cpu_everything_is_in_place_and_fusions_are_counted(tmp_path: Path) -> None:
    model = shape_graph(tmp_path / "model.onnx")
    operators = count_operators(model)
    assert operators == dict.fromkeys(("Shape", "Gather", "Concat", "Reshape", "MatMul", "Add"), 1)
    session = open_session(model, provider=CPU, profile=tmp_path / "profile")
    session.run(None, {"x": np.ones((3, 2, 150), np.float32)})
    placement = measure_placement("model", model, session, provider=CPU)
    assert placement.holds
    assert placement.nodes == {CPU: 5}
    assert placement.fused == {"Gemm": (0, 1)}
    assert placement.total == (6, 5)
    assert "nodes 6 -> 5; Gemm 0 -> 1" in "\n".join(placement.lines())
    json.dumps(placement.to_dict(), allow_nan=False)


def test_shape_arithmetic_on_the_cpu_of_a_cuda_artifact_is_allowed_with_its_reason(
    tmp_path: Path,
) -> None:
    placement = judge(tmp_path / "profile", *RIGHT)
    assert placement.holds
    assert placement.nodes == {CPU: 2, CUDA: 3}
    assert [(node.name, node.reason) for node in placement.on_cpu] == [
        ("concat", "picks or arranges dimensions of a shape"),
        ("gather", "picks or arranges dimensions of a shape"),
    ]
    assert "2 of them on shapes, on purpose" in placement.lines()[0]


@pytest.mark.parametrize(
    ("node", "operator", "inputs"),
    [
        ("quantize", "DynamicQuantizeLinear", [{"float": [2, 7, 32]}]),
        # Its tensors are small, and yet it is no arithmetic on shapes.
        ("head", "MatMul", [{"float": [1, 4]}, {"float": [4, 3]}]),
        # It may be on the CPU for a shape, and here it reads an embedding table.
        ("embed", "Gather", [{"float": [99, 32]}, IDS]),
        ("mask", "Where", [{"bool": [2, 1, 7, 8]}, {"float": [1]}]),
        # Half precision is never moved for a shape's sake.
        ("small", "Add", [{"float16": [1]}, {"float16": [1]}]),
        ("long", "Range", [{"int64": []}, {"int64": [101]}]),
    ],
)
def test_a_cpu_node_in_a_cuda_artifact_is_named(
    tmp_path: Path, node: str, operator: str, inputs: list[Any]
) -> None:
    stray = (node, operator, CPU, inputs, [ONE])
    placement = judge(tmp_path / "profile", *RIGHT, stray)
    assert not placement.holds
    assert [(one.name, one.operator) for one in placement.misplaced] == [(node, operator)]
    assert f"  {node} ({operator}) ran on {CPU}, expected {CUDA}" in placement.lines()
    assert placement.to_dict()["holds"] is False


def test_what_a_cpu_node_writes_counts_as_what_it_reads(tmp_path: Path) -> None:
    """A Range of small numbers may make a tensor as long as the text."""
    for count, held in ((100, True), (101, False)):
        stray = ("long", "Range", CPU, [ONE], [{"int64": [count]}])
        assert judge(tmp_path / "profile", *RIGHT, stray).holds == held
    half = ("cast", "Cast", CPU, [ONE], [{"float16": [1]}])
    assert not judge(tmp_path / "profile", *RIGHT, half).holds


def test_only_the_cpu_may_take_arithmetic_on_shapes(tmp_path: Path) -> None:
    stray = ("gather", "Gather", "TensorrtExecutionProvider", [DIMS, ONE], [ONE])
    placement = judge(tmp_path / "profile", *RIGHT, stray)
    assert [node.provider for node in placement.misplaced] == ["TensorrtExecutionProvider"]


def test_a_fused_operator_that_is_gone_in_the_run_is_reported(tmp_path: Path) -> None:
    nodes = read_profile(write_profile(tmp_path / "profile", *RIGHT))
    placement = judge_placement("model", nodes, {"Gemm": 2, "Add": 1}, provider=CUDA)
    assert placement.fused == {"Gemm": (2, 0), "SkipLayerNormalization": (0, 1)}


def test_copies_between_host_and_device_are_named(tmp_path: Path) -> None:
    copy = ("Memcpy_token_12", "MemcpyToHost", CUDA, [HIDDEN], [HIDDEN])
    placement = judge(tmp_path / "profile", *RIGHT, copy)
    assert not placement.holds
    assert placement.copies == ("Memcpy_token_12",)
    assert placement.misplaced == ()
    assert "  copies: Memcpy_token_12, expected at most 0" in placement.lines()


def test_a_cuda_artifact_that_ran_on_the_cpu_alone_does_not_hold(tmp_path: Path) -> None:
    """What a missing cuDNN does: every node falls back, and every node is named."""
    model = shape_graph(tmp_path / "model.onnx")
    nodes = read_profile(profile_of(model, CPU, tmp_path))
    placement = judge_placement("model", nodes, count_operators(model), provider=CUDA)
    assert not placement.holds
    assert {node.operator for node in placement.misplaced} == {"Gemm", "Reshape", "Shape"}


def test_another_provider_must_run_everything(tmp_path: Path) -> None:
    placement = judge(tmp_path / "profile", *RIGHT, provider="TensorrtExecutionProvider")
    assert len(placement.misplaced) == 5


def test_nodes_without_names_are_counted_apart(tmp_path: Path) -> None:
    nodes = [("", "Add", CPU, [ONE], [ONE])] * 3
    assert len(read_profile(write_profile(tmp_path / "profile", *nodes))) == 3


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[1]", '[{"cat": "Node", "args": {"provider": "x"}}]']
)
def test_what_is_no_profile_is_said_to_be_undecided(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile"
    path.write_text(text)
    with pytest.raises(MmoptError, match="placement cannot be checked") as caught:
        read_profile(path)
    assert caught.value.exit_code == 3


def test_a_session_without_a_profile_is_said_to_be_undecided(tmp_path: Path) -> None:
    model = shape_graph(tmp_path / "model.onnx")
    session = open_session(model, provider=CPU)
    with pytest.raises(MmoptError, match="placement cannot be checked"):
        measure_placement("model", model, session, provider=CPU)


def test_operators_of_subgraphs_are_counted(tmp_path: Path) -> None:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "inner", [], [output])
    branch = helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [branch, helper.make_node("Abs", ["y"], ["z"])],
        "outer",
        [helper.make_tensor_value_info("yes", TensorProto.BOOL, [])],
        [],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    counted = count_operators(tmp_path / "model.onnx")
    assert counted == {"If": 1, "Neg": 2, "Abs": 1}


def test_promises_name_operators_that_exist_and_do_no_work_of_a_model() -> None:
    from onnx.defs import has

    promise = PROMISES[CUDA]
    assert all(has(operator) for operator in promise.on_cpu)
    assert not {"MatMul", "Conv", "Softmax", *FUSED_OPERATORS} & promise.on_cpu.keys()
    assert list(FUSED_OPERATORS) == sorted(FUSED_OPERATORS)


def test_on_cuda_fp32_is_no_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's default rounds fp32 products to 10 bits, and no proof of fp32 would hold."""
    import onnxruntime

    from mmopt_export import runtime

    opened: list[Any] = []

    class Session:
        def __init__(self, _model: str, _options: Any, *, providers: Any) -> None:
            opened.append(providers)

        def get_providers(self) -> list[str]:
            return [CUDA, CPU]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn"))
    runtime._load_cuda.cache_clear()
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for _ in range(2):
        open_session(tmp_path / "model.onnx", provider=CUDA)
    runtime._load_cuda.cache_clear()
    assert opened == [[(CUDA, {"use_tf32": "0"})]] * 2
    said = capsys.readouterr()
    assert said.out == ""  # where a command's document stands
    assert said.err.count("Failed to load libcudnn") == 1


@pytest.mark.gpu
def test_on_cuda_shapes_are_on_the_cpu_and_nothing_else(tmp_path: Path) -> None:
    if not has_provider(CUDA):
        pytest.skip("this ONNX Runtime has no CUDAExecutionProvider")
    model = shape_graph(tmp_path / "model.onnx")
    nodes = read_profile(profile_of(model, CUDA, tmp_path))
    placement = judge_placement("model", nodes, count_operators(model), provider=CUDA)
    assert placement.holds, placement.lines()
    assert {node.operator for node in placement.on_cpu} <= {"Gather", "Concat"}
