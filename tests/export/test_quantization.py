"""Quantized graphs against fp64 oracles: blocks, int8 matmuls, convolutions, and the files."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mmopt_export.quantization import NothingToQuantizeError, Recipe, quantize
from mmopt_export.quantization import static as static_module
from mmopt_export.quantization.packing import half_quadratic, round_to_nearest, second_order
from mmopt_kernels.errors import InputError
from onnx_files import Arrays, ops, relative, rng, run, table_alone, unpack, write

WEIGHTS4 = Recipe("int4", "weights", bits=4)
DYNAMIC = Recipe("int8", "dynamic")
STATIC = Recipe("int8", "static")


def matmul(path: Path, k: int = 200, n: int = 24) -> tuple[Path, np.ndarray]:
    w = rng().standard_normal((k, n), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")]
    return write(path, nodes, {"x": ["rows", k]}, ["y"], {"w": w}), w


# Blocks.


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize(("k", "n"), [(64, 5), (100, 1), (33, 7), (1, 3)])
def test_onnxruntime_computes_with_the_weights_that_unpack_gives(
    tmp_path: Path, bits: int, symmetric: bool, block: int, k: int, n: int
) -> None:
    source, w = matmul(tmp_path / "fp32.onnx", k, n)
    recipe = Recipe("int4", "weights", bits=bits, block=block, symmetric=symmetric)
    quantize(source, tmp_path / "out.onnx", recipe)
    exact = unpack(round_to_nearest(w, bits, block, symmetric), k, bits, symmetric)
    x = rng(1).standard_normal((3, k), np.float32)
    (got,) = run(tmp_path / "out.onnx", {"x": x})
    np.testing.assert_allclose(got, x.astype(np.float64) @ exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_no_weight_is_off_by_more_than_half_a_step(bits: int, symmetric: bool) -> None:
    w = rng().standard_normal((100, 9)).astype(np.float32)
    blocks = round_to_nearest(w, bits, 32, symmetric)
    error = np.abs(unpack(blocks, 100, bits, symmetric) - w)
    step = np.repeat(np.abs(blocks[1]), 32, axis=1).T[:100]
    # Symmetric blocks have one value less above zero than below; asymmetric zeros are rounded.
    assert (error <= step * 1.001).all()
    assert (error <= step * 0.501).mean() > 0.9


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_a_grid_are_kept_exactly(bits: int) -> None:
    low = -(2 ** (bits - 1))
    q = rng().integers(low, -low, (64, 6))
    q[::32] = low
    w = (q * np.float32(0.125)).astype(np.float32)
    assert np.array_equal(unpack(round_to_nearest(w, bits, 32, True), 64, bits, True), w)


def test_a_block_of_zeros_stays_zero() -> None:
    w = np.zeros((64, 2), np.float32)
    for symmetric in (True, False):
        assert not unpack(round_to_nearest(w, 4, 32, symmetric), 64, 4, symmetric).any()
    assert not unpack(half_quadratic(w, 4, 32), 64, 4, False).any()


def heavy_tailed(k: int, n: int) -> np.ndarray:
    """Weights like a trained layer's: most small, a few large."""
    return (rng().standard_t(4, (k, n)) * 0.05).astype(np.float32)


