"""The cases of bench_lora.py, for the CPU and the GPU, and the peers that run them.

A case is a LoRA layer, or a group of them that read one input (q, k and v). Weights are random: an
NF4 base is made of random bytes, which costs no quantization. tests/test_lora_cases.py holds all
peers against each other.
"""

from __future__ import annotations

import importlib.util
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_peers import Unavailable, seeded
from torch import Tensor
from torch.nn.functional import dropout, linear

from mmopt_kernels import NF4Weight, lora_linear, lora_linear_group
from mmopt_kernels.lora_linear import Projection
from mmopt_kernels.quantized import nf4_code

SCALE = 0.5
BLOCKSIZE = 64

NAME = operator.attrgetter("name")


@dataclass(frozen=True)
class Case:
    """One layer, or one group of layers.

    Attributes:
        M, K: rows and features of the input.
        N: output features, of each layer of a group.
        dropout: of the adapter's input.
        base: `dense` or `nf4`.
    """

    name: str
    M: int
    K: int
    N: tuple[int, ...]
    R: int = 16
    dropout: float = 0.0
    base: str = "dense"
    dtype: torch.dtype = torch.float32
    adapter: torch.dtype = torch.float32


# The first are part of the quick pass and of the gate, and small, because the gate calls each a
# dozen times in every pair of processes.
CPU_QUICK = (
    Case("square", 512, 384, (384,)),
    Case("wide", 256, 384, (1536,)),
    Case("bf16-adapter32", 512, 384, (384,), dtype=torch.bfloat16),
    Case("decode", 1, 384, (384,)),
    Case("dropout", 512, 384, (384,), dropout=0.1),
    Case("qkv", 256, 384, (384, 128, 128)),
    Case("nf4", 256, 384, (384,), base="nf4"),
    Case("nf4-decode", 1, 384, (384,), base="nf4"),
)
CPU_SLOW = (
    Case("llama-8b-q", 512, 4096, (4096,)),
    Case("llama-8b-q-dropout", 512, 4096, (4096,), dropout=0.1),
)

ROWS = (512, 2048, 8192, 32768)
RANKS = (8, 16, 64)
# (K, N) of the projections: q and o, k and v, gate and up, down.
SHAPES = {
    "llama-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "qwen-vl-7b": ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)),
}


def gpu_case(model: str, K: int, N: tuple[int, ...], M: int, R: int, p: float, base: str) -> Case:
    """A case with bfloat16 activations and float32 adapters, as PEFT keeps them by default."""
    shape = f"{K}x{'+'.join(map(str, N))}"
    name = f"{model}-{shape}-m{M}-r{R}{'-dropout' if p else ''}{'-nf4' if base == 'nf4' else ''}"
    return Case(name, M, K, N, R, p, base, torch.bfloat16)


def _grid() -> list[Case]:
    cases = []
    for model, shapes in SHAPES.items():
        (K, q), (_, kv), (_, gate), _ = shapes
        layers = [(K, (N,)) for K, N in shapes] + [(K, (q, kv, kv)), (K, (gate, gate))]
        for (K, N), M, R, p, base in itertools.product(
            layers, ROWS, RANKS, (0.0, 0.1), ("dense", "nf4")
        ):
            cases.append(gpu_case(model, K, N, M, R, p, base))
    return cases


GPU_GRID = tuple(_grid())


def _is_representative(case: Case) -> bool:
    """Every shape once, and every other property beside one shape."""
    plain = case.R == 16 and not case.dropout and case.base == "dense"
    if case.M == 8192 and plain:
        return True
    if case.K != 4096 or case.N not in ((4096,), (4096, 1024, 1024)):
        return False
    varied = [case.M != 8192, case.R != 16, case.dropout > 0, case.base == "nf4"]
    return sum(varied) == 1


GPU = tuple(case for case in GPU_GRID if _is_representative(case))


@dataclass(frozen=True)
class Tensors:
    """What all peers of a case are given; x, a and b need gradients."""

    x: Tensor
    weights: list[Any]
    a: list[Tensor]
    b: list[Tensor]


