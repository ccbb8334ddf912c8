"""Rewrites of a traced decoder: what the trace repeats, and what ONNX Runtime has one op for."""

from collections.abc import Iterator

import numpy as np
import onnx_ir
from onnx_ir import Node, Value
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmopt_export.quantization.weights import initializer

Dims = list[int | onnx_ir.SymbolicDim]


def transpose_weights(model: onnx_ir.Model) -> None:
    """Store a Linear's weight as MatMul reads it: `[in, out]`, made when the file is written.

    A weight that something else uses too (an embedding tied to the head) stays as it is.
    """
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in graph.initializers or len(source.uses()) != 1:
            continue
        if list(node.attributes["perm"].as_ints()) != [1, 0] or source.is_graph_output():
            continue
        if any(use.node.op_type != "MatMul" for use in node.outputs[0].uses()):
            continue
        weight = source.const_value
        assert weight is not None
        turned = _replace_weight(graph, source, _transposed(weight))
        node.outputs[0].replace_all_uses_with(turned)
        graph.remove(node, safe=True)


def _transposed(weight: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.ascontiguousarray(weight.numpy().T), name=weight.name),
        dtype=weight.dtype,
        shape=onnx_ir.Shape([int(one) for one in weight.shape.numpy()[::-1]]),
        name=weight.name,
    )


def _input(node: Node, index: int) -> Value:
    """An input that the operator cannot do without."""
    value = node.inputs[index]
    assert value is not None
    return value


def _dims(value: Value) -> Dims:
    """Its dimensions, or none where they are unknown."""
    return [] if value.shape is None else list(value.shape)


def _size(value: Value, axis: int) -> int:
    """A dimension that is fixed."""
    dim = _dims(value)[axis]
    assert isinstance(dim, int)
    return dim


def drop_reshapes(model: onnx_ir.Model) -> None:
    """Drop Reshapes of Reshapes; both where the last restores the first's shape."""
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        source = _input(node, 0)
        while (producer := source.producer()) is not None and producer.op_type == "Reshape":
            source = _input(producer, 0)
        output = node.outputs[0]
        if _same_shape(source, output) and not output.is_graph_output():
            output.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
        elif source is not node.inputs[0]:
            node.replace_input_with(0, source)


def _same_shape(a: Value, b: Value) -> bool:
    return a.shape is not None and b.shape is not None and _same_dims(_dims(a), _dims(b))


def _same_dims(a: Dims, b: Dims) -> bool:
    """Whether they are equal for every input: unknown ones are not."""
    return len(a) == len(b) and all(
        x == y and (isinstance(x, int) or x.value is not None) for x, y in zip(a, b, strict=True)
    )


def fuse_skip_norms(model: onnx_ir.Model) -> None:
    """One op for a residual's sum and the RMSNorm of it."""
    for scaled, total, epsilon, gamma in list(_norms(model.graph)):
        addition = total.producer()
        if addition is None or addition.op_type != "Add":
            continue
        if not all(_same_shape(one, total) for one in addition.inputs if one is not None):
            continue
        made = gamma.producer()
        if made is not None:
            # `1 + weight`, which stands behind the sum: it moves with the norm.
            if any(one is not None and one.producer() is not None for one in made.inputs):
                continue
            model.graph.remove(made)
            model.graph.insert_before(addition, made)
        old = scaled.outputs[0]
        node = onnx_ir.Node(
            "com.microsoft",
            "SkipSimplifiedLayerNormalization",
            [*addition.inputs, gamma],
            {"epsilon": onnx_ir.AttrFloat32("epsilon", epsilon)},
            num_outputs=4,
            version=1,
        )
        normed, mean, deviation, summed = node.outputs
        mean.name, deviation.name = "", ""
        for new, before in ((normed, old), (summed, total)):
            new.name, new.shape, new.type = before.name, before.shape, before.type
        model.graph.insert_before(addition, node)
        old.replace_all_uses_with(normed)
        total.replace_all_uses_with(summed)


def _norms(graph: onnx_ir.Graph) -> Iterator[tuple[Node, Value, float, Value]]:
    """The last node, input, epsilon and scale of each x / sqrt(mean(x^2) + eps) * scale."""
    for scaled in graph:
        if scaled.op_type != "Mul":
            continue
        pair = (_input(scaled, 0), _input(scaled, 1))
        for divided, gamma in (pair, pair[::-1]):
            division = divided.producer()
            if division is None or division.op_type != "Div" or len(_dims(gamma)) != 1:
                continue
            source, root = _input(division, 0), _input(division, 1)
            chain: list[Node] = []
            value: Value | None = root
            for op in ("Sqrt", "Add", "ReduceMean", "Pow"):
                producer = value.producer() if value is not None else None
                if producer is None or producer.op_type != op:
                    break
                chain.append(producer)
                value = producer.inputs[0]
            if len(chain) != 4 or value is not source:
                continue
            epsilon, exponent = _scalar(chain[1].inputs[1]), _scalar(chain[3].inputs[1])
            if epsilon is not None and exponent == 2.0:
                yield scaled, source, epsilon, gamma


