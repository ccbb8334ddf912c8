"""mmopt::attention against its float64 oracle, and the promises of its docstring."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmopt_kernels import Intervals, KernelInputError, attention
from mmopt_kernels.attention import cpu
from mmopt_kernels.attention.ops import _resolve
from mmopt_kernels.attention.reference import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton", "reference"] if DEVICE == "cuda" else ["triton", "cpu", "reference"]
# Rounding of the output (and of the probabilities, in the 16-bit paths) on values near 1; sums
# over the rows make the gradients larger by the same relative error.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Negative and wider than 32 bits, so that both words of the key count.
SEED = -(3 << 40) - 12345


@dataclass(frozen=True)
class Case:
    B: int = 2
    Hq: int = 2
    Hkv: int = 2
    S: int = 33
    T: int = 33
    D: int = 16
    mask: str = "full"
    causal: bool = False
    softcap: float | None = None
    sinks: torch.dtype | None = None
    dropout_p: float = 0.0

    def __str__(self) -> str:
        name = f"B{self.B}-H{self.Hq}:{self.Hkv}-S{self.S}-T{self.T}-D{self.D}-{self.mask}"
        name += "-causal" * self.causal
        name += "" if self.softcap is None else f"-cap{self.softcap:g}"
        name += "" if self.sinks is None else "-sinks"
        return name + (f"-drop{self.dropout_p:g}" if self.dropout_p else "")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call but for the sinks, which have a gradient."""
        return {
            "intervals": on_device(self.intervals()),
            "causal": self.causal,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            "seed": SEED,
        }

    def intervals(self) -> Intervals | None:
        lengths = torch.arange(self.B) * 3 + self.T // 2
        if self.mask == "full":
            return None
        if self.mask in ("left", "right"):
            return Intervals.key_padding(lengths, self.S, T=self.T, side=self.mask)
        if self.mask == "packed":
            # Documents of 7 queries, shared by the batch.
            start = torch.arange(self.S, dtype=torch.int32)[None] // 7 * 7
            return Intervals(start, start + 7)
        assert self.mask == "random"
        g = torch.Generator().manual_seed(3)
        lo = torch.randint(-2, self.T, (self.B, self.S), generator=g, dtype=torch.int32)
        # Row 0 sees nothing, others may see nothing or reach beyond the last key.
        length = torch.randint(0, self.T, (self.B, self.S), generator=g, dtype=torch.int32)
        length[:, 0] = 0
        return Intervals(lo, lo + length)


CASES = [
    Case(causal=True),
    Case(B=1, Hq=4, Hkv=2, S=130, T=130, D=40, causal=True),
    Case(Hq=4, Hkv=1, S=7, T=200, D=80, causal=True),
    Case(S=40, T=9, D=16, causal=True),
    Case(S=1, T=70, D=24, mask="right", causal=True),
    Case(S=65, T=65, D=8, mask="left", causal=True),
    Case(S=150, T=150, D=16, mask="packed"),
    Case(Hq=6, Hkv=2, S=37, T=150, D=72, mask="random"),
    Case(S=31, T=33, D=96, mask="full"),
]


def inputs(case: Case, dtype: torch.dtype, requires_grad: bool = True) -> list[Tensor]:
    """q, k, v with heads and sequence exchanged in memory, as projections leave them."""
    g = torch.Generator().manual_seed(1)
    shapes = [(case.S, case.Hq), (case.T, case.Hkv), (case.T, case.Hkv)]
    return [
        torch.randn(case.B, n, h, case.D, generator=g, dtype=torch.float64)
        .to(DEVICE, dtype)
        .transpose(1, 2)
        .requires_grad_(requires_grad)
        for n, h in shapes
    ]


def on_device(intervals: Intervals | None) -> Intervals | None:
    if intervals is None:
        return None
    return Intervals(intervals.lo.to(DEVICE), intervals.hi.to(DEVICE))


def sinks_of(case: Case) -> list[Tensor]:
    """One leaf, or none: values about as large as the scores, so that they matter."""
    if case.sinks is None:
        return []
    g = torch.Generator().manual_seed(2)
    values = torch.randn(case.Hq, generator=g, dtype=torch.float64) + 2.0
    return [values.to(DEVICE, case.sinks).requires_grad_()]


