"""What an op with a backward has no derivative under: `torch.func`, and `forward_ad` beneath it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves


def transforming() -> bool:
    """Whether a transform runs, in which tensors that are made may hide their values."""
    return torch._C._are_functorch_transforms_active()


def refuse_transforms(op: str, *inputs: object) -> None:
    """Raise where a transform would differentiate the op by one of ``inputs``, or of their parts.

    PyTorch knows the backward of a registered op outside of transforms only: `torch.func.grad`
    would fail with a message about its internals, and `torch.func.jvp` and dual tensors would take
    the op for a constant.

    Raises:
        NotImplementedError: as it says.
    """
    if torch.compiler.is_compiling():
        return
    asked = None
    if transforming():
        stack = _functorch.get_interpreter_stack() or ()
        forward = any(each.key() == _functorch.TransformType.Jvp for each in stack)
        if any(_differentiated(x, forward) for x in tree_leaves(inputs)):
            asked = "torch.func asked for a derivative (grad, vjp, jvp or one made of them)"
    # -1 is outside of every `dual_level`, in which alone a tensor has a tangent.
    dual = forward_ad._current_level >= 0
    if asked is None and dual and any(_has_tangent(x) for x in tree_leaves(inputs)):
        asked = "torch.autograd.forward_ad asked for a tangent"
    if asked is not None:
        raise NotImplementedError(
            f"{op}: {asked}, expected reverse mode of torch.autograd. Call backward() or "
            "torch.autograd.grad instead, or take the op off the model: undo() of the report that "
            "mmopt.optimize returned."
        )


def _differentiated(x: object, forward: bool) -> bool:
    while isinstance(x, Tensor) and _functorch.is_functorch_wrapped_tensor(x):
        # What jvp made may have a tangent: below a vmap nobody can ask.
        if (forward and _functorch.is_gradtrackingtensor(x)) or (
            x.requires_grad and torch.is_grad_enabled()
        ):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def _has_tangent(x: object) -> bool:
    if not isinstance(x, Tensor):
        return False
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
