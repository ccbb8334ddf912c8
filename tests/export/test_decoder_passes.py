"""Rewrites of a traced decoder on graphs made by hand: what they change, and that values stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt_export.decoder.passes import (
    drop_reshapes,
    fuse_skip_norms,
    hoist_last_token,
    pack_projections,
    sink_transposes,
    split_gemms,
    transpose_weights,
)

Shape = list[Any]
TOKENS = ["batch", "sequence", 8]


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Shape],
    outputs: dict[str, Shape],
    weights: dict[str, np.ndarray],
) -> onnx_ir.Model:
    """A graph with the shapes of its values, as the tracer gives them."""
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    return onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def run(model: onnx_ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = onnx_ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def rewritten(
    model: onnx_ir.Model, rewrite: Callable[[onnx_ir.Model], None], **feeds: np.ndarray
) -> list[str]:
    """The operators afterwards; outputs keep their names and values, and inputs theirs."""
    before = run(model, feeds)
    names = [[value.name for value in side] for side in (model.graph.inputs, model.graph.outputs)]
    rewrite(model)
    for found, wanted in zip(run(model, feeds), before, strict=True):
        # fp32 sums in another order.
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    after = [[value.name for value in side] for side in (model.graph.inputs, model.graph.outputs)]
    assert after == names
    return [node.op_type for node in model.graph]


X = weight(2, 3, 8, seed=9)
node = helper.make_node


def test_a_linears_weight_is_stored_as_matmul_reads_it() -> None:
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    model = graph(nodes, {"x": TOKENS}, {"y": ["batch", "sequence", 5]}, {"w": weight(5, 8)})
    assert rewritten(model, transpose_weights, x=X) == ["MatMul"]
    assert model.graph.initializers["w"].shape == [8, 5]


def test_a_tied_weight_is_not_turned() -> None:
    nodes = [
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["h"]),
        node("MatMul", ["h", "w"], ["y"]),
    ]
    model = graph(nodes, {"x": TOKENS}, {"y": TOKENS}, {"w": weight(5, 8)})
    assert rewritten(model, transpose_weights, x=X) == ["Transpose", "MatMul", "MatMul"]


def reshapes(last: list[int], output: Shape) -> onnx_ir.Model:
    nodes = [
        node("Reshape", ["x", "flat"], ["a"]),
        node("Reshape", ["a", "last"], ["b"]),
        node("Neg", ["b"], ["y"]),
    ]
    shapes = {"flat": np.array([-1, 8]), "last": np.array(last)}
    return graph(nodes, {"x": [2, 3, 8]}, {"y": output}, shapes)


def test_reshapes_that_end_where_they_began_go() -> None:
    assert rewritten(reshapes([2, 3, 8], [2, 3, 8]), drop_reshapes, x=X)[-1:] == ["Neg"]
    kept = reshapes([3, 2, 8], [3, 2, 8])
    assert "Reshape" in rewritten(kept, drop_reshapes, x=X)


def test_a_reshape_that_is_an_output_stays() -> None:
    nodes = [node("Reshape", ["x", "flat"], ["a"]), node("Reshape", ["a", "back"], ["y"])]
    shapes = {"flat": np.array([-1, 8]), "back": np.array([2, 3, 8])}
    model = graph(nodes, {"x": [2, 3, 8]}, {"y": [2, 3, 8]}, shapes)
    assert "Reshape" in rewritten(model, drop_reshapes, x=X)


def test_dimensions_that_are_unknown_are_not_taken_for_equal() -> None:
    """Here they differ: `[2, 3, 8]` becomes `[3, 2, 8]`."""
    nodes = [node("Reshape", ["x", "to"], ["a"]), node("Neg", ["a"], ["y"])]
    inputs = {"x": [None, None, 8]}
    model = graph(nodes, inputs, {"y": [None, None, 8]}, {"to": np.array([3, 2, 8])})
    model.graph.node(0).outputs[0].shape = onnx_ir.Shape([None, None, 8])
    assert rewritten(model, drop_reshapes, x=X) == ["Reshape", "Neg"]


def norm(
    source: str, result: str, gamma: str = "gamma", over: str | None = None, power: str = "two"
) -> list[onnx.NodeProto]:
    """`over / sqrt(mean(source^power) + epsilon) * gamma`, `over` being `source` by itself."""
    names = [f"{result}.{number}" for number in range(5)]
    return [
        node("Pow", [source, power], [names[0]]),
        node("ReduceMean", [names[0], "axes"], [names[1]]),
        node("Add", [names[1], "epsilon"], [names[2]]),
        node("Sqrt", [names[2]], [names[3]]),
        node("Div", [over or source, names[3]], [names[4]]),
        node("Mul", [names[4], gamma], [result]),
    ]


NORM = {
    "two": np.array(2.0, np.float32),
    "four": np.array(4.0, np.float32),
    "axes": np.array([-1]),
    "epsilon": np.array(1e-5, np.float32),
    "gamma": weight(8),
    "square": weight(3, 8),
    "one": np.array(1.0, np.float32),
}
ADD = node("Add", ["x", "z"], ["s"])


@pytest.mark.parametrize("shifted", [False, True], ids=["weight", "1 + weight"])
def test_a_residual_and_its_norm_are_one_op(shifted: bool) -> None:
    made = [node("Add", ["gamma", "one"], ["g"])] if shifted else []
    nodes = [
        ADD,
        *made,
        *norm("s", "n", "g" if shifted else "gamma"),
        node("Add", ["n", "s"], ["y"]),
    ]
    model = graph(nodes, {"x": TOKENS, "z": TOKENS}, {"y": TOKENS}, NORM)

    def fuse(model: onnx_ir.Model) -> None:
        fuse_skip_norms(model)
        onnx_ir.passes.common.RemoveUnusedNodesPass()(model)

    found = rewritten(model, fuse, x=X, z=X[::-1].copy())
    assert found == [*(["Add"] if shifted else []), "SkipSimplifiedLayerNormalization", "Add"]


def test_a_scale_that_is_made_of_other_values_stays_where_it_is() -> None:
    """`1 + weight` moves before the sum with its norm: what it needs may stand behind it."""
    nodes = [
        ADD,
        node("Neg", ["gamma"], ["minus"]),
        node("Add", ["minus", "one"], ["g"]),
        *norm("s", "n", "g"),
        node("Neg", ["n"], ["y"]),
    ]
    model = graph(nodes, {"x": TOKENS, "z": TOKENS}, {"y": TOKENS}, NORM)
    found = rewritten(model, fuse_skip_norms, x=X, z=X[::-1].copy())
    assert "SkipSimplifiedLayerNormalization" not in found


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ([ADD, *norm("s", "n", power="four")], "another power"),
        (
            [ADD, node("Add", ["x", "x"], ["o"]), *norm("s", "n", over="o")],
            "what is divided is not what was squared",
        ),
        ([ADD, *norm("s", "n", "square")], "a scale for each token"),
        ([node("Add", ["x", "gamma"], ["s"]), *norm("s", "n")], "the sum is broadcast"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_only_looks_like_a_norm_is_left(nodes: list[onnx.NodeProto], why: str) -> None:
    model = graph(
        [*nodes, node("Neg", ["n"], ["y"])], {"x": TOKENS, "z": TOKENS}, {"y": TOKENS}, NORM
    )
    found = rewritten(model, fuse_skip_norms, x=X, z=X[::-1].copy())
    assert "SkipSimplifiedLayerNormalization" not in found, why


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        ({}, ["MatMul", "Add"]),
        ({"transB": 1}, ["MatMul", "Add"]),
        ({"alpha": 0.5}, ["Gemm"]),
        ({"beta": 0.5}, ["Gemm"]),
        ({"transA": 1}, ["Gemm"]),
    ],
    ids=str,
)
def test_a_plain_gemm_is_a_matmul(attributes: dict[str, Any], wanted: list[str]) -> None:
    shape = (5, 8) if "transB" in attributes else (8, 5)
    x = X[0].T.copy() if "transA" in attributes else X[0]
    model = graph(
        [node("Gemm", ["x", "w", "b"], ["y"], "linear", **attributes)],
        {"x": list(x.shape)},
        {"y": [3, 5]},
        {"w": weight(*shape), "b": weight(5)},
    )
    assert rewritten(model, split_gemms, x=x) == wanted


def test_a_gemm_of_a_tied_weight_stays() -> None:
    nodes = [node("Gemm", ["x", "w"], ["h"], transB=1), node("MatMul", ["h", "w"], ["y"])]
    model = graph(nodes, {"x": [3, 8]}, {"y": [3, 8]}, {"w": weight(5, 8)})
    assert rewritten(model, split_gemms, x=X[0]) == ["Gemm", "MatMul"]


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ([-1, 8], [2, 3, 5], ["MatMul"]),
        # Its rows are other ones than the input's.
        ([-1, 8], [3, 2, 5], ["Reshape", "MatMul", "Reshape"]),
        # So are its columns.
        ([-1, 4], [2, 6, 5], ["Reshape", "MatMul", "Reshape"]),
        ([-1, 4], [2, 3, 10], ["Reshape", "MatMul", "Reshape"]),
    ],
    ids=str,
)
def test_a_gemm_takes_three_dimensions_where_reshapes_only_made_them_two(
    before: list[int], after: list[int], wanted: list[str]
) -> None:
    nodes = [
        node("Reshape", ["x", "before"], ["flat"]),
        node("Gemm", ["flat", "w"], ["product"], "linear"),
        node("Reshape", ["product", "after"], ["z"]),
        node("Neg", ["z"], ["y"]),
    ]
    weights = {
        "before": np.array(before),
        "after": np.array(after),
        "w": weight(before[1], 5),
    }
    model = graph(nodes, {"x": [2, 3, 8]}, {"y": after}, weights)
    assert rewritten(model, split_gemms, x=X) == [*wanted, "Neg"]


@pytest.mark.parametrize(
    ("perm", "wanted"),
    [([0, 2, 1, 3], "Neg"), ([0, 1, 3, 2], "Transpose")],
    ids=["heads", "last axis"],
)
def test_heads_are_normed_before_they_are_transposed(perm: list[int], wanted: str) -> None:
    """Of a Transpose that moves the last axis, which is normed over, nothing can be taken ahead."""
    nodes = [node("Transpose", ["x"], ["s"], perm=perm), *norm("s", "n")]
    if wanted == "Neg":
        nodes.append(node("Transpose", ["n"], ["m"], perm=perm))
    nodes.append(node("Neg", ["m" if wanted == "Neg" else "n"], ["y"]))
    x = weight(2, 3, 4, 8) if wanted == "Neg" else weight(2, 3, 8, 4)
    out = [2, 3, 4, 8]
    model = graph(nodes, {"x": list(x.shape)}, {"y": out}, NORM)
    found = rewritten(model, sink_transposes, x=x)
    assert found.count("Transpose") == (0 if wanted == "Neg" else 1)
    assert (found[0] == "Transpose") == (wanted == "Transpose")


def test_projections_of_one_input_are_packed_unless_a_weight_is_shared() -> None:
    outputs = {name: ["batch", "sequence", size] for name, size in (("q", 8), ("k", 4), ("v", 4))}
    weights = {
        f"layer.{name}_proj.weight": weight(8, shape[2], seed=number)
        for number, (name, shape) in enumerate(outputs.items())
    }
    nodes = [node("MatMul", ["x", f"layer.{name}_proj.weight"], [f"{name}.0"]) for name in outputs]
    ends = [node("Neg", [f"{name}.0"], [name]) for name in outputs]
    model = graph(nodes + ends, {"x": TOKENS}, outputs, weights)
    assert rewritten(model, pack_projections, x=X) == ["MatMul", "Split", *["Neg"] * 3]
    assert "layer.q_proj+k_proj+v_proj.weight" in model.graph.initializers
    ends.append(node("MatMul", ["q", "layer.v_proj.weight"], ["u"]))
    shared = graph(nodes + ends, {"x": TOKENS}, outputs | {"u": outputs["v"]}, weights)
    found = rewritten(shared, pack_projections, x=X)
    assert found == ["MatMul", "Split", "MatMul", *["Neg"] * 3, "MatMul"]


def test_a_projection_alone_and_those_of_two_dimensions_are_not_packed() -> None:
    alone = [node("MatMul", ["x", "w"], ["a"]), node("Neg", ["a"], ["y"])]
    model = graph(alone, {"x": TOKENS}, {"y": TOKENS}, {"w": weight(8, 8)})
    assert rewritten(model, pack_projections, x=X) == ["MatMul", "Neg"]
    pair = [*alone[:1], node("MatMul", ["x", "v"], ["b"]), node("Add", ["a", "b"], ["y"])]
    weights = {"w": weight(8, 8), "v": weight(8, 8, seed=1)}
    model = graph(pair, {"x": ["batch", 8]}, {"y": ["batch", 8]}, weights)
    assert rewritten(model, pack_projections, x=X[0]) == ["MatMul", "MatMul", "Add"]


def test_weights_of_their_own_for_each_of_a_batch_are_not_packed() -> None:
    """Experts, say: side by side they would be added up along another axis."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "v"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    for size in (1, 2):
        weights = {"w": weight(size, 8, 4), "v": weight(size, 8, 4, seed=1)}
        model = graph(nodes, {"x": [2, "sequence", 8]}, {"y": [2, "sequence", 4]}, weights)
        assert rewritten(model, pack_projections, x=X) == ["MatMul", "MatMul", "Add"]