def _scalar(value: Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def split_gemms(model: onnx_ir.Model) -> None:
    """Write Gemm as MatMul (and Add), which quantizes alike everywhere and takes three dimensions.

    A Gemm that reads an embedding's own weight, transposed, stays: MatMul would need a copy of it.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Gemm" or not _plain_gemm(node):
            continue
        x, weight = _input(node, 0), _input(node, 1)
        if weight.const_value is None or weight.name not in graph.initializers:
            continue
        if node.attributes.get_int("transB", 0):
            if len(weight.uses()) != 1:
                continue
            weight = _replace_weight(graph, weight, _transposed(weight.const_value))
        bias = node.inputs[2] if len(node.inputs) == 3 else None
        output = node.outputs[0]
        x, result = _around_reshapes(x, output)
        nodes = [onnx_ir.node("MatMul", [x, weight], name=node.name)]
        if bias is not None:
            name = f"{node.name}_bias" if node.name else None
            nodes.append(onnx_ir.node("Add", [nodes[0].outputs[0], bias], name=name))
        for index, made in enumerate(nodes):
            made.outputs[0].name = f"{output.name}.{index}"
            made.outputs[0].shape, made.outputs[0].type = result.shape, output.type
        graph.insert_before(node, nodes)
        last = nodes[-1].outputs[0]
        if result.is_graph_output():
            graph.outputs[graph.outputs.index(result)] = last
        last.name, result.name = result.name, f"{result.name}.gemm"
        result.replace_all_uses_with(last)
    RemoveUnusedNodesPass()(model)


def _plain_gemm(node: Node) -> bool:
    attributes = node.attributes
    return attributes.get_float("alpha", 1.0) == attributes.get_float(
        "beta", 1.0
    ) == 1.0 and not attributes.get_int("transA", 0)


def _around_reshapes(x: Value, output: Value) -> tuple[Value, Value]:
    """The values before and after Reshapes that only make a Gemm's operands two-dimensional."""
    before, after = x.producer(), [use.node for use in output.uses()]
    if before is None or before.op_type != "Reshape" or len(after) != 1 or output.is_graph_output():
        return x, output
    wide, result = _input(before, 0), after[0].outputs[0]
    if after[0].op_type != "Reshape" or not _dims(wide) or not _dims(result):
        return x, output
    same = _same_dims(_dims(wide)[:-1], _dims(result)[:-1])
    kept = _dims(wide)[-1:] == _dims(x)[-1:]
    return (wide, result) if same and kept else (x, output)


def _replace_weight(graph: onnx_ir.Graph, old: Value, tensor: onnx_ir.TensorProtocol) -> Value:
    graph.initializers.pop(str(old.name))
    shape = onnx_ir.Shape([int(one) for one in tensor.shape.numpy()])
    new = Value(name=old.name, shape=shape, type=old.type, const_value=tensor)
    graph.initializers[str(new.name)] = new
    old.replace_all_uses_with(new)
    # Rewriters keep the last graph that they saw, and with it what was taken out of it.
    old.const_value = None
    return new


def sink_transposes(model: onnx_ir.Model) -> None:
    """Norm heads before they are transposed, and drop a Transpose that the next one undoes."""
    for scaled, source, _, _ in list(_norms(model.graph)):
        transpose = source.producer()
        if transpose is None or transpose.op_type != "Transpose":
            continue
        perm = list(transpose.attributes["perm"].as_ints())
        if perm[-1] != len(perm) - 1 or len(source.uses()) != 2:
            continue
        untransposed = transpose.inputs[0]
        assert untransposed is not None
        chain = _norm_nodes(scaled)
        source.replace_all_uses_with(untransposed)
        inverse = [perm.index(axis) for axis in range(len(perm))]
        for one in chain:
            value = one.outputs[0]
            if value.shape is not None:
                value.shape = onnx_ir.Shape([value.shape[axis] for axis in inverse])
        output = scaled.outputs[0]
        uses = list(output.uses())
        node = onnx_ir.node("Transpose", [output], {"perm": perm})
        moved = node.outputs[0]
        moved.name, moved.type = f"{output.name}.transposed", output.type
        moved.shape = onnx_ir.Shape([_dims(output)[axis] for axis in perm])
        for use in uses:
            use.node.replace_input_with(use.idx, moved)
        model.graph.insert_after(scaled, node)
    for node in list(model.graph):
        before = _input(node, 0).producer() if node.op_type == "Transpose" else None
        if before is None or before.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        first = list(before.attributes["perm"].as_ints())
        second = list(node.attributes["perm"].as_ints())
        if [first[axis] for axis in second] == list(range(len(first))):
            original = before.inputs[0]
            assert original is not None
            node.outputs[0].replace_all_uses_with(original)
    RemoveUnusedNodesPass()(model)


def _norm_nodes(scaled: Node) -> list[Node]:
    """The nodes of a norm that `_norms` found, the last one included."""
    producers = [_input(scaled, index).producer() for index in (0, 1)]
    division = next(one for one in producers if one is not None and one.op_type == "Div")
    nodes = [scaled, division]
    producer = _input(division, 1).producer()
    while producer is not None:
        nodes.append(producer)
        producer = None if producer.op_type == "Pow" else _input(producer, 0).producer()
    return nodes


def pack_projections(model: onnx_ir.Model) -> None:
    """One MatMul for those of one input: queries, keys and values, or gate and up.

    Fewer and larger ones: a decode step of a 124M Llama, one thread of an AMD EPYC with AVX-512,
    onnxruntime 1.32, took 6.29 ms and packed 5.88 ms in int4 (median of 240, in turns); in fp32 it
    was 4% faster, and a prefill as fast. The packed weight is made when the file is written.
    """
    graph = model.graph
    groups: dict[Value, list[Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and len(_dims(_input(node, 0))) == 3:
            weight = _input(node, 1)
            stored = weight.name in graph.initializers and len(weight.uses()) == 1
            if stored and len(_dims(weight)) == 2:
                groups.setdefault(_input(node, 0), []).append(node)
    for x, nodes in groups.items():
        weights = [_input(node, 1) for node in nodes]
        if len(nodes) > 1 and len({one.dtype for one in weights}) == 1:
            _pack(graph, x, nodes, weights)


def _pack(graph: onnx_ir.Graph, x: Value, nodes: list[Node], weights: list[Value]) -> None:
    sizes = [_size(one, 1) for one in weights]
    packed = _packed([one.const_value for one in weights if one.const_value is not None])
    weight = initializer(graph, packed)
    lengths = initializer(
        graph,
        onnx_ir.tensor(
            np.asarray(sizes, dtype=np.int64), name=f"split.{'.'.join(map(str, sizes))}"
        ),
    )
    product = onnx_ir.node("MatMul", [x, weight])
    split = onnx_ir.node(
        "Split", [product.outputs[0], lengths], {"axis": -1}, num_outputs=len(nodes)
    )
    together, first = product.outputs[0], nodes[0].outputs[0]
    together.name, together.type = f"{first.name}.packed", first.type
    together.shape = onnx_ir.Shape([*_dims(x)[:2], sum(sizes)])
    graph.insert_before(nodes[0], [product, split])
    for output, node, old in zip(split.outputs, nodes, weights, strict=True):
        before = node.outputs[0]
        output.name, output.type, output.shape = before.name, before.type, before.shape
        before.name = f"{before.name}.alone"
        before.replace_all_uses_with(output)
        graph.remove(node, safe=True)
        graph.initializers.pop(str(old.name))
        old.const_value = None


def _packed(weights: list[onnx_ir.TensorProtocol]) -> onnx_ir.TensorProtocol:
    """Weights side by side, named as their common module with all of their own names."""
    names = [str(one.name).split(".") for one in weights]
    same = 0
    while len({tuple(name[: same + 1]) for name in names}) == 1 and same < len(names[0]) - 1:
        same += 1
    stems = "+".join(name[same] for name in names)
    shape = [int(weights[0].shape.numpy()[0]), sum(int(one.shape.numpy()[1]) for one in weights)]
    name = ".".join([*names[0][:same], stems, *names[0][same + 1 :]])
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.concatenate([one.numpy() for one in weights], 1), name=name),
        dtype=weights[0].dtype,
        shape=onnx_ir.Shape(shape),
        name=name,
    )


# Operators that make each token's values of that token's alone, so long as they leave the axes of
# the batch and of the tokens as they are.
_TOKENWISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Cast", "Erf", "Gelu"),
    *("Sigmoid", "Tanh", "Relu", "MatMul", "LayerNormalization", "ReduceMean", "Split"),
    *("SkipSimplifiedLayerNormalization",),
}


