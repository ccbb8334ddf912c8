"""Keeps the work of a graph for CUDA on the GPU, without copies: what ONNX Runtime would not.

It leaves a node on the CPU that its provider has no kernel for, and one whose inputs all lie there
(`placement.py` says which). Where a tensor then meets one of those results, it copies.
"""

from typing import Any

import numpy as np
import onnx_ir

# Scalars on the host that such an input takes are copied to the GPU. Any other input takes them
# where they are, as the limits of a Range, or belongs to a node that runs on the host too.
_READ_ON_DEVICE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Max", "Min", "And", "Or"), (0, 1)),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), (0, 1)),
    "Where": (0, 1, 2),
    "Clip": (0, 1, 2),
    "Expand": (0,),
}
# CUDA's kernels read these inputs from the host, and ONNX Runtime keeps such nodes on the device.
_READ_ON_HOST = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
}
# As small as ONNX Runtime wants a constant to be, for a node on the host (see `PROMISES`).
_SMALL = 100
_INTEGERS = (onnx_ir.DataType.INT32, onnx_ir.DataType.INT64)


def keep_on_device(graph: onnx_ir.Model) -> None:
    """Replace what CUDA has no kernel for, and copies of sizes by kernels writing them, in place.

    - ArgMax of integers, which CLIP finds the end of a text with, has no kernel on CUDA.
    - A size that is computed on the host and compared with tensors is copied there. Range reads its
      limits from the host and writes to the device: `Range(size, size + 1, 1)` is that size.
    """
    for node in list(graph.graph):
        if node.op_type == "ArgMax" and node.domain == "" and _of_integers(node):
            _spell_out_argmax(graph.graph, node)
    _write_sizes(graph.graph)


def _of_integers(node: onnx_ir.Node) -> bool:
    source = node.inputs[0]
    return (
        source is not None
        and source.dtype in _INTEGERS
        and source.shape is not None
        and not node.attributes.get_int("select_last_index", 0)
    )


def _spell_out_argmax(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """The first index of a maximum: the least of those where the input is as large as it is.

    ArgMax of floats has a kernel, but nothing says which of several maxima it takes.
    """
    source, old = node.inputs[0], node.outputs[0]
    assert source is not None
    assert source.shape is not None
    assert source.dtype is not None
    rank = len(source.shape)
    axis = node.attributes.get_int("axis", 0) % rank
    new = _Builder(graph, node)
    axes = new.constant([axis], "axes")
    most = new("ReduceMax", source, axes, dtype=source.dtype, keepdims=1)
    found = new("Equal", source, most, dtype=onnx_ir.DataType.BOOL)
    shape = new("Shape", source, start=axis, end=axis + 1)
    length = new("Squeeze", shape)
    place = new("Range", new.constant(0, "first"), length, new.constant(1, "step"))
    if axis < rank - 1:
        place = new("Reshape", place, new.constant([-1, *[1] * (rank - 1 - axis)], "along"))
    nowhere = new.constant(np.iinfo(np.int64).max, "nowhere")
    first = new("Where", found, place, nowhere)
    index = new("ReduceMin", first, axes, keepdims=node.attributes.get_int("keepdims", 1))
    index.name, index.shape = old.name, old.shape
    old.replace_all_uses_with(index, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _write_sizes(graph: onnx_ir.Graph) -> None:
    host: set[onnx_ir.Value] = set()
    written: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in list(graph):
        if node.op_type in ("Shape", "Size") or _runs_on_host(node, host):
            host.update(node.outputs)
        else:
            for index in _READ_ON_DEVICE.get(node.op_type, ()):
                value = node.inputs[index] if index < len(node.inputs) else None
                if value is None or value not in host or not _is_one_integer(value):
                    continue
                if value not in written:
                    written[value] = _on_device(graph, value)
                node.replace_input_with(index, written[value])


def _runs_on_host(node: onnx_ir.Node, host: set[onnx_ir.Value]) -> bool:
    """As ONNX Runtime decides: all inputs lie there, and no kernel would read them from there."""
    from_host = _READ_ON_HOST.get(node.op_type, ())
    computed = False
    for index, value in enumerate(node.inputs):
        if value is None or (value.const_value is not None and value.const_value.size <= _SMALL):
            continue
        if value not in host or index in from_host:
            return False
        computed = True
    return computed


def _is_one_integer(value: onnx_ir.Value) -> bool:
    return (
        value.dtype in _INTEGERS
        and value.shape is not None
        and all(dim == 1 for dim in value.shape)
    )


def _on_device(graph: onnx_ir.Graph, value: onnx_ir.Value) -> onnx_ir.Value:
    """The integer that a host's tensor of one element holds, written by a kernel."""
    producer = value.producer()
    assert producer is not None
    assert value.shape is not None
    assert value.dtype is not None
    new = _Builder(graph, producer, after=True)
    kind = value.dtype.numpy()
    scalar = new("Squeeze", value, dtype=value.dtype) if len(value.shape) else value
    step = new.constant(1, "step", kind)
    limit = new("Add", scalar, step, dtype=value.dtype)
    written = new("Range", scalar, limit, step, dtype=value.dtype)
    if len(value.shape) != 1:
        shape = new.constant([1] * len(value.shape), "shape")
        written = new("Reshape", written, shape, dtype=value.dtype)
    written.shape = value.shape
    return written


class _Builder:
    """Adds nodes before a node or after it, and constants, named after the node's output."""

    def __init__(self, graph: onnx_ir.Graph, beside: onnx_ir.Node, *, after: bool = False) -> None:
        self._graph = graph
        self._place = beside
        self._after = after
        self._prefix = str(beside.outputs[0].name)

    def __call__(
        self,
        op: str,
        *inputs: onnx_ir.Value,
        dtype: onnx_ir.DataType = onnx_ir.DataType.INT64,
        **attributes: int,
    ) -> onnx_ir.Value:
        node = onnx_ir.node(op, inputs, attributes=attributes)
        node.name = f"{self._prefix}.device.{op}"
        output = node.outputs[0]
        output.name, output.type = node.name, onnx_ir.TensorType(dtype)
        if self._after:
            self._graph.insert_after(self._place, node)
            self._place = node
        else:
            self._graph.insert_before(self._place, node)
        return output

    def constant(self, values: Any, name: str, kind: Any = np.int64) -> onnx_ir.Value:
        tensor = onnx_ir.tensor(np.asarray(values, kind), name=f"{self._prefix}.device.{name}")
        value = onnx_ir.Value(
            name=tensor.name,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.initializers[str(value.name)] = value
        return value
