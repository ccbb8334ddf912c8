"""What the tasks that read text share: the tokenizer's inputs, their limits, and samples."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmopt_export.parity import RANDOM
from mmopt_export.runtime import Tensors
from mmopt_export.texts import read_class_labels, read_texts
from mmopt_kernels.errors import InputError

# What a tokenizer gives that a text encoder may take; all int64 [batch, sequence].
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
AXES = {0: "batch", 1: "sequence"}
BATCH = 32  # real texts that parity runs at once
_MAX_TEXTS = 256  # texts that parity reads of the calibration file: 8 batches
# Of the longest random row, since what was traced at a few tokens may be something else at many;
# more would take eager attention gigabytes.
_LONG_ROW = 1024
_NO_LIMIT = 1 << 20  # transformers writes 1e30 for a tokenizer without a limit


def require_tokenizer(model: Any, tokenizer: Any, *, padding: bool = True) -> None:
    """Raise InputError unless there is a tokenizer, one that can pad where that is asked for.

    Likewise where attention is block-sparse: traced at a few tokens it is dense.
    """
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise InputError(
            f"the {type(model).__name__} has block-sparse attention, which its graph would lose. "
            'Set attention_type to "original_full" in config.json to export dense attention.'
        )
    if tokenizer is None:
        raise InputError(
            f"the {type(model).__name__} has no tokenizer. Save one beside it with save_pretrained."
        )
    if padding and tokenizer.pad_token_id is None:
        raise InputError(
            f"the tokenizer of the {type(model).__name__} has no padding token, expected one: "
            "texts of a batch have different lengths. Set pad_token and save it again."
        )


def text_inputs(model: Any, tokenizer: Any) -> list[str]:
    """The inputs of the graph: what the tokenizer gives and the model's forward takes."""
    accepted = inspect.signature(model.forward).parameters
    given = (*tokenizer.model_input_names, "attention_mask")
    return [name for name in _INPUTS if name in accepted and name in given]


def example_inputs(inputs: Sequence[str], *, vocabulary: int, longest: int) -> dict[str, Tensor]:
    """Inputs to trace with, int64 `[2, L]`."""
    length = min(16, longest)
    ids = torch.arange(2 * length).reshape(2, length) % vocabulary
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return {name: values[name] for name in inputs}


def longest_text(model: Any, tokenizer: Any) -> int:
    """Tokens that fit: the fewer of what the tokenizer was made for and the position table has.

    Raises:
        InputError: neither says how many.
    """
    limits = [tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa and its relatives count positions from behind the padding id.
        paddings = [
            module.padding_idx
            for name, module in model.named_modules()
            if name.endswith(".position_embeddings") and isinstance(module, torch.nn.Embedding)
        ]
        offset = next((index + 1 for index in paddings if index is not None), 0)
        limits.append(positions - offset)
    longest = int(min(limits))
    if longest > _NO_LIMIT:
        raise InputError(
            "neither the tokenizer nor the config says how long a text may be. Set the "
            "tokenizer's model_max_length and save it again."
        )
    return longest


def write_tokenizer(tokenizer: Any, folder: Path, longest: int, *, fixed: bool = False) -> None:
    """Save the tokenizer with padding and truncation fixed, so that serving needs no more.

    Args:
        longest: tokens that are kept of a text.
        fixed: whether every text is padded to that length; else to the longest of its batch.
    """
    tokenizer.save_pretrained(folder)
    fast = tokenizer.backend_tokenizer
    fast.enable_truncation(max_length=longest)
    fast.enable_padding(
        length=longest if fixed else None,
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    fast.save(str(folder / "tokenizer.json"))


def calibration_texts(path: Path | None) -> list[str]:
    """The first texts of a calibration file; none without one."""
    return read_texts(path).texts[:_MAX_TEXTS] if path is not None else []


def calibration_labels(path: Path | None, names: Sequence[str]) -> list[int] | None:
    """Of each of those texts the index of its label, or -1; None where there are no labels.

    Raises:
        InputError: a label is none of `names`.
    """
    return read_class_labels(path, names, limit=_MAX_TEXTS) if path is not None else None


def text_samples(
    tokenizer: Any,
    inputs: Sequence[str],
    texts: Sequence[str],
    *,
    vocabulary: int,
    longest: int,
    labels: Sequence[int] | None = None,
) -> Iterator[tuple[str, Tensors, Tensors]]:
    """Batches of parity: random ids over batch, length and padding, then real texts.

    Args:
        labels: of each text the index of its label, or -1, for the output `logits`.
    """
    for feeds in random_ids(
        inputs, vocabulary=vocabulary, pad_id=tokenizer.pad_token_id, longest=longest
    ):
        yield RANDOM, feeds, {}
    # Sorted by length, so that little of a batch is padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        feeds = encode(tokenizer, [texts[index] for index in chosen], inputs, longest=longest)
        right = {"logits": np.array([labels[index] for index in chosen])} if labels else {}
        yield "text", feeds, right


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    inputs: Sequence[str],
    *,
    longest: int,
    fixed: bool = False,
) -> Tensors:
    """The graph's inputs for a batch of texts, int64 `[B, L]`.

    Args:
        longest, fixed: as in `write_tokenizer`.
    """
    encoded = tokenizer(
        list(texts),
        padding="max_length" if fixed else True,
        truncation=True,
        max_length=longest,
        return_tensors="np",
    )
    return {name: encoded[name].astype(np.int64) for name in inputs}


def random_ids(
    inputs: Sequence[str], *, vocabulary: int, pad_id: int, longest: int
) -> list[Tensors]:
    """Seeded random ids over batch, length and padding on either side, awkward sizes included."""
    generator = np.random.default_rng(0)
    grid = []
    shapes = ((1, 1, "right"), (1, 17, "right"), (3, 33, "right"), (3, 33, "left"))
    for batch, length, side in (*shapes, (2, 128, "right"), (1, _LONG_ROW, "right")):
        length = min(length, longest)
        lengths = generator.integers(1, length + 1, size=batch)
        lengths[0] = length
        mask = np.arange(length)[None, :] < lengths[:, None]
        if side == "left":
            mask = mask[:, ::-1]
        ids = np.where(mask, generator.integers(0, vocabulary, (batch, length)), pad_id)
        columns = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
        }
        grid.append({name: columns[name].astype(np.int64) for name in inputs})
    return grid
