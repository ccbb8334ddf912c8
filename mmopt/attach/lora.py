"""LoRA layers: base and adapter in one `mmopt::lora_linear`, everything else PEFT's own.

Only `forward` of each layer is replaced, on the instance. What PEFT does to a layer (activate,
disable, merge, unload, save) it still does to the same object, and the replacement looks at that
state on every call.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from mmopt.attach.report import Row
from mmopt_kernels import lora_linear

OP = "mmopt::lora_linear"


def attach_lora(model: nn.Module) -> tuple[list[Row], Callable[[], None]]:
    """Replace `forward` of every LoRA layer that the op can serve.

    Returns:
        A row per LoRA layer, and what undoes all of them.
    """
    from peft.tuners.lora import LoraLayer

    rows, attached = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = _why_not(layer)
        if reason is None:
            layer.forward = MethodType(_forward, layer)
            attached.append(layer)
            rows.append(Row(name, "lora", OP, _when_not(layer)))
        else:
            rows.append(Row(name, "lora", None, reason))
    return rows, lambda: _restore(attached)


def _restore(layers: list[Any]) -> None:
    for layer in layers:
        if _is_attached(layer):
            del layer.forward


def _is_attached(layer: Any) -> bool:
    return getattr(layer.__dict__.get("forward"), "__func__", None) is _forward


def _why_not(layer: Any) -> str | None:
    """Why no adapter of this layer can ever use the op, or None."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return f"peft's {type(layer).__name__} layer is not covered, only Linear is"
    if type(layer.base_layer) is not nn.Linear:
        return f"its base layer is {type(layer.base_layer).__name__}, expected nn.Linear"
    if not layer.base_layer.weight.is_floating_point():
        return f"its base weight is {layer.base_layer.weight.dtype}, expected a floating dtype"
    if "forward" in layer.__dict__ and not _is_attached(layer):
        return "its forward is already replaced by something else"
    reasons = [_variant(layer, adapter) for adapter in layer.lora_A]
    if reasons and all(reasons):
        return reasons[0]
    return None


def _variant(layer: Any, adapter: str) -> str | None:
    """What makes this adapter more than `x Wᵀ + scale (x Aᵀ) Bᵀ`, or None."""
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        return f"adapter {adapter!r} is {variant}"
    if layer.lora_bias.get(adapter, False):
        return f"adapter {adapter!r} has lora_bias"
    return None


def _when_not(layer: Any) -> str | None:
    """When an attached layer takes PEFT's own path, as far as its state now tells."""
    if layer.merged:
        return "merged: PEFT's forward until it is unmerged"
    if layer.disable_adapters:
        return "disabled: PEFT's forward until it is enabled"
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} active adapters: PEFT's forward until there is one"
    if reason := _variant(layer, active[0]):
        return f"{reason}: PEFT's forward while it is active"
    dropout = getattr(layer.lora_dropout[active[0]], "p", 0.0)
    if dropout > 0:
        return f"lora_dropout {dropout}: PEFT's forward in training mode"
    return None


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`peft.tuners.lora.Linear.forward` with the plain single-adapter case in one op."""
    adapter = None if args or kwargs else _served(self)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    base = self.base_layer
    return lora_linear(
        x,
        base.weight,
        self.lora_A[adapter].weight,
        self.lora_B[adapter].weight,
        bias=base.bias,
        scale=self.scaling[adapter],
    )


def _served(layer: Any) -> str | None:
    """The adapter that the op applies now, or None when PEFT's own forward must run.

    Plain attribute reads in a fixed order, so that Dynamo turns the answer into guards.
    """
    if layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1:
        return None
    adapter: str = active[0]
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter, False):
        return None
    dropout = layer.lora_dropout[adapter]
    if not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0:
        return None
    for module in (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]):
        # The op reads the weights without calling the modules: their hooks would not run.
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return None
    return adapter
