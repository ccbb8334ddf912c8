"""The public LoRA linear functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmopt_kernels import quantized
from mmopt_kernels._autocast import autocast_dtype
from mmopt_kernels._scale import check_scale
from mmopt_kernels._seed import check_dropout, seed_on
from mmopt_kernels._transforms import refuse_transforms
from mmopt_kernels.errors import KernelInputError
from mmopt_kernels.lora_linear.ops import DTYPES, IMPLS  # registers the ops too
from mmopt_kernels.quantized import Int8Weight, NF4Weight, Weight

Impl = Literal["auto", "reference", "addmm", "triton"]


class Projection(NamedTuple):
    """One linear layer and its adapter, as an argument of `lora_linear_group`.

    Attributes:
        weight, a, b, bias, scale: as for `lora_linear`.
    """

    weight: Weight
    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0


def lora_linear(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    magnitude: Tensor | None = None,
    adapter_index: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Apply a linear layer and its adapter.

    ``x @ weight.T + bias + scale * (dropout(x) @ a.T) @ b.T``. The adapter's factors are cast to
    the dtype of ``x``, never the activation to theirs; each gradient comes back in its own tensor's
    dtype, and only for tensors that require it. A quantized weight gets none. Under autocast,
    everything (unless x is float64) runs in the autocast dtype, as ``linear`` does.

    Kept for backward: the arguments as they are, and ``dropout(x) @ a.T``, R numbers for each row.
    Neither the dropout's mask nor its result nor a dequantized weight is: backward makes them
    again. With ``magnitude``, also the output before it is scaled, and the dropout's result.

    Args:
        x: ``[..., K]`` float16, bfloat16, float32 or float64; any leading dimensions, empty ones
            included.
        weight: ``[N, K]``, dtype of ``x``; usually frozen. Or an `NF4Weight` or `Int8Weight`.
        a: ``[R, K]``, any floating dtype (float32 adapters over a bfloat16 base are usual). With
            ``adapter_index``, ``[E, R, K]``: E adapters of one rank; pad smaller ones with zeros.
        b: ``[N, R]``, any floating dtype; ``[E, N, R]`` with ``adapter_index``.
        bias: ``[N]``, dtype of ``x``, or None.
        scale: ``alpha / R`` (``alpha / sqrt(R)`` for rsLoRA), already divided. A tensor of no
            dimension, or ``[E]`` with ``adapter_index``, is differentiable. A tensor, and any scale
            under torch.compile, is multiplied into b: as an argument of the op, a float would
            be compiled for its value.
        dropout_p: probability in ``[0, 1)``, to within ``2**-32``, of dropping an element of x on
            its way to the adapter; what stays is scaled by ``1 / (1 - dropout_p)``.
        seed: of the dropout, an int of 64 bits or an int64 tensor of one element on the device of
            ``x``, which the host never reads. The mask depends on it, on the row and on the column
            alone: the same for every ``impl``. None draws one from torch's generator of that
            device, so ``torch.manual_seed`` governs it and checkpointing replays it. Ignored
            without dropout.
        magnitude: ``[N]`` (``[E, N]`` with ``adapter_index``), DoRA: each row of
            ``weight + scale * b @ a`` is scaled to this norm. As in PEFT, no gradient goes through
            the row's own norm, and dropout, where there is any, is on the base's input too.
        adapter_index: integers of the leading shape of ``x``, or of the first dimensions of it:
            the adapter of each row. -1 applies the base alone.
        impl: ``"auto"``; ``"reference"`` (plain PyTorch in float32); ``"addmm"`` (vendor GEMMs,
            the adapter added in place); ``"triton"`` (a GPU, or the CPU under
            ``TRITON_INTERPRET=1``; not float64). Only ``"auto"`` chooses by what can run and by
            which is faster; a plain call compiled for a CPU it traces as plain PyTorch, which
            Inductor fuses.

    Returns:
        ``[..., N]`` in the dtype of ``x``, contiguous.

    Raises:
        KernelInputError: a shape, dtype or device does not match, an index is outside the adapters
            (on a GPU an assertion on the device says so, later), or ``impl`` cannot run here.
        NotImplementedError: a transform of `torch.func`, or forward mode, would differentiate
            the call.

    Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353,
    section 4.3 (DoRA); Salmon et al. 2011, doi:10.1145/2063384.2063405 (Philox, the dropout's
    generator).
    """
    op = "lora_linear"
    refuse_transforms(op, x, weight, a, b, bias, scale, magnitude)
    dtype = autocast_dtype(x)
    if dtype is not None:
        # The op casts the weight, without keeping the copy for backward.
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    stacked = adapter_index is not None
    _check_call(op, x, dropout_p, seed, impl)
    _check(op, "", x, weight, a, b, bias, scale, stacked, dtype)
    adapters = a.shape[0] if stacked else 1
    index = None if adapter_index is None else _index(op, adapter_index, x, adapters)
    drawn = seed_on(x.device, seed) if dropout_p > 0 else None
    if isinstance(scale, Tensor) or torch.compiler.is_compiling():
        b, scale = _folded(b, scale), 1.0
    scale = float(scale)
    if magnitude is not None:
        _check_magnitude(op, x, magnitude, b)
        return _dora(x, weight, a, b, bias, scale, dropout_p, drawn, magnitude, index, impl)
    return _one(x, weight, a, b, bias, scale, dropout_p, drawn, index, impl)


