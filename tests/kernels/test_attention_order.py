"""The order in which attention's programs start, and how evenly a launch ends by it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable

import pytest
import torch
from attention_cases import GPU, Case, intervals
from torch import Tensor

pytest.importorskip("triton", reason="runs Triton kernels")
import triton
import triton.language as tl

from mmopt_kernels.attention.tiles import AT_ONCE, L2_SHARE, heads_at_once, placed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_order(n_bh: int, n_tiles: int, n_heads: int, last_first: bool) -> list[tuple[int, int]]:
    """Pairs and tiles as `placed` is to have them: what is left over of the groups comes first."""
    left = n_bh % n_heads
    sizes = [left] * (left > 0) + [n_heads] * (n_bh // n_heads)
    ends = [n_bh, *(n_bh - n for n in itertools.accumulate(sizes))]
    tiles = range(n_tiles)[:: -1 if last_first else 1]
    groups = [range(first, end)[::-1] for end, first in itertools.pairwise(ends)]
    return [(i_bh, i) for group in groups for i in tiles for i_bh in group]


@triton.jit
def write_places(p_out, n_tiles, n_heads, LAST_FIRST: tl.constexpr):
    i_bh, i_tile = placed(n_tiles, n_heads, LAST_FIRST)
    tl.store(p_out + tl.program_id(0) * 2, i_bh)
    tl.store(p_out + tl.program_id(0) * 2 + 1, i_tile)


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("n_bh", [1, 4, 5, 6])
@pytest.mark.parametrize("n_tiles", [1, 3])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_one_tile_of_each_head_in_a_group_starts_before_the_next_of_any(
    n_bh: int, n_tiles: int, n_heads: int, last_first: bool
) -> None:
    """Heads that do not fill a group come first, so that the last group ends evenly."""
    n_heads = min(n_heads, n_bh)
    out = torch.full((n_bh * n_tiles, 2), -1, dtype=torch.int32, device=DEVICE)
    write_places[(n_bh * n_tiles,)](out, n_tiles, n_heads, LAST_FIRST=last_first)
    assert [tuple(pair) for pair in out.tolist()] == in_order(n_bh, n_tiles, n_heads, last_first)


def test_heads_follow_one_another_where_tiles_cost_the_same_or_one_fills_all() -> None:
    assert heads_at_once(False, 99, 1, 1) == 1
    assert heads_at_once(True, 99, AT_ONCE, L2_SHARE // 8) == 8
    assert heads_at_once(True, 99, AT_ONCE // 8, L2_SHARE) == 16
    assert heads_at_once(True, 99, 4 * AT_ONCE, L2_SHARE * 2) == 1
    assert heads_at_once(True, 99, 4 * AT_ONCE, 0) == 99  # no keys


# --- arithmetic: a program costs a unit for each tile that it meets, and two for itself ----------

TILE = (
    64  # both ways, as measured best on an H200 for 16 bits: two programs run on a multiprocessor
)
PLACES = 2 * 132
LLAMA_8B = (
    Case("llama-8b-1k", "causal", 8, 32, 8, 1024, D=128, dtype=torch.bfloat16),
    Case("llama-8b-2k", "causal", 4, 32, 8, 2048, D=128, dtype=torch.bfloat16),
)
UNEVEN = [case for case in GPU if case.trains and case.mask != "full"] + [*LLAMA_8B]


def ends_of_tiles(case: Case) -> list[tuple[int, int]]:
    """First and last key of each query tile, of the first sequence."""
    bounds, causal = intervals(case, "cpu")
    rows = torch.arange(case.S, dtype=torch.int32)
    lo, hi = torch.zeros_like(rows), torch.full_like(rows, case.T)
    if bounds is not None:
        lo, hi = bounds.lo[0], bounds.hi[0]
    if causal:
        hi = torch.minimum(hi, rows + case.T - case.S + 1)
    parts: zip[tuple[Tensor, Tensor]] = zip(lo.split(TILE), hi.split(TILE), strict=True)
    return [(int(a.min()), int(b.max())) for a, b in parts]


def waited(costs: Iterable[int]) -> float:
    """The time until all programs have ended, where each starts at the first place that is free.

    As a multiple of the time in which as many places would do it without waiting at the end.
    """
    costs = list(costs)
    free = [0] * PLACES
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free) * PLACES / sum(costs)


def ends(case: Case, heads: int | None) -> tuple[float, float]:
    """`waited` of the passes over queries and over keys; by default with `heads_at_once`."""
    tiles = ends_of_tiles(case)
    group = case.Hq // case.Hkv
    of_tile = [-(-hi // TILE) - lo // TILE + 2 for lo, hi in tiles]
    starts = range(0, case.T, TILE)
    of_block = [group * sum(lo < n + TILE and hi > n for lo, hi in tiles) + 2 for n in starts]
    row = 2 * case.D * 2  # two tensors, of two bytes an element
    found = []
    for costs, n_bh, read, last_first in (
        (of_tile, case.B * case.Hq, case.T * row // group, True),
        (of_block, case.B * case.Hkv, case.S * row * group, False),
    ):
        n_heads = heads or heads_at_once(True, n_bh, len(costs), read)
        order = in_order(n_bh, len(costs), n_heads, last_first)
        found.append(waited(costs[i] for _, i in order))
    return found[0], found[1]


@pytest.mark.parametrize("case", UNEVEN, ids=lambda case: case.name)
def test_a_launch_ends_evenly(case: Case) -> None:
    over_queries, over_keys = ends(case, None)
    assert over_queries < 1.02
    assert over_keys < 1.1
    assert over_keys < 1.04 or case.mask in ("packed", "sliding")


def test_with_one_head_after_the_other_it_would_not() -> None:
    """What the order is for: grouped heads, of which a program over keys has all queries."""
    found = {case.name: ends(case, 1) for case in UNEVEN}
    assert found["llama-8b-2k"][1] > 1.3
    assert found["images-4k"][1] > 1.13
    assert found["packed-4k"][0] > 1.1
