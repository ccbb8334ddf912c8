"""What is replaced in a model while it runs for a trace, and put back: see `lowering` too.

positions  of each row's own tokens, where the model counts them from the cache's length
head       runs on the last token of each row only
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmopt_export.encoder_decoder.lowering import Lowering, Step
from mmopt_export.lowering import answered_by, last_tokens


@contextlib.contextmanager
def lowered(model: Any, lowering: Lowering) -> Iterator[None]:
    """Replace what the model looks up while it runs, and put it back."""
    with contextlib.ExitStack() as stack:
        if lowering.cache is not None:
            stack.enter_context(_last_token_head(model, lowering))
            if lowering.step is not None:
                stack.enter_context(_row_positions(model, lowering.step))
        else:
            stack.enter_context(_plain_memory(model.get_encoder()))
        stack.enter_context(answered_by(lowering, model))
        yield


@contextlib.contextmanager
def _last_token_head(model: Any, lowering: Lowering) -> Iterator[None]:
    """Run the language model head on `[batch, 1, hidden]`: each row's last token."""

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        lowering.heads += 1
        return (last_tokens(args[0], None if lowering.step is None else lowering.step.last),)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _row_positions(model: Any, step: Step) -> Iterator[None]:
    """Give each row its own positions, in whichever of three ways the decoder has them."""
    decoder = model.get_decoder()
    table = getattr(decoder, "embed_positions", None)
    with contextlib.ExitStack() as stack:
        for module in decoder.modules():
            if getattr(module, "has_relative_attention_bias", False):
                stack.enter_context(_row_bias(module, step))
        known = inspect.signature(model.forward).parameters
        if table is not None and "decoder_position_ids" not in known:
            stack.enter_context(_row_table(table, step))
        yield


@contextlib.contextmanager
def _row_table(table: nn.Module, step: Step) -> Iterator[None]:
    """Look positions up in one long row, which every table of positions takes."""

    def flatten(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "position_ids": step.positions.reshape(-1)}

    def restore(_: nn.Module, __: Any, looked_up: Tensor) -> Tensor:
        batch, sequence = step.positions.shape
        return looked_up.reshape(batch, sequence, looked_up.shape[-1])

    handles = (
        table.register_forward_pre_hook(flatten, with_kwargs=True),
        table.register_forward_hook(restore),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _row_bias(module: Any, step: Step) -> Iterator[None]:
    """Let a relative position bias be `[batch, heads, sequence, total]`, by rows' own positions."""
    original = module.compute_bias

    def by_rows(*_: Any, **__: Any) -> Tensor:
        # What the last of `width` tokens adds to each: by distance, from the end.
        line = original(1, step.width, past_seen_tokens=step.width - 1)[0, :, 0]
        distance = step.positions.unsqueeze(2) - torch.arange(step.width)
        # Tokens after the query are masked, whatever is added.
        index = (step.width - 1 - distance).clamp(max=step.width - 1)
        bias: Tensor = line[:, index].transpose(0, 1)
        return bias

    module.compute_bias = by_rows
    try:
        yield
    finally:
        del module.compute_bias


@contextlib.contextmanager
def _plain_memory(encoder: nn.Module) -> Iterator[None]:
    """Let the layers begin with states that lie in memory as they are written.

    Out of a convolution they come permuted, and adding such ones makes a trace look at sizes.
    """
    layers = layers_of(encoder)

    def copy(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0].contiguous(), *args[1:]), kwargs

    if layers is None or len(layers) == 0:
        yield
        return
    handle = layers[0].register_forward_pre_hook(copy, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def layers_of(stack: nn.Module) -> nn.ModuleList | None:
    """The layers of an encoder or a decoder: its longest list of modules."""
    lists = [one for one in stack.children() if isinstance(one, nn.ModuleList)]
    return max(lists, key=len, default=None)
