"""A LoRA linear layer on this machine's CPU: mmopt::lora_linear beside PEFT's eager form.

Groups put the peers of one case side by side. Exact: what mmopt's op needs beyond its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from mmopt.measure.memory import peak_tensor_bytes
from mmopt_kernels import lora_linear

SCALE = 0.5


@dataclass(frozen=True)
class Case:
    name: str
    M: int
    K: int
    N: int
    R: int = 16
    dtype: torch.dtype = torch.float32
    adapter: torch.dtype = torch.float32


CASES = [
    Case("square", 512, 384, 384),
    Case("wide", 256, 384, 1536),
    Case("bf16-adapter32", 512, 384, 384, dtype=torch.bfloat16),
    Case("decode", 1, 384, 384),
]


NAME = operator.attrgetter("name")


def mmopt(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return lora_linear(x, weight, a, b, scale=SCALE)


def peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As peft.tuners.lora.layer.Linear.forward: the activation is cast to the adapter's dtype."""
    y = linear(x, weight)
    return (y + linear(linear(x.to(a.dtype), a), b) * SCALE).to(y.dtype)


PEERS = {"mmopt": mmopt, "peft": peft}


def tensors(case: Case) -> list[Tensor]:
    """The base weight is frozen."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(case.M, case.K, generator=g).to(case.dtype).requires_grad_(),
        torch.randn(case.N, case.K, generator=g).to(case.dtype),
        torch.randn(case.R, case.K, generator=g).to(case.adapter).requires_grad_(),
        torch.randn(case.N, case.R, generator=g).to(case.adapter).requires_grad_(),
    ]


def forward(case: Case, peer: str) -> Callable[[], Tensor]:
    args = tensors(case)

    def call() -> Tensor:
        with torch.no_grad():
            return PEERS[peer](*args)

    return call


def backward(case: Case, peer: str) -> Callable[[], tuple[Tensor, ...]]:
    args = tensors(case)
    leaves = [t for t in args if t.requires_grad]
    grad = torch.randn(case.M, case.N, dtype=case.dtype)
    return lambda: torch.autograd.grad(PEERS[peer](*args), leaves, grad)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=NAME)
def bench_lora_linear_forward(benchmark: Any, case: Case, peer: str) -> None:
    # Times the op only; inputs are made above.
    benchmark.group = f"lora_linear forward {case.name}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(case)}
    benchmark(forward(case, peer))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=NAME)
def bench_lora_linear_backward(benchmark: Any, case: Case, peer: str) -> None:
    # Times forward and backward together: backward alone cannot run twice on one graph.
    benchmark.group = f"lora_linear forward+backward {case.name}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(case)}
    benchmark(backward(case, peer))


# float32 only: how bfloat16 weights are packed depends on the processor's instructions.
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype is torch.float32], ids=NAME)
def exact_lora_linear_memory(figures: Any, case: Case) -> None:
    for name, call in (("forward", forward), ("forward+backward", backward)):
        peak = peak_tensor_bytes(call(case, "mmopt"))
        figures.record(f"{name} peak tensor bytes", peak, unit="bytes")
