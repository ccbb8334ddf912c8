"""Every two features of lora_linear and lora_linear_group together, and each by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from covering import covering
from lora_oracle import BF16, DEVICE, FP16, FP32, SEED, Case, call, check
from torch import Tensor

from mmopt_kernels import KernelInputError, Projection, lora_linear, lora_linear_group
from mmopt_kernels.dropout.reference import keep_mask

IMPLS = ["triton", "addmm", "reference"]
FACTORS: dict[str, tuple[Any, ...]] = {
    "form": ("single", "dora", "group"),
    "base": ("dense", "nf4", "nf4-nested", "int8"),
    "dtype": (FP32, FP16, BF16),
    "lead": ((), (1,), (2, 5), (67,)),
    "R": (1, 8, 19, 40),
    "adapters": (None, 1, 3),
    "dropout_p": (0.0, 0.3),
    "scale": ("float", "tensor"),
    "adapter": (None, FP32),
    "bias": (False, True),
    "trained": (False, True),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", covering(FACTORS), ids=lambda row: str(Case(**row)))
def test_features_agree_with_the_float64_oracle(row: dict[str, Any], impl: str) -> None:
    """Outputs and the gradients of x, weight, a, b, bias, scale and magnitude."""
    check(call(Case(**row)), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lead", [(2, 3, 4), (3, 1), (1, 5)])
def test_an_index_for_each_sequence_reaches_all_its_rows(lead: tuple[int, ...], impl: str) -> None:
    for form in ("single", "group", "dora"):
        check(call(Case(lead=lead, adapters=2, per_sequence=True, form=form)), impl)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_an_index_of_any_integer_dtype_is_taken(dtype: torch.dtype) -> None:
    """Also of more adapters than the dtype has values, and its largest value is not -1."""
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    a, b = torch.randn(300, 1, 8), torch.randn(300, 5, 1)

    def run(index: Tensor, adapters: int = 300) -> Tensor:
        return lora_linear(
            x, weight, a[:adapters], b[:adapters], scale=1.0, adapter_index=index, impl="addmm"
        )

    index = torch.tensor([0, 2, 127, 1])
    assert torch.equal(run(index.to(dtype)), run(index))
    largest = torch.iinfo(dtype).max
    if largest > 300:
        with pytest.raises(KernelInputError, match="out of range at row 3, expected -1 to 299"):
            run(torch.tensor([0, 2, 127, largest], dtype=dtype))
    with pytest.raises(KernelInputError, match="out of range at row 2, expected -1 to 99"):
        run(index.to(dtype), adapters=100)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_an_adapter_are_the_base_alone(impl: str) -> None:
    case = Case(adapters=2, form="dora", dropout_p=0.3)
    made = call(case)
    made.index.fill_(-1)
    ((weight, _, _, bias, _),) = made.projections
    want = torch.nn.functional.linear(made.x, weight, bias)
    torch.testing.assert_close(made.run(impl)[0], want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("E", [None, 0, 2], ids=lambda E: f"E{E}")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_no_adapters_or_adapters_of_rank_0_are_the_base_alone(
    dora: bool, E: int | None, impl: str
) -> None:
    """A batch that no adapter serves, or an adapter that is yet to be given a rank."""
    x, weight = torch.randn(4, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    stack, R = (() if E is None else (E,)), 2 if E == 0 else 0
    a = torch.zeros(*stack, R, 8, device=DEVICE, requires_grad=True)
    b = torch.zeros(*stack, 5, R, device=DEVICE, requires_grad=True)
    magnitude = weight.norm(dim=1).expand(*stack, 5) if dora else None
    index = None if E is None else torch.full((4,), -1, device=DEVICE)
    y = lora_linear(x, weight, a, b, scale=1.0, magnitude=magnitude, adapter_index=index, impl=impl)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight), atol=1e-5, rtol=1e-5)
    assert [g.shape for g in torch.autograd.grad(y.sum(), (a, b))] == [a.shape, b.shape]


def test_adapters_of_other_rows_cannot_be_noticed() -> None:
    """Not even if they are infinite: a request must not spoil its neighbours'."""
    x, weight = torch.randn(6, 8), torch.randn(5, 8)
    a, b = torch.randn(2, 3, 8), torch.randn(2, 5, 3)
    index = torch.tensor([0, 0, 0, 1, 0, 0])
    large = a.clone()
    large[1] = 1e38
    want = lora_linear(x, weight, a, b, scale=1.0, adapter_index=index)
    got = lora_linear(x, weight, large, b, scale=1.0, adapter_index=index)
    assert torch.equal(got[index == 0], want[index == 0])


