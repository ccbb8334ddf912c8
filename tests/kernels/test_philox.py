"""Philox-4x32-10 in PyTorch against its published answers and against Triton's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from mmopt_kernels._philox import philox
from mmopt_kernels.attention.philox import keep_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Key, counter and output words from Random123's tests/kat_vectors (philox4x32 10),
# https://github.com/DEShawResearch/random123.
KNOWN = {
    "zeros": ("0 0", "0 0 0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": (
        "ffffffff ffffffff",
        "ffffffff ffffffff ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "pi": (
        "a4093822 299f31d0",
        "243f6a88 85a308d3 13198a2e 03707344",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def seed_of(low: int, high: int) -> Tensor:
    """The int64 with these two halves."""
    value = high << 32 | low
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


@pytest.mark.parametrize("name", KNOWN)
def test_philox_gives_random123s_known_answers(name: str) -> None:
    key, counter, want = (words(text) for text in KNOWN[name])
    got = philox(seed_of(*key), *(torch.tensor(word) for word in counter))
    assert [int(word) for word in got] == want


def test_broadcast_counters_give_what_full_ones_give() -> None:
    """The rounds that broadcasting saves change nothing."""
    seed = torch.tensor([-(2**62) + 12345])
    small = (torch.arange(5), torch.arange(3)[:, None], torch.tensor(7), torch.tensor(0))
    full = [c.expand(3, 5).contiguous() for c in small]
    for got, want in zip(philox(seed, *small), philox(seed, *full), strict=True):
        assert torch.equal(got.expand(3, 5), want)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def triton_draw(p_seed, p_out, c2, SIZE: tl.constexpr):
        """The first word for the counters (j, i, c2, 0), i and j below SIZE."""
        i = tl.arange(0, SIZE)[:, None]
        j = tl.arange(0, SIZE)[None, :]
        c0, c1 = (i * 0 + j).to(tl.uint32), (i + j * 0).to(tl.uint32)
        zero = c0 * 0
        x0, _x1, _x2, _x3 = tl.philox(tl.load(p_seed), c0, c1, zero + c2, zero)
        tl.store(p_out + i * SIZE + j, x0.to(tl.int64))


@pytest.mark.skipif(not HAS_TRITON, reason="compares with tl.philox")
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
def test_philox_equals_tritons(seed: int) -> None:
    """A kernel recomputes this mask, for seeds of either sign."""
    tensor = torch.tensor([seed], device=DEVICE)
    got = torch.empty(16, 16, dtype=torch.int64, device=DEVICE)
    triton_draw[(1,)](tensor, got, 3, SIZE=16)
    i, j = torch.arange(16, device=DEVICE)[:, None], torch.arange(16, device=DEVICE)
    zero = torch.zeros_like(j)
    assert torch.equal(got, philox(tensor, j, i, zero + 3, zero)[0])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_keep_rate_is_within_binomial_bounds(dropout_p: float) -> None:
    """Five standard deviations: a right generator fails once in a million seeds; this is fixed."""
    bh, i = torch.arange(4).view(4, 1, 1), torch.arange(200)[:, None]
    keep = keep_mask(torch.tensor([11]), dropout_p, bh, i, 0, 250)
    assert keep.shape == (4, 200, 250)
    deviation = (dropout_p * (1 - dropout_p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - dropout_p)) < 5 * deviation


def test_extreme_probabilities_drop_nothing_or_almost_everything() -> None:
    """A probability that rounds to 2**32 / 2**32 still fits the unsigned 32-bit threshold."""
    i, bh = torch.arange(50)[:, None], torch.tensor([0])
    assert keep_mask(torch.tensor([5]), 0.0, bh, i, 0, 50).all()
    assert not keep_mask(torch.tensor([5]), 1.0 - 2.0**-40, bh, i, 0, 50).any()


@pytest.mark.parametrize(("start", "stop"), [(0, 23), (1, 2), (3, 4), (5, 23), (8, 16), (6, 6)])
def test_a_range_of_keys_draws_what_all_keys_draw(start: int, stop: int) -> None:
    """Four keys share a draw; a block may start and end within four."""
    bh, i = torch.arange(3).view(3, 1, 1), torch.arange(7)[:, None]
    every = keep_mask(torch.tensor([9]), 0.5, bh, i, 0, 23)
    assert torch.equal(
        keep_mask(torch.tensor([9]), 0.5, bh, i, start, stop), every[..., start:stop]
    )


def test_neighbouring_keys_are_dropped_independently() -> None:
    """Of eight keys every pattern occurs as often as chance has it, within five deviations."""
    keep = keep_mask(torch.tensor([3]), 0.5, torch.tensor([0]), torch.arange(40000)[:, None], 0, 8)
    patterns = (keep * 2 ** torch.arange(8)).sum(1).bincount(minlength=256)
    expected = 40000 / 256
    assert (patterns - expected).abs().max() < 5 * expected**0.5
