"""fp16 and bf16 graphs: what stays fp32 so that nothing overflows, and the types at the border."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mmopt_export.quantization import Recipe, quantize
from mmopt_export.quantization.half import KEPT_WIDE
from mmopt_kernels.errors import MmoptError
from onnx_files import Arrays, relative, rng, run, write

FP16 = Recipe("fp16", "half", floats="fp16")
BF16 = Recipe("bf16", "half", floats="bf16")


# Some of what has a CUDA kernel in onnxruntime-gpu 1.31.1 at opset 20, and none of it in bf16.
WITHOUT_BF16 = {
    "AveragePool",
    "Clip",
    "Conv",
    "Cos",
    "CumSum",
    "Einsum",
    "Equal",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Log",
    "LogSoftmax",
    "NonZero",
    "Pad",
    "Range",
    "Reciprocal",
    "ReduceMax",
    "ReduceMin",
    "Resize",
    "Sin",
    "Softplus",
    "TopK",
}


def evaluate(path: Path, feeds: Arrays) -> list[np.ndarray]:
    """What ONNX's reference evaluator finds: ONNX Runtime has no bf16 on the CPU."""
    from onnx.reference import ReferenceEvaluator

    return [np.asarray(each) for each in ReferenceEvaluator(onnx.load(path)).run(None, feeds)]


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


def norm_taken_apart(path: Path, *, kind: str, behind: str = "MatMul") -> Path:
    """A normalization in basic ops of 300 times larger values, behind a matmul or pooling."""
    weights: Arrays = {
        "w": rng().standard_normal((32, 32), np.float32) * 300,
        "two": np.array(2.0, np.float32),
        "eps": np.array(1e-6, np.float32),
        "gamma": rng(1).uniform(0.5, 1.5, 32).astype(np.float32),
        "axes": np.array([-1]),
        "out": rng(2).standard_normal((32, 8), np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "mm")]
    if behind == "AveragePool":
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["m"], "mm"),
            helper.make_node("Unsqueeze", ["m", "axes"], ["u"], "unsqueeze"),
            helper.make_node("AveragePool", ["u"], ["p"], "pool", kernel_shape=[1]),
            helper.make_node("Squeeze", ["p", "axes"], ["h"], "squeeze"),
        ]
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
    # All of it, from the first reduction to the quotient; neither the scale nor a matmul.
    assert record["fp32_nodes"] == (7 if kind == "layer" else 6)
    x = {"x": rng(3).standard_normal((4, 32), np.float32)}
    assert np.abs(x["x"] @ np.zeros((32, 1))).max() == 0
    expected = run(source, x)[0]
    # Squares here are beyond what fp16 has.
    assert (relative(run(tmp_path / "fp16.onnx", x)[0], expected)) < 5e-3
    # A row of zeros has no variance: epsilon alone keeps it from 0 / 0.
    zeros = {"x": np.zeros((2, 32), np.float32)}
    assert np.array_equal(run(tmp_path / "fp16.onnx", zeros)[0], np.zeros((2, 8)))


@pytest.mark.parametrize("recipe", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_weight_of_a_normalization_multiplies_in_half(
    tmp_path: Path, recipe: Recipe, kind: str
) -> None:
    """ONNX Runtime fuses it to a normalization of one type: CUDA has no bf16 with fp32 weights."""
    source = norm_taken_apart(tmp_path / "fp32.onnx", kind=kind)
    quantize(source, tmp_path / "half.onnx", recipe)
    found = types(tmp_path / "half.onnx")
    half = TensorProto.FLOAT16 if recipe is FP16 else TensorProto.BFLOAT16
    (scale,) = (n for n in onnx.load(tmp_path / "half.onnx").graph.node if n.name == "gamma_mul")
    assert [found[name] for name in (*scale.input, *scale.output)] == [half] * 3
    assert found["normal"] == TensorProto.FLOAT
    x = {"x": rng(3).standard_normal((4, 32), np.float32)}
    (got,) = evaluate(tmp_path / "half.onnx", x)
    assert relative(got, run(source, x)[0]) < (5e-3 if recipe is FP16 else 2e-2)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_weight_is_fp32_where_what_is_normalized_is(tmp_path: Path, kind: str) -> None:
    """CUDA pools in no bf16, so that the fused normalization reads fp32: Gemma 3's projector."""
    source = norm_taken_apart(tmp_path / "fp32.onnx", kind=kind, behind="AveragePool")
    quantize(source, tmp_path / "bf16.onnx", BF16)
    found = types(tmp_path / "bf16.onnx")
    assert (found["m"], found["h"]) == (TensorProto.BFLOAT16, TensorProto.FLOAT)
    assert (found["gamma"], found["scaled"]) == (TensorProto.FLOAT, TensorProto.FLOAT)


def test_what_is_kept_by_name_stays_fp32_with_the_sums_that_it_goes_into(tmp_path: Path) -> None:
    """Products of 1e5, as the second projections of T5's feed-forwards have, are no fp16."""
    weights: Arrays = {
        "w1": rng().standard_normal((32, 32), np.float32),
        "w2": rng(1).standard_normal((32, 32), np.float32) * 2e4,
        "w3": rng(2).standard_normal((32, 8), np.float32),
        "gamma": np.ones(32, np.float32),
        "beta": np.zeros(32, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w2"], ["p"], "second"),
        helper.make_node("Add", ["h", "p"], ["sum"], "sum"),
        helper.make_node("LayerNormalization", ["sum", "gamma", "beta"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "w3"], ["y"], "third"),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 32]}, ["y"], weights)
    x = {"x": rng(3).standard_normal((5, 32), np.float32)}
    expected = evaluate(source, x)[0]

    def half(marked: str) -> tuple[dict[str, int], np.ndarray]:
        model = onnx.load(source)
        entry = model.graph.node[1].metadata_props.add()
        entry.key, entry.value = KEPT_WIDE, marked
        onnx.save(model, tmp_path / "marked.onnx")
        quantize(tmp_path / "marked.onnx", tmp_path / "fp16.onnx", FP16)
        return types(tmp_path / "fp16.onnx"), evaluate(tmp_path / "fp16.onnx", x)[0]

    found, got = half("fp16 bf16")
    assert {found[name] for name in ("p", "sum", "n")} == {TensorProto.FLOAT}
    assert {found[name] for name in ("h", "w1_fp16", "w3_fp16")} == {TensorProto.FLOAT16}
    assert relative(got, expected) < 5e-3
    # It is not kept in this half, and the product is infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        found, got = half("bf16")
    assert found["p"] == TensorProto.FLOAT16
    assert not np.isfinite(got).all()