def test_hqq_fits_heavy_tailed_weights_better_than_rounding() -> None:
    w = heavy_tailed(256, 64)
    # HQQ's own measure, which minds large errors less.
    errors = [
        (np.abs(unpack(blocks, 256, 4, False) - w) ** 0.7).mean()
        for blocks in (half_quadratic(w, 4, 64), round_to_nearest(w, 4, 64, False))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gptq_changes_outputs_less_than_rounding(symmetric: bool) -> None:
    w = heavy_tailed(100, 32)
    # Correlated inputs: what one channel rounds, another can make up for.
    x = rng(1).standard_normal((400, 12)) @ rng(2).standard_normal((12, 100))
    x += 0.1 * rng(3).standard_normal(x.shape)
    hessian = (x.T @ x).astype(np.float32)
    errors = [
        relative(x @ unpack(blocks, 100, 4, symmetric), x @ w)
        for blocks in (
            second_order(w.copy(), hessian, 4, 32, symmetric),
            round_to_nearest(w, 4, 32, symmetric),
        )
    ]
    assert errors[0] < 0.8 * errors[1]


def test_gptq_on_a_graph_reads_its_samples(tmp_path: Path) -> None:
    source, w = matmul(tmp_path / "fp32.onnx", 100, 16)
    x = (rng(1).standard_normal((300, 8)) @ rng(2).standard_normal((8, 100))).astype(np.float32)
    feeds = [{"x": x[:150]}, {"x": x[150:]}]
    errors = {}
    for algorithm in ("gptq", "rtn"):
        recipe = dataclasses.replace(WEIGHTS4, algorithm=algorithm)
        record = quantize(source, tmp_path / f"{algorithm}.onnx", recipe, feeds)
        (got,) = run(tmp_path / f"{algorithm}.onnx", {"x": x})
        errors[algorithm] = relative(got, x @ w)
        assert (record["samples"] is None) == (algorithm == "rtn")
    assert errors["gptq"] < errors["rtn"]


def tied(path: Path) -> tuple[Path, np.ndarray]:
    """An embedding table that is the head as well, a transposed weight, and a Gemm."""
    table = rng().standard_normal((1100, 64), np.float32)
    weights = {
        "table": table,
        "stored_nk": rng(1).standard_normal((64, 64), np.float32),
        "gemm": rng(2).standard_normal((64, 64), np.float32),
        "bias": rng(3).standard_normal(64).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h0"], "embed"),
        helper.make_node("Transpose", ["stored_nk"], ["w"], "transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["h0", "w"], ["h1"], "inner"),
        helper.make_node("Gemm", ["h1", "gemm", "bias"], ["h2"], "gemm", transB=1),
        helper.make_node("Transpose", ["table"], ["head_w"], "transpose_head", perm=[1, 0]),
        helper.make_node("MatMul", ["h2", "head_w"], ["logits"], "head"),
    ]
    source = write(path, nodes, {"ids": ["rows"]}, ["logits"], weights, {"ids": TensorProto.INT64})
    return source, table


def test_transposed_and_tied_weights_and_gemms_all_take_blocks(tmp_path: Path) -> None:
    source, _ = tied(tmp_path / "fp32.onnx")
    feeds = {"ids": np.arange(0, 1100, 7)}
    recipe = Recipe("int8", "weights", bits=8)
    record = quantize(source, tmp_path / "int8.onnx", recipe)
    assert ops(tmp_path / "int8.onnx") == ["GatherBlockQuantized"] + ["MatMulNBits"] * 3
    assert record["matmuls"] == 3
    assert record["embeddings"]["tables"] == ["table"]
    (expected,), (got,) = run(source, feeds), run(tmp_path / "int8.onnx", feeds)
    assert 0 < relative(got, expected) < 0.015
    names = {t.name for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert not names & {"table", "stored_nk", "gemm"}, "the fp32 weights are left in the file"


def test_a_weight_of_two_matmuls_is_stored_once(tmp_path: Path) -> None:
    w = rng().standard_normal((64, 64), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "second"),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 64]}, ["y"], {"w": w})
    quantize(source, tmp_path / "int4.onnx", WEIGHTS4)
    assert len(onnx.load(tmp_path / "int4.onnx").graph.initializer) == 2
    x = {"x": rng(1).standard_normal((3, 64), np.float32)}
    exact = unpack(round_to_nearest(w, 4, 32, True), 64, 4, True)
    np.testing.assert_allclose(
        run(tmp_path / "int4.onnx", x)[0], x["x"] @ exact @ exact, rtol=1e-4, atol=1e-3
    )


def test_wide_and_kept_nodes_take_8_bits_and_floats(tmp_path: Path) -> None:
    source, _ = tied(tmp_path / "fp32.onnx")
    recipe = dataclasses.replace(WEIGHTS4, wide=("inner",), keep=("head",))
    record = quantize(source, tmp_path / "out.onnx", recipe)
    assert record["bits"] == {"4": 1, "8": 1}
    graph = onnx.load(tmp_path / "out.onnx").graph
    bits = {
        node.name: helper.get_node_attr_value(node, "bits")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    assert bits == {"inner": 8, "gemm": 4}
    assert [node.op_type for node in graph.node if node.name == "head"] == ["MatMul"]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (WEIGHTS4, "int4"),
        (dataclasses.replace(WEIGHTS4, wide=("mm",)), "int8"),
        (dataclasses.replace(WEIGHTS4, keep=("mm",), floats="fp16"), "fp16"),
        (dataclasses.replace(DYNAMIC, keep=("mm",)), "fp32"),
    ],
    ids=["narrow", "wide", "kept-fp16", "kept-fp32"],
)
def test_a_graph_is_called_what_its_narrowest_weight_is(
    tmp_path: Path, recipe: Recipe, expected: str
) -> None:
    source, _ = matmul(tmp_path / "fp32.onnx")
    record = quantize(source, tmp_path / "out.onnx", recipe, [{"x": np.ones((3, 200), np.float32)}])
    assert record["recipe"]["precision"] == expected