def oracle(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    sinks: Tensor | None = None,
):
    """Output, lse and gradients in float64, by PyTorch's own differentiation."""
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    bounds = on_device(case.intervals())
    lo, hi = (None, None) if bounds is None else (bounds.lo, bounds.hi)
    wide_sinks = None
    if sinks is not None:
        wide_sinks = sinks.detach().double().requires_grad_()
        wide.append(wide_sinks)
    seed = torch.tensor([SEED], device=DEVICE) if case.dropout_p else None
    out, lse = reference(
        *wide[:3], lo, hi, wide_sinks, seed, case.causal, case.D**-0.5, case.softcap, case.dropout_p
    )
    loss = (out * grad.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse.double()).sum()
    return out, lse, torch.autograd.grad(loss, wide)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.isfinite().all()
    limit = TOLERANCE[dtype] * max(1.0, want.abs().max().item())
    assert (got.double() - want).abs().max().item() <= limit


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_matches_the_float64_oracle(case: Case, dtype: torch.dtype, impl: str) -> None:
    """out, lse, dq, dk, dv; finite, with empty rows exactly zero."""
    q, k, v = inputs(case, dtype)
    grad = torch.randn_like(q)
    want, want_lse, want_grads = oracle(case, q, k, v, grad, None)
    out, lse = attention(
        q, k, v, intervals=on_device(case.intervals()), causal=case.causal,
        return_lse=True, impl=impl,
    )  # fmt: skip
    grads = torch.autograd.grad((out * grad).sum(), (q, k, v))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert_near(out, want, dtype)
    seen = want_lse.isfinite()
    assert torch.equal(lse == float("-inf"), ~seen)
    # lse is float32 whatever the inputs; PyTorch's CPU kernel approximates exp for 16 bits.
    assert (lse[seen] - want_lse[seen]).abs().max().item() < (1e-5 if impl != "cpu" else 3e-4)
    assert not out[~seen].any()
    assert not grads[0][~seen].any()
    for got, expected in zip(grads, want_grads, strict=True):
        assert got.dtype == dtype
        assert_near(got, expected, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
def test_any_scale_matches_the_float64_oracle(
    scale: float, softcap: float | None, impl: str
) -> None:
    """A negative one turns the largest score into the least; 0 makes all of them alike."""
    q, k, v = inputs(Case(S=35, T=70, D=16), torch.float32)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    want, want_lse = reference(*wide, *[None] * 4, True, scale, softcap, 0.0)
    wanted = torch.autograd.grad((want * grad.double()).sum(), wide)
    out, lse = attention(
        q, k, v, causal=True, scale=scale, softcap=softcap, return_lse=True, impl=impl
    )
    assert_near(out, want, torch.float32)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    for got, expected in zip(
        torch.autograd.grad((out * grad).sum(), (q, k, v)), wanted, strict=True
    ):
        assert_near(got, expected, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("mask", ["causal", "intervals", "lse"])
def test_as_many_queries_as_keys_take_any_scale(mask: str, scale: float, impl: str) -> None:
    """PyTorch's CPU kernel with its own causal mask gives NaN where the scale is not above 0."""
    assert_scale_is_taken(mask, scale, impl)


@pytest.mark.skipif(DEVICE != "cpu", reason="of PyTorch's kernel for the CPU")
@pytest.mark.parametrize("mask", ["causal", "intervals", "lse"])
def test_scale_that_float32_rounds_to_zero_hides_nothing_more(mask: str) -> None:
    assert_scale_is_taken(mask, 1e-46, "auto")


def assert_scale_is_taken(mask: str, scale: float, impl: str) -> None:
    q, k, v = inputs(Case(S=5, T=5, D=16), torch.float32)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, _ = reference(*wide, *[None] * 4, True, scale, None, 0.0)
    options: dict[str, Any] = {"causal": True}
    if mask == "intervals":
        options = {"intervals": Intervals.causal(5, device=DEVICE)}
    out = attention(q, k, v, scale=scale, return_lse=mask == "lse", impl=impl, **options)
    out = out[0] if mask == "lse" else out
    assert_near(out, want, torch.float32)
    found, wanted = torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), wide)
    for got, expected in zip(found, wanted, strict=True):
        assert_near(got, expected, torch.float32)


