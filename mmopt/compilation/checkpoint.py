"""`mmopt compile`: load, attach, compile, hold against eager, time, report."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from mmopt.attach import optimize
from mmopt.attach.gradients import dead_adapters
from mmopt.attach.optimize import transformers_model
from mmopt.compilation.device import (
    DTYPES,
    describe,
    memory_shortage_said,
    moved,
    pick_device,
    step_peak_bytes,
    timer_for,
)
from mmopt.compilation.examples import ExampleBatches
from mmopt.compilation.inputs import Contents, contents_of, example_batch
from mmopt.compilation.model import CompiledModel, Mode, compile, loss_of, tensors_of
from mmopt.compilation.parity import Parity, compare, gradients
from mmopt.compilation.report import ATTACHED, COMPILED, EAGER, CompileReport, Shapes, Variant
from mmopt.compilation.store import require_storable
from mmopt.measure.timing import read_clock, time_variants
from mmopt_export.checkpoint import Checkpoint, load_checkpoint
from mmopt_export.files import require_new_folder
from mmopt_export.progress import Progress, silent
from mmopt_kernels.errors import InputError

Batch = dict[str, Any]
Model = nn.Module | CompiledModel


def compile_checkpoint(
    model: str,
    *,
    adapters: Sequence[str] = (),
    data: Path | None = None,
    mode: Mode = "infer",
    dtype: str = "float32",
    device: str = "auto",
    batch: int = 8,
    length: int = 128,
    rounds: int = 20,
    explain: bool = False,
    output: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> CompileReport:
    """Compile a checkpoint with mmopt's ops; hold it against eager and time it.

    Outputs and gradients are compared with dropout off (random numbers differ between eager and
    compiled code); in mode `train` the timed steps run in training mode, dropout and all.

    Args:
        model: a local folder or a hub id.
        adapters: PEFT adapters, at most one; in mode `train` only the adapter is trained.
        data: JSON Lines of the user's own examples, as `read_examples` takes them; None makes
            inputs up.
        mode: `"train"` (forward and backward) or `"infer"`.
        dtype: of the weights and of floating inputs: `"float32"`, `"bfloat16"` or `"float16"`.
        device: `"cpu"`, `"cuda"`, or `"auto"` for a GPU where one can be used.
        batch: rows of a batch, at least 2.
        length: tokens per sequence, at least 2: of made-up inputs; texts of `data` are cut to it.
        rounds: samples per variant; each round runs every variant once in a random order.
        explain: have the report say what usually helps against graph breaks and recompiles.
        output: a new folder for the compiled graph, which `mmopt.load_compiled` runs in another
            process; nothing is stored when something does not hold.
        seed: of made-up inputs and orders.
        progress: told what runs.

    Raises:
        InputError: a model, adapter, data file or option that cannot be used (exit 2).
        MmoptError: no usable GPU, too little of its memory, a library that is not installed, or a
            hub id that cannot be reached (exit 3).
    """
    _check_options(mode, dtype, batch, length)
    if output is not None:
        require_new_folder(output)
        require_storable()
    place = pick_device(device)
    with memory_shortage_said(place):
        with progress("load", None):
            loaded, eager = _load(model, adapters, mode, dtype, place)
            batches = _batches(loaded, data, mode, batch, length, seed)
            task = _Task(mode, place, DTYPES[dtype], *(one for one, _ in batches))

        # Attach: to a copy; another stays as it is, for torch.compile alone.
        alone, attached = _twin(eager), _twin(eager)
        optimization = optimize(attached)

        # Compile and compare with dropout off. It belongs to modules within; the flag of the whole
        # model is what the fused loss, one of training, looks at.
        for each in (eager, attached):
            transformers_model(each).training = task.train
        with progress("compile with mmopt", None):
            checked, checked_seconds = _compiled(attached, task)
        with progress("compare", None):
            parity, dead = _compare(eager, checked, task)

        # Time with dropout on, where there is training.
        for each in (eager, alone, attached):
            each.train(task.train)
        with progress("compile", None):
            compiled, seconds = _compiled(alone, task)
            fused, fused_seconds = checked, checked_seconds
            if task.train:
                # Training mode is another graph than the one compared, and breaks on its own.
                fused, fused_seconds = _compiled(attached, task)
                _step(fused, task.other, task)()
        variants = _measure(
            {EAGER: eager, COMPILED: compiled, ATTACHED: fused},
            {COMPILED: seconds, ATTACHED: fused_seconds},
            task,
            rounds=rounds,
            seed=seed,
            progress=progress,
        )
    report = CompileReport(
        model=model,
        mode=mode,
        dtype=dtype,
        device=describe(place),
        batch=batch,
        length=length,
        data=None if data is None else str(data),
        shapes=(_shapes(task.inputs), _shapes(task.other)),
        contents=batches[0][1],
        loss=_loss_name(eager, task),
        optimization=optimization,
        graph_breaks=tuple(dict.fromkeys([*checked.graph_breaks, *fused.graph_breaks])),
        recompiles=tuple(dict.fromkeys([*checked.recompiles, *fused.recompiles])),
        parity=parity,
        dead_adapters=dead,
        variants=variants,
        timer=timer_for(place).name,
        explained=explain,
        output=None if output is None else str(output),
    )
    if output is None or report.exit_code:
        return report
    source = {
        "model": _from_anywhere(model),
        "adapters": [_from_anywhere(adapter) for adapter in adapters],
        "mode": mode,
        "dtype": dtype,
        "device": place.type,
    }
    with memory_shortage_said(place), progress("store", None):
        return replace(report, store_sha256=fused.save(output, task.inputs, source=source))


@dataclass(frozen=True)
class _Task:
    """What every variant does.

    Attributes:
        inputs: the batch of a step.
        other: a batch of another length, which needs no further compilation.
    """

    mode: Mode
    device: torch.device
    dtype: torch.dtype
    inputs: Batch
    other: Batch

    def __post_init__(self) -> None:
        for name in ("inputs", "other"):
            there = moved(getattr(self, name), self.device, self.dtype)
            object.__setattr__(self, name, there)

    @property
    def train(self) -> bool:
        return self.mode == "train"


def _check_options(mode: str, dtype: str, batch: int, length: int) -> None:
    for name, value in (("batch", batch), ("length", length)):
        if value < 2:
            raise InputError(
                f"the {name} is {value}, expected at least 2: a compiler treats a size of 1 as "
                f"fixed. Pass --{name} 2 or more."
            )
    if mode not in ("train", "infer"):
        raise InputError(f"the mode is {mode!r}, expected 'train' or 'infer'. Pass one of them.")
    if dtype not in DTYPES:
        raise InputError(f"the dtype is {dtype!r}, expected one of: {', '.join(DTYPES)}.")


# --- load -----------------------------------------------------------------------------------------


def prepare_model(
    model: str, *, adapters: Sequence[str], mode: Mode, dtype: str, device: str
) -> nn.Module:
    """The model as `compile_checkpoint` times it with mmopt's ops: loaded, attached, in its mode.

    Args:
        model, adapters, mode, dtype, device: as in `compile_checkpoint`.

    Raises:
        InputError, MmoptError: as `compile_checkpoint`.
    """
    _, attached = _load(model, adapters, mode, dtype, pick_device(device))
    optimize(attached)
    return attached.train(mode == "train")


def _load(
    model: str, adapters: Sequence[str], mode: Mode, dtype: str, device: torch.device
) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint, and its model in evaluation on the device, what is trained unfrozen."""
    loaded = load_checkpoint(model, adapters=adapters, dtype=DTYPES[dtype])
    eager: nn.Module = loaded.model.eval().to(device)
    if mode == "train" and adapters:
        # Loaded for inference, an adapter is frozen; activating it unfreezes it.
        loaded.model.set_adapter(loaded.model.active_adapter)
    return loaded, eager


