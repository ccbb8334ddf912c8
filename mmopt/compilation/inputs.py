"""Made-up batches for models that read text, images or both."""

import inspect
from typing import Any

import torch

from mmopt_kernels.errors import InputError


def example_batch(
    base: Any, *, batch: int, length: int, train: bool, seed: int = 0
) -> dict[str, Any]:
    """Random inputs that fit the model's config.

    Args:
        base: a `PreTrainedModel`.
        batch: sequences and images.
        length: tokens per sequence. Every second sequence is padded to it at the right, so that
            masks are at work.
        train: add the labels of a causal language model.
        seed: of the random numbers.

    Returns:
        Keyword arguments of the model's forward: int64 `input_ids` and `attention_mask` `[B, L]`,
        float32 `pixel_values` `[B, C, H, W]`, whichever it reads.

    Raises:
        InputError: the model reads something else, or not so many tokens.
    """
    parameters = inspect.signature(base.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    if "input_ids" in parameters:
        text = base.config.get_text_config()
        most = getattr(text, "max_position_embeddings", length)
        if not 2 <= length <= most:
            raise InputError(
                f"the length is {length}, expected 2 to {most}, the positions that "
                f"{type(base).__name__} has. Pass another --length."
            )
        # The low ids are special tokens (padding, start, end) in most vocabularies.
        first = min(5, text.vocab_size - 1)
        made["input_ids"] = torch.randint(
            first, text.vocab_size, (batch, length), generator=generator
        )
        keep = torch.ones(batch, length, dtype=torch.int64)
        for row in range(1, batch, 2):
            keep[row, max(1, length * 3 // 4) :] = 0
        made["attention_mask"] = keep
        if "use_cache" in parameters:
            made["use_cache"] = False
        if train and "labels" in parameters and type(base).__name__.endswith("ForCausalLM"):
            made["labels"] = made["input_ids"].masked_fill(keep == 0, -100)
    vision = getattr(base.config, "vision_config", base.config)
    if "pixel_values" in parameters and getattr(vision, "image_size", None):
        size = vision.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        made["pixel_values"] = torch.randn(
            batch, getattr(vision, "num_channels", 3), height, width, generator=generator
        )
    if base.main_input_name not in made:
        raise InputError(
            f"{type(base).__name__} reads {base.main_input_name}, expected input_ids or "
            "pixel_values, the inputs that can be made up. Call mmopt.compile with your own batch."
        )
    if train and "return_loss" in parameters:
        made["return_loss"] = True
    return made
