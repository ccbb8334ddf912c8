"""What decoders and encoder-decoder models share while they run under replacement for a trace.

transformers' attention and mask functions become ours, which ask the forward that runs; the cache
hands new keys and values on; GroupQueryAttention fills the buffers.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from torch.onnx import ops
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer

from mmopt_kernels.errors import InputError, MmoptError, one_line

IMPLEMENTATION = "mmopt_export"
"""The name of our attention and mask functions in transformers' registries."""

Refusal = Callable[[str], InputError]
"""From a reason to the error of a model that cannot be exported."""


class Forward(Protocol):
    """One forward of a model under replacement."""

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
        """Attention of one module, `[batch, sequence, heads, head_size]`, from heads first."""

    def mask(self, function: Callable[..., Any], padding: Tensor | None) -> Any:
        """What attention is called with for a mask that transformers composed."""


class PendingCache(Cache):
    """Hands new keys and values to the attention function, which knows where the past is.

    Attributes:
        pending: layer, keys and values that attention has not been called with yet.
    """

    def __init__(self, layers: int, refusal: Refusal) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(layers)])
        self.pending: tuple[int, Tensor, Tensor] | None = None
        self._refusal = refusal

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what attention is about to be called with."""
        self.require_attended()
        self.pending = (layer_idx, key_states, value_states)
        return key_states, value_states

    def require_attended(self) -> None:
        """Raise InputError where a layer's keys were never attended to."""
        if self.pending is not None:
            raise self._refusal(
                f"layer {self.pending[0]} fills the cache and does not call transformers' "
                "attention function (it has one of its own)"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing: positions are given, and masks need no offset."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Nothing, as for the length."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[Any, int]:
        """The new tokens and no offset: our mask function looks at neither."""
        return query_length, 0


_active: list[Forward] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, None]:
    forward = _active[-1]
    return forward.attend(module, query, key, value, attention_mask, scaling, arguments), None


def _mask(
    *_: Any, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **__: Any
) -> Any:
    return _active[-1].mask(mask_function, attention_mask)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


@contextlib.contextmanager
def answered_by(forward: Forward, model: nn.Module) -> Iterator[None]:
    """Let the model's attention and masks be what `forward` says."""
    with attention_implementation(model, IMPLEMENTATION):
        _active.append(forward)
        try:
            yield
        finally:
            _active.pop()


@contextlib.contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Set the attention of every configuration in the model, directly: the setter would look for
    kernels of that name. `eager` is the oracle's, which knows every feature."""
    modules: list[Any] = [one for one in model.modules() if hasattr(one, "config")]
    configs = {id(one.config): one.config for one in modules}
    before = {key: one._attn_implementation for key, one in configs.items()}
    for one in configs.values():
        one._attn_implementation = name
    try:
        yield
    finally:
        for key, one in configs.items():
            one._attn_implementation = before[key]


@contextlib.contextmanager
def refusing(refusal: Refusal, what: str) -> Iterator[None]:
    """Refuse a model that fails in its own code under replacement.

    Args:
        what: it cannot do, with its name.
    """
    try:
        yield
    except MmoptError:
        raise
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise refusal(f"{what} ({type(error).__name__}: {one_line(error)})") from error


def cache_name(model: Any) -> str:
    """What this transformers calls the cache that a model's forward takes."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def last_tokens(hidden: Tensor, last: Tensor | None) -> Tensor:
    """`[batch, 1, hidden]`: each row at its index in `last` `[batch]`; None takes the last one."""
    if last is None:
        return hidden[:, -1:]
    return hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.shape[2]))


def merge_heads(states: Tensor) -> Tensor:
    """`[batch, heads, sequence, size]` as `[batch, sequence, heads * size]`."""
    batch, heads, sequence, size = states.shape
    return states.transpose(1, 2).reshape(batch, sequence, heads * size)


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    attributes: dict[str, Any],
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`com.microsoft::GroupQueryAttention` over buffers: its output and the filled buffers.

    Args:
        query: `[batch, heads, sequence, head_size]`.
        key, value: `[batch, kv_heads, sequence, head_size]`, the new ones.
        past: keys and values, `[batch, kv_heads, capacity, head_size]`.
        lengths: `seqlens_k` and the total.
        attributes: besides the numbers of heads.
        bias: what is added to the scores.
        sinks: `[heads]`, a score that takes part in the softmax alone.

    Returns:
        `[batch, sequence, heads, head_size]`, and keys and values like `past`.
    """
    batch, heads, sequence, size = query.shape
    # cos_cache, sin_cache and position_ids come before the bias.
    optional = without_last_nones(None, None, None, bias, sinks)
    output, *presents = ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*map(merge_heads, (query, key, value)), *past, *lengths, *optional],
        {"num_heads": heads, "kv_num_heads": key.shape[1], **attributes},
        dtypes=(query.dtype, *(one.dtype for one in past)),
        shapes=((batch, sequence, heads * size), *(one.shape for one in past)),
        version=1,
    )
    return output.view(batch, sequence, heads, size), (presents[0], presents[1])


def without_last_nones(*inputs: Tensor | None) -> list[Tensor | None]:
    """The inputs of an op that may end sooner."""
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    return kept