def _from_anywhere(name: str) -> str:
    """A local folder by its whole path; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _batches(
    loaded: Checkpoint, data: Path | None, mode: Mode, batch: int, length: int, seed: int
) -> tuple[tuple[Batch, Contents], tuple[Batch, Contents]]:
    """The batch of a step and one of another length, each with what it holds."""
    train = mode == "train"
    if data is not None:
        return ExampleBatches(data, loaded, train=train).pair(batch=batch, length=length)
    base = transformers_model(loaded.model)

    def made(size: int) -> tuple[Batch, Contents]:
        inputs = example_batch(base, batch=batch, length=size, train=train, seed=seed)
        return inputs, contents_of(inputs)

    return made(length), made(max(2, length // 2 + 1))


def _twin(model: nn.Module) -> nn.Module:
    """A copy with modules and configs of its own and the same parameters and buffers."""
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


# --- compile --------------------------------------------------------------------------------------


def _compiled(model: nn.Module, task: _Task) -> tuple[CompiledModel, float]:
    """The compiled model, and the seconds of compiling and its first step from empty caches.

    Neither kernels of an earlier run nor those of another variant shorten it. The eager step that
    `compile` tries the batch with is part of it.
    """
    with fresh_cache():
        began = read_clock()
        compiled = compile(model, task.inputs, mode=task.mode, allow_breaks=True)
        return compiled, read_clock() - began


# --- compare --------------------------------------------------------------------------------------


def _compare(
    eager: nn.Module, compiled: CompiledModel, task: _Task
) -> tuple[tuple[Parity, ...], tuple[str, ...]]:
    """Every group of tensors of both batches, and the adapters that got no gradient.

    In half precision the reference is eager in float32 with the same, rounded weights, and eager in
    half precision says how far that dtype is from it.
    """
    half = task.dtype != torch.float32
    reference = copy.deepcopy(eager).float() if half else eager
    found: list[Parity] = []
    dead: tuple[str, ...] = ()
    for which, inputs in (("", task.inputs), (", other length", task.other)):
        actual = _results(compiled, inputs, task)
        exact = moved(inputs, task.device, torch.float32)
        expected = _results(reference, exact, task)
        same_dtype = _results(eager, inputs, task) if half else None
        without_logits = task.train and "logits" not in actual["outputs"]
        for results in (expected, same_dtype or {}):
            if without_logits and "loss" in actual["outputs"]:
                results.get("outputs", {}).pop("logits", None)
        found += [
            compare(
                f"{group}{which}",
                expected[group],
                actual[group],
                same_dtype=same_dtype[group] if same_dtype else None,
                rounding=torch.finfo(task.dtype).eps,
            )
            for group in expected
        ]
        if task.train:
            dead = dead or _dead(compiled.module, actual["gradients"])
    return tuple(found), dead


def _results(run: Model, inputs: Batch, task: _Task) -> dict[str, dict[str, Tensor]]:
    """Outputs, and in mode `train` the loss and the gradients, by group and name."""
    with torch.set_grad_enabled(task.train):
        output = run(**inputs)
    groups = {"outputs": tensors_of(output)}
    if task.train:
        loss = loss_of(output)
        groups["loss"] = {"loss": loss}
        groups["gradients"] = gradients(loss, _module(run))
    return {
        group: {name: value.detach() for name, value in tensors.items()}
        for group, tensors in groups.items()
    }


def _dead(module: nn.Module, found: dict[str, Tensor]) -> tuple[str, ...]:
    named = dict(module.named_parameters())
    by_parameter = {id(named[name]): gradient for name, gradient in found.items()}
    return tuple(dead_adapters(module, lambda parameter: by_parameter.get(id(parameter))))


# --- time -----------------------------------------------------------------------------------------


def _measure(
    runs: dict[str, Model],
    first_calls: dict[str, float],
    task: _Task,
    *,
    rounds: int,
    seed: int,
    progress: Progress,
) -> dict[str, Variant]:
    """Time the step of every variant in turns, then count what it holds."""
    steps = {name: _step(run, task.inputs, task) for name, run in runs.items()}
    timings = time_variants(
        steps, rounds=rounds, timer=timer_for(task.device), seed=seed, progress=progress
    )
    variants = {}
    with progress("memory", len(steps)) as advance:
        for name, step in steps.items():
            peak = step_peak_bytes(step, task.device)
            variants[name] = Variant(timings[name].samples, first_calls.get(name), peak)
            advance(1)
    return variants


def _step(run: Model, inputs: Batch, task: _Task) -> Callable[[], None]:
    """One step, which leaves no gradient."""
    module = _module(run)

    def infer() -> None:
        with torch.no_grad():
            run(**inputs)

    def train_step() -> None:
        loss_of(run(**inputs)).backward()  # type: ignore[no-untyped-call]
        module.zero_grad(set_to_none=True)

    return train_step if task.train else infer


# --- report ---------------------------------------------------------------------------------------


def _module(run: Model) -> nn.Module:
    return run.module if isinstance(run, CompiledModel) else run


def _shapes(inputs: Batch) -> Shapes:
    return {name: tuple(x.shape) for name, x in inputs.items() if isinstance(x, Tensor)}


def _loss_name(eager: nn.Module, task: _Task) -> str | None:
    if not task.train:
        return None
    if "labels" in task.inputs or "return_loss" in task.inputs:
        return "the model's own"
    return "the mean square of the outputs"
