"""A LoRA training step of a 124M Llama on this machine's CPU: PEFT, compiled, and with mmopt.

Batch 2 x 256, rank 16 on all linear layers of the decoder, random weights. The peers are timed
against each other, one step of each per round, and so are not measured apart: `-k` with a single
peer still times all three. About 10 minutes on 2 cores, of which 3 compile:
`mmopt bench run bench/bench_llama_step.py -- -m slow`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gpu_peers import CLOCK

import mmopt
from mmopt.measure.memory import peak_tensor_bytes
from mmopt.measure.timing import Timing, time_variants

BATCH, LENGTH, RANK = 2, 256, 16
ROUNDS = 20

pytestmark = [pytest.mark.slow, pytest.mark.benchmark(timer=CLOCK)]


def llama() -> Any:
    """124M parameters, those of the adapter not counted; the head shares the embedding."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # as after some training
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def eager(model: Any) -> Any:
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model)


def attached(model: Any) -> Any:
    mmopt.optimize(model)
    return torch.compile(model)


PEERS = {"peft": eager, "peft-compiled": compiled, "mmopt": attached}


def step(run: Any, model: Any) -> Callable[[], object]:
    """Forward, loss and backward; the gradients are dropped, the optimizer is left out."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 32000, (BATCH, LENGTH), generator=generator)

    def call() -> object:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return call


@dataclass(frozen=True)
class Measured:
    """One peer: its samples, and the most that torch's allocator held in a step beyond weights."""

    timing: Timing
    peak_bytes: int
    loss: float


@functools.cache
def measured() -> dict[str, Measured]:
    """Every peer, timed against the others."""
    torch._dynamo.reset()
    plain = llama()
    shared = {id(x): x for x in [*plain.parameters(), *plain.buffers()]}
    calls: dict[str, Callable[[], Any]] = {}
    for peer, build in PEERS.items():
        model = copy.deepcopy(plain, dict(shared))
        calls[peer] = step(build(model), model)
    losses = {peer: float(call()) for peer, call in calls.items()}
    timings = time_variants(calls, rounds=ROUNDS)
    return {
        peer: Measured(timings[peer], peak_tensor_bytes(call), losses[peer])
        for peer, call in calls.items()
    }


@pytest.mark.parametrize("peer", PEERS)
def bench_llama_step(benchmark: Any, peer: str) -> None:
    # Times forward, loss and backward, no optimizer; compiled before.
    benchmark.group = "llama 124M LoRA training step"
    found = measured()
    assert found[peer].loss == pytest.approx(found["peft"].loss, rel=1e-4)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "length": LENGTH,
        "rank": RANK,
        "peak_bytes": found[peer].peak_bytes,
        "loss": found[peer].loss,
    }
    CLOCK.replay(benchmark, found[peer].timing)
