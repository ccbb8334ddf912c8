"""fp16 and bf16 graphs: what stays fp32 so that nothing overflows, and the types at the border."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mmopt_export.quantization import Recipe, quantize
from mmopt_kernels.errors import MmoptError
from onnx_files import Arrays, relative, rng, run, write

FP16 = Recipe("fp16", "half", floats="fp16")
BF16 = Recipe("bf16", "half", floats="bf16")


def types(path: Path) -> dict[str, int]:
    """The element type of each initializer and each node's first output."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    found = {info.name: info.type.tensor_type.elem_type for info in graph.value_info}
    found |= {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.output)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_a_linear_layer_computes_in_half_between_fp32_inputs_and_outputs(tmp_path: Path) -> None:
    w = rng().standard_normal((64, 32), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "mm"),
        helper.make_node("Softmax", ["h"], ["y"], "softmax", axis=-1),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 64]}, ["y"], {"w": w})
    record = quantize(source, tmp_path / "fp16.onnx", FP16)
    assert record["fp32_nodes"] == 0
    assert record["half_inputs_outputs"] == []
    found = types(tmp_path / "fp16.onnx")
    assert (found["x"], found["h"], found["y"]) == (1, TensorProto.FLOAT16, 1)
    assert found["w_fp16"] == TensorProto.FLOAT16
    assert "w" not in found
    x = {"x": rng(1).standard_normal((5, 64), np.float32)}
    (got,) = run(tmp_path / "fp16.onnx", x)
    assert got.dtype == np.float32
    assert relative(got, run(source, x)[0]) < 5e-3


def norm_taken_apart(path: Path, *, kind: str) -> Path:
    """A normalization in basic ops of 300 times larger values, behind a matmul."""
    weights: Arrays = {
        "w": rng().standard_normal((32, 32), np.float32) * 300,
        "two": np.array(2.0, np.float32),
        "eps": np.array(1e-6, np.float32),
        "gamma": rng(1).uniform(0.5, 1.5, 32).astype(np.float32),
        "axes": np.array([-1]),
        "out": rng(2).standard_normal((32, 8), np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "mm")]
    if kind == "layer":
        nodes += [
            helper.make_node("ReduceMean", ["h", "axes"], ["mean"], "mean"),
            helper.make_node("Sub", ["h", "mean"], ["d"], "sub"),
        ]
    centred = "d" if kind == "layer" else "h"
    nodes += [
        helper.make_node("Pow", [centred, "two"], ["squares"], "pow"),
        helper.make_node("ReduceMean", ["squares", "axes"], ["variance"], "variance"),
        helper.make_node("Add", ["variance", "eps"], ["safe"], "add_eps"),
        helper.make_node("Sqrt", ["safe"], ["root"], "sqrt"),
    ]
    if kind == "layer":
        nodes.append(helper.make_node("Div", [centred, "root"], ["normal"], "div"))
    else:
        nodes += [
            helper.make_node("Reciprocal", ["root"], ["inverse"], "reciprocal"),
            helper.make_node("Mul", [centred, "inverse"], ["normal"], "mul"),
        ]
    nodes += [
        helper.make_node("Mul", ["normal", "gamma"], ["scaled"], "gamma_mul"),
        helper.make_node("MatMul", ["scaled", "out"], ["y"], "mm_out"),
    ]
    return write(path, nodes, {"x": ["rows", 32]}, ["y"], weights)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_normalization_taken_apart_does_not_overflow(tmp_path: Path, kind: str) -> None:
    source = norm_taken_apart(tmp_path / "fp32.onnx", kind=kind)
    record = quantize(source, tmp_path / "fp16.onnx", FP16)
    # All of it, from the first reduction to the scale, and neither matmul.
    assert record["fp32_nodes"] == (8 if kind == "layer" else 7)
    x = {"x": rng(3).standard_normal((4, 32), np.float32)}
    assert np.abs(x["x"] @ np.zeros((32, 1))).max() == 0
    expected = run(source, x)[0]
    # Squares here are beyond what fp16 has.
    assert (relative(run(tmp_path / "fp16.onnx", x)[0], expected)) < 5e-3
    # A row of zeros has no variance: epsilon alone keeps it from 0 / 0.
    zeros = {"x": np.zeros((2, 32), np.float32)}
    assert np.array_equal(run(tmp_path / "fp16.onnx", zeros)[0], np.zeros((2, 8)))


def masked(path: Path, lowest: float) -> Path:
    """Scores with a mask added twice, as a causal and a padding mask are."""
    weights = {
        "lowest": np.array(lowest, np.float32),
        "one": np.array(1.0, np.float32),
        "temperature": np.array(0.5, np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["scores", "temperature"], ["cooled"], "cool"),
        helper.make_node("Cast", ["mask"], ["kept"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "kept"], ["dropped"], "invert"),
        helper.make_node("Mul", ["dropped", "lowest"], ["bias"], "bias"),
        helper.make_node("Add", ["cooled", "bias"], ["once"], "once"),
        helper.make_node("Add", ["once", "bias"], ["twice"], "twice"),
        helper.make_node("Softmax", ["twice"], ["y"], "softmax", axis=-1),
    ]
    return write(
        path,
        nodes,
        {"scores": ["rows", 8], "mask": ["rows", 8]},
        ["y"],
        weights,
        {"mask": TensorProto.INT64},
    )


