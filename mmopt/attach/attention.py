"""Attention through transformers' own registry: interval masks in, `mmopt::attention` out.

The one name `"mmopt"` is registered twice. As a mask function it reduces the mask that the model
composed (causal, sliding window, padding, packing, image blocks) to a first and a last visible
key per query, once per forward. As an attention function it hands those to the op. Registering
only the second would make transformers drop the mask without a word.
"""

import ast
import functools
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmopt.attach.report import Row
from mmopt.attach.source import TRACEABLE, parsed
from mmopt_kernels import Intervals, attention
from mmopt_kernels.attention.bounds import reduce_rows
from mmopt_kernels.errors import InputError

NAME = "mmopt"
OP = "mmopt::attention"

# Where a tower remembers what `undo` restores, as a _Former. On the module, not on its config:
# attributes of a config are written to config.json.
_FORMER = "_mmopt_former_attention"

# What a model may hand to its attention function beyond what every one of them does (dropout,
# softcap, sinks), and the op has not: a score added to each pair, keys picked one by one
# (DeepSeek-V3.2's sparse attention), sinks by another name with another meaning (Inkling).
_NOT_IN_THE_OP = ("position_bias", "indices", "block_indices", "sinks")

_SDPA = (
    "For this model use impl='sdpa': model.set_attn_implementation('sdpa'), or undo() the report "
    "of mmopt.optimize."
)
_TORCH = "it is torch's nn.MultiheadAttention, which does not dispatch through AttentionInterface"
NOT_INTERVALS = (
    "mmopt attention: the mask lets a query see keys with a gap between them, expected one "
    "contiguous range of keys for each query (causal, sliding window, padding at an end, packing, "
    f"prefix-LM). {_SDPA}"
)


def attach_attention(model: nn.Module, base: Any) -> tuple[list[Row], Callable[[], None]]:
    """Set `"mmopt"` on every tower that can take it, once `attach_traceable` has done its part.

    Args:
        model: the caller's model, in whose terms modules are named.
        base: the `PreTrainedModel` within.

    Returns:
        A row per tower that has attention and per module of torch's own, and what undoes all.
    """
    _register()
    names = {module: name for name, module in model.named_modules()}
    towers = list(_towers(base))
    reasons = {
        tower: _why_not(tower) or _mask_of_its_own(tower, towers)
        for tower in towers
        if _layers(tower)
    }
    target = {}
    for tower in towers:
        # A composite (CLIPModel) has no attention of its own, but some make the masks for the
        # towers inside them. Such a one follows only when all of those read interval masks.
        inside = [reasons[other] for other in _towers(tower) if other in reasons]
        refused = reasons[tower] if tower in reasons else not inside or any(inside)
        target[tower] = tower.config._attn_implementation if refused else NAME
    for tower in towers:
        if target[tower] == NAME and tower.config._attn_implementation != NAME:
            setattr(tower, _FORMER, _Former(tower.config._attn_implementation))
    _set(target)

    rows = [
        Row(names[tower], "attention", None if reason else OP, reason)
        for tower, reason in reasons.items()
    ]
    rows += [
        Row(names[module], "attention", None, _TORCH)
        for module in base.modules()
        if type(module) is nn.MultiheadAttention
    ]
    return rows, lambda: _restore(towers)


def _restore(towers: list[Any]) -> None:
    target = {}
    for tower in towers:
        target[tower] = tower.config._attn_implementation
        former = tower.__dict__.pop(_FORMER, None)
        if former is not None and target[tower] == NAME:
            target[tower] = former.implementation
    _set(target)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, interval_attention)
    AttentionMaskInterface.register(NAME, interval_mask)


@dataclass(frozen=True)
class _Former:
    """The attention of a tower before this one."""

    implementation: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The process that unpickles the tower may not have called mmopt.optimize.
        _register()
        self.__dict__.update(state)


def _set(target: dict[Any, str]) -> None:
    """Give every tower its implementation; `target` lists a tower before those inside it.

    The dict form sets the tower's own config and leaves declared sub-configs. Modules inside it
    whose config is not declared as one follow the tower; their own turn comes after it.
    """
    for tower, implementation in target.items():
        tower.set_attn_implementation({"": implementation})
        # Layers that PEFT's layer_replication repeats have a copy of the config each, which would
        # go on as before with the masks of the tower.
        for layer in _layers(tower):
            config = getattr(layer, "config", tower.config)
            if config is not tower.config and type(config) is type(tower.config):
                config._attn_implementation = implementation


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
    return [module for module in _modules(tower) if "Attention" in type(module).__name__]


