"""Keeps the work of a graph for CUDA on the GPU, without copies: what ONNX Runtime would not.

It leaves a node on the CPU that its provider has no kernel for, and one whose inputs all lie there
(`placement.py` says which). Where a tensor then meets one of those results, it copies.
"""

import numpy as np
import onnx_ir

from mmopt_export.nodes import NodeBuilder
from mmopt_export.placement import CUDA, PROMISES
from mmopt_export.quantization.weights import replace

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
# As small as ONNX Runtime wants a constant to be, for a node on the host.
_SMALL = PROMISES[CUDA].most_values
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
    source = node.inputs[0]
    assert source is not None
    assert source.shape is not None
    assert source.dtype is not None
    rank = len(source.shape)
    axis = node.attributes.get_int("axis", 0) % rank
    build = NodeBuilder(graph, f"{node.outputs[0].name}.device")
    axes = build.constant(axis)
    most = build("ReduceMax", source, axes, dtype=source.dtype, keepdims=1)
    found = build("Equal", source, most, dtype=onnx_ir.DataType.BOOL)
    length = build("Squeeze", build("Shape", source, start=axis, end=axis + 1))
    place = build("Range", build.constant(0, rank=0), length, build.constant(1, rank=0))
    if axis < rank - 1:
        place = build("Reshape", place, build.constant(-1, *[1] * (rank - 1 - axis)))
    nowhere = build.constant(np.iinfo(np.int64).max, rank=0)
    first = build("Where", found, place, nowhere)
    build("ReduceMin", first, axes, keepdims=node.attributes.get_int("keepdims", 1))
    replace(node, build.nodes)


def _write_sizes(graph: onnx_ir.Graph) -> None:
    host: set[onnx_ir.Value] = set()
    written: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in list(graph):
        if node.op_type in ("Shape", "Size") or _runs_on_host(node, host):
            host.update(node.outputs)
            continue
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
    build = NodeBuilder(graph, f"{value.name}.device")
    rank = len(value.shape)
    scalar = build("Squeeze", value, dtype=value.dtype) if rank else value
    step = build.constant(1, rank=0, dtype=value.dtype)
    limit = build("Add", scalar, step, dtype=value.dtype)
    written = build("Range", scalar, limit, step, dtype=value.dtype)
    if rank != 1:
        written = build("Reshape", written, build.constant(*[1] * rank), dtype=value.dtype)
    written.shape = value.shape
    graph.insert_after(producer, build.nodes)
    return written
