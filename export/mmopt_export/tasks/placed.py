"""Decoders whose tokens need more than their number in a row: positions in images, or blocks.

Beside a decoder's own inputs the graph takes one value for each new token, in the order of each
row's real tokens from column 0, whatever the padding in `attention_mask`; what is behind them means
nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmopt_export.caches import presents
from mmopt_export.decoder.lowering import Buffers, Lowering
from mmopt_export.decoder.part import (
    EMBEDS,
    MASK,
    Extra,
    LoweredDecoder,
    cache_map,
    decoder_part,
)
from mmopt_export.decoder.tracing import trace_decoder
from mmopt_export.lowering import IMPLEMENTATION, cache_name
from mmopt_export.multimodal import ENDS, POSITIONS
from mmopt_export.parts import Part
from mmopt_export.runtime import Tensors


class _Placed(nn.Module):
    """A model whose forward finds the value of each new token in `given`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.given: Tensor | None = None
        self._cache = cache_name(model)

    def get_input_embeddings(self) -> Any:
        """The model's own."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The model's own."""
        return self.model.get_output_embeddings()

    @contextlib.contextmanager
    def bind(self, name: str, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the forwards inside the values of the input `name`."""
        self.given = inputs[name]
        try:
            yield
        finally:
            self.given = None

    def place(self, tokens: Tensor) -> Tensor:
        """`given` for the tokens at hand, which may be fewer than its columns."""
        assert self.given is not None
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        return self.given.index_select(self.given.dim() - 1, columns)


class _Positioned(_Placed):
    """Rotary positions that are not a token's number: temporal, height and width."""

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, cache: Any, **arguments: Any
    ) -> Any:
        """As the model's, with `given` `[3, batch, tokens]` for the positions."""
        return self.model(
            inputs_embeds=inputs_embeds,
            position_ids=self.place(inputs_embeds),
            **{self._cache: cache},
            **arguments,
        )


class _Blocked(_Placed):
    """Blocks of tokens that see each other both ways: each token has the end of what it sees."""

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, cache: Any, **arguments: Any
    ) -> Any:
        """As the model's, with `given` `[batch, tokens]` for how far each token sees."""
        config = self.config.get_text_config()
        if config._attn_implementation != IMPLEMENTATION:
            keys = torch.arange(int(self.place(inputs_embeds).max().clamp(min=1)))
            arguments["attention_mask"] = {
                kind: _mask(self.place(inputs_embeds), position_ids, keys, window)
                for kind, window in (
                    ("full_attention", None),
                    ("sliding_attention", config.sliding_window),
                )
            }
        return self.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **{self._cache: cache},
            **arguments,
        )


