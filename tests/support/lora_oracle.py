"""LoRA linear calls for tests, and what each must give, written out in float64.

The oracle goes adapter by adapter and forms the adapted weight where DoRA needs it; it shares
nothing with the implementations but the dropout's mask, which has tests of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mmopt_kernels import Int8Weight, NF4Weight, Projection, lora_linear, lora_linear_group
from mmopt_kernels.dropout.reference import keep_mask
from mmopt_kernels.quantized import Weight, dense, flatten

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = (5 << 40) + 99
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative to the largest value: rounding of s, of the output and of the adapter's product.
TOLERANCE = {torch.float64: 1e-10, FP32: 1e-5, FP16: 5e-3, BF16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One call. ``form`` is single, dora or group (three projections of their own N, R, scale)."""

    lead: tuple[int, ...] = (7,)
    K: int = 48
    N: int = 40
    R: int = 5
    dtype: torch.dtype = FP32
    adapter: torch.dtype | None = None  # that of the factors, dtype where None
    base: str = "dense"  # dense, nf4, nf4-nested, int8
    form: str = "single"
    adapters: int | None = None
    per_sequence: bool = False  # the index has one value for all but the first leading dimension
    scale: str = "float"  # float, tensor
    dropout_p: float = 0.0
    bias: bool = True
    trained: bool = False  # the dense weight and the bias require a gradient

    def __str__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.dtype):
                parts.append(str(value).removeprefix("torch."))
            elif isinstance(value, tuple):
                parts.append("x".join(map(str, value)) or "one")
            elif value is not None and value is not False:
                parts.append(f"{field.name}{'' if value is True else value}")
        return "-".join(parts)


