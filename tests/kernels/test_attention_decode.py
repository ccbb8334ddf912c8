"""The decode kernels against the float64 oracle, and when the op uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="runs Triton kernels")

from mmopt_kernels import Intervals, _triton, attention
from mmopt_kernels.attention import kernel, kernel_decode, tiles
from mmopt_kernels.attention.reference import reference
from program_order import last_program_first

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# As in test_attention.py: rounding of the output and of the probabilities.
TOLERANCE = {FP32: 2e-5, FP16: 4e-3, BF16: 3e-2}


@dataclass(frozen=True)
class Case:
    """T keys are in use of `room` that the cache holds; `splits` are asked for."""

    Hq: int = 4
    Hkv: int = 2
    S: int = 1
    T: int = 150
    D: int = 16
    mask: str = "full"
    causal: bool = True
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = FP32
    splits: int = 3
    B: int = 2

    def __str__(self) -> str:
        name = f"{self.dtype}".removeprefix("torch.")
        name += f"-H{self.Hq}:{self.Hkv}-S{self.S}-T{self.T}-D{self.D}-{self.mask}"
        name += f"-splits{self.splits}" + "-causal" * self.causal
        return name + "-cap" * bool(self.softcap) + "-sinks" * self.sinks

    def bounds(self) -> tuple[Tensor | None, Tensor | None]:
        B, S, T = self.B, self.S, self.T
        if self.mask == "full":
            return None, None
        i = torch.arange(S, dtype=torch.int32).expand(B, S)
        if self.mask == "window":
            # Narrower than a tile, and far from the first key: most of T is in no split.
            return i + (T - S - 20), i + (T - S + 1)
        if self.mask == "lengths":
            # Sequences of 5 and of all keys.
            hi = torch.tensor([5, T], dtype=torch.int32)[:, None].expand(B, S)
            return torch.zeros_like(hi), hi
        if self.mask == "left":
            lo = torch.tensor([T // 2, 0], dtype=torch.int32)[:, None].expand(B, S)
            return lo, torch.full_like(lo, T)
        assert self.mask == "empty"
        # Sequence 0 sees nothing; of sequence 1, query 0 nothing and the last something.
        lo = torch.full((B, S), 3, dtype=torch.int32)
        hi = torch.full((B, S), 3, dtype=torch.int32)
        hi[1, -1] = T - 1
        return lo, hi


# Tiles hold 64 keys (32 in float32): a few tiles to each split, one, less than one, and splits
# that see nothing.
CASES = [
    Case(),
    Case(T=1, splits=1),
    Case(T=1, splits=4),
    Case(Hq=2, S=2, T=31, splits=5, causal=False),
    Case(Hq=8, Hkv=1, S=4, T=257, D=40, dtype=BF16, splits=7),
    Case(Hq=8, Hkv=2, T=333, D=64, dtype=FP16, splits=2),
    Case(Hq=16, Hkv=2, S=2, T=130, D=80, dtype=BF16, splits=16, mask="lengths"),
    Case(Hq=2, S=4, T=200, D=128, dtype=FP16, splits=3, mask="left", softcap=3.0),
    Case(S=4, T=300, mask="window", sinks=True, splits=4),
    Case(S=3, T=97, mask="empty", splits=3, causal=False),
    Case(S=3, T=97, mask="empty", sinks=True, softcap=2.0, splits=3),
    Case(Hq=8, Hkv=2, S=4, T=190, mask="lengths", softcap=1.5, sinks=True, splits=20, dtype=BF16),
    # More queries than keys: the first see none.
    Case(Hq=2, Hkv=1, S=16, T=9, splits=2),
    Case(Hq=16, Hkv=1, S=4, T=70, D=24, splits=2, mask="left"),
    # As many splits as the merge holds, in several chunks; most of them see nothing.
    Case(B=1, Hq=1, Hkv=1, T=129, splits=128, causal=False),
]  # fmt: skip


def cache_of(x: Tensor, room: int, fill: float) -> Tensor:
    """``[B, Hkv, T, D]`` as a view of a cache ``[B, room, Hkv, D + 3]`` that holds ``fill``."""
    B, H, T, D = x.shape
    storage = torch.full((B, room, H, D + 3), fill, dtype=x.dtype, device=DEVICE)
    view = storage[:, 2 : T + 2, :, 1 : D + 1].transpose(1, 2)
    view.copy_(x)
    return view


def inputs(case: Case) -> list[Tensor]:
    """q, k and v; the caches are NaN wherever they hold none of the T keys."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, case.dtype)

    q = draw(case.B, case.S, case.Hq, case.D).transpose(1, 2)
    k, v = (draw(case.B, case.Hkv, case.T, case.D) for _ in range(2))
    return [q, *(cache_of(x, case.T + 70, float("nan")) for x in (k, v))]