def _mask(ends: Tensor, positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """What is added to scores, `[batch, 1, tokens, keys]`: 0, or much less for keys not seen."""
    seen = keys < ends[..., None]
    if window is not None:
        seen = seen & (keys > positions[..., None] - window)
    # Not -inf: a row of padding may see nothing, and its softmax would be NaN. Half precision has
    # no -65505, and the softmax of what is 30000 less is 0.
    return torch.where(seen, 0.0, -30000.0).unsqueeze(1)


class _BlockLowering(Lowering):
    """GroupQueryAttention without its causal mask, and with ours as a bias."""

    def __init__(self, *arguments: Any, ends: Tensor, positions: Tensor, keys: Tensor) -> None:
        super().__init__(*arguments)
        self._seen = (ends, positions, keys)
        self._masks: dict[int | None, Tensor] = {}

    def _bias(self, window: int | None) -> Tensor:
        if window not in self._masks:
            self._masks[window] = _mask(*self._seen, window)
        return self._masks[window]


class _LoweredBlocks(LoweredDecoder):
    """`LoweredDecoder` on `_BlockLowering`."""

    def lowering(self, buffers: Buffers, tokens: Tensor, position_ids: Tensor) -> Lowering:
        """As `LoweredDecoder.lowering`."""
        count: Any = buffers.total.item()
        torch._check(count >= 1)  # type: ignore[no-untyped-call]
        return _BlockLowering(
            type(self.model).__name__,
            self.positions,
            len(buffers.keys),
            self.found,
            buffers,
            ends=self.model.place(tokens),
            positions=position_ids,
            keys=torch.arange(count),
        )


def as_decoder(part: Part) -> Part:
    """A part of `decoder_part` that is traced as one, and held against what its targets can run."""
    # On CUDA the graph does not drop the padding of a chunk after a past: see `trace_decoder`.
    return replace(part, tracer=trace_decoder, excluded={"cuda": ("resume-padded",)})


def positioned_part(model: Any, *, name: str) -> Part:
    """A decoder with `rope_positions` int64 `[3, batch, places]`: see the module and `_Positioned`.

    Raises:
        InputError: the architecture needs something that the graph cannot express; named.
    """
    example = torch.arange(18).reshape(3, 2, 3)
    axes = {1: "batch", 2: "places"}

    def values(mask: Any, new: int) -> Any:
        generator = np.random.default_rng(int(mask.sum()))
        return generator.integers(0, 64, (3, len(mask), new)).astype(np.int64)

    return _placed_part(_named(_Positioned, model), POSITIONS, example, axes, values, name)


def blocked_part(model: Any, *, name: str) -> Part:
    """A decoder with `visible_ends` int64 `[batch, places]`: see the module and `_Blocked`.

    A token sees its row's keys before that number, which counts from the row's first token; its
    own number plus one is what a causal mask lets it see. Windows end before it all the same.

    Raises:
        InputError: the architecture needs something that the graph cannot express; named.
    """
    example = torch.tensor([[2, 2, 3], [1, 3, 3]])
    axes = {0: "batch", 1: "places"}

    def values(mask: Any, new: int) -> Any:
        fresh = mask[:, mask.shape[1] - new :].sum(axis=1, keepdims=True)
        past = mask.sum(axis=1, keepdims=True) - fresh
        columns = np.arange(new)
        # Blocks of 4, cut where the row ends.
        ends = past + np.minimum((columns // 4 + 1) * 4, np.maximum(fresh, 1))
        return np.where(columns % 8 < 4, ends, past + columns + 1).astype(np.int64)

    part = _placed_part(_named(_Blocked, model), ENDS, example, axes, values, name)
    plain = part.lowered
    assert isinstance(plain, LoweredDecoder)
    blocks = _LoweredBlocks(plain.model, plain.found, plain.positions, plain.extra)
    return replace(part, lowered=blocks.eval())


def _named(kind: type[_Placed], model: Any) -> Any:
    """A wrapper under the model's own name, which messages give."""
    return type(type(model).__name__, (kind,), {})(model).eval()


def _placed_part(
    model: Any,
    name_of_input: str,
    example: Tensor,
    axes: dict[int, str],
    values: Callable[[Any, int], Any],
    name: str,
) -> Part:
    extra = Extra(
        inputs={name_of_input: example},
        axes={name_of_input: axes},
        bind=lambda inputs: model.bind(name_of_input, inputs),
    )
    part = decoder_part(model, name=name, embeds=True, extra=extra)

    def samples() -> Iterator[tuple[str, Tensors]]:
        for kind, feeds, *_ in part.samples():
            mask, new = feeds[MASK], feeds[EMBEDS].shape[1]
            yield kind, {**feeds, name_of_input: values(mask, new)}

    def reference(feeds: Tensors) -> Tensors:
        """Row by row: a row's values belong to its own tokens."""
        given = feeds[name_of_input]
        rows = []
        for row in range(len(feeds[MASK])):
            one = {name: value[row : row + 1] for name, value in feeds.items()}
            one[name_of_input] = given[..., row : row + 1, :]
            rows.append(part.expect(one))
        outputs = {part.outputs[0]: np.concatenate([one[part.outputs[0]] for one in rows])}
        for name in presents(cache_map(part)):
            most = max(one[name].shape[2] for one in rows)
            outputs[name] = np.concatenate(
                [
                    np.pad(one[name], ((0, 0), (0, 0), (0, most - one[name].shape[2]), (0, 0)))
                    for one in rows
                ]
            )
        return outputs

    return as_decoder(replace(part, samples=samples, reference=reference))
