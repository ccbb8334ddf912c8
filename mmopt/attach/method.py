"""Functions as methods of modules whose class does not have them, and how those are pickled.

They are MethodType, for which torch.compile has a rule of its own: modules share a graph when their
methods share a function. Of a method pickle writes only its name, to be looked up on a module that
it has yet to fill.
"""

import copyreg
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

Maker = Callable[[], Any]

_MAKERS: WeakKeyDictionary[Any, Maker | None] = WeakKeyDictionary()


def method_of(module: Any, function: Any, make: Maker | None = None) -> MethodType:
    """Bind `function` to `module`, so that it is pickled with it.

    Args:
        module: any object.
        function: where `make` is None, one that can be imported by its name.
        make: returns the function in another process; can be pickled.
    """
    _MAKERS[function] = make
    return MethodType(function, module)


def _reduced(method: MethodType) -> Any:
    function = method.__func__
    if not isinstance(function, FunctionType) or function not in _MAKERS:
        return method.__reduce__()
    make = _MAKERS[function]
    return _unpickled, (method.__self__, function if make is None else None, make)


def _unpickled(module: Any, function: Any, make: Maker | None) -> MethodType:
    return method_of(module, function if make is None else make(), make)


copyreg.pickle(MethodType, _reduced)
# Between processes multiprocessing has its own way, by name as well.
ForkingPickler.register(MethodType, _reduced)
