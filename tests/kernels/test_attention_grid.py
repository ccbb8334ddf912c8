"""Every two features of attention together, and shapes and masks that nobody thought of.

Outputs and all gradients against a plain definition in float64, differentiated by PyTorch; the
error may be twice that of the same definition computed in the dtype of the inputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from covering import covering, pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmopt_kernels import Intervals, attention
from mmopt_kernels.attention.philox import keep_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton", "auto"]
SEED = (5 << 40) + 99
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# S queries and T keys
SIZES = {"equal": (33, 33), "fewer": (19, 45), "more": (37, 20), "one-query": (1, 41),
         "one-key": (23, 1)}  # fmt: skip
FACTORS: dict[str, tuple[Any, ...]] = {
    "mask": ("full", "right", "left", "packed", "window", "random", "nothing"),
    "sizes": tuple(SIZES),
    "D": (8, 16, 40, 72),
    "layout": ("BSHD", "BHSD", "in-nan", "strided"),
    "dtype": (FP32, FP16, BF16),
    "Hkv": (4, 2, 1),
    "sinks": (None, "float32", "dtype"),
    "causal": (False, True),
    "softcap": (None, 2.0),
    "dropout_p": (0.0, 0.3),
    "through_lse": (False, True),
}


@dataclass(frozen=True)
class Case:
    """One call. ``lo`` and ``hi`` are nested tuples ``[B or 1, S]``, both None for every key."""

    S: int
    T: int
    D: int
    Hkv: int
    lo: tuple[tuple[int, ...], ...] | None
    hi: tuple[tuple[int, ...], ...] | None
    dtype: torch.dtype = FP32
    causal: bool = False
    softcap: float | None = None
    sinks: str | None = None
    dropout_p: float = 0.0
    through_lse: bool = False
    layout: str = "BSHD"
    Hq: int = 4
    B: int = 2

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        if self.lo is None or self.hi is None:
            return None
        lo, hi = (torch.tensor(x, dtype=torch.int32).view(-1, self.S) for x in (self.lo, self.hi))
        return lo.to(DEVICE), hi.to(DEVICE)

    def visible(self) -> Tensor:
        """``[B or 1, 1, S, T]``"""
        i, j = torch.arange(self.S)[:, None], torch.arange(self.T)
        seen = torch.ones(1, 1, self.S, self.T, dtype=torch.bool)
        if self.causal:
            seen = seen & (j <= i + self.T - self.S)
        seen = seen.to(DEVICE)
        bounds, j = self.bounds(), j.to(DEVICE)
        if bounds is not None:
            lo, hi = (x[:, None, :, None] for x in bounds)
            seen = seen & (j >= lo) & (j < hi)
        return seen


def masked(kind: str, S: int, T: int) -> tuple[Any, Any]:
    """lo and hi; "nothing" and "random" have empty rows, and "random" goes beyond both ends."""
    i = range(S)
    if kind == "full":
        return None, None
    if kind == "right":
        return ((0,) * S,) * 2, ((T // 2,) * S, (T,) * S)
    if kind == "left":
        return ((T // 2,) * S, (0,) * S), ((T,) * S,) * 2
    if kind == "packed":
        return (tuple(x // 7 * 7 for x in i),), (tuple(x // 7 * 7 + 7 for x in i),)
    if kind == "window":
        return (tuple(x + T - S - 5 for x in i),), (tuple(x + T - S + 4 for x in i),)
    if kind == "nothing":
        return ((3,) * S,) * 2, ((3,) * S, (T,) * S)
    assert kind == "random"
    g = torch.Generator().manual_seed(3)
    lo = torch.randint(-3, T + 1, (2, S), generator=g)
    hi = lo + torch.randint(0, T + 3, (2, S), generator=g)
    return tuple(map(tuple, lo.tolist())), tuple(map(tuple, hi.tolist()))


def case_of(row: dict[str, Any]) -> Case:
    row = dict(row)
    S, T = SIZES[row.pop("sizes")]
    lo, hi = masked(row.pop("mask"), S, T)
    return Case(S=S, T=T, lo=lo, hi=hi, **row)


ROWS = covering(FACTORS)


def stored(x: Tensor, layout: str) -> Tensor:
    """``[B, H, N, D]`` in another order, or within a buffer of NaN."""
    if layout == "BSHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return x.mT.contiguous().mT
    if layout == "in-nan":
        B, H, N, D = x.shape
        buffer = torch.full((B + 1, N + 3, H + 1, D + 5), float("nan"), dtype=x.dtype)
        view = buffer.to(x.device)[:B, 1 : N + 1, :H, 2 : D + 2].transpose(1, 2)
        return view.copy_(x)
    return x.contiguous()


def draw(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v and sinks if any; the gradients of out and lse."""
    g = torch.Generator().manual_seed(1)
    shapes = [(case.Hq, case.S), (case.Hkv, case.T), (case.Hkv, case.T), (case.Hq, case.S)]
    drawn = [
        torch.randn(case.B, h, n, case.D, generator=g).to(DEVICE, case.dtype) for h, n in shapes
    ]
    *leaves, grad = (stored(x, case.layout) for x in drawn)
    if case.sinks is not None:
        sinks = torch.linspace(-4, 4, case.Hq, device=DEVICE)
        leaves.append(sinks.to(case.dtype if case.sinks == "dtype" else FP32))
    grad_lse = torch.randn(case.B, case.Hq, case.S, generator=g).to(DEVICE)
    return leaves, grad, grad_lse


