"""int8 matmuls whose activations are quantized at run time, for encoders on a CPU."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir

from mmopt_export.quantization.measuring import InputStats
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

# An input of matmuls is quantized with one scale until the rounding that this brings, relative to
# the input (`InputStats.noise`), is above this. In MiniLM and in the demo's classifier inputs after
# normalizations and in attention are at 0.02 to 0.04, and those of feed-forward blocks, whose few
# large values stretch the scale, at 0.05 to 0.1 (docs/lab-notes.md).
MAX_NOISE = 0.05
# So many channels, those with the largest values over the samples, are taken out of a noisy input
# and multiplied in fp32. On all-MiniLM-L6-v2 with 160 docstrings this takes the mean cosine of
# embeddings from 0.9923 to 0.9967 (32 channels: 0.9969; the 9 noisy matmuls in fp32 altogether:
# 0.9975) and costs 2 to 11% of the time. Int8 blocks of 128 for these matmuls (MatMulNBits), which
# was the scheme before, give 0.9979 and cost 28 to 40%: one thread of an AMD EPYC with
# AVX512-VNNI, 1 x 128, 8 x 128 and 32 x 64 tokens, processor time.
OUTLIERS = 8

_INT8, _FLOAT = onnx_ir.DataType.INT8, onnx_ir.DataType.FLOAT


def outlier_channels(stats: Mapping[str, InputStats]) -> dict[str, Sequence[int]]:
    """The channels to take out of each noisy input, by its name."""
    return {
        name: sorted(np.argsort(-each.extremes, kind="stable")[:OUTLIERS].tolist())
        for name, each in stats.items()
        # Where they are not few among many, one scale is as good for the others.
        if each.noise > MAX_NOISE and len(each.extremes) >= 4 * OUTLIERS
    }


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
    split: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
    for weight in weights:
        x, name, (k, n) = weight.x, weight.name, weight.shape
        channels = (outliers or {}).get(str(x.name))
        if channels:
            if x not in split:
                split[x] = _split(graph, weight, channels)
            x, large = split[x]
            _add_outliers(graph, weight, large, channels)
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


def _split(
    graph: onnx_ir.Graph, weight: Weight, channels: Sequence[int]
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """The input with zeros in the place of its outliers, and these alone."""
    x, k = weight.x, weight.shape[0]
    others = np.ones(k, np.float32)
    others[list(channels)] = 0.0
    mask = initializer(graph, onnx_ir.Tensor(others, name=f"{x.name}_others"))
    which = initializer(
        graph, onnx_ir.Tensor(np.array(channels, np.int64), name=f"{x.name}_outliers")
    )
    nodes = [
        onnx_ir.node("Mul", [x, mask], name=f"{x.name}_without_outliers"),
        onnx_ir.node("Gather", [x, which], {"axis": -1}, name=f"{x.name}_only_outliers"),
    ]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = node.name, _FLOAT
    nodes[0].outputs[0].shape = x.shape
    graph.insert_before(weight.node, nodes)
    return nodes[0].outputs[0], nodes[1].outputs[0]


def _add_outliers(
    graph: onnx_ir.Graph, weight: Weight, large: onnx_ir.Value, channels: Sequence[int]
) -> None:
    """Add `large @ w[channels]` to the matmul's result, behind a bias, which is fused with it."""
    rows = Group(lambda: (np.ascontiguousarray(weight.array()[list(channels)]),))
    shape = (len(channels), weight.shape[1])
    part = initializer(graph, rows.tensor(0, f"{weight.name}_outlier_rows", _FLOAT, shape))
    product = onnx_ir.node("MatMul", [large, part], name=f"{weight.name}_outliers")
    result = weight.node.outputs[0]
    uses = list(result.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not result.is_graph_output():
        add = uses[0].node
        if any(v is not None and v.is_initializer() for v in add.inputs):
            result = add.outputs[0]
    behind = list(result.uses())
    total = onnx_ir.node("Add", [result, product.outputs[0]], name=f"{weight.name}_total")
    out = total.outputs[0]
    out.type, out.shape = result.type, result.shape
    producer = result.producer()
    assert producer is not None
    graph.insert_after(producer, [product, total])
    for use in behind:
        use.node.replace_input_with(use.idx, out)
    if result.is_graph_output():
        # The name of an output is a promise: it moves to the sum.
        name = result.name
        result.name, out.name = f"{name}_without_outliers", name
        graph.outputs[list(graph.outputs).index(result)] = out


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

    A Gemm, which the tracer uses for the pooler and the head, is next to nothing in time and size.
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
