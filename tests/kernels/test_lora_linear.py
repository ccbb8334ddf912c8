"""mmopt::lora_linear against its float64 oracle, and the promises of its docstring."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lora_oracle import BF16, DEVICE, FP16, FP32, SEED, Call, Case, call, check, nf4_weight
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmopt_kernels import Int8Weight, KernelInputError, Projection, lora_linear, lora_linear_group
from mmopt_kernels.quantized import flatten

IMPLS = ["triton", "addmm", "reference"]
DTYPES = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])

CASES = [
    Case(lead=(63,), K=100, N=70, R=16, trained=True),
    Case(lead=(2, 3, 5), K=100, N=70, R=3, adapter=FP32, trained=True),
    Case(lead=(), K=17, N=9, R=1, bias=False),
    Case(lead=(1,), K=64, N=130, R=8, adapter=FP32, bias=False),
    Case(lead=(2, 70), K=129, N=33, R=80, trained=True),
]


def tensors(case: Case) -> list[Tensor]:
    """x, weight, a, b, bias; each requires a gradient if the case is trained."""
    made = call(case)
    weight, a, b, bias, _ = made.projections[0]
    return [made.x, weight, a, b, bias]  # type: ignore[list-item]


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return lora_linear(x, weight, a, b, bias=bias, scale=0.5)


@pytest.mark.parametrize("impl", IMPLS)
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear_matches_the_float64_oracle(case: Case, dtype: torch.dtype, impl: str) -> None:
    """y, dx, dweight, da, db, dbias; each gradient in its own tensor's dtype."""
    changed = {"dtype": dtype, "adapter": case.adapter}
    check(call(Case(**{**vars(case), **changed})), impl)


@pytest.mark.parametrize("impl", ["triton", "addmm"])
@pytest.mark.parametrize("R", [2, 15, 17, 33, 64, 100, 256])
def test_every_rank_up_to_256(R: int, impl: str) -> None:
    """Powers of two, multiples of 16 and neither."""
    check(call(Case(lead=(21,), K=40, N=24, R=R, dropout_p=0.2, dtype=FP16)), impl)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("addmm", torch.float64), pytest.param("triton", FP32, marks=pytest.mark.gpu)],
    ids=["addmm", "triton"],
)
def test_a_million_rows(impl: str, dtype: torch.dtype) -> None:
    """Of a small layer; a grid axis of 65535 would not do. One GEMM sums too many in float32."""
    check(call(Case(lead=(10**6 + 3,), K=8, N=8, R=2, dropout_p=0.2, dtype=dtype)), impl)


