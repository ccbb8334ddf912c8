"""What is put in the place of a module's method, on the instance."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any


class Method:
    """A function bound to a module whose class does not have it.

    As MethodType, whose names it has, but that pickle would look for such a function by its name
    on the module that it has yet to fill.
    """

    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Callable[..., Any], module: Any) -> None:
        self.__func__ = function
        self.__self__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(self.__func__, self.__self__))
