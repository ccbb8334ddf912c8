"""A decoder as a Part: its inputs and outputs, the eager oracle, and the batches of parity."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mmopt_export.caches import (
    fill_presents,
    new_cache_map,
    padded,
    pasts,
    presents,
    read_row,
    valid_presents,
)
from mmopt_export.decoder.lowering import (
    Buffers,
    Lowering,
    Survey,
    call,
    lowered,
    require_positions_from_0,
    steady_positions,
    survey,
)
from mmopt_export.lowering import attention_implementation
from mmopt_export.manifest import CacheMap
from mmopt_export.parts import Part
from mmopt_export.runtime import Tensors
from mmopt_kernels.errors import InputError

IDS = "input_ids"
EMBEDS = "inputs_embeds"
MASK = "attention_mask"
LOGITS = "logits"

# Masks are evaluated at this many positions at most: beyond any window that a published decoder
# has (131072 is the largest context among those we support), and 24 rows of it cost 3 MB.
_MOST_POSITIONS = 131072

SAMPLE_CAPACITY = 24
"""Tokens in the cache of a parity sample; with the new ones still within any model's positions."""


@dataclass(frozen=True)
class Extra:
    """Graph inputs besides a decoder's own: an adapter's A and B, say.

    Attributes:
        inputs: examples by name, as in `Part.inputs`.
        axes: their symbolic dimensions, as in `Part.axes`.
        bind: entered around every forward of the model with these inputs by name, so that wrapped
            modules find them: the tensors of the trace, or those of a parity sample.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    axes: Mapping[str, dict[int, str]] = field(default_factory=dict)
    bind: Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]] = lambda _: (
        contextlib.nullcontext()
    )

    def __or__(self, other: "Extra") -> "Extra":
        """Both, the inputs of `other` last."""

        @contextlib.contextmanager
        def bind(inputs: Mapping[str, Tensor]) -> Iterator[None]:
            with self.bind(inputs), other.bind(inputs):
                yield

        return Extra({**self.inputs, **other.inputs}, {**self.axes, **other.axes}, bind)


class EagerDecoder(nn.Module):
    """The oracle: the Hugging Face model in eager attention, one row at a time, without padding.

    Its interface is the graph's. Rows are taken apart by the mask, so that no padding reaches the
    model, and a row's past is what its buffers hold.
    """

    def __init__(self, model: Any, cache: CacheMap, extra: Extra | None = None) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.extra = extra or Extra()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Logits of each row's last new token and the filled buffers.

        Args:
            inputs: `input_ids` int64 `[B, S]` (or `inputs_embeds` `[B, S, H]`), `attention_mask`
                int64 `[B, T]` whose last S columns are of the new tokens, past buffers by name,
                `[B, kv_heads, C, head_size]` with each row's tokens from 0.

        Returns:
            `logits` `[B, 1, V]`, and presents `[B, kv_heads, max(C, longest row), head_size]`,
            zero beyond a row's tokens. A row without a new token has zero logits.
        """
        extra = {name: inputs.pop(name) for name in list(inputs) if name in self.extra.inputs}
        mask = inputs.pop(MASK)
        new = inputs.pop(IDS if IDS in inputs else EMBEDS)
        with (
            torch.no_grad(),
            attention_implementation(self.model, "eager"),
            self.extra.bind(extra),
        ):
            rows = [self._row(new, mask, inputs, row) for row in range(len(new))]
        capacity = max(next(iter(inputs.values())).shape[2], int(mask.sum(1).max()))
        filled = fill_presents(self.cache, [held for _, held in rows], capacity)
        return {LOGITS: torch.stack([logits for logits, _ in rows]), **filled}

    def _row(
        self, new: Tensor, mask: Tensor, buffers: dict[str, Tensor], row: int
    ) -> tuple[Tensor, DynamicCache]:
        fresh = mask[row, mask.shape[1] - new.shape[1] :].bool()
        past = int(mask[row].sum() - fresh.sum())
        cache = read_row(self.cache, buffers, row, past, self.cache.head_size)
        if not fresh.any():
            return torch.zeros(1, self.model.config.get_text_config().vocab_size), cache
        inputs = {
            IDS if new.dim() == 2 else EMBEDS: new[row : row + 1, fresh],
            "position_ids": torch.arange(past, past + int(fresh.sum())).unsqueeze(0),
        }
        return call(self.model, cache, inputs)[0, -1:], cache


