"""Intervals against dense masks written out key by key, and the promises of its docstrings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import masking_utils as hf

from mmopt_kernels import Intervals, KernelInputError
from mmopt_kernels.attention import bounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One query, one key, no key, no query, a cached prefix, and more queries than keys.
SIZES = [(1, 1), (7, 7), (1, 9), (4, 9), (9, 4), (5, 1), (3, 0), (0, 3)]
sizes = pytest.mark.parametrize(("S", "T"), SIZES, ids=lambda n: str(n))


def ints(*values: object, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def dense(seen: Intervals, T: int) -> list[list[list[bool]]]:
    """What the bounds mean, by the definition in the class's docstring."""
    lo, hi = seen.lo.tolist(), seen.hi.tolist()
    return [
        [[first <= j < end for j in range(T)] for first, end in zip(*rows, strict=True)]
        for rows in zip(lo, hi, strict=True)
    ]


def loops(B: int, S: int, T: int, rule: Callable[[int, int, int], bool]) -> list[list[list[bool]]]:
    """``rule(b, p, j)`` for each key and each query, ``p`` being the key it stands at."""
    return [[[rule(b, i + T - S, j) for j in range(T)] for i in range(S)] for b in range(B)]


def assert_inside(seen: Intervals, T: int, rows: tuple[int, int]) -> None:
    """The kernels read the bounds as they are; a constructor leaves none beyond the keys."""
    assert tuple(seen.lo.shape) == tuple(seen.hi.shape) == rows
    for bound in (seen.lo, seen.hi):
        assert bound.dtype == torch.int32
        assert bound.device.type == DEVICE
        assert ((bound >= 0) & (bound <= T)).all()


@sizes
def test_causal(S: int, T: int) -> None:
    seen = Intervals.causal(S, T, device=DEVICE)
    assert_inside(seen, T, (1, S))
    assert dense(seen, T) == loops(1, S, T, lambda b, p, j: j <= p)


@sizes
@pytest.mark.parametrize("left", [None, 0, 2, 100, 2**31 - 1])
@pytest.mark.parametrize("right", [None, 0, 1, 100, 2**31 - 1])
def test_sliding_window(S: int, T: int, left: int | None, right: int | None) -> None:
    seen = Intervals.sliding_window(left, right, S, T, device=DEVICE)
    assert_inside(seen, T, (1, S))
    assert dense(seen, T) == loops(
        1, S, T,
        lambda b, p, j: (left is None or j >= p - left) and (right is None or j <= p + right),
    )  # fmt: skip


