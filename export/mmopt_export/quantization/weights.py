"""Finds the matmuls of a graph that multiply by a constant, and its embedding tables."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir

from mmopt_export.quantization.storage import release

_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)


@dataclass(frozen=True, eq=False)
class Weight:
    """A matmul's constant operand.

    Attributes:
        node: the MatMul, or the Gemm without scaling, which computes `x @ w (+ bias)`.
        x: its input.
        value: the initializer.
        tensor: what it holds; saving a graph gives its values other tensors.
        transposed: whether it is stored as `[N, K]`.
        bias: the Gemm's bias `[N]`.
    """

    node: onnx_ir.Node
    x: onnx_ir.Value
    value: onnx_ir.Value
    tensor: onnx_ir.TensorProtocol
    transposed: bool
    bias: onnx_ir.Value | None

    @property
    def name(self) -> str:
        """The name of the node, by which recipes mean it."""
        assert self.node.name is not None
        return self.node.name

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`."""
        rows, columns = _dimensions(self.value)
        return (columns, rows) if self.transposed else (rows, columns)

    def array(self) -> npt.NDArray[np.float32]:
        """The weight as contiguous fp32 `[K, N]`, not to be written to."""
        stored = read(self.tensor)
        return np.ascontiguousarray(stored.T if self.transposed else stored)


def read(tensor: onnx_ir.TensorProtocol) -> npt.NDArray[np.float32]:
    """A tensor as fp32, not to be written to: the mapped file itself where that is possible.

    The mapping goes with the array.
    """
    array = np.asarray(tensor.numpy(), dtype=np.float32)
    release(tensor)
    return array


def name_nodes(graph: onnx_ir.Graph) -> None:
    """Give every node a name of its own: recipes name nodes."""
    seen: set[str] = set()
    for index, node in enumerate(graph):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}_unnamed"
        seen.add(node.name)


def find_weights(graph: onnx_ir.Graph, *, gemm: bool) -> Iterator[Weight]:
    """The matmuls with a constant two-dimensional operand, in the graph's order.

    Args:
        graph: its nodes must be named.
        gemm: whether a Gemm that neither scales nor transposes its input is one.
    """
    for node in graph:
        if node.domain:
            continue
        if node.op_type == "MatMul" or (gemm and node.op_type == "Gemm" and _plain(node)):
            x, operand = node.inputs[0], node.inputs[1]
            if x is None or operand is None:
                continue
            transposed = node.op_type == "Gemm" and attribute(node, "transB", 0) == 1
            producer = operand.producer()
            if node.op_type == "MatMul" and producer is not None:
                if producer.op_type != "Transpose" or attribute(producer, "perm", (1, 0)) != (1, 0):
                    continue
                operand, transposed = producer.inputs[0], True
                if operand is None:
                    continue
            if not is_table(operand):
                continue
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if bias is not None and (bias.shape is None or len(bias.shape) != 1):
                continue
            assert operand.const_value is not None
            yield Weight(node, x, operand, operand.const_value, transposed, bias)


def find_embeddings(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Node]:
    """The Gather nodes over the rows of a constant table."""
    for node in graph:
        if node.op_type == "Gather" and not node.domain and attribute(node, "axis", 0) == 0:
            table = node.inputs[0]
            if table is not None and is_table(table):
                yield node


def is_table(value: onnx_ir.Value) -> bool:
    """Whether it is a two-dimensional initializer of floats."""
    return (
        value.is_initializer()
        and value.const_value is not None
        and value.dtype in _FLOATS
        and len(value.const_value.shape) == 2
    )


def remove_unused(graph: onnx_ir.Graph) -> None:
    """Drop transposes and initializers that nothing reads any more."""
    for node in list(graph):
        if node.op_type == "Transpose" and not any(
            out.uses() or out.is_graph_output() for out in node.outputs
        ):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def attribute(node: onnx_ir.Node, name: str, default: object) -> object:
    """The value of an attribute, or `default` where the node has none."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return tuple(found.value) if isinstance(found.value, list) else found.value


def initializer(graph: onnx_ir.Graph, tensor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
    """Register `tensor` under its name, once: a second call gives the first one's value."""
    assert tensor.name is not None
    if tensor.name in graph.initializers:
        return graph.initializers[tensor.name]
    value = onnx_ir.Value(
        name=tensor.name,
        type=onnx_ir.TensorType(tensor.dtype),
        shape=tensor.shape,  # type: ignore[arg-type]
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def replace(node: onnx_ir.Node, new: list[onnx_ir.Node]) -> None:
    """Put `new`, whose last node gives the outputs that are used, in the place of `node`."""
    graph = node.graph
    assert isinstance(graph, onnx_ir.Graph)
    outputs = new[-1].outputs
    onnx_ir.convenience.replace_nodes_and_values(
        graph, node, [node], new, node.outputs[: len(outputs)], outputs
    )


def _plain(node: onnx_ir.Node) -> bool:
    return (
        attribute(node, "transA", 0) == 0
        and attribute(node, "alpha", 1.0) == 1.0
        and attribute(node, "beta", 1.0) == 1.0
    )


def _dimensions(value: onnx_ir.Value) -> tuple[int, int]:
    assert value.const_value is not None
    rows, columns = value.const_value.shape.numpy()
    return rows, columns
