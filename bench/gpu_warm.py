"""Compiles what the op suites run on a GPU beforehand, in many processes at once.

One after the other FlexAttention, PEFT's compiled layers and our kernels take a quarter of an hour
of a GPU that mostly waits; Triton's and Inductor's caches on disk hand them to the suites.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import attention_cases
import bench_linear_cross_entropy as losses
import gpu_peers
import lora_cases
import torch
from gpu_peers import Unavailable

ATTENTION_PEERS = tuple(
    peer for peer in attention_cases.GPU_PEERS if peer.startswith(("mmopt", "flex"))
)
# Of each suite the module, its cases' directions, and the peers that compile.
SUITES: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "attention": (attention_cases, tuple(attention_cases.CALLS), ATTENTION_PEERS),
    "lora": (lora_cases, lora_cases.DIRECTIONS, ("mmopt", "mmopt-triton", "peft-compiled")),
    "losses": (losses, ("",), ("mmopt", "compiled", "liger")),
}

Task = tuple[str, int, str, str]
"""Suite, index of the case, direction, peer."""


def suite_tasks() -> list[Task]:
    """All that the suites compile."""
    return [
        (suite, index, direction, peer)
        for suite, (module, directions, peers) in SUITES.items()
        for index, case in enumerate(module.GPU)
        for direction in directions
        if direction != "forward+backward" or getattr(case, "trains", True)
        for peer in peers
    ]


def run(task: Task, device: str = gpu_peers.DEVICE) -> str | None:
    """Run a peer once; why it could not, where it could not: the suite itself will say so."""
    suite, index, direction, peer = task
    module, _, _ = SUITES[suite]
    arguments = [module.GPU[index], module.GPU_PEERS[peer], *filter(None, [direction]), device]
    try:
        module.runnable(*arguments)
    except (Unavailable, RuntimeError, NotImplementedError, ValueError) as reason:
        return f"{type(reason).__name__}: {reason}"
    finally:
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    return None


def _start() -> None:
    """One thread and no pool of Inductor's: there are as many of these processes as cores."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)


def compile_beforehand(
    processes: int, run: Callable[[Any], object] = run, tasks: Iterable[Any] | None = None
) -> None:
    """Run everything that the suites compile, or other tasks, once, with so many processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start) as pool:
        for _ in pool.map(run, suite_tasks() if tasks is None else tasks):
            pass