# Dropout.


def mask_of(
    impl: str, seed: int | Tensor | None, p: float, lead: tuple[int, ...] = (50,)
) -> Tensor:
    """What multiplies x, made visible by a base of zeros and an adapter that is the identity."""
    K = 64
    one = torch.eye(K, device=DEVICE)
    x = torch.ones(*lead, K, device=DEVICE)
    zero = torch.zeros(K, K, device=DEVICE)
    return lora_linear(x, zero, one, one, scale=1.0, dropout_p=p, seed=seed, impl=impl)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_implementation_drops_the_same_elements(p: float) -> None:
    seed = torch.tensor([SEED], device=DEVICE)
    want = keep_mask(seed, p, 50, 64)
    for impl in [*IMPLS, "auto"]:
        for given in (SEED, seed):
            kept = mask_of(impl, given, p)
            assert torch.equal(kept != 0, want)
            torch.testing.assert_close(kept[want], torch.full_like(kept[want], 1 / (1 - p)))
    # Within five deviations of the binomial.
    assert abs(want.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / want.numel())


def test_leading_dimensions_do_not_change_the_mask() -> None:
    assert torch.equal(mask_of("auto", 3, 0.5, (5, 10)).flatten(0, 1), mask_of("auto", 3, 0.5))


def test_manual_seed_governs_a_dropout_without_a_seed() -> None:
    torch.manual_seed(4)
    first, second = mask_of("auto", None, 0.5), mask_of("auto", None, 0.5)
    torch.manual_seed(4)
    again = mask_of("auto", None, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_group_shares_one_mask_and_one_call_is_like_many() -> None:
    """A group is its projections, each called alone with the same seed."""
    made = call(Case(form="group", dropout_p=0.3, dtype=torch.float64))
    together = made.run()
    for y, (weight, a, b, bias, scale) in zip(together, made.projections, strict=True):
        alone = lora_linear(made.x, weight, a, b, bias=bias, scale=scale, dropout_p=0.3, seed=SEED)
        torch.testing.assert_close(y, alone)


def test_without_dropout_a_seed_is_ignored() -> None:
    made = call(Case(form="group"))
    for got, want in zip(
        lora_linear_group(made.x, made.projections, seed=5),
        lora_linear_group(made.x, made.projections),
        strict=True,
    ):
        assert torch.equal(got, want)


# Scale.


@pytest.mark.parametrize("form", ["single", "group", "dora"])
def test_a_scale_is_the_same_as_a_number_and_as_a_tensor(form: str) -> None:
    made = call(Case(form=form, dtype=torch.float64))
    want = made.run()
    made.projections = [p._replace(scale=torch.tensor(p.scale)) for p in made.projections]
    for got, expected in zip(made.run(), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_projections_of_one_scale_are_not_copied_for_it() -> None:
    """b goes in as it is, so that the scale is not rounded into a 16-bit factor."""
    made = call(Case(form="group", dtype=BF16))
    equal = [p._replace(scale=0.3) for p in made.projections]
    group = lora_linear_group(made.x, equal)
    for y, (weight, a, b, bias, scale) in zip(group, equal, strict=True):
        assert torch.equal(y, lora_linear(made.x, weight, a, b, bias=bias, scale=scale))


# DoRA.


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_dora_is_that_of_peft(impl: str, dtype: torch.dtype, bias: bool) -> None:
    """Output and the gradients of x, a, b and magnitude, without dropout."""
    dora = pytest.importorskip("peft.tuners.lora.dora")
    torch.manual_seed(0)
    K, N, R, scale = 48, 40, 5, 0.7
    base = torch.nn.Linear(K, N, bias=bias, device=DEVICE, dtype=dtype).requires_grad_(False)
    down = torch.nn.Linear(K, R, bias=False, device=DEVICE, dtype=FP32)
    up = torch.nn.Linear(R, N, bias=False, device=DEVICE, dtype=FP32)
    layer = dora.DoraLinearLayer(fan_in_fan_out=False).to(DEVICE)
    layer.update_layer(base_layer=base, lora_A=down.weight, lora_B=up.weight, scaling=scale)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) + 0.5)
    x = torch.randn(9, K, device=DEVICE).to(dtype).requires_grad_()
    leaves = [x, down.weight, up.weight, layer.weight]
    result = base(x)
    want = result + layer(
        x.to(FP32),
        lora_A=down,
        lora_B=up,
        scaling=scale,
        base_layer=base.to(FP32),
        base_result=result.to(FP32),
    )
    base.to(dtype)
    grad = torch.randn(9, N, device=DEVICE)
    wanted = torch.autograd.grad(want, leaves, grad)
    got = lora_linear(
        x, base.weight, down.weight, up.weight, bias=base.bias, scale=scale,
        magnitude=layer.weight, impl=impl,
    )  # fmt: skip
    grads = torch.autograd.grad(got, leaves, grad.to(dtype))
    tolerance = 1e-5 if dtype is FP32 else 3e-2
    for ours, theirs in zip([got, *grads], [want, *wanted], strict=True):
        limit = tolerance * max(1.0, theirs.abs().max().item())
        assert (ours.float() - theirs.float()).abs().max().item() <= limit


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("impl", IMPLS)
def test_dora_drops_the_input_of_every_base(impl: str, base: str) -> None:
    """What dropout took goes through the base alone: another product with it."""
    check(call(Case(lead=(67,), form="dora", base=base, dropout_p=0.3, trained=True)), impl)


