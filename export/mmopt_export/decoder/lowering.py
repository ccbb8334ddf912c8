"""What a decoder is traced with: its attention, cache, rotation and norms as ONNX Runtime's ops.

The Hugging Face model runs as it is. What it looks up by name is replaced while it is traced:

attention  `com.microsoft::GroupQueryAttention`, through transformers' AttentionInterface
masks      a `Window` instead of a tensor, through AttentionMaskInterface
cache      `PendingCache`, which hands the new keys and values on
rotation   `com.microsoft::RotaryEmbedding`, where `apply_rotary_pos_emb` is that rotation
norms      RMSNorm in the form that ONNX Runtime fuses
head       runs on the last token of each row only

A survey with real tensors comes first. It proves each replacement against the model's own code
(masks are evaluated, rotations and norms compared), and what differs is refused by name or left as
the model has it. The trace then repeats what the survey found, call by call.
"""

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import ops
from transformers.cache_utils import Cache

from mmopt_export.lowering import (
    PendingCache,
    answered_by,
    cache_name,
    group_query_attention,
    last_tokens,
    merge_heads,
    refusing,
)
from mmopt_kernels.errors import InputError

# Positions at which a mask is evaluated, besides those around its window: enough to tell causal,
# windowed, chunked, prefix and block masks apart, few enough to cost nothing.
_PROBED_ROWS = (0, 1, 2, 3, 5, 8, 13, 21, 33, 65, 130)

# Larger than the rounding of one rotation or norm in fp32 (about 1e-6 of the values, which are of
# order 1), far smaller than any other formula's difference.
_SAME = 1e-4


@dataclass(frozen=True)
class Window:
    """A causal mask: `size` is how many keys up to its own a token sees, None sees them all."""

    size: int | None


@dataclass(frozen=True)
class Attention:
    """One call of attention, as the survey found it.

    Attributes:
        layer: index of the cache's layer.
        heads, kv_heads, head_size: of queries, of keys and values, of each.
        scale: what scores are multiplied with.
        softcap: 0 is none.
        window: of the mask that the call came with.
    """

    layer: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    softcap: float
    window: int | None


@dataclass
class Survey:
    """What a run with real tensors found, in the order of the calls."""

    attentions: list[Attention] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    rotations: list[str | None] = field(default_factory=list)
    norms: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = field(default_factory=list)


