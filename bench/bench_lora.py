"""LoRA layers: mmopt's op beside the bare frozen layer, PEFT and the kernels of others.

On the CPU at small sizes; on a GPU, with `-m gpu`, at those of Llama-8B and Qwen2.5-VL-7B. `make
gpu` runs every shape once and every other property beside one shape; the whole grid, 576 cases, is
marked slow: `mmopt bench run bench/bench_lora.py -k "qwen and nf4" -- -m "gpu and slow"`.

Groups put the peers of one case side by side. Exact: what mmopt's op needs beyond its inputs, and
the bytes that it and PEFT's form move on a GPU, counted without one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gpu_peers
import pytest
import torch
from gpu_peers import CLOCK, TIMER, Measured, Unavailable, time_peers
from lora_cases import (
    CPU_PEERS,
    CPU_QUICK,
    CPU_SLOW,
    DIRECTIONS,
    GPU,
    GPU_GRID,
    GPU_PEERS,
    NAME,
    Case,
    call_of,
    least_bytes,
    runnable,
)

from mmopt.measure.memory import peak_tensor_bytes
from mmopt.measure.statistics import median
from mmopt.measure.traffic import operand_bytes

# 20 rounds of 8 peers: at 5 ms a call less than a second a case and direction. Compiling PEFT's
# form and capturing graphs takes longer.
ROUNDS = 20


def cases(quick: Sequence[Case], slow: Sequence[Case], prefix: str) -> list[Any]:
    marked = [pytest.param(c, id=f"{prefix}-{c.name}", marks=pytest.mark.slow) for c in slow]
    return [pytest.param(c, id=c.name) for c in quick] + marked


@pytest.mark.parametrize("peer", CPU_PEERS)
@pytest.mark.parametrize("direction", DIRECTIONS, ids=["forward", "both"])
@pytest.mark.parametrize("case", cases(CPU_QUICK, CPU_SLOW, "long"))
def bench_lora(benchmark: Any, case: Case, direction: str, peer: str) -> None:
    # Times the op only; inputs are made above. Forward and backward together: backward alone cannot
    # run twice on one graph.
    benchmark.group = f"lora {direction} {case.name}"
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "case": str(case),
        "least_bytes": least_bytes(case, direction),
    }
    try:
        call = runnable(case, CPU_PEERS[peer], direction)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark(call)


# float32 only: how bfloat16 weights are packed depends on the processor's instructions.
@pytest.mark.parametrize("case", [c for c in CPU_QUICK if c.dtype is torch.float32], ids=NAME)
def exact_lora_memory(figures: Any, case: Case) -> None:
    for direction in DIRECTIONS:
        peak = peak_tensor_bytes(runnable(case, CPU_PEERS["mmopt"], direction))
        figures.record(f"{direction} peak tensor bytes", peak, unit="bytes")


@pytest.mark.parametrize("case", [c for c in GPU if c.M == 8192 and c.base == "dense"], ids=NAME)
def exact_lora_traffic(figures: Any, case: Case) -> None:
    for direction in DIRECTIONS:
        for peer in ("mmopt", "peft"):
            call = call_of(case, GPU_PEERS[peer](case), direction, "meta")
            figures.record(
                f"{direction} operand bytes of {peer}", operand_bytes(call), unit="bytes"
            )


@functools.lru_cache(maxsize=1)
def measured(case: Case, direction: str) -> dict[str, Measured | str]:
    """Every peer, timed against the others; a string says why a peer is not among them."""
    return time_peers(
        {
            peer: functools.partial(runnable, case, build, direction, gpu_peers.DEVICE)
            for peer, build in GPU_PEERS.items()
        },
        rounds=ROUNDS,
    )


@pytest.mark.gpu
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("peer", GPU_PEERS)
@pytest.mark.parametrize("direction", DIRECTIONS, ids=["forward", "both"])
@pytest.mark.parametrize("case", cases(GPU, [c for c in GPU_GRID if c not in GPU], "grid"))
def bench_gpu_lora(benchmark: Any, case: Case, direction: str, peer: str) -> None:
    # Times the op only; inputs are made before. Backward alone is the difference of the medians.
    benchmark.group = f"gpu lora {direction} {case.name}"
    result = measured(case, direction)[peer]
    if isinstance(result, str):
        pytest.skip(result)
    least = least_bytes(case, direction)
    benchmark.extra_info |= {
        "timer": TIMER,
        "case": str(case),
        "peak_bytes": result.peak_bytes,
        "least_bytes": least,
        "least_bytes_per_s": least / median(result.timing.samples),
    }
    CLOCK.replay(benchmark, result.timing)