def plainly(
    case: Case, leaves: list[Tensor], grad: Tensor, grad_lse: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Out, lse (0 in empty rows) and gradients by the definition, in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    q, k, v, *sinks = leaves
    group = case.Hq // case.Hkv
    s = q @ k.repeat_interleave(group, 1).mT * case.D**-0.5
    if case.softcap is not None:
        s = case.softcap * torch.tanh(s / case.softcap)
    s = s.masked_fill(~case.visible(), float("-inf"))
    if sinks:
        s = torch.cat([s, sinks[0][:, None, None].expand(case.B, -1, case.S, 1)], 3)
    empty = s.isinf().all(3, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    lse = s.logsumexp(3).masked_fill(empty.squeeze(3), 0.0)
    p = s.softmax(3).masked_fill(empty, 0.0)[..., : case.T]
    if case.dropout_p:
        bh = torch.arange(case.B * case.Hq, device=DEVICE).view(case.B, case.Hq, 1, 1)
        i = torch.arange(case.S, device=DEVICE)[:, None]
        seed = torch.tensor([SEED], device=DEVICE)
        p = p * keep_mask(seed, case.dropout_p, bh, i, 0, case.T) / (1 - case.dropout_p)
    out = p @ v.repeat_interleave(group, 1)
    loss = (out * grad.to(dtype)).sum()
    if case.through_lse:
        loss = loss + (lse * grad_lse.to(dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def check(case: Case, impl: str) -> None:
    leaves, grad, grad_lse = draw(case)
    roots = [x._base if x._base is not None else x for x in leaves]
    before = [x.clone() for x in roots]
    leaves = [x.requires_grad_() for x in leaves]
    bounds = case.bounds()
    out, lse = attention(
        *leaves[:3],
        intervals=None if bounds is None else Intervals(*bounds),
        causal=case.causal,
        softcap=case.softcap,
        sinks=leaves[3] if case.sinks else None,
        dropout_p=case.dropout_p,
        seed=SEED,
        return_lse=True,
        impl=impl,
    )
    want = plainly(case, leaves, grad, grad_lse, torch.float64)
    same = plainly(case, leaves, grad, grad_lse, case.dtype)
    empty = ~case.visible().any(3).expand(case.B, case.Hq, case.S)
    assert not out[empty].any()
    if not case.sinks:
        assert torch.equal(lse == float("-inf"), empty)
        lse = lse.masked_fill(empty, 0.0)
    loss = (out * grad).sum()
    if case.through_lse:
        loss = loss + (lse * grad_lse).sum()
    got = [out, lse, *torch.autograd.grad(loss, leaves)]
    assert not got[2][empty].any()
    for now, then in zip(roots, before, strict=True):
        assert torch.equal(now.isnan(), then.isnan())

    # Gradients inherit the error of out, checked below, through delta = dout . out, which enters
    # them as a gradient of lse does.
    error = (grad.double() * (out.detach().double() - want[0])).sum(3)
    lent = plainly(
        replace(case, through_lse=True), leaves, torch.zeros_like(grad), error, torch.float64
    )
    # And the float32 roundings of lse, from which probabilities are recomputed, and of
    # dout . v - delta, which cancels where one key takes all the weight.
    eps32, rounding = torch.finfo(FP32).eps, torch.finfo(case.dtype).eps
    q, k, v = (x.detach().double() for x in leaves[:3])
    dp = grad.double() @ v.repeat_interleave(case.Hq // case.Hkv, 1).mT / (1 - case.dropout_p)
    term = eps32 * dp.abs().max() * case.D**-0.5 * torch.maximum(q.abs().max(), k.abs().max())
    # Where PyTorch happens to be exact: one rounding, of what out averages, of a score, of the
    # largest gradient. Sums over rows add up roundings that point anywhere.
    most = v.abs().max() / (1 - case.dropout_p)
    least = {"out": rounding * most, "lse": eps32 * max(1.0, want[1].abs().max().item())}
    rows = {"dq": 1, "dk": case.S * case.Hq // case.Hkv, "dsinks": case.S * case.B}
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    for name, x, exact, rough, less in zip(names, got, want, same, lent, strict=False):
        assert x.isfinite().all(), name
        allowed = (rough.double() - exact).abs().max()
        if name in least:
            allowed = torch.maximum(allowed, torch.as_tensor(least[name]))
        else:
            largest = exact.abs().max()
            inherited = eps32 * largest * want[1].abs().max() + less.abs().max()
            inherited += term * rows.get(name, 0) ** 0.5
            allowed = torch.maximum(torch.maximum(allowed, rounding * largest), inherited)
        off = (x.double() - exact).abs().max()
        assert off <= 2 * allowed, f"{name}: {off:.2e}, allowed {2 * allowed:.2e}"
    for x, leaf in zip(got[2:], leaves, strict=True):
        assert x.dtype == leaf.dtype


def test_every_two_values_meet_in_few_rows() -> None:
    met = set(itertools.chain.from_iterable(pairs(row, FACTORS) for row in ROWS))
    for one, other in itertools.combinations(FACTORS, 2):
        for a, b in itertools.product(FACTORS[one], FACTORS[other]):
            assert ((one, a), (other, b)) in met
    # 7 masks x 5 sizes need 35.
    assert len(ROWS) <= 45


def name_of(row: dict[str, Any]) -> str:
    return "-".join(f"{n}={v}" for n, v in row.items()).replace("torch.", "")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_two_features_together_match_the_float64_definition(
    row: dict[str, Any], impl: str
) -> None:
    check(case_of(row), impl)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any sizes, bounds before the first and beyond the last key, and any options."""
    S, T = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    Hkv = draw(st.integers(1, 2))
    B = draw(st.integers(1, 2))
    lo = hi = None
    if draw(st.booleans()):
        rows = draw(st.integers(1, B)) * S
        lo = draw(st.lists(st.integers(-2, T + 2), min_size=rows, max_size=rows))
        length = draw(st.lists(st.integers(0, T + 2), min_size=rows, max_size=rows))
        hi = (tuple(x + n for x, n in zip(lo, length, strict=True)),)
        lo = (tuple(lo),)
    return Case(
        S=S,
        T=T,
        D=draw(st.integers(1, 48)),
        Hkv=Hkv,
        lo=lo,
        hi=hi,
        dtype=draw(st.sampled_from([FP32, FP16, BF16])),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 0.5, 30.0])),
        sinks=draw(st.sampled_from([None, "float32", "dtype"])),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.9])),
        through_lse=draw(st.booleans()),
        layout=draw(st.sampled_from(FACTORS["layout"])),
        Hq=Hkv * draw(st.integers(1, 3)),
        B=B,
    )


@pytest.mark.parametrize("impl", IMPLS)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
)
@given(case=cases())
@example(case=Case(S=1, T=1, D=1, Hkv=1, Hq=1, B=1, lo=((0,),), hi=((0,),), sinks="float32"))
def test_any_shape_and_mask_matches_the_float64_definition(case: Case, impl: str) -> None:
    check(case, impl)
