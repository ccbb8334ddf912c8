"""Merges adapters into the weights in fp32, module by module.

Several adapters add up: the merged weight is W + w1 * d1 + w2 * d2, each d what that adapter alone
changes on the base. Only a plain LoRA's d does not depend on the weight it is added to, so at most
one adapter may be of another kind; it is merged first, onto the base that it was trained against,
and with weight 1.
"""

import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmopt_export.adapters.attach import ADAPTER, adapter_scales, attach_adapter, method_name
from mmopt_export.adapters.fit import BaseFacts, read_config, whole_names
from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.checkpoint import finite, quiet_transformers, weights_sha256
from mmopt_kernels.errors import CheckFailedError, InputError, one_line

# PEFT's methods whose merged weights give what the unmerged model gives: each is held against it
# in tests/export/test_adapters_methods.py.
METHODS = (
    "LORA",
    "ADALORA",
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "OSF",
    "PEANUT",
    "PSOFT",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
)

# Settings of a LoRA under which what it changes depends on the base weight, and why.
_NOT_PLAIN = {
    "use_dora": "DoRA scales the whole base weight to its magnitudes",
    "kasa_config": "KaSA takes a part of the base weight away first",
    "trainable_token_indices": "it replaces rows of the embedding",
}
# Starts of a LoRA that leave the base weight as it is.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Settings of a LoRA under which it is not one change of a weight for every input.
_PER_INPUT = {
    "alora_invocation_tokens": "an activated LoRA starts at a token of the input",
    "arrow_config": "Arrow routes each token to other adapters",
}


@dataclass(frozen=True)
class Merged:
    """A plain model that has its adapters in its weights.

    Attributes:
        model: of the base's class, fp32.
        records: for the manifest, one per adapter in the order given.
        whole: the base's parameters that an adapter carries whole.
        warnings: for the user.
    """

    model: Any
    records: tuple[dict[str, Any], ...]
    whole: set[str]
    warnings: tuple[str, ...]


def merge_adapters(
    base: Any, adapters: Sequence[tuple[AdapterSpec, Path]], *, absent: Sequence[str] = ()
) -> Merged:
    """Merge adapters into `base`, which is changed in place.

    Memory stays at the model plus two of its largest target weights, and, where several adapters
    or weights other than 1 meet parameters that they carry whole, a copy of those.

    Args:
        base: a plain fp32 model.
        adapters: each with its local folder.
        absent: the base's parameters that have no values of their own yet, such as a new head.

    Raises:
        InputError: an adapter that is of another base, that cannot be merged, or that cannot be
            weighted or combined; named with the reason.
        CheckFailedError: the merged weights are not finite.
    """
    configs = [read_config(folder) for _, folder in adapters]
    facts = BaseFacts.of(base)
    weighted = len(adapters) > 1 or adapters[0][0].weight != 1
    names = [whole_names(folder, facts) if weighted else set[str]() for _, folder in adapters]
    kept = set[str]().union(*names)
    pristine = {key: value.clone() for key, value in base.state_dict().items() if key in kept}
    records: dict[int, dict[str, Any]] = {}
    givers: dict[str, Path] = {}  # of parameters that the base has no values for
    notes: list[str] = []
    model, whole = base, set[str]()
    for index in _order(adapters, configs):
        spec, folder = adapters[index]
        current = _values(model, names[index])
        attached = attach_adapter(model, folder)
        for name in sorted(attached.whole & set(absent)):
            if name in givers:
                raise InputError(
                    f"{givers[name]} and {folder} both carry {name}, which the base has not, so "
                    "there is nothing that their changes could be added to. Pass one of them."
                )
            givers[name] = folder
        if weighted and (renamed := attached.whole - names[index]):
            raise InputError(
                f"{folder} carries {min(renamed)} under a name of an older transformers, so it "
                "cannot be weighted. Load it with PEFT and save it again."
            )
        records[index] = {
            "path": str(folder),
            "sha256": weights_sha256(folder),
            "method": attached.method,
            "weight": spec.weight,
            "scale": adapter_scales(attached.model),
            "whole": sorted(attached.whole),
        }
        whole |= attached.whole
        notes += attached.warnings
        if spec.weight != 1:
            _scale(attached.model, spec.weight)
        replaced = _values(attached.model.get_base_model(), names[index] - set(absent))
        model = merge_adapter(attached.model)
        _add_whole(model, replaced, current, pristine, spec.weight)
    model.requires_grad_(False)
    return Merged(model, tuple(records[index] for index in sorted(records)), whole, tuple(notes))


