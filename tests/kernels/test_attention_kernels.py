"""The Triton launchers of attention, against float64 PyTorch differentiated by autograd.

Small tiles take the place of the shipped ones, so that short inputs still span several of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="runs Triton kernels")

from described import descriptors_made, on_sm_90
from mmopt_kernels import attention, tuning
from mmopt_kernels._descriptors import describable
from mmopt_kernels.attention import kernel, kernel_backward
from program_order import last_program_first

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = -(3 << 40) + 12345  # negative, and wider than 32 bits
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}


@dataclass(frozen=True)
class Case:
    """Sizes, mask and features of one call; `layout` is how q, k, v and grad_out are stored."""

    Hq: int = 2
    Hkv: int = 2
    S: int = 17
    T: int = 43
    D: int = 16
    mask: str = "full"
    causal: bool = False
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    dlse: bool = False
    dtype: torch.dtype = FP32
    B: int = 2

    def __str__(self) -> str:
        words = [NAMES[self.dtype], f"H{self.Hq}:{self.Hkv}-S{self.S}-T{self.T}-D{self.D}"]
        words.append(self.mask)
        features = ("causal", "softcap", "sinks", "dropout", "dlse")
        return "-".join(words + [name for name in features if getattr(self, name)])

    def bounds(self) -> tuple[Tensor | None, Tensor | None]:
        S, T = self.S, self.T
        i = torch.arange(S, dtype=torch.int32)[None]
        if self.mask == "full":
            return None, None
        if self.mask == "window":
            return i + (T - S - 9), i + (T - S + 5)
        if self.mask == "packed":
            return i // 13 * 13, i // 13 * 13 + 13
        if self.mask == "left":
            lo = torch.tensor([[T // 3], [0]], dtype=torch.int32).expand(2, S)
            return lo, torch.full_like(lo, T)
        if self.mask == "gaps":
            # Tiles of 16 rows see the first, the last and again the first keys: several runs.
            lo = torch.where(i // 16 % 2 == 0, 0, T - 20).to(torch.int32)
            return lo, lo + 18
        if self.mask == "later":
            # The last of 16 rows misses one key of a block that the others see whole,
            return i + 2, torch.full_like(i, T)
        if self.mask == "earlier":
            # or the first does.
            return torch.zeros_like(i), i + 15
        assert self.mask == "random"
        g = torch.Generator().manual_seed(3)
        # Not monotone; may see nothing, and may reach beyond both ends.
        lo = torch.randint(-4, T, (self.B, S), generator=g, dtype=torch.int32)
        length = torch.randint(0, T, (self.B, S), generator=g, dtype=torch.int32)
        length[:, ::5] = 0
        return lo, lo + length


PLAIN = [
    Case(),
    Case(S=1, T=43, causal=True),
    Case(S=33, T=1, sinks=True),
    Case(Hq=4, Hkv=1, S=43, T=17, D=40, causal=True, dlse=True, dtype=BF16),
    Case(Hq=4, Hkv=2, S=37, T=37, D=24, mask="random", causal=True, softcap=1.5, dtype=FP16),
    Case(S=43, T=43, mask="left", causal=True, sinks=True, dlse=True, dtype=BF16, B=2),
    Case(Hq=4, Hkv=1, S=48, T=48, mask="window", dropout=0.3, dtype=FP16, B=1),
    Case(Hq=2, Hkv=1, S=65, T=65, mask="packed", softcap=0.7, dropout=0.5, B=1),
    Case(S=70, T=40, mask="gaps", dlse=True, B=1, Hq=1, Hkv=1),
    Case(S=33, T=64, causal=True, dropout=0.1, softcap=50.0, B=1),
    Case(
        Hq=4, Hkv=2, S=35, T=43, D=40, mask="random", causal=True, softcap=2.0, sinks=True,
        dropout=0.25, dlse=True,
    ),
    Case(
        Hq=4, Hkv=2, S=35, T=43, D=40, mask="random", causal=True, softcap=2.0, sinks=True,
        dropout=0.25, dlse=True, dtype=BF16,
    ),
]  # fmt: skip


KERNELS = ("attention_forward", "attention_backward_dkdv", "attention_backward_dq")
ONE_PASS = "attention_backward_one_pass"


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tiles(16, 16):
        yield


@contextmanager
def tiles(
    block_m: int, block_n: int, tma: bool = False, split: bool = False, one_pass: bool = False
) -> Iterator[dict[str, tuning.Key]]:
    """Launches inside take these tiles, on a GPU too; yields what each asked with."""
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1, "TMA": tma}
    dkdv = tile | {"SPLIT": split}
    forced: dict[str, tuning.Config | None] = dict.fromkeys(KERNELS, tile)
    forced |= {
        "attention_backward_dkdv": dkdv,
        ONE_PASS: tile | {"BULK": tma} if one_pass else None,
    }
    with tuning.forcing(forced) as asked:
        yield asked


def philox(seed: int, j: np.ndarray, i: np.ndarray, bh: np.ndarray) -> list[np.ndarray]:
    """The words of Philox-4x32-10, in uint64 so that no product overflows."""
    low = np.uint64(0xFFFFFFFF)
    shape = np.broadcast_shapes(j.shape, i.shape, bh.shape)
    c = [np.broadcast_to(x, shape).astype(np.uint64) for x in (j, i, bh, np.zeros(1))]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & low, (a >> np.uint64(32)) ^ c[3] ^ k1, a & low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def kept(case: Case) -> Tensor:
    """[B, Hq, S, T], true where dropout keeps."""
    j, i = np.arange(case.T), np.arange(case.S)[:, None]
    bh = np.arange(case.B * case.Hq).reshape(case.B, case.Hq, 1, 1)
    threshold = min(round(case.dropout * 2**32), 2**32 - 1)
    # Word j % 4 of the draw that four keys share.
    words = np.stack(np.broadcast_arrays(*philox(SEED, j // 4, i, bh)))
    drawn = np.take_along_axis(words, np.broadcast_to(j % 4, words.shape[1:])[None], 0)[0]
    return torch.from_numpy(drawn >= np.uint64(threshold)).to(DEVICE)


def plain_attention(
    case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of the inputs; empty rows give 0 and lse 0 instead of -inf."""
    k, v = (x.repeat_interleave(case.Hq // case.Hkv, 1) for x in (k, v))
    s = q @ k.transpose(2, 3) * case.D**-0.5
    if case.softcap is not None:
        s = case.softcap * torch.tanh(s / case.softcap)
    seen = visible(case)
    s = s.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[None, :, None, None].expand(case.B, -1, case.S, 1)], 3)
    empty = s.isinf().all(3, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    lse = s.logsumexp(3).masked_fill(empty[..., 0], 0.0)
    p = s.softmax(3).masked_fill(empty, 0.0)[..., : case.T]
    if case.dropout:
        p = p * kept(case) / (1 - case.dropout)
    return p @ v, lse


def visible(case: Case) -> Tensor:
    """[B or 1, 1, S, T], true where the query sees the key."""
    j, i = torch.arange(case.T), torch.arange(case.S)[:, None]
    seen = torch.ones(1, 1, case.S, case.T, dtype=torch.bool)
    lo, hi = case.bounds()
    if lo is not None:
        seen = seen & (j >= lo[:, None, :, None]) & (j < hi[:, None, :, None])
    if case.causal:
        seen = seen & (j <= i + case.T - case.S)
    return seen.to(DEVICE)


def in_poison(x: Tensor) -> tuple[Tensor, Tensor]:
    """A [B, S, H, D] view of x inside a buffer of NaN, and that buffer."""
    B, H, N, D = x.shape
    buffer = torch.full((B + 1, N + 3, H + 1, D + 5), float("nan"), dtype=x.dtype, device=DEVICE)
    view = buffer[:B, 1 : N + 1, :H, 2 : D + 2].transpose(1, 2)
    view.copy_(x)
    return view, buffer


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    sinks: Tensor | None
    grad_lse: Tensor | None
    buffers: list[Tensor]


def make(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, case.dtype)

    shapes = [(case.Hq, case.S), (case.Hkv, case.T), (case.Hkv, case.T), (case.Hq, case.S)]
    pairs = [in_poison(draw(case.B, h, n, case.D)) for h, n in shapes]
    # One sink above every score, one below them all.
    sinks = torch.linspace(-9, 9, case.Hq).to(DEVICE) if case.sinks else None
    grad_lse = draw(case.B, case.Hq, case.S).float() if case.dlse else None
    return Inputs(*(view for view, _ in pairs), sinks, grad_lse, [buffer for _, buffer in pairs])


def run(case: Case, x: Inputs, deterministic: bool = False) -> dict[str, Tensor]:
    """Both launchers: out, lse, dq, dk, dv, and dsinks where there are sinks."""
    lo, hi = (None if b is None else b.to(DEVICE) for b in case.bounds())
    seed = torch.tensor([SEED], device=DEVICE) if case.dropout else None
    rest = (case.causal, case.D**-0.5, case.softcap, case.dropout)
    out, lse = kernel.launch(x.q, x.k, x.v, lo, hi, x.sinks, seed, *rest)
    dq, dk, dv, dsinks = kernel_backward.launch_backward(
        x.grad, x.grad_lse, x.q, x.k, x.v, out, lse, lo, hi, x.sinks, seed, *rest, deterministic
    )
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}
    if x.sinks is None:
        assert got.pop("dsinks").shape == (0,)
    return got


