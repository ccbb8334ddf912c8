"""LoRA layers: base and adapters in one `mmopt::lora_linear`, everything else PEFT's own.

Only `forward` of each layer is replaced, on the instance. What PEFT does to a layer (activate,
disable, merge, unload, save, swap) it still does to the same object, and the replacement looks at
that state on every call. What the op does not compute exactly as PEFT defines it, PEFT computes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmopt.attach.method import method_of
from mmopt.attach.peft_layers import (
    adapter_obstacle,
    adapters_at_work,
    base_obstacle,
    dropout_of,
    factors,
    is_sharded,
    kind_of,
    obstacle,
    rounds_twice,
    weight_and_input,
    whole_bias,
)
from mmopt.attach.report import Row
from mmopt_kernels import lora_linear

OP = "mmopt::lora_linear"

# By name, because bitsandbytes may be absent, and PEFT's layers over it with it.
_LAYERS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
}

_INT8 = (
    "int8 base: only the weight is rounded; on a GPU bitsandbytes rounds the activations to int8 "
    "as well, so results there differ by that error"
)

_SHARDED = (
    "its weights are sharded: the op serves calls that find them whole, as fully_shard's hooks "
    "see to"
)


def attach_lora(model: nn.Module) -> tuple[list[Row], Callable[[], None]]:
    """Replace `forward` of every LoRA layer that the op can serve.

    Returns:
        A row per adapted layer, or per adapter where PEFT adapts no layer (prompt tuning); and what
        undoes all of them.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    rows, attached = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if isinstance(layer, LoraLayer):
            reason = _why_never(layer)
        else:
            package = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
            reason = f"its adapter is {package}'s {type(layer).__name__}, expected LoRA"
        if reason is None:
            layer.forward = method_of(layer, _forward)
            attached.append(layer)
            rows.append(Row(name, "lora", OP, _remark(layer)))
        else:
            rows.append(Row(name, "lora", None, reason))
    return rows or _without_layers(model), lambda: _restore(attached)


def _without_layers(model: nn.Module) -> list[Row]:
    """A row per adapter of a model of PEFT's in which no layer is one of its tuners'."""
    from peft import PeftModel

    return [
        Row(
            name,
            "lora",
            None,
            f"adapter {adapter!r} is PEFT's {config.peft_type.value}, without layers of LoRA's",
        )
        for name, module in model.named_modules()
        if isinstance(module, PeftModel)
        for adapter, config in module.peft_config.items()
    ]


def _restore(layers: list[Any]) -> None:
    for layer in layers:
        if is_attached(layer):
            del layer.forward


def is_attached(layer: Any) -> bool:
    return getattr(layer.__dict__.get("forward"), "__func__", None) is _forward


def _why_never(layer: Any) -> str | None:
    """Why no adapter of this layer can ever use the op, or None."""
    if (type(layer).__module__, type(layer).__name__) not in _LAYERS:
        return (
            f"peft's {type(layer).__name__} layer is not covered, only Linear, Linear4bit and "
            "Linear8bitLt are"
        )
    if "forward" in layer.__dict__ and not is_attached(layer):
        return "its forward is already replaced by something else"
    if is_sharded(getattr(layer.base_layer, "weight", None)):
        return None  # seen in each call, where fully_shard has gathered it
    if reason := base_obstacle(layer):
        return reason
    reasons = [adapter_obstacle(layer, adapter) for adapter in layer.lora_A]
    if reasons and all(reasons):
        return reasons[0]
    return None


def _remark(layer: Any) -> str | None:
    """When an attached layer takes PEFT's own path as far as its state now tells, or what differs.

    Dropout is looked at as in training.
    """
    if is_sharded(getattr(layer.base_layer, "weight", None)):
        return _SHARDED
    if reason := obstacle(layer, None, training=True):
        return f"{reason}: PEFT's forward meanwhile"
    return _INT8 if kind_of(layer.base_layer) == "int8" else None


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`forward` of PEFT's LoRA layers over a linear base, with base and adapters in one op."""
    names = kwargs.get("adapter_names")
    if (
        args
        or len(kwargs) != ("adapter_names" in kwargs)
        or obstacle(self, names) is not None
        or rounds_twice(self.base_layer, x)
    ):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    if names is not None:
        self._check_forward_args(x, adapter_names=names)

    adapters = adapters_at_work(self, names)
    weight, x_base = weight_and_input(self.base_layer, x)
    a, b, scale = factors(self, adapters, stacked=names is not None)
    index = None
    if names is not None:
        rows = [adapters.index(name) if name in adapters else -1 for name in names]
        index = torch.tensor(rows, dtype=torch.int32, device=x.device)
    magnitude = None
    if adapters[0] in self.lora_variant:
        magnitude = self.lora_magnitude_vector[adapters[0]].weight
    y = lora_linear(
        x_base,
        weight,
        a,
        b,
        bias=whole_bias(self, adapters, weight, x_base),
        scale=scale,
        dropout_p=dropout_of(self, adapters[0]),
        magnitude=magnitude,
        adapter_index=index,
    )
    # What bitsandbytes returns; on a CPU its int8 layers follow autocast instead.
    kind = kind_of(self.base_layer)
    if kind == "nf4" or (kind == "int8" and x.device.type != "cpu"):
        return y.to(x.dtype)
    return y