LONG = [
    Case(B=1, Hq=8, Hkv=2, S=2048, T=2048, D=128, causal=True),
    Case(B=1, Hq=4, Hkv=4, S=2003, T=2003, D=72),
    Case(B=2, Hq=4, Hkv=1, S=1500, T=2500, D=64, mask="random", softcap=20.0, sinks=torch.float32),
    Case(B=2, Hq=4, Hkv=2, S=2100, T=2100, D=256, mask="left", causal=True, dropout_p=0.1),
    Case(B=2, Hq=16, Hkv=2, S=1, T=5000, D=128, mask="right", causal=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences_match_the_float64_oracle(case: Case, dtype: torch.dtype, impl: str) -> None:
    """Many tiles of the shipped sizes, and the calls that "auto" hands to PyTorch's kernels."""
    leaves = [*inputs(case, dtype), *sinks_of(case)]
    sinks = leaves[3] if len(leaves) > 3 else None
    grad = torch.randn_like(leaves[0])
    want, want_lse, wanted = oracle(case, *leaves[:3], grad, None, sinks)
    out, lse = attention(*leaves[:3], sinks=sinks, return_lse=True, impl=impl, **case.options())
    assert_near(out, want, dtype)
    seen = want_lse.isfinite()
    assert torch.equal(lse == float("-inf"), ~seen)
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=1e-4, rtol=1e-5)
    for got, expected in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        assert_near(got, expected, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_flows_through_lse(impl: str) -> None:
    """The gradient of lse joins that of the output, and an empty row's stays out."""
    case = Case(mask="random", causal=True)
    q, k, v = inputs(case, torch.float32)
    grad, grad_lse = torch.randn_like(q), torch.randn_like(q[..., 0])
    _, want_lse, want = oracle(case, q, k, v, grad, grad_lse)
    out, lse = attention(
        q, k, v, intervals=on_device(case.intervals()), causal=True, return_lse=True, impl=impl
    )
    masked = lse.masked_fill(want_lse.isinf(), 0.0)
    for only_lse in (False, True):
        loss = (masked * grad_lse).sum() + (0.0 if only_lse else (out * grad).sum())
        grads = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
        if only_lse:
            want = oracle(case, q, k, v, torch.zeros_like(grad), grad_lse)[2]
        for got, expected in zip(grads, want, strict=True):
            assert_near(got, expected, torch.float32)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_float64_gradients_pass_gradcheck(impl: str) -> None:
    case = Case(B=1, Hq=2, Hkv=1, S=4, T=5, D=3, mask="random")
    q, k, v = inputs(case, torch.float64)
    bounds = on_device(case.intervals())
    seen = torch.ones(1, 2, 4, device=DEVICE)
    seen[:, :, 0] = 0  # an empty row's lse is -inf: it has no finite difference

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, intervals=bounds, return_lse=True, impl=impl)
        return out, lse.masked_fill(lse.isinf(), 0.0) * seen

    assert torch.autograd.gradcheck(call, (q, k, v))


# Softcap, sinks and dropout each alone, in every pair and all together, over the masks and over
# awkward sizes; test_every_two_features_meet checks the pairs.
FEATURES = [
    Case(softcap=2.0),
    Case(sinks=torch.float32, causal=True),
    Case(Hq=4, Hkv=2, dropout_p=0.3, causal=True),
    Case(Hq=4, Hkv=2, S=13, T=37, D=40, mask="random", softcap=2.0, sinks=torch.float32),
    Case(Hq=4, Hkv=1, S=37, T=13, D=24, mask="right", causal=True, softcap=3.0, dropout_p=0.5),
    Case(Hq=2, Hkv=1, S=33, T=33, D=16, mask="random", sinks=torch.float32, dropout_p=0.1),
    Case(Hq=6, Hkv=2, S=17, T=35, D=8, mask="left", softcap=2.0, sinks=torch.bfloat16,
         dropout_p=0.25, causal=True),
    Case(S=1, T=41, D=40, mask="left", sinks=torch.float32, softcap=4.0, dropout_p=0.2),
    Case(S=40, T=1, D=16, sinks=torch.float32, dropout_p=0.2),
    Case(B=1, S=37, T=37, D=24, mask="packed", sinks=torch.float32),
]  # fmt: skip


def test_every_two_features_meet() -> None:
    """Each pair of on and off, over the cases above: softcap, sinks, dropout, causal, GQA, mask."""
    rows = [
        (bool(c.softcap), bool(c.sinks), c.dropout_p > 0, c.causal, c.Hq > c.Hkv, c.mask != "full")
        for c in FEATURES
    ]
    for one, other in itertools.combinations(range(6), 2):
        assert len({(row[one], row[other]) for row in rows}) == 4, (one, other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_match_the_float64_oracle(case: Case, dtype: torch.dtype, impl: str) -> None:
    """out, lse, dq, dk, dv, dsinks, with and without a gradient through lse."""
    if case.sinks == torch.bfloat16 and dtype == torch.float32:
        case = replace(case, sinks=torch.float32)
    leaves = [*inputs(case, dtype), *sinks_of(case)]
    grad, grad_lse = torch.randn_like(leaves[0]), torch.randn_like(leaves[0][..., 0]).float()
    sinks = leaves[3] if len(leaves) > 3 else None
    out, lse = attention(*leaves[:3], sinks=sinks, return_lse=True, impl=impl, **case.options())
    for through_lse in (False, True):
        want, want_lse, want_grads = oracle(
            case, *leaves[:3], grad, grad_lse if through_lse else None, sinks
        )
        seen = want_lse.isfinite()
        loss = (out * grad).sum()
        if through_lse:
            loss = loss + (lse.masked_fill(~seen, 0.0) * grad_lse).sum()
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        for got, expected, leaf in zip(grads, want_grads, leaves, strict=True):
            assert got.dtype == leaf.dtype
            assert_near(got, expected, dtype)
    assert_near(out, want, dtype)
    assert torch.equal(lse == float("-inf"), ~seen)
    assert (lse[seen] - want_lse[seen]).abs().max().item() < (1e-5 if impl != "cpu" else 3e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="the blocks are those of the CPU implementation")
@pytest.mark.parametrize("case", [*CASES[1:], *FEATURES], ids=str)
def test_cpu_blocks_of_a_few_rows_change_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many blocks, the last one short, against one block whose mask may be a kept one."""
    case = replace(case, sinks=case.sinks and torch.float32)
    leaves = [*inputs(case, torch.float32), *sinks_of(case)]
    sinks = leaves[3] if len(leaves) > 3 else None
    grad = torch.randn_like(leaves[0])

    def call() -> list[Tensor]:
        out, lse = attention(
            *leaves[:3], sinks=sinks, return_lse=True, impl="cpu", **case.options()
        )
        return [out, lse, *torch.autograd.grad((out * grad).sum(), leaves)]

    want = call()
    for name in ("MASK_ELEMENTS", "SCORE_ELEMENTS"):
        monkeypatch.setattr(cpu, name, 1)
    for name in ("MASK_ROWS", "SCORE_ROWS"):
        monkeypatch.setattr(cpu, name, 7)
    monkeypatch.setattr(cpu, "KEPT_ELEMENTS", 0)
    for got, expected in zip(call(), want, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU implementation keeps masks")
@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_kept_mask_is_that_of_the_values_of_its_bounds(impl: str) -> None:
    """Bounds written over in place, as Inductor reuses buffers, and a mask made without grad."""
    cpu._kept.cache_clear()
    q, k, v = inputs(Case(S=12, T=12), torch.float32)
    lo, hi = torch.zeros(1, 12, dtype=torch.int32), torch.full((1, 12), 12, dtype=torch.int32)
    lo[0, 6:] = 2  # rows of one range would need no mask
    for last in (5, 9, 5):
        hi.fill_(last)
        bounds = Intervals(lo, hi)
        with torch.inference_mode():
            attention(q, k, v, intervals=bounds, impl=impl)
        kept = cpu._kept.cache_info().hits
        got = attention(q, k, v, intervals=bounds, impl=impl)
        assert cpu._kept.cache_info().hits > kept
        want, _ = reference(q, k, v, lo, hi, None, None, False, q.shape[3] ** -0.5, None, 0.0)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        for grad, expected in zip(
            torch.autograd.grad(got.sum(), (q, k, v)),
            torch.autograd.grad(want.sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(grad, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_row_without_keys_takes_its_sink(impl: str) -> None:
    """lse is the sink, whose gradient is that of lse; a sink of -inf is none."""
    q, k, v = inputs(Case(S=3, T=5), torch.float32)
    nothing = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    sinks = torch.tensor([0.5, float("-inf")], device=DEVICE, requires_grad=True)
    out, lse = attention(
        q, k, v, intervals=Intervals(nothing, nothing), sinks=sinks, return_lse=True, impl=impl
    )
    assert not out.any()
    assert (lse[:, 0] == 0.5).all()
    assert (lse[:, 1] == float("-inf")).all()
    grads = torch.autograd.grad(lse[:, 0].sum() + out.sum(), (q, k, v, sinks))
    assert not any(g.any() for g in grads[:3])
    assert grads[3].tolist() == [2 * 3, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_sinks_of_minus_infinity_change_nothing(impl: str) -> None:
    q, k, v = inputs(Case(mask="random"), torch.float32)
    bounds = on_device(Case(mask="random").intervals())
    sinks = torch.full((2,), float("-inf"), device=DEVICE, requires_grad=True)
    out = attention(q, k, v, intervals=bounds, sinks=sinks, impl=impl)
    want = attention(q, k, v, intervals=bounds, impl=impl)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=0)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
    for got, expected in zip(
        grads, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=False
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not grads[3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_its_seeds(impl: str) -> None:
    """The same seed, as an int or a tensor, gives the same output; another one another."""
    q, k, v = inputs(Case(), torch.float32, requires_grad=False)
    first = attention(q, k, v, dropout_p=0.5, seed=7, impl=impl)
    again = attention(q, k, v, dropout_p=0.5, seed=torch.tensor([7], device=DEVICE), impl=impl)
    assert torch.equal(first, again)
    assert not torch.equal(first, attention(q, k, v, dropout_p=0.5, seed=8, impl=impl))
    plain = attention(q, k, v, impl=impl)
    assert torch.equal(plain, attention(q, k, v, seed=7, impl=impl))
    # The generator of torch draws the seed that is not given.
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(attention(q, k, v, dropout_p=0.5, impl=impl))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_keeps_the_expectation(impl: str) -> None:
    """Equal scores and values of one make a row its kept count over (1 - p) T, a binomial."""
    p, T = 0.3, 64
    zero = torch.zeros(2, 4, 60, 16, device=DEVICE)
    keys = torch.zeros(2, 4, T, 16, device=DEVICE)
    out = attention(zero, keys, keys + 1, dropout_p=p, seed=3, impl=impl)[..., 0]
    kept = out * (1 - p) * T
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    # Standard deviations of the mean and of one row; five and six of them, of a fixed draw.
    assert abs(out.mean().item() - 1) < 5 * (p / (1 - p) / (T * out.numel())) ** 0.5
    assert (out - 1).abs().max().item() < 6 * (p / (1 - p) / T) ** 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic_gradients_are_bitwise_equal(impl: str) -> None:
    case = FEATURES[6]
    leaves = [*inputs(case, torch.bfloat16), *sinks_of(case)]

    def grads() -> tuple[Tensor, ...]:
        out = attention(
            *leaves[:3], sinks=leaves[3], deterministic=True, impl=impl, **case.options()
        )
        return torch.autograd.grad(out.float().square().sum(), leaves)

    for got, expected in zip(grads(), grads(), strict=True):
        assert torch.equal(got, expected)


def test_float64_gradients_of_every_feature_pass_gradcheck() -> None:
    """Softcap, sinks and dropout of both implementations, by finite differences."""
    case = Case(B=1, Hq=2, Hkv=1, S=4, T=5, D=3, mask="random", softcap=2.0,
                sinks=torch.float64, dropout_p=0.3)  # fmt: skip
    leaves = [*inputs(case, torch.float64), *sinks_of(case)]
    for impl in ("auto", "reference"):

        def call(*x: Tensor, impl: str = impl) -> tuple[Tensor, ...]:
            return attention(*x[:3], sinks=x[3], return_lse=True, impl=impl, **case.options())

        assert torch.autograd.gradcheck(call, leaves)

    seed = torch.tensor([SEED], device=DEVICE)

    def plainly(*x: Tensor) -> tuple[Tensor, ...]:
        bounds = on_device(case.intervals())
        return reference(*x[:3], bounds.lo, bounds.hi, x[3], seed, False, 0.5, 2.0, 0.3)

    assert torch.autograd.gradcheck(plainly, leaves)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what torch's CPU allocator hands out")
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "dropout_p": 0.1, "seed": 1}], ids=str)
def test_cpu_memory_is_linear_in_the_length(options: dict[str, Any]) -> None:
    """Twice the length costs twice the peak, where a mask S x T would cost four times as much."""
    from mmopt.measure.memory import peak_tensor_bytes

    def peak(S: int) -> int:
        q, k, v = inputs(Case(B=1, S=S, T=S, D=8), torch.float32)
        start = torch.arange(S, dtype=torch.int32)[None] // 100 * 100
        bounds = Intervals(start, start + 100)

        def call() -> None:
            out = attention(q, k, v, intervals=bounds, impl="cpu", **options)
            torch.autograd.grad(out.sum(), (q, k, v))

        return peak_tensor_bytes(call)

    assert peak(4096) < 2.2 * peak(2048)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", ["full", "random"])
def test_nan_around_the_inputs_neither_leaks_in_nor_is_touched(impl: str, mask: str) -> None:
    """Views into NaN-filled buffers read only themselves, and nothing is written."""
    case = Case(Hq=4, Hkv=2, S=19, T=37, D=24, mask=mask, causal=True)
    clean = inputs(case, torch.float32, requires_grad=False)
    buffers, views = [], []
    for x in clean:
        B, H, N, D = x.shape
        buffer = torch.full((B + 2, N + 5, H + 2, D + 7), float("nan"), device=DEVICE)
        view = buffer[1 : B + 1, 2 : N + 2, 1 : H + 1, 3 : D + 3].transpose(1, 2)
        view.copy_(x)
        buffers.append(buffer)
        views.append(view)
    before = [b.clone() for b in buffers]
    leaves = [x.detach().requires_grad_() for x in views]
    bounds = on_device(case.intervals())
    out = attention(*leaves, intervals=bounds, causal=True, impl=impl)
    grads = torch.autograd.grad(out.sum(), leaves)
    dense = [x.clone().requires_grad_() for x in clean]
    want = attention(*dense, intervals=bounds, causal=True, impl="reference")
    torch.testing.assert_close(out, want, atol=2e-5, rtol=0)
    wanted = torch.autograd.grad(want.sum(), dense)
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
    for now, then in zip(buffers, before, strict=True):
        assert torch.equal(now.isnan(), then.isnan())


@pytest.mark.parametrize("impl", IMPLS)
def test_free_strides_give_the_same_result(impl: str) -> None:
    """Expanded heads, a reversed layout and a last stride that is not 1 are all inputs."""
    case = Case(S=10, T=12, D=16)
    q, k, v = inputs(case, torch.float32, requires_grad=False)
    strided = q.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    shared = k[:, :1].expand(-1, 2, -1, -1)
    plain = [q.requires_grad_(), shared.contiguous(), v]
    weight = torch.randn(16, 10, device=DEVICE).t()  # the output's gradient is strided as well
    out, want = attention(strided, shared, v, impl=impl), attention(*plain, impl="reference")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    (got,) = torch.autograd.grad((out * weight).sum(), strided)
    (expected,) = torch.autograd.grad((want * weight).sum(), q)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("kind", ["every second", "expanded"])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_any_input_may_have_any_last_stride(name: str, kind: str, impl: str) -> None:
    """PyTorch's kernel for the CPU does not look at the stride, and reads the elements between."""
    dense = dict(zip("qkv", inputs(Case(S=10, T=12, D=16), torch.float32, False), strict=True))
    dense["grad"] = torch.randn_like(dense["q"])
    strided = dict(dense)
    if kind == "expanded":
        strided[name] = dense[name][..., :1].expand_as(dense[name])
        dense[name] = strided[name].clone(memory_format=torch.contiguous_format)
    else:
        strided[name] = torch.stack([dense[name], torch.full_like(dense[name], 7.0)], -1)[..., 0]
    assert strided[name].stride(3) != 1
    found, wanted = [], []
    for given, results, by in ((strided, found, impl), (dense, wanted, "reference")):
        leaves = [given[each].detach().requires_grad_() for each in "qkv"]
        out = attention(*leaves, impl=by)
        results += [out, *torch.autograd.grad(out, leaves, given["grad"])]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0}], ids=str)
