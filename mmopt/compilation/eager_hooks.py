"""Hooks that matter to eager gradient checkpointing only, kept out of graphs.

`enable_input_require_grads` (transformers calls it for PEFT and checkpointing, PEFT itself as well)
puts a hook on the embeddings that flags their output for autograd in place: re-entrant checkpoints
would otherwise find no input that requires a gradient. Dynamo cannot trace that, and in a graph
checkpoints are never re-entrant.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# By name, because both libraries define them inside a function: transformers', PEFT's.
_NAMES = ("make_inputs_require_grads", "make_inputs_require_grad")


def keep_out_of_graphs(model: nn.Module) -> None:
    """Let the hooks of `enable_input_require_grads` do nothing while a graph is traced.

    In place; eagerly they do what they did, and their handles still remove them.
    """
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if getattr(hook, "__name__", None) in _NAMES:
                module._forward_hooks[key] = _eager_only(hook)


def added_hooks(base: Any) -> Any:
    """What tells one `enable_input_require_grads` of a PreTrainedModel from the next: its handles.

    Cheap enough for every call.
    """
    return vars(base).get("_require_grads_hooks")


def _eager_only(hook: Callable[..., Any]) -> Callable[..., Any]:
    def unless_traced(module: nn.Module, args: Any, output: Any) -> Any:
        return None if torch.compiler.is_compiling() else hook(module, args, output)

    return unless_traced