def lora_linear_group(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    adapter_index: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """Several `lora_linear` of the same ``x``, such as q, k and v, or gate and up.

    All adapters read x together, in one GEMM of the sum of their ranks, and so does the gradient
    of x. With dropout they share one mask, where layers of their own would each draw one.

    Args:
        x: ``[..., K]``.
        projections: one or more; N, R and scale may differ between them, K and the number of
            adapters may not.
        dropout_p, seed, adapter_index, impl: as for `lora_linear`.

    Returns:
        One ``[..., N]`` for each projection.

    Raises:
        KernelInputError: as for `lora_linear`; the message tells the projection.
        NotImplementedError: a transform of `torch.func`, or forward mode, would differentiate
            the call.
    """
    op = "lora_linear_group"
    refuse_transforms(op, x, projections)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    _check_call(op, x, dropout_p, seed, impl)
    if not projections:
        raise KernelInputError(
            f"{op}: projections are empty, expected at least one. Leave the call out."
        )
    stacked = adapter_index is not None
    each = []
    for i, (weight, a, b, bias, scale) in enumerate(projections):
        if dtype is not None and bias is not None:
            bias = bias.to(dtype)
        _check(op, f"projections[{i}].", x, weight, a, b, bias, scale, stacked, dtype)
        each.append(Projection(weight, a, b, bias, scale))
    adapters = each[0].a.shape[0] if stacked else 1
    for i, projection in enumerate(each):
        if stacked and projection.a.shape[0] != adapters:
            raise KernelInputError(
                f"{op}: projections[{i}].a holds {projection.a.shape[0]} adapters, expected "
                f"{adapters} like projections[0].a. Give an adapter that lacks the layer zeros."
            )
    index = None if adapter_index is None else _index(op, adapter_index, x, adapters)
    drawn = seed_on(x.device, seed) if dropout_p > 0 else None
    # The op has one scale: a list of floats would have torch.compile specialize on each.
    shared = each[0].scale
    if (
        torch.compiler.is_compiling()
        or isinstance(shared, Tensor)
        or any(isinstance(p.scale, Tensor) or p.scale != shared for p in each)
    ):
        each = [p._replace(b=_folded(p.b, p.scale)) for p in each]
        shared = 1.0
    return _many(x, each, float(shared), dropout_p, drawn, index, adapters, impl)


def _one(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    index: Tensor | None,
    impl: str,
) -> Tensor:
    adapters = 1 if index is None else a.shape[0]
    if not isinstance(weight, Tensor) or _traced(x, seed, index, impl):
        each = [Projection(weight, a, b, bias)]
        return _many(x, each, scale, dropout_p, seed, index, adapters, impl)[0]
    if index is not None:
        a, b = _side_by_side(a, b)
    y, _ = torch.ops.mmopt.lora_linear(
        x, weight, a, b, bias, index, seed, adapters, scale, dropout_p, impl
    )
    return y  # type: ignore[no-any-return]


def _many(
    x: Tensor,
    projections: list[Projection],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    index: Tensor | None,
    adapters: int,
    impl: str,
) -> tuple[Tensor, ...]:
    if _traced(x, seed, index, impl) and all(isinstance(p.weight, Tensor) for p in projections):
        return _plain(x, projections, scale)
    weights, rest, layouts = [], [], []
    for projection in projections:
        main, others, layout = quantized.flatten(projection.weight)
        weights.append(main)
        rest += others
        layouts.append(layout)
    factors = [(p.a, p.b) if index is None else _side_by_side(p.a, p.b) for p in projections]
    y, _ = torch.ops.mmopt.lora_linear_group(
        x,
        weights,
        rest,
        [a for a, _ in factors],
        [b for _, b in factors],
        [p.bias for p in projections if p.bias is not None],
        index,
        seed,
        [p.bias is not None for p in projections],
        adapters,
        scale,
        dropout_p,
        layouts,
        impl,
    )
    return tuple(y)


def _traced(x: Tensor, seed: Tensor | None, index: Tensor | None, impl: str) -> bool:
    """A plain call is better left open to the compiler.

    On a CPU there is no kernel that Inductor could not make itself: it fuses the bias, the
    adapter's sum and what follows, which an op of its own keeps it from.
    """
    if impl != "auto" or seed is not None or index is not None or x.device.type != "cpu":
        return False
    return torch.compiler.is_compiling()


def _plain(x: Tensor, projections: list[Projection], scale: float) -> tuple[Tensor, ...]:
    # Everything has autocast's dtype by now, or float64, which it leaves alone. To switch it off as
    # well would keep the graph out of AOTAutograd's cache. The scale is in b already.
    assert scale == 1.0
    linear = torch.nn.functional.linear
    factors = [p.a.to(x.dtype) for p in projections]
    s = linear(x, factors[0] if len(factors) == 1 else torch.cat(factors))
    parts = torch.split(s, [a.shape[0] for a in factors], dim=-1)
    return tuple(
        linear(x, p.weight.to(x.dtype), p.bias) + linear(part, p.b.to(x.dtype))  # type: ignore[union-attr]
        for p, part in zip(projections, parts, strict=True)
    )


def _dora(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    magnitude: Tensor,
    index: Tensor | None,
    impl: Impl,
) -> Tensor:
    """DoRA by its parts, as PEFT defines them: the base sees the dropout as well.

    y = (x - xd) weightᵀ + bias + g * (xd weightᵀ + scale xd aᵀ bᵀ), xd = dropout(x), and g the
    magnitude over the norm of the row, which is a constant to the gradient.
    """
    with torch.no_grad():
        main, rest, layout = quantized.flatten(weight)
        norm = torch.ops.mmopt.lora_weight_norm(
            main.detach(), rest, a.detach(), _folded(b.detach(), scale), layout
        )
    # What y grows by rather than what it is multiplied by: a magnitude may then move by less than
    # 16 bits tell from 1, and no activation is widened for it.
    more = (magnitude.to(norm.dtype) / norm - 1.0).to(x.dtype)  # [N] or [E, N]
    if index is not None:
        # [..., N]; the adapter -1 is the last one, which leaves the base as it is.
        extended = torch.cat([more, more.new_zeros(1, more.shape[1])])
        more = extended[index.remainder(extended.shape[0])].view(*x.shape[:-1], more.shape[1])
    if seed is None:
        y = _one(x, weight, a, b, None, scale, 0.0, None, index, impl)
        return torch.addcmul(y if bias is None else y + bias, y, more)
    chosen = impl if impl in ("reference", "triton") else "auto"
    dropped = torch.ops.mmopt.dropout(x, seed, dropout_p, chosen)
    if isinstance(weight, Tensor):
        base = torch.nn.functional.linear(x - dropped, weight.to(x.dtype), bias)
    else:
        none = x.new_empty(0, x.shape[-1]), x.new_empty(b.shape[-2], 0)
        base = _one(x - dropped, weight, *none, bias, 1.0, 0.0, None, None, impl)
    y = _one(dropped, weight, a, b, None, scale, 0.0, None, index, impl)
    return torch.addcmul(base + y, y, more)


def _folded(b: Tensor, scale: float | Tensor) -> Tensor:
    """``scale * b``, not rounded to 16 bits before the op does."""
    if isinstance(scale, Tensor) and scale.dim() == 1:
        scale = scale[:, None, None]
    return (b if b.dtype == torch.float64 else b.float()) * scale


def _side_by_side(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Stacked factors as those of one adapter of rank ``E * R``."""
    E, R, K = a.shape
    return a.reshape(E * R, K), b.transpose(0, 1).reshape(b.shape[1], E * R)


def _index(op: str, index: Tensor, x: Tensor, adapters: int) -> Tensor:
    """The adapter of each row of x seen as ``[M, K]``, int32 ``[M]``; the op checks its values."""
    lead = x.shape[:-1]
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise KernelInputError(
            f"{op}: adapter_index has dtype {index.dtype}, expected an integer dtype. "
            "Give each row the number of its adapter, or -1 for none."
        )
    if index.device != x.device:
        raise KernelInputError(
            f"{op}: adapter_index is on {index.device}, expected {x.device} like x. "
            f"Move it to {x.device}."
        )
    # A scalar index belongs to an x without leading dimensions, not to all rows of another.
    if index.shape != lead[: index.dim()] or (lead and not index.dim()):
        raise KernelInputError(
            f"{op}: adapter_index has shape {tuple(index.shape)}, expected {tuple(lead)}, or the "
            f"first dimensions of it, because x has shape {tuple(x.shape)}. Give each row, or each "
            "sequence, one adapter."
        )
    # As int64 first: an unsigned or a narrow integer cannot hold both limits.
    wide = index.to(torch.int64)
    if index.dtype == torch.uint64:
        wide = wide.masked_fill(wide < 0, adapters)
    # What int32 cannot hold stays out of range.
    index = wide.clamp(-2, adapters).to(torch.int32)
    index = index.reshape((*index.shape, *[1] * (len(lead) - index.dim())))
    # Kernels read it as contiguous, which reshape alone leaves open.
    return index.expand(lead).reshape(x.shape[:-1].numel()).contiguous()


def _check_call(op: str, x: Tensor, dropout_p: float, seed: int | Tensor | None, impl: str) -> None:
    if impl not in IMPLS:
        raise KernelInputError(
            f"{op}: impl is {impl!r}, expected one of {', '.join(IMPLS)}. "
            "Leave impl out to choose by what can run."
        )
    if x.dim() == 0 or x.dtype not in DTYPES:
        raise KernelInputError(
            f"{op}: x is {x.dtype} {tuple(x.shape)}, expected [..., K] in float16, "
            "bfloat16, float32 or float64. Cast x to the dtype of the base layer."
        )
    check_dropout(op, dropout_p, seed, "x", x)


def _check(
    op: str,
    of: str,
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    stacked: bool,
    autocast: torch.dtype | None,
) -> None:
    """One projection; ``of`` is how its arguments are reached, as ``projections[1].``."""
    K = x.shape[-1]
    if isinstance(weight, NF4Weight | Int8Weight):
        quantized.check(op, weight)
        base = weight.packed if isinstance(weight, NF4Weight) else weight.values
    else:
        base = weight
        if weight.dim() != 2:
            raise KernelInputError(
                f"{op}: {of}weight has shape {tuple(weight.shape)}, expected [N, {K}] because x "
                f"has {K} features. Pass the weight as nn.Linear stores it."
            )
    N, features = quantized.size(weight)
    if features != K:
        raise KernelInputError(
            f"{op}: {of}weight has shape ({N}, {features}), expected [N, {K}] because x has {K} "
            "features. Pass the weight as nn.Linear stores it."
        )
    ranks = "E, R" if stacked else "R"
    if a.dim() != 2 + stacked:
        why = "given" if stacked else "None"
        raise KernelInputError(
            f"{op}: {of}a has shape {tuple(a.shape)}, expected [{ranks}, {K}] because "
            f"adapter_index is {why}. Stack adapters only to choose among them by row."
        )
    if a.shape[-1] != K:
        raise KernelInputError(
            f"{op}: {of}a has shape {tuple(a.shape)}, expected [{ranks}, {K}] because x has "
            f"{K} features. Pass the adapter made for this layer, a as lora_A stores it."
        )
    expected = (*a.shape[:-2], N, a.shape[-2])
    if b.shape != expected:
        held = f", holds {a.shape[0]} adapters" if stacked else ""
        raise KernelInputError(
            f"{op}: {of}b has shape {tuple(b.shape)}, expected {expected} because weight has {N} "
            f"rows and a has rank {a.shape[-2]}{held}. Pass a and b from the same adapter."
        )
    if bias is not None and bias.shape != (N,):
        raise KernelInputError(
            f"{op}: {of}bias has shape {tuple(bias.shape)}, expected ({N},) "
            f"because weight has {N} rows. Pass weight and bias of the same layer."
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor) or t.dtype == x.dtype:
            continue
        if autocast is None or not t.is_floating_point():
            raise KernelInputError(
                f"{op}: {of}{name} has dtype {t.dtype}, expected {x.dtype} like x. "
                "Cast x to the base layer's dtype, or run under torch.autocast."
            )
    for name, t in (("a", a), ("b", b)):
        if not t.is_floating_point():
            raise KernelInputError(
                f"{op}: {of}{name} has dtype {t.dtype}, expected a floating dtype. "
                "Dequantize the adapter first."
            )
    for name, t in (("weight", base), ("a", a), ("b", b), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise KernelInputError(
                f"{op}: {of}{name} is on {t.device}, expected {x.device} like x. "
                f"Move {name} to {x.device}."
            )
    if isinstance(scale, Tensor):
        adapters = a.shape[0] if stacked else None
        why = f"a holds {adapters} adapters" if stacked else "adapter_index is None"
        check_scale(op, f"{of}scale", scale, adapters, why, "x", x)


def _check_magnitude(op: str, x: Tensor, magnitude: Tensor, b: Tensor) -> None:
    expected = tuple(b.shape[:-1])
    if tuple(magnitude.shape) != expected:
        raise KernelInputError(
            f"{op}: magnitude has shape {tuple(magnitude.shape)}, expected {expected} because b "
            f"has shape {tuple(b.shape)}. Pass the magnitude vector of the same adapter."
        )
    if not magnitude.is_floating_point() or magnitude.device != x.device:
        raise KernelInputError(
            f"{op}: magnitude is {magnitude.dtype} on {magnitude.device}, expected a floating "
            f"dtype on {x.device} like x. Cast or move it."
        )
