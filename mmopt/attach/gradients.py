"""Adapters that do not train: after a backward pass, they have no gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmopt_kernels.errors import CheckFailedError

Gradient = Callable[[nn.Parameter], Tensor | None]


def _stored(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad


def dead_adapters(model: nn.Module, gradient: Gradient = _stored) -> list[str]:
    """The trainable adapters that a backward pass left without a gradient, as `layer (adapter)`.

    Of an adapter that is active and not merged, all trainable tensors must have one, and not all
    of them only zeros. A alone may: as initialized, B is zero, and with it the gradient of A.

    Args:
        gradient: of a parameter; by default its `grad`. Read on the host.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    dead = []
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters or layer.merged:
            continue
        for adapter in layer.active_adapters:
            trained = _trained(layer, adapter)
            found = [gradient(parameter) for parameter in trained]
            if trained and not _alive(found):
                dead.append(f"{name} ({adapter})")
    return dead


def _trained(layer: Any, adapter: str) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute, {})
        if adapter not in held:
            continue
        one = held[adapter]
        parameters += [one] if isinstance(one, nn.Parameter) else one.parameters()
    return [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]


def _alive(gradients: list[Tensor | None]) -> bool:
    return all(found is not None for found in gradients) and any(
        found is not None and bool(found.any()) for found in gradients
    )


def check_gradients(model: nn.Module, gradient: Gradient = _stored) -> None:
    """Raise CheckFailedError naming the first of `dead_adapters`, if there are any."""
    if dead := dead_adapters(model, gradient):
        raise CheckFailedError(
            f"{len(dead)} trainable adapters got no gradient, first {dead[0]}; expected one in "
            "each after a backward pass. The loss does not reach them: leave those layers out of "
            "target_modules, or freeze the adapter."
        )
