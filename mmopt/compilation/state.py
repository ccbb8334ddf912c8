"""What a graph took from its model as given while it was traced, and whether that still holds.

Dynamo's own guards hold live objects and cannot leave their process. Written down here as plain
text, they can: an expression that leads from the model to a value, and what the value was.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

MODEL, ARGUMENTS, GLOBALS = "model", "arguments", "G"

# Reached through what a program changes at run time; classes and defaults stay as they were loaded.
_LASTING = re.compile(r"\btype\(|__defaults__|__kwdefaults__|__closure__|\bdict\.|\blist\(")
# All that a class holds, where a graph relies on single entries, which have facts of their own.
_CLASS_DICT = ".__dict__)"
# A place in a dict by its number.
_REGISTRY = "dict.keys("
_GONE = (AttributeError, IndexError, KeyError, TypeError)


def describe(value: Any) -> str:
    """What a graph can depend on in `value`, in words that another process would use as well.

    Constants by value, tensors by dtype, shape, device and whether they are trained, collections by
    length and keys, everything else by type or name.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, Tensor):
        trained = ", trained" if value.requires_grad else ""
        return f"{value.dtype} {list(value.shape)} on {value.device}{trained}"
    if isinstance(value, Mapping):
        keys = [repr(key) if _is_constant(key) else type(key).__name__ for key in value]
        return f"{_name(type(value))} of {', '.join(keys) or 'nothing'}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"{_name(type(value))} of {len(value)}"
    if isinstance(value, MethodType):
        return f"method {_name(value.__func__)}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{type(value).__name__} {_name(value)}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    return f"a {_name(type(value))}"


class ModelState:
    """The facts about a model, its arguments and modules of Python on which one graph relies.

    Attributes:
        facts: for each expression over `model`, `arguments` and `G[alias]`, what it was.
        imports: the module that each alias of `G` stands for.
    """

    def __init__(self, facts: Mapping[str, str], imports: Mapping[str, str]) -> None:
        self.facts = dict(facts)
        self.imports = dict(imports)
        self._watch: _Watch | None = None
        self._arguments = {
            expression: fact for expression, fact in facts.items() if _root(expression) == ARGUMENTS
        }

    @classmethod
    def of(
        cls, names: Iterable[str], imports: Mapping[str, str], model: Any, arguments: Any
    ) -> "ModelState":
        """Describe the value of every expression in `names` that leads somewhere."""
        scope = _scope(imports, model, arguments)
        facts = {}
        for name in dict.fromkeys(names):
            if name.endswith(_CLASS_DICT) or _REGISTRY in name:
                continue
            try:
                value = _evaluate(name, scope)
            # A guard may be about the absence of something, and helpers of Dynamo are not in scope.
            except (*_GONE, NameError, SyntaxError, ValueError):
                continue
            # A collection of a module, such as a registry, holds what else the process has used.
            if _root(name) != GLOBALS or not isinstance(value, Mapping | list | set | tuple):
                facts[name] = describe(value)
        return cls(facts, imports)

    def difference(self, model: Any) -> str | None:
        """The first fact that does not hold of `model` and the modules of this process, or None."""
        scope = _scope(self.imports, model, None)
        for expression, fact in self.facts.items():
            if _root(expression) == ARGUMENTS:
                continue
            try:
                found = describe(_evaluate(expression, scope))
            except _GONE:
                found = "not there"
            if found != fact:
                return f"{_readable(expression)} is {found}, was {fact}"
        return None

    def watch(self, model: Any) -> None:
        """Remember `model`, which is as described, for `changed`."""
        self._watch = _Watch(
            model,
            [name for name in self.facts if _root(name) == MODEL and not _LASTING.search(name)],
        )

    def changed(self, arguments: Mapping[str, Any]) -> str | None:
        """What is no longer as described: of the watched model, or of the arguments of a call.

        Tensors among the arguments are left to the guards of the graph.
        """
        assert self._watch is not None, "watch comes first"
        for expression, fact in self._arguments.items():
            try:
                value = _evaluate(expression, {ARGUMENTS: arguments})
            except _GONE:
                return f"{_readable(expression)} is missing"
            if not isinstance(value, Tensor) and describe(value) != fact:
                return f"{_readable(expression)} is {describe(value)}, was {fact}"
        return self._watch.changed()


