"""`mmopt.compile`: torch.compile that says where it broke the graph and why it compiled again."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.types import GuardFail
from torch._dynamo.utils import graph_break_reasons
from torch._inductor.compile_fx import compile_fx

from mmopt.attach.optimize import transformers_model
from mmopt_kernels.errors import CheckFailedError, InputError, MmoptError

Mode = Literal["train", "infer"]


@dataclass(frozen=True)
class GraphBreak:
    """A place where the compiled graph ends and Python goes on.

    Attributes:
        file, line: the statement that could not be traced.
        reason: Dynamo's first line about it.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Recompile:
    """A call that no compiled graph fitted.

    Attributes:
        file, line: the function that was compiled again.
        reason: the guard that failed.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class CompiledModel:
    """A model whose calls run compiled; made by `mmopt.compile`.

    Call it as the model is called. In mode `"infer"` calls run without gradients.

    Attributes:
        module: the model itself, sharing all parameters.
    """

    def __init__(self, module: nn.Module, *, mode: Mode, dynamic: bool) -> None:
        self.module = module
        self._mode = mode
        self._breaks: dict[GraphBreak, None] = {}
        self._recompiles: list[Recompile] = []
        self._failures: list[GuardFail] = []
        self._calling = False
        self._graphs = 0
        # A model's floats (scales, epsilons) are constants. Left to guess whether they change,
        # Dynamo under dynamic=True lowers the graph, learns that they cannot be inputs, and traces
        # and lowers all of it once more.
        self._floats_are_constants = torch._dynamo.config.patch(specialize_float=True)
        self._run = torch._dynamo.optimize(
            self._lower, dynamic=dynamic, guard_fail_fn=self._note_failure
        )(module)

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
        known = len(graph_break_reasons)
        self._failures.clear()
        self._calling = True
        try:
            with (
                self._floats_are_constants,
                torch.no_grad() if self._mode == "infer" else nullcontext(),
            ):
                output = self._run(*args, **kwargs)
        finally:
            self._calling = False
            # Guards failed and nothing was compiled: Dynamo's limit is reached, eager from here.
            self._note_recompile()
            for reason in graph_break_reasons[known:]:
                at = reason.user_stack[-1]
                line = reason.reason.strip().splitlines()[0]
                self._breaks[GraphBreak(at.filename, at.lineno or 0, line)] = None
        if not self._graphs and not self._breaks:
            code = inspect.unwrap(type(self.module).forward).__code__
            self._breaks[
                GraphBreak(
                    code.co_filename, code.co_firstlineno, "nothing was compiled: Dynamo is off"
                )
            ] = None
        return output

    def _lower(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self._note_recompile()
        self._graphs += 1
        return compile_fx(graph, inputs)  # type: ignore[return-value]

    def _note_failure(self, failure: GuardFail) -> None:
        # Another compiled model of the same class walks past this one's graphs as well.
        if self._calling:
            self._failures.append(failure)

    def _note_recompile(self) -> None:
        if self._failures:
            code = self._failures[0].orig_code
            reasons = (failure.reason.splitlines()[0].strip() for failure in self._failures)
            self._recompiles.append(
                Recompile(code.co_filename, code.co_firstlineno, "; ".join(reasons))
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
        model: a transformers `PreTrainedModel` or a PEFT model around one.
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
    output = compiled(**example_batch)
    if mode == "train":
        torch.autograd.grad(loss_of(output), trainable, allow_unused=True)
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
    except MmoptError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        shown = ", ".join(
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else value!r}"
            for name, value in batch.items()
        )
        raise InputError(
            f"{type(model).__name__} rejects the example batch ({shown}): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}. "
            "Pass a batch that the model runs on eagerly."
        ) from error
