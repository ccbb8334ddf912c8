"""mmopt::lora_linear against its float64 oracle, and the promises of its docstring."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmopt_kernels import KernelInputError, lora_linear
from mmopt_kernels.lora_linear.reference import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton", "addmm", "reference"]
SCALE = 0.5
# Relative to the largest value: rounding of s, of the output and of the adapter's product.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    lead: tuple[int, ...] = (63,)
    K: int = 100
    N: int = 70
    R: int = 16
    adapter: torch.dtype | None = None
    bias: bool = True

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead))
        adapter = "" if self.adapter is None else "-adapter32"
        return f"M{lead}-K{self.K}-N{self.N}-R{self.R}{adapter}{'-bias' if self.bias else ''}"


CASES = [
    Case(),
    Case(lead=(2, 3, 5), R=3, adapter=torch.float32),
    Case(lead=(), K=17, N=9, R=1, bias=False),
    Case(lead=(1,), K=64, N=130, R=8, adapter=torch.float32, bias=False),
    Case(lead=(2, 70), K=129, N=33, R=80),
]


def inputs(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    """x, weight, a, b, bias; every one of them requires a gradient."""
    g = torch.Generator().manual_seed(1)

    def make(*shape: int, to: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=g, dtype=torch.float64)
        return x.to(DEVICE, to).requires_grad_()

    adapter = case.adapter or dtype
    return [
        make(*case.lead, case.K),
        make(case.N, case.K),
        make(case.R, case.K, to=adapter),
        make(case.N, case.R, to=adapter),
        make(case.N) if case.bias else None,
    ]


def call(tensors: list[Tensor | None], impl: str = "auto") -> Tensor:
    x, weight, a, b, bias = tensors
    return lora_linear(x, weight, a, b, bias=bias, scale=SCALE, impl=impl)


def leaves(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear_matches_the_float64_oracle(case: Case, dtype: torch.dtype, impl: str) -> None:
    """y, dx, dweight, da, db, dbias; each gradient in its own tensor's dtype."""
    tensors = inputs(case, dtype)
    wide = [None if t is None else t.detach().to(dtype).double().requires_grad_() for t in tensors]
    want, _ = reference(*wide, SCALE)
    y = call(tensors, impl)
    assert y.dtype == dtype
    assert y.is_contiguous()
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves(tensors), grad)
    wanted = torch.autograd.grad(want, leaves(wide), grad.double())
    for got, expected in zip([y, *grads], [want, *wanted], strict=True):
        assert got.isfinite().all()
        limit = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
        assert (got.double() - expected).abs().max().item() <= limit
    for got, leaf in zip(grads, leaves(tensors), strict=True):
        assert got.dtype == leaf.dtype


def test_float64_gradients_pass_gradcheck() -> None:
    """First and second derivatives: the backward is plain PyTorch."""
    tensors = inputs(Case(lead=(2, 2), K=3, N=4, R=2), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: call(list(t), "addmm"), tensors)
    assert torch.autograd.gradcheck(lambda *t: call(list(t), "reference"), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: call(list(t)), tensors)


