"""A decoder's buffers on the oracle's side: which of their rows mean something, row by row."""

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from mmopt_export.caches import (
    fill_presents,
    new_cache_map,
    padded,
    pasts,
    presents,
    read_row,
    valid_presents,
)

# Heads of 8 hold a model's of 6, as where ONNX Runtime wants a multiple of 8.
CACHE = new_cache_map(layers=2, heads=3, head_size=8)
SIZE = 6


def held(tokens: int, seed: int) -> DynamicCache:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, CACHE.heads, tokens, SIZE)
    layers = [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in CACHE.layers
    ]
    return DynamicCache(layers)


def test_names_are_in_the_order_of_the_layers_key_before_value() -> None:
    assert pasts(CACHE)[:3] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
    ]
    assert presents(CACHE)[1:] == ["present.0.value", "present.1.key", "present.1.value"]


def test_every_token_of_a_row_is_compared_and_nothing_behind_it() -> None:
    """The newest one above all: it is the only one that a decode step writes."""
    valid = valid_presents(CACHE, np.array([2, 0, 4]), 4)
    assert list(valid) == presents(CACHE)
    wanted = [[True, True, False, False], [False] * 4, [True] * 4]
    for mask in valid.values():
        assert mask.shape == (3, CACHE.heads, 4)
        for head in range(CACHE.heads):
            assert mask[:, head].tolist() == wanted


def test_what_fills_buffers_is_read_back_row_by_row() -> None:
    """As much of each head as the model has, and of each row as many tokens as it has."""
    rows = [held(3, seed=0), held(1, seed=1)]
    filled = fill_presents(CACHE, rows, 5)
    for name in presents(CACHE):
        assert filled[name].shape == (2, CACHE.heads, 5, CACHE.head_size)
        assert not filled[name][..., SIZE:].any()
        assert not filled[name][0, :, 3:].any()
        assert not filled[name][1, :, 1:].any()
    buffers = dict(zip(pasts(CACHE), (filled[name] for name in presents(CACHE)), strict=True))
    for number, (row, tokens) in enumerate(zip(rows, (3, 1), strict=True)):
        again = read_row(CACHE, buffers, number, tokens, SIZE)
        for layer, same in zip(again.layers, row.layers, strict=True):
            torch.testing.assert_close(layer.keys, same.keys, rtol=0, atol=0)
            torch.testing.assert_close(layer.values, same.values, rtol=0, atol=0)
    shorter = read_row(CACHE, buffers, 0, 2, SIZE)
    assert shorter.get_seq_length() == 2
    assert read_row(CACHE, buffers, 0, 0, SIZE).get_seq_length() == 0


@pytest.mark.parametrize(
    ("side", "wanted"),
    [("left", [[0, 1], [1, 1], [0, 0]]), ("right", [[1, 0], [1, 1], [0, 0]])],
)
def test_rows_are_padded_on_their_side(side: str, wanted: list[list[int]]) -> None:
    assert padded([1, 2, 0], side) == wanted