def test_weights_under_fp16_keep_the_types_of_inputs_and_outputs(tmp_path: Path) -> None:
    source, _ = tied(tmp_path / "fp32.onnx")
    quantize(source, tmp_path / "out.onnx", dataclasses.replace(WEIGHTS4, floats="fp16"))
    model = onnx.load(tmp_path / "out.onnx")
    scales = [t for t in model.graph.initializer if t.name.endswith("_scales_fp16")]
    assert len(scales) == 4
    assert all(t.data_type == TensorProto.FLOAT16 for t in scales)
    feeds = {"ids": np.arange(50)}
    (got,) = run(tmp_path / "out.onnx", feeds)
    assert got.dtype == np.float32
    assert relative(got, run(source, feeds)[0]) < 0.35


# int8 at run time.


def branches(path: Path) -> Path:
    """`even = x @ a + c` and `spiked = (x * spikes) @ b`."""
    k = 200
    spikes = np.ones(k, np.float32)
    spikes[7] = 200.0
    weights = {
        "a": rng(0).standard_normal((k, 24), np.float32),
        "b": rng(1).standard_normal((k, 24), np.float32),
        "c": rng(2).standard_normal(24).astype(np.float32),
        "spikes": spikes,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["product"], "even_matmul"),
        helper.make_node("Add", ["product", "c"], ["even"], "even_bias"),
        helper.make_node("Mul", ["x", "spikes"], ["y"], "spike"),
        helper.make_node("MatMul", ["y", "b"], ["spiked"], "spiked_matmul"),
    ]
    return write(path, nodes, {"x": ["rows", k]}, ["even", "spiked"], weights)


def uniform(count: int, k: int = 200) -> list[Arrays]:
    generator = rng(1)
    return [{"x": generator.uniform(-1, 1, (16, k)).astype(np.float32)} for _ in range(count)]


def test_int8_is_what_the_scheme_says(tmp_path: Path) -> None:
    source, w = matmul(tmp_path / "fp32.onnx")
    (feeds,) = uniform(1)
    quantize(source, tmp_path / "int8.onnx", DYNAMIC, [feeds])
    x = feeds["x"].astype(np.float64)
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    zero = np.rint(-min(x.min(), 0) / step)
    xq = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    w_step = np.abs(w).max(0) / 127
    wq = np.rint(w / w_step)
    (got,) = run(tmp_path / "int8.onnx", feeds)
    np.testing.assert_allclose(got, (xq @ wq) * step * w_step, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-a-matmul"])
def test_gemms_are_int8_where_they_are_all_matmuls_that_there_are(
    tmp_path: Path, beside: bool
) -> None:
    """Alone they are a tower whose patches have no batch dimension; else a pooler or a head."""
    weights = {
        "a": rng(1).standard_normal((40, 200), np.float32),
        "b": rng(2).standard_normal((40, 24), np.float32),
        "bias": rng(3).standard_normal(40).astype(np.float32),
        "first": rng(4).standard_normal((200, 200), np.float32) / np.float32(14),
    }
    first = [helper.make_node("MatMul", ["x", "first"], ["h"], "first")] if beside else []
    nodes = [
        *first,
        helper.make_node("Gemm", ["h" if beside else "x", "a", "bias"], ["m"], "one", transB=1),
        helper.make_node("Gemm", ["m", "b"], ["y"], "two"),
    ]
    if not beside:
        del weights["first"]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 200]}, ["y"], weights)
    (feeds,) = uniform(1)
    record = quantize(source, tmp_path / "int8.onnx", DYNAMIC, [feeds])
    kinds = ops(tmp_path / "int8.onnx")
    assert record["matmuls"] == kinds.count("MatMulInteger") == (1 if beside else 2)
    assert kinds.count("Gemm") == (2 if beside else 0)
    (expected,), (got,) = run(source, feeds), run(tmp_path / "int8.onnx", feeds)
    assert 0 < relative(got, expected) < 0.03
    if not beside:
        only = dataclasses.replace(DYNAMIC, keep=("one",))
        assert quantize(source, tmp_path / "kept.onnx", only, [feeds])["matmuls"] == 1


