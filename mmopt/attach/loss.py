"""The training loss of a causal language model: output layer and cross-entropy in one op.

Only the model's `forward` is replaced, on the instance, and it still does what it did for every
call but one: in training, with labels. That call runs the same forward with another end, in which
the logits never exist (`loss_source`). What is asked of the output layer and of its adapter is
looked at on every call; what the op does not compute exactly, the model's own forward computes.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from mmopt.attach.lora import is_attached as is_lora_attached
from mmopt.attach.loss_source import without_logits
from mmopt.attach.method import method_of
from mmopt.attach.peft_layers import (
    adapter_obstacle,
    adapters_at_work,
    base_obstacle,
    dropout_of,
    factors,
    is_hooked,
    is_sharded,
    is_watched,
    kind_of,
    whole_bias,
    within_peft,
)
from mmopt.attach.report import Row
from mmopt.attach.source import CannotRewriteError
from mmopt_kernels import LoraFactors, linear_cross_entropy
from mmopt_kernels.linear_cross_entropy.ops import DTYPES

OP = "mmopt::linear_cross_entropy"

_STATE = "_mmopt_loss"  # on the model while attached: an _Attached
_NO_LOGITS = "in training with labels, the output's logits are None"


@dataclass(frozen=True)
class _Attached:
    """What the replaced forward needs.

    Attributes:
        make: compiles `forward`.
        head: the name of its output layer.
        scaled: whether it scales the hidden states in the logits' place.
        loss: the only loss function that the op computes, transformers' ForCausalLMLoss.
        forward: the model's own, without the logits.
    """

    make: Callable[[], Callable[..., Any]]
    head: str
    scaled: bool
    loss: Callable[..., Any]
    forward: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", self.make())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Attached, (self.make, self.head, self.scaled, self.loss)


def attach_loss(model: nn.Module) -> tuple[list[Row], Callable[[], None]]:
    """Replace `forward` of the transformers model that `model` is or that PEFT wraps.

    Returns:
        One row, none for a model without an output layer, and what undoes it.
    """
    base = within_peft(model)
    if base.get_output_embeddings() is None:
        return [], lambda: None
    if reason := _passed_by(model, base):
        return [Row("", "loss", None, reason)], lambda: None
    if _STATE in base.__dict__:
        state = base.__dict__[_STATE]
    else:
        try:
            state = _prepare(base)
        except CannotRewriteError as reason:
            return [Row("", "loss", None, str(reason))], lambda: None
        base.__dict__[_STATE] = state
        if "forward" not in base.__dict__:
            make = partial(_replacement, type(base).forward)
            base.forward = method_of(base, make(), make)
    obstacle = _head_obstacle(getattr(base, state.head), state, training=True)
    remark = _NO_LOGITS if obstacle is None else f"{obstacle}: the model's own loss meanwhile"
    return [Row("", "loss", OP, remark)], lambda: _restore(base)


def _passed_by(model: Any, base: Any) -> str | None:
    """Why a forward put on the model would not be called, or None."""
    # PEFT's adaption prompt holds on to the bound method that it found; other tuners look it up.
    tuner = None if model is base else getattr(model, "base_model", None)
    held = getattr(tuner, "__dict__", {}).get("forward")
    if getattr(held, "__self__", None) is not base or _is_ours(held):
        return None
    return f"peft's {type(tuner).__name__} calls the forward that the model had when it was made"


def _restore(base: Any) -> None:
    # What wrapped forward since, as accelerate does in mixed precision, stays. Without its state
    # the replacement inside does what the model's own forward does.
    base.__dict__.pop(_STATE, None)
    if "forward" in base.__dict__ and _is_ours(base.forward):
        del base.forward


def _is_ours(forward: Any) -> bool:
    function = getattr(forward, "__func__", forward)
    # Marked with itself, because functools.wraps copies marks.
    return getattr(function, _STATE, None) is function


def _prepare(base: Any) -> _Attached:
    """What to attach, or CannotRewriteError with the reason to leave the model alone."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if "forward" in base.__dict__ and not _is_ours(inspect.unwrap(base.forward)):
        raise CannotRewriteError("its forward is already replaced by something else")
    output = base.get_output_embeddings()
    head = next((name for name, child in base.named_children() if child is output), None)
    if head is None:
        raise CannotRewriteError("its output layer belongs to a module inside it")
    if base.loss_function is not ForCausalLMLoss:
        name = getattr(base.loss_function, "__name__", type(base.loss_function).__name__)
        raise CannotRewriteError(f"its loss is {name}, expected ForCausalLMLoss")
    make, scaled = without_logits(type(base).forward, base, head, _loss)
    if reason := _why_never(output, scaled):
        raise CannotRewriteError(reason)
    return _Attached(make, head, scaled, ForCausalLMLoss)


def _replacement(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, _STATE, None)
        if state is None or not _is_covered(self, state, kwargs):
            return own(self, *args, **kwargs)
        return state.forward(self, *args, **kwargs)

    # The trainer reads the signature. Not functools.wraps: accelerate unwraps what has __wrapped__.
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    forward.__doc__ = own.__doc__
    setattr(forward, _STATE, forward)
    return forward


