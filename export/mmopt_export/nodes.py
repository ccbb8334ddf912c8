"""Nodes and integer constants for graphs that are changed by hand."""

import numpy as np
import onnx_ir
from onnx_ir import DataType, Node, Value

from mmopt_export.quantization.weights import initializer


class NodeBuilder:
    """Collects new nodes, which whoever asked for them puts into the graph.

    Args:
        graph: takes the constants, at once.
        prefix: of all names.
    """

    def __init__(self, graph: onnx_ir.Graph, prefix: str) -> None:
        self.nodes: list[Node] = []
        self._graph = graph
        self._prefix = prefix

    def __call__(
        self,
        op: str,
        *inputs: Value | None,
        dtype: DataType = DataType.INT64,
        rank: int | None = None,
        **attrs: int,
    ) -> Value:
        """The output of a new node; of its shape at most the number of dimensions is known."""
        node = onnx_ir.node(op, inputs, attributes=attrs or None)
        output = node.outputs[0]
        output.name = f"{self._prefix}.{op}_{len(self.nodes)}"
        output.dtype = dtype
        if rank is not None:
            output.shape = onnx_ir.Shape([None] * rank)
        self.nodes.append(node)
        return output

    def constant(self, *values: int, rank: int = 1, dtype: DataType = DataType.INT64) -> Value:
        """`[len(values)]`, or a scalar with `rank=0`."""
        array = np.asarray(values if rank else values[0], dtype=dtype.numpy())
        kind = "" if dtype == DataType.INT64 else f"_{array.dtype}"
        name = f"{self._prefix}.{'_'.join(map(str, values))}_{rank}{kind}"
        return initializer(self._graph, onnx_ir.tensor(array, name=name))