def tensors(case: Case, device: str = "cpu") -> Tensors:
    """Random, and the same for every peer; outputs are of the size of one."""
    generator = seeded(device, 0)

    def randn(rows: int, columns: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return drawn.mul_(spread).to(dtype)

    def weight(N: int) -> Any:
        if case.base == "dense":
            return randn(N, case.K, case.dtype, case.K**-0.5)
        values = N * case.K
        packed = torch.randint(
            0, 256, (values // 2, 1), generator=generator, device=device, dtype=torch.uint8
        )
        absmax = torch.rand(values // BLOCKSIZE, generator=generator, device=device)
        code = nf4_code(device)
        shape = (N, case.K)
        return NF4Weight(packed, absmax * 2 * case.K**-0.5, shape, BLOCKSIZE, code=code)

    return Tensors(
        x=randn(case.M, case.K, case.dtype).requires_grad_(),
        weights=[weight(N) for N in case.N],
        a=[randn(case.R, case.K, case.adapter, case.K**-0.5).requires_grad_() for _ in case.N],
        b=[randn(N, case.R, case.adapter).requires_grad_() for N in case.N],
    )


def least_bytes(case: Case, direction: str) -> int:
    """What must cross the memory bus at least, each tensor once per pass that needs it.

    Forward reads x, the weights and the adapters, and writes y. Forward and backward also writes
    s = x aᵀ, reads it, dy, x, the weights and the adapters, and writes dx and the adapters'
    gradients.
    """
    size, adapter_size = case.dtype.itemsize, case.adapter.itemsize
    outputs = sum(case.N)
    x, y, s = case.M * case.K * size, case.M * outputs * size, case.M * case.R * len(case.N) * size
    values = outputs * case.K
    # A half byte a value, and a float32 a block.
    weights = values * size if case.base == "dense" else values // 2 + values // BLOCKSIZE * 4
    adapters = case.R * (case.K * len(case.N) + outputs) * adapter_size
    forward = x + weights + adapters + y
    if direction == "forward":
        return forward
    return forward + s + (s + y + x + weights + adapters) + (x + adapters)


# --- peers ----------------------------------------------------------------------------------------

Op = Callable[[Tensors], list[Tensor]]
"""What a peer runs inside the timer: the outputs of all layers of a case."""


def mmopt_as(impl: Any) -> Callable[[Case], Op]:
    """This project's op held to one implementation; a group in one call."""

    def build(case: Case) -> Op:
        def call(t: Tensors) -> list[Tensor]:
            if len(case.N) == 1:
                return [
                    lora_linear(
                        t.x, t.weights[0], t.a[0], t.b[0],
                        scale=SCALE, dropout_p=case.dropout, impl=impl,
                    )
                ]  # fmt: skip
            projections = [
                Projection(weight, a, b, None, SCALE)
                for weight, a, b in zip(t.weights, t.a, t.b, strict=True)
            ]
            return list(lora_linear_group(t.x, projections, dropout_p=case.dropout, impl=impl))

        return call

    return build


def frozen_linear(weight: Any) -> Callable[[Tensor], Tensor]:
    """The base layer alone: `nn.Linear`, or bitsandbytes' `Linear4bit`."""
    if isinstance(weight, Tensor):
        return lambda x: linear(x, weight)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not installed")
    import bitsandbytes as bnb

    state = bnb.functional.QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), code=weight.code,
        blocksize=weight.blocksize, quant_type="nf4", dtype=torch.float32,
    )  # fmt: skip
    return lambda x: bnb.matmul_4bit(x, weight.packed, quant_state=state)


def base(case: Case) -> Op:
    """The frozen layers without adapters: the floor."""
    return lambda t: [frozen_linear(weight)(t.x) for weight in t.weights]


def peft(case: Case) -> Op:
    """As the forward of `peft.tuners.lora.Linear`: the activation takes the adapter's dtype."""

    def call(t: Tensors) -> list[Tensor]:
        outputs = []
        for weight, a, b in zip(t.weights, t.a, t.b, strict=True):
            y = frozen_linear(weight)(t.x)
            dropped = dropout(t.x.to(a.dtype), case.dropout, training=case.dropout > 0)
            outputs.append((y + linear(linear(dropped, a), b) * SCALE).to(y.dtype))
        return outputs

    return call


def peft_compiled(case: Case) -> Op:
    """The same by torch.compile."""
    # As one shape of many, the next case would be compiled with dynamic shapes, and slower.
    torch._dynamo.reset()
    # A list of tensors: a dataclass of them would be guarded attribute by attribute.
    plain = peft(case)

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled(x: Tensor, weights: list[Any], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return plain(Tensors(x, weights, a, b))

    return lambda t: compiled(t.x, t.weights, t.a, t.b)


def _of_others(case: Case, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    if case.base == "nf4":
        raise Unavailable(f"{package} takes NF4 in its own loader's form only")


def unsloth(case: Case) -> Op:
    """Unsloth's autograd functions over cuBLAS, which take `[batch, length, K]`."""
    _of_others(case, "unsloth")
    if case.dropout:
        raise Unavailable("unsloth's kernels have no LoRA dropout")
    from unsloth.kernels.fast_lora import LoRA_QKV, LoRA_W

    def call(t: Tensors) -> list[Tensor]:
        x = t.x[None]
        layers = [
            (weight, None, a, b, SCALE) for weight, a, b in zip(t.weights, t.a, t.b, strict=True)
        ]
        if len(layers) == 3:
            # Not in place, which would overwrite the x that every round reads.
            found = LoRA_QKV.apply(x, *itertools.chain(*layers), False)
        else:
            found = [LoRA_W.apply(x, *layer) for layer in layers]
        return [y[0] for y in found]

    return call


def lorafusion(case: Case) -> Op:
    """LoRAFusion's Triton kernels, which take `[batch, length, K]` and adapters of x's dtype."""
    _of_others(case, "lorafusion")
    from lorafusion.ops.lora_v1 import fused_linear_lora

    def call(t: Tensors) -> list[Tensor]:
        return [
            fused_linear_lora(
                t.x[None], weight, a.to(t.x.dtype), b.to(t.x.dtype), SCALE, 0, case.dropout
            )[0]
            for weight, a, b in zip(t.weights, t.a, t.b, strict=True)
        ]

    return call


CPU_PEERS: dict[str, Callable[[Case], Op]] = {
    "mmopt": mmopt_as("auto"),
    "base": base,
    "peft": peft,
}
GPU_PEERS: dict[str, Callable[[Case], Op]] = {
    **CPU_PEERS,
    "mmopt-addmm": mmopt_as("addmm"),
    "mmopt-triton": mmopt_as("triton"),
    "peft-compiled": peft_compiled,
    "unsloth": unsloth,
    "lorafusion": lorafusion,
}


def call_of(case: Case, op: Op, direction: str, device: str) -> Callable[[], Any]:
    """A call of the op, forward without gradients, or forward and backward together."""
    t = tensors(case, device)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return op(t)

    if direction == "forward":
        return forward
    generator = seeded(device, 1)
    grads = [
        torch.randn(case.M, N, generator=generator, device=device).to(case.dtype) for N in case.N
    ]
    leaves = [t.x, *t.a, *t.b]
    return lambda: torch.autograd.grad(op(t), leaves, grads, allow_unused=True)


DIRECTIONS = ("forward", "forward+backward")


def runnable(
    case: Case, build: Callable[[Case], Op], direction: str, device: str = "cpu"
) -> Callable[[], Any]:
    """What to time: a call that has run once.

    Raises:
        Unavailable: the peer cannot run this case here, in its own words.
    """
    op = build(case)
    call = call_of(case, op, direction, device)
    try:
        call()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # bitsandbytes and the kernels of others say so by raising; so does a full GPU.
        line = str(error).strip().splitlines()[0][:200]
        raise Unavailable(f"{type(error).__name__}: {line}") from error
    return call
