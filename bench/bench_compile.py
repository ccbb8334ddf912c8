"""A small adapted model on this machine's CPU: eager, torch.compile, torch.compile with mmopt.

Exact: what mmopt attaches, where the graph breaks, whether lengths recompile, how much the
tensors of a step need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mmopt
from mmopt.measure.memory import peak_tensor_bytes

ROWS, LENGTH = 4, 32
OTHER_LENGTHS = (24, 40, 33)


def eager(model: Any, _batch: Any, _mode: str) -> Any:
    return model


def compiled(model: Any, _batch: Any, _mode: str) -> Any:
    return torch.compile(model, dynamic=True)


def attached(model: Any, batch: Any, mode: Any) -> Any:
    mmopt.optimize(model)
    return mmopt.compile(model, batch, mode=mode)


VARIANTS = {"eager": eager, "compile": compiled, "mmopt": attached}


def forward(run: Any, batch: Any) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return run(**batch)

    return call


def train_step(run: Any, batch: Any, model: Any) -> Callable[[], object]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)

    def call() -> object:
        optimizer.zero_grad()
        loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        return loss

    return call


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("fresh_compiler")
def bench_forward(benchmark: Any, tiny_bert: Any, variant: str) -> None:
    # Times a forward without gradients; compiled above, once.
    benchmark.group = "compile forward"
    benchmark.extra_info |= {"batch": ROWS, "length": LENGTH}
    model, batch = tiny_bert.adapted().eval(), tiny_bert.batch(ROWS, LENGTH)
    call = forward(VARIANTS[variant](model, batch, "infer"), batch)
    for _ in range(3):  # what still compiles or is laid out at first is not timed
        call()
    benchmark(call)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("fresh_compiler")
def bench_train_step(benchmark: Any, tiny_bert: Any, variant: str) -> None:
    # Times forward, backward and the optimizer's step; compiled above, once.
    benchmark.group = "compile train step"
    benchmark.extra_info |= {"batch": ROWS, "length": LENGTH}
    model, batch = tiny_bert.adapted(), tiny_bert.batch(ROWS, LENGTH)
    call = train_step(VARIANTS[variant](model, batch, "train"), batch, model)
    for _ in range(3):  # what still compiles or is laid out at first is not timed
        call()
    benchmark(call)


def exact_attached(figures: Any, tiny_bert: Any) -> None:
    report = mmopt.optimize(tiny_bert.adapted())
    figures.record("attached modules", report.attached, better="higher")
    figures.record("modules left alone", len(report.rows) - report.attached)


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.usefixtures("fresh_compiler")
def exact_compiled(figures: Any, tiny_bert: Any, mode: Any) -> None:
    model = tiny_bert.adapted().train(mode == "train")
    batch = tiny_bert.batch(ROWS, LENGTH)
    mmopt.optimize(model)
    run = mmopt.compile(model, batch, mode=mode, allow_breaks=True)

    def step(length: int) -> Callable[[], object]:
        made = tiny_bert.batch(ROWS, length)
        return train_step(run, made, model) if mode == "train" else forward(run, made)

    for length in (LENGTH, *OTHER_LENGTHS):
        step(length)()
    figures.record("graph breaks", len(run.graph_breaks))
    figures.record("recompiles over four lengths", len(run.recompiles))
    figures.record("peak tensor bytes", peak_tensor_bytes(step(LENGTH)), unit="bytes")