def test_frozen_weight_gets_no_gradient() -> None:
    x, weight, a, b, bias = inputs(Case(), torch.float32)
    frozen = [x, weight.detach(), a, b, bias.detach()]
    call(frozen).sum().backward()
    assert frozen[1].grad is None
    assert frozen[4].grad is None
    assert a.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_no_rows_and_zero_gradients(impl: str) -> None:
    tensors = inputs(Case(lead=(2, 0)), torch.float32)
    y = call(tensors, impl)
    assert y.shape == (2, 0, 70)
    y.sum().backward()
    assert not tensors[2].grad.any()
    assert tensors[0].grad.shape == (2, 0, 100)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_around_the_inputs_neither_leaks_in_nor_is_touched(impl: str) -> None:
    """Views into NaN-filled buffers, the factors transposed in memory."""
    clean = [t.detach() for t in inputs(Case(lead=(45,), R=5), torch.float32)]
    buffers, views = [], []
    for i, t in enumerate(clean):
        shape = t.shape[::-1] if i in (2, 3) else t.shape
        buffer = torch.full([n + 9 for n in shape], float("nan"), device=DEVICE)
        view = buffer[tuple(slice(4, 4 + n) for n in shape)]
        view = view.t() if i in (2, 3) else view
        view.copy_(t)
        buffers.append(buffer)
        views.append(view)
    before = [b.clone() for b in buffers]
    poisoned = [v.detach().requires_grad_() for v in views]
    plain = [t.clone().requires_grad_() for t in clean]
    y, want = call(poisoned, impl), call(plain, "reference")
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)
    grads = torch.autograd.grad(y.sum(), poisoned)
    for got, expected in zip(grads, torch.autograd.grad(want.sum(), plain), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)
    for now, then in zip(buffers, before, strict=True):
        assert torch.equal(now.isnan(), then.isnan())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_opcheck(impl: str, bias: bool) -> None:
    x, weight, a, b, beta = inputs(Case(lead=(2, 5), K=8, N=6, R=2, bias=bias), torch.float32)
    torch.library.opcheck(
        torch.ops.mmopt.lora_linear.default, (x, weight.detach(), a, b, beta, SCALE, impl)
    )


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_one_compiled_graph_serves_varying_rows(impl: str) -> None:
    """fullgraph, and no recompilation when the number of rows changes."""
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n, rows in enumerate((6, 11, 17)):
        tensors = inputs(Case(lead=(2, rows), K=32, N=24, R=4), torch.float32)
        strict = torch._dynamo.config.patch(error_on_recompile=True)
        with strict if n else contextlib.nullcontext():
            y = compiled(tensors, impl)
            grads = torch.autograd.grad(y.square().sum(), tensors)
        want = call(tensors, impl)
        torch.testing.assert_close(y, want)
        for got, expected in zip(
            grads, torch.autograd.grad(want.square().sum(), tensors), strict=True
        ):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients() -> None:
    tensors = inputs(Case(), torch.float32)
    want = torch.autograd.grad(call(tensors).sum(), tensors)
    y = checkpoint(lambda *t: call(list(t)), *tensors, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(y.sum(), tensors), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(impl: str) -> None:
    tensors = inputs(Case(), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = call(tensors, impl)
        assert y.dtype == linear(*tensors[:2]).dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in grads)
    narrow = [t.detach().bfloat16() for t in tensors]
    # Triton rounds the float32 adapter to bfloat16 inside the kernel, PyTorch before it, and
    # Triton's interpreter rounds towards zero: two units in the last place of the largest value.
    torch.testing.assert_close(y, call(narrow, impl), atol=0.5 if impl == "triton" else 0, rtol=0)


def test_flop_formula_counts_every_product() -> None:
    x, weight, a, b, _ = inputs(Case(lead=(2, 5), K=8, N=6, R=3), torch.float32)
    with FlopCounterMode(display=False) as forward:
        call([x, weight, a, b, None])
    assert forward.get_total_flops() == 2 * 10 * (8 * 6 + 3 * 8 + 6 * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": (6, 3)}, r"b has shape \(6, 3\), expected \(6, 2\) because weight has 6 rows and a"),
        ({"a": (2, 7)}, r"a has shape \(2, 7\), expected \[R, 8\] because x has 8 features"),
        ({"weight": (6, 7)}, r"weight has shape \(6, 7\), expected \[N, 8\]"),
        ({"bias": (5,)}, r"bias has shape \(5,\), expected \(6,\) because weight has 6 rows"),
    ],
)
def test_mismatched_shape_error_names_both(change: dict[str, tuple[int, ...]], message: str):
    shapes = {"x": (4, 8), "weight": (6, 8), "a": (2, 8), "b": (6, 2), "bias": (6,)} | change
    with pytest.raises(KernelInputError, match=message):
        lora_linear(**{n: torch.zeros(s) for n, s in shapes.items()}, scale=1.0)


def test_other_unusable_arguments_are_named() -> None:
    x, weight, a, b = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(6, 2)
    with pytest.raises(KernelInputError, match=r"weight has dtype torch\.float16, expected torch"):
        lora_linear(x, weight.half(), a, b, scale=1.0)
    with pytest.raises(KernelInputError, match=r"a has dtype torch\.int8, expected a floating"):
        lora_linear(x, weight, a.to(torch.int8), b, scale=1.0)
    with pytest.raises(KernelInputError, match="a is on meta, expected cpu like x"):
        lora_linear(x, weight, a.to("meta"), b, scale=1.0)
    with pytest.raises(KernelInputError, match="impl is 'fused', expected one of auto, reference"):
        lora_linear(x, weight, a, b, scale=1.0, impl="fused")


def test_explicit_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = inputs(Case(), torch.float64)
    with pytest.raises(KernelInputError, match=r"impl is 'triton' and x is torch\.float64"):
        call(wide, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = [t.detach().cpu() for t in inputs(Case(), torch.float32)]
    with pytest.raises(KernelInputError, match="tensors are on cpu, expected a GPU"):
        call(cpu, "triton")
