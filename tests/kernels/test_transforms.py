"""Under a function transform an op says what it cannot do, and does the rest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from mmopt_kernels import attention, linear_cross_entropy, lora_linear, lora_linear_group
from mmopt_kernels.attention import Intervals
from mmopt_kernels.lora_linear import Projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 8
LABELS = torch.arange(N, device=DEVICE)
FACTORS = torch.linspace(-1, 1, 2 * N, device=DEVICE).view(2, N)


BOUNDS = Intervals.causal(N, device=DEVICE)


def attend(x: Tensor, bounds: Intervals | None = None) -> Tensor:
    q = x[None, None]
    bounds = Intervals.causal(N, device=DEVICE) if bounds is None else bounds
    return attention(q, q, q, intervals=bounds).sum()


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "lora_linear": lambda x: lora_linear(x, x.detach(), FACTORS, FACTORS.T, scale=1.0).sum(),
    "lora_linear_group": lambda x: lora_linear_group(
        x.detach(), [Projection(x.detach(), x[:2], FACTORS.T)]
    )[0].sum(),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, x, LABELS),
    "attention": attend,
    "attention, bounds from outside": lambda x: attend(x, BOUNDS),
}

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda f, x: grad(f)(x),
    "vmap of grad": lambda f, x: vmap(grad(f))(x[None]),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f)(x[None]).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jvp of vmap": lambda f, x: jvp(lambda x: vmap(f)(x[None]), (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_a_transform_that_differentiates_an_op_is_refused_by_its_name(
    op: str, transform: str
) -> None:
    name = op.partition(",")[0]
    with pytest.raises(NotImplementedError, match=rf"^{name}: torch.func asked .* undo\(\)"):
        TRANSFORMS[transform](OPS[op], torch.eye(N, device=DEVICE))


@pytest.mark.parametrize("leaf", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_group", "linear_cross_entropy"])
def test_a_tangent_is_refused_rather_than_lost(op: str, leaf: bool) -> None:
    """To PyTorch an op without a formula of its own is a constant in forward mode."""
    x = torch.eye(N, device=DEVICE, requires_grad=leaf)
    with forward_ad.dual_level():
        OPS[op](x)  # has no tangent
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=rf"^{op}: .*forward_ad asked .* undo\(\)"):
            OPS[op](dual)


def test_attention_refuses_a_tangent_where_it_is_not_pytorchs_own() -> None:
    with forward_ad.dual_level():
        q = forward_ad.make_dual(torch.ones(1, 1, N, N), torch.ones(1, 1, N, N))
        with pytest.raises(NotImplementedError, match=r"^attention: .*forward_ad asked"):
            attention(q, q, q, softcap=2.0)


@pytest.mark.parametrize("op", OPS)
def test_grad_goes_through_an_op_that_it_does_not_differentiate(op: str) -> None:
    x, one = torch.eye(N, device=DEVICE), torch.ones((), device=DEVICE)
    torch.testing.assert_close(grad(lambda factor: OPS[op](x) * factor)(one), OPS[op](x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", ["lora_linear", "attention", "attention, bounds from outside"])
def test_vmap_alone_goes_through(op: str) -> None:
    """The other ops have lists of tensors, which PyTorch does not map over."""
    x = torch.eye(N, device=DEVICE)
    torch.testing.assert_close(vmap(OPS[op])(x[None])[0], OPS[op](x))
