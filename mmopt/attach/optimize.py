"""`mmopt.optimize`: one pass over the towers, one over the LoRA layers, and the loss."""

from functools import partial
from typing import Any

from mmopt.attach.attention import attach_attention
from mmopt.attach.gradients import check_gradients
from mmopt.attach.lora import attach_lora
from mmopt.attach.loss import attach_loss
from mmopt.attach.peft_layers import within_peft
from mmopt.attach.report import OptimizationReport
from mmopt.attach.traceable import attach_traceable
from mmopt_kernels.errors import InputError


def optimize(
    model: Any, *, attention: bool = True, lora: bool = True, loss: bool = True, graph: bool = True
) -> OptimizationReport:
    """Make `model` call mmopt's fused ops, in place, without changing what it computes.

    Attention: every tower (the modules that share one config) that dispatches through
    transformers' `AttentionInterface` gets the implementation `"mmopt"`. LoRA: every LoRA layer
    over a linear base (`nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' NF4 and int8) computes base
    and adapters in one op: dropout, DoRA, rsLoRA, several adapters at once or row by row.
    `set_adapter`, `disable_adapter`, merging, unloading, saving and swapping work as before.
    Loss: a causal language model that is trained with labels computes output layer and
    cross-entropy in one op; its output then has no logits. Calling it again changes nothing more,
    but attaches layers that were added since.

    Args:
        model: a transformers `PreTrainedModel` or a PEFT model around one; any device and dtype.
            One that `DistributedDataParallel` or `torch.compile` wraps, or that `fully_shard`
            shards, is changed inside.
        attention: attach the attention op.
        lora: attach the LoRA op.
        loss: attach the loss op.
        graph: replace the methods of transformers that stop a compiler, for compiled calls only,
            and those that cut attention into windows and images, which the op takes all at once.

    Returns:
        A row per module: what it became, or why it was left alone. `undo()` reverts it.

    Raises:
        InputError: `model` is neither.
    """
    model = within_wrappers(model)
    base = transformers_model(model)
    parts = []
    # Which towers can take the op depends on what their forward hands to it.
    graphs = attach_traceable(model, base) if graph else None
    if attention:
        parts.append(attach_attention(model, base))
    if lora:
        parts.append(attach_lora(model))
    if loss:
        parts.append(attach_loss(model))
    if graphs is not None:
        parts.append(graphs)
    return OptimizationReport(
        rows=tuple(row for rows, _ in parts for row in rows),
        _restorers=tuple(restore for _, restore in parts),
        _check=partial(check_gradients, model),
    )


def transformers_model(model: Any) -> Any:
    """The `PreTrainedModel` that `model` is or that PEFT wraps; InputError when there is none."""
    from transformers import PreTrainedModel

    model = within_wrappers(model)
    unwrapped = within_peft(model)
    if isinstance(unwrapped, PreTrainedModel):
        return unwrapped
    raise InputError(
        f"the model is a {type(model).__module__}.{type(model).__qualname__}, expected a "
        "transformers PreTrainedModel or a PEFT model around one. Load it with a transformers "
        "Auto class; attach mmopt_kernels' ops to other modules by calling them."
    )


def within_wrappers(model: Any) -> Any:
    """What DistributedDataParallel or torch.compile wrap; the model itself without them."""
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        else:
            return model
