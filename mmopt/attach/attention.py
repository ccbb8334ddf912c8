"""Attention through transformers' own registry: interval masks in, `mmopt::attention` out.

The one name `"mmopt"` is registered twice. As a mask function it reduces the mask that the model
composed (causal, sliding window, padding, packing, image blocks) to a first and a last visible
key per query, once per forward. As an attention function it hands those to the op. Registering
only the second would make transformers drop the mask without a word.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmopt.attach.report import Row
from mmopt_kernels import Intervals, attention
from mmopt_kernels.errors import InputError

NAME = "mmopt"
OP = "mmopt::attention"

# How much of the mask exists at once in eager mode, in elements. Each costs a bool and two int32,
# so 2**22 is some 40 MB, however long the sequence.
_BLOCK_ELEMENTS = 2**22

# Where a tower remembers what `undo` restores. On the module, not on its config: attributes of a
# config are written to config.json.
_FORMER = "_mmopt_former_attention"

# Every name that transformers' configs have for the probability of attention dropout.
_DROPOUT_FIELDS = (
    "attention_dropout",
    "attention_drop_rate",
    "attention_probs_dropout_prob",
    "attn_drop_rate",
    "attn_dropout",
    "attn_dropout_p",
    "attn_pdrop",
)

_SDPA = (
    "For this model use impl='sdpa': model.set_attn_implementation('sdpa'), or undo() the report "
    "of mmopt.optimize."
)
NOT_INTERVALS = (
    "mmopt attention: the mask lets a query see keys with a gap between them, expected one "
    "contiguous range of keys for each query (causal, sliding window, padding at an end, packing, "
    f"prefix-LM). {_SDPA}"
)


def attach_attention(
    model: nn.Module, base: Any, *, training: bool
) -> tuple[list[Row], Callable[[], None]]:
    """Set `"mmopt"` on every tower that can take it.

    Args:
        model: the caller's model, in whose terms modules are named.
        base: the `PreTrainedModel` within.
        training: whether attention dropout counts against a tower.

    Returns:
        A row per tower that has attention, and what undoes all of them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, interval_attention)
    AttentionMaskInterface.register(NAME, interval_mask)

    names = {module: name for name, module in model.named_modules()}
    towers = list(_towers(base))
    reasons = {tower: _why_not(tower, training=training) for tower in towers if _layers(tower)}
    target = {}
    for tower in towers:
        # A composite (CLIPModel) has no attention of its own, but some make the masks for the
        # towers inside them. Such a one follows only when all of those read interval masks.
        inside = [reasons[other] for other in _towers(tower) if other in reasons]
        refused = reasons[tower] if tower in reasons else not inside or any(inside)
        target[tower] = tower.config._attn_implementation if refused else NAME
    for tower in towers:
        if target[tower] == NAME and tower.config._attn_implementation != NAME:
            setattr(tower, _FORMER, tower.config._attn_implementation)
    _set(target)

    rows = [
        Row(names[tower], "attention", None if reason else OP, reason)
        for tower, reason in reasons.items()
    ]
    return rows, lambda: _restore(towers)


def _restore(towers: list[Any]) -> None:
    target = {}
    for tower in towers:
        target[tower] = tower.config._attn_implementation
        former = tower.__dict__.pop(_FORMER, None)
        if former is not None and target[tower] == NAME:
            target[tower] = former
    _set(target)


def _set(target: dict[Any, str]) -> None:
    """Give every tower its implementation; `target` lists a tower before those inside it.

    The dict form sets the tower's own config and leaves declared sub-configs. Modules inside it
    whose config is not declared as one follow the tower; their own turn comes after it.
    """
    for tower, implementation in target.items():
        tower.set_attn_implementation({"": implementation})


def _towers(base: Any) -> Iterator[Any]:
    """The outermost `PreTrainedModel` of every config: each decides for all that share it."""
    from transformers import PreTrainedModel

    seen = set()
    for module in base.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield module


def _layers(tower: Any) -> list[nn.Module]:
    """The attention modules of a tower, without those of towers inside it.

    By class name, as transformers' own `_can_set_attn_implementation` finds them.
    """
    layers, pending = [], list(tower.children())
    while pending:
        module = pending.pop()
        if getattr(module, "config", tower.config) is not tower.config and hasattr(
            module, "set_attn_implementation"
        ):
            continue
        if "Attention" in type(module).__name__:
            layers.append(module)
        pending.extend(module.children())
    return layers