def test_dora_at_its_start_is_the_base_layer() -> None:
    """With b zero and the magnitude of the weight's own rows, in every dtype."""
    for dtype in (FP32, FP16, BF16):
        made = call(Case(form="dora", dtype=dtype))
        weight, a, b, bias, scale = made.projections[0]
        magnitude = weight.float().norm(dim=1)
        y = lora_linear(
            made.x, weight, a, torch.zeros_like(b), bias=bias, scale=scale, magnitude=magnitude
        )
        want = torch.nn.functional.linear(made.x.float(), weight.float(), bias.float())
        tolerance = {FP32: 1e-5, FP16: 4e-3, BF16: 2e-2}[dtype]
        assert (y.float() - want).abs().max() <= tolerance * want.abs().max()


def test_row_norms_never_widen_a_whole_weight() -> None:
    """Blocks of rows, of which the last is not full, against the norm of the formed sum."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2100, 16, generator=g)
    a, b = torch.randn(3, 2, 16, generator=g), torch.randn(3, 2100, 2, generator=g)
    got = torch.ops.mmopt.lora_weight_norm(weight, [], a, b, "")
    torch.testing.assert_close(got, (weight + b @ a).norm(dim=-1))


def test_a_row_that_the_adapter_cancels_has_no_nan() -> None:
    """A norm of nearly zero squared may round below it."""
    weight = torch.randn(50, 8)
    norm = torch.ops.mmopt.lora_weight_norm(weight, [], torch.eye(8), -weight, "")
    assert norm.isfinite().all()
    assert norm.max() < 1e-2


def test_projection_defaults_to_no_bias_and_a_scale_of_one() -> None:
    x, weight, a, b = (torch.randn(s) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
    (got,) = lora_linear_group(x, [Projection(weight, a, b)])
    torch.testing.assert_close(got, x @ weight.T + x @ a.T @ b.T)
