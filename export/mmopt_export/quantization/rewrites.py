"""Graphs as ONNX Runtime's CPU provider runs them fastest: what its fused ops are slower at."""

import numpy as np
import onnx_ir

from mmopt_export.quantization.storage import Array, Group
from mmopt_export.quantization.weights import (
    attribute,
    find_weights,
    initializer,
    name_nodes,
    read,
    remove_unused,
    replace,
)
from mmopt_export.repairs import spell_out

# Queries, keys and values: of many parts each would be a matmul too small to be fast.
_MOST_PARTS = 3
_NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}


def rewrite_for_cpu(model: onnx_ir.Model) -> dict[str, int]:
    """Take apart, in place, the fused ops that the CPU provider computes slower than their parts.

    - `SkipLayerNormalization` is eight times slower than an addition and a LayerNormalization:
      2.0 against 0.25 ms for 8 x 128 x 384 on one thread of an AMD EPYC (ONNX Runtime 1.32), which
      is a fifth of an int8 MiniLM; the simplified kind 2.5 times. The addition is a `Sum`, because
      ONNX Runtime fuses an `Add` in that place again.
    - The bias of `BiasGelu` is added by the matmul before it, where it costs nothing.
    - A packed projection of queries, keys and values has to be split again, which copies all of
      them: three smaller matmuls take as long as the packed one, and the Split a sixth of that
      (docs/lab-notes.md).

    Returns:
        How many of each were taken apart.
    """
    graph = model.graph
    counts = {
        "skip_normalizations": _split_skip_normalizations(graph),
        "bias_gelus": _split_bias_gelus(graph),
        "packed_projections": _unpack_projections(graph),
    }
    remove_unused(graph)
    name_nodes(graph)
    return counts


def split_lone_gemms(model: onnx_ir.Model) -> None:
    """Write Gemms as MatMul and Add, in place, in a graph that has no other matmuls with weights.

    The tracer makes Gemms of layers over two dimensions. Beside matmuls over tokens they are a
    pooler or a head; alone they are the model: Qwen's tower has its patches in one dimension.
    """
    from mmopt_export.decoder.passes import split_gemms  # which imports from this package

    if next(find_weights(model.graph, gemm=False), None) is None:
        split_gemms(model)


def _split_skip_normalizations(graph: onnx_ir.Graph) -> int:
    count = 0
    for node in list(graph):
        if node.op_type not in _NORMS or node.domain != "com.microsoft":
            continue
        simplified = node.op_type.startswith("SkipSimplified")
        x, skip, scale, *rest = node.inputs
        offset = None if simplified else (rest.pop(0) if rest else None)
        bias = rest[0] if rest else None
        # The mean and the inverse deviation, which inference never asks for.
        if any(out.uses() or out.is_graph_output() for out in node.outputs[1:3]):
            continue
        assert x is not None
        new = []
        if bias is not None:
            new.append(onnx_ir.node("Add", [x, bias], name=f"{node.name}_bias"))
            x = new[-1].outputs[0]
        new.append(onnx_ir.node("Sum", [x, skip], name=f"{node.name}_sum"))
        total = new[-1].outputs[0]
        if len(node.outputs) > 3 and node.outputs[3].name:
            total.name = node.outputs[3].name
            total.type, total.shape = node.outputs[3].type, node.outputs[3].shape
            onnx_ir.convenience.replace_all_uses_with(
                node.outputs[3], total, replace_graph_outputs=True
            )
        norm = onnx_ir.node(
            _NORMS[node.op_type],
            [total, scale] if offset is None else [total, scale, offset],
            {
                "axis": -1,
                "epsilon": attribute(node, "epsilon", 1e-12),  # type: ignore[dict-item]
                "stash_type": 1,
            },
            name=node.name,
        )
        replace(node, [*new, norm])
        if simplified:
            # An op that only ONNX Runtime has in ONNX's own domain; it makes it of these again.
            spell_out(graph, norm)
        count += 1
    return count


def _split_bias_gelus(graph: onnx_ir.Graph) -> int:
    count = 0
    for node in list(graph):
        if node.op_type == "BiasGelu" and node.domain == "com.microsoft":
            add = onnx_ir.node("Add", node.inputs, name=f"{node.name}_bias")
            gelu = onnx_ir.node("Gelu", add.outputs, domain="com.microsoft", name=node.name)
            replace(node, [add, gelu])
            count += 1
    return count


def _unpack_projections(graph: onnx_ir.Graph) -> int:
    """A MatMul of which a Split is made: one MatMul per part."""
    count = 0
    for weight in list(find_weights(graph, gemm=False)):
        product = weight.node.outputs[0]
        uses = list(product.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Split" or product.is_graph_output():
            continue
        split = uses[0].node
        sizes = split.inputs[1].const_value if len(split.inputs) > 1 and split.inputs[1] else None
        axis = attribute(split, "axis", 0)
        rank = len(product.shape) if product.shape is not None else 0
        if sizes is None or sizes.size > _MOST_PARTS or axis not in (-1, rank - 1):
            continue
        widths = sizes.numpy().tolist()
        group = Group(_columns, weight.tensor, np.cumsum(widths[:-1]).tolist())
        nodes = []
        for index, (part, width) in enumerate(zip(split.outputs, widths, strict=True)):
            shape = (weight.shape[0], width)
            columns = group.tensor(
                index, f"{weight.value.name}_{index}", onnx_ir.DataType.FLOAT, shape
            )
            node = onnx_ir.node(
                "MatMul", [weight.x, initializer(graph, columns)], name=f"{weight.name}_{index}"
            )
            out = node.outputs[0]
            out.type, out.shape = part.type, part.shape
            onnx_ir.convenience.replace_all_uses_with(part, out, replace_graph_outputs=True)
            nodes.append(node)
        graph.insert_before(weight.node, nodes)
        graph.remove([split, weight.node], safe=True)
        count += 1
    return count


def _columns(tensor: onnx_ir.TensorProtocol, ends: list[int]) -> tuple[Array, ...]:
    return tuple(np.ascontiguousarray(one) for one in np.split(read(tensor), ends, axis=1))
