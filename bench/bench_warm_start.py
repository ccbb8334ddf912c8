"""The first call of a compiled model in a fresh process: cold, from Inductor's cache, from a store.

A 124M Llama with a LoRA adapter on this machine's CPU, forward and a training step, mmopt's ops
attached. What is timed begins when the model is ready and ends with its first result; imports and
the model itself are not in it. Each sample is a process of its own, the ways in turn. About 15
minutes on 2 cores: `mmopt bench run bench/bench_warm_start.py -- -m slow`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_peers import CLOCK
from step_cases import LLAMA_CPU, adapted_model, batch

import mmopt
from mmopt.measure.timing import Timing, read_clock

ROUNDS = 3
MODES = ("infer", "train")
# Nothing there; what torch keeps by itself, with which Dynamo traces again; `mmopt.load_compiled`.
WAYS = ("cold", "cache", "store")

pytestmark = [pytest.mark.slow, pytest.mark.benchmark(timer=CLOCK)]


def first_call(order: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first result of the compiled model, and what the result is."""
    train = order["mode"] == "train"
    model = adapted_model(LLAMA_CPU).train(train)
    mmopt.optimize(model)
    inputs = batch(LLAMA_CPU)
    store = Path(order["store"])
    began = read_clock()
    if order["way"] == "store":
        run = mmopt.load_compiled(store, model)
    else:
        run = mmopt.CompiledModel(model, mode=order["mode"], dynamic=True)
    step = training_step(run, model, inputs) if train else lambda: run(**inputs).loss
    result = float(step())
    seconds = read_clock() - began
    assert run.recompiles == ()
    if order["save"]:
        run.save(store, inputs)
    return {"seconds": seconds, "loss": result}


def training_step(run: Any, model: Any, inputs: Any) -> Callable[[], float]:
    def call() -> float:
        loss = run(**inputs).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return call


def in_a_process(order: dict[str, Any], cache: Path) -> dict[str, float]:
    """What `first_call` says in a process whose Inductor keeps its cache in `cache`."""
    ran = subprocess.run(
        [sys.executable, __file__, json.dumps(order)],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr[-2000:])
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


@functools.cache
def measured(mode: str) -> dict[str, Timing]:
    """By way, the samples; all results are the same."""
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = set()
    with tempfile.TemporaryDirectory() as scratch:
        kept, store = Path(scratch) / "kept", Path(scratch) / "store"
        for round_ in range(ROUNDS):
            for way in WAYS:
                # The first cold process fills the cache that is kept, and writes the store.
                fills = way == "cold" and round_ == 0
                cache = kept if way == "cache" or fills else Path(scratch) / f"{way}-{round_}"
                order = {"mode": mode, "way": way, "store": str(store), "save": fills}
                found = in_a_process(order, cache)
                samples[way].append(found["seconds"])
                losses.add(round(found["loss"], 4))
    assert len(losses) == 1, losses
    return {way: Timing(found, 1, 0.0, False) for way, found in samples.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
def bench_first_call(benchmark: Any, mode: str, way: str) -> None:
    # Times the first call in a fresh process, of a model that is ready.
    benchmark.group = f"first call llama-124m {mode}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "case": str(LLAMA_CPU)}
    CLOCK.replay(benchmark, measured(mode)[way])


if __name__ == "__main__":
    print(json.dumps(first_call(json.loads(sys.argv[1]))))