def expected(case: Case, x: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same quantities from `plain_attention` computed in dtype, by autograd."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v)]
    sinks = None if x.sinks is None else x.sinks.to(dtype).requires_grad_()
    out, lse = plain_attention(case, *leaves, sinks)
    loss = (out * x.grad.to(dtype)).sum()
    if x.grad_lse is not None:
        loss = loss + (lse * x.grad_lse.to(dtype)).sum()
    leaves += [] if sinks is None else [sinks]
    names = ("dq", "dk", "dv", "dsinks")
    grads = torch.autograd.grad(loss, leaves)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(names, grads, strict=False))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_outputs_and_gradients_match_the_float64_oracle(case: Case) -> None:
    """Error at most twice that of the same PyTorch computation in the inputs' dtype.

    Empty rows give exact zeros, nothing reads the NaN around the inputs, nothing writes there.
    """
    hold_against_the_oracle(case)


@pytest.mark.parametrize("case", [*PLAIN[1:6], *PLAIN[7:10], PLAIN[11]], ids=str)
def test_gradients_of_one_pass_match_the_float64_oracle(case: Case) -> None:
    """As those of two passes do: one key, one query, several runs, groups, every feature."""
    with tiles(16, 32, one_pass=True) as asked:
        hold_against_the_oracle(case)
    assert ONE_PASS in asked
    assert asked.keys().isdisjoint(KERNELS[1:])


