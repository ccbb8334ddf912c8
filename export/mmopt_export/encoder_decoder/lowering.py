"""What an encoder-decoder model is traced with: its attention as ONNX Runtime's ops.

The Hugging Face modules run as they are. What they look up is replaced while they are traced:

encoder    attention as `com.microsoft::MultiHeadAttention`
self       attention of the decoder as `com.microsoft::GroupQueryAttention`, over shared buffers
cross      attention of the decoder as `MultiHeadAttention`, over keys and values from the encoder
masks      a word instead of a tensor: causal, or the padding
cache      `GraphCache`, which hands new keys and values on and has those of the encoder

For a target without ONNX Runtime's own ops, attention and the update of the buffers are standard
ops instead.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.onnx import ops
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from mmopt_export.lowering import (
    PendingCache,
    group_query_attention,
    merge_heads,
    without_last_nones,
)
from mmopt_kernels.errors import InputError

# Tensors that attention may be called with: a bias is added to the scores, positions are unused.
_KNOWN_TENSORS = ("position_bias", "position_ids")

Role = Literal["encoder", "self", "cross"]


@dataclass(frozen=True)
class Causal:
    """A mask: a token sees those before it and itself."""


@dataclass(frozen=True)
class Padding:
    """A mask: every query sees the keys that `mask` `[batch, keys]` marks; None sees them all."""

    mask: Tensor | None


@dataclass(frozen=True)
class Attention:
    """One call of attention, as the survey found it.

    Attributes:
        role: whose it is.
        module: which module called.
        layer: index of the decoder's layer, or the count of the encoder's.
        heads: of queries, and as many of keys and values.
        head_size: of the keys and values that are kept, before attention fills them with zeros.
        scale: what scores are multiplied with.
        masked: whether it came with a mask of padding.
        biased: whether it came with something to add to the scores.
    """

    role: Role
    module: nn.Module
    layer: int
    heads: int
    head_size: int
    scale: float
    masked: bool
    biased: bool


@dataclass(frozen=True)
class Step:
    """What the decoder's attention takes from the graph's inputs.

    Attributes:
        keys, values: `[batch, heads, capacity, head_size]` by layer, each row's tokens from 0.
        cross_keys, cross_values: `[batch, heads, frames, head_size]` by layer.
        frames: int32 `[batch, frames]`, 1 where the encoder's output means something; None where
            all of it does.
        seqlens_k: int32 `[batch]`, tokens of each row in the cache after this call, less one.
        total: int32 scalar, the most of them.
        width: the same as a size.
        last: int64 `[batch]`, the index of each row's last token among the new ones.
        positions: int64 `[batch, sequence]` of the new tokens.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    cross_keys: Sequence[Tensor]
    cross_values: Sequence[Tensor]
    frames: Tensor | None
    seqlens_k: Tensor
    total: Tensor
    width: int
    last: Tensor
    positions: Tensor