@pytest.mark.parametrize("lowest", [float(np.finfo(np.float32).min), -65504.0, -1e4])
def test_a_row_that_is_masked_altogether_stays_finite(tmp_path: Path, lowest: float) -> None:
    source = masked(tmp_path / "fp32.onnx", lowest)
    quantize(source, tmp_path / "fp16.onnx", FP16)
    mask = np.ones((2, 8), np.int64)
    mask[0, 3:] = 0
    mask[1] = 0
    feeds = {"scores": rng().standard_normal((2, 8), np.float32) * 20, "mask": mask}
    (got,) = run(tmp_path / "fp16.onnx", feeds)
    assert np.isfinite(got).all()
    assert (got[0, 3:] == 0).all()
    np.testing.assert_allclose(got.sum(1), 1, atol=2e-3)


def test_positions_beyond_2048_stay_exact(tmp_path: Path) -> None:
    weights = {"frequency": np.array([[1.0, 0.01]], np.float32)}
    nodes = [
        helper.make_node("Cast", ["positions"], ["p"], "cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["p", "frequency"], ["angle"], "outer"),
        helper.make_node("Cos", ["angle"], ["y"], "cos"),
        helper.make_node("Mul", ["y", "x"], ["z"], "rotate"),
    ]
    source = write(
        tmp_path / "fp32.onnx",
        nodes,
        {"positions": ["rows", 1], "x": ["rows", 2]},
        ["z"],
        weights,
        {"positions": TensorProto.INT64},
    )
    record = quantize(source, tmp_path / "fp16.onnx", FP16)
    assert record["fp32_nodes"] == 3
    feeds = {"positions": np.array([[2049], [30001]]), "x": np.ones((2, 2), np.float32)}
    (got,), (expected,) = run(tmp_path / "fp16.onnx", feeds), run(source, feeds)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_the_cache_takes_the_half_type_and_nothing_else_at_the_border(tmp_path: Path) -> None:
    heads, size = 2, 8
    weights = {"w": rng().standard_normal((16, 48), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["qkv"], "project"),
        helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key", "past_value", "lengths", "total"],
            ["y", "present_key", "present_value"],
            "attention",
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=heads,
        ),
    ]
    cache = ["batch", heads, "past", size]
    integers = {"lengths": TensorProto.INT32, "total": TensorProto.INT32}
    source = write(
        tmp_path / "fp32.onnx",
        nodes,
        {
            "x": ["batch", "sequence", 16],
            "past_key": cache,
            "past_value": cache,
            "lengths": ["batch"],
            "total": [],
        },
        ["y", "present_key", "present_value"],
        weights,
        integers,
    )
    record = quantize(source, tmp_path / "fp16.onnx", FP16)
    caches = ["past_key", "past_value", "present_key", "present_value"]
    assert record["half_inputs_outputs"] == caches
    feeds = {
        "x": rng(1).standard_normal((1, 3, 16), np.float32),
        "past_key": np.zeros((1, heads, 0, size), np.float32),
        "past_value": np.zeros((1, heads, 0, size), np.float32),
        "lengths": np.array([2], np.int32),
        "total": np.array(3, np.int32),
    }
    expected = run(source, feeds)
    half = {n: v.astype(np.float16) if n.startswith("past") else v for n, v in feeds.items()}
    got = run(tmp_path / "fp16.onnx", half)
    assert [value.dtype for value in got] == [np.float32, np.float16, np.float16]
    for a, b in zip(got, expected, strict=True):
        assert relative(a.astype(np.float32), b) < 5e-3


def test_bf16_rounds_to_nearest_and_keeps_the_range_of_fp32(tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    weights = {
        "w": rng().standard_normal((64, 16), np.float32),
        "large": np.array([1e30, -3.4e38], np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "mm"),
        helper.make_node("Concat", ["large", "large"], ["z"], "concat", axis=0),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 64]}, ["y", "z"], weights)
    quantize(source, tmp_path / "bf16.onnx", BF16)
    model = onnx.load(tmp_path / "bf16.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {str(value.dtype) for value in stored.values()} == {"bfloat16"}
    error = np.abs(stored["w_bf16"].astype(np.float32) - weights["w"])
    assert (error <= np.abs(weights["w"]) * 2.0**-8).all()
    x = rng(1).standard_normal((3, 64), np.float32)
    y, z = ReferenceEvaluator(model).run(None, {"x": x})
    assert y.dtype == np.float32
    assert relative(y.astype(np.float32), x @ weights["w"]) < 2e-2
    assert np.isfinite(z.astype(np.float32)).all()


def test_branches_are_refused_by_name(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])],
    )
    nodes = [helper.make_node("If", ["c"], ["y"], "if", then_branch=branch, else_branch=branch)]
    source = write(
        tmp_path / "fp32.onnx",
        nodes,
        {"x": [2], "c": []},
        ["y"],
        {},
        {"c": TensorProto.BOOL},
    )
    with pytest.raises(MmoptError, match="has a If, which cannot be converted to fp16"):
        quantize(source, tmp_path / "fp16.onnx", FP16)
    assert not (tmp_path / "fp16.onnx").exists()
