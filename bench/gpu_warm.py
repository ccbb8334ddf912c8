"""Compiles what the op suites run on a GPU beforehand, in many processes at once.

One after the other FlexAttention, PEFT's compiled layers and our kernels take a quarter of an hour
of a GPU that mostly waits; Triton's and Inductor's caches on disk hand them to the suites.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import attention_cases
import bench_linear_cross_entropy as losses
import gpu_peers
import lora_cases
from gpu_peers import Unavailable

Task = tuple[str, int, str, str]
"""Suite, index of the case, direction, peer."""

# What compiles: the other peers are there already.
ATTENTION, LORA, LOSSES = ("mmopt", "mmopt-triton", "flex"), ("mmopt", "mmopt-triton"), ("mmopt",)


def tasks(words: str) -> list[Task]:
    """What is to be compiled; of `words`, pytest's -k, only the plain ones choose cases."""
    wanted = set(words.split()) - {"and", "or", "not", "attention", "lora"}
    found: list[Task] = []
    suites: tuple[tuple[str, Any, Any, tuple[str, ...]], ...] = (
        ("attention", attention_cases.GPU, attention_cases.CALLS, ATTENTION),
        ("lora", lora_cases.GPU, lora_cases.DIRECTIONS, (*LORA, "peft-compiled")),
        ("losses", losses.GPU, ("",), (*LOSSES, "compiled", "liger")),
    )
    for suite, cases, directions, peers in suites:
        for index, case in enumerate(cases):
            if wanted and not any(word in case.name for word in wanted):
                continue
            for direction in directions:
                if suite == "attention" and direction != "forward" and not case.trains:
                    continue
                found += [(suite, index, direction, peer) for peer in peers]
    return found


def run(task: Task, device: str = gpu_peers.DEVICE) -> str | None:
    """Run a peer once; why it could not, where it could not: the suite itself will say so."""
    import torch

    suite, index, direction, peer = task
    torch.set_num_threads(1)
    try:
        if suite == "attention":
            case = attention_cases.GPU[index]
            attention_cases.runnable(case, attention_cases.GPU_PEERS[peer], direction, device)
        elif suite == "lora":
            lora_cases.runnable(
                lora_cases.GPU[index], lora_cases.GPU_PEERS[peer], direction, device
            )
        else:
            losses.runnable(losses.GPU[index], losses.GPU_PEERS[peer], device)
    except (Unavailable, RuntimeError, NotImplementedError, ValueError) as reason:
        return f"{type(reason).__name__}: {reason}"
    finally:
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    return None


def _compile_alone() -> None:
    """A pool of Inductor's for each of these processes would be too many."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def compile_beforehand(
    processes: int, words: str = "", run: Callable[[Task], object] = run
) -> None:
    """Run everything that the suites compile once, with so many processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_compile_alone) as pool:
        for _ in pool.map(run, tasks(words)):
            pass