def arguments(case: Case) -> tuple[Any, ...]:
    """What follows q, k and v in every launcher and in the reference."""
    lo, hi = (None if x is None else x.to(DEVICE) for x in case.bounds())
    sinks = torch.linspace(-3, 4, case.Hq, device=DEVICE) if case.sinks else None
    return lo, hi, sinks, None, case.causal, case.D**-0.5, case.softcap, 0.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_matches_the_float64_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """out and lse; rows without keys give zeros and -inf, or the sink."""
    monkeypatch.setattr(kernel_decode, "splits", lambda *_: case.splits)
    q, k, v = inputs(case)
    rest = arguments(case)
    out, lse = kernel_decode.launch_decode(q, k, v, *rest)
    want, want_lse = reference(q.double(), k.double(), v.double(), *rest)
    assert out.dtype == case.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    assert out.isfinite().all()
    limit = TOLERANCE[case.dtype] * max(1.0, want.abs().max().item())
    assert (out.double() - want).abs().max().item() <= limit
    seen = want_lse.isfinite()
    assert torch.equal(lse == float("-inf"), ~seen)
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=1e-5, rtol=1e-6)
    assert not out[~seen].any()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own order")
def test_no_program_writes_into_the_place_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a group and a head dimension that fill no tile, whichever program comes last."""
    case = Case(Hq=6, Hkv=2, S=3, T=70, D=24, mask="left", sinks=True)
    monkeypatch.setattr(kernel_decode, "splits", lambda *_: case.splits)
    q, k, v = inputs(case)
    want, want_lse = kernel_decode.launch_decode(q, k, v, *arguments(case))
    with last_program_first():
        out, lse = kernel_decode.launch_decode(q, k, v, *arguments(case))
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_scores_far_below_zero_meet_no_absent_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a split that is not there the maximum reads 0, and exp2(0 - maximum) overflows."""
    case = Case(T=150, splits=3)
    monkeypatch.setattr(kernel_decode, "splits", lambda *_: case.splits)
    q, k, v = inputs(case)
    q.copy_(6 + q / 8)
    k.copy_(-9 + k / 8)
    rest = arguments(case)
    out, lse = kernel_decode.launch_decode(q, k, v, *rest)
    want, want_lse = reference(q.double(), k.double(), v.double(), *rest)
    assert want_lse.max() < -150
    # The float32 rounding of a score, of some 200, is that of a probability.
    torch.testing.assert_close(out.double(), want, atol=2e-4, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=0, rtol=1e-6)


@pytest.mark.parametrize("launch", [kernel.launch, kernel_decode.launch_decode])
def test_strided_and_expanded_sinks_are_read_right(launch: Callable[..., Any]) -> None:
    case = Case(T=40)
    q, k, v = inputs(case)
    lo, hi, _, *rest = arguments(case)
    one = torch.full((1,), 0.5, device=DEVICE).expand(4)
    for sinks in (torch.linspace(-3, 4, 8, device=DEVICE)[::2], one):
        want = launch(q, k, v, lo, hi, sinks.clone(memory_format=torch.contiguous_format), *rest)
        for got, expected in zip(launch(q, k, v, lo, hi, sinks, *rest), want, strict=True):
            assert torch.equal(got, expected)