@pytest.mark.parametrize("mask", ["later", "earlier"])
def test_a_bound_that_moves_within_whole_blocks_matches_the_float64_oracle(mask: str) -> None:
    hold_against_the_oracle(Case(Hq=1, Hkv=1, S=48, T=48, mask=mask, B=1))


def hold_against_the_oracle(case: Case) -> None:
    x = make(case)
    before = [b.clone() for b in x.buffers]
    got, want, same = run(case, x), expected(case, x, torch.float64), expected(case, x, case.dtype)
    for now, then in zip(x.buffers, before, strict=True):
        assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))
    dp = x.grad.double() @ x.v.double().repeat_interleave(case.Hq // case.Hkv, 1).transpose(2, 3)
    eps32 = torch.finfo(FP32).eps
    largest_term = dp.abs().max().item() * case.D**-0.5 * x.k.abs().max().item()
    empty = ~visible(case).any(3).expand(case.B, case.Hq, case.S)
    if not case.sinks:
        assert torch.equal(got["lse"] == float("-inf"), empty)
        got["lse"] = got["lse"].masked_fill(empty, 0.0)
    assert not got["out"][empty].any()
    assert not got["dq"][empty].any()
    for name, value in got.items():
        assert value.dtype == (FP32 if name in ("lse", "dsinks") else case.dtype)
        assert value.isfinite().all(), name
        error = (value.double() - want[name]).abs().max().item()
        allowed = (same[name].double() - want[name]).abs().max().item()
        # Where PyTorch happens to be exact: one rounding of the largest value. Gradients also
        # inherit the float32 rounding of lse, from which they recompute the probabilities, and
        # that of dout . v - delta, which cancels where one key takes all the weight.
        largest = want[name].abs().max().item()
        allowed = max(allowed, torch.finfo(case.dtype).eps * largest)
        if name.startswith("d"):
            allowed = max(allowed, eps32 * largest * want["lse"].abs().max().item())
        if name in ("dq", "dk"):
            allowed = max(allowed, eps32 * largest_term)
        assert error <= 2 * allowed, f"{name}: {error:.2e}, PyTorch {allowed:.2e}"


def test_lse_and_its_gradient_may_be_stored_in_any_order() -> None:
    case = Case(S=19, T=21, sinks=True, dlse=True)
    x = make(case)
    rest = (None, None, x.sinks, None, False, 0.25, None, 0.0)
    out, lse = kernel.launch(x.q, x.k, x.v, *rest)
    inputs = (x.q, x.k, x.v, out)
    want = kernel_backward.launch_backward(x.grad, x.grad_lse, *inputs, lse, *rest)
    turned, turned_grad = (t.mT.contiguous().mT for t in (lse, x.grad_lse))
    got = kernel_backward.launch_backward(x.grad, turned_grad, *inputs, turned, *rest)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_gradients_are_bitwise_equal_between_runs() -> None:
    case = PLAIN[-2]
    x = make(case)
    first, second = run(case, x), run(case, x)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own order")
def test_no_program_writes_into_the_place_of_another() -> None:
    """Tails of rows, of keys and of the head dimension, whichever program comes last."""
    case = Case(Hq=2, Hkv=1, S=19, T=21, D=24, mask="random", sinks=True, dlse=True)
    x = make(case)
    want = run(case, x)
    with last_program_first():
        got = run(case, x)
    with last_program_first(), tiles(16, 16, one_pass=True):
        once = run(case, x)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
        torch.testing.assert_close(once[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [
    Case(Hq=3, Hkv=3, S=20, T=23, causal=True),
    Case(Hq=6, Hkv=3, S=20, T=23, mask="random", sinks=True),
], ids=str)  # fmt: skip
def test_the_order_of_programs_moves_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 or 12 heads all side by side, or 3, or none."""
    x = make(case)
    want = run(case, x)
    asked = []

    def three(*given: Any) -> tuple[int, ...]:
        asked.append(given)
        _, n_bh, n_tiles, _ = given
        return 3, n_tiles, n_bh // 3

    def none(_uneven: bool, n_bh: int, n_tiles: int, _read: Tensor) -> tuple[int, ...]:
        return (n_bh * n_tiles,)

    for instead in (three, none):
        for module in (kernel, kernel_backward):
            monkeypatch.setattr(module, "grid_of", instead)
        got = run(case, x)
        for name, value in want.items():
            assert torch.equal(got[name], value), name
    pairs, of_group = 2 * case.Hq, 2 * case.Hkv
    keys, queries = x.k.shape, x.q.shape
    assert [(*given, read.shape) for *given, read in asked] == [
        (True, pairs, 2, keys),
        (True, of_group, 2, queries),
        (True, pairs, 2, keys),
    ]


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_dropout_mask_is_philox_whatever_the_tile(tile: tuple[int, int]) -> None:
    """With identities for v and grad_out, out and dv are the dropped probabilities themselves."""
    case = Case(B=2, Hq=2, Hkv=2, S=35, T=35, D=35, dropout=0.4)
    x = make(case)
    x.v.copy_(torch.eye(35))
    x.grad.copy_(torch.eye(35))
    with tiles(*tile):
        got = run(case, x)
    assert torch.equal(got["out"] != 0, kept(case))
    # dv[j, i] = d_ij p_ij
    assert torch.equal(got["dv"].transpose(2, 3) != 0, kept(case))
    want = expected(case, x, torch.float64)
    torch.testing.assert_close(got["dq"].double(), want["dq"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got["dk"].double(), want["dk"], atol=1e-6, rtol=1e-5)


def test_numpy_philox_gives_the_known_answer() -> None:
    """Random123's kat_vectors, philox4x32 10 rounds, counter and key zero."""
    zero = np.zeros(1, dtype=np.int64)
    assert philox(0, zero, zero, zero)[0] == 0x6627E8D5


@pytest.mark.parametrize("softcap", [0.1, 50.0])
def test_softcap_keeps_float32_accuracy_from_small_to_saturated_scores(softcap: float) -> None:
    """lse of a single key is the capped score itself."""
    raw = torch.cat([torch.logspace(-6, 2.5, 60), -torch.logspace(-6, 2.5, 60)]).to(DEVICE)
    q = torch.zeros(1, 1, 120, 16, device=DEVICE)
    q[..., 0] = raw
    k = torch.zeros(1, 1, 1, 16, device=DEVICE)
    k[..., 0] = 1.0
    _, lse = kernel.launch(q, k, k, None, None, None, None, False, 1.0, softcap, 0.0)
    want = softcap * torch.tanh(raw.double() / softcap)
    # log2, exp2 and two changes of base round the largest score; tanh itself stays within 2 ulp.
    error = (lse[0, 0].double() - want).abs()
    assert (error <= 5e-7 * want.abs()).all()


def test_infinite_sink_scores_and_gradient_of_an_empty_row_do_not_spread() -> None:
    """A sink of -inf acts as none; an empty row's lse gradient, even NaN, reaches nothing."""
    case = Case(S=20, T=20, mask="random", causal=True, dlse=True)
    x = make(case)
    plain = run(case, x)
    x.grad_lse[:, :, ::5] = float("nan")
    poisoned = run(case, x)
    x.sinks = torch.full((2,), float("-inf"), device=DEVICE)
    with_sink = run(case, x)
    assert not with_sink.pop("dsinks").any()
    for name, value in plain.items():
        assert torch.equal(value, poisoned[name]), name
        assert torch.equal(value, with_sink[name]), name


@pytest.mark.parametrize("key", [0.0, float("nan")])
@pytest.mark.parametrize("sink", [None, 0.5])
def test_an_empty_row_among_rows_that_see_whole_blocks_stays_empty(
    sink: float | None, key: float
) -> None:
    """The loop without a mask takes it along, and what it gathers there is no one's."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 6, 16, generator=g).to(DEVICE)
    k, v = (torch.randn(1, 1, 96, 16, generator=g).to(DEVICE) for _ in range(2))
    k[:, :, 40] = key
    lo = torch.zeros(1, 6, dtype=torch.int32, device=DEVICE)
    hi = torch.full_like(lo, 96)
    lo[0, 2] = hi[0, 2] = 5
    sinks = None if sink is None else torch.tensor([sink], device=DEVICE)
    out, lse = kernel.launch(q, k, v, lo, hi, sinks, None, False, 0.25, None, 0.0)
    assert not out[0, 0, 2].any()
    assert lse[0, 0, 2].item() == pytest.approx(float("-inf") if sink is None else sink)
    others = lse[0, 0, [0, 1, 3, 4, 5]]
    assert (others.isfinite() if key == 0.0 else others.isnan()).all()


@pytest.mark.parametrize("one_pass", [False, True], ids=["two-passes", "one-pass"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scores_far_below_zero_meet_no_absent_key_or_row(causal: bool, one_pass: bool) -> None:
    """Of what is not there the score reads 0, and exp2(0 - lse) overflows."""
    case = Case(S=19, T=21, D=24, causal=causal, dtype=FP16)
    x = make(case)
    x.q.copy_(5 + x.q / 8)
    x.k.copy_(-9 + x.k / 8)
    with tiles(16, 16, one_pass=one_pass):
        got = run(case, x)
    want, rough = expected(case, x, torch.float64), expected(case, x, FP16)
    assert want["lse"].max() < -150
    for name, value in want.items():
        limit = 2 * (rough[name].double() - value).abs().max().item()
        torch.testing.assert_close(got[name].double(), value, atol=limit, rtol=0)


@pytest.mark.parametrize("more", range(16))
def test_a_causal_mask_needs_no_bounds_whatever_its_diagonal_starts_at(more: int) -> None:
    """Which tiles need a mask is arithmetic on S and T, exact where the diagonal ends a tile."""
    case = Case(Hq=1, Hkv=1, S=33, T=33 + more, causal=True, B=1)
    x = make(case)
    plain = run(case, x)
    want = expected(case, x, torch.float64)
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(plain[name].double(), want[name], atol=1e-5, rtol=1e-5)


def test_runs_list_every_tile_that_a_key_block_meets_and_few_others() -> None:
    """Tiles come in order, once; the mask-free ones are whole; all but the last run are exact."""
    S, T, M, N = 16 * 12, 16 * 3, 16, 16
    g = torch.Generator().manual_seed(0)
    # [rows of bounds, S]: gaps, full tiles and partial ones mixed; then a monotone mask.
    lo = torch.randint(0, 3, (S // M,), generator=g).repeat_interleave(M) * 16
    hi = lo + torch.randint(0, 40, (S // M,), generator=g).repeat_interleave(M)
    window = torch.arange(S) // 6
    lo, hi = torch.stack([lo, window]).int(), torch.stack([hi, window + 20]).int()
    lo, hi = lo.to(DEVICE), hi.clamp(max=T).to(DEVICE)
    row = [lo.view(2, -1, M), hi.view(2, -1, M)]
    some = (row[0] < row[1]).any(2)
    least = [torch.where(row[0] < row[1], r, T).amin(2) for r in row]
    most = [torch.where(row[0] < row[1], r, 0).amax(2) for r in row]
    tiles = torch.stack([least[0], most[1], most[0], least[1]], 2).int().contiguous()
    n_n, n_m = T // N, S // M
    runs = torch.empty(2, n_n, kernel_backward.RUNS, 3, dtype=torch.int32, device=DEVICE)
    kernel_backward.attention_backward_runs[(2 * n_n,)](
        tiles, runs, S, T, BLOCK_M=M, BLOCK_N=N, RUNS=kernel_backward.RUNS, SEARCH=4
    )
    for b, n in itertools.product(range(2), range(n_n)):
        meets = some[b] & (least[0][b] < (n + 1) * N) & (most[1][b] > n * N)
        whole = meets & (most[0][b] <= n * N) & (least[1][b] >= (n + 1) * N)
        masked, free = [], []
        for start, middle, end in runs[b, n, :-1].tolist():
            masked += range(start, middle)
            free += range(middle, end)
        exact = sorted(masked + free)
        assert exact == sorted(set(exact))
        covered = set(exact)
        start, middle, end = runs[b, n, -1].tolist()
        assert middle == end == n_m
        assert all(meets[m] for m in exact)
        assert all(whole[m] for m in free)
        assert not any(whole[m] for m in masked)
        assert {m for m in range(n_m) if meets[m]} <= covered | set(range(start, n_m))
        assert b == 0 or start == n_m, "a monotone mask needs no inexact run"


def test_kernels_without_their_features_are_not_recompiled_for_a_threshold() -> None:
    """dropout_p arrives as a signed 32-bit number whatever its value."""
    from mmopt_kernels._philox import dropout_scales

    for p in (0.0, 0.1, 0.5, 0.9, 1 - 2**-40):
        threshold, scale = dropout_scales(p)
        assert -(2**31) <= threshold < 2**31
        assert threshold % 2**32 == min(round(p * 2**32), 2**32 - 1)
        assert math.isclose(scale, 1 / (1 - p))


def in_aligned_poison(x: Tensor) -> Tensor:
    """A [B, S, H, D] view as `in_poison` gives it, whose base and strides are whole 16 bytes."""
    B, H, N, D = x.shape
    step = 16 // x.element_size()
    width = (D + 1) // step * step + 2 * step
    buffer = torch.full((B + 1, N + 3, H + 1, width), float("nan"), dtype=x.dtype, device=DEVICE)
    view = buffer[:B, 1 : N + 1, :H, step : D + step].transpose(1, 2)
    view.copy_(x)
    return view


DESCRIBED = [
    # Heads that fill their block and others; tails of both tiles; GQA; S != T; sizes of 1.
    Case(Hq=4, Hkv=2, S=35, T=43, D=40, mask="random", causal=True, dlse=True, dtype=BF16),
    Case(S=17, T=43, D=72, causal=True, softcap=1.5, sinks=True, dtype=FP16),
    Case(Hq=4, Hkv=1, S=48, T=33, D=80, dropout=0.3, dtype=BF16, B=1),
    Case(Hq=2, Hkv=1, S=1, T=37, D=16, mask="left", dtype=FP16),
    Case(Hq=1, Hkv=1, S=19, T=1, D=24, dtype=BF16, B=1),
    Case(S=40, T=40, D=20, mask="window", causal=True),
]


@pytest.mark.parametrize("case", DESCRIBED, ids=str)
def test_descriptors_and_pointers_give_the_same_bits(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NaN around the inputs, which a descriptor must not read, would show in any result."""
    x = make(case)
    x.q, x.k, x.v, x.grad = (in_aligned_poison(t) for t in (x.q, x.k, x.v, x.grad))
    pointers = run(case, x)
    made = descriptors_made(monkeypatch)
    with on_sm_90(), tiles(16, 16, tma=True) as asked:
        described = run(case, x)
    assert set(asked) == {*KERNELS, ONE_PASS}
    # q, k, v and out; q, k, v, dout, dk and dv; q, k, v, dout and dq.
    assert len(made) == 4 + 6 + 5
    for name, value in pointers.items():
        assert value.isfinite().all() or name == "lse", name
        assert torch.equal(value, described[name]), name


def storage_at(x: Tensor, offset: int) -> Tensor:
    """x in storage of its own, from element offset on."""
    buffer = torch.zeros(x.numel() + offset, dtype=x.dtype, device=x.device)
    view = buffer[offset:].view(x.shape)
    view.copy_(x)
    return view


def test_only_what_a_descriptor_can_describe_is_loaded_through_one() -> None:
    x = torch.zeros(2, 5, 3, 16, dtype=BF16, device=DEVICE).transpose(1, 2)
    assert describable(x, x)
    assert describable(storage_at(x, 8))
    assert not describable(x, storage_at(x, 1)), "base"
    assert not describable(torch.zeros(2, 3, 5, 20, dtype=BF16)), "rows of 40 bytes"
    assert describable(torch.zeros(2, 3, 5, 20)), "rows of 80 bytes"
    assert not describable(x[:, :1].expand(2, 3, 5, 16)), "stride 0"
    assert not describable(x[:, :, :0]), "nothing to describe"
    # Nobody steps along a dimension of size 1, whatever its stride.
    assert describable(x.as_strided((1, 1, 5, 16), (7, 3, 48, 1)))
    assert describable(x.as_strided((1, 3, 1, 16), (0, 16, 5, 1)))


@pytest.mark.parametrize("case", [Case(D=20, dtype=BF16), Case(D=16, dtype=FP16)], ids=str)
def test_unaligned_tensors_are_loaded_through_pointers(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a target whose table asks for descriptors, and with its own tiles."""
    x = make(case)
    before = run(case, x)
    made = descriptors_made(monkeypatch)
    with on_sm_90(), tuning.forcing({}):
        after = run(case, x)
        assert made == []
        x.q, x.k, x.v, x.grad = (in_aligned_poison(t) for t in (x.q, x.k, x.v, x.grad))
        run(case, x)
    assert made == [] if case.D == 20 else len(made) >= 4
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["grad", "q", "k", "v", "out"])
def test_backward_takes_one_tensor_that_is_stored_otherwise_than_the_rest(name: str) -> None:
    """One that no descriptor describes, and whose strides 8 elements do not divide."""
    case = Case(Hq=2, Hkv=1, S=17, T=20, D=24, causal=True, dtype=FP16, B=2)
    x = make(case)
    inputs = {n: in_aligned_poison(getattr(x, n)) for n in ("grad", "q", "k", "v")}
    rest = (None, None, None, None, True, 0.2, None, 0.0)
    inputs["out"], lse = kernel.launch(inputs["q"], inputs["k"], inputs["v"], *rest)

    def backward(target: AbstractContextManager[None]) -> tuple[tuple[Tensor, ...], bool]:
        grad, q, k, v, out = inputs.values()
        with target, tiles(16, 16) as asked:
            got = kernel_backward.launch_backward(grad, None, q, k, v, out, lse, *rest)
        return got, asked["attention_backward_dq"].tma

    want, described = backward(on_sm_90())
    assert described
    inputs[name] = in_poison(inputs[name])[0]
    got, described = backward(on_sm_90())
    # What the forward returned is read through pointers in any case.
    assert described is (name == "out")
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if index < 2 else pytest.mark.slow)
        for index, case in enumerate(PLAIN[-4:])
    ],
    ids=str,
)
def test_dk_and_dv_of_two_launches_are_those_of_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(case)
    both = run(case, x)
    made = []
    over_keys = kernel_backward.attention_backward_dkdv

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                made.append([n for n in ("DK", "DV") if options[n]])
                over_keys[grid](*args, **options)

            return launch

    monkeypatch.setattr(kernel_backward, "attention_backward_dkdv", Recorder())
    with tiles(16, 16, split=True):
        split = run(case, x)
    assert sorted(made) == [["DK"], ["DV"]]
    for name, value in both.items():
        assert torch.equal(value, split[name]), name


@pytest.mark.parametrize("case", DESCRIBED[:1] + DESCRIBED[3:4], ids=str)
def test_one_pass_through_descriptors_is_that_through_pointers(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the order in which a GPU adds up dQ."""
    x = make(case)
    x.q, x.k, x.v, x.grad = (in_aligned_poison(t) for t in (x.q, x.k, x.v, x.grad))
    with tiles(16, 16, one_pass=True):
        pointers = run(case, x)
    made = descriptors_made(monkeypatch)
    with on_sm_90(), tiles(16, 16, tma=True, one_pass=True):
        described = run(case, x)
    assert len(made) == 4 + 6  # as of two passes, without those of dQ
    limit = 4 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(described.pop("dq"), pointers.pop("dq"), rtol=limit, atol=1e-5)
    for name, value in pointers.items():
        assert torch.equal(value, described[name]), name


def test_what_must_be_deterministic_takes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tables say: asked of the op, or of PyTorch as a whole."""
    case = Case(S=20, T=20, causal=True, B=1)
    x = make(case)
    two = run(case, x)
    for everywhere in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda e=everywhere: e)
        with tiles(16, 16, one_pass=True) as asked:
            got = run(case, x, deterministic=not everywhere)
        assert set(asked) == set(KERNELS)
        for name, value in two.items():
            assert torch.equal(value, got[name]), name


def test_the_op_says_whether_one_pass_may_be_taken() -> None:
    q = torch.zeros(1, 1, 5, 16, device=DEVICE, requires_grad=True)
    for deterministic in (False, True):
        out = attention(q, q, q, deterministic=deterministic, impl="triton")
        with tiles(16, 16, one_pass=True) as asked:
            out.sum().backward()
        assert (ONE_PASS in asked) is not deterministic


def test_one_pass_over_no_keys_gives_zeros() -> None:
    x = torch.ones(1, 2, 5, 16, device=DEVICE)
    none = x[:, :, :0]
    lse = torch.full((1, 2, 5), float("-inf"), device=DEVICE)
    inputs = (x, None, x, none, none, torch.zeros_like(x), lse, None, None, None, None)
    with tiles(16, 16, one_pass=True) as asked:
        dq, dk, _, _ = kernel_backward.launch_backward(*inputs, False, 1.0, None, 0.0)
    assert ONE_PASS in asked
    assert dk.shape == none.shape
    assert not dq.any()