def test_only_a_spiked_input_has_its_outliers_taken_out(tmp_path: Path) -> None:
    record = quantize(branches(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx", DYNAMIC, uniform(3))
    assert record["outliers"]["matmuls"] == ["spiked_matmul"]
    assert 7 in record["outliers"]["channels"]["y"]
    assert record["outliers"]["scale_lent"] == {}
    assert "Gather" in ops(tmp_path / "int8.onnx")
    assert record["matmuls"] == ops(tmp_path / "int8.onnx").count("MatMulInteger") == 2
    # Nothing else is left behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fp32.onnx",
        "fp32.onnx.data",
        "int8.onnx",
        "int8.onnx.data",
    ]


def test_without_outliers_the_small_values_beside_a_spike_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, (x,) = branches(tmp_path / "fp32.onnx"), uniform(1)
    # The spike alone has nearly all of the output: without it, what the others add is left.
    x["x"][:, 7] = 0.0
    x["x"][0, 7] = 1.0
    exact = run(source, x)[1][1:]
    errors = {}
    for name, limit in (("split", 0.05), ("whole", np.inf)):
        monkeypatch.setattr("mmopt_export.quantization.outliers.MAX_NOISE", limit)
        quantize(source, tmp_path / f"{name}.onnx", DYNAMIC, [x])
        errors[name] = relative(run(tmp_path / f"{name}.onnx", x)[1][1:], exact)
    assert errors["split"] < 0.02 < 0.2 < errors["whole"]


def feed_forward(path: Path, activation: str = "Gelu") -> Path:
    """`act(x @ a + c) @ b`, with one hidden channel some twenty times as large as the others."""
    a, c = rng(0).standard_normal((48, 64), np.float32), np.zeros(64, np.float32)
    a[:, 5] *= 20.0
    c[5] = 20.0
    b = rng(1).standard_normal((64, 24), np.float32)
    b[5] *= 0.01  # so that the others are not lost beside it in the result
    weights = {"a": a, "c": c, "b": b}
    domain = "com.microsoft" if activation == "Gelu" else ""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["product"], "up"),
        helper.make_node("Add", ["product", "c"], ["hidden"], "up_bias"),
        helper.make_node(activation, ["hidden"], ["active"], "act", domain=domain),
        helper.make_node("MatMul", ["active", "b"], ["y"], "down"),
    ]
    return write(path, nodes, {"x": ["rows", 48]}, ["y"], weights)


@pytest.mark.parametrize("activation", ["Gelu", "Relu", "Tanh"])
def test_outliers_of_an_activation_are_computed_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    """The large channel is not there in int8, and the sum of both is what it was."""
    source, (x,) = feed_forward(tmp_path / "fp32.onnx", activation), uniform(1, 48)
    errors = {}
    for name, limit in (("beside", 0.001), ("whole", np.inf)):
        monkeypatch.setattr("mmopt_export.quantization.outliers.MAX_NOISE", limit)
        record = quantize(source, tmp_path / f"{name}.onnx", DYNAMIC, [x])
        errors[name] = relative(run(tmp_path / f"{name}.onnx", x)[0], run(source, x)[0])
        if name == "beside":
            assert record["outliers"]["computed_beside"] == ["active"]
            assert 5 in record["outliers"]["channels"]["active"] or activation == "Tanh"
            assert "Gather" not in ops(tmp_path / "beside.onnx")
    # No value of Tanh is large.
    assert errors["beside"] < (1.0 if activation == "Tanh" else 0.5) * errors["whole"]


