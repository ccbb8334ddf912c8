"""Schemas, fakes, autograd, FLOP formulas and dispatch of the LoRA linear ops. Needs only torch.

`mmopt::lora_linear` is one dense projection; its schema has no list, because PyTorch's autograd of
an op with tensor lists costs another 0.1 ms of Python per call (torch 2.13, forward and backward),
which a small layer on a CPU feels. `mmopt::lora_linear_group` is everything else: several
projections, and quantized bases, whose tensors vary in number. Both run the same steps, and share
`mmopt::lora_linear_backward`.

``scale`` is a constant to torch.compile, as every float argument of an op is; `api` folds a scale
that may change into b. ``Tensor?[]`` has no autograd in torch.library, hence ``biased``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmopt_kernels import _triton, quantized
from mmopt_kernels._autocast import without_autocast
from mmopt_kernels.errors import KernelInputError
from mmopt_kernels.lora_linear import dispatch, library
from mmopt_kernels.lora_linear.dispatch import Choice, Plan
from mmopt_kernels.lora_linear.reference import reference, reference_backward

# With more rows, a weight dequantized once and a GEMM beat dequantizing it again for every tile of
# rows; with so few, reading 4 bits instead of 16 is all that counts.
FUSED_NF4_ROWS = 64

IMPLS = ("auto", "reference", "addmm", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# x and s have any leading dimensions, seen as M rows; adapter_index is int32 [M].
torch.library.define(
    "mmopt::lora_linear",
    "(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? bias, Tensor? adapter_index,"
    " Tensor? seed, int adapters, float scale, float dropout_p, str impl)"
    " -> (Tensor y, Tensor s)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mmopt::lora_linear_group",
    "(Tensor x, Tensor[] weights, Tensor[] quantized, Tensor[] a, Tensor[] b, Tensor[] biases,"
    " Tensor? adapter_index, Tensor? seed, bool[] biased, int adapters, float scale,"
    " float dropout_p, str[] layouts, str impl) -> (Tensor[] y, Tensor s)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mmopt::lora_linear_backward",
    "(Tensor[] dy, Tensor x, Tensor[] weights, Tensor[] quantized, Tensor[] a, Tensor[] b,"
    " Tensor s, Tensor? adapter_index, Tensor? seed, bool[] needs, int adapters, float scale,"
    " float dropout_p, str[] layouts, str impl) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mmopt::lora_weight_norm",
    "(Tensor weight, Tensor[] quantized, Tensor a, Tensor b, str layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Base(NamedTuple):
    """A weight as `quantized.flatten` takes it apart."""

    main: Tensor
    rest: Sequence[Tensor]
    layout: str

    @property
    def outputs(self) -> int:
        return quantized.layout_shape(self.main.shape, self.layout)[0]

    def dense(self, dtype: torch.dtype, impl: str) -> Tensor:
        if self.layout == "":
            # Under autocast the weight is cast here, and for backward again: not kept twice.
            return self.main.to(dtype)
        return quantized.dense(
            self.main, self.rest, self.layout, dtype, "auto" if impl == "addmm" else impl
        )


def _bases(weights: Sequence[Tensor], rest: Sequence[Tensor], layouts: Sequence[str]) -> list[Base]:
    bases, start = [], 0
    for weight, layout in zip(weights, layouts, strict=True):
        stop = start + quantized.tensors_in(layout)
        bases.append(Base(weight, rest[start:stop], layout))
        start = stop
    return bases


class Options(NamedTuple):
    """What the projections of a call share beside x."""

    adapter_index: Tensor | None
    seed: Tensor | None
    adapters: int
    scale: float
    dropout_p: float
    impl: str


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weights: list[bool]
    a: list[bool]
    b: list[bool]
    biases: list[bool]

    def flat(self) -> list[bool]:
        return [self.x, *self.weights, *self.a, *self.b, *self.biases]

    @classmethod
    def of(cls, flat: Sequence[bool]) -> Needs:
        P = (len(flat) - 1) // 4
        return cls(flat[0], *(list(flat[1 + i * P : 1 + (i + 1) * P]) for i in range(4)))


class Grads(NamedTuple):
    x: Tensor | None
    weights: list[Tensor | None]
    a: list[Tensor | None]
    b: list[Tensor | None]
    biases: list[Tensor | None]

    def flat(self) -> list[Tensor | None]:
        return [self.x, *self.weights, *self.a, *self.b, *self.biases]


# An explicit implementation leaves nothing to the sizes.
LIBRARY = dispatch.plan("addmm", _triton.INTERPRETER, torch.float32, 0, 0, 0, 0, False)


def _kernels(x: Tensor, impl: str) -> bool:
    """Whether kernels of ours may run. An explicit implementation holds or raises."""
    if impl == "triton":
        _triton.require("lora_linear", x.device)
        if x.dtype == torch.float64:
            raise KernelInputError(
                "lora_linear: impl is 'triton' and x is torch.float64, expected float16, bfloat16 "
                "or float32. Cast x and weight, or leave impl out."
            )
        return True
    if impl != "auto" or not _triton.on_gpu(x.device) or x.dtype == torch.float64:
        return False
    return _triton.installed()


def _plan(x: Tensor, N: int, R: int, options: Options) -> Plan:
    """Who runs each step for x ``[M, K]``, ``N`` outputs and ``R`` columns of s."""
    if not _kernels(x, options.impl):
        return LIBRARY
    M, K = x.shape
    target, dropout = _triton.target(x.device), options.seed is not None
    return dispatch.plan(options.impl, target, x.dtype, M, N, K, R, dropout)


# The steps of `library` or, where planned so, the launchers of the same names.


def _forward_steps(choice: Choice) -> Any:
    if choice != "triton":
        return library
    from mmopt_kernels.lora_linear import kernel  # first Triton import

    return kernel


def _backward_steps(choice: Choice) -> Any:
    if choice != "triton":
        return library
    from mmopt_kernels.lora_linear import kernel_backward

    return kernel_backward


def rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``; the product because -1 is ambiguous for an empty tensor."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _shaped(x: Tensor, lead: torch.Size) -> Tensor:
    """`[M, N]` as `[*lead, N]`, and no view, as of `nn.Linear`: one may write into the result."""
    shaped: Tensor = torch.ops.aten._unsafe_view(x, [*lead, x.shape[1]])
    return shaped


def _unit_last_stride(x: Tensor) -> Tensor:
    # GEMMs and kernels would each copy a gradient that is expanded, as that of a sum is.
    return x if x.stride(-1) == 1 else x.contiguous()


def _joined(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The projections' a under each other, ``[C, K]``; one alone is left as it is."""
    if len(factors) == 1:
        return factors[0]
    return torch.cat([factor.to(dtype) for factor in factors])


