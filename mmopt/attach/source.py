"""A method of transformers, read as source and compiled again with a few lines changed.

What runs is one plain function: nothing has to be switched around a call, and a compiler traces it
like the original.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

TRACEABLE = "_mmopt_traceable"  # an attribute of the functions that traceable.py makes

# Decorators that give their function back, with another docstring.
_DOCUMENTING = {
    "add_start_docstrings_to_model_forward",
    "auto_docstring",
    "replace_return_docstrings",
}


class CannotRewriteError(Exception):
    """Why a method is not one that this package understands."""


def parsed(method: Callable[..., Any]) -> tuple[ast.Module, int] | None:
    """The source within any decorators, and its first line; None where it is not at hand."""
    try:
        lines, first = inspect.getsourcelines(inspect.unwrap(method))
        return ast.parse(textwrap.dedent("".join(lines))), first
    except (OSError, TypeError, SyntaxError):
        return None


def definition_of(method: Callable[..., Any], name: str) -> ast.FunctionDef:
    """The source of a method, at the lines of its file, ready to be changed and compiled.

    Args:
        method: as the class has it, decorators and all.
        name: what to call it in a message.
    """
    inner = inspect.unwrap(method)
    found = parsed(method)
    if found is None:
        raise CannotRewriteError(f"the source of its {name} is not at hand")
    tree, first = found
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise CannotRewriteError(f"its {name} is not an ordinary method")
    # A closure, super() included, and private names mean something only where they stand.
    if inner.__code__.co_freevars or any(
        isinstance(node, ast.Attribute)
        and node.attr.startswith("__")
        and not node.attr.endswith("__")
        for node in ast.walk(tree)
    ):
        raise CannotRewriteError(f"its {name} cannot be compiled outside its class")
    ast.increment_lineno(definition, first - 1)
    return definition


def compiled_again(
    definition: ast.FunctionDef,
    method: Callable[..., Any],
    name: str,
    names: Mapping[str, Any],
) -> Callable[..., Any]:
    """The changed function, at home in the same module and file.

    No process can import it; the arguments can be pickled, and do not change what they make again.

    Args:
        names: what the changed lines call, by names that the module does not have.
    """
    inner = inspect.unwrap(method)
    definition.decorator_list = [
        decorator
        for decorator in definition.decorator_list
        if _last_name(decorator) not in _DOCUMENTING
    ]
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    # Given as variables of a function around it: the module's own names stay as they are.
    outer = ast.parse(f"def around({', '.join(names)}):\n    return {definition.name}")
    around = outer.body[0]
    assert isinstance(around, ast.FunctionDef)
    around.body.insert(0, definition)
    ast.fix_missing_locations(outer)
    code = compile(outer, inner.__code__.co_filename, "exec", dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, inner.__globals__, made)
    function: Callable[..., Any] = made["around"](*names.values())
    if _wrappers(function) != _wrappers(method):
        raise CannotRewriteError(f"its {name} is wrapped by more than its decorators")
    return function


def _wrappers(function: Any) -> list[Any]:
    """The code of each decorator's wrapper around a function."""
    found = []
    while hasattr(function, "__wrapped__"):
        found.append(function.__code__)
        function = function.__wrapped__
    return found


def placed(tree: Any, at: ast.AST) -> Any:
    """A piece of new source, at the place of what it stands for."""
    for node in ast.walk(tree):
        ast.copy_location(node, at)
    return tree


def _last_name(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called).rpartition(".")[2]
