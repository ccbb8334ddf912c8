"""Training steps on two processes, for tests: run by torchrun, and imported for what they share.

Each process optimizes, wraps and compiles the model, and takes steps on its half of a batch. What
all of them together found is written by the first: loss and gradients of each step, as after the
reduction, and what was compiled. The test holds it against one process on the whole batch, eager.
"""

import argparse
import importlib
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import mmopt

ROWS = 4
LENGTHS = (12, 9)
PROCESSES = 2


def build(*, adapter: bool, layers: int) -> Any:
    """A random Llama in training mode, the same in every process; with two adapters or none."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    model = LlamaForCausalLM(config)
    if adapter:
        # Two targets: a layer with attention, a LoRA layer alone, and modules without either.
        peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(model, peft)
        model.add_adapter("second", peft)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
    return model.train()


def batch_of(length: int, *, seed: int = 1) -> dict[str, Any]:
    """Rows with padding at the right, as many labels in each half as in the other."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (ROWS, length), generator=generator)
    keep = torch.ones(ROWS, length, dtype=torch.int64)
    keep[1::2, -3:] = 0
    labels = ids.masked_fill(keep == 0, -100)
    return {"input_ids": ids, "attention_mask": keep, "labels": labels, "use_cache": False}


def half(batch: dict[str, Any], rank: int) -> dict[str, Any]:
    rows = slice(rank * ROWS // PROCESSES, (rank + 1) * ROWS // PROCESSES)
    return {
        name: value[rows] if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every stored gradient, whole, by the name that the parameter has in the plain model."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name.removeprefix("module.")] = whole.clone()
    model.zero_grad()
    return found


def sources_of(graph: torch.fx.GraphModule) -> set[str]:
    """Whose forward the nodes of a graph come from: of LoRA layers, mmopt's or PEFT's."""
    return {
        file
        for node in graph.graph.nodes
        for file in (
            "mmopt/attach/lora.py",
            "mmopt/attach/attention.py",
            "peft/tuners/lora/layer.py",
        )
        if file in (node.meta.get("stack_trace") or "")
    }


def mean(loss: torch.Tensor) -> torch.Tensor:
    """Over the processes."""
    value = loss.detach().clone()
    dist.all_reduce(value)
    return value / PROCESSES


def wrapped(model: Any, kind: str, buckets: float) -> Any:
    if kind == "ddp":
        # Dynamo expects the first bucket, of 1 MiB unless told otherwise, to be the smallest.
        name = "_DEFAULT_FIRST_BUCKET_BYTES"
        setattr(dist, name, int(min(buckets * 2**20, getattr(dist, name))))
        return DistributedDataParallel(model, bucket_cap_mb=buckets)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if kind == "fsdp":
        for layer in base.model.layers:
            fully_shard(layer)
    fully_shard(model)
    return model


def main() -> None:
    """Run one scenario; its options are those of the parser."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["ddp", "fsdp", "fsdp-root"])
    parser.add_argument("output")
    parser.add_argument("--whole", action="store_true", help="train all weights, no adapter")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--shard-first", action="store_true", help="wrap, then optimize")
    parser.add_argument("--buckets", type=float, default=25, help="DDP's bucket_cap_mb")
    parser.add_argument("--switch", action="store_true", help="end with the second adapter")
    parser.add_argument("--inductor", action="store_true", help="lower with Inductor as well")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sources: set[str] = set()
    backend: Any = importlib.import_module("mmopt.compilation.model")
    # Graphs as Inductor would get them, run op by op: seconds instead of a minute of C++.
    lower = backend.compile_fx if arguments.inductor else aot_eager

    def lower_and_look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sources.update(sources_of(graph))
        return lower(graph, inputs)

    backend.compile_fx = lower_and_look
    model = build(adapter=not arguments.whole, layers=arguments.layers)
    plain = model
    if arguments.checkpointing:
        model.gradient_checkpointing_enable()
    if arguments.shard_first:
        model = wrapped(model, arguments.kind, arguments.buckets)
        report = mmopt.optimize(model)
    else:
        report = mmopt.optimize(model)
        model = wrapped(model, arguments.kind, arguments.buckets)

    compiled = mmopt.compile(model, half(batch_of(LENGTHS[0]), rank))
    assert not gradients(model), "compile stored a gradient"

    steps = []

    def step(*batches: dict[str, Any]) -> None:
        """Gradients of all the batches together; only the last reduces where DDP can wait."""
        losses = []
        for index, batch in enumerate(batches):
            waits = arguments.kind == "ddp" and index + 1 < len(batches)
            with model.no_sync() if waits else nullcontext():
                output = compiled(**half(batch, rank))
                output.loss.backward()
            losses.append(mean(output.loss))
        steps.append(
            {
                "loss": torch.stack(losses),
                "gradients": gradients(model),
                "fused_loss": output.logits is None,
                "sources": sorted(sources),
            }
        )
        sources.clear()

    for length in LENGTHS:
        step(batch_of(length))
    step(batch_of(LENGTHS[0], seed=2), batch_of(LENGTHS[1], seed=3))
    recompiles = len(compiled.recompiles)
    graphs = compiled._graphs
    if arguments.switch:
        plain.set_adapter("second")
        if arguments.kind == "ddp":
            # It reduces only what trained when it was made.
            model = wrapped(plain, arguments.kind, arguments.buckets)
            compiled = mmopt.compile(model, half(batch_of(LENGTHS[0]), rank))
        step(batch_of(LENGTHS[0]))
    if rank == 0:
        result = {
            "steps": steps,
            "graphs": graphs,
            "recompiles": recompiles,
            "reasons": [str(recompile) for recompile in compiled.recompiles],
            "breaks": [str(place) for place in compiled.graph_breaks],
            "rows": [(row.kind, row.became, row.reason) for row in report.rows],
        }
        torch.save(result, arguments.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
