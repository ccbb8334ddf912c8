"""The KV cache of a decoder's Part: its names, and its buffers on the oracle's side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from mmopt_export.manifest import CacheMap
from mmopt_export.runtime import Tensors


def new_cache_map(layers: int, heads: int, head_size: int) -> CacheMap:
    """The cache of a decoder that is traced, fp32, under transformers' usual names."""
    return CacheMap(
        layers=tuple(
            (
                f"past_key_values.{layer}.key",
                f"past_key_values.{layer}.value",
                f"present.{layer}.key",
                f"present.{layer}.value",
            )
            for layer in range(layers)
        ),
        heads=heads,
        head_size=head_size,
        dtype="float32",
    )


def pasts(cache: CacheMap) -> list[str]:
    """The graph's inputs: key and value by layer."""
    return [past for layer in cache.layers for past in layer[:2]]


def presents(cache: CacheMap) -> list[str]:
    """The graph's outputs: key and value by layer."""
    return [present for layer in cache.layers for present in layer[2:]]


def padded(lengths: Sequence[int], side: str) -> list[list[int]]:
    """A mask for rows of such lengths, padded on the `left` or the `right`."""
    most = max(lengths)
    rows = [([1] * length, [0] * (most - length)) for length in lengths]
    return [real + pad if side == "right" else pad + real for real, pad in rows]


def read_row(
    cache: CacheMap, buffers: dict[str, Tensor], row: int, tokens: int, head_size: int
) -> DynamicCache:
    """One row's first `tokens`, and of their heads as much as the model has, as its own cache."""
    # Without a configuration: a sliding layer would drop what the buffers keep.
    one = slice(row, row + 1)
    return DynamicCache(
        [
            (buffers[key][one, :, :tokens, :head_size], buffers[value][one, :, :tokens, :head_size])
            for key, value, _, _ in cache.layers
        ]
        if tokens
        else None
    )


def fill_presents(cache: CacheMap, rows: Sequence[Cache], capacity: int) -> dict[str, Tensor]:
    """What rows hold as the graph's outputs, zero beyond a row's tokens and its heads' size."""
    outputs = {}
    for layer, (_, _, *names) in enumerate(cache.layers):
        for name, side in zip(names, ("keys", "values"), strict=True):
            buffer = torch.zeros(len(rows), cache.heads, capacity, cache.head_size)
            for row, held in enumerate(rows):
                states: Any = getattr(held.layers[layer], side)
                _, _, tokens, size = states.shape
                buffer[row, :, :tokens, :size] = states[0]
            outputs[name] = buffer
    return outputs


def valid_presents(cache: CacheMap, lengths: npt.NDArray[Any], capacity: int) -> Tensors:
    """`Part.valid` of the graph's buffers: the rows up to each row's tokens."""
    held = np.arange(capacity) < lengths[:, None]
    held = np.broadcast_to(held[:, None], (len(lengths), cache.heads, capacity))
    return dict.fromkeys(presents(cache), held)