@sizes
@pytest.mark.parametrize("size", [1, 3, 100])
def test_chunked(S: int, T: int, size: int) -> None:
    seen = Intervals.chunked(size, S, T, device=DEVICE)
    assert_inside(seen, T, (1, S))
    assert dense(seen, T) == loops(1, S, T, lambda b, p, j: j // size == p // size)
    padding = [0, T // 3, T]
    moved = Intervals.chunked(size, S, T, left_padding=ints(*padding)) & Intervals.causal(
        S, T, device=DEVICE
    )
    assert dense(moved, T) == loops(
        3, S, T,
        lambda b, p, j: (j - padding[b]) // size == (p - padding[b]) // size and j <= p,
    )  # fmt: skip


@sizes
def test_key_padding(S: int, T: int) -> None:
    lengths = [T, T // 2, 0]
    right = Intervals.key_padding(ints(*lengths), S, T=T)
    left = Intervals.key_padding(ints(*lengths), S, T=T, side="left")
    for seen, rule in (
        (right, lambda b, p, j: j < lengths[b]),
        (left, lambda b, p, j: j >= T - lengths[b]),
    ):
        assert_inside(seen, T, (3, S))
        want = loops(3, S, T, rule)
        assert dense(seen, T) == want
        keep = torch.tensor(loops(3, 1, T, rule), dtype=torch.bool, device=DEVICE).view(3, T)
        for mask in (keep, keep.long()):
            assert_inside(Intervals.key_padding(mask, S), T, (3, S))
            assert dense(Intervals.key_padding(mask, S), T) == want


def test_lengths_beyond_the_keys_are_clamped_without_a_proof() -> None:
    for side in ("right", "left"):
        seen = Intervals.key_padding(ints(9, -2), 4, T=5, side=side, check=False)
        assert dense(seen, 5) == loops(2, 4, 5, lambda b, p, j: b == 0)


@sizes
def test_prefix(S: int, T: int) -> None:
    lengths = [0, T // 2, T]
    seen = Intervals.prefix(ints(*lengths), S, T)
    assert_inside(seen, T, (3, S))
    assert dense(seen, T) == loops(3, S, T, lambda b, p, j: j < lengths[b] or j <= p)


@pytest.mark.parametrize(
    "lengths", [[], [0], [1], [3, 4], [0, 2, 0, 0, 5, 1, 0], [7, 0, 0]], ids=str
)
def test_packed(lengths: list[int]) -> None:
    edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    S = edges[-1]
    document = [n for n, length in enumerate(lengths) for _ in range(length)]
    seen = Intervals.packed(ints(*edges, dtype=torch.int32), S)
    assert_inside(seen, S, (1, S))
    assert dense(seen, S) == loops(1, S, S, lambda b, p, j: document[p] == document[j])
    causal = seen & Intervals.causal(S, device=DEVICE)
    assert dense(causal, S) == loops(1, S, S, lambda b, p, j: document[p] == document[j] and j <= p)


def test_rows_past_the_last_document_see_nothing_without_a_proof() -> None:
    seen = Intervals.packed(ints(0, 2, 3, dtype=torch.int32), 5, check=False)
    assert dense(seen, 5) == loops(1, 5, 5, lambda b, p, j: max(p, j) < 2 or p == j == 2)


IDS = [
    [0, 0, 0, -1, -1, 1, 1, 1, 1, -1],
    [-1, -1, 7, 7, 3, 3, 3, -1, -1, -1],
    [-1, 5, -1, 9, 9, 9, 9, 9, 9, 9],
    [-1] * 10,
    [4] * 10,
]


@pytest.mark.parametrize("S", [10, 1, 4, 13], ids=lambda n: f"S{n}")
@pytest.mark.parametrize("window", [None, 1, 2, 3, 100])
def test_bidirectional_blocks(S: int, window: int | None) -> None:
    """Gemma 3's full layers, and its sliding ones: blocks longer and shorter than the window."""
    T = len(IDS[0])
    base = None
    if window is not None:
        base = Intervals.sliding_window(window - 1, 0, S, T, device=DEVICE)
    seen = Intervals.bidirectional_blocks(ints(*IDS), S, base=base)

    def rule(b: int, p: int, j: int) -> bool:
        text = p - (window or T) < j <= p
        return text or (p >= 0 and IDS[b][p] >= 0 and IDS[b][p] == IDS[b][j])

    assert_inside(seen, T, (len(IDS), S))
    assert dense(seen, T) == loops(len(IDS), S, T, rule)


@pytest.mark.parametrize("T", [0, 1])
def test_bidirectional_blocks_of_almost_nothing(T: int) -> None:
    seen = Intervals.bidirectional_blocks(ints(*[[3] * T, [-1] * T]).view(2, T))
    assert_inside(seen, T, (2, T))
    assert dense(seen, T) == loops(2, T, T, lambda b, p, j: True)


@sizes
def test_from_dense_and_from_mask_function(S: int, T: int) -> None:
    want = loops(2, S, T, lambda b, p, j: p - 2 - b <= j <= p)
    mask = torch.tensor(want, dtype=torch.bool, device=DEVICE).view(2, S, T)
    seen = Intervals.from_dense(mask)
    assert_inside(seen, T, (2, S))
    assert dense(seen, T) == want
    called = Intervals.from_mask_function(
        lambda b, h, q, k: (k <= q) & (k >= q - 2 - b), S, T, B=2, device=DEVICE
    )
    assert_inside(called, T, (2, S))
    assert dense(called, T) == want


def test_mask_function_is_called_for_a_block_of_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most so many elements of the mask at once, and the same bounds."""
    whole = Intervals.from_mask_function(hf.causal_mask_function, 23, 31, B=2, device=DEVICE)
    called = []

    def watched(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        called.append(q.numel())
        return hf.causal_mask_function(b, h, q, k)

    monkeypatch.setattr(bounds, "BLOCK_ELEMENTS", 5 * 31 * 2)
    blocks = Intervals.from_mask_function(watched, 23, 31, B=2, device=DEVICE)
    assert called == [5, 5, 5, 5, 3]
    assert torch.equal(blocks.lo, whole.lo)
    assert torch.equal(blocks.hi, whole.hi)


def test_mask_function_may_return_integers() -> None:
    for dtype in (torch.int64, torch.uint8):
        seen = Intervals.from_mask_function(
            lambda b, h, q, k, dtype=dtype: (k <= q).to(dtype) * 2, 3, 5, device=DEVICE
        )
        assert dense(seen, 5) == loops(1, 3, 5, lambda b, p, j: j <= p)


def test_mask_function_may_return_less_than_a_whole_mask() -> None:
    for function in (lambda *_: True, hf.bidirectional_mask_function, lambda b, h, q, k: k < 9):
        seen = Intervals.from_mask_function(function, 3, 5, B=2, device=DEVICE)
        assert dense(seen, 5) == loops(2, 3, 5, lambda b, p, j: True)


# Transformers' own masks, and the constructors that stand for them.


def gemma3_ids(T: int) -> Tensor:
    from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

    token_type_ids = torch.zeros(2, T, dtype=torch.long, device=DEVICE)
    token_type_ids[0, 1:7] = 1
    token_type_ids[0, 9:11] = 1
    token_type_ids[1, 5:] = 1
    return get_block_sequence_ids_for_mask(token_type_ids)


def transformers_cases(T: int) -> dict[str, tuple[Callable[..., Tensor], Intervals]]:
    """A mask function over two sequences of ``T``, and ours."""
    keep = torch.ones(2, T, dtype=torch.bool, device=DEVICE)
    keep[0, :3] = False
    keep[1, T - 2 :] = False
    padding = (keep.cumsum(1) == 0).sum(1)
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in (4, 1, T - 5)])[None]
    documents = hf.find_packed_sequence_indices(positions)
    edges = ints(0, 4, 5, T, dtype=torch.int32)
    ids = gemma3_ids(T)
    causal = Intervals.causal(T, device=DEVICE)
    window = Intervals.sliding_window(3, 0, T, device=DEVICE)
    packed = Intervals.packed(edges, T)
    sliding = hf.sliding_window_causal_mask_function(4)
    blocks = hf.blockwise_overlay(ids)
    image = Intervals.bidirectional_blocks
    wide = documents.expand(2, -1)
    return {
        "causal": (hf.causal_mask_function, causal),
        "sliding": (sliding, window),
        "sliding-both-ways": (
            hf.sliding_window_bidirectional_mask_function(4),
            Intervals.sliding_window(4, 4, T, device=DEVICE),
        ),
        "padding": (
            hf.and_masks(hf.causal_mask_function, hf.padding_mask_function(keep)),
            causal & Intervals.key_padding(keep),
        ),
        "chunked": (
            hf.chunked_causal_mask_function(4, padding),
            causal & Intervals.chunked(4, T, left_padding=padding),
        ),
        "packed": (
            hf.and_masks(hf.causal_mask_function, hf.packed_sequence_mask_function(wide)),
            packed & causal,
        ),
        "packed-sliding": (
            hf.and_masks(
                hf.remap_positions_for_packed_sequence(sliding, positions.expand(2, -1)),
                hf.packed_sequence_mask_function(wide),
            ),
            packed & window,
        ),
        "images": (hf.or_masks(hf.causal_mask_function, blocks), image(ids)),
        "images-sliding": (hf.or_masks(sliding, blocks), image(ids, base=window)),
        "images-sliding-padding": (
            hf.and_masks(hf.or_masks(sliding, blocks), hf.padding_mask_function(keep)),
            image(ids, base=window) & Intervals.key_padding(keep),
        ),
    }


@pytest.mark.parametrize("name", transformers_cases(13))
def test_agrees_with_transformers_masks(name: str) -> None:
    T = 13
    function, named = transformers_cases(T)[name]
    want = hf.sdpa_mask(2, T, T, mask_function=function, allow_is_causal_skip=False, device=DEVICE)[
        :, 0
    ].tolist()
    assert dense(Intervals.from_mask_function(function, T, B=2, device=DEVICE), T) == want
    mine = dense(named, T)
    assert (mine if len(mine) == 2 else mine * 2) == want


@pytest.mark.parametrize("name", ["causal", "sliding", "padding", "chunked", "images-sliding"])
def test_agrees_with_transformers_in_a_decode_step(name: str) -> None:
    """Three queries after ten cached keys, with transformers' own offsets."""
    S, T = 3, 13
    function, _ = transformers_cases(T)[name]
    want = hf.sdpa_mask(
        2, S, T, q_offset=T - S, mask_function=function, allow_is_causal_skip=False, device=DEVICE
    )[:, 0].tolist()
    for q_offset in (None, T - S, ints(T - S)):
        seen = Intervals.from_mask_function(function, S, T, B=2, q_offset=q_offset, device=DEVICE)
        assert dense(seen, T) == want


def test_key_offset_of_a_sliding_cache() -> None:
    """The cache has dropped its first 4 keys: the default puts the last query at the last key."""
    function = hf.sliding_window_causal_mask_function(3)
    want = hf.sdpa_mask(
        1, 2, 5, q_offset=7, kv_offset=4, mask_function=function, allow_is_causal_skip=False
    )[:, 0].tolist()
    seen = Intervals.from_mask_function(function, 2, 5, kv_offset=4, device=DEVICE)
    assert dense(seen, 5) == want


# Composition.


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Intervals, Intervals, int]:
    """Two random bounds of the same queries, either of which may serve a whole batch."""
    S, T, B = draw(st.integers(0, 5)), draw(st.integers(0, 8)), draw(st.integers(1, 3))
    made = []
    for _ in range(2):
        rows = draw(st.sampled_from([1, B]))
        bound = st.lists(st.integers(-2, T), min_size=rows * S, max_size=rows * S)
        made.append(Intervals(*(
            ints(*draw(bound), dtype=torch.int32).view(rows, S) for _ in range(2)
        )))  # fmt: skip
    return made[0], made[1], T


def spread(mask: list[list[list[bool]]], B: int) -> list[list[list[bool]]]:
    return mask * B if len(mask) == 1 else mask


def first_hole(mask: list[list[list[bool]]]) -> tuple[int, int] | None:
    for b, rows in enumerate(mask):
        for i, row in enumerate(rows):
            seen = [j for j, visible in enumerate(row) if visible]
            if seen and len(seen) != seen[-1] + 1 - seen[0]:
                return b, i
    return None


@settings(deadline=None, max_examples=150)
@given(pairs())
def test_and_is_the_intersection_and_or_the_union_or_an_error(
    drawn: tuple[Intervals, Intervals, int],
) -> None:
    """`|` raises exactly when a row has a hole, and names the first such row."""
    a, b, T = drawn
    B = max(len(a.lo), len(b.lo))
    one, other = spread(dense(a, T), B), spread(dense(b, T), B)

    def combine(rule: Callable[[bool, bool], bool]) -> list[list[list[bool]]]:
        return [
            [[rule(x, y) for x, y in zip(r, s, strict=True)] for r, s in zip(m, n, strict=True)]
            for m, n in zip(one, other, strict=True)
        ]

    assert dense(a & b, T) == combine(lambda x, y: x and y)
    want = combine(lambda x, y: x or y)
    hole = first_hole(want)
    loose = dense(a.union(b, check=False), T)
    if hole is None:
        assert dense(a | b, T) == dense(a.union(b), T) == loose == want
        return
    with pytest.raises(KernelInputError, match=rf"row {hole[1]} of sequence {hole[0]} would see"):
        _ = a | b
    # Without a proof the hole is filled, and nothing else changes.
    for got, rows in zip(loose, want, strict=True):
        for filled, row in zip(got, rows, strict=True):
            seen = [j for j, visible in enumerate(row) if visible]
            between = range(seen[0], seen[-1] + 1) if seen else ()
            assert filled == [j in between for j in range(T)]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=3, max_size=3))
def test_from_dense_raises_exactly_when_a_row_has_a_hole(rows: list[list[bool]]) -> None:
    mask = torch.tensor([rows], device=DEVICE)
    hole = first_hole([rows])
    if hole is None:
        assert dense(Intervals.from_dense(mask), 5) == [rows]
        return
    for build in (
        lambda: Intervals.from_dense(mask),
        lambda: Intervals.from_mask_function(lambda b, h, q, k: mask[b, q, k], 3, 5, q_offset=0),
    ):
        with pytest.raises(KernelInputError, match=f"mask row {hole[1]} of sequence 0 has a hole"):
            build()


# Compilation.

COMPILED: dict[str, Callable[[Tensor], Intervals]] = {
    "causal": lambda x: Intervals.causal(x.shape[1], device=x.device),
    "sliding": lambda x: Intervals.sliding_window(3, 1, x.shape[1], device=x.device),
    "chunked": lambda x: Intervals.chunked(
        4, x.shape[1], left_padding=x[:, 0], check=False
    ),
    "padding-mask": lambda x: Intervals.key_padding(x, check=False),
    "padding-lengths": lambda x: Intervals.key_padding(
        x.sum(1), T=x.shape[1], side="left", check=False
    ),
    "prefix": lambda x: Intervals.prefix(x[:, 0], x.shape[1], check=False),
    "packed": lambda x: Intervals.packed(
        torch.nn.functional.pad(x.sum(1).cumsum(0), (1, 0)).int(), x.shape[1], check=False
    ),
    "blocks": lambda x: Intervals.bidirectional_blocks(x - 1, 3, check=False),
    "dense": lambda x: Intervals.from_dense(x[:, :, None] >= x[:, None], check=False),
    "mask-function": lambda x: Intervals.from_mask_function(
        hf.and_masks(hf.causal_mask_function, hf.padding_mask_function(x != 0)),
        x.shape[1], B=2, device=x.device, check=False,
    ),
    "composed": lambda x: (
        Intervals.causal(x.shape[1], device=x.device)
        & Intervals.key_padding(x, check=False)
    ).union(Intervals.prefix(x[:, 0], x.shape[1], check=False), check=False),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_without_proofs_one_graph_serves_all_lengths(name: str) -> None:
    """fullgraph, so nothing is read on the host; no recompilation for another length."""
    build = COMPILED[name]
    torch.compiler.reset()

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        seen = build(x)
        return seen.lo, seen.hi

    # Inductor would take its time and change nothing about graph breaks.
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, S in enumerate((9, 14)):
        x = torch.ones(2, S, dtype=torch.int64, device=DEVICE)
        x[1, S // 2 :] = 0
        strict = torch._dynamo.config.patch(error_on_recompile=True)
        with strict if n else contextlib.nullcontext():
            got = compiled(x)
        for bound, want in zip(got, step(x), strict=True):
            assert torch.equal(bound, want)


def test_sizes_may_be_symbols_of_a_trace() -> None:
    """As `torch.export` and `make_fx` give them, where no Dynamo stands between."""

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        S = x.shape[1]
        seen = Intervals.causal(S, device=DEVICE) & Intervals.sliding_window(3, 0, S, device=DEVICE)
        return seen.lo, seen.hi

    traced = make_fx(step, tracing_mode="symbolic")(torch.zeros(2, 7))
    x = torch.zeros(2, 9)
    for bound, want in zip(traced(x), step(x), strict=True):
        assert torch.equal(bound, want)


# Messages: what it was, what was expected, what to do.

CU = "Intervals.packed: cu_seqlens"
BLOCKS = "Intervals.bidirectional_blocks: "
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "negative-S": (
        lambda: Intervals.causal(-1),
        r"Intervals.causal: S is -1, expected an integer from 0 to 2\*\*31 - 1. Count S in tokens",
    ),
    "negative-B": (
        lambda: Intervals.from_mask_function(lambda *_: True, 2, B=-1),
        "Intervals.from_mask_function: B is -1, expected .*. Count B in sequences",
    ),
    "mask-function-without-return": (
        lambda: Intervals.from_mask_function(lambda *_: None, 2),
        "Intervals.from_mask_function: mask_function returned NoneType, expected a bool",
    ),
    "list-of-bounds": (lambda: Intervals([[0]], [[1]]), "Intervals: lo is of type list, expected"),
    "bounds-dtype": (
        lambda: Intervals(ints([0]).int(), ints([1])),
        r"Intervals: hi has dtype torch.int64, expected torch.int32. Pass hi.to\(torch.int32\)",
    ),
    "bounds-shapes": (
        lambda: Intervals(ints([0, 0]).int(), ints([1]).int()),
        r"Intervals: hi is \(1, 1\) on .*, expected \(1, 2\) on .* like lo. Build both bounds",
    ),
    "bounds-devices": (
        lambda: Intervals(ints([0]).int(), ints([1]).int().to("meta")),
        r"Intervals: hi is \(1, 1\) on meta, expected \(1, 1\) on .* like lo. Build both bounds",
    ),
    "list-of-padding": (
        lambda: Intervals.key_padding([[1, 0]]),
        "Intervals.key_padding: keep is of type list, expected a tensor. Pass torch.as_tensor",
    ),
    "list-of-left-padding": (
        lambda: Intervals.chunked(2, 4, left_padding=[1]),
        "Intervals.chunked: left_padding is of type list, expected a tensor",
    ),
    "number-as-prefix": (
        lambda: Intervals.prefix(2, 4), "Intervals.prefix: lengths is of type int, expected a ten"
    ),
    "list-of-edges": (
        lambda: Intervals.packed([0, 4], 4), "Intervals.packed: cu_seqlens is of type list, expec"
    ),
    "list-of-blocks": (
        lambda: Intervals.bidirectional_blocks([[0, 0]]),
        "Intervals.bidirectional_blocks: block_ids is of type list, expected a tensor",
    ),
    "unsigned-blocks": (
        lambda: Intervals.bidirectional_blocks(torch.zeros(1, 2, dtype=torch.uint16)),
        "Intervals.bidirectional_blocks: block_ids is torch.uint16 .* expected signed integers",
    ),
    "token-type-ids-unsigned": (
        lambda: Intervals.bidirectional_blocks(torch.zeros(1, 2, dtype=torch.uint8)),
        "Intervals.bidirectional_blocks: block_ids is torch.uint8 .* expected signed integers",
    ),
    "negative-S-of-blocks": (
        lambda: Intervals.bidirectional_blocks(ints([-1, 0]), -1),
        "Intervals.bidirectional_blocks: S is -1, expected an integer from 0",
    ),
    "negative-S-of-padding": (
        lambda: Intervals.key_padding(ints([1, 1]), -1),
        "Intervals.key_padding: S is -1, expected an integer from 0",
    ),
    "negative-S-of-documents": (
        lambda: Intervals.packed(ints(0, 4, dtype=torch.int32), -4, check=False),
        "Intervals.packed: S is -4, expected an integer from 0",
    ),
    "tensor-as-base": (
        lambda: Intervals.bidirectional_blocks(torch.zeros(1, 2).int(), base=torch.ones(2, 2)),
        "Intervals.bidirectional_blocks: the second is of type Tensor, expected Intervals",
    ),
    "list-as-mask": (
        lambda: Intervals.from_dense([[[1]]]), "Intervals.from_dense: mask is of type list, expec"
    ),
    "number-in-union": (
        lambda: Intervals.causal(2).union(1), "Intervals.union: the second is of type int, expect"
    ),
    "negative-T": (lambda: Intervals.causal(3, -2), "Intervals.causal: T is -2, expected"),
    "float-window": (
        lambda: Intervals.sliding_window(1.5, 0, 4),
        "Intervals.sliding_window: left is 1.5, expected an integer from 0",
    ),
    "negative-window": (
        lambda: Intervals.sliding_window(None, -1, 4),
        "Intervals.sliding_window: right is -1, expected an integer from 0",
    ),
    "endless-window": (
        lambda: Intervals.sliding_window(2**63 - 1, 0, 4),
        "left is 9223372036854775807, expected an integer from 0",
    ),
    "chunk-of-nothing": (
        lambda: Intervals.chunked(0, 4), "Intervals.chunked: size is 0, expected an integer from 1"
    ),
    "left-padding": (
        lambda: Intervals.chunked(2, 4, left_padding=ints(0, 5)),
        r"Intervals.chunked: left_padding\[1\] is 5, expected 0 to 4 because there are 4 keys",
    ),
    "lengths-long": (
        lambda: Intervals.key_padding(ints(5, 6), 4, T=5),
        r"Intervals.key_padding: keep\[1\] is 6, expected 0 to 5 because there are 5 keys",
    ),
    "lengths-without-T": (
        lambda: Intervals.key_padding(ints(5, 6), 4),
        r"T is None, expected the number of keys because keep holds lengths. Pass T=k.shape\[2\]",
    ),
    "mask-with-other-T": (
        lambda: Intervals.key_padding(ints([1, 1]), T=3),
        r"T is 3, expected 2 because keep has shape \(1, 2\). Leave T out",
    ),
    "mask-hole": (
        lambda: Intervals.key_padding(ints([1, 1, 0], [1, 0, 1])),
        "Intervals.key_padding: mask row 0 of sequence 1 has a hole between key 0 and key 2",
    ),
    "float-mask": (
        lambda: Intervals.key_padding(torch.ones(2, 3)),
        r"key_padding: keep is torch.float32 \(2, 3\), expected a mask \[B, T\] or integer",
    ),
    "side": (
        lambda: Intervals.key_padding(ints([1]), side="top"),
        "side is 'top', expected 'right' or 'left'. Name the side",
    ),
    "prefix-dtype": (
        lambda: Intervals.prefix(torch.ones(2), 4),
        r"Intervals.prefix: lengths is torch.float32 \(2,\), expected integers \[B\]",
    ),
    "prefix-negative": (
        lambda: Intervals.prefix(ints(-1), 4), r"Intervals.prefix: lengths\[0\] is -1, expected 0"
    ),
    "cu-dtype": (
        lambda: Intervals.packed(ints(0, 4), 4),
        rf"{CU} is torch.int64 \(2,\), expected torch.int32 \[n \+ 1\]",
    ),
    "cu-empty": (
        lambda: Intervals.packed(ints(dtype=torch.int32), 0), rf"{CU} is torch.int32 \(0,\)"
    ),
    "cu-end": (
        lambda: Intervals.packed(ints(0, 3, dtype=torch.int32), 4),
        f"{CU} runs from 0 to 3, expected 0 to 4 because S is 4. Add the padding",
    ),
    "cu-start": (
        lambda: Intervals.packed(ints(1, 4, dtype=torch.int32), 4), f"{CU} runs from 1 to 4"
    ),
    "cu-unsorted": (
        lambda: Intervals.packed(ints(0, 3, 2, 4, dtype=torch.int32), 4),
        f"{CU} falls from 3 to 2 at index 2, expected it never to fall. Pass running sums",
    ),
    "block-ids-dtype": (
        lambda: Intervals.bidirectional_blocks(torch.ones(1, 3)),
        rf"{BLOCKS}block_ids is torch.float32 \(1, 3\), expected signed integers \[B, T\]",
    ),
    "block-returns": (
        lambda: Intervals.bidirectional_blocks(ints([0, 1, 1, 2], [5, 3, 4, 3])),
        f"{BLOCKS}block 3 of sequence 1 ends at key 1 and returns at key 3, expected each block "
        r"to be one run of keys \(1 returns break this\)",
    ),
    "blocks-return-twice": (
        lambda: Intervals.bidirectional_blocks(ints([7, 0, 7, 0, 7])),
        f"{BLOCKS}block 7 of sequence 0 ends at key 0 and returns at key 2, .*3 returns break",
    ),
    "token-type-ids": (
        lambda: Intervals.bidirectional_blocks(ints([0, 0, 1, 1, 0])),
        f"{BLOCKS}block 0 of sequence 0 ends at key 1 and returns at key 4.* text a negative one",
    ),
    "base-hole": (
        lambda: Intervals.bidirectional_blocks(
            ints([-1, -1, 0, 0]), base=Intervals(ints([0] * 4).int(), ints([1] * 4).int())
        ),
        f"{BLOCKS}row 2 of sequence 0 would see keys 2 to 3 and 0 to 0 with a hole",
    ),
    "base-shape": (
        lambda: Intervals.bidirectional_blocks(ints([-1, 0, 0]), base=Intervals.causal(4)),
        rf"{BLOCKS}the second has shape \(1, 4\), expected \[1 or 1, 3\]",
    ),
    "one-dimension": (
        lambda: Intervals(*(ints(0, n, dtype=torch.int32) for n in (1, 2))),
        r"lo has shape \(2,\), expected \[B or 1, S\]",
    ),
    "mask-function-shape": (
        lambda: Intervals.from_mask_function(lambda b, h, q, k: (k[0, 0, 0] < q).mT, 3, 4),
        r"mask_function returned torch.bool \(1, 1, 4, 3\), expected a bool that broadcasts to "
        r"\(1, 1, 3, 4\)",
    ),
    "mask-function-dtype": (
        lambda: Intervals.from_mask_function(lambda b, h, q, k: (k < q).float(), 3),
        "mask_function returned torch.float32",
    ),
    "dense-additive": (
        lambda: Intervals.from_dense(torch.zeros(1, 2, 2)), "of an additive mask pass mask == 0"
    ),
    "and-shapes": (
        lambda: Intervals.causal(3) & Intervals.causal(1),
        r"Intervals &: the second has shape \(1, 1\), expected \[1 or 1, 3\] because the first",
    ),
    "or-batches": (
        lambda: Intervals.key_padding(ints(1, 2), T=3) | Intervals.key_padding(ints(1, 2, 3), T=3),
        r"Intervals \|: the second has shape \(3, 3\), expected \[2 or 1, 3\]",
    ),
    "or-device": (
        lambda: Intervals.causal(3) | Intervals.causal(3, device="meta"),
        r"Intervals \|: the second is on meta, expected cpu like the first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(KernelInputError, match=message):
        build()


def test_only_intervals_compose() -> None:
    with pytest.raises(TypeError):
        Intervals.causal(3) & 1
    with pytest.raises(TypeError):
        Intervals.causal(3) | None
