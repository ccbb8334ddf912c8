"""What stands before the traced decoder in its graph: padding is moved to the end of each row.

The mask's last columns say which of the new tokens are real, the others how many each row already
has in the cache. With the real ones moved to the front, positions, cache rows and the last token
follow by counting, whichever side the padding was on, and buffers have no gaps.
"""

import onnx_ir
from onnx_ir import DataType, Value

from mmopt_export.decoder.part import EMBEDS
from mmopt_export.nodes import NodeBuilder


def add_prelude(model: onnx_ir.Model, tokens: str, trim: bool) -> None:
    """Make the inputs of `LoweredDecoder.forward` from those of the artifact, in place.

    Args:
        model: the traced graph, with the inputs `tokens`, `position_ids`, `seqlens_k`, `total`,
            `last` and the buffers.
        tokens: the name of the new input of tokens, `input_ids` or `inputs_embeds`.
        trim: drop what is padding in every row. The number of columns that stay is read on the
            host; without it, a padded chunk of several tokens after a past is wrong.
    """
    graph = model.graph
    old = {str(value.name): value for value in graph.inputs}
    new = Value(name=tokens, shape=old["tokens"].shape, type=old["tokens"].type)
    mask = Value(
        name="attention_mask",
        shape=onnx_ir.Shape(["batch", "total"]),
        type=onnx_ir.TensorType(DataType.INT64),
    )
    build = NodeBuilder(graph, "prelude")
    made = _make(build, new, mask, embeds=tokens == EMBEDS, trim=trim)
    for name, value in made.items():
        old[name].replace_all_uses_with(value)
    others = [value for value in graph.inputs if value.name not in made]
    del graph.inputs[:]
    graph.inputs.extend([new, mask, *others])
    graph.insert_before(graph[0], build.nodes)


def _make(
    build: NodeBuilder, tokens: Value, mask: Value, *, embeds: bool, trim: bool
) -> dict[str, Value]:
    int64, int32 = DataType.INT64, DataType.INT32
    kind, shape = tokens.dtype, tokens.shape
    assert kind is not None
    assert shape is not None
    zero, one = build.constant(0), build.constant(1)
    # [1], the columns of new tokens and of the mask; [B, S], which new tokens are real.
    sequence = build("Shape", tokens, dtype=int64, rank=1, start=1, end=2)
    total = build("Shape", mask, dtype=int64, rank=1, start=1, end=2)
    start = build("Sub", total, sequence, dtype=int64, rank=1)
    fresh = build("Slice", mask, start, total, one, dtype=int64, rank=2)
    # [B, 1]: new tokens of each row, tokens in its cache, and both; a row without a new token has
    # one that means nothing, behind its own.
    count = build("ReduceSum", fresh, one, dtype=int64, rank=2, keepdims=1)
    known = build("ReduceSum", mask, one, dtype=int64, rank=2, keepdims=1)
    past = build("Sub", known, count, dtype=int64, rank=2)
    filled = build("Max", count, one, dtype=int64, rank=2)
    length = build("Add", past, filled, dtype=int64, rank=2)
    # [B, S]: where each token goes; real ones by their rank, padding by its rank after them.
    ranks = build("CumSum", fresh, build.constant(1, rank=0), dtype=int64, rank=2)
    columns = build(
        "Range",
        build.constant(0, rank=0),
        build("Squeeze", sequence, zero, dtype=int64, rank=0),
        build.constant(1, rank=0),
        dtype=int64,
        rank=1,
    )
    padding = build(
        "Sub", build("Add", count, columns, dtype=int64, rank=2), ranks, dtype=int64, rank=2
    )
    real = build("Cast", fresh, dtype=DataType.BOOL, rank=2, to=int(DataType.BOOL))
    place = build(
        "Where", real, build("Sub", ranks, one, dtype=int64, rank=2), padding, dtype=int64, rank=2
    )
    if embeds:
        spread = build(
            "Expand", columns, build("Shape", place, dtype=int64, rank=1), dtype=int64, rank=2
        )
        order = build("ScatterElements", spread, place, spread, dtype=int64, rank=2, axis=1)
        index = build("Unsqueeze", order, build.constant(2), dtype=int64, rank=3)
        moved = build("GatherND", tokens, index, dtype=kind, rank=3, batch_dims=1)
    else:
        moved = build("ScatterElements", tokens, place, tokens, dtype=int64, rank=2, axis=1)
    if trim:
        most = build("ReduceMax", filled, dtype=int64, rank=0, keepdims=0)
        end = build("Unsqueeze", most, zero, dtype=int64, rank=1)
        moved = build("Slice", moved, zero, end, one, dtype=kind, rank=len(shape))
        columns = build("Slice", columns, zero, end, zero, dtype=int64, rank=1)
        # Not the longest row: where rows differ in their past as well, ONNX Runtime's CPU kernel
        # must see that this is no first prompt, and refuse it.
        total = build(
            "Add",
            most,
            build("ReduceMax", past, dtype=int64, rank=0, keepdims=0),
            dtype=int64,
            rank=0,
        )
    else:
        total = build("Squeeze", total, zero, dtype=int64, rank=0)
    moved.shape = onnx_ir.Shape(["batch", "sequence", *list(shape)[2:]])
    positions = build(
        "Min",
        build("Add", past, columns, dtype=int64, rank=2),
        # Padding takes the last real position, and so does the one token of a row without a new
        # one: a table of positions may end there.
        build("Max", build("Sub", known, one, dtype=int64, rank=2), zero, dtype=int64, rank=2),
        dtype=int64,
        rank=2,
    )
    last = build("Sub", filled, one, dtype=int64, rank=2)
    held = build("Sub", length, one, dtype=int64, rank=2)
    return {
        "tokens": moved,
        "position_ids": positions,
        "seqlens_k": build(
            "Cast",
            build("Squeeze", held, one, dtype=int64, rank=1),
            dtype=int32,
            rank=1,
            to=int(int32),
        ),
        "total": build("Cast", total, dtype=int32, rank=0, to=int(int32)),
        "last": build("Squeeze", last, one, dtype=int64, rank=1),
    }