class GraphCache(EncoderDecoderCache):
    """The cache that a decoder is called with.

    Args:
        layers: of the decoder.
        cross: keys and values of the encoder's output by layer; None lets the model make them.
    """

    def __init__(self, layers: int, cross: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        # Empty at first: looking at the sizes of the keys would fix them in the trace.
        super().__init__(PendingCache(layers, refusal), DynamicCache())
        if cross is None:
            self.is_updated = dict.fromkeys(range(layers), False)
            return
        filled = self.cross_attention_cache
        filled.layers = [_Filled(keys, values) for keys, values in cross]
        self.is_updated = dict.fromkeys(range(layers), True)


class _Filled(DynamicLayer):
    """A layer of the cache that has its keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class Lowering:
    """One forward of an encoder or a decoder under replacement.

    Args:
        name: the architecture, for messages.
        cache: of the decoder; None for an encoder.
        step: what the trace's attention takes; None for an encoder, and for the survey.
        sampled: for an encoder that is called without a mask, the mask of its input, int64
            `[batch, samples]`, and how many samples a frame is after the one before: a frame is
            padding where its first sample is.
        plain: the roles whose attention is standard ops.
        surveys: whether real tensors come, of which attention gives zeros.
    """

    def __init__(
        self,
        name: str,
        *,
        cache: GraphCache | None = None,
        step: Step | None = None,
        sampled: tuple[Tensor, int] | None = None,
        plain: Collection[Role] = (),
        surveys: bool = False,
    ) -> None:
        self.name = name
        self.cache = cache
        self.step = step
        self.found: list[Attention] = []
        self.heads = 0
        self.presents: dict[int, tuple[Tensor, Tensor]] = {}
        self.frames: Tensor | None = None
        self._sampled = sampled
        self._plain = plain
        self._surveys = surveys
        self._mask: Padding | None = None

    # ---------------------------------------------------------------- attention

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Attention of one module: `[batch, sequence, heads, head_size]`.

        Args:
            query: `[batch, heads, sequence, head_size]`.
            key, value: `[batch, heads, keys, head_size]`.

        Raises:
            InputError: something that the ops have no place for.
        """
        role, layer, kept = self._whose(key)
        self._require_expressible(role, layer, module, query, key, value, mask, arguments)
        self.found.append(
            Attention(
                role=role,
                module=module,
                layer=layer,
                heads=query.shape[1],
                head_size=kept.shape[3],
                scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
                masked=isinstance(mask, Padding) and mask.mask is not None,
                biased=arguments.get("position_bias") is not None,
            )
        )
        bias = arguments.get("position_bias")
        if role == "self":
            return self._attend_to_cache(self.found[-1], query, key, value, bias)
        if role == "cross":
            return self._attend_to_encoder(self.found[-1], query, bias)
        if self._surveys:
            return torch.zeros_like(query).transpose(1, 2)
        padding = self._padding(mask, key.shape[2])
        if role in self._plain:
            return _plain_attention(
                self.found[-1].scale, query, key, value, _as_bias(padding, bias)
            )
        return _multi_head_attention(
            self.found[-1].scale, query, merge_heads(key), merge_heads(value), padding, bias
        )

    def _whose(self, key: Tensor) -> tuple[Role, int, Tensor]:
        """The role and the layer of a call, and the keys that are kept for it."""
        if self.cache is None:
            return "encoder", len(self.found), key
        pending = self.cache.self_attention_cache.pending
        if pending is not None:
            return "self", pending[0], pending[1]
        layer = sum(one.role == "cross" for one in self.found)
        made = self.cache.cross_attention_cache.layers
        if layer >= len(made):
            raise refusal(f"{self.name} attends to something that it put into no cache")
        return "cross", layer, made[layer].keys

    def _attend_to_cache(
        self, call: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        assert self.cache is not None
        held = self.cache.self_attention_cache
        _, fresh_key, fresh_value = held.pending
        held.pending = None
        if self._surveys:
            _require_same(self.name, call.layer, ((fresh_key, key), (fresh_value, value)))
            return torch.zeros_like(query).transpose(1, 2)
        assert self.step is not None
        past_key, past_value = self.step.keys[call.layer], self.step.values[call.layer]
        size, wanted = past_key.shape[3], query.shape[3]
        q, k, v = (_fit(one, size) for one in (query, fresh_key, fresh_value))
        if "self" in self._plain:
            return _fit(self._attend_plainly(call, q, k, v, bias), wanted)
        output, self.presents[call.layer] = group_query_attention(
            q,
            k,
            v,
            (past_key, past_value),
            (self.step.seqlens_k, self.step.total),
            {"scale": call.scale},
            bias=bias,
        )
        return _fit(output, wanted)

    def _attend_plainly(
        self, call: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Self-attention over buffers that are large enough, in standard ops."""
        assert self.step is not None
        capacity = self.step.keys[call.layer].shape[2]
        keys, values = (
            _updated(past, fresh, self.step.positions)
            for past, fresh in (
                (self.step.keys[call.layer], key),
                (self.step.values[call.layer], value),
            )
        )
        self.presents[call.layer] = (keys, values)
        # Buffers may hold more than there are tokens: what is behind a query is masked.
        ahead = torch.arange(capacity) > self.step.positions.unsqueeze(2)
        masked = _masked(ahead.unsqueeze(1))
        if bias is not None:
            width = bias.shape[3]
            masked = nn.functional.pad(bias, (0, capacity - width)) + masked
        return _plain_attention(call.scale, query, keys, values, masked)

    def _attend_to_encoder(self, call: Attention, query: Tensor, bias: Tensor | None) -> Tensor:
        if self._surveys:
            if bias is not None and bias.any():
                raise refusal(f"layer {call.layer} of {self.name} adds a bias to cross-attention")
            return torch.zeros_like(query).transpose(1, 2)
        assert self.step is not None
        keys, values = self.step.cross_keys[call.layer], self.step.cross_values[call.layer]
        padding = self.step.frames if call.masked else None
        fitted = _fit(query, keys.shape[3])
        if "cross" in self._plain:
            attended = _plain_attention(call.scale, fitted, keys, values, _as_bias(padding, None))
        else:
            attended = _multi_head_attention(call.scale, fitted, keys, values, padding, None)
        return _fit(attended, query.shape[3])

    def _padding(self, mask: Causal | Padding | None, count: int) -> Tensor | None:
        """The mask of an encoder's `count` keys as the op wants it, made once per forward."""
        if self._sampled is not None:
            if self.frames is None:
                samples, stride = self._sampled
                # Looked up and not cut: where the last frame ends is nothing that a trace can say.
                self.frames = samples[:, torch.arange(count) * stride].to(torch.int32)
            return self.frames
        if not isinstance(mask, Padding) or mask.mask is None:
            return None
        if self.frames is None or mask is not self._mask:
            self.frames, self._mask = mask.mask.to(torch.int32), mask
        return self.frames

    def _require_expressible(
        self,
        role: Role,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        arguments: dict[str, Any],
    ) -> None:
        where = f"{role} attention {layer} of {self.name}"
        if query.shape[1] != key.shape[1]:
            raise refusal(
                f"{where} has {query.shape[1]} heads for {key.shape[1]} of keys, expected as many"
            )
        if query.shape[3] != value.shape[3] or key.shape[1] != value.shape[1]:
            raise refusal(f"{where} has other heads of values than of queries and keys")
        if role == "self" and not isinstance(mask, Causal):
            raise refusal(f"{where} comes without a causal mask")
        if role != "self" and not (mask is None or isinstance(mask, Padding)):
            raise refusal(f"{where} has a mask that is more than padding")
        unknown = [
            name
            for name, argument in arguments.items()
            if (isinstance(argument, Tensor) and name not in _KNOWN_TENSORS)
            or (name in ("sliding_window", "softcap") and argument is not None)
        ]
        if unknown:
            raise refusal(f"{where} is called with {', '.join(unknown)}")

    # ---------------------------------------------------------------- masks

    def mask(self, function: Callable[..., Any], padding: Tensor | None) -> Causal | Padding:
        """The mask that transformers composed.

        Raises:
            InputError: it is neither causal nor only padding.
        """
        if function is causal_mask_function:
            return Causal()
        if function is bidirectional_mask_function and (padding is None or padding.dim() == 2):
            return Padding(padding)
        raise refusal(
            f"{self.name} uses a mask that is neither causal nor padding (a window, chunks or the "
            "like)"
        )


def _multi_head_attention(
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`[batch, sequence, heads, head_size]`.

    Args:
        query: `[batch, heads, sequence, head_size]`.
        key, value: `[batch, heads, keys, head_size]` or `[batch, keys, heads * head_size]`.
        padding: int32 `[batch, keys]`.
        bias: `[1 or batch, heads, sequence, keys]`.
    """
    batch, heads, sequence, size = query.shape
    # The bias of the projections comes before these two.
    optional = without_last_nones(None, padding, bias)
    merged = merge_heads(query)
    output: Tensor = ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [merged, key, value, *optional],
        # As transformers masks; the op's own -10000 is not enough for scores without a scale.
        {"num_heads": heads, "scale": scale, "mask_filter_value": torch.finfo(query.dtype).min},
        dtype=query.dtype,
        shape=merged.shape,
        version=1,
    )
    return output.view(batch, sequence, heads, size)


def _plain_attention(
    scale: float, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    """As `_multi_head_attention`, of states that are all `[batch, heads, tokens, head_size]`."""
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if bias is not None:
        scores = scores + bias
    return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2)


def _as_bias(padding: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """What is added to scores `[batch, heads, sequence, keys]` for both of them."""
    if padding is None:
        return bias
    masked = _masked(padding[:, None, None] == 0)
    return masked if bias is None else bias + masked


def _masked(hidden: Tensor) -> Tensor:
    """What is added to scores: nothing, or so much that a key is not seen."""
    # Chosen and not multiplied: in half precision the value becomes infinite, and 0 times that NaN.
    nothing = torch.zeros((), dtype=torch.float32)
    return torch.where(hidden, torch.full_like(nothing, torch.finfo(torch.float32).min), nothing)


def _updated(past: Tensor, fresh: Tensor, positions: Tensor) -> Tensor:
    """A buffer `[batch, heads, capacity, size]` with the rows at `positions` from `fresh`."""
    sequence = fresh.shape[2]
    place = torch.arange(past.shape[2]) - positions[:, :1]
    wanted = place.clamp(min=0).clamp(max=sequence - 1)[:, None, :, None].expand_as(past)
    inside = ((place >= 0) & (place < sequence))[:, None, :, None]
    return torch.where(inside, fresh.gather(2, wanted), past)


def _require_same(name: str, layer: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for fresh, given in pairs:
        if not torch.equal(_fit(fresh, given.shape[3]), given):
            raise refusal(
                f"layer {layer} of {name} attends to other keys than it put into the cache"
            )


def _fit(states: Tensor, size: int) -> Tensor:
    """Fill or cut the last dimension: what is cut had been filled with zeros."""
    have = states.shape[-1]
    if have == size:
        return states
    return nn.functional.pad(states, (0, size - have)) if have < size else states[..., :size]


def refusal(reason: str) -> InputError:
    """The error of a model that cannot be exported."""
    return InputError(
        f"cannot export this encoder-decoder model: {reason}. Use an architecture with attention "
        "through transformers' attention interface, such as Whisper or T5."
    )
