"""A LoRA training step: PEFT, PEFT compiled, with mmopt, and on a GPU the kernels of others.

On the CPU a 124M Llama and a CLIP of 151M, all peers of a case timed against each other, one step
of each per round, and so not measured apart: `-k` with a single peer still times all of the case.
About 20 minutes on 2 cores, most of which compile: `mmopt bench run bench/bench_training_step.py
-- -m "slow and not gpu"`; `-k clip` for one.

On a GPU, LoRA and QLoRA of a Llama of 1B, a Gemma 3 of 4B with pictures, both packed, and a CLIP
ViT-L: `make gpu`, or `mmopt bench run bench/bench_training_step.py -k llama -- -m "gpu and not
slow"`. Half an hour, because each peer compiles what nobody compiled before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gpu_peers
import pytest
import torch
from gpu_peers import CLOCK
from step_cases import (
    CPU,
    CPU_PEERS,
    GPU,
    GPU_PEERS,
    GPU_SLOW,
    NAME,
    RANK,
    Case,
    Found,
    Measured,
    disagreement,
    measure,
    work,
)
from step_processes import measured_apart

from mmopt.measure.statistics import median

ROUNDS = 20
# A step is some tenths of a second, of up to six peers.
GPU_ROUNDS = 10
# Peers of one machine and dtype; sums are in other orders.
CPU_RELATIVE = 1e-4

pytestmark = pytest.mark.benchmark(timer=CLOCK)


@functools.lru_cache(maxsize=1)
def measured(case: Case) -> Found:
    """Every peer on the CPU, timed against the others."""
    return measure(case, CPU_PEERS, device="cpu", rounds=ROUNDS)


@functools.lru_cache(maxsize=1)
def measured_on_gpu(case: Case) -> Found:
    """Every peer; a string says why one is not among them."""
    return measured_apart(case, list(GPU_PEERS), device=gpu_peers.DEVICE, rounds=GPU_ROUNDS)


def facts(case: Case, result: Measured) -> dict[str, Any]:
    """What is kept beside the samples."""
    seconds = median(result.timing.samples)
    per_second = {f"{thing}_per_s": n / seconds for thing, n in work(case).items()}
    return {
        "case": str(case),
        "rank": RANK,
        "timer": result.timing.timer,
        "peak_bytes": result.peak_bytes,
        "weight_bytes": result.weight_bytes,
        "loss": result.loss,
        **per_second,
    }


@pytest.mark.slow
@pytest.mark.parametrize("peer", CPU_PEERS)
@pytest.mark.parametrize("case", CPU, ids=NAME)
def bench_training_step(benchmark: Any, case: Case, peer: str) -> None:
    # Times forward, loss and backward, no optimizer; compiled before.
    benchmark.group = f"training step {case.name}"
    found = measured(case)
    result = found[peer]
    assert isinstance(result, Measured), result
    assert disagreement(found, peer, relative=CPU_RELATIVE) is None
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "batch": case.rows,
        "length": case.length,
        **facts(case, result),
    }
    CLOCK.replay(benchmark, result.timing)


def gpu_cases(quick: Sequence[Case], slow: Sequence[Case]) -> list[Any]:
    marked = [pytest.param(c, id=c.name, marks=pytest.mark.slow) for c in slow]
    return [pytest.param(c, id=c.name) for c in quick] + marked


@pytest.mark.gpu
@pytest.mark.parametrize("peer", GPU_PEERS)
@pytest.mark.parametrize("case", gpu_cases(GPU, GPU_SLOW))
def bench_gpu_training_step(benchmark: Any, case: Case, peer: str) -> None:
    # Times forward, loss and backward, no optimizer, with the host's part; compiled before.
    benchmark.group = f"gpu training step {case.name}"
    result = measured_on_gpu(case)[peer]
    if isinstance(result, str):
        pytest.skip(result)
    benchmark.extra_info |= {"first_step_s": result.first_step, **facts(case, result)}
    CLOCK.replay(benchmark, result.timing)