def _why_not(tower: Any, *, training: bool) -> str | None:
    """Why this tower keeps its attention, or None when the op can serve it."""
    name, config = type(tower).__name__, tower.config
    if not tower._can_set_attn_implementation():
        return f"{name} does not dispatch through transformers' AttentionInterface"
    if not tower._supports_attention_backend:
        return f"{name} declares that it does not support other attention backends"
    if not tower._supports_sdpa:
        return f"{name} needs more than plain attention (sinks, softcap): it does not take sdpa"
    value_dim = getattr(config, "v_head_dim", None)
    rope_dim, nope_dim = (getattr(config, f"qk_{x}_head_dim", None) for x in ("rope", "nope"))
    if value_dim and rope_dim and nope_dim and value_dim != rope_dim + nope_dim:
        return f"values have {value_dim} dimensions per head, keys {rope_dim + nope_dim}"
    if getattr(config, "output_attentions", False):
        return "config.output_attentions asks for attention weights, which are never formed"
    for field in _DROPOUT_FIELDS if training else ():
        probability = getattr(config, field, None)
        if isinstance(probability, float | int) and probability > 0:
            return f"attention dropout: {field} is {probability}; load the model with {field}=0"
    return None


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Reduce the mask that a model composed to bounds; the arguments are transformers'.

    Nothing of size S x T is kept. Compiled, the mask is never formed: Inductor evaluates it
    inside the reductions. Eagerly it exists for a block of queries at a time.

    Returns:
        int32 `[B, 1, S, 2]`: the first visible key of each query and the one after the last.
        Four dimensions, because transformers passes a 4-D mask on as already prepared. None where
        the op needs no bounds: everything visible, or plain causal.

    Raises:
        InputError: a query sees keys with a gap. On CUDA, where the host must not wait for a
            device value, the device asserts it instead.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = attention_mask is None and local_size is None
    if plain and allow_is_bidirectional_skip:
        return None
    # As transformers has it: one query sees all keys, and as many queries as keys align anyway.
    if plain and allow_is_causal_skip and (q_length == 1 or q_length == kv_length):
        return None

    def bounds(start: int, length: int) -> tuple[Tensor, Tensor]:
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=length,
            kv_length=kv_length,
            q_offset=q_offset + start,
            kv_offset=kv_offset,
            mask_function=causal_mask_function if mask_function is None else mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return _reduce(mask)

    if torch.compiler.is_compiling():
        found, proven = bounds(0, q_length)
    else:
        rows = max(1, _BLOCK_ELEMENTS // max(1, batch_size * kv_length))
        blocks = [bounds(start, min(rows, q_length - start)) for start in range(0, q_length, rows)]
        found = torch.cat([block for block, _ in blocks], dim=2)
        proven = torch.stack([proof for _, proof in blocks]).all()
    checked: Tensor = _proven_bounds(found, proven)
    return checked


def _reduce(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds `[B, 1, S, 2]` of a bool mask `[B, 1, S, T]`, and whether each row is one interval."""
    if mask.shape[1] != 1:
        raise InputError(
            f"mmopt attention: the mask differs between {mask.shape[1]} heads, expected one mask "
            f"for all heads, [B, 1, S, T]. {_SDPA}"
        )
    T = mask.shape[3]
    key = torch.arange(T, dtype=torch.int32, device=mask.device)
    count = mask.sum(3, dtype=torch.int32)
    lo = torch.where(mask, key, T).amin(3)
    hi = torch.where(mask, key + 1, 0).amax(3)
    # A row that sees nothing reads (T, 0); (0, 0) says the same and keeps hi - lo its count.
    lo = torch.minimum(lo, hi)
    return torch.stack([lo, hi], dim=3), (count == hi - lo).all()


# An op of its own, because Inductor turns an assertion into a C++ exception thrown inside an OpenMP
# region, which ends the process. It returns what it was given, or it would be dropped as unused.
@torch.library.custom_op("mmopt::proven_bounds", mutates_args=())
def _proven_bounds(bounds: Tensor, proven: Tensor) -> Tensor:
    if proven.device.type != "cpu":
        # The host must not wait for a device value.
        torch._assert_async(proven, NOT_INTERVALS)
    elif not proven:
        raise InputError(NOT_INTERVALS)
    return bounds.clone()


@_proven_bounds.register_fake
def _proven_bounds_fake(bounds: Tensor, proven: Tensor) -> Tensor:
    return torch.empty_like(bounds)


def interval_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, computed by `mmopt::attention`.

    Args:
        query: `[B, Hq, S, D]`.
        key, value: `[B, Hkv, T, D]`; grouped heads are not repeated.
        attention_mask: what `interval_mask` returned, or a bool mask `[B, 1, S, T]` that the
            caller prepared, which is reduced here.
        is_causal: overrides the module's own flag when there is no mask.

    Returns:
        `[B, S, Hq, D]`, and None for the attention weights, which are never formed.

    Raises:
        InputError: dropout, softcap, sinks, a position bias, attention weights as an output, an
            additive mask, or a mask that is not one interval per query.
    """
    if dropout > 0:
        raise InputError(
            f"mmopt attention: attention dropout is {dropout} in training, expected 0. Load the "
            "model with attention dropout 0, or call mmopt.optimize with training=True, which "
            "leaves such towers alone."
        )
    for option in ("softcap", "s_aux", "position_bias", "output_attentions"):
        if kwargs.get(option) is not None and kwargs[option] is not False:
            raise InputError(
                f"mmopt attention: {type(module).__name__} asks for {option}, which the op does "
                f"not have. Use model.set_attn_implementation('eager') for it."
            )

    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # Only the prefill of an empty static cache has more keys than causal queries; the extra
        # ones are not written yet. The op, unlike transformers, aligns at the last key.
        if causal and query.shape[2] > 1 and key.shape[2] > query.shape[2]:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        out = attention(
            query, key, value, causal=bool(causal) and query.shape[2] > 1, scale=scaling
        )
    else:
        out = attention(query, key, value, intervals=_intervals(attention_mask), scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _intervals(mask: Tensor) -> Intervals:
    if mask.dtype == torch.bool and mask.dim() == 4:
        mask = _proven_bounds(*_reduce(mask))
    elif mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[3] != 2:
        raise InputError(
            f"mmopt attention: the mask is {mask.dtype} {tuple(mask.shape)}, expected the bounds "
            "that transformers' mask functions make, or a bool mask [B, 1, S, T]. Pass a 2-D "
            f"attention_mask to the model, or none. {_SDPA}"
        )
    return Intervals(mask[:, 0, :, 0], mask[:, 0, :, 1])
