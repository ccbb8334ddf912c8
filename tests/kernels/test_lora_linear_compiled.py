"""lora_linear under torch.compile: one graph, the mask drawn once, and nothing large kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from lora_oracle import DEVICE, SEED, Call, Case, call
from packaging.version import Version
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmopt_kernels import Projection, lora_linear, lora_linear_group
from mmopt_kernels.quantized import flatten


@contextlib.contextmanager
def no_recompilation(after_the_first: int) -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=after_the_first > 0):
        yield


COMPILED = [
    (Case(trained=True), "auto"),
    (Case(dropout_p=0.3, base="nf4-nested"), "auto"),
    (Case(adapters=2, form="group", base="int8"), "auto"),
    (Case(form="group"), "auto"),
    (Case(form="dora", adapters=2, dropout_p=0.3), "auto"),
    (Case(form="group", dropout_p=0.3), "triton"),
    (Case(), "triton"),
]


@pytest.mark.parametrize(("case", "impl"), COMPILED, ids=lambda p: str(p))
def test_one_compiled_graph_serves_varying_rows_and_scales(case: Case, impl: str) -> None:
    """fullgraph, and no recompilation when the number of rows or the scale changes."""
    if case.form == "group" and Version(torch.__version__).release < (2, 13):
        pytest.skip("torch 2.11 compiles anew for other floats in a list, and 2.13 does not")
    torch._dynamo.reset()
    made = call(case)
    fixed = made.projections

    class Layer(torch.nn.Module):
        """Sizes of a weight are constants where a module holds it."""

        def __init__(self) -> None:
            super().__init__()
            self.fixed = fixed

        def forward(self, x: Tensor, index: Tensor | None, scale: float) -> tuple[Tensor, ...]:
            return run(self.fixed, x, index, scale)

    def run(
        fixed: list[Projection], x: Tensor, index: Tensor | None, scale: float
    ) -> tuple[Tensor, ...]:
        options = {"dropout_p": case.dropout_p, "seed": SEED, "adapter_index": index, "impl": impl}
        if case.form == "group":
            each = [p._replace(scale=scale * (i + 1)) for i, p in enumerate(fixed)]
            return lora_linear_group(x, each, **options)
        weight, a, b, bias, _ = fixed[0]
        return (
            lora_linear(
                x, weight, a, b, bias=bias, scale=scale, magnitude=made.magnitude, **options
            ),
        )

    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True)
    # Inductor treats products of up to 32 rows differently, and compiles for both.
    for n, (rows, scale) in enumerate([(21, 0.5), (33, 0.7), (18, 1.3)]):
        x = torch.randn(2, rows, case.K, device=DEVICE, requires_grad=True)
        index = None
        if case.adapters is not None:
            index = torch.randint(-1, case.adapters, (2, rows), device=DEVICE)
        leaves = [x, *made.leaves[1:]]
        with no_recompilation(n):
            y = compiled(x, index, scale)
            grads = torch.autograd.grad(sum(t.square().sum() for t in y), leaves)
        want = run(fixed, x, index, scale)
        wanted = torch.autograd.grad(sum(t.square().sum() for t in want), leaves)
        for got, expected in zip([*y, *grads], [*want, *wanted], strict=True):
            size = expected.abs().max().item()
            torch.testing.assert_close(got, expected, atol=1e-5 * max(size, 1.0), rtol=1e-4)


def dropped(x: Tensor, zero: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """dropout(x) itself, by a base of zeros and an adapter that is the identity."""
    return lora_linear(x, zero, a, b, scale=1.0, dropout_p=0.5)


def checkpointed(*args: Tensor) -> Tensor:
    return checkpoint(dropped, *args, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["eager", "checkpointed", "compiled", "both", "around"])
def test_backward_replays_the_mask_that_forward_drew(way: str) -> None:
    """Whether torch draws the seed, a checkpoint draws it again, or a compiled graph does."""
    torch._dynamo.reset()
    K = 64
    compiled = torch.compile(dropped, fullgraph=True)
    run = {
        "eager": dropped,
        "checkpointed": checkpointed,
        "compiled": compiled,
        "both": torch.compile(checkpointed, fullgraph=True),
        "around": lambda *args: checkpoint(compiled, *args, use_reentrant=False),
    }[way]
    zero, one = torch.zeros(K, K, device=DEVICE), torch.eye(K, device=DEVICE)
    a, b = one.clone().requires_grad_(), one.clone().requires_grad_()
    x = torch.ones(5, K, device=DEVICE, requires_grad=True)
    y, other = run(x, zero, a, b), run(x, zero, a, b)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(y, other)
    # Where x is all ones, dropout(x) is the factor of its gradient as well.
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


def saved(run: object, *args: object) -> list[Tensor]:
    """What autograd keeps of a call."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(*args)  # type: ignore[operator]
    return kept


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", ["single", "group"])
@pytest.mark.parametrize("base", ["dense", "nf4", "nf4-nested", "int8"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_nothing_large_is_kept_but_x(
    base: str, dropout_p: float, form: str, compiled: bool
) -> None:
    """No dequantized weight, no mask and no dropped activation, compiled for the CPU neither."""
    torch._dynamo.reset()
    # Sizes that tell every tensor apart.
    M, K, N, R = 57, 64, 72, 3
    made = call(Case(lead=(M,), K=K, N=N, R=R, base=base, form=form, dropout_p=dropout_p))

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return Call(made.case, x, made.projections, None, None).run()

    kept = saved(torch.compile(run, fullgraph=True) if compiled else run, made.x)
    mains = [flatten(p.weight)[0] for p in made.projections]
    given = {t.untyped_storage().data_ptr() for t in [made.x, *mains]}
    given |= {t.untyped_storage().data_ptr() for p in made.projections for t in (p.a, p.b)}
    assert made.x.data_ptr() in {t.data_ptr() for t in kept}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    # s, copies of factors, and the parts of a quantized weight that are not its values.
    ranks = sum(p.a.shape[0] for p in made.projections)
    small = max(M * ranks, ranks * K, N * (R + 3), 256)
    assert [tuple(t.shape) for t in others if t.numel() > small] == []


def test_autocast_keeps_no_copy_of_the_weight() -> None:
    """A base in float32 is cast in forward and in backward, not once and held between them."""
    made = call(Case(lead=(57,), K=64, N=72))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        kept = saved(made.run)
    assert [t.dtype for t in kept if t.shape == (72, 64)] == [torch.float32]
