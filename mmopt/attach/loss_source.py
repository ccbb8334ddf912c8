"""A causal language model's forward, without the logits.

Every architecture has a forward of its own, most with the same end: the output layer, perhaps a
soft-capping of the logits, `self.loss_function`. That end is found in the source of the class. The
forward is compiled again with the end replaced and the rest as it is, so that nothing has to be
switched around a call: what runs is one plain function.
"""

import ast
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from mmopt.attach.source import CannotRewriteError, compiled_again, definition_of, placed

_LOSS = "mmopt_loss"

# What the loss, which takes logits in float32, does itself or does not see.
_HARMLESS = ("", ".float()", ".contiguous()")
_TANH = ("torch.tanh", "nn.functional.tanh", "F.tanh")


def without_logits(
    forward: Callable[..., Any], model: Any, head: str, loss: Callable[..., Any]
) -> tuple[Callable[[], Callable[..., Any]], bool]:
    """What compiles `forward` of the model's class so that its loss comes from hidden states.

    `self.<head>(x)` became `x`, and `self.loss_function(logits, labels, ...)` became
    `loss(self.<head>, softcap, x, labels, ...)`. The logits in what it returns are None. To be
    called with `labels`, and to return no tuple.

    Returns:
        What makes the function, which can be pickled, and whether the function scales the hidden
        states in the logits' place, which for an output layer with a bias is not the same.

    Raises:
        CannotRewriteError: the logits have another use, or the source is not at hand; from what is
            returned, another decorator than those in the source is around `forward`.
    """
    definition = definition_of(forward, "forward")
    scaled = _replace_end(definition, model, head)
    return partial(compiled_again, definition, forward, "forward", {_LOSS: loss}), scaled


# --- the end of a forward -------------------------------------------------------------------------


def _replace_end(definition: ast.FunctionDef, model: Any, head: str) -> bool:
    """Replace output layer and loss in place; whether the logits are scaled in between."""
    at_head, call = _only_call(definition, f"self.{head}")
    at_loss, loss = _only_call(definition, "self.loss_function")
    body = definition.body

    assign = body[at_head]
    value = assign.value if isinstance(assign, ast.Assign) else None
    if (
        not isinstance(assign, ast.Assign)
        or value is None
        or len(assign.targets) != 1
        or not isinstance(assign.targets[0], ast.Name)
        or ast.unparse(value) not in [ast.unparse(call) + after for after in _HARMLESS]
        or len(call.args) != 1
        or call.keywords
        or isinstance(call.args[0], ast.Starred)
        or at_loss <= at_head
    ):
        raise CannotRewriteError(f"its forward calls {head} in a way not known: {_shown(assign)}")
    logits = assign.targets[0].id
    assign.value = call.args[0]

    kept, cap, scaled = _between(body[at_head + 1 : at_loss], logits, model)
    _replace_loss(body[at_loss], loss, logits, head, cap)
    _check_after(body[at_loss + 1 :], logits)
    gone = placed(ast.parse(f"{logits} = None").body[0], body[at_loss])
    body[at_head + 1 : at_loss + 1] = [*kept, body[at_loss], gone]
    return scaled


def _only_call(definition: ast.FunctionDef, name: str) -> tuple[int, ast.Call]:
    """The one call of `name`, and the index of the statement that it is in."""
    found = [
        (index, node)
        for index, statement in enumerate(definition.body)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    ]
    if len(found) != 1:
        raise CannotRewriteError(f"its forward calls {name} {len(found)} times, expected once")
    return found[0]


def _between(
    statements: Sequence[ast.stmt], logits: str, model: Any
) -> tuple[list[ast.stmt], str | None, bool]:
    """What stays of the statements that lead from logits to loss, their softcap, any scaling."""
    kept, cap, scaled = [], None, False
    for statement in statements:
        if not _touches(statement, logits):
            kept.append(statement)
        elif cap is None and (found := _softcap(statement, logits)):
            cap, named = found
            kept += named
        elif cap is None and _is_scaling(statement, logits, model):
            # A number times a linear layer without bias: the layer of the number times its input.
            scaled = True
            kept.append(statement)
        else:
            raise CannotRewriteError(
                f"its forward changes or reads the logits before the loss: {_shown(statement)}"
            )
    return kept, cap, scaled


