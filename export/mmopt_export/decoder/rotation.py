"""Moves the rotation of queries and keys into attention, with tables of every position.

The trace computes sines and cosines of the tokens at hand in every step, and rotates queries and
keys by a node each. Decode steps are short: each node that is not there is time that is not spent.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from onnx_ir import Node, Value
from onnx_ir.convenience import extract
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmopt_export.placement import CPU
from mmopt_export.quantization.weights import initializer
from mmopt_export.runtime import MODEL_NAME, open_session

POSITIONS = "position_ids"
"""The input of the traced graph, int64 `[B, S]`."""

# What the tables of a model may take: this, or more where it is a small part of the weights.
_SMALL = 1 << 20
_PART = 64

_WAVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"Cos": torch.cos, "Sin": torch.sin}


def tabulate_rotations(model: onnx_ir.Model, positions: int) -> None:
    """Make the tables of each RotaryEmbedding constants that it looks positions up in.

    A rotation by something else than the position (images have rows and columns) stays, and so does
    one whose tables would be large beside the weights.

    Args:
        model: with `POSITIONS` as an input.
        positions: how many the model has; there is one more row, for the token behind a full
            cache that a row without a new one writes.
    """
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == POSITIONS)
    nodes = [node for node in graph if node.op_type == "RotaryEmbedding"]
    pairs = dict.fromkeys((node.inputs[2], node.inputs[3]) for node in nodes)
    tensors = [one.const_value for one in graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    for number, pair in enumerate(pairs):
        arrays = _tables(model, ids, pair, positions + 1, max(_SMALL, weights // _PART))
        if arrays is None:
            continue
        names = (f"rotary.{number}.cos", f"rotary.{number}.sin")
        tables = [
            initializer(graph, onnx_ir.tensor(array, name=name))
            for array, name in zip(arrays, names, strict=True)
        ]
        for node in nodes:
            if (node.inputs[2], node.inputs[3]) == pair:
                for index, value in zip((1, 2, 3), (ids, *tables), strict=True):
                    node.replace_input_with(index, value)
    RemoveUnusedNodesPass()(model)


def _tables(
    model: onnx_ir.Model,
    ids: Value,
    pair: tuple[Value | None, Value | None],
    rows: int,
    most: int,
) -> list[np.ndarray] | None:
    """`[rows, width]` each, fp32, by running the part of the graph that makes them of positions.

    Its cosines and sines are PyTorch's. Every sixth of ONNX Runtime's differs in the last bit, and
    where activations are rounded to int8 that grows to as much as the rounding's own error.
    """
    cos, sin = pair
    assert cos is not None
    assert sin is not None
    width = cos.shape[1] if cos.shape is not None else None
    if not isinstance(width, int) or 8 * rows * width > most:
        return None
    try:
        made = extract(model.graph, [ids], [cos, sin])
    except ValueError:  # of other inputs as well
        return None
    names = {node.outputs[0].name for node in made if node.op_type in _WAVES}
    waves = [node for node in model.graph if node.outputs[0].name in names]
    known = {ids: np.arange(rows, dtype=np.int64)[None]}
    angles = list(dict.fromkeys(node.inputs[0] for node in waves if node.inputs[0] is not None))
    known |= _run(model, known, angles)
    for node in waves:
        assert node.inputs[0] is not None
        angle = torch.from_numpy(known[node.inputs[0]])
        known[node.outputs[0]] = _WAVES[node.op_type](angle).numpy()
    known |= _run(model, known, [value for value in (cos, sin) if value not in known])
    return [known[value].reshape(rows, width).astype(np.float32) for value in (cos, sin)]


def _run(
    model: onnx_ir.Model, known: Mapping[Value, np.ndarray], wanted: Sequence[Value]
) -> dict[Value, np.ndarray]:
    """`wanted` values of a graph in which some are known."""
    if not wanted:
        return {}
    part = extract(model.graph, list(known), wanted)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, MODEL_NAME)
        onnx_ir.save(onnx_ir.Model(part, ir_version=model.ir_version), file)
        session = open_session(file, provider=CPU)
    feeds = {str(value.name): array for value, array in known.items()}
    needed = {one.name: feeds[one.name] for one in session.get_inputs()}
    return dict(zip(wanted, session.run(None, needed), strict=True))


def rotate_in_attention(model: onnx_ir.Model) -> None:
    """Let GroupQueryAttention rotate, and take a packed projection as it is."""
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            _take_in_rotation(node)
            _take_in_packed(node)
    RemoveUnusedNodesPass()(model)


def _take_in_rotation(node: Node) -> None:
    rotations = [_made_by(node.inputs[index], "RotaryEmbedding") for index in (0, 1)]
    first, second = rotations
    if first is None or second is None or first.inputs[1:] != second.inputs[1:]:
        return
    cos, sin = first.inputs[2:4]
    if cos is None or cos.const_value is None or not _fits(node, cos):
        return
    layouts = {one.attributes.get_int("interleaved", 0) for one in (first, second)}
    if len(layouts) != 1:
        return
    node.resize_inputs(max(9, len(node.inputs)))
    for index, value in ((0, first.inputs[0]), (1, second.inputs[0]), (7, cos), (8, sin)):
        node.replace_input_with(index, value)
    node.attributes["do_rotary"] = onnx_ir.AttrInt64("do_rotary", 1)
    node.attributes["rotary_interleaved"] = onnx_ir.AttrInt64("rotary_interleaved", layouts.pop())


def _fits(node: Node, cos: Value) -> bool:
    """What the kernels ask of heads and tables."""
    query = node.inputs[0]
    assert query is not None
    hidden = query.shape[2] if query.shape is not None else None
    assert cos.shape is not None
    width = cos.shape[1]
    if not isinstance(hidden, int) or not isinstance(width, int):
        return False
    size = hidden // node.attributes["num_heads"].as_int()
    return size % 16 == 0 and width % 8 == 0 and 2 * width <= size


def _take_in_packed(node: Node) -> None:
    split = _made_by(node.inputs[0], "Split")
    if split is None or list(split.outputs) != list(node.inputs[:3]):
        return
    node.replace_input_with(0, split.inputs[0])
    for index in (1, 2):
        node.replace_input_with(index, None)


def _made_by(value: Value | None, op_type: str) -> Node | None:
    """The node that makes a value, if it is of this type."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == op_type else None
