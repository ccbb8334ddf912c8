"""What an adapter folder holds, and whether a base has what it was trained on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from mmopt_export.checkpoint import check_weights
from mmopt_kernels.errors import InputError

PREFIX = "base_model.model."

# Each pair of a method and why its adapters leave no weight to change.
_NOT_WEIGHTS = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"),
        "it puts learned vectors before the input's and changes no weight",
    ),
    **dict.fromkeys(
        ("PREFIX_TUNING", "CARTRIDGE"),
        "it puts learned keys and values before every layer's and changes no weight",
    ),
    "ADAPTION_PROMPT": "it adds attention over learned vectors and changes no weight",
    **dict.fromkeys(
        ("XLORA", "POLY"), "it weighs its parts by the input, so there is no one weight to add"
    ),
}


@dataclass(frozen=True)
class BaseFacts:
    """What a base had before PEFT changed it.

    Attributes:
        name: its class.
        modules: by path.
        shapes: of its parameters and buffers, by name.
    """

    name: str
    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, base: nn.Module) -> "BaseFacts":
        """Those of a plain model."""
        shapes = {key: tuple(value.shape) for key, value in base.state_dict().items()}
        return cls(type(base).__name__, dict(base.named_modules()), shapes)


def read_config(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of `folder`, whose `peft_type` says which method it is.

    Raises:
        InputError: not JSON, no PEFT adapter, one whose method changes no weights, or damaged
            weights.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object.")
    method = config.get("peft_type")
    if method is None and isinstance(config.get("config"), dict):
        raise InputError(
            f"{folder} is a bottleneck adapter of the library adapters: it puts a non-linear layer "
            "behind each block, which no weight of the base can stand for. Expected a PEFT adapter."
        )
    if not isinstance(method, str):
        raise InputError(f"{path} has no peft_type, so it is no PEFT adapter.")
    if reason := _NOT_WEIGHTS.get(method):
        raise InputError(
            f"{folder} is a {method} adapter, which cannot be merged or swapped: {reason}. "
            "Train a LoRA instead."
        )
    check_weights(folder)
    return config


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in an adapter folder, by key."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                shapes[key] = tuple(file.get_slice(key).get_shape())
    return shapes


def whole_names(folder: Path, base: BaseFacts) -> set[str]:
    """The base's parameters that the adapter carries whole: heads, biases, embeddings."""
    names = {base_name(key) for key in stored_shapes(folder)}
    return names & set(base.shapes)


def misfits(folder: Path, base: BaseFacts) -> list[str]:
    """The adapter's keys that the base has no place or another size for, each with the reason."""
    faults = []
    for key, shape in stored_shapes(folder).items():
        name = base_name(key)
        path, _, kind = name.partition(".lora_")
        if kind:
            module = base.modules.get(path)
            if module is None:
                faults.append(f"{key} (the base has no {path})")
            elif fault := _lora_fault(module, kind, shape):
                faults.append(f"{key} {shape} (the base's {path} has {fault})")
        elif name in base.shapes:
            if base.shapes[name] != shape:
                faults.append(f"{key} {shape} (the base has {base.shapes[name]})")
        elif not _owner(name, base):
            faults.append(f"{key} (the base has no {name})")
    return faults


def foreign(folder: Path, base: BaseFacts, faults: list[str]) -> InputError:
    """The error for an adapter that does not fit: it names keys, which tell what it was for."""
    rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return InputError(
        f"{folder} was trained on another base than this {base.name}: "
        f"{'; '.join(faults[:3])}{rest}. Pass the model that it was trained on."
    )


def base_name(key: str) -> str:
    """The key as the base would name it: PEFT wraps a target and calls it `base_layer`."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _owner(name: str, base: BaseFacts) -> bool:
    """Whether some module that the base has owns this key: `x.hada_w1_a` belongs to `x`."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in base.modules for end in range(len(parts) - 1, 0, -1))


def _lora_fault(module: nn.Module, kind: str, shape: tuple[int, ...]) -> str | None:
    # lora_A is [rank, in], lora_B is [out, rank]; of an embedding [rank, rows] and [width, rank].
    side = 1 if kind.startswith(("A", "embedding_A")) else 0
    names = ("in_features", "out_features")
    if kind.startswith("embedding"):
        names = ("num_embeddings", "embedding_dim")
    elif not kind.startswith(("A", "B")) or isinstance(module, nn.modules.conv._ConvNd):
        return None
    name = names[0] if side == 1 else names[1]
    size = getattr(module, name, None)
    if not isinstance(size, int):
        return None
    # Another number of dimensions is as foreign as another size.
    return f"{name} {size}" if len(shape) <= side or shape[side] != size else None