def test_layers_that_share_their_weights_have_outliers_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of ALBERT: one weight, and another large channel in each layer."""
    a, b = (
        rng(0).standard_normal((48, 64), np.float32),
        rng(1).standard_normal((64, 24), np.float32),
    )
    weights: Arrays = {"a": a, "b": b}
    nodes = []
    for index, channel in enumerate((5, 9)):
        weights[f"c{index}"] = np.zeros(64, np.float32)
        weights[f"c{index}"][channel] = 100.0
        names = [f"{name}{index}" for name in ("product", "hidden", "active", "y")]
        nodes += [
            helper.make_node("MatMul", ["x", "a"], names[:1], f"up{index}"),
            helper.make_node("Add", [names[0], f"c{index}"], [names[1]], f"bias{index}"),
            helper.make_node("Relu", [names[1]], [names[2]], f"act{index}"),
            helper.make_node("MatMul", [names[2], "b"], [names[3]], f"down{index}"),
        ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 48]}, ["y0", "y1"], weights)
    monkeypatch.setattr("mmopt_export.quantization.outliers.MAX_NOISE", 0.001)
    (x,) = uniform(1, 48)
    record = quantize(source, tmp_path / "int8.onnx", DYNAMIC, [x])
    assert record["outliers"]["computed_beside"] == ["active0", "active1"]
    for got, expected in zip(run(tmp_path / "int8.onnx", x), run(source, x), strict=True):
        assert relative(got, expected) < 0.01


def test_a_few_times_larger_channels_lend_their_scale_to_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six times is little for a row of eight bits; 200 times, as above, is too much."""
    weights = {"spikes": np.ones(200, np.float32), "b": rng(1).standard_normal((200, 24))}
    weights["spikes"][7], weights["b"] = 6.0, weights["b"].astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "spikes"], ["y"], "spike"),
        helper.make_node("MatMul", ["y", "b"], ["z"], "spiked_matmul"),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": ["rows", 200]}, ["z"], weights)
    (x,) = uniform(1)
    x["x"] **= 9  # most values are small beside the largest, as behind a normalization
    x["x"][0] = 1.0
    errors = {}
    for name, limit in (("lent", 0.001), ("whole", np.inf)):
        monkeypatch.setattr("mmopt_export.quantization.outliers.MAX_NOISE", limit)
        record = quantize(source, tmp_path / f"{name}.onnx", DYNAMIC, [x])
        errors[name] = relative(run(tmp_path / f"{name}.onnx", x)[0], run(source, x)[0])
        if name == "lent":
            assert record["outliers"]["scale_lent"]["y"] == pytest.approx(6.0, rel=0.1)
            assert "Gather" not in ops(tmp_path / "lent.onnx")
    assert errors["lent"] < 0.7 * errors["whole"]


def test_onnxruntime_fuses_each_int8_matmul_with_its_bias(tmp_path: Path) -> None:
    import onnxruntime

    quantize(branches(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx", DYNAMIC, uniform(1))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"]
    )
    optimized = onnx.load(tmp_path / "optimized.onnx").graph.node
    fused = [node for node in optimized if node.op_type == "DynamicQuantizeMatMul"]
    assert len(fused) == 2
    assert "MatMulInteger" not in [node.op_type for node in optimized]
    assert any("c" in node.input for node in fused), "the bias is added by itself"


def encoder_block(path: Path) -> Path:
    """A packed projection with biases, a skip connection with its norm, and a GELU, all fused."""
    h, contrib = 32, "com.microsoft"
    weights: Arrays = {
        "qkv": rng(0).standard_normal((h, 3 * h), np.float32),
        "sizes": np.array([h, h, h]),
        "scale": rng(1).uniform(0.5, 1.5, h).astype(np.float32),
        "shift": rng(2).standard_normal(h).astype(np.float32),
        "skip_bias": rng(3).standard_normal(h).astype(np.float32),
        "gelu_bias": rng(4).standard_normal(h).astype(np.float32),
        **{f"b{i}": rng(5 + i).standard_normal(h).astype(np.float32) for i in range(3)},
    }
    nodes = [
        helper.make_node("MatMul", ["x", "qkv"], ["packed"], "project"),
        helper.make_node("Split", ["packed", "sizes"], ["p0", "p1", "p2"], "split", axis=-1),
        *(helper.make_node("Add", [f"p{i}", f"b{i}"], [f"h{i}"], f"add{i}") for i in range(3)),
        helper.make_node(
            "SkipLayerNormalization",
            ["h0", "h1", "scale", "shift", "skip_bias"],
            ["normal", "", "", "sum"],
            "norm",
            domain=contrib,
            epsilon=1e-5,
        ),
        helper.make_node("BiasGelu", ["h2", "gelu_bias"], ["active"], "gelu", domain=contrib),
        helper.make_node("Add", ["active", "sum"], ["both"], "both"),
        helper.make_node("Mul", ["both", "normal"], ["y"], "mul"),
    ]
    return write(path, nodes, {"x": ["batch", "sequence", h]}, ["y"], weights)


