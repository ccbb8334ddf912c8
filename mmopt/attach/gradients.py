"""Adapters that do not train: after a backward pass, they have no gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmopt_kernels.errors import CheckFailedError

Gradient = Callable[[nn.Parameter], Tensor | None]


def _stored(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad


@dataclass(frozen=True)
class _Dead:
    """An adapter without a gradient.

    Attributes:
        name: `layer (adapter)`.
        tokens: which tokens it acts on, where a batch without them explains it; None otherwise.
    """

    name: str
    tokens: str | None


def dead_adapters(model: nn.Module, gradient: Gradient = _stored) -> list[str]:
    """The trainable adapters that a backward pass left without a gradient, as `layer (adapter)`.

    Of trainable tokens and aLoRA it says as well which tokens the batch may have lacked.

    Of an adapter that is active and not merged, all trainable tensors must have one, and not all
    of them only zeros. A alone may: as initialized, B is zero, and with it the gradient of A.

    Args:
        gradient: of a parameter; by default its `grad`. Read on the host.
    """
    return [
        each.name if each.tokens is None else f"{each.name}, which acts on {each.tokens} only"
        for each in _dead(model, gradient)
    ]


def _dead(model: nn.Module, gradient: Gradient) -> list[_Dead]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    dead = []
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters or layer.merged:
            continue
        for adapter in layer.active_adapters:
            trained = _trained(layer, adapter)
            found = [gradient(parameter) for parameter in trained]
            if trained and not _alive(found):
                # Tokens that are not there leave zeros; what the loss does not reach has None.
                absent = all(each is not None for each in found)
                tokens = _tokens(layer, adapter) if absent else None
                dead.append(_Dead(f"{name} ({adapter})", tokens))
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


def _tokens(layer: Any, adapter: str) -> str | None:
    """The tokens that an adapter acts on, where it does not act on all."""
    if indices := getattr(layer, "token_indices", {}).get(adapter):
        shown = ", ".join(str(index) for index in indices[:4])
        return f"the token ids {shown}{', ...' if len(indices) > 4 else ''}"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if type(variant).__name__ == "ALoraLinearVariant":
        return "its invocation tokens in input_ids and what follows them"
    return None


def _alive(gradients: list[Tensor | None]) -> bool:
    return all(found is not None for found in gradients) and any(
        found is not None and bool(found.any()) for found in gradients
    )


def check_gradients(model: nn.Module, gradient: Gradient = _stored) -> None:
    """Raise CheckFailedError naming the first of `dead_adapters`, if there are any.

    Trainable tokens and aLoRA have a message of their own: they may only have missed their tokens.
    """
    dead = _dead(model, gradient)
    faults = []
    if unreached := [each for each in dead if each.tokens is None]:
        faults.append(
            f"{len(unreached)} trainable adapters got no gradient, first {unreached[0].name}; "
            "expected one in each after a backward pass. The loss does not reach them: leave those "
            "layers out of target_modules, or freeze the adapter."
        )
    if waiting := [each for each in dead if each.tokens is not None]:
        faults.append(
            f"{len(waiting)} trainable adapters that act on certain tokens got a gradient of zero, "
            f"first {waiting[0].name}, which acts on {waiting[0].tokens}; expected these in the "
            "batch, where the loss depends on them. Check with a batch that has them, or freeze "
            "the adapter."
        )
    if faults:
        raise CheckFailedError(" ".join(faults))
