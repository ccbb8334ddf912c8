"""The order in which attention's programs start, and how evenly a launch ends by it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import pytest
import torch
from attention_cases import GPU, Case, intervals
from torch import Tensor

pytest.importorskip("triton", reason="runs Triton kernels")
import triton
import triton.language as tl

from mmopt_kernels.attention.tiles import (
    ASSUMED_MULTIPROCESSORS,
    L2_SHARE,
    MOST_PROGRAMS,
    PROGRAMS_EACH,
    grid_of,
    nearest_divisor,
    placed,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNING = PROGRAMS_EACH * ASSUMED_MULTIPROCESSORS


def in_order(grid: tuple[int, ...], n_tiles: int, last_first: bool) -> list[tuple[int, int]]:
    """Pairs and tiles as `placed` is to have them."""
    if len(grid) == 1:
        return [(i // n_tiles, i % n_tiles) for i in range(grid[0])]
    side, _, groups = grid
    tiles = range(n_tiles)[:: -1 if last_first else 1]
    return [(i * side + j, tile) for i in range(groups) for tile in tiles for j in range(side)]


@triton.jit
def write_places(p_out, n_tiles, LAST_FIRST: tl.constexpr, SIDE: tl.constexpr):
    i_bh, i_tile = placed(n_tiles, LAST_FIRST, SIDE)
    i_p = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    i_p += tl.program_id(0)
    tl.store(p_out + i_p * 2, i_bh)
    tl.store(p_out + i_p * 2 + 1, i_tile)


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 4), (4, 3, 1), (2, 3, 3), (12,)])
def test_one_tile_of_each_pair_in_a_group_starts_before_the_next_of_any(
    grid: tuple[int, ...], last_first: bool
) -> None:
    n_tiles = grid[1] if len(grid) > 1 else 3
    out = torch.full((math.prod(grid), 2), -1, dtype=torch.int32, device=DEVICE)
    write_places[grid](out, n_tiles, LAST_FIRST=last_first, SIDE=len(grid) > 1)
    assert [tuple(pair) for pair in out.tolist()] == in_order(grid, n_tiles, last_first)


def grid_for(n_bh: int, n_tiles: int, bytes_each: float, uneven: bool = True) -> tuple[int, ...]:
    """There is a second tensor of the size of the one that is named."""
    size = int(n_bh * bytes_each) // 2
    return grid_of(uneven, n_bh, n_tiles, torch.empty(size, dtype=torch.uint8, device="meta"))


def test_pairs_run_side_by_side_that_the_cache_holds_or_that_fill_the_gpu_twice() -> None:
    assert grid_for(96, RUNNING, L2_SHARE / 8) == (8, RUNNING, 12)
    assert grid_for(96, RUNNING // 8, L2_SHARE) == (16, RUNNING // 8, 6)
    assert grid_for(96, 4 * RUNNING, L2_SHARE * 2) == (1, 4 * RUNNING, 96)
    assert grid_for(96, 4 * RUNNING, 0) == (96, 4 * RUNNING, 1)  # no keys


def test_pairs_follow_one_another_where_tiles_cost_the_same_or_axes_would_be_too_long() -> None:
    assert grid_for(96, 3, 1, uneven=False) == (288,)
    assert grid_for(2, MOST_PROGRAMS, L2_SHARE) == (1, MOST_PROGRAMS, 2)
    assert grid_for(2, MOST_PROGRAMS + 1, L2_SHARE) == (2 * (MOST_PROGRAMS + 1),)
    prime = 65537
    assert grid_for(prime, RUNNING, L2_SHARE) == (prime * RUNNING,)


@pytest.mark.parametrize(
    ("n", "wanted", "found"),
    [(1, 9, 1), (96, 8, 8), (14, 8, 7), (30, 4, 5), (6, 100, 6), (257, 8, 1), (257, 200, 257)],
)
def test_groups_are_of_one_size_near_the_one_that_is_wanted(
    n: int, wanted: int, found: int
) -> None:
    assert nearest_divisor(n, wanted) == found


# --- arithmetic: a program costs a unit for each tile that it meets, and two for itself ----------

TILE = (
    64  # both ways, as measured best on an H200 for 16 bits: two programs run on a multiprocessor
)
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
    free = [0] * RUNNING
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free) * RUNNING / sum(costs)


def ends(case: Case, side: int | None) -> tuple[float, float]:
    """`waited` of the passes over queries and over keys, in the order of `grid_of` by default."""
    tiles = ends_of_tiles(case)
    group = case.Hq // case.Hkv
    of_tile = [-(-hi // TILE) - lo // TILE + 2 for lo, hi in tiles]
    starts = range(0, case.T, TILE)
    of_block = [group * sum(lo < n + TILE and hi > n for lo, hi in tiles) + 2 for n in starts]
    found = []
    for costs, heads, (of, length), last_first in (
        (of_tile, case.Hq, (case.Hkv, case.T), True),
        (of_block, case.Hkv, (case.Hq, case.S), False),
    ):
        n_bh = case.B * heads
        read = torch.empty(case.B, of, length, case.D, dtype=case.dtype, device="meta")
        grid = grid_of(True, n_bh, len(costs), read)
        if side is not None:
            grid = side, len(costs), n_bh // side
        order = in_order(grid, len(costs), last_first)
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
