"""An encoder-decoder model as two Parts, and the batches of parity."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmopt_export.caches import new_cache_map, padded, pasts, presents, valid_presents
from mmopt_export.encoder_decoder.modules import (
    EagerDecoder,
    EagerEncoder,
    LoweredDecoder,
    LoweredEncoder,
    greedy,
)
from mmopt_export.encoder_decoder.rules import read_rules
from mmopt_export.encoder_decoder.seq2seq import (
    DECODER,
    ENCODER,
    FRAMES,
    IDS,
    LOGITS,
    MASK,
    cross_names,
    ended,
)
from mmopt_export.encoder_decoder.survey import Survey, survey
from mmopt_export.encoder_decoder.tracing import trace_part
from mmopt_export.manifest import CacheMap
from mmopt_export.parity import RANDOM, is_random
from mmopt_export.parts import Part, Samples
from mmopt_export.runtime import Tensors

# Tokens of a row of a parity sample at most, within any model's positions.
_SAMPLE_LENGTH = 24
# Frames of the encoder that a parity sample's decoder sees: Whisper's 1500 would make every stored
# sample of a large model half a gigabyte.
_SAMPLE_FRAMES = 13
_REAL_FRAMES = 64
# Bytes of a sample's expected outputs, of which an artifact stores some: keys and values of all 32
# layers for one sound are half a gigabyte of a large Whisper.
_SAMPLE_BYTES = 16 << 20
_REAL_ROWS = 4
_REAL_BATCHES = 4


@dataclass(frozen=True)
class Encoder:
    """What an encoder reads.

    Attributes:
        inputs: examples to trace with, by name; `attention_mask` is the padding.
        axes: their symbolic dimensions.
        samples: the batches of parity.
        limits, minimums: the largest and the smallest value of a symbolic dimension.
        frames: for feeds, how many of the output's frames of each row mean something, bool
            `[batch, frames]`; None where all of them do.
    """

    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    samples: Samples
    limits: Mapping[str, int] = field(default_factory=dict)
    minimums: Mapping[str, int] = field(default_factory=dict)
    frames: Callable[[Tensors], Any] | None = None


def encoder_decoder_parts(
    model: Any, encoder: Encoder, *, prompt: Sequence[int], longest: int | None
) -> tuple[tuple[Part, Part], CacheMap]:
    """The two graphs of an encoder-decoder model and the map of the decoder's cache.

    `encoder` gives `cross.N.key|value` `[batch, heads, frames, head_size]` for every layer of the
    decoder, and `encoder_attention_mask` where padding of the input becomes another of frames.

    `decoder` is one graph for prefill and decode: `input_ids` int64 `[batch, sequence]`,
    `attention_mask` int64 `[batch, total]` (the last `sequence` columns are of the new tokens),
    `encoder_attention_mask` int64 `[batch, frames]` where the model has one, `cross.N.key|value`,
    `past_key_values.N.key|value` `[batch, heads, capacity, head_size]`, to `logits`
    `[batch, 1, vocabulary]` of each row's last token and `present.N.key|value`. Padding may be on
    either side of a prompt; several tokens after a past are for one row without padding. The
    buffers hold each row's tokens from 0.

    Args:
        model: a Hugging Face model, eval mode, fp32, on the CPU.
        encoder: what its encoder reads.
        prompt: what its decoder begins with.
        longest: positions that the decoder has; None where any number will do.

    Raises:
        InputError: the architecture needs something that the graphs cannot express; named.
    """
    found = survey(model, encoder.inputs)
    heads, layers = found.own[0].heads, len(found.own)
    cache = new_cache_map(layers, heads, found.head_size)
    cross = [name for pair in cross_names(layers) for name in pair]
    oracle = EagerEncoder(model, found).eval()
    encoder_part = Part(
        name=ENCODER,
        module=oracle,
        inputs=encoder.inputs,
        axes=encoder.axes,
        outputs=(*cross, *((FRAMES,) if found.stride is not None else ())),
        samples=encoder.samples,
        limits=encoder.limits,
        minimums=encoder.minimums,
        tracer=trace_part,
        kind="encoder",
        reference=lambda feeds: _some(oracle, cross, feeds),
        valid=_valid_frames(encoder.frames, cross, heads) if encoder.frames else None,
        lowered=LoweredEncoder(model, found).eval(),
    )
    decoder_oracle = EagerDecoder(model, found, cache).eval()
    batches = _Batches(model, found, cache, oracle, decoder_oracle, encoder, prompt, longest)
    size = found.cross[0].head_size
    # torch.export takes 0 and 1 for constants, and equal sizes for one symbol.
    example = {
        IDS: torch.zeros(2, 3, dtype=torch.int64),
        MASK: torch.ones(2, 7, dtype=torch.int64),
        **({FRAMES: torch.ones(2, 5, dtype=torch.int64)} if found.masked else {}),
        **{name: torch.zeros(2, heads, 5, size) for name in cross},
        **{name: torch.zeros(2, heads, 11, cache.head_size) for name in pasts(cache)},
    }
    axes = {
        IDS: {0: "batch", 1: "sequence"},
        MASK: {0: "batch", 1: "total"},
        **({FRAMES: {0: "batch", 1: "frames"}} if found.masked else {}),
        **{name: {0: "batch", 2: "frames"} for name in cross},
        **{name: {0: "batch", 2: "capacity"} for name in pasts(cache)},
    }
    decoder_part = Part(
        name=DECODER,
        module=decoder_oracle,
        inputs=example,
        axes=axes,
        outputs=(LOGITS, *presents(cache)),
        samples=batches,
        limits={"sequence": longest, "total": longest} if longest else {},
        scores=(LOGITS,),
        tracer=trace_part,
        kind="decoder",
        reference=lambda feeds: _some(decoder_oracle, presents(cache), feeds),
        valid=lambda feeds: _valid_rows(cache, feeds),
        lowered=LoweredDecoder(model, found, cache).eval(),
    )
    return (encoder_part, decoder_part), cache


def _some(oracle: Any, layers: Sequence[str], feeds: Tensors) -> Tensors:
    """What the oracle gives; of outputs that every layer has no more than fit in a sample.

    Where they do not all fit, samples have different layers, by what they hold.
    """
    outputs: dict[str, Tensor] = oracle(
        **{name: torch.from_numpy(value) for name, value in feeds.items()}
    )
    most = max(_SAMPLE_BYTES // outputs[layers[0]].nbytes, 2)
    first = zlib.crc32(next(iter(feeds.values())).tobytes()) % len(layers)
    left_out = {layers[(first + index) % len(layers)] for index in range(most, len(layers))}
    return {name: value.numpy() for name, value in outputs.items() if name not in left_out}


def _valid_frames(
    marked: Callable[[Tensors], Any], cross: Sequence[str], heads: int
) -> Callable[[Tensors], Tensors]:
    """`Part.valid` of an encoder: keys and values of frames that are padding mean nothing."""

    def valid(feeds: Tensors) -> Tensors:
        frames = marked(feeds)
        shape = (len(frames), heads, frames.shape[1])
        return dict.fromkeys(cross, np.broadcast_to(frames[:, None], shape))

    return valid


def _valid_rows(cache: CacheMap, feeds: Tensors) -> Tensors:
    """`Part.valid` of a decoder: of the buffers the rows up to each row's tokens."""
    mask = feeds[MASK]
    capacity = max(feeds[cache.layers[0][0]].shape[2], mask.shape[1])
    return valid_presents(cache, mask.sum(axis=1), capacity)