def nf4_weight(N: int, K: int, nested: bool, generator: torch.Generator) -> NF4Weight:
    """Random bytes and scales, in bitsandbytes' layout."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(DEVICE) + 0.5

    def bytes_(number: int) -> Tensor:
        drawn = torch.randint(0, 256, (number,), generator=generator)
        return drawn.to(torch.uint8).to(DEVICE)

    blocks = -(-N * K // 64)
    packed = bytes_(-(-N * K // 2))
    if not nested:
        return NF4Weight(packed, draw(blocks), (N, K))
    outer = -(-blocks // 256)
    code = torch.linspace(-0.5, 0.5, 256, device=DEVICE)
    offset = torch.tensor(1.0, device=DEVICE)
    return NF4Weight(packed, bytes_(blocks), (N, K), 64, draw(outer), code, offset)


@dataclass
class Call:
    """The tensors of a case; `leaves` are those that require a gradient."""

    case: Case
    x: Tensor
    projections: list[Projection]
    magnitude: Tensor | None
    index: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        found = [self.x, *([] if self.magnitude is None else [self.magnitude])]
        for p in self.projections:
            parts = (p.weight, p.a, p.b, p.bias, p.scale)
            found += [t for t in parts if isinstance(t, Tensor) and t.requires_grad]
        return found

    def run(self, impl: str = "auto") -> tuple[Tensor, ...]:
        case, options = self.case, {"adapter_index": self.index, "impl": impl, "seed": SEED}
        options["dropout_p"] = case.dropout_p
        if case.form == "group":
            return lora_linear_group(self.x, self.projections, **options)
        ((weight, a, b, bias, scale),) = self.projections
        return (
            lora_linear(
                self.x, weight, a, b, bias=bias, scale=scale, magnitude=self.magnitude, **options
            ),
        )

    def wide(self) -> Call:
        """In float64, every value as the implementations see it; leaves in the same order."""
        dtype = self.case.dtype

        def widen(t: Tensor | None, through: torch.dtype) -> Tensor | None:
            if t is None:
                return None
            return t.detach().to(through).double().requires_grad_(t.requires_grad)

        projections = []
        for weight, a, b, bias, scale in self.projections:
            main, rest, layout = flatten(weight)
            projections.append(
                Projection(
                    widen(weight, dtype)
                    if layout == ""
                    else dense(main, rest, layout, dtype).double(),
                    widen(a, dtype),
                    # A scale that is a tensor is multiplied in before b is rounded.
                    widen(b, dtype if isinstance(scale, float) else b.dtype),
                    widen(bias, dtype),
                    scale if isinstance(scale, float) else widen(scale, scale.dtype),
                )
            )
        magnitude = None if self.magnitude is None else widen(self.magnitude, FP32)
        return Call(self.case, widen(self.x, dtype), projections, magnitude, self.index)

    def oracle(self) -> tuple[Tensor, ...]:
        """For a call in float64."""
        case, lead = self.case, self.case.lead
        x = self.x.reshape(-1, case.K) if self.x.numel() else self.x.reshape(0, case.K)
        kept = torch.ones_like(x)
        if case.dropout_p:
            seed = torch.tensor([SEED], device=x.device)
            kept = keep_mask(seed, case.dropout_p, *x.shape).double() / (1 - case.dropout_p)
        dropped = x * kept
        adapters = [-1] if self.index is None else range(-1, case.adapters or 0)
        outputs = []
        for weight, a, b, bias, scale in self.projections:
            y = x @ weight.T
            if case.form == "dora":
                y = (x - dropped) @ weight.T
            for adapter in adapters:
                rows = torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)
                if self.index is not None:
                    index = self.index.reshape(
                        (*self.index.shape, *[1] * (len(lead) - self.index.dim()))
                    )
                    rows = (index.expand(lead).reshape(-1) == adapter)[:, None]
                    if adapter == -1:
                        if case.form == "dora":
                            y = y + rows * (dropped @ weight.T)
                        continue
                one = slice(None) if self.index is None else adapter
                by = scale[adapter] if isinstance(scale, Tensor) and scale.dim() else scale
                delta = by * (b[one] @ a[one])
                if case.form == "dora":
                    adapted = weight + delta
                    norm = adapted.norm(dim=1).detach()
                    adapted = (self.magnitude[one] / norm)[:, None] * adapted
                    y = y + rows * (dropped @ adapted.T)
                else:
                    y = y + rows * (dropped @ delta.T)
            y = y if bias is None else y + bias
            outputs.append(y.reshape(*lead, weight.shape[0]))
        return tuple(outputs)


def call(case: Case, seed: int = 1) -> Call:
    g = torch.Generator().manual_seed(seed)
    adapter = case.adapter or case.dtype

    def make(*shape: int, to: torch.dtype, leaf: bool = True) -> Tensor:
        drawn = torch.randn(*shape, generator=g, dtype=torch.float64)
        return drawn.to(DEVICE, to).requires_grad_(leaf)

    def weight(N: int) -> Weight:
        if case.base == "int8":
            values = torch.randint(-127, 128, (N, case.K), generator=g).to(torch.int8)
            return Int8Weight(values.to(DEVICE), torch.rand(N, generator=g).to(DEVICE) + 0.5)
        if case.base != "dense":
            return nf4_weight(N, case.K, case.base == "nf4-nested", g)
        return make(N, case.K, to=case.dtype, leaf=case.trained)

    sizes = [(case.N, case.R, 0.5)]
    if case.form == "group":
        sizes += [(case.N // 2, case.R + 3, 0.5 if case.scale == "float" else 0.75), (7, 1, 1.5)]
    stack = () if case.adapters is None else (case.adapters,)
    projections = []
    for i, (N, R, number) in enumerate(sizes):
        scale: float | Tensor = number
        if case.scale == "tensor":
            # Without dimensions where there is one adapter, and in the last projection.
            shape = stack if i < 2 else ()
            scale = (torch.rand(shape, generator=g) + number).to(DEVICE).requires_grad_()
        bias = case.bias and i != 1
        projections.append(
            Projection(
                weight(N),
                make(*stack, R, case.K, to=adapter),
                make(*stack, N, R, to=adapter),
                make(N, to=case.dtype, leaf=case.trained) if bias else None,
                scale,
            )
        )
    magnitude = None
    if case.form == "dora":
        drawn = torch.rand(*stack, case.N, generator=g) + 5.0
        magnitude = drawn.to(DEVICE).requires_grad_()
    index = None
    if case.adapters is not None:
        shape = case.lead[:1] if case.per_sequence else case.lead
        index = torch.randint(-1, case.adapters, shape, generator=g).to(DEVICE)
    return Call(case, make(*case.lead, case.K, to=case.dtype), projections, magnitude, index)


def check(made: Call, impl: str) -> None:
    """Outputs and every gradient against the oracle, dtypes and contiguity."""
    case, wide = made.case, made.wide()
    y, want = made.run(impl), wide.oracle()
    g = torch.Generator(DEVICE).manual_seed(2)
    grads = [torch.randn(t.shape, generator=g, device=DEVICE).to(t.dtype) for t in y]
    leaves = made.leaves
    found = torch.autograd.grad(y, leaves, grads)
    wanted = torch.autograd.grad(want, wide.leaves, [t.double() for t in grads])
    for out in y:
        assert out.dtype == case.dtype
        assert out.is_contiguous()
    for got, leaf in zip(found, leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert got.shape == leaf.shape
    for i, (got, expected) in enumerate(zip([*y, *found], [*want, *wanted], strict=True)):
        assert got.isfinite().all()
        if expected.numel():
            size = expected.abs().max().item()
            leaf = wide.leaves[i - len(y)] if i >= len(y) else None
            for p in wide.projections:
                if leaf is not None and leaf is p.scale:
                    # Terms b db of either sign: each is wrong by as much as db is.
                    db = next(d for d, t in zip(wanted, wide.leaves, strict=True) if t is p.b)
                    size = max(size, (p.b.norm() * db.abs().max()).item())
            limit = TOLERANCE[case.dtype] * max(1.0, size)
            assert (got.double() - expected).abs().max().item() <= limit
