"""An encoder and a decoder as modules: the eager oracles, and what is traced."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from mmopt_export.caches import fill_presents, read_row
from mmopt_export.checkpoint import quiet_transformers
from mmopt_export.encoder_decoder.lowering import GraphCache, Lowering, Role, Step
from mmopt_export.encoder_decoder.replacements import lowered
from mmopt_export.encoder_decoder.seq2seq import FRAMES, IDS, LOGITS, MASK, cross_names
from mmopt_export.encoder_decoder.survey import Survey, call, projections
from mmopt_export.lowering import attention_implementation, cache_name
from mmopt_export.manifest import CacheMap
from mmopt_export.runtime import Tensors


class EagerEncoder(nn.Module):
    """The oracle: the Hugging Face encoder and what its decoder makes of the output, in eager."""

    def __init__(self, model: Any, found: Survey) -> None:
        super().__init__()
        self.model = model
        self.found = found

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Keys and values of every layer's cross-attention, `[batch, heads, frames, head_size]`."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = inputs.get(MASK)
        with torch.no_grad(), attention_implementation(self.model, "eager"):
            states = self.model.get_encoder()(**inputs, return_dict=True)
            ids = torch.zeros(len(states.last_hidden_state), 1, dtype=torch.int64)
            call(self.model, states, mask, ids, cache)
        outputs: dict[str, Tensor] = {}
        for layer, (key, value) in enumerate(cross_names(len(self.found.cross))):
            held = cache.cross_attention_cache.layers[layer]
            outputs |= {key: held.keys.contiguous(), value: held.values.contiguous()}
        if self.found.stride is not None:
            outputs[FRAMES] = states.attention_mask.to(torch.int64)
        return outputs


class LoweredEncoder(nn.Module):
    """What is traced: the encoder, then keys and values of every layer's cross-attention."""

    def __init__(self, model: Any, found: Survey, *, plain: Collection[Role] = ()) -> None:
        super().__init__()
        self.model = model
        self.found = found
        self.plain = plain

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """As `EagerEncoder`."""
        sampled = None
        if self.found.stride is not None:
            sampled = (inputs.pop(MASK), self.found.stride)
        lowering = Lowering(type(self.model).__name__, sampled=sampled, plain=self.plain)
        with lowered(self.model, lowering):
            states = self.model.get_encoder()(**inputs, return_dict=True)
        hidden = states.last_hidden_state
        batch, frames, _ = hidden.shape
        outputs = {}
        names = cross_names(len(self.found.cross))
        for one, pair in zip(self.found.cross, names, strict=True):
            for layer, name in zip(projections(one.module), pair, strict=True):
                made = layer(hidden).view(batch, frames, one.heads, -1)
                outputs[name] = made.transpose(1, 2)
        if sampled is not None:
            assert lowering.frames is not None
            outputs[FRAMES] = lowering.frames.to(torch.int64)
        return outputs


