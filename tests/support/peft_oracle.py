"""PEFT's own unmerged model in fp64: the oracle that merged and swapped adapters are held against.

It loads with plain transformers and PEFT, and shares no code with mmopt_export.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load_plain(model: Path) -> Any:
    """The base as transformers loads it, in fp32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(model, dtype=torch.float32).eval()


def unmerged(model: Path, adapter: Path) -> Any:
    """The `PeftModel` of a base and an adapter, in fp64."""
    import peft

    loaded = peft.PeftModel.from_pretrained(load_plain(model), adapter, torch_device="cpu")
    return loaded.eval().double()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    """The logits in fp64 of a model, which is fp64 afterwards."""
    doubled = {
        key: value.double() if torch.is_floating_point(value) else value
        for key, value in inputs.items()
    }
    with torch.no_grad():
        result: torch.Tensor = model.double().eval()(**doubled).logits
    return result


def merged_and_unmerged(
    model: Path, adapters: Sequence[Path], **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of mmopt's merged model, of PEFT's unmerged one, and of the base alone, all in fp64.

    The oracle knows one adapter; give several one by one.
    """
    from mmopt_export.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(str(model), adapters=[str(one) for one in adapters], adapt="merge")
    assert next(checkpoint.model.parameters()).dtype == torch.float32
    return (
        logits(checkpoint.model, **inputs),
        logits(unmerged(model, adapters[0]), **inputs),
        logits(load_plain(model), **inputs),
    )