def hoist_last_token(model: onnx_ir.Model) -> None:
    """Choose each row's last token before the last layer's projections, not before the head.

    Keys and values are needed of every token, what follows the last attention only of one: in a
    prefill the last layer's output projection and MLP run on one position per row.
    """
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    choice = next((node for node in graph if _is_choice(node)), None)
    if choice is None:
        return
    hidden, index = _input(choice, 0), _input(_expand_of(choice), 0)
    narrowed = _only_for(graph, choice)
    inputs = {
        value
        for node in narrowed
        for value in node.inputs
        if value is not None and value.producer() not in narrowed and _has_tokens(value)
    }
    if hidden.producer() not in narrowed:
        return
    # Of what all rows share, `[1, sequence, size]`, each would need its own choice.
    if not all(
        _can_choose(one) and _same_dims(_dims(one)[:1], _dims(hidden)[:1]) for one in inputs
    ):
        return
    for node in narrowed:
        for value in node.outputs:
            if value.shape is not None:
                dims = [1 if str(dim) == "sequence" else dim for dim in value.shape]
                value.shape = onnx_ir.Shape(dims)
    first = next(node for node in graph if node in narrowed)
    # The index is made before the head, and is needed before the last layer.
    reshape = index.producer()
    assert reshape is not None
    graph.remove(reshape)
    graph.insert_before(first, reshape)
    for number, value in enumerate(sorted(inputs, key=lambda one: str(one.name))):
        size = _size(value, 2)
        shape = onnx_ir.tensor(np.asarray([1, 1, size], dtype=np.int64), name=f"last.{size}")
        expand = onnx_ir.node("Expand", [index, initializer(graph, shape)])
        chosen = onnx_ir.node("GatherElements", [value, expand.outputs[0]], {"axis": 1})
        for node, kind in ((expand, index.type), (chosen, value.type)):
            node.outputs[0].name = f"last.{node.op_type}_{number}"
            node.outputs[0].type = kind
            node.outputs[0].shape = onnx_ir.Shape([_dims(value)[0], 1, size])
        uses = [use for use in value.uses() if use.node in narrowed]
        users = {use.node for use in uses}
        # Not before `first`: the value may be made behind it, as that of an adapter is.
        graph.insert_before(next(node for node in graph if node in users), [expand, chosen])
        for use in uses:
            use.node.replace_input_with(use.idx, chosen.outputs[0])
    choice.outputs[0].replace_all_uses_with(hidden)
    RemoveUnusedNodesPass()(model)