# --- what is at work: plain attribute reads in a fixed order, which Dynamo turns into guards ------


def _is_covered(model: Any, state: _Attached, kwargs: dict[str, Any]) -> bool:
    """Whether this call is a training step that the op can serve."""
    if not model.training or kwargs.get("labels") is None:
        return False
    as_dict = kwargs.get("return_dict")
    if not (model.config.return_dict if as_dict is None else as_dict):
        return False  # in a tuple, None would move what follows the logits
    if model.loss_function is not state.loss:
        return False
    return _head_obstacle(getattr(model, state.head), state) is None


def _why_never(head: Any, scaled: bool) -> str | None:
    """Why no state of this output layer could use the op, or None."""
    inside = getattr(head, "original_module", getattr(head, "base_layer", head))
    if type(inside) is nn.Linear and is_sharded(inside.weight):
        return None  # seen in each call, where fully_shard has gathered it
    if _is_saved(head):
        return _linear_obstacle(head.original_module, scaled)
    if _is_lora(head):
        return base_obstacle(head) or _linear_obstacle(head.base_layer, scaled)
    return _linear_obstacle(head, scaled)


def _head_obstacle(head: Any, state: _Attached, *, training: bool | None = None) -> str | None:
    """Why the output layer must be called now, or None."""
    if _is_saved(head):
        if is_watched(head):
            return "hooks of its output layer would not run"
        return _linear_obstacle(_at_work(head), state.scaled)
    if not _is_lora(head):
        return _linear_obstacle(head, state.scaled)

    if is_hooked(head) or ("forward" in head.__dict__ and not is_lora_attached(head)):
        return "hooks of its output layer would not run"
    if head.disable_adapters and head.merged:
        return "the adapter of its output layer is disabled and yet to be unmerged"
    if head.disable_adapters or head.merged or not (adapters := adapters_at_work(head, None)):
        return _linear_obstacle(head.base_layer, state.scaled)
    if len(adapters) > 1:
        return f"{len(adapters)} adapters of its output layer are active"
    adapter = adapters[0]
    if adapter in head.lora_variant:
        variant = type(head.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        return f"adapter {adapter!r} of its output layer is {variant}"
    if reason := adapter_obstacle(head, adapter):
        return reason
    if dropout_of(head, adapter, training) > 0:
        return f"adapter {adapter!r} of its output layer has dropout"
    if state.scaled and head.lora_B[adapter].bias is not None:
        return "the model scales the logits, and its output layer has a bias"
    return base_obstacle(head) or _linear_obstacle(head.base_layer, state.scaled)


def _linear_obstacle(linear: Any, scaled: bool) -> str | None:
    """Why a layer without an adapter must be called, or None."""
    if type(linear) is not nn.Linear:
        kind = f"{type(linear).__module__}.{type(linear).__name__}"
        return f"its output layer is a {kind}, expected nn.Linear"
    if is_watched(linear):
        return "hooks of its output layer would not run"
    if type(linear.weight) not in (nn.Parameter, Tensor):
        # A DTensor: tensor-parallel or sharded, which the hooks around the layer see to.
        return f"the weight of its output layer is a {type(linear.weight).__name__}"
    if linear.weight.dtype not in DTYPES:
        return f"the weight of its output layer is {linear.weight.dtype}"
    if scaled and linear.bias is not None:
        return "the model scales the logits, and its output layer has a bias"
    return None


def _is_saved(head: Any) -> bool:
    """Whether PEFT trains a copy of the layer (modules_to_save). By name: PEFT may be absent."""
    kind = type(head)
    return (kind.__module__, kind.__name__) == ("peft.utils.other", "ModulesToSaveWrapper")


def _is_lora(head: Any) -> bool:
    kind = type(head)
    dense = (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear")
    return dense and kind_of(head.base_layer) == "dense"


def _at_work(wrapper: Any) -> Any:
    """The copy or the original, as PEFT's ModulesToSaveWrapper chooses in forward."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active:
        return wrapper.original_module
    if any(adapter not in wrapper._adapters for adapter in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


# --- the loss -------------------------------------------------------------------------------------


def _loss(
    head: Any,
    softcap: float | None,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss of the logits that `head` would make of hidden states.

    Its arguments, two in front; like it, silent about others. `logits` are the hidden states.
    """
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    weight, bias, lora = _parts(head)
    hidden = logits.reshape(-1, logits.shape[-1])
    loss = linear_cross_entropy(
        hidden,
        weight,
        shift_labels.reshape(-1).to(hidden.device),
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        reduction="mean" if num_items_in_batch is None else "sum",
        lora=lora,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _parts(head: Any) -> tuple[Tensor, Tensor | None, LoraFactors | None]:
    """Weight, bias and adapter of an output layer that has no obstacle."""
    if _is_saved(head):
        head = _at_work(head)
    if not _is_lora(head):
        return head.weight, head.bias, None
    linear = head.base_layer
    if head.disable_adapters or head.merged or not (adapters := adapters_at_work(head, None)):
        return linear.weight, linear.bias, None
    a, b, scale = factors(head, adapters, stacked=False)
    return linear.weight, whole_bias(head, adapters, linear.weight, a), LoraFactors(a, b, scale)