def test_keys_that_no_query_of_a_sequence_sees_are_not_read() -> None:
    """A static cache is longer than its sequences, and may hold anything behind them."""
    case = Case(S=2, T=150, causal=False)
    q, k, v = inputs(case)
    # Of sequence 1, query 0 sees nothing, wherever its bounds are.
    lo = torch.tensor([[0, 0], [7, 40]], dtype=torch.int32, device=DEVICE)
    hi = torch.tensor([[5, 3], [7, 120]], dtype=torch.int32, device=DEVICE)
    rest = arguments(case)[2:]
    want, want_lse = kernel_decode.launch_decode(q, k, v, lo, hi, *rest)
    assert want[0].any()
    for x in (k, v):
        x[0, :, 5:] = x[1, :, :40] = x[1, :, 120:] = float("nan")
    out, lse = kernel_decode.launch_decode(q, k, v, lo, hi, *rest)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_splits_share_what_is_visible_rather_than_the_cache() -> None:
    """A window at the end of a long cache occupies every split, and in order."""
    case = Case(B=1, Hq=1, Hkv=1, S=1, T=4096, causal=False)
    q, k, v = inputs(case)
    BLOCK_N, n_splits = 32, 4
    lo = torch.tensor([[4096 - 5 * BLOCK_N]], dtype=torch.int32, device=DEVICE)
    hi = torch.full_like(lo, 4096)
    acc, most, total = (torch.empty(1, 1, 1, n_splits, n, device=DEVICE) for n in (16, 1, 1))
    # fmt: off
    kernel_decode.attention_decode[(n_splits,)](
        q, k, v, lo, hi, acc, most, total, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        1, 1, 1, 1, 1, 1, 4096, n_splits, 0.3, 0.0, GROUP=1, D=16, BLOCK_D=16, BLOCK_M=16,
        BLOCK_N=BLOCK_N, INTERVALS=True, CAUSAL=False, SOFTCAP=False, WIDEN=False,
        PRECISION="ieee", VECTOR=1,
    )
    # fmt: on
    s = 0.3 * (q.double() @ k.double().transpose(2, 3))[0, 0, 0, -5 * BLOCK_N :]
    # Five tiles over four splits: the first takes two.
    for got, part in zip(most.flatten(), s.split([2 * BLOCK_N] + 3 * [BLOCK_N]), strict=True):
        torch.testing.assert_close(got.double(), part.max(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("splits", [1, 2, 5, 20])
def test_number_of_splits_changes_no_more_than_rounding(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(Hq=2, Hkv=1, S=2, T=300, mask="left", sinks=True)
    q, k, v = inputs(case)
    want, want_lse = kernel.launch(q, k, v, *arguments(case))
    monkeypatch.setattr(kernel_decode, "splits", lambda *_: splits)
    first = kernel_decode.launch_decode(q, k, v, *arguments(case))
    torch.testing.assert_close(first[0], want, atol=2e-6, rtol=0)
    torch.testing.assert_close(first[1], want_lse, atol=2e-6, rtol=0)
    again = kernel_decode.launch_decode(q, k, v, *arguments(case))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_op_decodes_where_it_pays_and_its_gradients_are_the_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The op's forward is the decode kernel's, its backward agrees with the oracle's."""
    calls = []
    launch = kernel_decode.launch_decode
    monkeypatch.setattr(kernel_decode, "LEAST_KEYS", 40)
    monkeypatch.setattr(
        kernel_decode, "launch_decode", lambda *args: calls.append(args) or launch(*args)
    )
    case = Case(Hq=4, Hkv=2, S=2, T=90, mask="left", softcap=2.0, sinks=True)
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs(case))
    lo, hi, sinks, *_ = arguments(case)
    sinks.requires_grad_()
    leaves = [q, k, v, sinks]
    options = {"intervals": Intervals(lo, hi), "causal": True, "softcap": 2.0, "sinks": sinks}
    out, lse = attention(q, k, v, impl="triton", return_lse=True, **options)
    assert len(calls) == 1
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    options["sinks"] = wide[3]
    want, want_lse = attention(*wide[:3], impl="reference", return_lse=True, **options)
    wanted = torch.autograd.grad(want.square().sum() + want_lse.sum(), wide)
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)
    # Dropout is the ordinary kernel's.
    attention(q, k, v, impl="triton", dropout_p=0.5, seed=1, **options | {"sinks": sinks})
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("Hq", "Hkv", "S", "T", "dropout_p", "want"),
    [
        (32, 8, 1, 4096, 0.0, True),
        (32, 8, 16, 512, 0.0, True),
        (32, 8, 17, 4096, 0.0, False),  # 68 rows
        (64, 1, 1, 4096, 0.0, True),
        (32, 8, 1, 511, 0.0, False),  # one split
        (32, 8, 1, 4096, 0.1, False),
    ],
)
def test_decode_is_for_few_queries_against_many_keys(
    Hq: int, Hkv: int, S: int, T: int, dropout_p: float, want: bool
) -> None:
    q = torch.empty(2, Hq, S, 64, device="meta")
    k = torch.empty(2, Hkv, T, 64, device="meta")
    assert kernel_decode.uses_decode(q, k, dropout_p) is want