def _modules(tower: Any) -> list[nn.Module]:
    """The modules of a tower, without those of towers inside it."""
    modules, pending = [], list(tower.children())
    while pending:
        module = pending.pop()
        if getattr(module, "config", tower.config) is not tower.config and hasattr(
            module, "set_attn_implementation"
        ):
            continue
        modules.append(module)
        pending.extend(module.children())
    return modules


def _why_not(tower: Any) -> str | None:
    """Why this tower keeps its attention, or None when the op can serve it."""
    name, config = type(tower).__name__, tower.config
    if not tower._can_set_attn_implementation():
        return f"{name} does not dispatch through transformers' AttentionInterface"
    # The declaration also promises what serving engines need (slices of logits, a parallel plan).
    # Whisper and BART do not make it, but hand sdpa the masks of transformers' own functions, and
    # Janus's vision tower hands it none.
    plain = _takes_masks_from_transformers(tower) or _has_no_mask(tower)
    as_made = tower._supports_sdpa and plain
    if not (tower._supports_attention_backend or as_made):
        return f"{name} declares that it does not support other attention backends"
    # Whoever takes sdpa needs plain attention with the mask it made. Models with softcap or sinks
    # do not; they take flash attention, whose function in transformers has softcap and sinks and
    # nothing else that the op has not. Models that take neither (DeepSeek-V4, HunYuan-V4) rewrite
    # keys or masks for the implementations that they know by name.
    if not (tower._supports_sdpa or tower._supports_flash_attn):
        return f"{name} takes neither sdpa nor flash attention: it needs more than the op has"
    for layer in _layers(tower):
        for option in _NOT_IN_THE_OP:
            if option in _passed(layer):
                return f"{type(layer).__name__} passes {option} to its attention function"
        if mask := _computed_mask(layer):
            return (
                f"{type(layer).__name__} computes the mask that it passes to its attention "
                f"function, {mask}: it needs the model's as a tensor, or adds to the scores"
            )
    if getattr(config, "output_attentions", False):
        return "config.output_attentions asks for attention weights, which are never formed"
    return None


def _mask_of_its_own(tower: Any, towers: list[Any]) -> str | None:
    """What makes a mask that the op does not take, in the tower or in one that it is inside.

    A bias of positions is a module, there only where the config asks for one (BEiT, Phi-4's
    audio). Mllama and Kosmos-2 make masks that are added to the scores, in functions of their own;
    so does Pixtral where it does not hand over the ends of its images. Siglip2's pooling head makes
    one by the config of its tower, for torch's attention.
    """
    for module in _modules(tower):
        name = type(module).__name__
        if name.endswith("Bias"):
            return f"{name} makes a bias of positions, which is added to the scores"
        inside = any(type(child) is nn.MultiheadAttention for child in module.children())
        tree = _source(type(module)) if inside else None
        if tree is not None and "create_bidirectional_mask(" in ast.unparse(tree):
            return f"{name} makes a mask for torch's nn.MultiheadAttention by the same config"
    for outer in towers:
        if tower not in outer.modules():
            continue
        for module in {type(one): one for one in (outer, *_modules(outer))}.values():
            kind = type(module)
            for function in _masks_called(kind, kind.forward, unused=_replaced(module)):
                if _adds_to_scores(kind, function):
                    return f"{kind.__name__} adds a mask of its own, {function.__name__}, to scores"
    return None


def _masks_called(kind: type, caller: Any, unused: Set[ast.AST] = frozenset()) -> list[Any]:
    """The functions of the module of `kind`, its methods too, that `caller` calls for a mask."""
    tree = _tree(caller) if kind.__module__.startswith("transformers.models.") else None
    functions = []
    for node in ast.walk(tree) if tree is not None else ():
        if not isinstance(node, ast.Call) or node in unused:
            continue
        called: Any = None
        if isinstance(node.func, ast.Name):
            called = vars(sys.modules[kind.__module__]).get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self":
            called = getattr(kind, node.func.attr, None)
        if (
            isinstance(called, FunctionType)
            and called.__module__ == kind.__module__
            and "mask" in called.__name__
        ):
            functions.append(called)
    return functions


def _adds_to_scores(kind: type, function: Any, above: tuple[Any, ...] = ()) -> bool:
    """Whether a function, or one that it calls for a mask, hides with the dtype's least number."""
    tree = _tree(function)
    if tree is None or function in above:
        return False
    return "torch.finfo(" in ast.unparse(tree) or any(
        _adds_to_scores(kind, called, (*above, function))
        for called in _masks_called(kind, function)
    )