@dataclass(frozen=True)
class Buffers:
    """What attention takes from the graph's inputs.

    Attributes:
        keys, values: `[batch, kv_heads, capacity, head_size]` by layer.
        seqlens_k: int32 `[batch]`, tokens of each row in the cache after this call, less one.
        total: int32 scalar, the most of them.
        last: int64 `[batch]`, the index of each row's last token among the new ones.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    seqlens_k: Tensor
    total: Tensor
    last: Tensor


class Lowering:
    """One forward of the model under replacement: a survey, or the trace that repeats it.

    Args:
        name: the architecture, for messages.
        positions: how many the model has, as far as masks must be looked at.
        layers: of the cache.
        survey: what was found; None makes this the survey.
        buffers: what the trace's attention takes; None for the survey.
    """

    def __init__(
        self,
        name: str,
        positions: int,
        layers: int,
        survey: Survey | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.name = name
        self.positions = positions
        self.cache = PendingCache(layers, _refusal)
        self.found = survey or Survey()
        self.buffers = buffers
        self.heads = 0
        self.presents: dict[int, tuple[Tensor, Tensor]] = {}
        self._surveys = survey is None
        self._calls = {"attention": 0, "mask": 0, "rotation": 0}
        self._caches: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

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
        """Attention of one layer: `[batch, sequence, heads, head_size]`.

        Args:
            query: `[batch, heads, sequence, head_size]`.
            key, value: `[batch, kv_heads, sequence, head_size]`, as `cache.update` returned them.

        Raises:
            InputError: something that GroupQueryAttention has no place for.
        """
        layer = self._require_expressible(module, query, key, value, mask, arguments)
        softcap = arguments.get("softcap")
        found = Attention(
            layer=layer,
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_size=query.shape[3],
            scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
            softcap=float(softcap or 0.0),
            window=mask.size,
        )
        self.cache.pending = None
        if self._surveys:
            self.found.attentions.append(found)
            return torch.zeros_like(query).transpose(1, 2)
        if found != self.found.attentions[self._next("attention")]:
            raise _refusal(f"{self.name} attends differently in layer {layer} when it is traced")
        return self._emit(found, query, key, value, arguments.get("s_aux"))

    def _emit(
        self, call: Attention, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        assert self.buffers is not None
        bias = self._bias(call.window)
        attributes: dict[str, Any] = {"scale": call.scale}
        if bias is not None:
            attributes["causal"] = 0
        elif call.window is not None:
            attributes["local_window_size"] = call.window
        if call.softcap:
            attributes["softcap"] = call.softcap
        output, self.presents[call.layer] = group_query_attention(
            query,
            key,
            value,
            (self.buffers.keys[call.layer], self.buffers.values[call.layer]),
            (self.buffers.seqlens_k, self.buffers.total),
            attributes,
            bias=bias,
            sinks=sinks,
        )
        return output

    def _bias(self, window: int | None) -> Tensor | None:
        """What is added to scores in place of a causal mask of that window; None keeps the mask."""
        return None

    def _require_expressible(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        arguments: dict[str, Any],
    ) -> int:
        kind = type(module).__name__
        pending = self.cache.pending
        if pending is None or pending[1] is not key or pending[2] is not value:
            raise _refusal(
                f"{kind} attends to other keys than it put into the cache (shared between layers, "
                "or computed from them)"
            )
        layer = pending[0]
        if not isinstance(mask, Window):
            raise _refusal(f"layer {layer} of {self.name} attends without a causal mask")
        if getattr(module, "is_causal", True) is False:
            raise _refusal(f"layer {layer} of {self.name} is not causal")
        if query.shape[3] != value.shape[3] or key.shape[1] != value.shape[1]:
            raise _refusal(
                f"layer {layer} of {self.name} has heads of size {query.shape[3]} for queries and "
                f"{value.shape[3]} for values, expected equal ones"
            )
        window = arguments.get("sliding_window")
        if window is not None and mask.size is not None and window != mask.size:
            raise _refusal(
                f"layer {layer} of {self.name} has a window of {window} and a mask of {mask.size}"
            )
        unknown = [
            name
            for name, argument in arguments.items()
            if isinstance(argument, Tensor) and name not in ("position_ids", "s_aux")
        ]
        if unknown:
            raise _refusal(f"layer {layer} of {self.name} passes {', '.join(unknown)} to attention")
        return layer

    # ---------------------------------------------------------------- masks

    def mask(self, function: Callable[..., Any], padding: Tensor | None = None) -> Window:
        """The window of a composed mask function, which is evaluated, not believed.

        Args:
            padding: none comes: rows are compacted.

        Raises:
            InputError: it is neither causal nor a causal window.
        """
        if not self._surveys:
            return self.found.windows[self._next("mask")]
        window = _window(function, self.positions, self.name)
        self.found.windows.append(window)
        return window

    # ---------------------------------------------------------------- rotation

    def rotate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`apply_rotary_pos_emb`, as RotaryEmbedding where that is what it does."""
        if self._surveys:
            self.found.rotations.append(_rotation(original, args, kwargs))
            return original(*args, **kwargs)
        layout = self.found.rotations[self._next("rotation")]
        if layout is None:
            return original(*args, **kwargs)
        bound = _rotary_arguments(original, args, kwargs)
        cos, sin, positions = self._rotary_cache(bound["cos"], bound["sin"], layout)
        return tuple(self._rotated(bound[name], cos, sin, positions, layout) for name in "qk")

    def _rotary_cache(self, cos: Tensor, sin: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
        """The op's tables for the tokens at hand, one row each, made once per forward."""
        if id(cos) not in self._caches:
            batch, sequence, width = cos.shape
            positions = torch.arange(batch * sequence).view(batch, sequence)
            chosen = slice(0, None, 2) if layout == "interleaved" else slice(0, width // 2)
            tables = [one[..., chosen].reshape(-1, width // 2) for one in (cos, sin)]
            # `cos` is kept as well: an id means nothing once its object is gone.
            self._caches[id(cos)] = (tables[0], tables[1], positions, cos)
        return self._caches[id(cos)][:3]

    def _rotated(
        self, states: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, layout: str
    ) -> Tensor:
        batch, heads, sequence, size = states.shape
        merged = merge_heads(states)
        attributes: dict[str, Any] = {"interleaved": int(layout != "half")}
        if 2 * cos.shape[1] != size:
            attributes |= {"rotary_embedding_dim": 2 * cos.shape[1], "num_heads": heads}
        rotated = ops.symbolic(
            "com.microsoft::RotaryEmbedding",
            (merged, positions, cos, sin),
            attributes,
            dtype=states.dtype,
            shape=merged.shape,
            version=1,
        )
        return rotated.view(batch, sequence, heads, size).transpose(1, 2)

    def _next(self, kind: str) -> int:
        index = self._calls[kind]
        self._calls[kind] += 1
        return index


@contextlib.contextmanager
def lowered(model: nn.Module, lowering: Lowering) -> Iterator[None]:
    """Replace what the model looks up while it runs, and put it back."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_rotations(model, lowering))
        stack.enter_context(_steady_frequencies(model))
        stack.enter_context(_norms(lowering.found))
        stack.enter_context(_last_token_head(model, lowering))
        stack.enter_context(answered_by(lowering, model))
        yield
        lowering.cache.require_attended()


def survey(model: Any, inputs: dict[str, Tensor], positions: int, layers: int) -> Survey:
    """Run the model once with real tensors and prove what can be replaced.

    Args:
        model: a causal language model, eval mode, fp32.
        inputs: `position_ids` and `input_ids` or `inputs_embeds`, batch and sequence at least 2.
        positions: how many the model has.
        layers: of its cache.

    Raises:
        InputError: the architecture needs something that the graph cannot express; named.
    """
    name = type(model).__name__
    lowering = Lowering(name, positions, layers)
    with (
        torch.no_grad(),
        lowered(model, lowering),
        refusing(_refusal, f"{name} does not run with a shared cache"),
    ):
        call(model, lowering.cache, inputs)
    found = lowering.found
    found.norms = [
        (module, form)
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module)
        for form in _norm_form(module)
    ]
    attended = [one.layer for one in found.attentions]
    if attended != list(range(layers)):
        raise _refusal(
            f"{name} has {layers} layers and called transformers' attention function for "
            f"{attended or 'none of them'}"
        )
    if lowering.heads != 1:
        raise _refusal(
            f"{name} called its language model head {lowering.heads} times, expected once"
        )
    sizes = {(one.kv_heads, one.head_size) for one in found.attentions}
    if len(sizes) != 1:
        raise _refusal(f"{name} has layers with different key and value heads: {sorted(sizes)}")
    return found


def require_positions_from_0(model: Any, ids: Tensor) -> None:
    """Refuse a model whose own positions, which it was trained with, are not 0, 1, 2 and so on.

    RoBERTa and its relatives count from behind their padding id where no positions are given, and
    take those that are given as they are.

    Args:
        ids: int64 `[B, S]`.

    Raises:
        InputError: its positions are others.
    """
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False, return_dict=True).logits
        given = model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True)
    if not torch.allclose(own, given.logits, rtol=0, atol=_SAME * float(own.abs().max())):
        raise _refusal(f"{type(model).__name__} does not count its positions from 0")


def call(model: Any, cache: Cache, inputs: dict[str, Tensor]) -> Any:
    """`model(...)` with the cache under the name that this transformers gives it; its logits."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(f"{type(model).__name__} takes no position_ids")
    arguments = {**inputs, cache_name(model): cache}
    return model(**arguments, use_cache=True, return_dict=True).logits


# -------------------------------------------------------------------- replacements


@contextlib.contextmanager
def _rotations(model: nn.Module, lowering: Lowering) -> Iterator[None]:
    """Replace `apply_rotary_pos_emb` in the modules that hold the model's layers."""
    sources = {type(one).__module__ for one in model.modules()}
    found = {
        name: vars(sys.modules[name])["apply_rotary_pos_emb"]
        for name in sorted(sources)
        if "apply_rotary_pos_emb" in vars(sys.modules[name])
    }

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: lowering.rotate(original, *args, **kwargs)

    for name, original in found.items():
        vars(sys.modules[name])["apply_rotary_pos_emb"] = replacement(original)
    try:
        yield
    finally:
        for name, original in found.items():
            vars(sys.modules[name])["apply_rotary_pos_emb"] = original


@contextlib.contextmanager
def _steady_frequencies(model: nn.Module) -> Iterator[None]:
    """Keep rotary frequencies as they are up to `steady_positions`, whatever a batch holds.

    transformers chooses them anew in every forward by the longest row of the batch, for `longrope`
    and `dynamic`; within those positions that changes nothing.
    """
    replaced: list[Any] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(str(one) == "longrope" or "dynamic" in str(one) for one in names):
            plain = inspect.unwrap(type(module).forward)
            module.forward = types.MethodType(plain, module)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def steady_positions(config: Any) -> int:
    """How many positions a decoder has whose rotary frequencies are the same for every batch.

    All of them, but for `longrope`: behind its original positions it turns every token with other
    frequencies, those in the cache included, which no cache can follow. 0 where nothing says.
    """
    limit = int(getattr(config, "max_position_embeddings", 0) or 0)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    for one in nested:
        if one.get("rope_type") == "longrope":
            original = one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
    return limit


@contextlib.contextmanager
def _norms(found: Survey) -> Iterator[None]:
    """Write RMSNorm as x / sqrt(mean(x^2) + eps) * scale, which ONNX Runtime fuses."""
    for module, form in found.norms:
        module.forward = form
    try:
        yield
    finally:
        for module, _ in found.norms:
            del module.forward


@contextlib.contextmanager
def _last_token_head(model: Any, lowering: Lowering) -> Iterator[None]:
    """Run the language model head on `[batch, hidden]`: each row's last token."""
    head = model.get_output_embeddings()
    if head is None:
        raise _refusal(f"{lowering.name} has no language model head")

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        lowering.heads += 1
        last = None if lowering.buffers is None else lowering.buffers.last
        return (last_tokens(args[0], last).squeeze(1),)

    handles = (
        head.register_forward_pre_hook(choose),
        head.register_forward_hook(lambda _, __, logits: logits.unsqueeze(1)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------- proofs


def _window(allowed: Callable[..., Any], positions: int, name: str) -> Window:
    """Evaluate a mask function at chosen rows: all keys up to the token, or the last `size`."""
    last = positions - 1
    keys = torch.arange(positions)
    row = _mask_row(allowed, last, keys)
    size = int(row.sum())
    near = (size - 2, size - 1, size, size + 1, last // 2, last - 1, last)
    for query in sorted({one for one in (*_PROBED_ROWS, *near) if 0 <= one <= last}):
        expected = (keys <= query) & (keys > query - size)
        if not torch.equal(_mask_row(allowed, query, keys), expected):
            raise _refusal(
                f"{name} uses a mask that is neither causal nor a causal window (bidirectional "
                "blocks, chunks or the like)"
            )
    return Window(None if size == positions else size)


def _mask_row(allowed: Callable[..., Any], query: int, keys: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    result = allowed(zero, zero, torch.tensor(query), keys)
    return torch.as_tensor(result, dtype=torch.bool).expand(keys.shape)


def _rotary_arguments(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _rotation(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """The layout where the function is that rotation, else None: left as it is.

    `half` turns the first half of a head with the second, `interleaved` each even value with the
    next; of the tables, `half` repeats one, `interleaved` repeats each value, and `pairs` is
    interleaved with tables as `half` has them.
    """
    try:
        bound = _rotary_arguments(original, args, kwargs)
        query, key, cos, sin = (bound[name] for name in ("q", "k", "cos", "sin"))
    except (TypeError, KeyError):
        return None
    if bound.get("unsqueeze_dim", 1) != 1 or query.dim() != 4 or cos.dim() != 3:
        return None
    if cos.shape[:2] != (query.shape[0], query.shape[2]) or cos.shape[2] > query.shape[3]:
        return None
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randn(one.shape, generator=generator) for one in (query, key)]
    given = {**bound, "q": probes[0], "k": probes[1]}
    results = original(**given)
    for layout in ("half", "interleaved", "pairs"):
        expected = [_rotate_states(one, cos, sin, layout) for one in probes]
        if all(
            torch.allclose(a, b, atol=_SAME, rtol=0) for a, b in zip(results, expected, strict=True)
        ):
            return layout
    return None


def _rotate_states(states: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """What RotaryEmbedding does with the leading part of each head, by its documentation."""
    width = cos.shape[2]
    turned, rest = states[..., :width], states[..., width:]
    if layout == "half":
        c, s = (one[:, None, :, : width // 2] for one in (cos, sin))
        x, y = turned[..., : width // 2], turned[..., width // 2 :]
        return torch.cat((x * c - y * s, y * c + x * s, rest), dim=-1)
    chosen = slice(0, None, 2) if layout == "interleaved" else slice(0, width // 2)
    c, s = (one[:, None, :, chosen] for one in (cos, sin))
    x, y = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack((x * c - y * s, y * c + x * s), dim=-1)
    return torch.cat((pairs.flatten(-2), rest), dim=-1)


def _norm_form(module: Any) -> list[Callable[[Tensor], Tensor]]:
    """The norm with its scale, `weight` or `1 + weight`, whichever the module's own code is;
    empty where it is another formula.

    The forms look the weight up anew: while it is traced, it is another tensor.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(epsilon, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return []

    def unscaled(x: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)

    def plain(x: Tensor) -> Tensor:
        scale: Tensor = module.weight
        return unscaled(x) * scale

    def shifted(x: Tensor) -> Tensor:
        scale: Tensor = module.weight
        return unscaled(x) * (1.0 + scale)

    probe = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(probe)
        for form in (plain, shifted):
            if torch.allclose(form(probe), expected, atol=_SAME, rtol=_SAME):
                return [form]
    return []


def _refusal(reason: str) -> InputError:
    return InputError(
        f"cannot export this decoder: {reason}. Use an architecture with causal attention through "
        "transformers' attention interface, such as Llama or Qwen3."
    )
