"""LoRA layers that read the same tensor become one call, in the graph that Inductor is given.

A model calls q, k and v, or gate and up, one after the other. As one `mmopt::lora_linear_group`
their adapters read x together, and backward sums dX in the products themselves. Only a graph shows
that the layers read the same x, with nothing in between that writes to it.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

import mmopt_kernels.lora_linear.ops  # noqa: F401  registers the ops

_ONE = torch.ops.mmopt.lora_linear
_GROUP = torch.ops.mmopt.lora_linear_group
_OPERATORS = {name: getattr(operator, name) for name in operator.__all__}
_BARRIERS = {
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    operator.setitem,
    # iadd and its like.
    *(f for name, f in _OPERATORS.items() if name[0] == "i" and name[1:] in _OPERATORS),
}


class _Call(NamedTuple):
    """A call of either op without dropout and index, in the order of `lora_linear_group`."""

    node: Node
    x: Node
    weights: list[Any]
    quantized: list[Any]
    a: list[Any]
    b: list[Any]
    biases: list[Any]
    biased: list[bool]
    scale: float
    layouts: list[str]
    impl: str
    outputs: list[list[Node]]
    """The nodes that take each projection's result from it."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What calls must have in common to be one."""
        x = self.x
        # Under autocast each call casts x for itself.
        cast = x.op == "call_method" and x.target == "to" and len(x.args) == 2 and not x.kwargs
        return (*(x.args if cast else (x,)), self.scale, self.impl)


class LoraGroups(CustomGraphPass):
    """The pass, for Inductor's `pre_grad_custom_pass`."""

    def __call__(self, graph: Graph) -> None:
        for calls in list(_groups(graph)):
            _merge(graph, calls)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


LORA_GROUPS = LoraGroups()


def _groups(graph: Graph) -> Iterator[list[_Call]]:
    """Two or more calls of one x between which nothing is written to and autocast stays."""
    open_groups: dict[tuple[Any, ...], list[_Call]] = {}
    known: set[Node] = set()
    for node in graph.nodes:
        if _is_barrier(node):
            yield from (calls for calls in open_groups.values() if len(calls) > 1)
            open_groups.clear()
            continue
        call = _call(node)
        if call is None:
            continue
        # What a call takes besides x must be there before any that it may be joined with.
        if not _reaches(call, known):
            open_groups.setdefault(call.key, []).append(call)
        known.add(node)
    yield from (calls for calls in open_groups.values() if len(calls) > 1)


def _is_barrier(node: Node) -> bool:
    """Whether what is before and after the node must stay so: it writes to something, or might."""
    target, name = node.target, str(getattr(node.target, "__name__", node.target))
    if node.op not in ("call_method", "call_function"):
        return node.op == "call_module"
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        return any(getattr(target, each)._schema.is_mutable for each in names)
    if target in _BARRIERS or isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if target in _OPERATORS.values():  # and_, not_
        return False
    writes = name.endswith("_") and not name.endswith("__")
    return writes or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def _call(node: Node) -> _Call | None:
    """The node as a call that may be joined with others, or None."""
    if node.op != "call_function" or node.kwargs:
        return None
    arguments: Sequence[Any] = node.args
    parts: tuple[list[Any], ...]
    if node.target in (_ONE, _ONE.default):
        x, weight, a_i, b_i, bias, index, seed, adapters, scale, _, impl = arguments
        parts = ([weight], [], [a_i], [b_i], [bias] * (bias is not None), [bias is not None])
        layouts = [""]
    elif node.target in (_GROUP, _GROUP.default):
        x, *lists, index, seed, flags, adapters, scale, _, layouts, impl = arguments
        parts = tuple(map(list, (*lists, flags)))
    else:
        return None
    # Layers draw masks of their own; a group has one. An index is made anew for each call.
    if index is not None or seed is not None or adapters != 1 or not isinstance(x, Node):
        return None
    outputs = _outputs(node, len(layouts))
    if outputs is None:
        return None
    weights, rest, a, b, biases, biased = parts
    return _Call(node, x, weights, rest, a, b, biases, biased, scale, list(layouts), impl, outputs)


def _outputs(node: Node, count: int) -> list[list[Node]] | None:
    """Who takes y of each projection; None where s is taken too, or something else is done."""
    found: list[list[Node]] = [[] for _ in range(count)]
    for user in node.users:
        if user.op != "call_function" or user.target is not operator.getitem:
            return None
        if user.args[1] == 1:
            if user.users:
                return None
        elif node.target in (_ONE, _ONE.default):
            found[0].append(user)
        else:
            for taken in user.users:
                if taken.target is not operator.getitem:
                    return None
                found[taken.args[1]].append(taken)  # type: ignore[index]
    return found


def _reaches(call: _Call, known: set[Node]) -> bool:
    """Whether anything that the call takes besides x is computed from one of the known calls."""
    rest = (call.weights, call.quantized, call.a, call.b, call.biases)
    todo, seen = [node for part in rest for node in part if isinstance(node, Node)], set()
    while todo:
        node = todo.pop()
        if node in known:
            return True
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _merge(graph: Graph, calls: list[_Call]) -> None:
    """Put one call in place of several.

    It stands where the last one stood; Inductor then moves what takes an earlier result behind it.
    """
    last = calls[-1].node

    def joined(name: str) -> list[Any]:
        return [value for call in calls for value in getattr(call, name)]

    with graph.inserting_before(last):
        group = graph.call_function(
            _GROUP.default,
            (
                calls[0].x,
                *(joined(name) for name in ("weights", "quantized", "a", "b", "biases")),
                None,
                None,
                joined("biased"),
                1,
                calls[0].scale,
                0.0,
                joined("layouts"),
                calls[0].impl,
            ),
        )
        # Who wrote the layers, for messages about the graph.
        group.meta = {k: v for k, v in last.meta.items() if k in ("stack_trace", "nn_module_stack")}
        results = graph.call_function(operator.getitem, (group, 0))
        for i, takers in enumerate(joined("outputs")):
            y = graph.call_function(operator.getitem, (results, i))
            for taker in takers:
                y.meta = dict(taker.meta)
                taker.replace_all_uses_with(y)
    for call in calls:
        for user in [*call.node.users]:
            for taken in [*user.users]:
                graph.erase_node(taken)
            graph.erase_node(user)
        graph.erase_node(call.node)
