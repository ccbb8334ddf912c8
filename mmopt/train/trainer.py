"""transformers' Trainer with the training step compiled and its adapters watched."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers

import mmopt
from mmopt.attach.gradients import check_gradients
from mmopt.attach.optimize import transformers_model
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
        # Trainer passes the number of labels of all micro-batches to every model that takes any
        # keyword, and then leaves the loss as it is. A loss that does not read the number (of a
        # classifier) would come out as the sum of the micro-batches' means.
        loss_function = getattr(transformers_model(self.model), "loss_function", None)
        self.model_accepts_loss_kwargs &= _reads_number_of_items(loss_function)
        # Both of Trainer's own print on stdout, which belongs to the report.
        self.remove_callback(transformers.trainer_callback.PrinterCallback)
        self.remove_callback(transformers.trainer_callback.ProgressCallback)
        self.add_callback(_RequireGradients())
        self.add_callback(_Advance(advance))

    @property
    def recompiles(self) -> int | None:
        """Compilations of the step after the first; None when it is not compiled."""
        return None if self._compiled is None else len(self._compiled.recompiles)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Take the loss from the compiled step while training, from the model itself in tests.

        Trainer's own torch_compile option would compile the evaluation too, a second graph that
        costs more than the evaluation, and would say nothing about graph breaks.
        """
        if self._compile_step and model.training:
            if self._compiled is None:
                batch = dict(inputs)
                if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                    batch["num_items_in_batch"] = num_items_in_batch
                self._compiled = mmopt.compile(model, batch, mode="train")
            model = self._compiled
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _reads_number_of_items(loss_function: Any) -> bool:
    return (
        callable(loss_function)
        and "num_items_in_batch" in inspect.signature(loss_function).parameters
    )


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