class _Batches:
    """`Part.samples` of a decoder: prefills and decode steps over batch, length and padding.

    Keys and values are the model's own, of the encoder's samples; tokens are random, and where
    there are real inputs also what the model says to them.
    """

    def __init__(
        self,
        model: Any,
        found: Survey,
        cache: CacheMap,
        oracle: EagerEncoder,
        decoder: EagerDecoder,
        encoder: Encoder,
        prompt: Sequence[int],
        longest: int | None,
    ) -> None:
        self.model = model
        self.prompt = list(prompt)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.found = found
        self.cache = cache
        self.oracle = oracle
        self.decoder = decoder
        self.encoder = encoder
        self.longest = min(_SAMPLE_LENGTH, longest or _SAMPLE_LENGTH) - 1

    def __call__(self) -> Iterator[tuple[str, Tensors]]:
        most = self.longest
        encoded = self._encoded()
        for kind, lengths, new in (
            ("prefill", [0], [[1] * most]),
            ("prefill", [0, 0], [[1] * 2] * 2),
            ("prefill-right", [0] * 3, padded([most, 1, most // 2], "right")),
            ("prefill-left", [0] * 3, padded([1, most, most // 2], "left")),
            ("decode", [most], [[1]]),
            ("decode-ragged", [1, most, most // 2], [[1]] * 3),
            # One row only: with more, ONNX Runtime's CPU kernel refuses several tokens after a
            # past.
            ("resume", [most // 2], [[1] * (most - most // 2)]),
        ):
            yield f"{RANDOM} {kind}", self._feeds(encoded, lengths, new)
        real = (one for one in self.encoder.samples() if not is_random(one[0]))
        for kind, feeds, *_ in itertools.islice(real, _REAL_BATCHES):
            yield kind, self._said({name: value[:_REAL_ROWS] for name, value in feeds.items()})

    def _said(self, feeds: Tensors) -> Tensors:
        """What the model itself says to real inputs, as one prompt."""
        rows = len(next(iter(feeds.values())))
        room = self.longest - len(self.prompt)
        tokens = greedy(self.model, feeds, [self.prompt] * rows, max(room, 1)).numpy()
        eos = read_rules(self.model).eos
        mask = np.zeros(tokens.shape, dtype=np.int64)
        for row, said in zip(mask, tokens.tolist(), strict=True):
            row[: len(self.prompt) + len(ended(said[len(self.prompt) :], eos))] = 1
        outputs = self.oracle(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        encoded = {
            name: outputs[name][:, :, :_REAL_FRAMES].numpy()
            for pair in cross_names(len(self.found.cross))
            for name in pair
        }
        if self.found.masked:
            frames = outputs[FRAMES].numpy() if FRAMES in outputs else feeds[MASK]
            encoded[FRAMES] = np.ascontiguousarray(frames[:, :_REAL_FRAMES])
        return {IDS: tokens, MASK: mask, **encoded, **self._buffers(tokens.shape)}

    def _buffers(self, shape: tuple[int, ...]) -> Tensors:
        """Empty ones for rows of so many tokens: attention in standard ops wants room for all."""
        size = (shape[0], self.cache.heads, shape[1] + 2, self.cache.head_size)
        return {name: np.zeros(size, dtype=np.float32) for name in pasts(self.cache)}

    def _encoded(self) -> dict[str, Tensor]:
        """The keys and values of one row of the encoder's longest random sample."""
        batches = (one[1] for one in self.encoder.samples() if is_random(one[0]))
        feeds = max(batches, key=_size_of_row)
        row = {name: torch.from_numpy(value[:1]) for name, value in feeds.items()}
        outputs = self.oracle(**row)
        return {name: outputs[name] for pair in cross_names(len(self.found.cross)) for name in pair}

    def _feeds(self, encoded: dict[str, Tensor], lengths: list[int], new: Any) -> Tensors:
        fresh = np.asarray(new, dtype=np.int64)
        rows, sequence = fresh.shape
        past = np.asarray(padded(lengths, "left"), dtype=np.int64).reshape(rows, -1)
        seed = int(past.sum() + fresh.sum()) + sequence
        generator = np.random.default_rng(seed)
        feeds = {name: _frames(value, rows) for name, value in encoded.items()}
        frames = next(iter(feeds.values())).shape[2]
        if self.found.masked:
            # Half of the second row and a third of the third, on different sides.
            mask = np.ones((rows, frames), dtype=np.int64)
            mask[1:2, frames - frames // 2 :] = 0
            mask[2:3, : frames // 3] = 0
            feeds[FRAMES] = mask
        buffers = self._buffers((rows, past.shape[1] + sequence))
        if past.size:
            before = {
                **feeds,
                IDS: generator.integers(0, self.vocabulary, past.shape),
                MASK: past,
                **buffers,
            }
            held = self.decoder(**{name: torch.from_numpy(one) for name, one in before.items()})
            for key, value, present_key, present_value in self.cache.layers:
                buffers[key], buffers[value] = (
                    held[present_key].numpy(),
                    held[present_value].numpy(),
                )
        return {
            IDS: generator.integers(0, self.vocabulary, fresh.shape),
            MASK: np.concatenate([past, fresh], axis=1),
            **feeds,
            **buffers,
        }


def _size_of_row(feeds: Tensors) -> int:
    return max(int(value[0].size) for value in feeds.values())


def _frames(encoded: Tensor, rows: int) -> Any:
    """`rows` different stretches of one row's frames, `[rows, heads, frames, head_size]`."""
    have = encoded.shape[2]
    count = min(_SAMPLE_FRAMES, have)
    starts = [row * count % max(have - count, 1) for row in range(rows)]
    return np.concatenate([encoded[:, :, one : one + count].numpy() for one in starts])
