"""A LoRA linear layer on this machine's CPU: mmopt::lora_linear beside PEFT's eager form.

Run with ``make bench``; groups put the peers of one case side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

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


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_lora_linear_forward(benchmark: Any, case: Case, peer: str) -> None:
    # Times the op only; inputs are made above.
    benchmark.group = f"lora_linear forward {case.name}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(case)}
    args = tensors(case)
    with torch.no_grad():
        benchmark(lambda: PEERS[peer](*args))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_lora_linear_backward(benchmark: Any, case: Case, peer: str) -> None:
    # Times forward and backward together: backward alone cannot run twice on one graph.
    benchmark.group = f"lora_linear forward+backward {case.name}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(case)}
    args = tensors(case)
    leaves = [t for t in args if t.requires_grad]
    grad = torch.randn(case.M, case.N, dtype=case.dtype)
    benchmark(lambda: torch.autograd.grad(PEERS[peer](*args), leaves, grad))
