"""Trainer on two processes, for tests: run by torchrun, which makes it DistributedDataParallel.

The first process writes how far each weight moved, with transformers' Trainer and with ours.
"""

import copy
import importlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from distributed_step import batch_of, build
from torch._dynamo.backends.debugging import aot_eager
from transformers import Trainer, TrainingArguments

import mmopt
from mmopt.train.trainer import CompiledTrainer

ROWS = 16


def train(kind: type, model: Any, folder: str, **options: Any) -> Any:
    """Two optimizer steps of two micro-batches each, with and without padding."""
    rows = []
    for index in range(ROWS):
        batch = batch_of(9, seed=index)
        rows.append(
            {name: batch[name][index % 4] for name in ("input_ids", "attention_mask", "labels")}
        )
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, max_steps=2, seed=0, save_strategy="no",
        gradient_accumulation_steps=2, report_to=[], use_cpu=True, learning_rate=0.1,
        disable_tqdm=True, optim="sgd", max_grad_norm=0.0,
        gradient_checkpointing=kind is not Trainer,
    )  # fmt: skip
    trainer = kind(model=model, args=arguments, train_dataset=rows, **options)
    trainer.train()
    return trainer


def main() -> None:
    """Train both, from the same weights."""
    folder, output = sys.argv[1:]
    torch.set_num_threads(1)
    backend: Any = importlib.import_module("mmopt.compilation.model")
    backend.compile_fx = aot_eager
    start = build(adapter=True, layers=1)
    plain, ours = copy.deepcopy(start), copy.deepcopy(start)
    train(Trainer, plain, folder)
    mmopt.optimize(ours)
    trainer = train(CompiledTrainer, ours, folder, compile_step=True, advance=lambda _: None)
    if dist.get_rank() == 0:
        first = dict(start.named_parameters())
        moved = [
            {name: (x - first[name]).detach() for name, x in model.named_parameters()}
            for model in (plain, ours)
        ]
        wrapper = type(trainer._compiled.module).__name__
        torch.save({"moved": moved, "recompiles": trainer.recompiles, "wrapper": wrapper}, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
