"""What a PEFT LoRA layer is at this moment, and what it gives to an op that stands in for it.

Read on every call, because PEFT activates, merges and swaps adapters in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmopt_kernels import Int8Weight, NF4Weight
from mmopt_kernels.lora_linear.ops import DTYPES

# By name, because bitsandbytes may be absent.
_BASES = {
    ("torch.nn.modules.linear", "Linear"): "dense",
    ("transformers.pytorch_utils", "Conv1D"): "transposed",
    ("bitsandbytes.nn.modules", "Linear4bit"): "nf4",
    ("bitsandbytes.nn.modules", "Linear8bitLt"): "int8",
}


def within_peft(model: Any) -> Any:
    """The model that a PEFT model is around; the model itself where it is none."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    # By name, because PEFT may be absent.
    if (type(model).__module__, type(model).__name__) == ("peft.mixed_model", "PeftMixedModel"):
        return model.base_model.model
    return model


# --- what is at work: plain attribute reads in a fixed order, which Dynamo turns into guards ------


def adapters_at_work(layer: Any, names: Sequence[str] | None) -> list[str]:
    """The adapters at work, each once: those that are active, or those that the rows name."""
    wanted = layer.active_adapters if names is None else dict.fromkeys(names)
    return [adapter for adapter in wanted if adapter in layer.lora_A]


def obstacle(
    layer: Any, names: Sequence[str] | None, *, training: bool | None = None
) -> str | None:
    """Why PEFT's own forward must run now, or None.

    Args:
        training: take every dropout as in training (True); by default, as it is.
    """
    if layer.disable_adapters:
        return "disabled"
    if layer.merged:
        return "merged"
    adapters = adapters_at_work(layer, names)
    if not adapters:
        return "no adapter is active"
    for adapter in adapters:
        if reason := adapter_obstacle(layer, adapter):
            return reason
        if len(adapters) > 1 and adapter in layer.lora_variant:
            return f"adapter {adapter!r} is DoRA and not the only one"
        if names is not None and layer.lora_bias.get(adapter, False):
            return f"adapter {adapter!r} has lora_bias and serves some rows only"
    dropouts = [dropout_of(layer, adapter, training) for adapter in adapters]
    if names is None and len(adapters) > 1 and any(dropouts):
        return f"{len(adapters)} adapters are active in training, each with a dropout of its own"
    if names is not None and any(p != dropouts[0] for p in dropouts):
        return "the rows' adapters have different dropouts"
    return base_obstacle(layer)


def adapter_obstacle(layer: Any, adapter: str) -> str | None:
    """What makes this adapter more than a LoRA or DoRA in two linear modules, or None."""
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        if variant != "DoraLinearVariant":
            return f"adapter {adapter!r} is {variant.removesuffix('LinearVariant')}"
        if is_watched(layer.lora_magnitude_vector[adapter]):
            return f"hooks of the magnitude of adapter {adapter!r} would not run"
    for module in (layer.lora_A[adapter], layer.lora_B[adapter]):
        if type(module) is not nn.Linear:
            return f"adapter {adapter!r} is made of {type(module).__name__}, expected nn.Linear"
        if type(module.weight) not in (nn.Parameter, Tensor):
            return f"the weights of adapter {adapter!r} are {type(module.weight).__name__}"
        if is_watched(module):
            return f"hooks of adapter {adapter!r} would not run"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout) or is_watched(dropout):
        return f"the dropout of adapter {adapter!r} is not plain"
    if type(dropout) is nn.Dropout and dropout.p >= 1:
        return f"the dropout of adapter {adapter!r} drops everything"
    return None


