"""Puts a PEFT adapter on its base, having checked that it belongs there, and merges it in."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mmopt_export.checkpoint import check_weights, quiet_transformers
from mmopt_kernels.errors import CheckFailedError, InputError, one_line

_PREFIX = "base_model.model."


def attach_adapter(base: Any, folder: Path) -> tuple[Any, set[str]]:
    """Load the LoRA adapter in `folder` onto `base`.

    Returns:
        The `PeftModel`, and the names of the base parameters that the adapter carries whole
        (PEFT's modules_to_save), such as a classification head.

    Raises:
        InputError: not a LoRA, damaged weights, or keys that the base does not have: they are
            named, because they tell which base the adapter was trained on.
    """
    from peft import PeftModel

    method = _adapter_config(folder).get("peft_type")
    if method != "LORA":
        raise InputError(f"{folder} is a {method} adapter, expected LORA.")
    check_weights(folder)
    whole = _check_fit(base, folder)
    try:
        with quiet_transformers():
            # In the base's dtype; PEFT's default is fp32 on any base.
            model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(
            f"PEFT cannot load {folder} onto {type(base).__name__}: {one_line(error)}"
        ) from error
    return model, whole


def merge_adapter(model: Any) -> Any:
    """Merge the active adapter into the base weights in fp32 and return the plain model.

    Raises:
        CheckFailedError: the merged weights are not finite.
    """
    merged = model.merge_and_unload(safe_merge=False)
    for name, value in merged.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise CheckFailedError(
                f"merging the adapter made {name} NaN or Inf. Check the adapter's training."
            )
    return merged


def adapter_scales(model: Any) -> dict[str, float]:
    """The scale of the active adapter per module, alpha / rank or rsLoRA's alpha / sqrt(rank)."""
    from peft.tuners.lora import LoraLayer

    adapter = model.active_adapter
    return {
        name.removeprefix(_PREFIX): float(module.scaling[adapter])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object.")
    return config


def _check_fit(base: Any, folder: Path) -> set[str]:
    """Hold every key and shape of the adapter against the base; return what it carries whole."""
    modules = dict(base.named_modules())
    parameters = base.state_dict()
    whole: set[str] = set()
    faults = []
    for key, shape in _shapes(folder).items():
        name = key.removeprefix(_PREFIX)
        path, _, kind = name.partition(".lora_")
        if not kind:  # carried whole
            if name not in parameters:
                faults.append(f"{key} (the base has no {name})")
            elif tuple(parameters[name].shape) != shape:
                faults.append(f"{key} {shape} (the base has {tuple(parameters[name].shape)})")
            whole.add(name)
            continue
        module = modules.get(path)
        if module is None:
            faults.append(f"{key} (the base has no {path})")
            continue
        # lora_A is [rank, in], lora_B is [out, rank].
        side, expected = (1, "in_features") if kind.startswith("A") else (0, "out_features")
        size = getattr(module, expected, None)
        if kind[0] in "AB" and size is not None and shape[side] != size:
            faults.append(f"{key} {shape} (the base's {path} has {expected} {size})")
    if faults:
        rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(
            f"{folder} was trained on another base than this {type(base).__name__}: "
            f"{'; '.join(faults[:3])}{rest}. Pass the model that it was trained on."
        )
    return whole


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                shapes[key] = tuple(file.get_slice(key).get_shape())
    return shapes