@pytest.mark.parametrize("impl", ["addmm", "reference"])
@pytest.mark.parametrize(
    "case",
    [
        Case(trained=True),
        Case(scale="tensor", dropout_p=0.3),
        Case(adapters=2, scale="tensor", trained=True),
        Case(form="group", dropout_p=0.3, adapters=2, trained=True),
        Case(form="group", scale="tensor"),
        Case(form="dora", dropout_p=0.3),
    ],
    ids=str,
)
def test_float64_gradients_pass_gradcheck_twice(case: Case, impl: str) -> None:
    """Of DoRA alone the gradient is not that of the function: the row norms are constants."""
    small = {"lead": (2, 2), "K": 3, "N": 4, "R": 2, "dtype": torch.float64, "per_sequence": True}
    made = call(Case(**{**vars(case), **small}))
    if case.form == "dora":
        # A call whose norms cannot change is one in which the factors do not.
        made.projections[0] = made.projections[0]._replace(
            a=made.projections[0].a.detach(), b=made.projections[0].b.detach()
        )
    leaves = [t for t in made.leaves if t.dtype == torch.float64]

    def again(*new: Tensor) -> tuple[Tensor, ...]:
        table = dict(zip(map(id, leaves), new, strict=True))
        swap = lambda t: table.get(id(t), t)  # noqa: E731
        projections = [Projection(*map(swap, p)) for p in made.projections]
        return Call(made.case, swap(made.x), projections, made.magnitude, made.index).run(impl)

    assert torch.autograd.gradcheck(again, leaves)
    assert torch.autograd.gradgradcheck(again, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_weight_gets_no_gradient(impl: str) -> None:
    made = call(Case())
    made.run(impl)[0].sum().backward()
    weight, a, b, bias, _ = made.projections[0]
    assert weight.grad is None
    assert bias.grad is None
    assert a.grad is not None
    assert b.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", ["x", "a", "b"])
def test_one_gradient_alone_is_as_among_all(impl: str, wanted: str) -> None:
    """Frozen adapters, or an input that needs no gradient, leave the others as they are."""
    case = Case(dropout_p=0.3, adapters=2, form="group")
    every, one = call(case), call(case)
    names = {"x": [every.x], "a": [p.a for p in every.projections]}
    names["b"] = [p.b for p in every.projections]
    want = torch.autograd.grad([y.sum() for y in every.run(impl)], names[wanted])
    for name, leaves in {
        "x": [one.x], "a": [p.a for p in one.projections], "b": [p.b for p in one.projections]
    }.items():  # fmt: skip
        if name != wanted:
            for leaf in leaves:
                leaf.requires_grad_(False)
    kept = {"x": [one.x], "a": [p.a for p in one.projections], "b": [p.b for p in one.projections]}
    got = torch.autograd.grad([y.sum() for y in one.run(impl)], kept[wanted])
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("impl", IMPLS)
def test_unused_outputs_of_a_group_cost_no_gradient(impl: str) -> None:
    case = Case(form="group", dropout_p=0.3, base="nf4", trained=True)
    made = call(case)
    leaves = made.leaves
    wide = made.wide()
    got = torch.autograd.grad(made.run(impl)[1].sum(), leaves, allow_unused=True)
    want = torch.autograd.grad(wide.oracle()[1].sum(), wide.leaves, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g.double(), w, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("form", ["single", "dora", "group"])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_no_rows_and_zero_gradients(impl: str, form: str) -> None:
    for base in ("dense", "nf4"):
        made = call(Case(lead=(2, 0), form=form, adapters=2, dropout_p=0.3, base=base))
        y = made.run(impl)
        assert y[0].shape == (2, 0, 40)
        torch.autograd.backward([t.sum() for t in y])
        assert made.x.grad.shape == (2, 0, 48)
        for projection in made.projections:
            assert not projection.a.grad.any()
            assert not projection.b.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_nan_around_the_inputs_neither_leaks_in_nor_is_touched(impl: str, features: str) -> None:
    """Views into NaN-filled buffers, the factors transposed in memory."""
    options = {"scale": 0.5}
    if features == "all":
        options |= {"dropout_p": 0.3, "seed": SEED}
    clean = [t.detach() for t in tensors(Case(lead=(45,), K=100, N=70))]
    buffers, views = [], []
    for i, t in enumerate(clean):
        shape = t.shape[::-1] if i in (2, 3) else t.shape
        buffer = torch.full([n + 9 for n in shape], float("nan"), device=DEVICE)
        view = buffer[tuple(slice(4, 4 + n) for n in shape)]
        view = view.t() if i in (2, 3) else view
        view.copy_(t)
        buffers.append(buffer)
        views.append(view)
    if features == "all":
        # As if there were one adapter more, in rows that use it nowhere.
        options["adapter_index"] = torch.zeros(45, dtype=torch.int64, device=DEVICE)

    def run(given: list[Tensor], impl: str) -> Tensor:
        x, weight, a, b, bias = given
        if features == "all":
            a, b = a[None], b[None]
        return lora_linear(x, weight, a, b, bias=bias, impl=impl, **options)

    before = [b.clone() for b in buffers]
    poisoned = [v.detach().requires_grad_() for v in views]
    unpoisoned = [t.clone().requires_grad_() for t in clean]
    y, want = run(poisoned, impl), run(unpoisoned, "reference")
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)
    grads = torch.autograd.grad(y.sum(), poisoned)
    for got, expected in zip(grads, torch.autograd.grad(want.sum(), unpoisoned), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-5)
    for now, then in zip(buffers, before, strict=True):
        assert torch.equal(now.isnan(), then.isnan())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_strided_or_expanded_bias_is_read_right(impl: str) -> None:
    """Such as every other value of a fused layer's bias, or one value for all features."""
    x, weight, a, b, _ = (t.detach() for t in tensors(Case(lead=(5,), K=40, N=70)))
    for bias in (torch.randn(140, device=DEVICE)[::2], torch.randn(1, device=DEVICE).expand(70)):
        y = lora_linear(x, weight, a, b, bias=bias, scale=0.5, impl=impl)
        want = linear(x, weight + 0.5 * b @ a, bias)
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)


