"""Attention on a GPU at the sizes of large models, beside its peers, with the GPU timers.

Left out where there is no GPU. `make gpu` runs it and keeps the result in bench/results/. Of it:
`mmopt bench run bench/bench_gpu.py -k "attention and images" -- -m gpu`; the directions are called
`forward` and `both` there. LoRA's part is in bench_lora.py.
"""

from __future__ import annotations

import functools
from typing import Any

import gpu_peers
import pytest
from attention_cases import CALLS, GPU, GPU_PEERS, Case, runnable, useful_flops
from gpu_peers import CLOCK, TIMER, Measured, time_peers

from mmopt.measure.statistics import median

# 20 rounds of 8 peers on 17 cases, 33 with the directions: at 10 ms a call less than a minute.
# FlexAttention's compilation, for each case and direction, is expected to take longer.
ATTENTION_ROUNDS = 20

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=CLOCK)]


@functools.lru_cache(maxsize=1)
def measured(case: Case, direction: str) -> dict[str, Measured | str]:
    """Every peer, timed against the others; a string says why a peer is not among them."""
    return time_peers(
        {
            peer: functools.partial(runnable, case, build, direction, gpu_peers.DEVICE)
            for peer, build in GPU_PEERS.items()
        },
        rounds=ATTENTION_ROUNDS,
    )


@pytest.mark.parametrize("peer", GPU_PEERS)
@pytest.mark.parametrize("direction", CALLS, ids=["forward", "both"])
@pytest.mark.parametrize("case", GPU, ids=lambda case: case.name)
def bench_gpu_attention(benchmark: Any, case: Case, direction: str, peer: str) -> None:
    # Times the op and the layout its caller wants next; inputs, masks and block masks are made
    # before. Forward and backward are timed together: a captured backward runs on the stream of its
    # forward. Backward alone is the difference of the two medians.
    benchmark.group = f"gpu attention {direction} {case.name}"
    if direction != "forward" and not case.trains:
        pytest.skip("a decode step has no backward")
    result = measured(case, direction)[peer]
    if isinstance(result, str):
        pytest.skip(result)
    flops = useful_flops(case, direction)
    benchmark.extra_info |= {
        "timer": TIMER,
        "case": str(case),
        "peak_bytes": result.peak_bytes,
        "useful_flops": flops,
        "useful_tflops_per_s": flops / median(result.timing.samples) / 1e12,
    }
    CLOCK.replay(benchmark, result.timing)
