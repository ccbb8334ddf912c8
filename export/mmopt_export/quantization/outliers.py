"""Channels of a matmul's input that stretch the one scale of its int8: found, and taken care of.

In this order, where it can be done: an activation's channels are computed beside it, at next to no
time; a few times larger ones lend their scale to the weight; the rest is multiplied in fp32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir

from mmopt_export.quantization.measuring import InputStats
from mmopt_export.quantization.storage import Array, Group
from mmopt_export.quantization.weights import Weight, find_weights, initializer, read

# An input of matmuls is quantized with one scale until the rounding that this brings, relative to
# the input (`InputStats.noise`), is above this. In MiniLM and in the demo's classifier inputs after
# normalizations and in attention are at 0.02 to 0.04, and those of feed-forward blocks, whose few
# large values stretch the scale, at 0.05 to 0.1 (docs/lab-notes.md).
MAX_NOISE = 0.05
# So many channels, those with the largest values over the samples, are taken out of a noisy input.
# On all-MiniLM-L6-v2 with 160 docstrings this takes the mean cosine of embeddings from 0.9923 to
# 0.9969; one channel would take it to 0.9962, and all noisy matmuls in fp32 to 0.9975.
OUTLIERS = 8
# An input lends its scale to the weight where no channel is more than so many times larger than the
# others: the weight's rows grow as much, and with 8 bits they have as little to spare.
MOST_LENT = 8.0

_FLOAT = onnx_ir.DataType.FLOAT
# Of one input, element by element, with 0 for 0.
_ACTIVATIONS = ("Gelu", "FastGelu", "QuickGelu", "Relu", "Tanh")


def outlier_channels(stats: Mapping[str, InputStats]) -> dict[str, Sequence[int]]:
    """The channels to take out of each noisy input, by its name."""
    return {
        name: sorted(np.argsort(-each.extremes, kind="stable")[:OUTLIERS].tolist())
        for name, each in stats.items()
        # Where they are not few among many, one scale is as good for the others.
        if each.noise > MAX_NOISE and len(each.extremes) >= 4 * OUTLIERS
    }


def relieve(
    graph: onnx_ir.Graph, weights: Sequence[Weight], stats: Mapping[str, InputStats]
) -> tuple[list[Weight], dict[str, Sequence[int]], dict[str, Any]]:
    """Take outliers out of the inputs of matmuls where that is cheap, in place.

    In fp32 the results stay what they were.

    Args:
        weights: the matmuls.
        stats: of their inputs, by name.

    Returns:
        The matmuls as they are now, the channels by input that are still to be split off, and the
        record for the manifest.
    """
    outliers = outlier_channels(stats)
    noisy = sorted(weight.name for weight in weights if str(weight.x.name) in outliers)
    beside = _compute_beside(graph, weights, outliers)
    rest = {name: which for name, which in outliers.items() if name not in beside}
    weights = _again(graph, weights)
    lent = _lend_scale(graph, weights, rest, stats)
    rest = {name: which for name, which in rest.items() if name not in lent}
    record = {
        "matmuls": noisy,
        "channels": {name: list(which) for name, which in sorted(outliers.items())},
        "computed_beside": sorted(beside),
        "scale_lent": dict(sorted(lent.items())),
        "activation_noise_above": MAX_NOISE,
    }
    return _again(graph, weights), rest, record


def _again(graph: onnx_ir.Graph, weights: Sequence[Weight]) -> list[Weight]:
    """The same matmuls of a graph that was changed."""
    names = {weight.name for weight in weights}
    return [weight for weight in find_weights(graph, gemm=False) if weight.name in names]


def _compute_beside(
    graph: onnx_ir.Graph, weights: Sequence[Weight], outliers: Mapping[str, Sequence[int]]
) -> list[str]:
    """Take channels out of activations by not computing them there, in place.

    Of `f(a @ W + b) @ V` the columns of W and b that make them become zero, and so do they;
    `f(a @ W[:, channels] + b[channels]) @ V[channels]` is added to the result.

    Returns:
        The names of the inputs that this was done for.
    """
    done = []
    for weight in weights:
        channels = outliers.get(str(weight.x.name))
        activation = _only(weight.x, _ACTIVATIONS) if channels else None
        add = _only(activation.inputs[0], ("Add",)) if activation is not None else None
        bias = _constant(add, weight.shape[0]) if add is not None else None
        first = _only(_other(add, bias), ("MatMul",)) if add is not None and bias else None
        matrix = first.inputs[1] if first is not None else None
        if not channels or activation is None or add is None or bias is None:
            continue
        if first is None or matrix is None or matrix.const_value is None:
            continue
        name = f"{weight.x.name}_outliers"
        parts = [_parted(graph, value, channels, name) for value in (matrix, bias)]
        first.replace_input_with(1, parts[0][0])
        add.replace_input_with(list(add.inputs).index(bias), parts[1][0])
        nodes = [onnx_ir.node("MatMul", [first.inputs[0], parts[0][1]], name=f"{name}_product")]
        nodes.append(onnx_ir.node("Add", [nodes[0].outputs[0], parts[1][1]], name=f"{name}_bias"))
        nodes.append(
            onnx_ir.Node(
                activation.domain,
                activation.op_type,
                nodes[1].outputs,
                list(activation.attributes.values()),
                name=name,
            )
        )
        for node in nodes:
            node.outputs[0].name, node.outputs[0].dtype = node.name, _FLOAT
        graph.insert_before(weight.node, nodes)
        add_product(graph, weight, nodes[-1].outputs[0], channels)
        done.append(str(weight.x.name))
    return done


def _lend_scale(
    graph: onnx_ir.Graph,
    weights: Sequence[Weight],
    outliers: Mapping[str, Sequence[int]],
    stats: Mapping[str, InputStats],
) -> dict[str, float]:
    """Divide the channels of inputs that are a few times larger, and multiply the weights' rows.

    Returns:
        The largest factor of each input that this was done for, by its name.
    """
    done: dict[str, float] = {}
    divided: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for weight in weights:
        x, name = weight.x, str(weight.x.name)
        if name not in outliers:
            continue
        extremes = stats[name].extremes
        others = np.delete(extremes, list(outliers[name])).max()
        factors = np.maximum(extremes / max(others, np.float32(1e-30)), 1).astype(np.float32)
        if factors.max() > MOST_LENT:
            continue
        if x not in divided:
            inverse = initializer(graph, onnx_ir.Tensor(1 / factors, name=f"{name}_lent"))
            node = onnx_ir.node("Mul", [x, inverse], name=f"{name}_even")
            out = node.outputs[0]
            out.name, out.type, out.shape = node.name, x.type, x.shape
            graph.insert_before(weight.node, node)
            divided[x] = out
            done[name] = float(factors.max())
        rows = Group(_multiplied, weight.tensor, factors)
        grown = initializer(graph, rows.tensor(0, f"{weight.name}_grown", _FLOAT, weight.shape))
        weight.node.replace_input_with(0, divided[x])
        weight.node.replace_input_with(1, grown)
    return done


def split(
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


def add_product(
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


def _only(value: onnx_ir.Value | None, kinds: Sequence[str]) -> onnx_ir.Node | None:
    """What makes a value that one node reads, where it is of these kinds."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    producer = value.producer()
    return producer if producer is not None and producer.op_type in kinds else None