def base_obstacle(layer: Any) -> str | None:
    """What the op cannot read of the base layer, or None."""
    base = layer.base_layer
    kind = kind_of(base)
    if kind is None:
        return (
            f"its base layer is {type(base).__name__}, expected nn.Linear, Conv1D, or "
            "bitsandbytes' Linear4bit or Linear8bitLt"
        )
    if is_watched(base):
        return "hooks of its base layer would not run"
    if layer.fan_in_fan_out != (kind == "transposed"):
        return f"fan_in_fan_out is {layer.fan_in_fan_out} over {type(base).__name__}"
    weight = base.weight
    if kind == "nf4":
        state = getattr(weight, "quant_state", None)
        if state is None:
            return "its base weight is not quantized yet"
        if state.quant_type != "nf4":
            return f"its base weight is {state.quant_type}, expected nf4"
        if getattr(state, "packing_format_for_cpu", False):
            return "bitsandbytes has repacked its base weight for inference on a CPU"
        if tuple(state.shape) != (base.out_features, base.in_features):
            return "its base weight was quantized transposed"
        return None
    if kind == "int8":
        if base.state.has_fp16_weights:
            return "its base weight is quantized anew in each forward"
        if getattr(weight, "CB", None) is None and base.state.CB is None:
            return "its base weight is not quantized yet"
        return None
    if type(weight) not in (nn.Parameter, Tensor):
        # A DTensor: tensor-parallel or sharded, which the hooks around the layer see to.
        return f"its base weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"its base weight is {weight.dtype}, expected float16, bfloat16, float32 or float64"
    return None


def kind_of(base: Any) -> str | None:
    return _BASES.get((type(base).__module__, type(base).__name__))


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor only: a DTensor."""
    return type(tensor).__name__ == "DTensor"


def is_hooked(module: Any) -> bool:
    """Whether hooks of the module itself run when it is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_watched(module: Any) -> bool:
    """Whether calling the module does more than its class says; the op does not call it."""
    return is_hooked(module) or "forward" in module.__dict__


def rounds_twice(base: Any, x: Tensor) -> bool:
    """Whether an NF4 base and its adapter would be computed in two dtypes under autocast."""
    device = x.device.type
    if kind_of(base) != "nf4" or not torch.is_autocast_enabled(device):
        return False
    dtype = base.compute_dtype if base.compute_type_is_set else x.dtype
    return dtype is not None and dtype != torch.get_autocast_dtype(device)


def dropout_of(layer: Any, adapter: str, training: bool | None = None) -> float:
    """The probability with which the adapter's input is dropped now, or in training."""
    dropout = layer.lora_dropout[adapter]
    if type(dropout) is not nn.Dropout:
        return 0.0
    if training is None:
        training = dropout.training
        if adapter in layer.lora_variant:  # DoRA asks the layer as well
            training = training and layer.training
    return float(dropout.p) if training else 0.0


# --- what the op is given -------------------------------------------------------------------------


def weight_and_input(base: Any, x: Tensor) -> tuple[Any, Tensor]:
    """The base weight, and the input in the dtype that the layer computes in."""
    kind = kind_of(base)
    if kind == "dense":
        return base.weight, x
    if kind == "transposed":
        return base.weight.t(), x
    if kind == "int8":
        return Int8Weight.from_bitsandbytes(base), x
    # As Linear4bit.forward: without a compute_dtype, the first input's decides.
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    if base.compute_dtype is not None:
        x = x.to(base.compute_dtype)
    return NF4Weight.from_bitsandbytes(base.weight), x


def factors(layer: Any, adapters: list[str], *, stacked: bool) -> tuple[Tensor, Tensor, Any]:
    """a, b and scale: of one adapter, of several as one of their summed rank, or stacked."""
    down = [layer.lora_A[adapter].weight for adapter in adapters]
    up = [layer.lora_B[adapter].weight for adapter in adapters]
    scales = [layer.scaling[adapter] for adapter in adapters]
    if stacked:
        rank = max(a.shape[0] for a in down)
        a = torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a in down])
        pairs = zip(up, scales, strict=True)
        return a, torch.stack([pad(b * s, (0, rank - b.shape[1])) for b, s in pairs]), 1.0
    if len(adapters) > 1:
        return torch.cat(down), torch.cat([b * s for b, s in zip(up, scales, strict=True)], 1), 1.0
    return down[0], up[0], scales[0]


def whole_bias(layer: Any, adapters: list[str], weight: Any, x: Tensor) -> Tensor | None:
    """The bias of the base and those of the adapters, which their scales multiply."""
    bias: Tensor | None = layer.base_layer.bias
    for adapter in adapters:
        extra = layer.lora_B[adapter].bias
        if extra is not None:
            extra = extra * layer.scaling[adapter]
            bias = extra if bias is None else bias + extra
    if bias is None:
        return None
    return bias.to(weight.dtype if isinstance(weight, Tensor) else x.dtype)
