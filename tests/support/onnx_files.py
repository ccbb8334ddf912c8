"""Small ONNX files for tests of quantization, and how they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmopt_export.runtime import open_session

Arrays = dict[str, np.ndarray]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: list[str],
    weights: Arrays,
    types: dict[str, int] | None = None,
) -> Path:
    """A graph with its weights in external data, as the exporter writes it."""
    made = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(name, (types or {}).get(name, TensorProto.FLOAT), shape)
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    onnx.save(
        onnx.shape_inference.infer_shapes(model),
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=64,
    )
    return path


def table_alone(path: Path) -> Path:
    """An embedding table and no matmul."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], "embed")]
    table = rng().standard_normal((1100, 64), np.float32)
    types = {"ids": TensorProto.INT64}
    return write(path, nodes, {"ids": ["rows"]}, ["y"], {"table": table}, types)


def run(path: Path, feeds: Arrays) -> list[np.ndarray]:
    found: list[np.ndarray] = open_session(path, provider="CPUExecutionProvider").run(None, feeds)
    return found


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def unpack(blocks: tuple[np.ndarray, ...], k: int, bits: int, symmetric: bool) -> np.ndarray:
    """What a weight in blocks, as MatMulNBits stores it, is worth: `[K, N]` in fp64."""
    integers, scales, zeros = blocks
    q = _whole(integers, bits)
    n, count = scales.shape
    zero = np.full((n, count), 2 ** (bits - 1)) if symmetric else _whole(zeros, bits)
    values = scales[..., None].astype(np.float64) * (q.astype(np.float64) - zero[:, :count, None])
    return np.ascontiguousarray(values.reshape(n, -1)[:, :k].T)


def _whole(values: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return values
    halves = np.stack([values & 15, values >> 4], axis=-1)
    return halves.reshape(*values.shape[:-1], -1)