def merge_adapter(model: Any) -> Any:
    """Merge the adapter of a `PeftModel` into its base, in place, and return the plain model.

    A target whose weight is tied to another layer's gets one of its own: the adapter changes that
    target alone.

    Raises:
        InputError: PEFT cannot merge it.
        CheckFailedError: the merged weights are not finite.
    """
    untied = _untie_targets(model)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload(safe_merge=False)
    except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        method = getattr(model.active_peft_config, "peft_type", "")
        raise InputError(
            f"PEFT {importlib.metadata.version('peft')} cannot merge this {method} adapter into a "
            f"{type(model.get_base_model()).__name__}: {one_line(error)}"
        ) from error
    if untied:
        merged.config.tie_word_embeddings = False
        merged.config.get_text_config().tie_word_embeddings = False
    for name, value in merged.named_parameters():
        if not finite(value):
            raise CheckFailedError(
                f"merging the adapter made {name} NaN or Inf. Check the adapter's training."
            )
    return merged


def _order(
    adapters: Sequence[tuple[AdapterSpec, Path]], configs: Sequence[dict[str, Any]]
) -> list[int]:
    """The order of merging: first the one adapter that is not a plain LoRA, if any.

    Raises:
        InputError: an adapter that cannot be merged, weighted or combined.
    """
    special = []
    for index, ((spec, folder), config) in enumerate(zip(adapters, configs, strict=True)):
        require_mergeable(folder, config)
        reason = _base_dependent(config)
        if reason is None:
            continue
        special.append(index)
        method = method_name(config)
        if spec.weight != 1:
            raise InputError(
                f"{folder} is a {method} adapter and cannot be weighted by {spec.weight}: "
                f"{reason}, so what it changes is no difference that could be scaled. Give it "
                "weight 1."
            )
        if len(special) > 1:
            other, with_it = adapters[special[0]][1], method_name(configs[special[0]])
            raise InputError(
                f"{folder} ({method}) cannot be merged with {other} ({with_it}): {reason}, so each "
                "was trained on a base that the other changes. Pass one of them; plain LoRAs may "
                "be added to it."
            )
    return special + [index for index in range(len(adapters)) if index not in special]


def require_mergeable(folder: Path, config: dict[str, Any]) -> None:
    """Raise InputError for a method or a setting that no merged weight can stand for."""
    if config["peft_type"] not in METHODS:
        raise InputError(
            f"{folder} is a {config['peft_type']} adapter, whose merge has not been shown to give "
            f"what the adapter gives; expected one of {', '.join(METHODS)}."
        )
    if config.get("layer_replication"):
        raise InputError(
            f"{folder} has layer_replication: layers share one weight and change it differently, "
            "so there is no one weight to merge into."
        )
    for setting, why in _PER_INPUT.items():
        if config.get(setting):
            raise InputError(
                f"{folder} has {setting} and cannot be merged: {why}, which no weight can stand "
                "for. Train a LoRA without it."
            )


def _base_dependent(config: dict[str, Any]) -> str | None:
    """Why what this adapter changes depends on the weight that it is added to; None if not."""
    if config["peft_type"] != "LORA":
        return f"{config['peft_type']} is merged by PEFT onto the base as it was in training"
    for setting, why in _NOT_PLAIN.items():
        if config.get(setting):
            return why
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        return f"its start ({start}) takes a part of the base weight away first"
    return None


def _scale(model: Any, weight: float) -> None:
    """Multiply what a plain LoRA changes."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
            module.scaling[ADAPTER] *= weight


def _values(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Copies of parameters and buffers, by the base's names, with or without PEFT around them."""
    found = {}
    for key, value in model.state_dict().items() if names else ():
        if ".original_module." in key:
            continue
        name = key.replace(f".modules_to_save.{ADAPTER}.", ".").replace(".base_layer.", ".")
        if name in names:
            found[name] = value.clone()
    return found


def _add_whole(
    model: nn.Module,
    replaced: dict[str, Tensor],
    current: dict[str, Tensor],
    pristine: dict[str, Tensor],
    weight: float,
) -> None:
    """Make of parameters that an adapter replaced a weighted change like any other.

    Args:
        replaced: what the adapter carries.
        current: what the model had before, with the changes of other adapters.
        pristine: what the base has.
    """
    state = model.state_dict()
    # All of them before any is written: tied parameters share their memory.
    sums = {
        # The first difference is what the adapter's own LoRA added to what it carries.
        name: current[name] + (state[name] - value) + weight * (value - pristine[name])
        for name, value in replaced.items()
        if value.is_floating_point()
    }
    for name, value in sums.items():
        state[name].copy_(value)


def _untie_targets(model: Any) -> bool:
    """Give each target its own weight where another layer shares it; return whether one did."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(
        id(value)
        for module in model.modules()
        for value in module._parameters.values()
        if value is not None
    )
    untied = False
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        for name, value in list(base._parameters.items()):
            if value is not None and owners[id(value)] > 1:
                setattr(base, name, nn.Parameter(value.detach().clone(), requires_grad=False))
                untied = True
    return untied