class EagerDecoder(nn.Module):
    """The oracle: the Hugging Face decoder in eager attention, one row at a time, without padding.

    Its interface is the graph's. Rows are taken apart by the mask, so that no padding of tokens
    reaches the model, and a row's past is what its buffers hold.
    """

    def __init__(self, model: Any, found: Survey, cache: CacheMap) -> None:
        super().__init__()
        self.model = model
        self.found = found
        self.cache = cache

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Logits of each row's last new token and the filled buffers.

        Args:
            inputs: as `decoder_part` has them.

        Returns:
            `logits` `[B, 1, V]`, and presents `[B, heads, max(C, T), head_size]`, zero beyond a
            row's tokens.
        """
        with torch.no_grad(), attention_implementation(self.model, "eager"):
            rows = [self._row(inputs, row) for row in range(len(inputs[IDS]))]
        capacity = max(inputs[self.cache.layers[0][0]].shape[2], inputs[MASK].shape[1])
        held = [cache.self_attention_cache for _, cache in rows]
        filled = fill_presents(self.cache, held, capacity)
        return {LOGITS: torch.stack([logits for logits, _ in rows]), **filled}

    def _row(self, inputs: dict[str, Tensor], row: int) -> tuple[Tensor, EncoderDecoderCache]:
        ids, mask = inputs[IDS][row], inputs[MASK][row]
        fresh = mask[len(mask) - len(ids) :].bool()
        past = int(mask.sum() - fresh.sum())
        one = slice(row, row + 1)
        held = read_row(self.cache, inputs, row, past, self.found.own[0].head_size)
        cross = [
            (inputs[key][one], inputs[value][one])
            for key, value in cross_names(len(self.found.cross))
        ]
        cache = EncoderDecoderCache(held, DynamicCache(cross))
        frames = inputs[FRAMES][one] if self.found.masked else None
        states = _states(self.found, cross[0][0], frames)
        logits = call(self.model, states, frames, ids[fresh].unsqueeze(0), cache)
        return logits[0, -1:], cache


class LoweredDecoder(nn.Module):
    """What is traced: the decoder on each row's own tokens, with ONNX Runtime's ops."""

    def __init__(
        self, model: Any, found: Survey, cache: CacheMap, *, plain: Collection[Role] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.found = found
        self.cache = cache
        self.plain = plain

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """As `EagerDecoder`; what the buffers hold beyond a row's tokens is left as it comes."""
        ids, mask = inputs[IDS], inputs[MASK]
        width, sequence = mask.shape[1], ids.shape[1]
        fresh = mask[:, width - sequence :]
        lengths, new = mask.sum(1), fresh.sum(1)
        past = lengths - new
        cross = [(inputs[key], inputs[value]) for key, value in cross_names(len(self.found.cross))]
        frames = inputs[FRAMES] if self.found.masked else None
        step = Step(
            keys=[inputs[layer[0]] for layer in self.cache.layers],
            values=[inputs[layer[1]] for layer in self.cache.layers],
            cross_keys=[key for key, _ in cross],
            cross_values=[value for _, value in cross],
            frames=None if frames is None else frames.to(torch.int32),
            seqlens_k=(lengths - 1).to(torch.int32),
            total=torch.full((), width, dtype=torch.int32),
            width=width,
            last=(new - 1).clamp(min=0),
            positions=past.unsqueeze(1) + torch.arange(sequence),
        )
        cache = GraphCache(len(cross), cross)
        lowering = Lowering(type(self.model).__name__, cache=cache, step=step, plain=self.plain)
        states = _states(self.found, cross[0][0], frames)
        with lowered(self.model, lowering):
            logits = call(
                self.model, states, frames, _leading(ids, fresh), cache, positions=step.positions
            )
        outputs = {LOGITS: logits}
        for layer, (_, _, key, value) in enumerate(self.cache.layers):
            outputs[key], outputs[value] = lowering.presents[layer]
        return outputs


def greedy(model: Any, feeds: Tensors, prompts: Sequence[Sequence[int]], most: int) -> Tensor:
    """transformers' own greedy tokens `[B, n]`, prompts included, rows that ended padded.

    Args:
        feeds: the encoder's inputs.
        prompts: ids by row, as many in each.
        most: new tokens.
    """
    with torch.no_grad(), quiet_transformers():
        # Whisper's own `generate` makes the prompt and cuts sounds; this is what it calls. The
        # cache that it would make has as many layers as the encoder.
        sequences: Tensor = GenerationMixin.generate(
            model,
            **{name: torch.from_numpy(value) for name, value in feeds.items()},
            **{cache_name(model): EncoderDecoderCache(DynamicCache(), DynamicCache())},
            decoder_input_ids=torch.tensor(prompts),
            max_new_tokens=most,
            num_beams=1,
            do_sample=False,
        )
    return sequences


def _leading(ids: Tensor, fresh: Tensor) -> Tensor:
    """`ids` with each row's real ones first: padding may be on either side."""
    batch, sequence = ids.shape
    # Padding goes to one place behind the row, which is cut off.
    places = torch.where(fresh != 0, fresh.cumsum(1) - 1, torch.full_like(fresh, sequence))
    return ids.new_zeros(batch, sequence + 1).scatter(1, places, ids)[:, :sequence]


def _states(found: Survey, key: Tensor, frames: Tensor | None) -> Any:
    """An output of the encoder of which the decoder looks at the sizes only: it has the keys."""
    states = found.states(last_hidden_state=key[:, 0])
    if found.stride is not None:
        states.attention_mask = frames
    return states
