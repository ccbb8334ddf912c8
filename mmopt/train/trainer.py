"""transformers' Trainer with the training step compiled and its adapters watched."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

import mmopt
from mmopt.attach.gradients import check_gradients
from mmopt_kernels.errors import CheckFailedError


class CompiledTrainer(transformers.Trainer):
    """A Trainer that overrides one hook.

    Args:
        compile_step: compile forward and backward as one graph at the first step.
        advance: called with 1 after each step.
    """

    def __init__(
        self, *, compile_step: bool, advance: Callable[[int], None], **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._compile_step = compile_step
        self._compiled: Any = None
        # Trainer would pass the number of labels to models that take it, an argument that the
        # compiled step has not seen: a second graph, for a mean that is the same without it.
        self.model_accepts_loss_kwargs = False
        # Both of Trainer's own print on stdout, which belongs to the report.
        self.remove_callback(transformers.trainer_callback.PrinterCallback)
        self.remove_callback(transformers.trainer_callback.ProgressCallback)
        self.add_callback(_RequireGradients())
        self.add_callback(_Advance(advance))

    @property
    def recompiles(self) -> int | None:
        """Compilations of the step after the first; None when it is not compiled."""
        return None if self._compiled is None else len(self._compiled.recompiles)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the loss from the compiled step while training, from the model itself in tests.

        Trainer's own torch_compile option would compile the evaluation too, a second graph that
        costs more than the evaluation, and would say nothing about graph breaks.
        """
        if self._compile_step and model.training:
            if self._compiled is None:
                self._compiled = mmopt.compile(model, dict(inputs), mode="train")
            model = self._compiled
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Advance(transformers.TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)


class _RequireGradients(transformers.TrainerCallback):
    """Fail at the first step when something that should train has no gradient."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            return
        check_gradients(model)
        dead = [
            name
            for name, parameter in model.named_parameters()
            # B starts at zero, so at the first step A's gradient is zero by construction.
            if parameter.requires_grad
            and ".lora_A." not in name
            and (parameter.grad is None or not bool(torch.any(parameter.grad)))
        ]
        if dead:
            raise CheckFailedError(
                f"{len(dead)} of the trained parameters have a zero gradient, first {dead[0]}. "
                "The loss does not depend on them: check adapter.targets and adapter.train_whole."
            )
