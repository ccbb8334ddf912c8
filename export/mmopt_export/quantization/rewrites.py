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
    - The biases that follow the parts of one packed projection are added before it is split.

    Returns:
        How many of each were taken apart.
    """
    graph = model.graph
    counts = {
        "skip_normalizations": _split_skip_normalizations(graph),
        "bias_gelus": _split_bias_gelus(graph),
        "packed_biases": _pack_biases(graph),
    }
    remove_unused(graph)
    name_nodes(graph)
    return counts


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


def _pack_biases(graph: onnx_ir.Graph) -> int:
    """MatMul, Split, and an Add per part: one Add before the Split."""
    count = 0
    for weight in list(find_weights(graph, gemm=False)):
        product = weight.node.outputs[0]
        uses = list(product.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Split" or product.is_graph_output():
            continue
        split = uses[0].node
        adds = [_bias_add(part) for part in split.outputs]
        biases = [bias for add, bias in adds if add is not None and bias is not None]
        if len(biases) != len(split.outputs):
            continue
        group = Group(_joined, [bias.const_value for bias in biases])
        packed = initializer(
            graph,
            group.tensor(
                0, f"{weight.value.name}_bias", onnx_ir.DataType.FLOAT, (weight.shape[1],)
            ),
        )
        added = onnx_ir.node("Add", [product, packed], name=f"{weight.name}_bias")
        added.outputs[0].type, added.outputs[0].shape = product.type, product.shape
        graph.insert_after(weight.node, added)
        split.replace_input_with(0, added.outputs[0])
        for part, (add, _) in zip(split.outputs, adds, strict=True):
            assert add is not None
            onnx_ir.convenience.replace_all_uses_with(
                add.outputs[0], part, replace_graph_outputs=True
            )
            graph.remove(add, safe=True)
        count += 1
    return count


def _joined(tensors: list[onnx_ir.TensorProtocol]) -> tuple[Array, ...]:
    return (np.concatenate([read(tensor) for tensor in tensors]),)


def _bias_add(part: onnx_ir.Value) -> tuple[onnx_ir.Node | None, onnx_ir.Value | None]:
    """The only reader of `part`, where it adds a constant vector, and that vector."""
    uses = list(part.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or part.is_graph_output():
        return None, None
    add = uses[0].node
    for value in add.inputs:
        if (
            value is not None
            and value is not part
            and value.is_initializer()
            and value.const_value is not None
            and value.dtype == onnx_ir.DataType.FLOAT
            and len(value.const_value.shape) == 1
        ):
            return add, value
    return None, None