def _owner(a: Sequence[Tensor], options: Options) -> Tensor | None:
    """Which adapter a column of s belongs to, int32 ``[C]``."""
    if options.adapter_index is None:
        return None
    E, device = options.adapters, options.adapter_index.device
    adapter = torch.arange(E, dtype=torch.int32, device=device)[:, None]
    # Kernels read it as contiguous, which reshape alone leaves open. Of no adapter, all is empty.
    return torch.cat([adapter.expand(E, factor.shape[0] // max(E, 1)).reshape(-1) for factor in a])


def _up(
    plan: Plan,
    x: Tensor,
    base: Base,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    if base.layout.startswith("nf4") and x.shape[0] <= FUSED_NF4_ROWS and _kernels(x, options.impl):
        from mmopt_kernels.lora_linear.kernel_nf4 import up_nf4

        nf4 = quantized.nf4_weight(base.main, base.rest, base.layout)
        return up_nf4(x, nf4, s, b, bias, options.scale)
    weight = base.dense(x.dtype, options.impl)
    up: Tensor = _forward_steps(plan.up).up(x, weight, s, b, bias, options.scale)
    return up


def _check_index(index: Tensor, adapters: int) -> None:
    """Inside the op: Inductor turns an assertion in a graph into one that ends the process."""
    outside = (index < -1) | (index >= adapters)
    expected = f"expected -1 to {adapters - 1} because a holds {adapters} adapters"
    if index.device.type != "cpu":
        # The host must not wait for a device value.
        torch._assert_async(~outside.any(), f"lora_linear: adapter_index has others, {expected}.")
    elif outside.any():
        raise KernelInputError(
            f"lora_linear: adapter_index is out of range at row {int(outside.nonzero()[0])}, "
            f"{expected}. Stack every adapter that the batch uses, and mark a row that uses none "
            "with -1."
        )


def _forward(
    x: Tensor,
    bases: Sequence[Base],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    options: Options,
) -> tuple[list[Tensor], Tensor]:
    index, seed, _, _, dropout_p, impl = options
    x2, lead = rows(x), x.shape[:-1]
    if index is not None:
        _check_index(index, options.adapters)
    with without_autocast(x):
        if impl == "reference":
            dense = [base.dense(x.dtype, impl) for base in bases]
            y, s = reference(x2, dense, a, b, biases, *options[:5])
        else:
            ranks = [factor.shape[0] for factor in a]
            joint = _plan(x2, sum(base.outputs for base in bases), sum(ranks), options)
            s = _forward_steps(joint.down).down(
                x2, _joined(a, x.dtype), seed, dropout_p, index, _owner(a, options)
            )
            parts = torch.split(s, ranks, dim=1) if len(a) > 1 else (s,)
            y = []
            for base, s_i, b_i, bias in zip(bases, parts, b, biases, strict=True):
                plan = joint if len(a) == 1 else _plan(x2, base.outputs, s_i.shape[1], options)
                y.append(_up(plan, x2, base, s_i, b_i, bias, options))
    return [_shaped(y_i, lead) for y_i in y], _shaped(s, lead)


def _gradients(
    dy: Sequence[Tensor | None],
    ds: Tensor | None,
    x: Tensor,
    bases: Sequence[Base],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    options: Options,
    needs: Needs,
    planned: bool,
) -> Grads:
    """ds = scale dy b, db = scale dyᵀ s, da = dsᵀ dropout(x), dx = dy weight + dropout(ds a).

    dropout's gradient is dropout itself, by the same mask. Any ``dy`` may be None; ``ds`` is the
    gradient of s as an output. Without ``planned`` all steps are PyTorch's, and differentiable.
    """
    index, seed, _, scale, dropout_p, _ = options
    x2, s2 = rows(x), rows(s)
    dy2 = [None if d is None else _unit_last_stride(rows(d)) for d in dy]
    ranks = [factor.shape[0] for factor in a]
    owner, a_cat = _owner(a, options), _joined(a, x.dtype)
    sizes = [base.outputs for base in bases]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    joint = _plan(x2, sum(sizes), sum(ranks), options) if planned else LIBRARY
    ds_parts: list[Tensor] = []
    db: list[Tensor | None] = []
    for d, b_i, N, start, R, need_b in zip(dy2, b, sizes, starts, ranks, needs.b, strict=True):
        if d is None:
            ds_parts.append(s2.new_zeros(s2.shape[0], R))
            db.append(None)
            continue
        plan = _plan(x2, N, R, options) if planned and len(a) > 1 else joint
        part = slice(start, start + R)
        ds_i, db_i = _backward_steps(plan.up_backward).up_backward(
            d, s2[:, part], b_i, scale, index, None if owner is None else owner[part], need_b
        )
        ds_parts.append(ds_i)
        db.append(None if db_i is None else db_i.to(b_i.dtype))
    ds2 = ds_parts[0] if len(ds_parts) == 1 else torch.cat(ds_parts, dim=1)
    if ds is not None:
        ds2 = ds2 + library.own(rows(ds), index, owner)
    da: list[Tensor | None] = [None] * len(a)
    kept = None
    if seed is not None and needs.x and any(needs.a) and x.device.type == "cpu":
        # Drawing costs a CPU more than the products do. The kernels draw where they need it.
        kept = library.kept(x2, seed, dropout_p) if joint is LIBRARY else None
    if any(needs.a):
        if kept is None:
            steps = _backward_steps(joint.down_backward)
            da_cat = steps.down_backward(ds2, x2, seed, dropout_p)
        else:
            da_cat = library.down_backward(ds2, library.masked(x2, kept, dropout_p), None, 0.0)
        da = [
            # Parts of one tensor may not leave an op as several.
            da_i.to(factor.dtype, copy=len(a) > 1) if need else None
            for da_i, factor, need in zip(torch.split(da_cat, ranks), a, needs.a, strict=True)
        ]
    dx = None
    if needs.x:
        dx = _input_gradient(dy2, ds2, x2, bases, a_cat, options, joint, kept).view(x.shape)
    dweights = [
        (d.t() @ x2).to(base.main.dtype) if need and d is not None else None
        for d, base, need in zip(dy2, bases, needs.weights, strict=True)
    ]
    dbiases = [
        d.sum(0) if need and d is not None else None
        for d, need in zip(dy2, needs.biases, strict=True)
    ]
    return Grads(dx, dweights, da, db, dbiases)


def _input_gradient(
    dy: Sequence[Tensor | None],
    ds: Tensor,
    x: Tensor,
    bases: Sequence[Base],
    a: Tensor,
    options: Options,
    plan: Plan,
    kept: Tensor | None,
) -> Tensor:
    """dx = dy weight, summed over the projections, + dropout(ds a): ``[M, K]``."""
    seed, dropout_p, impl = options.seed, options.dropout_p, options.impl
    products = [(d, base) for d, base in zip(dy, bases, strict=True) if d is not None]
    if plan.dx == "triton" and len(products) == 1:
        ((d, base),) = products
        weight = base.dense(x.dtype, impl)
        dx: Tensor = _backward_steps("triton").input_backward(d, weight, ds, a, seed, dropout_p)
        return dx
    if plan.add == "library":
        # The first weight before dx: what it takes to dequantize it is gone by then.
        first = products[0][1].dense(x.dtype, impl) if products else None
        # The adapters first, as in `library.up`; their gradient goes through the dropout's mask.
        dx = ds @ a.to(x.dtype)
        if kept is None:
            dx = library.dropout(dx, seed, dropout_p)
        else:
            dx = library.masked(dx, kept, dropout_p)
        # Accumulated by the GEMM itself: no second buffer the size of x.
        if first is not None:
            dx.addmm_(products[0][0], first)
            del first
        for d, base in products[1:]:
            dx.addmm_(d, base.dense(x.dtype, impl))
        return dx
    if products:
        dx = products[0][0] @ products[0][1].dense(x.dtype, impl)
        for d, base in products[1:]:
            dx.addmm_(d, base.dense(x.dtype, impl))
    else:
        dx = torch.zeros_like(x)
    _backward_steps("triton").add_masked_(dx, ds, a, seed, dropout_p)
    return dx


# The ops.


@torch.library.register_fake("mmopt::lora_linear")
def _lora_linear_fake(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    adapters: int,
    scale: float,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty(*lead, weight.shape[0]), x.new_empty(*lead, a.shape[0])


@torch.library.impl("mmopt::lora_linear", "CompositeExplicitAutograd")
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    adapters: int,
    scale: float,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    options = Options(adapter_index, seed, adapters, scale, dropout_p, impl)
    y, s = _forward(x, [Base(weight, (), "")], [a], [b], [bias], options)
    return y[0], s


@torch.library.register_fake("mmopt::lora_linear_group")
def _lora_linear_group_fake(
    x: Tensor,
    weights: list[Tensor],
    quantized: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    adapter_index: Tensor | None,
    seed: Tensor | None,
    biased: list[bool],
    adapters: int,
    scale: float,
    dropout_p: float,
    layouts: list[str],
    impl: str,
) -> tuple[list[Tensor], Tensor]:
    lead = x.shape[:-1]
    y = [x.new_empty(*lead, base.outputs) for base in _bases(weights, quantized, layouts)]
    return y, x.new_empty(*lead, sum(factor.shape[0] for factor in a))


@torch.library.impl("mmopt::lora_linear_group", "CompositeExplicitAutograd")
def _lora_linear_group(
    x: Tensor,
    weights: list[Tensor],
    quantized: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    adapter_index: Tensor | None,
    seed: Tensor | None,
    biased: list[bool],
    adapters: int,
    scale: float,
    dropout_p: float,
    layouts: list[str],
    impl: str,
) -> tuple[list[Tensor], Tensor]:
    options = Options(adapter_index, seed, adapters, scale, dropout_p, impl)
    given = iter(biases)
    each = [next(given) if has else None for has in biased]
    return _forward(x, _bases(weights, quantized, layouts), a, b, each, options)


@torch.library.register_fake("mmopt::lora_linear_backward")
def _lora_linear_backward_fake(
    dy: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    quantized: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    needs: list[bool],
    adapters: int,
    scale: float,
    dropout_p: float,
    layouts: list[str],
    impl: str,
) -> list[Tensor]:
    biases = [x.new_empty(d.shape[-1]) for d in dy]
    like = [x, *weights, *a, *b, *biases]
    return [t.new_empty(t.shape) for t, need in zip(like, needs, strict=True) if need]


@torch.library.impl("mmopt::lora_linear_backward", "CompositeExplicitAutograd")
def _lora_linear_backward(
    dy: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    quantized: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    needs: list[bool],
    adapters: int,
    scale: float,
    dropout_p: float,
    layouts: list[str],
    impl: str,
) -> list[Tensor]:
    options = Options(adapter_index, seed, adapters, scale, dropout_p, impl)
    bases, wanted = _bases(weights, quantized, layouts), Needs.of(needs)
    with without_autocast(x):
        if impl == "reference":
            dense = [base.dense(x.dtype, impl) for base in bases]
            dy2 = [rows(d) for d in dy]
            dx, *others = reference_backward(dy2, rows(x), dense, a, b, *options[:5])
            found: list[Tensor | None] = [dx.to(x.dtype).view(x.shape)]
            for grads, like in zip(others, (weights, a, b, dy), strict=True):
                found += [grad.to(t.dtype) for grad, t in zip(grads, like, strict=True)]
        else:
            found = _gradients(dy, None, x, bases, a, b, s, options, wanted, True).flat()
    return [grad for grad, need in zip(found, needs, strict=True) if need and grad is not None]


# Autograd.


def _derive(
    dy: list[Tensor | None],
    ds: Tensor | None,
    x: Tensor,
    bases: list[Base],
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    options: Options,
    needs: Needs,
) -> Grads:
    """The gradients: in PyTorch's own ops, or in one op of ours.

    In its own ops where Inductor then sees a plain call on a CPU, and where the gradient is itself
    differentiated. Otherwise in one op, inside which kernels are chosen, and which alone keeps the
    dequantized weight and the mask from being saved: they depend on no gradient, so that a
    compiler may compute them in the forward and hold them until the backward.
    """
    plain = options.impl == "addmm" or (options.impl == "auto" and x.device.type == "cpu")
    plain &= options.seed is None and options.adapter_index is None
    plain &= all(base.layout == "" for base in bases)
    if plain or ds is not None or torch.is_grad_enabled():
        with without_autocast(x):
            return _gradients(dy, ds, x, bases, a, b, s, options, needs, False)
    live = [i for i, d in enumerate(dy) if d is not None]
    found: list[Tensor | None] = [None] * len(needs.flat())
    if not live:
        return Grads(*Needs.of(found))  # type: ignore[arg-type]
    if len(live) < len(dy):
        parts = torch.split(s, [factor.shape[0] for factor in a], dim=-1)
        s = torch.cat([parts[i] for i in live], dim=-1)
    # Where the gradients of the live projections are among all of them.
    places = [0, *(1 + kind * len(dy) + i for kind in range(4) for i in live)]
    wanted = [needs.flat()[place] for place in places]
    grads = iter(
        torch.ops.mmopt.lora_linear_backward(
            [d for d in dy if d is not None],
            x,
            [bases[i].main for i in live],
            [t for i in live for t in bases[i].rest],
            [a[i] for i in live],
            [b[i] for i in live],
            s,
            options.adapter_index,
            options.seed,
            wanted,
            options.adapters,
            options.scale,
            options.dropout_p,
            [bases[i].layout for i in live],
            options.impl,
        )
    )
    for place, need in zip(places, wanted, strict=True):
        if need:
            found[place] = next(grads)
    return Grads(*Needs.of(found))  # type: ignore[arg-type]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, a, b, _, index, seed, *ctx.options = inputs
    ctx.save_for_backward(x, weight, a, b, output[1], index, seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    x, weight, a, b, s, index, seed = ctx.saved_tensors
    needs = Needs(ctx.needs_input_grad[0], *([need] for need in ctx.needs_input_grad[1:5]))
    options = Options(index, seed, *ctx.options)
    grads = _derive([dy], ds, x, [Base(weight, (), "")], [a], [b], s, options, needs)
    return (*grads.flat(), *[None] * 6)


torch.library.register_autograd("mmopt::lora_linear", _differentiate, setup_context=_save)


def _save_group(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weights, rest, a, b, _, index, seed, ctx.biased, *ctx.options, ctx.layouts, impl = inputs
    ctx.options.append(impl)
    ctx.save_for_backward(x, output[1], index, seed, *weights, *a, *b, *rest)
    ctx.set_materialize_grads(False)


def _differentiate_group(ctx: Any, dy: list[Tensor | None], ds: Tensor | None) -> tuple[Any, ...]:
    P = len(ctx.layouts)
    x, s, index, seed, *others = ctx.saved_tensors
    weights, a, b, rest = others[:P], others[P : 2 * P], others[2 * P : 3 * P], others[3 * P :]
    need_x, need_weights, _, need_a, need_b, need_biases = ctx.needs_input_grad[:6]
    given = iter(need_biases)
    needs = Needs(need_x, need_weights, need_a, need_b, [has and next(given) for has in ctx.biased])
    bases = _bases(weights, rest, ctx.layouts)
    grads = _derive(dy, ds, x, bases, a, b, s, Options(index, seed, *ctx.options), needs)
    dbiases = [grad for grad, has in zip(grads.biases, ctx.biased, strict=True) if has]
    # Of x, weights, quantized, a, b, biases, and the eight others.
    return (
        grads.x,
        grads.weights,
        [None] * len(rest),
        grads.a,
        grads.b,
        dbiases,
        *[None] * 8,
    )


torch.library.register_autograd(
    "mmopt::lora_linear_group", _differentiate_group, setup_context=_save_group
)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError(
        "lora_linear: the op mmopt::lora_linear_backward was differentiated, expected the "
        "gradient of lora_linear to be taken with create_graph=True. Pass it there."
    )


# Without a formula PyTorch would drop the term behind a warning.
torch.library.register_autograd("mmopt::lora_linear_backward", _refuse_second_derivative)


# The norm of DoRA.

# Rows of the weight in float32 at once, so that a low-precision weight is never widened as a whole.
_NORM_ROWS = 1024


@torch.library.register_fake("mmopt::lora_weight_norm")
def _lora_weight_norm_fake(
    weight: Tensor, quantized: list[Tensor], a: Tensor, b: Tensor, layout: str
) -> Tensor:
    dtype = torch.float64 if torch.float64 in (a.dtype, weight.dtype) else torch.float32
    return a.new_empty(*b.shape[:-1], dtype=dtype)


@torch.library.impl("mmopt::lora_weight_norm", "CompositeExplicitAutograd")
def _lora_weight_norm(
    weight: Tensor, quantized: list[Tensor], a: Tensor, b: Tensor, layout: str
) -> Tensor:
    """Norms of the rows of weight + b a, ``[N]`` or ``[E, N]`` for stacked factors; b a never is.

    ``‖w + b a‖² = ‖w‖² + 2 b·(w aᵀ) + b (a aᵀ) bᵀ``, row by row, accumulated in float32.
    """
    wide = torch.float64 if torch.float64 in (a.dtype, weight.dtype) else torch.float32
    with without_autocast(a):
        dense = Base(weight, quantized, layout).dense(_dense_dtype(a, layout), "auto")
        R, K = a.shape[-2:]
        a2 = a.reshape(math.prod(a.shape[:-1]), K).to(wide)  # [E R, K]
        # The product because -1 is ambiguous for an empty tensor.
        b3 = b.to(wide).reshape(math.prod(b.shape[:-2]), *b.shape[-2:])  # [E, N, R]
        gram = a.to(wide) @ a.to(wide).mT  # [R, R] or [E, R, R]
        squares = ((b.to(wide) @ gram) * b.to(wide)).sum(-1).view(b3.shape[:2])  # [E, N]
        for start in range(0, dense.shape[0], _NORM_ROWS):
            part = slice(start, start + _NORM_ROWS)
            block = dense[part].to(wide)
            # [E, rows, R]
            cross = (block @ a2.t()).view(block.shape[0], b3.shape[0], R).transpose(0, 1)
            squares[:, part] += 2.0 * (cross * b3[:, part]).sum(-1) + block.square().sum(1)
        # Rounding may leave a row that cancels below zero.
        return squares.clamp_(min=0.0).sqrt_().view(b.shape[:-1])


def _dense_dtype(a: Tensor, layout: str) -> torch.dtype:
    """What a quantized weight is taken apart to for its norm: as precise as it is cheap to keep."""
    return torch.float64 if a.dtype == torch.float64 else torch.float32


# Two FLOPs for each multiply-add. Every column of s counts, also those of other adapters: which
# they are is device data.


def _flops(x: Any, sizes: Sequence[tuple[int, int]]) -> int:
    """Of x weightᵀ, x aᵀ and s bᵀ; ``sizes`` are N and R of each projection."""
    M, K = math.prod(x[:-1]), x[-1]
    return sum(2 * M * (N * K + R * (K + N)) for N, R in sizes)


@register_flop_formula(torch.ops.mmopt.lora_linear)
def _lora_linear_flops(x: Any, weight: Any, a: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(x, [(weight[0], a[0])])


@register_flop_formula(torch.ops.mmopt.lora_linear_group)
def _lora_linear_group_flops(
    x: Any, weights: Any, quantized: Any, a: Any, b: Any, *args: Any, **kwargs: Any
) -> int:
    return _flops(x, [(factor[0], factor[1]) for factor in b])


@register_flop_formula(torch.ops.mmopt.lora_linear_backward)
def _lora_linear_backward_flops(
    dy: Any,
    x: Any,
    weights: Any,
    quantized: Any,
    a: Any,
    b: Any,
    s: Any,
    adapter_index: Any,
    seed: Any,
    needs: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    wanted, M, K = Needs.of(needs), math.prod(x[:-1]), x[-1]
    total = 0
    for i, (N, R) in enumerate((factor[0], factor[1]) for factor in b):
        total += N * K * (wanted.x + wanted.weights[i])  # dy weight, dyᵀ x
        total += N * R * (1 + wanted.b[i])  # dy b, dyᵀ s
        total += R * K * (wanted.x + wanted.a[i])  # ds a, dsᵀ x
    return 2 * M * total  # type: ignore[no-any-return]