def test_splits_fill_the_gpu_once_and_stay_within_their_bounds() -> None:
    """Programs are twice the multiprocessors where keys allow, never splits without keys."""
    assert kernel_decode.splits(8, 2**20, 132) == 33  # 8 * 33 = 2 * 132
    assert kernel_decode.splits(1, 2**20, 132) == kernel_decode.MAX_SPLITS
    assert kernel_decode.splits(1, 1024, 132) == 4
    assert kernel_decode.splits(1000, 2**20, 132) == 1
    assert kernel_decode.splits(1, 0, 132) == 1
    assert kernel_decode.splits(0, 0, 132) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU says its own number")
def test_number_of_multiprocessors_is_assumed_without_a_gpu() -> None:
    for device in ("cpu", "meta", "cuda", "cuda:1"):
        found = tiles.multiprocessors(torch.device(device))
        assert found == tiles.ASSUMED_MULTIPROCESSORS


def test_launcher_needs_no_data_under_an_assumed_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors reach both kernels, with the target's tile: builds record these launches."""
    launched: list[tuple[str, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launched.append((self.name, kwargs))

    for name in ("attention_decode", "attention_decode_merge"):
        monkeypatch.setattr(kernel_decode, name, Recorder(name))
    q = torch.empty(1, 32, 1, 128, dtype=BF16, device="meta")
    k = torch.empty(1, 8, 8192, 128, dtype=BF16, device="meta")
    for target, stages in (("sm_90", 3), ("gfx942", 2)):
        launched.clear()
        with _triton.assuming(target):
            kernel_decode.launch_decode(q, k, k, None, None, None, None, True, 0.1, None, 0.0)
        assert [name for name, _ in launched] == ["attention_decode", "attention_decode_merge"]
        assert launched[0][1]["num_stages"] == stages
        assert launched[0][1]["BLOCK_M"] == 16


def test_empty_batch_launches_nothing() -> None:
    q = torch.empty(0, 4, 1, 16, device=DEVICE)
    k = torch.empty(0, 2, 600, 16, device=DEVICE)
    out, lse = kernel_decode.launch_decode(q, k, k, None, None, None, None, True, 0.1, None, 0.0)
    assert out.shape == q.shape
    assert lse.shape == (0, 4, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("Hq", "Hkv", "S"), [(32, 8, 1), (32, 1, 2), (16, 16, 4)], ids=str)
def test_long_cache_matches_the_ordinary_kernel(
    Hq: int, Hkv: int, S: int, dtype: torch.dtype
) -> None:
    """100,003 keys with the shipped tiles and splits, half of the batch short."""
    g = torch.Generator(DEVICE).manual_seed(0)
    q = torch.randn(4, Hq, S, 128, generator=g, device=DEVICE).to(dtype)
    k, v = (
        torch.randn(4, 100_003, Hkv, 128, generator=g, device=DEVICE).to(dtype).transpose(1, 2)
        for _ in range(2)
    )
    assert kernel_decode.uses_decode(q, k, 0.0)
    hi = torch.tensor([100_003, 77, 50_000, 0], dtype=torch.int32, device=DEVICE)[:, None]
    bounds = (torch.zeros_like(hi).expand(4, S), hi.expand(4, S))
    rest = (None, None, True, 128**-0.5, None, 0.0)
    out, lse = kernel_decode.launch_decode(q, k, v, *bounds, *rest)
    want, want_lse = kernel.launch(q, k, v, *bounds, *rest)
    torch.testing.assert_close(out, want, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-5)
