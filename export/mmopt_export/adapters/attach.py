"""Puts a PEFT adapter on its base, having checked that it belongs there."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmopt_export.adapters.fit import (
    PREFIX,
    BaseFacts,
    foreign,
    misfits,
    read_config,
    whole_names,
)
from mmopt_export.checkpoint import quiet_transformers
from mmopt_kernels.errors import InputError, one_line

ADAPTER = "default"
"""What an adapter is called in a `PeftModel`, whatever it is called elsewhere."""


@dataclass(frozen=True)
class Attached:
    """An adapter on its base.

    Attributes:
        model: the `PeftModel`; its adapter is called `default` and is active.
        folder: of the adapter.
        config: its `adapter_config.json`.
        whole: the base's parameters that it carries whole, such as a classification head.
        warnings: for the user.
    """

    model: Any
    folder: Path
    config: dict[str, Any]
    whole: set[str]
    warnings: tuple[str, ...]

    @property
    def method(self) -> str:
        """PEFT's name of the method, `DORA` for a LoRA that is one."""
        return method_name(self.config)


def attach_adapter(base: Any, folder: Path, *, only: str | None = None) -> Attached:
    """Load the adapter in `folder` onto `base`, in the base's dtype.

    Args:
        base: a plain model, which PEFT changes in place.
        only: the one method that is wanted, by PEFT's name.

    Raises:
        InputError: no adapter of weights, damaged weights, or keys that the base does not have:
            they are named, because they tell which base the adapter was trained on.
    """
    config = read_config(folder)
    if only is not None and config["peft_type"] != only:
        raise InputError(f"{folder} is a {config['peft_type']} adapter, expected {only}.")
    facts = BaseFacts.of(base)  # before PEFT changes it
    faults = misfits(folder, facts)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is checked here
            model, unused, absent = _load(base, folder)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if faults:
            raise foreign(folder, facts, faults) from error
        raise InputError(
            f"PEFT cannot load {folder} onto {facts.name}: {one_line(error)}"
        ) from error
    if unused or absent:
        faults = faults or [
            *(f"{key} (unused)" for key in unused),
            *(f"{key} (not in the adapter)" for key in absent),
        ]
        raise foreign(folder, facts, faults)
    return Attached(
        model=model,
        folder=folder,
        config=config,
        whole=whole_names(folder, facts) | _saved_modules(model),
        warnings=_dead(model, folder),
    )


def method_name(config: dict[str, Any]) -> str:
    """PEFT's name of the method, `DORA` for a LoRA that is one."""
    return "DORA" if config.get("use_dora") else str(config["peft_type"])


def adapter_scales(model: Any, adapter: str = ADAPTER) -> dict[str, float]:
    """The scale of a LoRA per module: alpha / rank, or rsLoRA's alpha / sqrt(rank)."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): float(module.scaling[adapter])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


def _load(base: Any, folder: Path) -> tuple[Any, list[str], list[str]]:
    """The `PeftModel`, the keys that it has no place for, and those that the folder lacks."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    # In the base's dtype; PEFT's default is fp32 on any base.
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    result = model.load_adapter(
        folder,
        ADAPTER,
        torch_device="cpu",
        autocast_adapter_dtype=False,
        key_mapping=getattr(base, "_checkpoint_conversion_mapping", None),
    )
    # Some methods share one tensor between layers, under a name each, and store it once.
    absent = set(result.missing_keys)
    loaded = {
        id(value)
        for key, value in model.named_parameters(remove_duplicate=False)
        if key not in absent
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lost = [key for key in result.missing_keys if id(parameters.get(key)) not in loaded]
    return model.eval(), list(result.unexpected_keys), lost


def _saved_modules(model: Any) -> set[str]:
    """The base's names of what PEFT's modules_to_save hold."""
    from peft.utils import ModulesToSaveWrapper

    return {
        f"{name.removeprefix(PREFIX)}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key in module.modules_to_save[ADAPTER].state_dict()
    }


def _dead(model: Any, folder: Path) -> tuple[str, ...]:
    """Warnings for a LoRA that changes nothing: a layer's B and an embedding's A start at zero."""
    notes = []
    for every, some, factors in (
        ("B", "Bs", _factors(model, ".lora_B.")),
        ("A of an embedding", "As of embeddings", _factors(model, ".lora_embedding_A.")),
        ("B of an embedding", "Bs of embeddings", _factors(model, ".lora_embedding_B.")),
    ):
        zero = sum(not bool(torch.count_nonzero(value)) for value in factors)
        if zero:
            all_of_them = zero == len(factors)
            what = f"every {every} is" if all_of_them else f"{zero} of {len(factors)} {some} are"
            notes.append(f"{folder}: {what} zero, so there it changes nothing. Check its training.")
    return tuple(notes)


def _factors(model: Any, kind: str) -> list[torch.Tensor]:
    """The matrices of a LoRA of one kind; those of layers are modules, which may have a bias."""
    return [
        value
        for key, value in model.named_parameters()
        if kind in key and not key.endswith(".bias")
    ]
