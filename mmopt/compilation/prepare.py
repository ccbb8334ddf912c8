"""What a model computes on the host from its batch, computed before its graph runs.

Qwen2.5-VL and its like take images of any size, flattened, and a grid per image. How many windows
there are, which patch is in which, and the position of each token are numbers that the host must
know. transformers takes them as arguments too.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmopt.attach.optimize import transformers_model

_GRID = "_grid_thw"


def prepared(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, with what the model would compute from its grids.

    Args:
        batch: keyword arguments of the model's forward, as a processor returns them. What is
            there already stays as it is.
    """
    made = dict(batch)
    modalities = [
        name.removesuffix(_GRID)
        for name, value in batch.items()
        if name.endswith(_GRID) and isinstance(value, Tensor)
    ]
    if not modalities:
        return made
    from transformers import PreTrainedModel
    from transformers.exporters.utils import precompute_export_inputs

    with torch.no_grad():
        base = transformers_model(model)
        towers = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
        for tower in towers:
            if "grid_thw" not in inspect.signature(tower.forward).parameters:
                continue
            for modality in modalities:
                grid = batch[f"{modality}{_GRID}"]
                computed: dict[str, Any] = {"grid_thw": grid}
                precompute_export_inputs(tower, computed)
                del computed["grid_thw"]
                for name, value in computed.items():
                    if isinstance(value, Tensor):
                        value = value.to(grid.device)
                    if value is not None:
                        made.setdefault(f"{modality}_{name}", value)
        if made.get("position_ids") is None and made.get("cache") is None:
            _add_positions(towers, made)
    return made


def _add_positions(towers: list[Any], made: dict[str, Any]) -> None:
    """The positions of text and images, by the method that the model itself would call."""
    for tower in towers:
        if not hasattr(tower, "compute_3d_position_ids"):
            continue
        compute = tower.compute_3d_position_ids
        asked = dict.fromkeys(inspect.signature(compute).parameters)
        found = compute(**{name: made.get(name) for name in asked if name != "kwargs"})
        if found is not None:
            made["position_ids"] = found
        return
