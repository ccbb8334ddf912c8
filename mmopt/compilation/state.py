"""What a graph took from its model as given while it was traced, and whether that still holds.

Dynamo's own guards hold live objects and cannot leave their process. Written down here as plain
text, they can: an expression that leads from the model to a value, and what the value was.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

MODEL, ARGUMENTS, GLOBALS = "model", "arguments", "G"

# Reached through what a program changes at run time; classes and defaults stay as they were loaded.
_LASTING = re.compile(r"\btype\(|__defaults__|__kwdefaults__|__closure__|\bdict\.|\blist\(")
# All that a class holds, where a graph relies on single entries, which have facts of their own.
_CLASS_DICT = ".__dict__)"
# A place in a dict by its number.
_REGISTRY = "dict.keys("
_GONE = (AttributeError, IndexError, KeyError, TypeError)
# What is said of an expression that leads nowhere.
_ABSENT = "not there"


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
    if isinstance(value, nn.Module) and "forward" in vars(value):
        return f"a {_name(type(value))} with a forward of its own"
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
        # With the code that finds it in each call.
        self._arguments = [
            (expression, compile(expression, "<fact>", "eval"), fact)
            for expression, fact in facts.items()
            if _root(expression) == ARGUMENTS
        ]

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        imports: Mapping[str, str],
        model: Any,
        arguments: Any,
        *,
        absent: Iterable[tuple[str, str]] = (),
    ) -> "ModelState":
        """Describe the value of every expression in `names` that leads somewhere.

        Args:
            names: expressions.
            imports: the module that each alias of `G` stands for.
            model, arguments: what the graph was traced with.
            absent: an expression, and the attribute or subscript that tracing asked it for. Those
                that it did not have are facts too: once there, they would change the graph.
        """
        scope = _scope(imports, model, arguments)
        facts = {}
        for name in dict.fromkeys(names):
            root = _root(name)
            if name.endswith(_CLASS_DICT) or (root == GLOBALS and _REGISTRY in name):
                continue
            try:
                value = _evaluate(name, scope)
            # A guard may be about the absence of something, and helpers of Dynamo are not in scope.
            except (*_GONE, NameError, SyntaxError, ValueError):
                continue
            # A collection of a module, such as a registry, holds what else the process has used.
            if root == GLOBALS and isinstance(value, Mapping | list | set | tuple):
                continue
            facts[name] = _of_argument(value) if root == ARGUMENTS else describe(value)
        for name, step in dict.fromkeys(absent):
            # What modules of Python hold depends on what else the process has used.
            if _root(name) != GLOBALS and _is_absent(name, step, scope):
                facts[name + step] = _ABSENT
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
                found = _ABSENT
            if found != fact:
                return f"{_readable(expression)} is {found}, was {fact}"
        return None

    def watch(self, model: Any) -> None:
        """Remember `model`, which is as described, for `changed`."""
        self._watch = _Watch(
            model,
            {
                name: fact
                for name, fact in self.facts.items()
                if _root(name) == MODEL and not _LASTING.search(name)
            },
        )

    def changed(self, arguments: Mapping[str, Any]) -> str | None:
        """What is no longer as described: of the watched model, or of the arguments of a call.

        What a tensor among the arguments is like is left to the guards of the graph.
        """
        assert self._watch is not None, "watch comes first"
        for expression, code, fact in self._arguments:
            try:
                found = _of_argument(_evaluate(code, {ARGUMENTS: arguments}))
            except _GONE:
                found = _ABSENT
            if found != fact:
                return f"{_readable(expression)} is {found}, was {fact}"
        return self._watch.changed()


class _Watch:
    """Compares what expressions lead to with what they led to when this was made.

    It runs before every call, so it is a function that is written out for one model: each step that
    expressions share is taken once, and each value is compared in the cheapest way that its kind
    allows.
    """

    def __init__(self, model: Any, facts: Mapping[str, str]) -> None:
        self._model = model
        self._facts = list(facts.items())
        # Of each step (from which value, the attribute or subscript) the number of its value.
        self._steps: dict[tuple[int, str], int] = {}
        self._values = [model]
        self._lines = ["def first_change(v0):"]
        constants: dict[str, Any] = {}
        for number, (expression, fact) in enumerate(self._facts):
            node = ast.parse(expression, mode="eval").body
            if fact == _ABSENT:
                test = self._presence(node)
            elif (place := self._follow(node)) is not None:
                test = _difference(f"v{place}", self._values[place], f"c{number}", constants)
            else:
                continue
            self._lines.append(f"    if {test}: return {number}")
        self._lines.append("    return None")
        exec(compile("\n".join(self._lines), "<facts of a model>", "exec"), constants)
        self._first_change: Callable[[Any], int | None] = constants["first_change"]
        # They would keep alive what the model has let go.
        self._values.clear()
        self._lines.clear()

    def _follow(self, node: ast.expr) -> int | None:
        """The number of the value that `node` leads to; None where a function is called."""
        if isinstance(node, ast.Name):
            return 0
        if isinstance(node, ast.Attribute):
            step = f".{node.attr}"
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            step = f"[{node.slice.value!r}]"
        else:
            return None
        parent = self._follow(node.value)
        if parent is None:
            return None
        if (parent, step) not in self._steps:
            number = len(self._values)
            self._steps[parent, step] = number
            self._values.append(eval(f"v{step}", {"v": self._values[parent]}))
            self._lines.append(f"    v{number} = v{parent}{step}")
        return self._steps[parent, step]

    def _presence(self, node: ast.expr) -> str:
        """The source of a test that the last step of `node` now leads somewhere."""
        assert isinstance(node, ast.Attribute | ast.Subscript), "as ModelState.of writes them"
        parent = self._follow(node.value)
        if isinstance(node, ast.Attribute):
            return f"hasattr(v{parent}, {node.attr!r})"
        return f"{ast.unparse(node.slice)} in v{parent}"

    def changed(self) -> str | None:
        """The first value that is no longer what it was, or None."""
        try:
            number = self._first_change(self._model)
        except _GONE as error:
            return f"a part of the model is gone: {type(error).__name__}: {error}"
        if number is None:
            return None
        expression, fact = self._facts[number]
        now = describe(_evaluate(expression, {MODEL: self._model}))
        # Else it is another module of the same kind.
        what = f"is {now}, was {fact}" if now != fact else "was replaced"
        return f"{_readable(expression)} {what}"


def _difference(value: str, was: Any, name: str, constants: dict[str, Any]) -> str:
    """The source of a test that the variable `value` is not what `was` is now.

    `name` is free for a constant that the test needs, and set in `constants`.
    """
    constants[name] = was
    if was is None or isinstance(was, bool):
        return f"{value} is not {was}"
    if isinstance(was, nn.Module):
        own = "forward" in vars(was)
        return f"{value} is not {name} or ('forward' in {value}.__dict__) is not {own}"
    if isinstance(was, int | float | str | bytes | torch.dtype | torch.device):
        return f"{value} != {name}"
    if isinstance(was, Tensor):
        constants[name] = (was.requires_grad, was.dtype, was.shape, was.device)
        parts = ("requires_grad", "dtype", "shape", "device")
        return f"({', '.join(f'{value}.{part}' for part in parts)}) != {name}"
    if isinstance(was, Mapping):
        constants[name] = list(was)
        return f"list({value}) != {name}" if was else value
    if isinstance(was, list | tuple | set | frozenset):
        constants[name] = type(was)
        return f"type({value}) is not {name} or len({value}) != {len(was)}"
    if isinstance(was, FunctionType | MethodType):
        constants[name] = was.__code__
        return f"getattr({value}, '__code__', None) is not {name}"
    constants[name] = type(was)
    return f"type({value}) is not {name}"


def _is_absent(name: str, step: str, scope: dict[str, Any]) -> bool:
    """Whether `name` leads somewhere, and `step` from there nowhere."""
    try:
        _evaluate(name, scope)
    # As in ModelState.of.
    except (*_GONE, NameError, SyntaxError, ValueError):
        return False
    try:
        _evaluate(name + step, scope)
    except _GONE:
        return True
    return False


def _of_argument(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else describe(value)


def _evaluate(expression: str | CodeType, scope: dict[str, Any]) -> Any:
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
    """`model.layers.training` for `model._modules['layers'].__dict__['training']`."""
    short = re.sub(
        r"(?:\.__dict__\['_(?:modules|parameters|buffers)'\]|"
        r"\._(?:modules|parameters|buffers))\['([^']*)'\]",
        r".\1",
        expression,
    )
    return re.sub(r"\.__dict__\['([^']*)'\]", r".\1", short).replace(".__dict__", "")


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    module = getattr(value, "__module__", None)
    return name if module in (None, "builtins") else f"{module}.{name}"