def _constant(node: onnx_ir.Node, size: int) -> onnx_ir.Value | None:
    """The constant vector of that size among a node's inputs."""
    for value in node.inputs:
        tensor = value.const_value if value is not None and value.is_initializer() else None
        if tensor is not None and tuple(tensor.shape.numpy()) == (size,):
            return value
    return None


def _other(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    """The input of a node of two that is not `value`."""
    return next((one for one in node.inputs if one is not value), None)


def _parted(
    graph: onnx_ir.Graph, value: onnx_ir.Value, channels: Sequence[int], name: str
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """A constant with zeros in some of its last dimension, and these alone.

    Args:
        name: whose outliers they are: layers may share a weight and differ in these.
    """
    tensor = value.const_value
    assert tensor is not None
    shape = tuple(int(one) for one in tensor.shape.numpy())
    few = (*shape[:-1], len(channels))
    others, chosen = Group(_without, tensor, channels), Group(_chosen, tensor, channels)
    return (
        initializer(graph, others.tensor(0, f"{name}.{value.name}_others", _FLOAT, shape)),
        initializer(graph, chosen.tensor(0, f"{name}.{value.name}", _FLOAT, few)),
    )


def _without(tensor: onnx_ir.TensorProtocol, channels: Sequence[int]) -> tuple[Array, ...]:
    array = read(tensor).copy()
    array[..., list(channels)] = 0
    return (array,)


def _chosen(tensor: onnx_ir.TensorProtocol, channels: Sequence[int]) -> tuple[Array, ...]:
    return (np.ascontiguousarray(read(tensor)[..., list(channels)]),)


def _multiplied(tensor: onnx_ir.TensorProtocol, factors: Array) -> tuple[Array, ...]:
    return (read(tensor) * factors[:, None],)