def test_the_cpu_rewrites_change_the_graph_and_not_its_results(tmp_path: Path) -> None:
    source = encoder_block(tmp_path / "fp32.onnx")
    x = {"x": rng(9).standard_normal((2, 5, 32), np.float32)}
    expected = run(source, x)
    # Kept in fp32, so that only the rewrites are left of it.
    kept = dataclasses.replace(DYNAMIC, keep=("project_0", "project_1", "project_2"))
    quantize(source, tmp_path / "out.onnx", kept, [x])
    made = ops(tmp_path / "out.onnx")
    assert "SkipLayerNormalization" not in made
    assert "BiasGelu" not in made
    assert made.count("MatMul") == 3, "a packed projection is split after"
    assert "Split" not in made
    np.testing.assert_allclose(run(tmp_path / "out.onnx", x)[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "op"),
    [(DYNAMIC, "DequantizeLinear"), (WEIGHTS4, "GatherBlockQuantized")],
    ids=["int8", "int4"],
)
def test_an_embedding_table_without_any_matmul_is_quantized(
    tmp_path: Path, recipe: Recipe, op: str
) -> None:
    source, feeds = table_alone(tmp_path / "fp32.onnx"), {"ids": np.arange(0, 1100, 7)}
    record = quantize(source, tmp_path / "out.onnx", recipe, [feeds])
    assert record["matmuls"] == 0
    assert record["recipe"]["precision"] == "int8", "tables have 8 bits, whatever matmuls have"
    assert record["embeddings"]["tables"] == ["table"]
    assert op in ops(tmp_path / "out.onnx")
    (expected,), (got,) = run(source, feeds), run(tmp_path / "out.onnx", feeds)
    assert 0 < relative(got, expected) < 0.015
    sizes = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in ("out", "fp32")]
    assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (DYNAMIC, "changed no matmul: the graph has none with a constant"),
        (WEIGHTS4, "changed no matmul: the graph has none with a constant"),
        (STATIC, "changed nothing: no convolution has a constant"),
    ],
    ids=["dynamic", "weights", "static"],
)
def test_a_graph_without_constant_weights_has_nothing_to_quantize(
    tmp_path: Path, recipe: Recipe, message: str
) -> None:
    nodes = [helper.make_node("MatMul", ["x", "y"], ["z"], "mm")]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": [2, 2], "y": [2, 2]}, ["z"], {})
    feeds = [{"x": np.eye(2, dtype=np.float32), "y": np.eye(2, dtype=np.float32)}]
    with pytest.raises(NothingToQuantizeError, match=message):
        quantize(source, tmp_path / "out.onnx", recipe, feeds)
    assert not (tmp_path / "out.onnx").exists()


# Convolutions.