def test_output_is_stored_by_sequence_whatever_the_order_of_the_inputs(
    options: dict[str, Any], impl: str
) -> None:
    """So that ``out.transpose(1, 2).view(B, S, Hq * D)`` holds."""
    x = inputs(Case(S=3, T=3), torch.float32)
    by_heads = attention(*(each.contiguous() for each in x), impl=impl, **options)
    assert by_heads.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(by_heads, attention(*x, impl=impl, **options))


def test_heads_of_no_dimension_give_an_empty_output() -> None:
    x = torch.zeros(2, 2, 3, 0, device=DEVICE)
    assert attention(x, x, x).shape == x.shape


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("S", "T"), [(0, 4), (3, 0)])
def test_empty_sequences_give_empty_or_zero_outputs(impl: str, S: int, T: int) -> None:
    q, k, v = inputs(Case(S=S, T=T, D=8), torch.float32)
    out, lse = attention(q, k, v, return_lse=True, impl=impl)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == float("-inf")).all()
    out.sum().backward()
    assert not q.grad.any()
    assert k.grad.shape == k.shape


def test_agrees_with_sdpa() -> None:
    q, k, v = inputs(Case(S=20, T=20), torch.float32, requires_grad=False)
    want = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, causal=True, scale=0.3), want)


@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-options"])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str, options: bool) -> None:
    """Schema, fake, autograd and AOT tracing agree for both ops."""
    case = Case(S=9, T=11, D=8, mask="random", causal=True, sinks=torch.float32)
    bounds = on_device(case.intervals())
    plain = (bounds.lo, bounds.hi, None, None, True, 0.3, None, 0.0, False, impl)
    seed = torch.tensor([SEED], device=DEVICE)
    (sinks,) = sinks_of(case)
    full = (bounds.lo, bounds.hi, sinks, seed, True, 0.3, 5.0, 0.25, True, impl)
    args = full if options else plain
    q, k, v = inputs(case, torch.float32)
    torch.library.opcheck(torch.ops.mmopt.attention.default, (q, k, v, *args))
    q, k, v = (x.detach() for x in (q, k, v))
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    out, lse = torch.ops.mmopt.attention(q, k, v, *args)
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.mmopt.attention_backward.default,
            (torch.randn_like(out), grad_lse, q, k, v, out, lse, *args),
        )


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_one_compiled_graph_serves_varying_lengths(impl: str) -> None:
    """fullgraph, and no recompilation when the lengths change."""

    def step(q: Tensor, k: Tensor, v: Tensor, bounds: Intervals) -> Tensor:
        seen = bounds & Intervals.causal(q.shape[2], k.shape[2], device=q.device)
        return attention(q, k, v, intervals=seen, impl=impl).transpose(1, 2).flatten(2)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n, S in enumerate((9, 14, 21)):
        case = Case(S=S, T=S + 3, mask="right")
        q, k, v = inputs(case, torch.float32)
        bounds = on_device(case.intervals())
        strict = torch._dynamo.config.patch(error_on_recompile=True)
        with strict if n else contextlib.nullcontext():
            out = compiled(q, k, v, bounds)
            grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        want = step(q, k, v, bounds)
        torch.testing.assert_close(out, want)
        wanted = torch.autograd.grad(want.square().sum(), (q, k, v))
        for got, expected in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_a_call_without_bounds_is_one_compiled_graph(causal: bool) -> None:
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v = inputs(Case(S=9, T=9), torch.float32)
    out, expected = (f(q, k, v, causal=causal) for f in (compiled, attention))
    torch.testing.assert_close(out, expected)
    grads, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("drawn", [False, True], ids=["seed", "drawn-seed"])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_one_compiled_graph_serves_varying_lengths_with_every_option(
    impl: str, drawn: bool
) -> None:
    """Dropout and sinks on; a seed that is a tensor changes without recompilation as well."""

    def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seed: Tensor | None) -> Tensor:
        return attention(
            q, k, v, causal=True, softcap=3.0, sinks=sinks, dropout_p=0.25, seed=seed, impl=impl
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n, S in enumerate((9, 14, 21)):
        case = Case(S=S, T=S + 3, sinks=torch.float32)
        leaves = [*inputs(case, torch.float32), *sinks_of(case)]
        seed = None if drawn else torch.tensor([n], device=DEVICE)
        strict = torch._dynamo.config.patch(error_on_recompile=True)
        with strict if n else contextlib.nullcontext():
            out = compiled(*leaves, seed)
            grads = torch.autograd.grad(out.square().sum(), leaves)
        assert all(g.isfinite().all() for g in grads)
        if drawn:
            assert not torch.equal(out, compiled(*leaves, seed))
            continue
        want = step(*leaves, seed)
        torch.testing.assert_close(out, want)
        wanted = torch.autograd.grad(want.square().sum(), leaves)
        for got, expected in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_checkpointing_gives_the_same_gradients(impl: str, dropout_p: float) -> None:
    """With dropout too: the seed that the generator drew is drawn again."""
    case = Case(mask="left")
    q, k, v = inputs(case, torch.float32)
    bounds = on_device(case.intervals())

    def call(*x: Tensor) -> Tensor:
        return attention(*x, intervals=bounds, dropout_p=dropout_p, impl=impl)

    torch.manual_seed(5)
    want = torch.autograd.grad(call(q, k, v).sum(), (q, k, v))
    torch.manual_seed(5)
    out = checkpoint(call, q, k, v, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(out.sum(), (q, k, v)), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(impl: str) -> None:
    q, k, v = inputs(Case(causal=True), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention(q, k, v, causal=True, impl=impl)
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    narrow = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    plain = attention(*narrow, causal=True, impl=impl)
    assert torch.equal(out, plain)
    # Sinks in any dtype are taken in float32, and their gradient comes back in it.
    sinks = torch.ones(2, dtype=torch.float16, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention(q, k, v, causal=True, sinks=sinks, impl=impl)
    assert torch.equal(out, attention(*narrow, causal=True, sinks=sinks.float(), impl=impl))
    assert torch.autograd.grad(out.sum(), sinks)[0].dtype == torch.float16


def _keys_kept(*lengths: int, S: int = 128) -> dict[str, Any]:
    return {"intervals": Intervals.key_padding(torch.tensor(lengths), S, T=S), "causal": True}


@pytest.mark.skipif(DEVICE != "cpu", reason="PyTorch's kernel for the CPU")
@pytest.mark.parametrize(
    ("options", "by"),
    [
        ({}, "ScaledDotProduct"),
        ({"causal": True}, "ScaledDotProduct"),
        (_keys_kept(128, 70), "ScaledDotProduct"),
        (_keys_kept(70, 70), "ScaledDotProduct"),  # no row of the batch sees the last keys
        (_keys_kept(128, 0), "mmopt_attention"),  # rows that see nothing
        ({"causal": True, "softcap": 5.0}, "mmopt_attention"),
        ({"causal": True, "impl": "cpu"}, "mmopt_attention"),
    ],
)
def test_one_call_of_pytorchs_kernel_is_made_without_the_op(
    options: dict[str, Any], by: str
) -> None:
    case = Case(B=2, Hq=4, Hkv=2, S=128, T=128, D=8)
    q, k, v = inputs(case, torch.float32)
    out = attention(q, k, v, **options)
    assert out.grad_fn is not None
    assert by in out.grad_fn.name()
    expected = attention(q, k, v, **{**options, "impl": "reference"})
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(DEVICE != "cpu", reason="PyTorch's kernel for the CPU")
def test_one_causal_query_needs_neither_mask_nor_op() -> None:
    """A decode step, in which it sees every key."""
    q, k, v = inputs(Case(S=1, T=70, D=8), torch.float32)
    out = attention(q, k, v, causal=True)
    assert out.grad_fn is not None
    assert "ScaledDotProduct" in out.grad_fn.name()
    torch.testing.assert_close(out, attention(q, k, v, causal=True, impl="reference"))


def test_sequence_that_sees_nothing_is_zero_beside_one_that_sees_all() -> None:
    """On the CPU a sequence is a block here, and only the first has anything to compute."""
    q, k, v = inputs(Case(B=2, Hq=1, Hkv=1, S=64, T=1024, D=8), torch.float32)
    hi = torch.tensor([[1024], [0]], dtype=torch.int32, device=DEVICE).expand(2, 64)
    bounds = Intervals(torch.zeros_like(hi), hi)
    out = attention(q, k, v, intervals=bounds)
    want = attention(q, k, v, intervals=bounds, impl="reference")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert not out[1].any()
    grads, wanted = (torch.autograd.grad((x * x).sum(), (q, k, v)) for x in (out, want))
    torch.testing.assert_close(grads, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the blocks are those of the CPU implementation")
@pytest.mark.parametrize("softcap", [None, 50.0], ids=["flash", "written"])
def test_cpu_blocks_add_up_gradients_of_keys_wider_than_16_bits(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added up in bfloat16, a key of thousands of queries would stop at 512."""
    S = 2048
    for name in ("MASK_ELEMENTS", "MASK_ROW_ELEMENTS", "SCORE_ELEMENTS"):
        monkeypatch.setattr(cpu, name, 1)
    for name in ("MASK_ROWS", "SCORE_ROWS"):
        monkeypatch.setattr(cpu, name, 31)
    monkeypatch.setattr(cpu, "KEPT_ELEMENTS", 0)
    q, k, v = (torch.ones(1, 1, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (S, 1, 1))
    hi = torch.ones(1, S, dtype=torch.int32)
    hi[0, 0] = 0
    bounds = Intervals(torch.zeros_like(hi), hi)
    out = attention(q, k, v, intervals=bounds, softcap=softcap, impl="cpu")
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, torch.full_like(v, S - 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scaled_losses_do_not_overflow_where_scores_lose_what_they_share(
    softcap: float | None, impl: str
) -> None:
    """Float16 with a scaled loss: the gradient times the output is over its largest number."""
    q, k, v = inputs(Case(S=9, T=11, D=16), torch.float16, requires_grad=False)
    leaves = [x.requires_grad_() for x in (q, k, v + 100.0)]
    out = attention(*leaves, softcap=softcap, impl=impl)
    for grad in torch.autograd.grad(out, leaves, torch.full_like(q, 1000.0)):
        assert grad.isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU implementation")
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["flash", "written"])
def test_cpu_backward_returns_gradients_in_the_dtypes_of_its_inputs(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its fake promises, of several blocks. Autograd would cast them, a compiled graph not."""
    for name in ("MASK_ELEMENTS", "MASK_ROW_ELEMENTS", "MASK_ROWS"):
        monkeypatch.setattr(cpu, name, 2)
    monkeypatch.setattr(cpu, "KEPT_ELEMENTS", 0)
    case = Case(S=9, T=11, D=8, mask="random")
    q, k, v = inputs(case, torch.bfloat16, requires_grad=False)
    bounds = case.intervals()
    assert bounds is not None
    shared = (bounds.lo, bounds.hi, None, None, False, 0.3, softcap, 0.0)
    out, lse = cpu.forward(q, k, v, *shared)
    grads = cpu.backward(torch.ones_like(out), None, q, k, v, out, lse, *shared)
    assert [grad.dtype for grad in grads[:3]] == [torch.bfloat16] * 3
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_second_derivative_is_refused(impl: str) -> None:
    """Of the op, and where PyTorch's kernel is called without it."""
    q, k, v = inputs(Case(S=3, T=3), torch.float32)
    (dq,) = torch.autograd.grad(attention(q, k, v, impl=impl).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


def test_tensors_without_values_take_bounds_outside_of_their_mode() -> None:
    """Bounds in host memory are looked at, but not where a tensor is fake."""
    with FakeTensorMode():
        q = torch.empty(2, 2, 5, 8, device=DEVICE)
        hi = torch.empty(2, 5, dtype=torch.int32, device=DEVICE)
    assert attention(q, q, q, intervals=Intervals(hi, hi)).shape == q.shape


@pytest.mark.skipif(DEVICE != "cpu", reason="the op itself has no rule for transforms")
def test_a_call_of_pytorchs_kernel_goes_through_function_transforms() -> None:
    q, k, v = inputs(Case(S=3, T=3), torch.float32)
    wanted = torch.autograd.grad(attention(q, k, v, impl="reference").sum(), q)
    found = torch.func.grad(lambda q: attention(q, k, v).sum())
    torch.testing.assert_close(found(q), *wanted)
    torch.testing.assert_close(torch.func.vmap(found)(q[None])[0], *wanted)


def test_flop_formula_counts_like_sdpa() -> None:
    q, k, v = inputs(Case(B=1, Hq=2, Hkv=2, S=8, T=12, D=16), torch.float32)
    with FlopCounterMode(display=False) as ours:
        attention(q, k, v).sum().backward()
    assert ours.get_total_flops() == (2 + 5) * 2 * 2 * 8 * 12 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 2, 5)}, r"q has shape \(2, 2, 5\), expected \[B, Hq, S, D\]"),
        ({"k": (2, 2, 5, 16)}, r"k has shape \(2, 2, 5, 16\), expected \[2, Hkv, T, 8\]"),
        ({"v": (2, 2, 6, 8)}, r"v has shape \(2, 2, 6, 8\), expected \(2, 2, 5, 8\) like k"),
        ({"k": (2, 3, 5, 8), "v": (2, 3, 5, 8)}, "k has 3 heads, expected a divisor of the 2"),
    ],
)
def test_mismatched_shape_error_names_both(change: dict[str, tuple[int, ...]], message: str):
    shapes = {"q": (2, 2, 5, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)} | change
    with pytest.raises(KernelInputError, match=message):
        attention(*(torch.zeros(s) for s in shapes.values()))


def test_other_unusable_arguments_are_named() -> None:
    q = torch.zeros(2, 2, 5, 8)
    with pytest.raises(KernelInputError, match=r"k is torch.float16 on cpu, expected torch"):
        attention(q, q.half(), q)
    with pytest.raises(KernelInputError, match=r"q has dtype torch.int64, expected float16"):
        attention(q.long(), q, q)
    with pytest.raises(KernelInputError, match=r"intervals have shape \(1, 4\), expected \[2 or"):
        attention(q, q, q, intervals=Intervals.causal(4))
    for x, name in itertools.product((None, [0.0], q.numpy()), "qkv"):
        with pytest.raises(KernelInputError, match=rf"{name} is of type \w+, expected a tensor"):
            attention(**{**dict.fromkeys("qkv", q), name: x})
    with pytest.raises(KernelInputError, match="impl is 'fast', expected one of auto, reference"):
        attention(q, q, q, impl="fast")
    with pytest.raises(KernelInputError, match=r"lo has dtype torch.int64, expected torch.int32"):
        Intervals(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0, expected a finite number above 0"),
        ({"softcap": float("inf")}, "softcap is inf, expected a finite number above 0"),
        ({"sinks": torch.zeros(3)}, r"sinks have shape \(3,\), expected \[2\] because q"),
        ({"sinks": torch.zeros(2, 1)}, r"sinks have shape \(2, 1\), expected \[2\]"),
        (
            {"sinks": torch.zeros(2).half()},
            "sinks are torch.float16 on cpu, expected torch.float32",
        ),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0, expected a probability in \[0, 1\)"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1, expected a probability"),
        ({"dropout_p": float("nan")}, "dropout_p is nan, expected a probability"),
        ({"dropout_p": 0.1, "deterministic": True}, "seed is None, expected an int or a tensor"),
        ({"dropout_p": 0.1, "seed": 2**63}, f"seed is {2**63}, expected 64 bits"),
        (
            {"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)},
            r"seed is torch.int64 \(2,\) on cpu, expected torch.int64 of one element",
        ),
        ({"dropout_p": 0.1, "seed": 1.5}, "seed is 1.5 of type float, expected an int"),
        ({"sinks": [0.0, 0.0]}, "sinks is of type list, expected a tensor"),
        ({"intervals": torch.ones(2, 5, 5).bool()}, "intervals is of type Tensor, expected Inter"),
        ({"causal": Intervals.causal(5)}, "causal is of type Intervals, expected a bool"),
        (
            {"dropout_p": 0.1, "seed": torch.zeros(1)},
            "seed is torch.float32 .* expected torch.int64",
        ),
    ],
)
def test_unusable_option_is_named(options: dict[str, Any], message: str) -> None:
    q = torch.zeros(2, 2, 5, 8)
    with pytest.raises(KernelInputError, match=message):
        attention(q, q, q, **options)


def test_explicit_impl_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 1, 2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(KernelInputError, match=r"impl is 'triton' and q is torch.float64"):
        attention(wide, wide, wide, impl="triton")
    broad = torch.zeros(1, 1, 2, 264, device=DEVICE)
    with pytest.raises(KernelInputError, match=r"head dimension 264, expected .* 256"):
        attention(broad, broad, broad, impl="triton")
    meta = torch.zeros(1, 1, 2, 8, device="meta")
    with pytest.raises(KernelInputError, match="impl is 'cpu' and q is on meta"):
        _resolve("cpu", meta, meta)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(KernelInputError, match=r"tensors are on cpu, expected a GPU.*INTERPRET"):
        attention(q, q, q, impl="triton")
