"""int8 matmuls whose activations are quantized at run time, for encoders on a CPU."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir

from mmopt_export.quantization.outliers import add_product, split
from mmopt_export.quantization.storage import Array, Group, row_pieces
from mmopt_export.quantization.weights import (
    Weight,
    find_embeddings,
    find_weights,
    initializer,
    read,
    remove_unused,
    replace,
)

_INT8, _FLOAT = onnx_ir.DataType.INT8, onnx_ir.DataType.FLOAT


def quantize_matmuls(
    graph: onnx_ir.Graph,
    weights: Iterable[Weight],
    outliers: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Replace matmuls by integer ones, in standard ONNX, in place.

    The activation takes uint8 with one scale and zero point computed at run time, the weight
    symmetric int8 with one scale per output channel. ONNX Runtime fuses the nodes of each matmul,
    and the addition of a bias behind it, into one.

    Args:
        outliers: channels of inputs, by the input's name, that are multiplied in fp32 instead, so
            that the scale of the others need not reach them.
    """
    quantized: dict[onnx_ir.Value, onnx_ir.Node] = {}
    parts: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
    for weight in weights:
        x, name, (k, n) = weight.x, weight.name, weight.shape
        channels = (outliers or {}).get(str(x.name))
        if channels:
            if x not in parts:
                parts[x] = split(graph, weight, channels)
            x, large = parts[x]
            add_product(graph, weight, large, channels)
        if x not in quantized:
            dynamic = onnx_ir.node(
                "DynamicQuantizeLinear", [x], num_outputs=3, name=f"{x.name}_quantize"
            )
            for output, suffix in zip(dynamic.outputs, ("int8", "scale", "zero"), strict=True):
                output.name = f"{x.name}_{suffix}"
            graph.insert_before(weight.node, dynamic)
            quantized[x] = dynamic
        xq, x_scale, x_zero = quantized[x].outputs
        group = Group(lambda weight: channelwise(weight.array()), weight)
        wq = initializer(graph, group.tensor(0, f"{name}_weight_int8", _INT8, (k, n)))
        w_scale = initializer(graph, group.tensor(1, f"{name}_weight_scale", _FLOAT, (n,)))
        zero = initializer(graph, onnx_ir.Tensor(np.zeros(n, np.int8), name=f"zero_int8_{n}"))
        product = onnx_ir.node("MatMulInteger", [xq, wq, x_zero, zero], name=f"{name}_integer")
        cast = onnx_ir.node("Cast", product.outputs, {"to": _FLOAT}, name=f"{name}_cast")
        scale = onnx_ir.node("Mul", [x_scale, w_scale], name=f"{name}_scale")
        scaled = onnx_ir.node("Mul", [cast.outputs[0], scale.outputs[0]], name=name)
        replace(weight.node, [product, cast, scale, scaled])
    remove_unused(graph)


def quantize_embeddings(graph: onnx_ir.Graph) -> list[str]:
    """Replace embedding tables by int8 ones with one scale each, in place; return their names."""
    done = []
    for node in list(find_embeddings(graph)):
        table, ids = node.inputs
        assert table is not None
        assert table.const_value is not None
        name = str(table.name)
        shape = tuple(table.const_value.shape.numpy())
        group = Group(lambda tensor: tablewise(read(tensor)), table.const_value)
        integers = initializer(graph, group.tensor(0, f"{name}_int8", _INT8, shape))
        scale = initializer(graph, group.tensor(1, f"{name}_scale", _FLOAT, ()))
        zero = initializer(graph, onnx_ir.Tensor(np.zeros((), np.int8), name="zero_int8"))
        rows = onnx_ir.node("Gather", [integers, ids], {"axis": 0}, name=f"{node.name}_int8")
        dense = onnx_ir.node(
            "DequantizeLinear", [rows.outputs[0], scale, zero], name=str(node.name)
        )
        replace(node, [rows, dense])
        done.append(name)
    remove_unused(graph)
    return done


def dynamic_candidates(graph: onnx_ir.Graph) -> list[Weight]:
    """The matmuls that int8 is for.

    A Gemm, which the tracer uses for the pooler and the head, is next to nothing in time and size;
    see `split_lone_gemms` for graphs of Gemms alone.
    """
    return list(find_weights(graph, gemm=False))


def channelwise(w: Array) -> tuple[Array, ...]:
    """`[K, N]` as symmetric int8 in -127..127 and the scale `[N]` of each column."""
    scale = np.maximum(w.max(axis=0), -w.min(axis=0)) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return _rounded(w, scale), scale


def tablewise(table: Array) -> tuple[Array, ...]:
    """A table as symmetric int8 in -127..127 and its scale."""
    scale = np.float32(max(table.max(), -table.min()) / np.float32(127)) or np.float32(1)
    return _rounded(table, scale), np.array(scale, np.float32)


def _rounded(values: Array, scale: Any) -> Array:
    integers = np.empty(values.shape, np.int8)
    for rows in row_pieces(values.shape):
        integers[rows] = np.rint(values[rows] / scale)
    return integers