def test_a_temperature_after_a_norm_stays_with_it(tmp_path: Path) -> None:
    """One number is not the weight of a normalization: CLIP's logits are not rounded before it."""
    weights = {"axes": np.array([-1]), "scale": np.array([100.0], np.float32)}
    nodes = [
        helper.make_node("ReduceL2", ["x", "axes"], ["norm"], "norm"),
        helper.make_node("Div", ["x", "norm"], ["unit"], "div"),
        helper.make_node("Mul", ["unit", "scale"], ["y"], "scale"),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 8]}, ["y"], weights)
    assert quantize(source, tmp_path / "fp16.onnx", FP16)["fp32_nodes"] == 3


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
    y, z = evaluate(tmp_path / "bf16.onnx", {"x": x})
    assert y.dtype == np.float32
    assert relative(y.astype(np.float32), x @ weights["w"]) < 2e-2
    assert np.isfinite(z.astype(np.float32)).all()


@pytest.mark.parametrize("recipe", [FP16, BF16], ids=["fp16", "bf16"])
def test_what_cuda_cannot_compute_in_bf16_is_fp32_in_bf16_alone(
    tmp_path: Path, recipe: Recipe
) -> None:
    weights = {
        "w": rng().standard_normal((16, 16), np.float32),
        "one": np.array(1.0, np.float32),
        "low": np.array(-2.0, np.float32),
        "high": np.array(2.0, np.float32),
        "out": rng(1).standard_normal((16, 4), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "mm"),
        helper.make_node("Less", ["h", "one"], ["below"], "less"),
        helper.make_node("Greater", ["h", "low"], ["above"], "greater"),
        helper.make_node("And", ["below", "above"], ["inside"], "and"),
        helper.make_node("Clip", ["h", "low", "high"], ["bounded"], "clip"),
        helper.make_node("Where", ["inside", "bounded", "h"], ["chosen"], "where"),
        helper.make_node("MatMul", ["chosen", "out"], ["y"], "mm_out"),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 16]}, ["y"], weights)
    record = quantize(source, tmp_path / "half.onnx", recipe)
    assert record["fp32_nodes"] == (0 if recipe is FP16 else 3)
    found = types(tmp_path / "half.onnx")
    for node in onnx.load(tmp_path / "half.onnx").graph.node:
        if node.name in ("less", "greater", "clip"):
            half = TensorProto.FLOAT16 if recipe is FP16 else TensorProto.FLOAT
            assert {found[name] for name in node.input} == {half}
        elif node.name in ("mm", "where", "mm_out"):
            assert TensorProto.FLOAT not in {found[name] for name in node.input}
    x = {"x": rng(2).standard_normal((6, 16), np.float32)}
    (got,) = evaluate(tmp_path / "half.onnx", x)
    assert relative(got, run(source, x)[0]) < (5e-3 if recipe is FP16 else 3e-2)


@pytest.fixture(scope="module", params=["bert", "llama"])
def cuda_graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 graph that the export for CUDA starts from."""
    import onnx_ir

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        from tiny_decoders import Exported, tiny_decoder

        file: Path = Exported(tiny_decoder("llama"), folder, target="cuda").file
        return file
    from mmopt_export.checkpoint import load_checkpoint
    from mmopt_export.graph import trace
    from mmopt_export.tasks import make_plan
    from tiny_encoders import save_text_encoder

    source = save_text_encoder(folder / "source", "Bert", "ForSequenceClassification")
    (part,) = make_plan(load_checkpoint(str(source))).parts
    onnx_ir.save(trace(part, target="cuda"), folder / "model.onnx", external_data="model.data")
    return folder / "model.onnx"


def test_an_export_for_cuda_has_no_bf16_where_cuda_has_no_kernel(
    cuda_graph: Path, tmp_path: Path
) -> None:
    import onnx_ir

    quantize(cuda_graph, tmp_path / "bf16.onnx", BF16)
    half, graph = onnx_ir.DataType.BFLOAT16, onnx_ir.load(tmp_path / "bf16.onnx").graph
    reads = {
        node.op_type
        for node in graph
        if any(value is not None and value.dtype == half for value in node.inputs)
    }
    assert "MatMul" in reads
    assert not reads & WITHOUT_BF16
    # What ONNX Runtime fuses to a normalization has no weight in fp32.
    scales = [v for n in graph if n.op_type == "Mul" for v in n.inputs if v and v.is_initializer()]
    assert {v.dtype for v in scales if v.shape is not None and len(v.shape) == 1} <= {half}


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