def branches_for_flash(tree: ast.AST) -> list[ast.If]:
    """Where a method gives flash attention the ends of windows or images, and others a mask."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "is_flash_attention_requested(self.config)"
        and any("cu_seq_lens_q=" in ast.unparse(line) for line in node.body)
    ]


@functools.lru_cache(maxsize=1024)
def hands_over_pieces(method: Callable[..., Any]) -> bool:
    """Whether a method has such a branch."""
    tree = _tree(method)
    return tree is not None and bool(branches_for_flash(tree))


def _replaced(module: nn.Module) -> set[ast.AST]:
    """What the forward of a module no longer runs, where it takes the branch of flash attention."""
    traceable = hasattr(module.__dict__.get("forward"), TRACEABLE)
    tree = _source(type(module)) if traceable else None
    branches = branches_for_flash(tree) if tree is not None else []
    return {node for branch in branches for other in branch.orelse for node in ast.walk(other)}


def _takes_masks_from_transformers(tower: Any) -> bool:
    module = sys.modules[type(tower).__module__]
    return any(
        getattr(value, "__module__", None) == "transformers.masking_utils"
        for value in vars(module).values()
    )


def _has_no_mask(tower: Any) -> bool:
    """Whether no mask can reach the attention of this tower, as the source of its modules reads.

    Its own forward takes none, what is inside hands on the one that it is not given, and attention
    is computed by transformers' interface alone.
    """
    dispatches = False
    for kind in {type(tower), *map(type, _modules(tower))}:
        if kind.__module__.startswith("torch."):
            continue
        tree = _source(kind)
        if tree is None or (kind is type(tower) and "mask" in ast.unparse(tree)):
            return False
        if "Attention" in kind.__name__ and "softmax(" in ast.unparse(tree):
            return False
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and "mask" in node.id:
                if node.id != "attention_mask" or not isinstance(node.ctx, ast.Load):
                    return False
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.endswith("scaled_dot_product_attention"):
                    return False
                if called == "attention_interface":
                    dispatches = True
                given = _given_masks(node)
                if any(ast.unparse(mask) not in ("attention_mask", "None") for mask in given):
                    return False
    return dispatches


def _source(kind: type) -> ast.Module | None:
    """The forward of a class, None where its source is not at hand."""
    return _tree(kind.forward)  # type: ignore[attr-defined]


# Many layers share a forward, and parsing it is most of what attaching costs.
@functools.lru_cache(maxsize=1024)
def _tree(function: Callable[..., Any]) -> ast.Module | None:
    """The source of a function, to be read only: it is shared."""
    found = parsed(function)
    return None if found is None else found[0]


def _passed(layer: nn.Module) -> set[str]:
    """The keywords that the layer's forward names in any call.

    From its source, as transformers itself tells whether a model dispatches. Where there is no
    source, nothing is known here and `interval_attention` refuses at the first forward.
    """
    tree = _source(type(layer))
    if tree is None:
        return set()
    return {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg is not None
    }


def _computed_mask(layer: nn.Module) -> str | None:
    """What the layer's forward computes, rather than chooses, to hand over as a mask, or None.

    Bounds may be chosen among (by layer type, or those of an encoder), not computed with. Doge's
    mask depends on its values; those of Swin and Parakeet are biases of positions.
    """
    tree = _source(type(layer))
    if tree is None:
        return None
    assigned: dict[str, list[ast.expr]] = {}
    handed_over: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "attention_interface":
            handed_over += _given_masks(node)

    def is_computed(value: ast.expr) -> bool:
        if isinstance(value, ast.Name):
            # Once: what is assigned may name itself.
            return any(map(is_computed, assigned.pop(value.id, [])))
        if isinstance(value, ast.IfExp):
            return is_computed(value.body) or is_computed(value.orelse)
        if isinstance(value, ast.Subscript):
            return is_computed(value.value)
        if isinstance(value, ast.Call) and ast.unparse(value.func).endswith(".get"):
            return False
        return not isinstance(value, ast.Constant)

    return next((ast.unparse(mask) for mask in handed_over if is_computed(mask)), None)


def _given_masks(call: ast.Call) -> list[ast.expr]:
    """The mask that a call hands over: by name, or as the fifth argument of attention."""
    named = [word.value for word in call.keywords if word.arg == "attention_mask"]
    return named + (call.args[4:5] if ast.unparse(call.func) == "attention_interface" else [])


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

    def seen(start: int, stop: int) -> Tensor:
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=stop - start,
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
        return _of_all_heads(mask)

    return _bounds(*reduce_rows(seen, q_length, kv_length, B=batch_size))


def _of_all_heads(mask: Tensor) -> Tensor:
    """Bool `[B, S, T]` of a mask `[B, 1, S, T]`."""
    if mask.shape[1] != 1:
        raise InputError(
            f"mmopt attention: the mask differs between {mask.shape[1]} heads, expected one mask "
            f"for all heads, [B, 1, S, T]. {_SDPA}"
        )
    return mask[:, 0]


def _bounds(lo: Tensor, hi: Tensor, broken: Tensor) -> Tensor:
    """Bounds `[B, 1, S, 2]` of what `reduce_rows` found, once no row is broken."""
    proven: Tensor = _proven_bounds(torch.stack([lo, hi], dim=2)[:, None], broken)
    return proven


# An op of its own, because Inductor turns an assertion into a C++ exception thrown inside an OpenMP
# region, which ends the process. It returns what it was given, or it would be dropped as unused.
@torch.library.custom_op("mmopt::proven_bounds", mutates_args=())
def _proven_bounds(bounds: Tensor, broken: Tensor) -> Tensor:
    if broken.device.type != "cpu":
        # The host must not wait for a device value.
        torch._assert_async(~broken.any(), NOT_INTERVALS)
    elif broken.any():
        sequence, row = broken.nonzero()[0].tolist()
        raise InputError(f"{NOT_INTERVALS} The first is query {row} of sequence {sequence}.")
    return bounds.clone()


@_proven_bounds.register_fake
def _proven_bounds_fake(bounds: Tensor, broken: Tensor) -> Tensor:
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, computed by `mmopt::attention`.

    Args:
        query: `[B, Hq, S, D]`.
        key: `[B, Hkv, T, D]`; grouped heads are not repeated.
        value: `[B, Hkv, T, Dv]`, `Dv` at most `D`.
        attention_mask: what `interval_mask` returned, or a bool mask `[B, 1, S, T]` that the
            caller prepared, which is reduced here.
        dropout: of the attention weights. The op draws the seed on the device, so that
            `torch.manual_seed` governs it and checkpointing replays it.
        is_causal: overrides the module's own flag when there is no mask.
        s_aux: `[Hq]`, learned sinks.
        cu_seq_lens_q: `[pieces + 1]`, where the pieces of one long sequence end, the windows and
            images of a vision tower. Looked at when there is no mask and attention is not causal.

    Returns:
        `[B, S, Hq, Dv]`, and None for the attention weights, which are never formed.

    Raises:
        InputError: a position bias, keys picked one by one, attention weights as an output, an
            additive mask, or a mask that is not one interval per query.
    """
    for option in ("output_attentions", *_NOT_IN_THE_OP):
        if kwargs.get(option) is not None and kwargs[option] is not False:
            raise InputError(
                f"mmopt attention: {type(module).__name__} asks for {option}, which the op does "
                f"not have. Use model.set_attn_implementation('eager') for it."
            )
    intervals = None
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None:
        intervals, causal = _intervals(attention_mask), False
    elif cu_seq_lens_q is not None and not causal:
        intervals = _within_pieces(cu_seq_lens_q, query)
    else:
        # Only the prefill of an empty static cache has more keys than causal queries; the extra
        # ones are not written yet. The op, unlike transformers, aligns at the last key: right for
        # the queries that Gemma 4 leaves to the layers that share keys, the last of a prompt.
        shares_keys = getattr(module, "is_kv_shared_layer", False)
        if causal and query.shape[2] > 1 and key.shape[2] > query.shape[2] and not shares_keys:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    value_dim = value.shape[3]
    if value_dim < key.shape[3]:
        # Multi-head latent attention. As transformers' own flash attention does.
        value = pad(value, (0, key.shape[3] - value_dim))
    out = attention(
        query,
        key,
        value,
        intervals=intervals,
        causal=causal,
        scale=scaling,
        softcap=softcap,
        # Parameters keep the dtype of the checkpoint where PEFT or a norm made the query float32.
        sinks=s_aux if s_aux is None or s_aux.dtype == query.dtype else s_aux.float(),
        dropout_p=dropout,
    )
    return out[..., :value_dim].transpose(1, 2).contiguous(), None


def _within_pieces(ends: Tensor, query: Tensor) -> Intervals:
    """Each query `[1, Hq, S, D]` sees the keys of its own piece; nothing is read on the host."""
    ends = ends.to(torch.int32)
    rows = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
    piece = torch.searchsorted(ends, rows, right=True)
    return Intervals(ends[piece - 1][None], ends[piece][None])


def _intervals(mask: Tensor) -> Intervals:
    if mask.dtype == torch.bool and mask.dim() == 4:
        seen = _of_all_heads(mask)
        B, S, T = seen.shape
        mask = _bounds(*reduce_rows(lambda start, stop: seen[:, start:stop], S, T, B=B))
    elif mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[3] != 2:
        raise InputError(
            f"mmopt attention: the mask is {mask.dtype} {tuple(mask.shape)}, expected the bounds "
            "that transformers' mask functions make, or a bool mask [B, 1, S, T]. Pass a 2-D "
            f"attention_mask to the model, or none. {_SDPA}"
        )
    return Intervals(mask[:, 0, :, 0], mask[:, 0, :, 1])
