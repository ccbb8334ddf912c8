"""What ONNX Runtime and `onnx.checker` have against graphs of transformers' exporter, undone."""

from typing import Any

import numpy as np
import onnx_ir

# Their output has the dimensions of their largest input.
_ELEMENTWISE = ("Where", "Add", "Sub", "Mul", "Div")


def repair(model: onnx_ir.Model) -> None:
    """Make the graph one that both take, in place.

    - ONNX Runtime refuses a `FusedMatMul` with a batch transpose of a matrix.
    - The fusions put SimplifiedLayerNormalization into ONNX's own domain, which does not have it;
      ONNX Runtime fuses it again from the ops it is made of.
    - A masked assignment, as attention has for rows that see nothing, comes out with the shape of
      the scalar that is assigned, and some constants with another shape than they have.
    """
    _take_out_batch_transposes(model)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.shape = onnx_ir.Shape(value.const_value.shape.numpy())
    for node in list(model.graph):
        output = node.outputs[0]
        if node.op_type == "SimplifiedLayerNormalization":
            spell_out(model.graph, node)
        elif node.op_type in _ELEMENTWISE and output.shape is not None:
            ranks = [len(one.shape) for one in node.inputs if one is not None and one.shape]
            if max(ranks, default=0) > len(output.shape):
                output.shape = None


def _take_out_batch_transposes(graph: onnx_ir.Model) -> None:
    """Give each `FusedMatMul` that ONNX Runtime refuses its batch transpose back as a node.

    The fusions fold a transpose into a product with a matrix, such as a weight of
    `nn.MultiheadAttention`; ONNX Runtime wants two inputs of one rank for that.
    """
    nodes: list[Any] = [node for node in graph.graph.all_nodes() if node.op_type == "FusedMatMul"]
    for node in nodes:
        ranks = [len(value.shape) if value.shape is not None else 0 for value in node.inputs[:2]]
        if 0 in ranks or (ranks[0] == ranks[1] and ranks[0] >= 3):
            continue
        for index, side in enumerate("AB"):
            if not node.attributes.get_int(f"transBatch{side}", 0):
                continue
            source, rank = node.inputs[index], ranks[index]
            # The first dimension becomes the last but one, and with `trans` the last.
            last = [0] if node.attributes.get_int(f"trans{side}", 0) else [0, rank - 1]
            order = [*range(1, rank + 1 - len(last)), *last]
            moved = onnx_ir.node("Transpose", [source], attributes={"perm": order})
            moved.outputs[0].shape = onnx_ir.Shape([source.shape[axis] for axis in order])
            moved.outputs[0].type = source.type
            node.graph.insert_before(node, moved)
            node.replace_input_with(index, moved.outputs[0])
            node.attributes.pop(f"transBatch{side}", None)
            node.attributes.pop(f"trans{side}", None)


def spell_out(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Replace a SimplifiedLayerNormalization by `x / sqrt(mean(x^2) + epsilon) * scale`."""
    source, scale = node.inputs
    assert source is not None
    epsilon = node.attributes["epsilon"].as_float()
    nodes: list[onnx_ir.Node] = []

    def constant(values: Any, name: str) -> onnx_ir.Value:
        tensor = onnx_ir.tensor(np.asarray(values), name=f"{node.name}.{name}")
        value = onnx_ir.Value(
            name=tensor.name,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.initializers[str(value.name)] = value
        return value

    def apply(op: str, *inputs: onnx_ir.Value | None) -> onnx_ir.Value:
        nodes.append(onnx_ir.node(op, inputs))
        output = nodes[-1].outputs[0]
        output.name = f"{node.name}.{op}"
        output.type = source.type
        return output

    squares = apply("Pow", source, constant(np.float32(2), "exponent"))
    mean = apply("ReduceMean", squares, constant(np.asarray([-1]), "axes"))
    root = apply("Sqrt", apply("Add", mean, constant(np.float32(epsilon), "epsilon")))
    normed = apply("Mul", apply("Div", source, root), scale)
    old = node.outputs[0]
    normed.name, normed.shape = old.name, old.shape
    graph.insert_before(node, nodes)
    old.replace_all_uses_with(normed, replace_graph_outputs=True)
    graph.remove(node, safe=True)
