"""Attention on this machine's CPU: mmopt::attention beside SDPA, forward and forward + backward.

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
from torch.nn.functional import scaled_dot_product_attention

from mmopt.measure.memory import peak_tensor_bytes
from mmopt_kernels import Intervals, attention


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    Hq: int
    Hkv: int
    S: int
    T: int
    D: int = 64
    dtype: torch.dtype = torch.float32
    padded: bool = False


CASES = [
    Case("prefill", 1, 8, 8, 256, 256),
    Case("prefill-gqa-bf16", 1, 8, 2, 256, 256, dtype=torch.bfloat16),
    Case("padded-batch", 4, 8, 8, 128, 128, padded=True),
    Case("decode", 1, 8, 2, 1, 512),
]


NAME = operator.attrgetter("name")


def tensors(case: Case) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(case.S, case.Hq), (case.T, case.Hkv), (case.T, case.Hkv)]
    return [
        torch.randn(case.B, n, h, case.D, generator=g)
        .to(case.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n, h in shapes
    ]


def mmopt(case: Case) -> Callable[..., Tensor]:
    if not case.padded:
        return lambda q, k, v: attention(q, k, v, causal=True)
    lengths = torch.linspace(case.T // 2, case.T, case.B).int()
    intervals = Intervals.key_padding(lengths, case.S, T=case.T)
    return lambda q, k, v: attention(q, k, v, intervals=intervals, causal=True)


def sdpa(case: Case) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"enable_gqa": case.Hq != case.Hkv}
    if case.padded:
        # As Hugging Face does: one dense mask for all layers, built outside the op.
        lengths = torch.linspace(case.T // 2, case.T, case.B).int()
        keep = torch.arange(case.T) < lengths[:, None]
        seen = torch.ones(case.S, case.T, dtype=torch.bool).tril(case.T - case.S)
        options["attn_mask"] = keep[:, None, None, :] & seen
    else:
        options["is_causal"] = case.S == case.T
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, **options)


def forward(case: Case, peer: str) -> Callable[[], Tensor]:
    q, k, v = tensors(case)
    op = PEERS[peer](case)

    def call() -> Tensor:
        with torch.no_grad():
            return op(q, k, v).transpose(1, 2).contiguous()

    return call


def backward(case: Case, peer: str) -> Callable[[], tuple[Tensor, ...]]:
    qkv = tensors(case)
    op = PEERS[peer](case)
    grad = torch.randn(case.B, case.S, case.Hq, case.D, dtype=case.dtype)
    return lambda: torch.autograd.grad(op(*qkv).transpose(1, 2).contiguous(), qkv, grad)


PEERS = {"mmopt": mmopt, "sdpa": sdpa}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=NAME)
def bench_attention_forward(benchmark: Any, case: Case, peer: str) -> None:
    # Times the op and the layout its caller wants next; inputs and masks are made above.
    benchmark.group = f"attention forward {case.name}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(case)}
    benchmark(forward(case, peer))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", [c for c in CASES if c.S > 1], ids=NAME)
def bench_attention_backward(benchmark: Any, case: Case, peer: str) -> None:
    # Times forward and backward together: backward alone cannot run twice on one graph.
    benchmark.group = f"attention forward+backward {case.name}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(case)}
    benchmark(backward(case, peer))


# float32 only: for bfloat16 the kernel's buffers depend on the processor's matrix instructions.
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype is torch.float32], ids=NAME)
def exact_attention_memory(figures: Any, case: Case) -> None:
    call = forward(case, "mmopt")
    figures.record("forward peak tensor bytes", peak_tensor_bytes(call), unit="bytes")
    if case.S > 1:
        both = peak_tensor_bytes(backward(case, "mmopt"))
        figures.record("forward+backward peak tensor bytes", both, unit="bytes")