# What torch.library promises.


def op_arguments(impl: str) -> dict[str, tuple[object, ...]]:
    """Arguments of each op: as plain as can be, and with everything."""
    g = torch.Generator().manual_seed(3)

    def make(*shape: int, leaf: bool = True) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE).requires_grad_(leaf)

    x, weight, a, b, bias = (
        make(2, 5, 64),
        make(24, 64, leaf=False),
        make(4, 64),
        make(24, 4),
        make(24),
    )
    main, rest, layout = flatten(nf4_weight(24, 64, True, g))
    values, scb, int8 = flatten(
        Int8Weight(
            torch.ones(24, 64, dtype=torch.int8, device=DEVICE), torch.ones(24, device=DEVICE)
        )
    )
    index = torch.tensor([0, 1, -1, 0, 1, 1, 1, 0, 0, -1], dtype=torch.int32, device=DEVICE)
    seed = torch.tensor([SEED], device=DEVICE)
    half = a.detach().bfloat16().requires_grad_()
    off = (None, None)
    cut = [t.detach() for t in (x, a, b)]
    dy, s = make(2, 5, 24, leaf=False), make(2, 5, 4, leaf=False)
    return {
        "lora_linear": (x, weight, a, b, bias, *off, 1, 0.5, 0.0, impl),
        "lora_linear all": (x, weight, a, b, None, index, seed, 2, 0.5, 0.25, impl),
        "lora_linear_group": (
            x, [weight], [], [a], [b], [], *off, [False], 1, 0.5, 0.0, [""], impl,
        ),
        "lora_linear_group all": (
            x, [main, weight, values], [*rest, *scb], [a, half, a], [b, b, b], [bias], index, seed,
            [False, True, False], 2, 0.5, 0.25, [layout, "", int8], impl,
        ),
        "lora_linear_backward": (
            [dy], cut[0], [weight], [], [cut[1]], [cut[2]], s, *off,
            [True, True, True, True, True], 1, 0.5, 0.0, [""], impl,
        ),
        "lora_linear_backward all": (
            [dy, dy], cut[0], [main, weight], rest, [cut[1]] * 2, [cut[2]] * 2,
            torch.cat([s, s], -1), index, seed,
            [True, False, True, True, True, True, False, True, True], 2, 0.5, 0.25,
            [layout, ""], impl,
        ),
        "lora_weight_norm": (main, rest, cut[1], cut[2], layout),
        "lora_weight_norm all": (
            weight, [], make(2, 3, 64, leaf=False), make(2, 24, 3, leaf=False), "",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", op_arguments("auto"))
def test_opcheck(name: str, impl: str) -> None:
    op = getattr(torch.ops.mmopt, name.removesuffix(" all")).default
    torch.library.opcheck(op, op_arguments(impl)[name])


def test_flop_formulas_count_every_product() -> None:
    """Forward: base, down and up. Backward: dx, ds, db, da and, if it is trained, dweight."""
    M, K, N, R = 10, 8, 6, 3
    x, weight, a, b, _ = tensors(Case(lead=(2, 5), K=K, N=N, R=R))
    with FlopCounterMode(display=False) as forward:
        y = lora_linear(x, weight, a, b, scale=0.5, impl="triton")
    assert forward.get_total_flops() == 2 * M * (K * N + R * K + N * R)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * M * (K * N + 2 * R * K + 2 * N * R)
    group = call(Case(lead=(2, 5), K=K, N=N, R=R, form="group", trained=True, dropout_p=0.1))
    sizes = [tuple(p.b.shape) for p in group.projections]
    with FlopCounterMode(display=False) as forward:
        y = group.run()
    assert forward.get_total_flops() == sum(2 * M * (K * n + r * K + n * r) for n, r in sizes)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward([t.sum() for t in y])
    want = sum(2 * M * (2 * K * n + 2 * r * K + 2 * n * r) for n, r in sizes)
    assert backward.get_total_flops() == want


# Checkpointing, autocast, accumulation, determinism.


def test_checkpointing_gives_the_same_gradients() -> None:
    given = tensors(Case(trained=True))
    want = torch.autograd.grad(plain(*given).sum(), given)
    y = checkpoint(plain, *given, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(y.sum(), given), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(impl: str) -> None:
    given = tensors(Case(lead=(63,), K=100, N=70, trained=True))

    def run(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return lora_linear(x, weight, a, b, bias=bias, scale=0.5, impl=impl)

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = run(*given)
        assert y.dtype == linear(*given[:2]).dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), given)
    assert all(g.dtype == torch.float32 for g in grads)
    narrow = [t.detach().bfloat16() for t in given]
    assert torch.equal(y, run(*narrow))


@pytest.mark.parametrize("form", ["single", "dora", "group"])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_autocast_takes_every_form_and_base(form: str, base: str) -> None:
    made = call(Case(form=form, base=base, dropout_p=0.3, adapters=2, trained=base == "dense"))
    narrow = call(Case(**{**vars(made.case), "dtype": BF16, "adapter": FP32}))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = made.run()
    for got, want in zip(y, narrow.run(), strict=True):
        assert got.dtype == torch.bfloat16
        # DoRA's norms are of the weight as it is, before autocast rounds it.
        limit = 2e-2 * want.abs().max().item() if form == "dora" else 0.0
        torch.testing.assert_close(got, want, atol=limit, rtol=0)
    grads = torch.autograd.grad([t.float().sum() for t in y], made.leaves)
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_accumulate_over_micro_batches(impl: str) -> None:
    """Two halves of a batch leave the gradients of the whole one."""
    made = call(Case(lead=(12,), form="group", adapters=2))
    whole = made.run(impl)
    grads = [torch.randn_like(y) for y in whole]
    leaves = made.leaves[1:]
    want = torch.autograd.grad(whole, leaves, grads)
    for part in (slice(0, 5), slice(5, 12)):
        half = Call(made.case, made.x[part], made.projections, None, made.index[part])
        torch.autograd.backward(half.run(impl), [g[part] for g in grads])
    for leaf, expected in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_a_call_repeated_is_equal_in_every_bit(impl: str) -> None:
    case = Case(lead=(150,), K=96, dropout_p=0.3, adapters=2, form="group", dtype=BF16)
    runs = []
    for _ in range(3):
        made = call(case)
        y = made.run(impl)
        grads = [torch.ones_like(t) for t in y]
        runs.append([*y, *torch.autograd.grad(y, made.leaves, grads)])
    for again in runs[1:]:
        for first, second in zip(runs[0], again, strict=True):
            assert torch.equal(first, second)


# Bad input.

SHAPES = {"x": (4, 8), "weight": (6, 8), "a": (2, 8), "b": (6, 2), "bias": (6,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": (6, 3)}, r"b has shape \(6, 3\), expected \(6, 2\) because weight has 6 rows and a"),
        ({"b": (5, 2)}, r"b has shape \(5, 2\), expected \(6, 2\) because weight has 6 rows"),
        ({"a": (2, 7)}, r"a has shape \(2, 7\), expected \[R, 8\] because x has 8 features"),
        ({"weight": (6, 7)}, r"weight has shape \(6, 7\), expected \[N, 8\]"),
        ({"weight": (6,)}, r"weight has shape \(6,\), expected \[N, 8\]"),
        ({"bias": (5,)}, r"bias has shape \(5,\), expected \(6,\) because weight has 6 rows"),
        (
            {"a": (3, 2, 8)},
            r"a has shape \(3, 2, 8\), expected \[R, 8\] because adapter_index is N",
        ),
        ({"scale": (3,)}, r"scale has shape \(3,\), expected \(\) because adapter_index is None"),
        ({"x": ()}, r"x is torch\.float32 \(\), expected \[\.\.\., K\]"),
    ],
)
def test_mismatched_shape_error_names_both(
    change: dict[str, tuple[int, ...]], message: str
) -> None:
    given = {n: torch.zeros(s) for n, s in (SHAPES | change).items()}
    scale = given.pop("scale", 1.0)
    with pytest.raises(KernelInputError, match="^lora_linear: " + message):
        lora_linear(**given, scale=scale)
    if not given["x"].dim():
        return
    x = given.pop("x")
    right = Projection(torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(6, 2))
    with pytest.raises(KernelInputError, match=r"^lora_linear_group: projections\[1\]\." + message):
        lora_linear_group(x, [right, Projection(**given, scale=scale)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": (2, 8)}, r"a has shape \(2, 8\), expected \[E, R, 8\] because adapter_index is giv"),
        (
            {"b": (2, 6, 2)},
            r"b has shape \(2, 6, 2\), expected \(3, 6, 2\) because weight has 6 ro",
        ),
        ({"index": (5,)}, r"adapter_index has shape \(5,\), expected \(4,\), or the first dimens"),
        ({"index": ()}, r"adapter_index has shape \(\), expected \(4,\)"),
        ({"scale": (2,)}, r"scale has shape \(2,\), expected \(\) or \(3,\) because a holds 3"),
        ({"magnitude": (6,)}, r"magnitude has shape \(6,\), expected \(3, 6\) because b has shape"),
    ],
)
def test_mismatched_shape_of_stacked_adapters_names_both(
    change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = SHAPES | {"a": (3, 2, 8), "b": (3, 6, 2), "index": (4,)} | change
    given = {n: torch.ones(s) for n, s in shapes.items()}
    index = given.pop("index").long()
    with pytest.raises(KernelInputError, match="^lora_linear: " + message):
        lora_linear(**({"scale": 1.0} | given), adapter_index=index)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the device asserts it, later")
@pytest.mark.parametrize("value", [3, -2, 2**32])
def test_index_outside_the_adapters_is_refused(value: int) -> None:
    """Compiled as well, where an assertion in the graph would end the process."""
    x, weight = torch.zeros(4, 8), torch.zeros(6, 8)
    a, b = torch.zeros(3, 2, 8), torch.zeros(3, 6, 2)

    def run(index: Tensor) -> Tensor:
        return lora_linear(x, weight, a, b, scale=1.0, adapter_index=index)

    compiled = torch.compile(run, fullgraph=True)
    assert compiled(torch.tensor([0, -1, 1, 2])).shape == (4, 6)
    message = "out of range at row 2, expected -1 to 2 because a holds 3 adapters"
    for runs in (run, compiled):
        with pytest.raises(KernelInputError, match=message):
            runs(torch.tensor([0, -1, value, 2]))


def test_other_unusable_arguments_are_named() -> None:
    x, weight, a, b = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(6, 2)

    def refused(message: str, **change: object) -> None:
        given = {"x": x, "weight": weight, "a": a, "b": b, "scale": 1.0} | change
        with pytest.raises(KernelInputError, match=message):
            lora_linear(**given)

    refused(r"weight has dtype torch\.float16, expected torch", weight=weight.half())
    refused(r"a has dtype torch\.int8, expected a floating", a=a.to(torch.int8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused(r"weight has dtype torch\.uint8, expected torch\.bfloat16", weight=weight.byte())
    refused("a is on meta, expected cpu like x", a=a.to("meta"))
    refused("impl is 'fused', expected one of auto, reference", impl="fused")
    refused(r"x is torch\.int64 \(4, 8\), expected", x=x.long())
    refused(r"dropout_p is 1\.0, expected a probability in \[0, 1\)", dropout_p=1.0)
    refused("dropout_p is nan", dropout_p=float("nan"))
    refused(r"seed is torch\.int32 \(1,\) on cpu, expected torch\.int64 of one element",
            dropout_p=0.5, seed=torch.zeros(1, dtype=torch.int32))  # fmt: skip
    refused("seed is 18446744073709551616, expected 64 bits", dropout_p=0.5, seed=2**64)
    refused(r"magnitude has shape \(5,\), expected \(6,\)", magnitude=torch.ones(5))
    refused(r"magnitude is torch\.int64 on cpu, expected a floating",
            magnitude=torch.ones(6, dtype=torch.int64))  # fmt: skip
    stacked = {"a": torch.zeros(1, 2, 8), "b": torch.zeros(1, 6, 2)}
    refused(r"adapter_index has dtype torch\.float32, expected an integer dtype",
            adapter_index=torch.zeros(4), **stacked)  # fmt: skip
    refused("adapter_index is on meta, expected cpu like x",
            adapter_index=torch.zeros(4, dtype=torch.int64, device="meta"), **stacked)  # fmt: skip
    refused(r"scale is torch\.complex64, expected a real number", scale=torch.tensor(1j))
    refused("scale is on meta, expected cpu like x", scale=torch.ones((), device="meta"))
    with pytest.raises(KernelInputError, match="projections are empty, expected at least one"):
        lora_linear_group(x, [])
    two = [Projection(weight, torch.zeros(n, 2, 8), torch.zeros(n, 6, 2)) for n in (2, 3)]
    with pytest.raises(KernelInputError, match=r"projections\[1\]\.a holds 3 adapters, expected 2"):
        lora_linear_group(x, two, adapter_index=torch.zeros(4, dtype=torch.int64))


def test_quantized_state_that_does_not_fit_is_refused() -> None:
    g = torch.Generator().manual_seed(0)
    x, a, b = torch.zeros(4, 64), torch.zeros(2, 64), torch.zeros(24, 2)
    good = nf4_weight(24, 64, True, g)
    short = dataclasses.replace(good, absmax=good.absmax[:-1])
    with pytest.raises(KernelInputError, match=r"^lora_linear: absmax .* 23 values, expected 24"):
        lora_linear(x, short, a, b, scale=1.0)
    with pytest.raises(KernelInputError, match=r"weight has shape \(24, 64\), expected \[N, 32\]"):
        lora_linear(x[:, :32], good, a, b, scale=1.0)
    wrong = Int8Weight(torch.zeros(24, 64, dtype=torch.int8), torch.zeros(23))
    with pytest.raises(KernelInputError, match=r"^lora_linear_group: scb"):
        lora_linear_group(x, [Projection(wrong, a, b)])


def test_explicit_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = call(Case(dtype=torch.float64))
    with pytest.raises(KernelInputError, match=r"impl is 'triton' and x is torch\.float64"):
        wide.run("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, a, b, bias = (t.detach().cpu() for t in tensors(Case()))
    with pytest.raises(KernelInputError, match="tensors are on cpu, expected a GPU"):
        lora_linear(x, weight, a, b, bias=bias, scale=0.5, impl="triton")


def test_one_may_write_into_the_result_as_into_that_of_a_linear_layer():
    """Wav2Vec2 zeroes padded frames in place; a view among several outputs would refuse it."""
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6, 4)
    a = torch.randn(4, 8, requires_grad=True)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, 3:] = True
    y = lora_linear(x, w, a, b, scale=0.5)
    y[hidden] = 0
    expected = (x @ w.T + 0.5 * (x @ a.T) @ b.T).masked_fill(hidden[..., None], 0)
    torch.testing.assert_close(y, expected)
    got, wanted = (torch.autograd.grad(z.square().sum(), a)[0] for z in (y, expected))
    torch.testing.assert_close(got, wanted)