def _is_choice(node: Node) -> bool:
    """Whether it is the gather that `lowering` puts before the head."""
    if node.op_type != "GatherElements" or node.attributes.get_int("axis", 0) != 1:
        return False
    expand = _input(node, 1).producer()
    return expand is not None and expand.op_type == "Expand"


def _expand_of(choice: Node) -> Node:
    expand = _input(choice, 1).producer()
    assert expand is not None
    return expand


def _only_for(graph: onnx_ir.Graph, choice: Node) -> set[Node]:
    """Tokenwise nodes whose every output ends in `choice` and nowhere else."""
    found: set[Node] = set()
    for node in reversed(list(graph)):
        if node.op_type not in _TOKENWISE or not _keeps_tokens(node):
            continue
        users = [use.node for value in node.outputs for use in value.uses()]
        outside = any(value.is_graph_output() for value in node.outputs)
        if users and not outside and all(one is choice or one in found for one in users):
            found.add(node)
    return found


def _keeps_tokens(node: Node) -> bool:
    """Whether the node works along the last axis, if along any, on `[batch, sequence, size]`."""
    shapes = [_dims(value) for value in node.outputs if value.name]
    if not all(len(dims) == 3 and str(dims[1]) == "sequence" for dims in shapes):
        return False
    if node.op_type == "MatMul":
        return _input(node, 1).const_value is not None and len(_dims(_input(node, 0))) == 3
    if node.op_type in ("Split", "LayerNormalization"):
        default = 0 if node.op_type == "Split" else -1
        return node.attributes.get_int("axis", default) in (-1, 2)
    if node.op_type == "ReduceMean":
        axes = _input(node, 1).const_value
        return axes is not None and axes.numpy().tolist() in ([-1], [2])
    return True


def _has_tokens(value: Value) -> bool:
    return value.const_value is None and any(str(dim) == "sequence" for dim in _dims(value))


def _can_choose(value: Value) -> bool:
    dims = _dims(value)
    return len(dims) == 3 and str(dims[1]) == "sequence" and isinstance(dims[2], int)
