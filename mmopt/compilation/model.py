"""`mmopt.compile`: torch.compile that says where it broke the graph and why it compiled again."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from traceback import FrameSummary
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.types import GuardFail
from torch._dynamo.utils import graph_break_reasons
from torch._inductor.compile_fx import compile_fx

from mmopt.attach.optimize import transformers_model
from mmopt.compilation.eager_hooks import added_hooks, keep_out_of_graphs
from mmopt.compilation.lowerings import keep_lengths_free
from mmopt.compilation.parity import compare
from mmopt.compilation.prepare import prepared
from mmopt.compilation.regions import (
    alone,
    is_bucket_end,
    refuse_compiled,
    regions_of,
    run_regions,
    try_backward,
)
from mmopt.compilation.store import StoredGraph, capture, require_storable, write_store
from mmopt.compilation.tracing import Tracing, inductor_options
from mmopt_export.files import require_new_folder
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError, one_line

Mode = Literal["train", "infer"]


@dataclass(frozen=True)
class GraphBreak:
    """A place where the compiled graph ends and Python goes on.

    Attributes:
        file, line: the statement that could not be traced.
        reason: Dynamo's first line about it.
        detail: all that Dynamo says about it.
        stack: the calls that led there, the outermost first.
    """

    file: str
    line: int
    reason: str
    detail: str = field(default="", compare=False, repr=False)
    stack: tuple[FrameSummary, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Recompile:
    """A call that no compiled graph fitted.

    Attributes:
        file, line: the function that was compiled again.
        reason: the guards that failed, one of each graph that was there.
        details: all that Dynamo says about each, with the code that needs it where it knows that.
        limit: nothing was compiled: Dynamo's limit is reached, and calls run eagerly from here.
    """

    file: str
    line: int
    reason: str
    details: tuple[str, ...] = field(default=(), compare=False, repr=False)
    limit: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class CompiledModel:
    """A model whose calls run compiled; made by `mmopt.compile` or `mmopt.load_compiled`.

    Call it as the model is called. In mode `"infer"` calls run without gradients.

    Attributes:
        module: the model itself, sharing all parameters.
    """

    def __init__(
        self, module: nn.Module, *, mode: Mode, dynamic: bool, stored: StoredGraph | None = None
    ) -> None:
        self.module = module
        self._mode = mode
        self._dynamic = dynamic
        self._stored = stored
        self._unfit: str | None = None
        self._breaks: dict[GraphBreak, None] = {}
        self._recompiles: list[Recompile] = []
        self._failures: list[GuardFail] = []
        self._calling = False
        self._graphs = 0
        self._tracing = Tracing(infer=mode == "infer")
        compiler = torch._dynamo.optimize(
            self._lower, dynamic=dynamic, guard_fail_fn=self._note_failure
        )
        keep_lengths_free()
        keep_out_of_graphs(module)
        self._base = transformers_model(module)
        self._eager_hooks = added_hooks(self._base)
        self._regions = regions_of(module)
        if self._regions == [module]:
            self._run = compiler(module)
        else:
            self._run = run_regions(module, self._regions, compiler)

    @property
    def graph_breaks(self) -> tuple[GraphBreak, ...]:
        """Every break so far, each place once."""
        return tuple(self._breaks)

    @property
    def recompiles(self) -> tuple[Recompile, ...]:
        """Every compilation after the first of its function, in order."""
        return tuple(self._recompiles)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the arguments and the result are its own."""
        arguments = prepared(self.module, self._by_name(args, kwargs))
        if self._stored is not None:
            with self._tracing.gradients():
                self._unfit = self._stored.mismatch(self.module, arguments)
                if self._unfit is None:
                    return self._stored(self.module, arguments)
        # Checkpointing may have been enabled since.
        if (hooks := added_hooks(self._base)) is not self._eager_hooks:
            keep_out_of_graphs(self.module)
            self._eager_hooks = hooks
        known = len(graph_break_reasons)
        self._failures.clear()
        self._calling = True
        try:
            with self._tracing:
                output = self._run(**arguments)
        finally:
            self._calling = False
            # Guards failed and nothing was compiled: Dynamo's limit is reached, eager from here.
            self._note_recompile(limit=True)
            for reason in graph_break_reasons[known:]:
                at = reason.user_stack[-1]
                if is_bucket_end(at):
                    continue
                line = reason.reason.strip().splitlines()[0]
                place = GraphBreak(
                    at.filename, at.lineno or 0, line, reason.reason, tuple(reason.user_stack)
                )
                self._breaks[place] = None
        if not self._graphs and not self._breaks:
            code = inspect.unwrap(type(self._regions[0]).forward).__code__
            why = "nothing was compiled: Dynamo is off"
            if not torch._dynamo.config.disable:
                why = (
                    "nothing was compiled: earlier models of this process used up Dynamo's limit "
                    f"of {torch._dynamo.config.recompile_limit} graphs for this code; call "
                    "torch._dynamo.reset() once they are done with, or raise recompile_limit"
                )
            self._breaks[GraphBreak(code.co_filename, code.co_firstlineno, why)] = None
        return output

    def save(
        self,
        folder: str | Path,
        example_batch: Mapping[str, Any],
        *,
        source: Mapping[str, Any] | None = None,
    ) -> str:
        """Store the graph in `folder`, for `mmopt.load_compiled` in another process.

        Traces the model once more, in the state that it is in (train or eval mode, adapters,
        autocast), and lets a fresh process build the kernels. A store is code: whoever loads it
        runs it. It is signed with a key of this user (`~/.config/mmopt/store.key`), who may load it
        as it is; others need the returned SHA-256.

        Args:
            folder: new or empty; appears whole or not at all.
            example_batch: keyword arguments of the model's forward, as for `mmopt.compile`.
            source: how the model was made, where `mmopt compile` writes the store.

        Returns:
            The SHA-256 of the store's record, which covers all its files.

        Raises:
            InputError: `folder` is not empty, or the graph cannot be stored, by torch before 2.13
                no graph at all.
            CheckFailedError: the traced graph gives other outputs than this one; nothing is stored.
            MmoptError: the disk refuses, or a fresh process cannot load the graph.
        """
        require_storable()
        if self._regions != [self.module]:
            raise InputError(
                f"{type(self.module).__name__} is compiled in {len(self._regions)} pieces around "
                "data parallelism, expected one graph. Store the model before it is wrapped."
            )
        require_new_folder(Path(folder))
        arguments = prepared(self.module, example_batch)
        graph = capture(self.module, arguments, infer=self._mode == "infer", dynamic=self._dynamic)
        self._require_equal(graph, arguments)
        return write_store(
            graph,
            Path(folder),
            model=self.module,
            options={"mode": self._mode, "dynamic": self._dynamic},
            source=source,
        )

    def _require_equal(self, graph: StoredGraph, arguments: Mapping[str, Any]) -> None:
        outputs = []
        for run in (partial(self, **arguments), partial(graph, self.module, arguments)):
            with torch.random.fork_rng(), self._tracing.gradients():
                torch.manual_seed(0)
                outputs.append(tensors_of(run()))
        found = compare("outputs", *outputs)
        if not found.holds:
            raise CheckFailedError(
                f"the graph to store gives other outputs than the compiled model: {found.worst} is "
                f"off by {found.error}, expected at most {found.tolerance}. Nothing was stored."
            )

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        named = inspect.signature(self.module.forward).bind_partial(*args).arguments
        return {**named, **kwargs}

    def _lower(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self._note_recompile()
        self._graphs += 1
        with torch._inductor.config.patch(inductor_options()):
            return compile_fx(graph, inputs)  # type: ignore[return-value]

    def _note_failure(self, failure: GuardFail) -> None:
        # Another compiled model of the same class walks past this one's graphs as well.
        if self._calling:
            self._failures.append(failure)

    def _note_recompile(self, *, limit: bool = False) -> None:
        if self._unfit is not None and not limit:
            code = inspect.unwrap(type(self.module).forward).__code__
            self._recompiles.append(
                Recompile(code.co_filename, code.co_firstlineno, f"stored graph: {self._unfit}")
            )
            self._unfit = None
            self._failures.clear()
        if self._failures:
            code = self._failures[0].orig_code
            details = tuple(failure.reason for failure in self._failures)
            reasons = (reason.splitlines()[0].strip() for reason in details)
            self._recompiles.append(
                Recompile(code.co_filename, code.co_firstlineno, "; ".join(reasons), details, limit)
            )
            self._failures.clear()


def compile(
    model: Any,
    example_batch: Mapping[str, Any],
    *,
    mode: Mode = "train",
    dynamic: bool = True,
    allow_breaks: bool = False,
) -> CompiledModel:
    """Compile `model` into one graph by running it on `example_batch`.

    The batch is tried eagerly first, so that what is wrong with it is told apart from what cannot
    be compiled. In mode `"train"` the backward is compiled as well; no gradient is stored. Floats
    of the model are constants, PEFT's scales among them: each new value is a recompile. Call PEFT's
    `prepare_model_for_compiled_hotswap` before to have scales, and adapters, that change freely.

    Args:
        model: a transformers `PreTrainedModel` or a PEFT model around one. Around either may be
            `DistributedDataParallel`, in either `fully_shard`: wrap and shard first, then compile,
            in every process at once. Of a model with sharded blocks each block is a graph, and
            what is around them stays eager.
        example_batch: keyword arguments of the model's forward. Sizes of at least 2 stay free to
            change; a dimension of size 1 is compiled as 1.
        mode: `"train"` or `"infer"` (calls run without gradients).
        dynamic: compile for any length at once; False compiles for these lengths.
        allow_breaks: return a model of several graphs instead of raising.

    Returns:
        The compiled model; `graph_breaks` and `recompiles` keep counting.

    Raises:
        InputError: not such a model, an unknown mode, a batch that the model rejects, or nothing
            to train.
        CheckFailedError: the graph breaks; lists every place.
    """
    refuse_compiled(model)
    transformers_model(model)
    if mode not in ("train", "infer"):
        raise InputError(f"mode is {mode!r}, expected 'train' or 'infer'.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if mode == "train" and not trainable:
        raise InputError(
            "no parameter of the model requires a gradient, expected at least one in mode 'train'. "
            "Unfreeze the adapter (model.set_adapter), or pass mode='infer'."
        )
    _try_batch(model, example_batch)

    compiled = CompiledModel(model, mode=mode, dynamic=dynamic)
    with alone(model):
        output = compiled(**example_batch)
        if mode == "train":
            try_backward(model, loss_of(output), trainable)
    if len(compiled._regions) > 1:
        # Of several pieces, the first call compiles each kind.
        compiled._recompiles.clear()
    if compiled.graph_breaks and not allow_breaks:
        places = "\n".join(f"  {place}" for place in compiled.graph_breaks)
        raise CheckFailedError(
            f"the graph of {type(model).__name__} breaks, expected one graph:\n{places}\n"
            "Change the code there, or pass allow_breaks=True to run it in pieces."
        )
    return compiled


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or without labels the mean square of each floating output, summed."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    return torch.stack([x.float().square().mean() for x in tensors_of(output).values()]).sum()


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a model's output, by field name."""
    return {
        name: value
        for name, value in output.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _try_batch(model: nn.Module, batch: Mapping[str, Any]) -> None:
    if not isinstance(batch, Mapping):
        raise InputError(
            f"the example batch is a {type(batch).__name__}, expected a mapping of the arguments "
            "of the model's forward, as a tokenizer or processor returns it."
        )
    try:
        with torch.no_grad():
            model(**batch)
    except (MmoptError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        shown = ", ".join(
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else value!r}"
            for name, value in batch.items()
        )
        raise InputError(
            f"{type(model).__name__} rejects the example batch ({shown}): "
            f"{type(error).__name__}: {one_line(error)}. "
            "Pass a batch that the model runs on eagerly."
        ) from error
