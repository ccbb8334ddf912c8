"""Finds what the graphs of an encoder-decoder model need, by running it once with real tensors.

What the ops have no place for is refused by name, with the reason.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mmopt_export.encoder_decoder.lowering import Attention, GraphCache, Lowering, refusal
from mmopt_export.encoder_decoder.replacements import layers_of, lowered
from mmopt_export.lowering import cache_name, refusing

# GroupQueryAttention wants heads of a multiple of this size; smaller ones are filled with zeros.
_HEAD_MULTIPLE = 8

# What models call the layers that make keys and values.
_PROJECTIONS = (("k_proj", "v_proj"), ("k", "v"))


@dataclass
class Survey:
    """What a run with real tensors found.

    Attributes:
        cross: the calls of cross-attention by layer; their modules make keys and values.
        own: the calls of the decoder's self-attention by layer.
        masked: whether cross-attention takes the encoder's padding.
        states: the class of the encoder's output.
        stride: where that output has a padding mask of its own frames, how many samples of the
            input a frame is after the one before; None where it has none.
    """

    cross: list[Attention] = field(default_factory=list)
    own: list[Attention] = field(default_factory=list)
    masked: bool = False
    states: Any = None
    stride: int | None = None

    @property
    def head_size(self) -> int:
        """Of the buffers: what the op takes."""
        size = self.own[0].head_size
        return -(-size // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def survey(model: Any, inputs: dict[str, Tensor]) -> Survey:
    """Run the model once with real tensors and find what its graphs need.

    Args:
        model: an encoder-decoder model, eval mode, fp32.
        inputs: of its encoder, with padding in the attention mask where there is one.

    Raises:
        InputError: the architecture needs something that the graphs cannot express; named.
    """
    name = type(model).__name__
    if not getattr(model.config, "is_encoder_decoder", False):
        raise refusal(f"{name} has no encoder and decoder")
    if model.get_output_embeddings() is None:
        raise refusal(f"{name} has no language model head")
    _require_positions(model)
    encoder = Lowering(name, surveys=True)
    layers = _decoder_layers(model)
    cache = GraphCache(layers)
    decoder = Lowering(name, cache=cache, surveys=True)
    batch = next(iter(inputs.values())).shape[0]
    what = f"{name} does not run as an encoder and a decoder with a shared cache"
    with torch.no_grad(), refusing(refusal, what):
        with lowered(model, encoder):
            states = model.get_encoder()(**inputs, return_dict=True)
        with lowered(model, decoder):
            ids = torch.zeros(batch, 2, dtype=torch.int64)
            call(model, states, inputs.get("attention_mask"), ids, cache)
    found = Survey(
        cross=[one for one in decoder.found if one.role == "cross"],
        own=[one for one in decoder.found if one.role == "self"],
        states=type(states),
        stride=_stride(model, states, inputs),
    )
    found.masked = any(one.masked for one in found.cross)
    _require_whole(name, encoder, decoder, found, layers, inputs)
    return found


def _require_whole(
    name: str,
    encoder: Lowering,
    decoder: Lowering,
    found: Survey,
    layers: int,
    inputs: dict[str, Tensor],
) -> None:
    """Every layer went through our functions, and they are alike."""
    every = list(range(layers))
    own = [one.layer for one in found.own]
    if own != every or len(found.cross) != layers:
        raise refusal(
            f"{name} has {layers} layers in its decoder and called transformers' attention "
            f"function for itself in {own or 'none'} and for the encoder in {len(found.cross)}"
        )
    if not encoder.found:
        raise refusal(f"the encoder of {name} has an attention function of its own")
    if "attention_mask" in inputs and not all(one.masked for one in encoder.found):
        raise refusal(f"the encoder of {name} does not take the attention mask to its attention")
    if decoder.heads != 1:
        raise refusal(f"{name} called its language model head {decoder.heads} times, expected once")
    if len({(one.heads, one.head_size) for one in decoder.found}) != 1:
        raise refusal(f"{name} has layers with different heads")
    if len({one.masked for one in found.cross}) != 1:
        raise refusal(f"{name} masks the padding of the encoder in some layers only")
    for one in found.cross:
        projections(one.module)


def _stride(model: Any, states: Any, inputs: dict[str, Tensor]) -> int | None:
    """Of the mask that the encoder gives, which is evaluated, not believed."""
    given = getattr(states, "attention_mask", None)
    if given is None:
        return None
    stride = 1
    for module in model.get_encoder().children():
        if isinstance(module, nn.Conv1d):
            stride *= module.stride[0]
    taken = inputs["attention_mask"][:, ::stride][:, : states.last_hidden_state.shape[1]]
    if given.shape != taken.shape or not torch.equal(given.bool(), taken.bool()):
        raise refusal(
            f"the encoder of {type(model).__name__} gives another mask than that of the first "
            f"sample of each frame, {stride} samples apart"
        )
    return stride


def projections(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The layers of a cross-attention that make keys and values.

    Raises:
        InputError: they have other names than we know.
    """
    for names in _PROJECTIONS:
        keys, values = (getattr(module, name, None) for name in names)
        if isinstance(keys, nn.Module) and isinstance(values, nn.Module):
            return keys, values
    raise refusal(
        f"{type(module).__name__} has no layers for keys and values, expected the names "
        f"{' or '.join('/'.join(names) for names in _PROJECTIONS)}"
    )


def call(
    model: Any,
    states: Any,
    mask: Tensor | None,
    ids: Tensor,
    cache: Cache,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits `[batch, sequence, vocabulary]` of the decoder.

    Args:
        states: the encoder's output, as its class.
        mask: int64 `[batch, frames]` of it, or None.
        ids: int64 `[batch, sequence]`.
        cache: empty, or of the tokens before.
        positions: of the ids, where the model takes them.
    """
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {cache_name(model): cache}
    if positions is not None and "decoder_position_ids" in known:
        arguments["decoder_position_ids"] = positions
    if mask is not None:
        arguments["attention_mask"] = mask
    logits: Tensor = model(
        encoder_outputs=states,
        decoder_input_ids=ids,
        use_cache=True,
        return_dict=True,
        **arguments,
    ).logits
    return logits


def _require_positions(model: Any) -> None:
    """The decoder has positions in a way that rows can have their own."""
    name = type(model).__name__
    if "decoder_position_ids" in inspect.signature(model.forward).parameters:
        return
    decoder = model.get_decoder()
    table = getattr(decoder, "embed_positions", None)
    if table is not None:
        if "position_ids" in inspect.signature(table.forward).parameters:
            return
        raise refusal(f"the decoder of {name} computes its positions from the token ids")
    if not any(getattr(one, "has_relative_attention_bias", False) for one in decoder.modules()):
        raise refusal(f"the decoder of {name} has no positions that rows can have their own of")


def _decoder_layers(model: Any) -> int:
    layers = layers_of(model.get_decoder())
    if layers is None:
        raise refusal(f"the decoder of {type(model).__name__} has no list of layers")
    return len(layers)