class LoweredDecoder(nn.Module):
    """What is traced: the model on compacted rows, with ONNX Runtime's ops.

    `trace_decoder` puts a prelude before it that makes these inputs of the graph's.
    """

    def __init__(self, model: Any, found: Survey, positions: int, extra: Extra) -> None:
        super().__init__()
        self.model = model
        self.found = found
        self.positions = positions
        self.extra = extra

    def with_extra(self, extra: Extra) -> "LoweredDecoder":
        """The same with further inputs, after those that it has."""
        other = copy.copy(self)
        other.extra = self.extra | extra
        return other

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total: Tensor,
        last: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        extra: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """Logits `[B, 1, V]` and the presents, key and value by layer.

        Args:
            tokens: ids `[B, S]` or embeddings `[B, S, H]`, each row's real ones first.
            position_ids: int64 `[B, S]`.
            seqlens_k, total, last, keys, values: as `lowering.Buffers` has them.
            extra: `Extra.inputs`, as tensors of the trace.
        """
        inputs = {IDS if tokens.dim() == 2 else EMBEDS: tokens, "position_ids": position_ids}
        buffers = Buffers(keys, values, seqlens_k, total, last)
        with self.extra.bind(extra):
            lowering = self.lowering(buffers, tokens, position_ids)
            with lowered(self.model, lowering):
                logits = call(self.model, lowering.cache, inputs)
        return (logits, *(one for layer in range(len(keys)) for one in lowering.presents[layer]))

    def lowering(self, buffers: Buffers, tokens: Tensor, position_ids: Tensor) -> Lowering:
        """What the model runs under, for arguments of `forward`."""
        name = type(self.model).__name__
        return Lowering(name, self.positions, len(buffers.keys), self.found, buffers)


def decoder_part(
    model: Any, *, name: str = "decoder", embeds: bool = False, extra: Extra | None = None
) -> Part:
    """A causal language model as one graph for prefill and decode.

    Args:
        model: a Hugging Face causal language model, eval mode, fp32, on the CPU.
        name: of the part.
        embeds: whether the graph takes `inputs_embeds` `[batch, sequence, hidden]` instead of
            `input_ids`: for models whose embeddings are made elsewhere.
        extra: graph inputs beside the decoder's own.

    Returns:
        A Part whose graph `trace_decoder` makes: `input_ids` int64 `[batch, sequence]`,
        `attention_mask` int64 `[batch, total]` (the last `sequence` columns are of the new
        tokens), `past_key_values.N.key|value` `[batch, kv_heads, capacity, head_size]`, to
        `logits` `[batch, 1, vocabulary]` of each row's last token and `present.N.key|value`.
        Padding may be anywhere in the mask; the buffers hold each row's tokens from 0. The limit
        of `total` is the model's positions, of `longrope` models those before it changes.

    Raises:
        InputError: the architecture needs something that the graph cannot express; named.
    """
    extra = extra or Extra()
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    limit = steady_positions(config)
    if limit and limit < 3:  # what samples take: a past, and two new tokens
        raise InputError(f"{type(model).__name__} has {limit} positions, expected at least 3.")
    positions = min(limit or _MOST_POSITIONS, _MOST_POSITIONS)
    # Not from 0: there rotations turn nothing and every formula looks right.
    tokens = _tokens(model, (2, 2), embeds, seed=0)
    offset = min(3, positions - 2)
    inputs = {
        EMBEDS if embeds else IDS: tokens,
        "position_ids": torch.arange(offset, offset + 2).expand(2, -1).contiguous(),
    }
    with extra.bind(extra.inputs):
        found = survey(model, inputs, positions, layers)
        if not embeds:
            require_positions_from_0(model, tokens)
    cache = new_cache_map(layers, found.attentions[0].kv_heads, found.attentions[0].head_size)
    module = EagerDecoder(model, cache, extra).eval()
    batches = _Batches(model, cache, embeds, extra, positions)
    # torch.export takes 0 and 1 for constants, and equal sizes for one symbol: hence 2, 3 and 5.
    example = {
        EMBEDS if embeds else IDS: _tokens(model, (2, 3), embeds, seed=0),
        MASK: torch.ones(2, 3, dtype=torch.int64),
        **{past: torch.zeros(2, cache.heads, 5, cache.head_size) for past in pasts(cache)},
        **extra.inputs,
    }
    axes = {
        EMBEDS if embeds else IDS: {0: "batch", 1: "sequence"},
        MASK: {0: "batch", 1: "total"},
        **{past: {0: "batch", 2: "capacity"} for past in pasts(cache)},
        **extra.axes,
    }
    return Part(
        name=name,
        module=module,
        inputs=example,
        axes=axes,
        outputs=(LOGITS, *presents(cache)),
        samples=batches,
        limits={"total": limit} if limit else {},
        scores=(LOGITS,),
        valid=lambda feeds: valid_rows(cache, feeds),
        lowered=LoweredDecoder(model, found, positions, extra).eval(),
    )