def last_token(
    nodes: list[onnx.NodeProto], hidden: str, outputs: dict[str, Shape]
) -> onnx_ir.Model:
    """Nodes, and behind them the choice of one token of `hidden` for each row."""
    made = [
        *nodes,
        node("Reshape", ["last", "column"], ["index"]),
        node("Expand", ["index", "wide"], ["at"]),
        node("GatherElements", [hidden, "at"], ["chosen"], axis=1),
        node("Neg", ["chosen"], ["y"]),
    ]
    weights = {
        **NORM,
        "w": weight(8, 8),
        "column": np.array([-1, 1, 1]),
        "wide": np.array([1, 1, 8]),
        "middle": np.array([1]),
        "first": np.array([0]),
    }
    inputs = {"x": TOKENS, "z": TOKENS, "t": TOKENS[1:]}
    model = graph(made, inputs, {"y": ["batch", 1, 8], **outputs}, weights)
    last = onnx_ir.val("last", onnx_ir.DataType.INT64, onnx_ir.Shape(["batch"]))
    for one in model.graph:
        for index, value in enumerate(one.inputs):
            if value is not None and value.name == "last":
                one.replace_input_with(index, last)
    model.graph.inputs.append(last)
    return model


LAST = np.array([2, 0])


@pytest.mark.parametrize(
    ("nodes", "outputs", "ahead"),
    [
        ([node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "z"], ["h"])], {}, True),
        ([node("MatMul", ["x", "w"], ["a"]), *norm("a", "h")], {}, True),
        # An output needs every token, and so does what looks along them.
        ([node("MatMul", ["x", "w"], ["h"])], {"h": TOKENS}, False),
        (
            [
                node("MatMul", ["x", "w"], ["a"]),
                node("ReduceMean", ["a", "middle"], ["m"]),
                node("Add", ["a", "m"], ["h"]),
            ],
            {},
            None,
        ),
        ([node("MatMul", ["x", "w"], ["a"]), node("Softmax", ["a"], ["h"], axis=1)], {}, False),
        ([node("LayerNormalization", ["x", "gamma"], ["h"])], {}, True),
        ([node("LayerNormalization", ["x", "gamma"], ["h"], axis=1)], {}, False),
        # What rows share, with an axis of them or without, is not chosen from for each.
        ([node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "t"], ["h"])], {}, False),
        (
            [
                node("MatMul", ["x", "w"], ["a"]),
                node("ReduceMean", ["z", "first"], ["m"]),
                node("Add", ["a", "m"], ["h"]),
            ],
            {},
            False,
        ),
    ],
    ids=[
        *("sum", "norm", "output", "mean-of-tokens", "softmax-of-tokens", "layer-norm"),
        *("layer-norm-of-tokens", "shared", "mean-of-rows"),
    ],
)
def test_the_last_token_is_chosen_before_what_works_on_each_token_alone(
    nodes: list[onnx.NodeProto], outputs: dict[str, Shape], ahead: bool | None
) -> None:
    model = last_token(nodes, "h", outputs)
    found = rewritten(model, hoist_last_token, x=X, z=X[::-1].copy(), t=X[1], last=LAST)
    if ahead is not None:
        heavy = next(op for op in ("MatMul", "LayerNormalization") if op in found)
        assert (found.index("GatherElements") < found.index(heavy)) == ahead