def _softcap(statement: ast.stmt, logits: str) -> tuple[str, list[ast.stmt]] | None:
    """The c of `logits = c * tanh(logits / c)`, and the statement that names it, if one does."""
    named: list[ast.stmt] = []
    if isinstance(statement, ast.If) and not statement.orelse:
        test = statement.test
        if isinstance(test, ast.Compare) and isinstance(test.left, ast.NamedExpr):
            name = test.left.target
            named = [placed(ast.Assign([name], test.left.value), statement)]
            test.left = placed(ast.Name(name.id, ast.Load()), statement)
        condition = ast.unparse(test)
        cap = condition.removesuffix(" is not None")
        lines = [ast.unparse(line) for line in statement.body]
        known = (
            [f"{logits} = {logits}{cast} / {cap}", f"{logits} = {tanh}({logits})",
             f"{logits} = {logits} * {cap}"]
            for tanh in _TANH
            for cast in ("", ".float()")
        )  # fmt: skip
        return (cap, named) if cap != condition and lines in known else None
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp):
        cap = ast.unparse(statement.value.right)
        known_line = (f"{logits} = {tanh}({logits} / {cap}) * {cap}" for tanh in _TANH)
        return (cap, named) if ast.unparse(statement) in known_line else None
    return None


def _is_scaling(statement: ast.stmt, logits: str, model: Any) -> bool:
    """Whether the logits are multiplied with, or divided by, a number that the model holds."""
    if isinstance(statement, ast.If) and not statement.orelse and len(statement.body) == 1:
        line = statement.body[0]
        condition = ast.unparse(statement.test)
    else:
        line, condition = statement, None
    if not isinstance(line, ast.Assign) or not isinstance(line.value, ast.BinOp):
        return False
    number = ast.unparse(line.value.right)
    if ast.unparse(line) not in [f"{logits} = {logits} {sign} {number}" for sign in "*/"]:
        return False
    path = number.removeprefix("self.")
    if path == number or not all(part.isidentifier() for part in path.split(".")):
        return False
    try:
        held = attrgetter(path)(model)
    except AttributeError:
        return False
    if condition is None:
        return isinstance(held, (int, float))
    return condition == f"{number} is not None" and (held is None or isinstance(held, (int, float)))


def _replace_loss(
    statement: ast.stmt, loss: ast.Call, logits: str, head: str, cap: str | None
) -> None:
    if isinstance(statement, ast.If):
        if ast.unparse(statement.test) != "labels is not None" or statement.orelse:
            raise CannotRewriteError(f"its loss depends on more than labels: {_shown(statement)}")
        inside = statement.body
    else:
        inside = [statement]
    if not any(isinstance(line, ast.Assign) and line.value is loss for line in inside):
        raise CannotRewriteError(f"its loss is used in a way not known: {_shown(statement)}")
    given = [*loss.args[:1], *(word.value for word in loss.keywords if word.arg == "logits")]
    if len(given) != 1 or ast.unparse(given[0]) != logits:
        raise CannotRewriteError(f"its loss is given something else: {_shown(loss)}")
    taken = given[0]
    if any(_touches(line, logits, but=taken) for line in inside):
        raise CannotRewriteError(f"its forward reads the logits beside the loss: {_shown(loss)}")
    called = placed(ast.parse(f"{_LOSS}(self.{head}, {cap})", mode="eval").body, loss)
    assert isinstance(called, ast.Call)
    loss.func = called.func
    loss.args = [*called.args, *loss.args]


def _check_after(statements: Sequence[ast.stmt], logits: str) -> None:
    """After the loss, logits may only be returned."""
    for statement in statements:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "not return_dict":
            continue  # returns a tuple, which is not asked for
        returned = (
            next((word.value for word in statement.value.keywords if word.arg == "logits"), None)
            if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call)
            else None
        )
        if returned is not None and ast.unparse(returned) != logits:
            raise CannotRewriteError(f"its forward returns other logits: {_shown(returned)}")
        if _touches(statement, logits, but=returned):
            raise CannotRewriteError(
                f"its forward uses the logits after the loss: {_shown(statement)}"
            )


def _touches(tree: ast.AST, name: str, but: ast.AST | None = None) -> bool:
    """Whether a variable is read or written, other than for its device."""
    harmless = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "device"
    }
    return any(
        isinstance(node, ast.Name)
        and node.id == name
        and node is not but
        and id(node) not in harmless
        for node in ast.walk(tree)
    )


def _shown(node: ast.AST) -> str:
    line = " ".join(ast.unparse(node).split())
    return line if len(line) <= 80 else f"{line[:77]}..."
