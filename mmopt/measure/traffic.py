"""Bytes that a call moves, counted at the borders of its kernels, without a GPU.

Every kernel reads each of its operands once and writes its results once: what crosses the memory
bus when nothing stays in a cache from one kernel to the next. The call runs on meta tensors, so
that sizes are those of a GPU's and nothing is computed, and the ops of mmopt_kernels choose as on
the target. Which bytes a GPU really moves only its own counters know.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmopt_kernels import _triton

# Ops that make a tensor and leave open what is in it.
_UNTOUCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Ops that write their first argument, or a tensor like it, without reading it.
_FILLING = {"copy_", "fill_", "zero_", "random_", "uniform_", "zeros_like", "new_zeros"}
# Views that their schema does not call one.
_VIEWS = {"_unsafe_view"}
# Triton kernels that write where they have read, and the argument; GRADIENT tells whether they do.
_IN_PLACE = {"lora_linear_add": "p_dx", "cross_entropy": "p_x", "cross_entropy_columns": "p_x"}
# Whose implementation of an op of mmopt runs: the same as on a GPU, which the fake is not.
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def operand_bytes(call: Callable[[], Any], target: str = "sm_90") -> int:
    """Bytes that the kernels of ``call`` read and write.

    Args:
        call: of PyTorch's ops and those of mmopt_kernels, eagerly, on meta tensors.
        target: the GPU that mmopt_kernels choose for: ``"sm_90"``, ``"gfx942"``.

    Raises:
        MmoptError: TRITON_INTERPRET is set: kernels are decorated for the interpreter.
    """
    from mmopt_kernels.inspection.capture import recording  # Triton may be absent

    counter = _Counter()
    with _triton.assuming(target), recording() as launches, counter:
        call()
    return counter.bytes + sum(map(_launched, launches))


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up what each of PyTorch's ops moves; looks into those of mmopt."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mmopt":
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        out = func(*args, **kwargs)
        self.bytes += _moved(func, args, kwargs, out)
        return out


def _moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that one op reads and writes; a tensor that it changes counts as both."""
    name = func._schema.name.split("::")[1]
    if name in _UNTOUCHED | _VIEWS or (func.is_view and _shares(args[0], out)):
        return 0
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    read = [given[a.name] for a in arguments if a.name in given and not a.is_out]
    written = [
        given[a.name]
        for a in arguments
        if a.name in given and a.alias_info is not None and a.alias_info.is_write
    ]
    return _size(read[1:] if name in _FILLING else read) + _size(written or out)


def _shares(x: Any, out: Any) -> bool:
    """Whether what a schema calls a view is one: `to`, `contiguous` and `reshape` may copy."""
    first = next((t for t in tree_leaves(out) if isinstance(t, Tensor)), None)
    if first is None or not isinstance(x, Tensor):
        return True
    return bool(first.untyped_storage()._cdata == x.untyped_storage()._cdata)


def _launched(launch: Any) -> int:
    """Bytes that one launch of a Triton kernel moves."""
    names = [parameter.name for parameter in launch.kernel.params]
    given = dict(zip(names, launch.args, strict=False)) | dict(launch.kwargs)
    # A descriptor stands for the tensor that it was made of.
    tensors = {name: getattr(value, "base", value) for name, value in given.items()}
    changed = _IN_PLACE.get(launch.kernel.__name__)
    written = [tensors[changed]] if changed and given.get("GRADIENT", True) else []
    return _size(tensors) + _size(written)


def _size(values: Any) -> int:
    """Bytes of the tensors in it, each once; what is expanded counts as what it is made of."""
    found = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values()
    return sum(
        t.element_size() * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)
        for t in found
    )