def convolution(path: Path) -> Path:
    weights = {
        "w": rng(0).standard_normal((8, 3, 3, 3), np.float32),
        "b": rng(1).standard_normal(8).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    return write(path, nodes, {"x": ["batch", 3, "height", "width"]}, ["y"], weights)


def pictures() -> list[Arrays]:
    """Of several sizes, as those that a graph of any size is held on."""
    sizes = ((8, 8), (8, 8), (9, 12), (6, 7))
    return [
        {"x": rng(i).uniform(-1, 1, (2, 3, *size)).astype(np.float32)}
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_convolutions_run_in_int8_and_stay_close(tmp_path: Path, calibration: str) -> None:
    source = convolution(tmp_path / "fp32.onnx")
    recipe = dataclasses.replace(STATIC, calibration=calibration)
    record = quantize(source, tmp_path / "int8.onnx", recipe, pictures())
    assert record["quantized"] == 1
    assert record["samples"]["batches"] == 4
    x = pictures()[0]
    assert relative(run(tmp_path / "int8.onnx", x)[0], run(source, x)[0]) < 0.03


def test_static_quantization_leaves_products_of_activations_alone(tmp_path: Path) -> None:
    """Attention has no weights: rounding both of its sides costs accuracy and saves no bytes."""
    weights = {"w": rng(0).standard_normal((16, 16)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "projection"),
        helper.make_node("Tanh", ["h"], ["q"], "q"),
        helper.make_node("Sigmoid", ["h"], ["k"], "k"),
        helper.make_node("MatMul", ["q", "k"], ["y"], "scores"),
    ]
    source = write(tmp_path / "fp32.onnx", nodes, {"x": [16, 16]}, ["y"], weights)
    feeds = [{"x": rng(i).uniform(-1, 1, (16, 16)).astype(np.float32)} for i in range(4)]
    record = quantize(source, tmp_path / "int8.onnx", STATIC, feeds)
    assert record["quantized"] == 1
    graph = onnx.load(tmp_path / "int8.onnx").graph
    made = {output: node for node in graph.node for output in node.output}
    sides = {
        node.name: [made[name].op_type if name in made else "" for name in node.input]
        for node in graph.node
        if node.op_type == "MatMul"
    }
    assert sides["projection"] == ["DequantizeLinear"] * 2
    assert sides["scores"] == ["Tanh", "Sigmoid"]


def test_a_kept_convolution_leaves_nothing_to_quantize(tmp_path: Path) -> None:
    source = convolution(tmp_path / "fp32.onnx")
    kept = dataclasses.replace(STATIC, keep=("conv",))
    with pytest.raises(NothingToQuantizeError, match="changed nothing"):
        quantize(source, tmp_path / "out.onnx", kept, pictures())
    assert not (tmp_path / "out.onnx").exists()


def test_static_quantization_refuses_what_no_protobuf_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_module, "LIMIT_BYTES", 1000)
    with pytest.raises(InputError, match="takes 2 GB at most"):
        quantize(convolution(tmp_path / "fp32.onnx"), tmp_path / "out.onnx", STATIC, pictures())


# Files.


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("fp32", "none"),
        Recipe("fp16", "half", floats="fp16"),
        Recipe("bf16", "half", floats="bf16"),
        DYNAMIC,
        WEIGHTS4,
        dataclasses.replace(WEIGHTS4, symmetric=False, algorithm="hqq"),
        dataclasses.replace(WEIGHTS4, algorithm="gptq"),
    ],
    ids=["fp32", "fp16", "bf16", "dynamic", "rtn", "hqq", "gptq"],
)
def test_two_runs_write_the_same_bytes_and_the_record_is_json(
    tmp_path: Path, recipe: Recipe
) -> None:
    source = branches(tmp_path / "fp32.onnx")
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record = quantize(source, tmp_path / name / "model.onnx", recipe, uniform(2))
        json.dumps(record, allow_nan=False)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]
    onnx.checker.check_model(str(tmp_path / "a" / "model.onnx"))


def test_memory_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    count, k = 24, 256
    nodes = [
        helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], f"mm{i}")
        for i in range(count)
    ]
    weights = {f"w{i}": rng(i).standard_normal((k, k), np.float32) for i in range(count)}
    source = write(tmp_path / "fp32.onnx", nodes, {"h0": ["rows", k]}, [f"h{count}"], weights)
    one = 4 * k * k
    for recipe in (WEIGHTS4, Recipe("fp16", "half", floats="fp16")):
        quantize(source, tmp_path / "out.onnx", recipe)  # what is imported stays
        tracemalloc.start()
        quantize(source, tmp_path / "out.onnx", recipe)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * one, f"{peak / one:.1f} weights of {count}"


def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source = branches(tmp_path / "fp32.onnx")
    output = tmp_path / "out.onnx"
    (tmp_path / "text.onnx").write_text("no model")
    cases: list[tuple[Path, Path, Recipe, str]] = [
        (source, output, DYNAMIC, r"expected at least one batch\. Give it .* --calibration"),
        (source, output, dataclasses.replace(WEIGHTS4, algorithm="gptq"), "at least one batch"),
        (source, output, STATIC, "at least one batch"),
        (source, source, WEIGHTS4, "is the source itself"),
        (tmp_path / "no.onnx", output, WEIGHTS4, "does not exist"),
        (tmp_path / "text.onnx", output, WEIGHTS4, "is not an ONNX model"),
        (source, output, dataclasses.replace(WEIGHTS4, keep=("x",)), "names x, which the graph"),
    ]
    for given, out, recipe, message in cases:
        with pytest.raises(InputError, match=message):
            quantize(given, out, recipe)
    (tmp_path / "fp32.onnx.data").unlink()
    with pytest.raises(InputError, match=r"its data file fp32\.onnx\.data is missing"):
        quantize(source, output, WEIGHTS4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "text.onnx"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = branches(tmp_path / "fp32.onnx")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmopt_export.quantization.packing.round_to_nearest", full)
    with pytest.raises(OSError, match="No space left"):
        quantize(source, tmp_path / "out.onnx", WEIGHTS4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp32.onnx", "fp32.onnx.data"]
