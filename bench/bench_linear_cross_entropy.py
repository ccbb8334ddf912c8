"""The loss of a language model's output layer: mmopt's op beside eager, compiled and Liger.

On the CPU at small sizes and at that of a 124M Llama; on a GPU, with `-m gpu`, at those of large
models. Time and memory of loss and gradients, as a training step needs them.

Groups put the peers of one case side by side. Exact: what mmopt's op needs beyond its inputs, and
the bytes that it and eager move on a GPU, counted without one.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu_peers
import pytest
import torch
from gpu_peers import CLOCK, Measured, Unavailable, seeded, time_peers
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from mmopt.measure.memory import peak_tensor_bytes
from mmopt.measure.traffic import operand_bytes
from mmopt_kernels import linear_cross_entropy


@dataclass(frozen=True)
class Case:
    """M tokens of H features, V labels; `trained`: whether the output layer gets a gradient."""

    name: str
    M: int
    H: int
    V: int
    trained: bool = False
    softcap: float | None = None
    dtype: torch.dtype = torch.float32


CPU_QUICK = (
    Case("frozen", 256, 128, 8192),
    Case("trained", 256, 128, 8192, trained=True),
    Case("softcap", 256, 128, 8192, softcap=30.0),
)
CPU_SLOW = (
    Case("llama-124m", 512, 768, 32000),
    Case("llama-124m-trained", 512, 768, 32000, trained=True),
    Case("llama-124m-bf16", 512, 768, 32000, dtype=torch.bfloat16),
)
GPU = (
    Case("llama-8b", 8192, 4096, 128256, dtype=torch.bfloat16),
    Case("llama-8b-trained", 8192, 4096, 128256, trained=True, dtype=torch.bfloat16),
    Case("llama-8b-2k", 2048, 4096, 128256, dtype=torch.bfloat16),
    Case("qwen-vl-7b", 8192, 3584, 152064, dtype=torch.bfloat16),
    Case("internvl2-8b", 8192, 4096, 92553, dtype=torch.bfloat16),  # an odd vocabulary
    Case("gemma2-9b", 4096, 3584, 256000, softcap=30.0, dtype=torch.bfloat16),
)

ROUNDS = 20
# Liger asks the GPU which labels count, and eager's logits twice over are too much for one GPU:
# neither can be a CUDA graph beside the others. At 10 ms a call launches hide behind the kernels.
TIMER = "host-inclusive"
NAME = operator.attrgetter("name")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden, weight and labels."""


def mmopt(case: Case) -> Loss:
    return functools.partial(linear_cross_entropy, softcap=case.softcap)


def eager(case: Case) -> Loss:
    """As transformers computes it: logits in the model's dtype, the loss in float32."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = linear(hidden, weight)
        if case.softcap is not None:
            logits = torch.tanh(logits / case.softcap) * case.softcap
        return cross_entropy(logits.float(), labels)

    return loss


def compiled(case: Case) -> Loss:
    return torch.compile(eager(case))  # type: ignore[no-any-return]


def liger(case: Case) -> Loss:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger_kernel is not installed")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(softcap=case.softcap)
    return lambda hidden, weight, labels: fused(weight, hidden, labels)


CPU_PEERS = {"mmopt": mmopt, "eager": eager, "compiled": compiled}
GPU_PEERS = CPU_PEERS | {"liger": liger}


def call_of(case: Case, build: Callable[[Case], Loss], device: str) -> Callable[[], Any]:
    """Loss and gradients."""
    g = seeded(device, 0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(case.dtype)

    hidden = make(case.M, case.H).requires_grad_()
    weight = (make(case.V, case.H) * case.H**-0.5).requires_grad_(case.trained)
    labels = torch.randint(case.V, (case.M,), generator=g, device=device)
    leaves = [hidden, weight] if case.trained else [hidden]
    loss = build(case)

    def call() -> tuple[Tensor, ...]:
        found = loss(hidden, weight, labels)
        return (found, *torch.autograd.grad(found, leaves))

    return call


def runnable(case: Case, build: Callable[[Case], Loss], device: str = "cpu") -> Callable[[], Any]:
    """What to time: a call that has run once."""
    call = call_of(case, build, device)
    call()
    return call


def params(quick: tuple[Case, ...], slow: tuple[Case, ...]) -> list[Any]:
    long = [pytest.param(c, id=f"long-{c.name}", marks=pytest.mark.slow) for c in slow]
    return [pytest.param(c, id=c.name) for c in quick] + long


@pytest.mark.parametrize("peer", CPU_PEERS)
@pytest.mark.parametrize("case", params(CPU_QUICK, CPU_SLOW))
def bench_linear_cross_entropy(benchmark: Any, case: Case, peer: str) -> None:
    # Times loss and gradients; inputs are made, and what compiles is compiled, before.
    call = runnable(case, CPU_PEERS[peer])
    benchmark.group = f"linear_cross_entropy {case.name}"
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "case": str(case),
        "peak_bytes": peak_tensor_bytes(call),
    }
    benchmark(call)


# float32 only: how bfloat16 weights are packed depends on the processor's instructions.
@pytest.mark.parametrize("case", CPU_QUICK, ids=NAME)
def exact_linear_cross_entropy_memory(figures: Any, case: Case) -> None:
    peak = peak_tensor_bytes(runnable(case, mmopt))
    figures.record("peak tensor bytes", peak, unit="bytes")


@pytest.mark.parametrize("case", GPU, ids=NAME)
def exact_linear_cross_entropy_traffic(figures: Any, case: Case) -> None:
    for peer in ("mmopt", "eager"):
        moved = operand_bytes(call_of(case, GPU_PEERS[peer], "meta"))
        figures.record(f"operand bytes of {peer}", moved, unit="bytes")


@functools.lru_cache(maxsize=1)
def measured(case: Case) -> dict[str, Measured | str]:
    """Every peer, timed against the others; a string says why a peer is not among them."""
    return time_peers(
        {
            peer: functools.partial(runnable, case, build, gpu_peers.DEVICE)
            for peer, build in GPU_PEERS.items()
        },
        rounds=ROUNDS,
        timer=TIMER,
    )


@pytest.mark.gpu
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("peer", GPU_PEERS)
@pytest.mark.parametrize("case", GPU, ids=NAME)
def bench_gpu_linear_cross_entropy(benchmark: Any, case: Case, peer: str) -> None:
    benchmark.group = f"gpu linear_cross_entropy {case.name}"
    result = measured(case)[peer]
    if isinstance(result, str):
        pytest.skip(result)
    benchmark.extra_info |= {"timer": TIMER, "case": str(case), "peak_bytes": result.peak_bytes}
    CLOCK.replay(benchmark, result.timing)
