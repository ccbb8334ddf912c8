"""Graphs for CUDA: what keeps their work on the GPU, computed on the CPU to the same numbers.

That ONNX Runtime then adds no copies shows on a GPU only, in `test_on_cuda.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt_export.checkpoint import load_checkpoint
from mmopt_export.device import keep_on_device
from mmopt_export.graph import trace
from mmopt_export.quantization.half import KEPT_WIDE
from mmopt_export.tasks import make_plan
from tiny_encoders import save_dual_encoder
from tiny_seq2seq import save_seq2seq


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], **constants: Any) -> Any:
    graph = helper.make_graph(
        nodes,
        "device",
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def kept(model: Any) -> Any:
    graph = onnx_ir.from_proto(model)
    keep_on_device(graph)
    changed = onnx_ir.to_proto(graph)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def run(model: Any, feeds: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def argmax(axis: int, keepdims: int, kind: int, **attributes: int) -> Any:
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=axis, keepdims=keepdims, **attributes)
    return model_of(
        [node],
        [helper.make_tensor_value_info("x", kind, ["a", "b", "c"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["d", "e", "f"][: 2 + keepdims])],
    )


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.INT64], ids=["int32", "int64"])
def test_argmax_of_integers_takes_the_first_maximum_without_an_argmax(
    axis: int, keepdims: int, kind: int
) -> None:
    """Few values, so that maxima are many; above 2^24 for int32 would not survive fp32."""
    model = argmax(axis, keepdims, kind)
    changed = kept(model)
    assert "ArgMax" not in {node.op_type for node in changed.graph.node}
    values = np.random.default_rng(0).integers(0, 3, (3, 5, 7)) + (1 << 25)
    feeds = {"x": values.astype(helper.tensor_dtype_to_np_dtype(kind))}
    np.testing.assert_array_equal(run(changed, feeds), run(model, feeds))


def test_argmax_of_floats_or_of_the_last_maximum_is_left_alone() -> None:
    for model in (
        argmax(1, 0, TensorProto.FLOAT),
        argmax(1, 0, TensorProto.INT64, select_last_index=1),
    ):
        assert [node.op_type for node in kept(model).graph.node] == ["ArgMax"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["scalar", "vector", "matrix"])
def test_a_size_that_tensors_meet_is_written_by_a_kernel(shape: tuple[int, ...]) -> None:
    """`x - size(x)`, with the size as an integer of any rank."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], start=1, end=2),
        helper.make_node("Reshape", ["sizes", "to"], ["size"]),
        helper.make_node("Sub", ["x", "size"], ["y"], name="meet"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, [2, "n"]) for name in "xy"]
    model = model_of(nodes, values[:1], values[1:], to=np.asarray(shape, np.int64))
    changed = kept(model)
    made = {output: node for node in changed.graph.node for output in node.output}
    meeting = next(node for node in changed.graph.node if node.name == "meet")
    writer = made[meeting.input[1]]
    assert "Range" in (writer.op_type, made[writer.input[0]].op_type)
    feeds = {"x": np.arange(10, dtype=np.int64).reshape(2, 5)}
    np.testing.assert_array_equal(run(changed, feeds), run(model, feeds))


def test_arithmetic_of_sizes_alone_stays_on_the_host() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], start=1, end=2),
        helper.make_node("Squeeze", ["sizes"], ["size"]),
        helper.make_node("Sub", ["size", "one"], ["less"]),
        helper.make_node("Range", ["zero", "less", "one"], ["y"]),
    ]
    model = model_of(
        nodes,
        [helper.make_tensor_value_info("x", TensorProto.INT64, [2, "n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["m"])],
        zero=np.int64(0),
        one=np.int64(1),
    )
    assert [node.op_type for node in kept(model).graph.node] == [node.op_type for node in nodes]


def traced(folder: Path, part: str, target: str) -> list[onnx_ir.Node]:
    [wanted] = [one for one in make_plan(load_checkpoint(str(folder))).parts if one.name == part]
    return list(trace(wanted, target=target).graph.all_nodes())


def is_changed(nodes: list[onnx_ir.Node]) -> bool:
    """Whether a traced part was changed for CUDA."""
    return any(".device." in str(value.name) for node in nodes for value in node.outputs)


@pytest.mark.slow
def test_clip_finds_the_end_of_a_text_without_argmax_for_cuda_alone(tmp_path: Path) -> None:
    save_dual_encoder(tmp_path, "CLIP")
    nodes = traced(tmp_path, "text", "cuda")
    assert "ArgMax" not in {node.op_type for node in nodes}
    assert is_changed(nodes)
    nodes = traced(tmp_path, "text", "cpu")
    assert "ArgMax" in {node.op_type for node in nodes}
    assert not is_changed(nodes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_decoders_write_the_sizes_that_positions_meet_for_cuda(tmp_path: Path, family: str) -> None:
    save_seq2seq(tmp_path, family)
    nodes = traced(tmp_path, "decoder", "cuda")
    assert is_changed(nodes)
    # What transformers keeps in fp32, the second projection of each of T5's three blocks, says so.
    kept = [node.op_type for node in nodes if node.metadata_props.get(KEPT_WIDE) == "fp16"]
    assert kept == (["MatMul"] * 3 if family == "t5" else [])
