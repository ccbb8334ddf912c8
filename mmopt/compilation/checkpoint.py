"""`mmopt compile`: load, attach, compile, hold against eager, time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from mmopt.attach import OptimizationReport, optimize
from mmopt.attach.gradients import dead_adapters
from mmopt.attach.optimize import transformers_model
from mmopt.compilation.inputs import example_batch
from mmopt.compilation.model import (
    CompiledModel,
    GraphBreak,
    Mode,
    Recompile,
    compile,
    loss_of,
    tensors_of,
)
from mmopt.compilation.parity import Parity, compare, gradients
from mmopt.measure.statistics import median
from mmopt.measure.timing import interleave
from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError

EAGER, COMPILED, ATTACHED = "eager", "torch.compile", "torch.compile + mmopt"


@dataclass(frozen=True)
class CompileReport:
    """What `mmopt compile` found.

    Attributes:
        model, mode, batch, length: what was asked.
        optimization: what each module became.
        graph_breaks, recompiles: of the compiled model with mmopt's ops, over two batches of
            different lengths.
        parity: outputs, and in mode `train` the loss and every gradient, of the compiled model
            with the ops against the untouched eager model, with dropout off. The fused loss forms
            no logits; with it, the loss and the gradients stand for them.
        dead_adapters: in mode `train`, the trainable adapters that got no gradient.
        seconds: samples per variant, of one forward, in mode `train` with its backward.
        threads: CPU threads that PyTorch used.
    """

    model: str
    mode: Mode
    batch: int
    length: int
    optimization: OptimizationReport
    graph_breaks: tuple[GraphBreak, ...]
    recompiles: tuple[Recompile, ...]
    parity: tuple[Parity, ...]
    dead_adapters: tuple[str, ...]
    seconds: dict[str, list[float]]
    threads: int

    @property
    def exit_code(self) -> int:
        """1 when the graph breaks, a tensor is off or an adapter does not train, else 0."""
        bad = self.graph_breaks or self.dead_adapters
        return 0 if not bad and all(group.holds for group in self.parity) else 1

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "model": self.model,
            "mode": self.mode,
            "batch": self.batch,
            "length": self.length,
            "optimization": self.optimization.to_dict(),
            "graph_breaks": [vars(place) for place in self.graph_breaks],
            "recompiles": [vars(place) for place in self.recompiles],
            "parity": [group.to_dict() for group in self.parity],
            "dead_adapters": list(self.dead_adapters),
            "seconds": {
                name: {"median": median(samples), "samples": samples}
                for name, samples in self.seconds.items()
            },
            "threads": self.threads,
            "torch": torch.__version__,
        }

    def render(self) -> RenderableType:
        """Tables for a terminal."""
        parts: list[RenderableType] = [self.optimization.render()]
        for title, places in (("graph break", self.graph_breaks), ("recompile", self.recompiles)):
            parts.append(f"{len(places)} {title}{'' if len(places) == 1 else 's'}")
            parts.extend(f"  {place}" for place in places)
        for group in self.parity:
            error = "not finite or missing" if group.error is None else f"{group.error:.1e}"
            parts.append(
                f"{group.group}: {'match eager' if group.holds else 'DO NOT MATCH eager'}; worst "
                f"of {group.tensors} is {group.worst}: {error} (at most {group.tolerance:.0e})"
            )
        if self.dead_adapters:
            parts.append(f"{len(self.dead_adapters)} adapters got NO GRADIENT:")
            parts.extend(f"  {name}" for name in self.dead_adapters)
        what = "forward + backward" if self.mode == "train" else "forward"
        table = Table(
            title=f"{what}, batch {self.batch}, length {self.length}, {self.threads} CPU threads"
        )
        table.add_column("variant")
        table.add_column("median ms", justify="right")
        table.add_column("against torch.compile", justify="right")
        base = median(self.seconds[COMPILED])
        for name, samples in self.seconds.items():
            middle = median(samples)
            table.add_row(name, f"{middle * 1e3:.2f}", f"{middle / base:.3f}x")
        return Group(*parts, table)


def compile_checkpoint(
    model: str,
    *,
    adapters: Sequence[str] = (),
    mode: Mode = "infer",
    batch: int = 8,
    length: int = 128,
    rounds: int = 20,
    seed: int = 0,
    progress: Progress = silent,
) -> CompileReport:
    """Compile a checkpoint with mmopt's ops; hold it against eager and time it, on the CPU.

    Outputs and gradients are compared with dropout off (random numbers differ between eager and
    compiled code); in mode `train` the timed steps run in training mode, dropout and all.

    Args:
        model: a local folder or a hub id.
        adapters: PEFT adapters, at most one; in mode `train` only the adapter is trained.
        mode: `"train"` (forward and backward) or `"infer"`.
        batch, length: of the made-up inputs; at least 2 each.
        rounds: samples per variant; each round runs every variant once in a random order.
        seed: of inputs and orders.
        progress: told what runs.

    Raises:
        InputError: a model, adapter, mode, batch or length that cannot be used.
        MmoptError: a hub id that cannot be reached.
    """
    if batch < 2:
        raise InputError(
            f"the batch is {batch}, expected at least 2: a compiler treats a size of 1 as fixed. "
            "Pass --batch 2 or more."
        )
    if mode not in ("train", "infer"):
        raise InputError(f"the mode is {mode!r}, expected 'train' or 'infer'. Pass one of them.")
    from mmopt_export.checkpoint import load_checkpoint

    with progress("load", None):
        eager = load_checkpoint(model, adapters=adapters).model.eval()
    train = mode == "train"
    if train and adapters:
        # Loaded for inference, an adapter is frozen; activating it unfreezes it.
        eager.set_adapter(eager.active_adapter)
    base = transformers_model(eager)
    inputs = example_batch(base, batch=batch, length=length, train=train, seed=seed)
    # Another length, to see that it needs no further compilation.
    other = example_batch(base, batch=batch, length=max(2, length // 2 + 1), train=train, seed=seed)

    alone, attached = _twin(eager), _twin(eager)
    optimization = optimize(attached)
    for each in (eager, attached):
        # The fused loss is one of training mode. Dropout belongs to modules within and stays off.
        transformers_model(each).training = train
    with progress("compile with mmopt", None):
        checked = compile(attached, inputs, mode=mode, allow_breaks=True)
    with progress("compare", None):
        compared = [_compare(eager, checked, example, train=train) for example in (inputs, other)]
    parity = tuple(group for groups, _ in compared for group in groups)
    dead = compared[0][1]
    graph_breaks, recompiles = checked.graph_breaks, checked.recompiles

    for each in (eager, alone, attached):
        each.train(train)
    with progress("compile", None):
        timed = {
            EAGER: eager,
            COMPILED: compile(alone, inputs, mode=mode, allow_breaks=True),
            # Training mode is another graph than the one compared.
            ATTACHED: compile(attached, inputs, mode=mode, allow_breaks=True) if train else checked,
        }
    seconds = interleave(
        {name: _step(run, inputs, train=train) for name, run in timed.items()},
        rounds=rounds,
        seed=seed,
        progress=progress,
    )
    return CompileReport(
        model=model,
        mode=mode,
        batch=batch,
        length=length,
        optimization=optimization,
        graph_breaks=graph_breaks,
        recompiles=recompiles,
        parity=parity,
        dead_adapters=dead,
        seconds=seconds,
        threads=torch.get_num_threads(),
    )


def _twin(model: nn.Module) -> nn.Module:
    """A copy with modules and configs of its own and the same parameters and buffers."""
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def _compare(
    eager: nn.Module, compiled: CompiledModel, inputs: dict[str, Any], *, train: bool
) -> tuple[list[Parity], tuple[str, ...]]:
    """Every group of tensors, and the adapters that got no gradient."""
    with torch.set_grad_enabled(train):
        expected, actual = eager(**inputs), compiled(**inputs)
    outputs = tensors_of(expected), tensors_of(actual)
    if train and "logits" not in outputs[1] and "loss" in outputs[1]:
        outputs[0].pop("logits", None)
    found = [compare("outputs", *outputs)]
    if not train:
        return found, ()
    losses = loss_of(expected), loss_of(actual)
    found.append(compare("loss", {"loss": losses[0]}, {"loss": losses[1]}))
    wanted, got = gradients(losses[0], eager), gradients(losses[1], compiled.module)
    found.append(compare("gradients", wanted, got))
    named = dict(compiled.module.named_parameters())
    by_parameter = {id(named[name]): gradient for name, gradient in got.items()}
    return found, tuple(dead_adapters(compiled.module, lambda p: by_parameter.get(id(p))))


def _step(
    run: nn.Module | CompiledModel, inputs: dict[str, Any], *, train: bool
) -> Callable[[], None]:
    module = run.module if isinstance(run, CompiledModel) else run

    def infer() -> None:
        with torch.no_grad():
            run(**inputs)

    def train_step() -> None:
        loss_of(run(**inputs)).backward()  # type: ignore[no-untyped-call]
        module.zero_grad(set_to_none=True)

    return train_step if train else infer
