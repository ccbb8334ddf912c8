"""Which matmuls of a graph int8 quantization gives blocks, and what that is good for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt_export.quantize import MAX_NOISE, quantize_int8
from mmopt_export.runtime import open_session
from mmopt_kernels.errors import MmoptError

K = 200  # not a multiple of the block


def graph(path: Path, ops: tuple[str, ...] = ("MatMul", "MatMul")) -> Path:
    """Two branches of one weight each: `even = x @ a` and `spiked = (x * scale) @ b`."""
    generator = np.random.default_rng(0)
    spikes = np.ones(K, np.float32)
    spikes[7] = 200.0
    weights = {
        "a": generator.standard_normal((K, 24), np.float32),
        "b": generator.standard_normal((K, 24), np.float32),
        "spikes": spikes,
    }
    nodes = [
        helper.make_node(ops[0], ["x", "a"], ["even"], "even_matmul"),
        helper.make_node("Mul", ["x", "spikes"], ["y"], "spike"),
        helper.make_node(ops[1], ["y", "b"], ["spiked"], "spiked_matmul"),
    ]
    made = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("even", "spiked")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.uniform(-1, 1, (16, K)).astype(np.float32)} for _ in range(count)]


def outputs(path: Path, x: dict[str, np.ndarray]) -> list[np.ndarray]:
    found: list[np.ndarray] = open_session(path, provider="CPUExecutionProvider").run(None, x)
    return found


def test_only_the_matmul_with_spiked_activations_takes_blocks(tmp_path: Path) -> None:
    recipe = quantize_int8(graph(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx", feeds(3))
    assert recipe["blockwise"]["matmuls"] == ["spiked_matmul"]
    assert recipe["matmuls"] == 2
    nodes = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert (nodes.count("MatMulInteger"), nodes.count("MatMulNBits")) == (1, 1)
    # Nothing else is left behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]


def test_blocks_keep_the_small_activations_beside_a_spike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, (x,) = graph(tmp_path / "fp32.onnx"), feeds(1)
    # The spike alone has nearly all of the output: without it, what the others add is left.
    x["x"][:, 7] = 0.0
    x["x"][0, 7] = 1.0
    exact = outputs(source, x)[1][1:]
    errors = {}
    for name, limit in (("blocks", MAX_NOISE), ("one scale", np.inf)):
        monkeypatch.setattr("mmopt_export.quantize.MAX_NOISE", limit)
        quantize_int8(source, tmp_path / f"{name}.onnx", [x])
        found = outputs(tmp_path / f"{name}.onnx", x)[1][1:]
        errors[name] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert errors["blocks"] < 0.02 < 0.2 < errors["one scale"]


def test_a_graph_without_constant_weights_is_refused(tmp_path: Path) -> None:
    source = graph(tmp_path / "fp32.onnx", ops=("Gemm", "Gemm"))
    with pytest.raises(MmoptError, match="the graph has none with a constant"):
        quantize_int8(source, tmp_path / "int8.onnx", feeds(1))
    assert [path.name for path in tmp_path.iterdir()] == ["fp32.onnx"]