class _Watch:
    """Follows expressions step by step, each shared step once, and compares what they lead to."""

    def __init__(self, model: Any, expressions: Sequence[str]) -> None:
        # (index of the parent's value, by attribute or by subscript, its name or key)
        self._steps: list[tuple[int, bool, Any]] = []
        self._expressions: list[str] = []
        index = {ast.dump(ast.parse(MODEL, mode="eval").body): 0}
        self._values: list[Any] = [model]
        watched: dict[int, str] = {}
        for expression in expressions:
            place = self._follow(ast.parse(expression, mode="eval").body, index)
            if place is not None:
                watched[place] = expression
        self._checks = [
            (place, expression, _comparison(self._values[place]))
            for place, expression in watched.items()
        ]

    def _follow(self, node: ast.expr, index: dict[str, int]) -> int | None:
        known = ast.dump(node)
        if known in index:
            return index[known]
        key: Any
        if isinstance(node, ast.Attribute):
            by_attribute, key = True, node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            by_attribute, key = False, node.slice.value
        else:
            return None
        parent = self._follow(node.value, index)
        if parent is None:
            return None
        self._steps.append((parent, by_attribute, key))
        above = self._values[parent]
        self._values.append(getattr(above, key) if by_attribute else above[key])
        index[known] = len(self._values) - 1
        return index[known]

    def changed(self) -> str | None:
        values = [self._values[0]]
        try:
            for parent, by_attribute, key in self._steps:
                above = values[parent]
                values.append(getattr(above, key) if by_attribute else above[key])
        except _GONE as error:
            return f"a part of the model is gone: {type(error).__name__}: {error}"
        for place, expression, same in self._checks:
            if not same(values[place]):
                now, was = describe(values[place]), describe(self._values[place])
                return f"{_readable(expression)} is {now}, was {was}"
        return None


def _comparison(was: Any) -> Callable[[Any], bool]:
    """A cheap test that a value is what `was` is now."""
    if was is None or isinstance(was, bool | torch.nn.Module):
        return lambda value: value is was
    if isinstance(was, int | float | str | bytes | torch.dtype | torch.device):
        return lambda value: bool(value == was)
    if isinstance(was, Tensor):
        dtype, shape, device, trained = was.dtype, was.shape, was.device, was.requires_grad
        return lambda value: (
            value.requires_grad is trained
            and value.dtype is dtype
            and value.shape == shape
            and value.device == device
        )
    if isinstance(was, Mapping):
        if not was:
            return lambda value: not value
        keys = list(was)
        return lambda value: list(value) == keys
    if isinstance(was, list | tuple | set | frozenset):
        kind, length = type(was), len(was)
        return lambda value: type(value) is kind and len(value) == length
    if isinstance(was, FunctionType | MethodType):
        code = was.__code__
        return lambda value: getattr(value, "__code__", None) is code
    kind = type(was)
    return lambda value: type(value) is kind


def _evaluate(expression: str, scope: dict[str, Any]) -> Any:
    # Expressions come from Dynamo, or from a store that is trusted to bring code.
    return eval(expression, {"__builtins__": _BUILTINS}, scope)


_BUILTINS = {"type": type, "dict": dict, "list": list, "set": set, "tuple": tuple, "len": len}


class _Globals(dict[str, Any]):
    def __init__(self, imports: Mapping[str, str]) -> None:
        super().__init__()
        self._imports = imports

    def __missing__(self, alias: str) -> Any:
        self[alias] = import_module(self._imports[alias])
        return self[alias]


def _scope(imports: Mapping[str, str], model: Any, arguments: Any) -> dict[str, Any]:
    return {MODEL: model, ARGUMENTS: arguments, GLOBALS: _Globals(imports)}


def _root(expression: str) -> str:
    found = re.search(rf"\b({MODEL}|{ARGUMENTS}|{GLOBALS})\b", expression)
    return found.group() if found else ""


def _readable(expression: str) -> str:
    """`model.layers.0.training` for `model._modules['layers']._modules['0'].training`."""
    short = re.sub(
        r"(?:\.__dict__\['_(?:modules|parameters|buffers)'\]|"
        r"\._(?:modules|parameters|buffers))\['([^']*)'\]",
        r".\1",
        expression,
    )
    return short.replace(".__dict__", "")


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    module = getattr(value, "__module__", None)
    return name if module in (None, "builtins") else f"{module}.{name}"