def cache_map(part: Part) -> CacheMap:
    """The KV cache of a decoder's part, for the manifest.

    Raises:
        InputError: the part is not of `decoder_part`.
    """
    if not isinstance(part.module, EagerDecoder):
        raise InputError(f"the part {part.name} is no decoder and has no cache.")
    return part.module.cache


def valid_rows(cache: CacheMap, feeds: Tensors) -> Tensors:
    """Which rows of each output mean something: `Part.valid`.

    Logits of rows with a new token; of the buffers the rows up to each row's tokens.
    """
    mask = feeds[MASK]
    new = next(feeds[name] for name in (IDS, EMBEDS) if name in feeds)
    lengths = mask.sum(axis=1)
    capacity = max(feeds[cache.layers[0][0]].shape[2], int(lengths.max()))
    fresh = mask[:, mask.shape[1] - new.shape[1] :]
    return {LOGITS: np.asarray(fresh.any(axis=1)), **valid_presents(cache, lengths, capacity)}


class _Batches:
    """`Part.samples`: prefills and decode steps over batch, length and padding."""

    def __init__(
        self, model: Any, cache: CacheMap, embeds: bool, extra: Extra, positions: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.embeds = embeds
        self.extra = extra
        self.longest = min(SAMPLE_CAPACITY - 1, positions - 1)

    def __call__(self) -> Iterator[tuple[str, Tensors]]:
        most = self.longest
        yield "prefill", self._prefill([[1] * most])
        yield "prefill", self._prefill([[1] * 2, [1] * 2])
        yield "prefill-right", self._prefill(padded([most, 1, most // 2], "right"))
        yield "prefill-left", self._prefill(padded([1, most, most // 2], "left"))
        yield "prefill-room", self._prefill(padded([most // 2, 2], "right"), SAMPLE_CAPACITY)
        yield "decode", self._decode([most])
        yield "decode-ragged", self._decode([1, most, most // 2])
        yield "resume", self._decode([most // 2], new=[1] * (most - most // 2))
        # One row only: with more, ONNX Runtime's CPU kernel refuses several tokens after a past.
        yield "resume-padded", self._decode([most // 2], new=[0, 1, 1, 0])

    def _prefill(self, mask: list[list[int]], capacity: int = 0) -> Tensors:
        return self._feeds(np.asarray(mask, dtype=np.int64), len(mask[0]), capacity)

    def _decode(self, lengths: list[int], new: list[int] | None = None) -> Tensors:
        fresh = new or [1]
        past = padded(lengths, "left")
        mask = np.asarray([row + fresh for row in past], dtype=np.int64)
        return self._feeds(mask, len(fresh), SAMPLE_CAPACITY + len(fresh))

    def _feeds(self, mask: Any, new: int, capacity: int) -> Tensors:
        seed = int(mask.sum()) + new
        shape = (len(mask), new)
        generator = np.random.default_rng(seed)
        buffer = (len(mask), self.cache.heads, capacity, self.cache.head_size)
        lengths = mask[:, : mask.shape[1] - new].sum(axis=1)
        held = (np.arange(capacity) < lengths[:, None])[:, None, :, None]
        return {
            EMBEDS if self.embeds else IDS: _tokens(self.model, shape, self.embeds, seed).numpy(),
            MASK: mask,
            **{
                past: (generator.standard_normal(buffer) * held).astype(np.float32)
                for past in pasts(self.cache)
            },
            **{name: one.numpy() for name, one in self.extra.inputs.items()},
        }


def _tokens(model: Any, shape: tuple[int, int], embeds: bool, seed: int) -> Tensor:
    """Random ids `[B, S]`, or the model's embeddings of them."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, shape, generator=generator)
    if not embeds:
        return ids
    with torch.no_grad():
        embedded: Tensor = model.get_input_embeddings()(ids)
    return embedded
