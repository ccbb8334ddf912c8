"""LoRAs that stay beside the graph: their A and B are inputs, which each run may choose anew.

Every target layer of a base computes ``base(x) + (x @ A) @ B`` with A `[in, rank]` and B
`[rank, out]`; the scale is folded into B, so that nothing else is needed to run an adapter. Ranks
may differ from layer to layer and from adapter to adapter, and rank 0 is no adapter.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mmopt_export.adapters.attach import ADAPTER, adapter_scales, attach_adapter
from mmopt_export.adapters.files import A_SUFFIX, B_SUFFIX
from mmopt_export.adapters.fit import PREFIX, BaseFacts, base_name, read_config, whole_names
from mmopt_export.adapters.merge import require_mergeable
from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.checkpoint import weights_sha256
from mmopt_export.decoder.part import Extra, LoweredDecoder
from mmopt_export.parts import Part, Samples
from mmopt_export.runtime import Tensors
from mmopt_kernels.errors import InputError

V = TypeVar("V")

# The rank of what is traced: more than 1, which torch.export would take for a constant.
_EXAMPLE_RANK = 3

# What an adapter may have that no A and B can stand for, and why.
_REFUSED = {
    "use_dora": "DoRA, which scales the base weight itself",
    "modules_to_save": "modules_to_save, which replace modules of the base",
    "target_parameters": "target_parameters, which are no layers",
    "trainable_token_indices": "trainable_token_indices, which replace rows of the embedding",
    "lora_bias": "lora_bias, which is neither A nor B",
    "kasa_config": "KaSA, which changes the base weight itself",
    "use_qalora": "QA-LoRA, which pools the input",
}


class SwapLinear(nn.Module):
    """A linear layer whose adapter is bound from outside; without one it is its base.

    Args:
        base: an `nn.Linear` or GPT-2's `Conv1D`.
        key: of its graph inputs, which are called `key` + `_lora_a` and `_lora_b`.
    """

    def __init__(self, base: nn.Module, key: str) -> None:
        super().__init__()
        self.base = base
        self.key = key
        self.bound: tuple[Tensor, Tensor] | None = None

    @property
    def in_features(self) -> int:
        """The width of its input."""
        return _widths(self.base)[0]

    @property
    def out_features(self) -> int:
        """The width of its output."""
        return _widths(self.base)[1]

    @property
    def weight(self) -> Tensor:
        """The base's: models look at its dtype."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        result: Tensor = self.base(x)
        if self.bound is None:
            return result
        a, b = self.bound
        return result + (x @ a) @ b


@dataclass(frozen=True)
class SwapAdapter:
    """An adapter as graph inputs.

    Attributes:
        name: what a run asks for: the last part of its path.
        arrays: fp32, by graph input; layers that it does not change are absent.
        rank: the largest of its layers'.
        record: for the manifest, as `Checkpoint.records` has it.
        warnings: for the user.
    """

    name: str
    arrays: Tensors
    rank: int
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Swap:
    """A base that takes adapters as inputs, and the adapters.

    Attributes:
        model: the base; its target layers are `SwapLinear`s.
        adapters: in the order given.
    """

    model: Any
    adapters: tuple[SwapAdapter, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of all adapters."""
        return tuple(note for adapter in self.adapters for note in adapter.warnings)

    def layers(self, parts: Sequence[Part]) -> dict[str, list[SwapLinear]]:
        """By part the layers that take adapters and that its graph runs.

        A part holds the whole model and may run some of it: one of two towers, say.

        Raises:
            InputError: an adapter that would do nothing.
        """
        layers = {part.name: _layers_run(part) for part in parts}
        run = {layer.key + A_SUFFIX for found in layers.values() for layer in found}
        for adapter in self.adapters:
            if run.isdisjoint(adapter.arrays):
                raise InputError(
                    f"no layer that the adapter {adapter.name} changes is in a graph of this "
                    f"artifact, which has {', '.join(layers)}. Leave the adapter out."
                )
        return layers

    def arrays(self, layers: Iterable[SwapLinear], adapter: SwapAdapter | None) -> Tensors:
        """Every adapter input of layers, with an adapter's values; rank 0 where it has none."""
        given = adapter.arrays if adapter is not None else {}
        arrays: Tensors = {}
        for layer in layers:
            for key, shape in (
                (layer.key + A_SUFFIX, (layer.in_features, 0)),
                (layer.key + B_SUFFIX, (0, layer.out_features)),
            ):
                arrays[key] = given.get(key, np.zeros(shape, dtype=np.float32))
        return arrays


def make_swappable(base: Any, adapters: Sequence[tuple[AdapterSpec, Path]]) -> Swap:
    """Replace every layer of `base` that one of the adapters changes, in place.

    Args:
        base: a plain fp32 model.
        adapters: LoRAs, each with its local folder; their weights are folded into B too.

    Raises:
        InputError: an adapter of another base, another method than LoRA, or one that is more than
            A and B (DoRA, modules_to_save, biases, embeddings, convolutions): named.
    """
    taken: dict[str, SwapAdapter] = {}
    keys: dict[str, str] = {}  # of the target layers, by path
    for spec, folder in adapters:
        name = Path(spec.path).resolve().name if Path(spec.path).exists() else Path(spec.path).name
        if name in taken:
            raise InputError(
                f"two adapters are called {name}, expected a name of its own for each: a run asks "
                "for an adapter by the last part of its path. Rename a folder."
            )
        taken[name] = _take(base, name, spec, folder, keys)
    for path, key in keys.items():
        parent, _, child = path.rpartition(".")
        setattr(base.get_submodule(parent), child, SwapLinear(base.get_submodule(path), key))
    base.requires_grad_(False)
    return Swap(base, tuple(taken.values()))


def swap_layers(module: nn.Module) -> list[SwapLinear]:
    """The layers of a module that take adapters, in the order of the module."""
    return [layer for layer in module.modules() if isinstance(layer, SwapLinear)]


@contextmanager
def bind(layers: Iterable[SwapLinear], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Have layers use these adapter inputs; a layer without any is its base.

    Args:
        values: by graph input, as `Swap.arrays` names them.
    """
    given = [layer for layer in layers if layer.key + A_SUFFIX in values]
    for layer in given:
        layer.bound = values[layer.key + A_SUFFIX], values[layer.key + B_SUFFIX]
    try:
        yield
    finally:
        for layer in given:
            layer.bound = None


def swap_inputs(
    layers: Iterable[SwapLinear],
) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Examples to trace with of the adapter inputs of layers, and their symbolic dimensions.

    Each layer's rank is a symbol of its own: ONNX Runtime lets values whose symbols are equal
    share memory, and ranks of one adapter may differ.
    """
    inputs: dict[str, Tensor] = {}
    axes: dict[str, dict[int, str]] = {}
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(layers):
        a, b = layer.key + A_SUFFIX, layer.key + B_SUFFIX
        inputs[a] = torch.randn(layer.in_features, _EXAMPLE_RANK, generator=generator)
        inputs[b] = torch.randn(_EXAMPLE_RANK, layer.out_features, generator=generator)
        axes[a], axes[b] = {1: f"rank_{number}"}, {0: f"rank_{number}"}
    return inputs, axes


def swappable(part: Part, swap: Swap, layers: Sequence[SwapLinear]) -> Part:
    """The part with the adapters of `layers`, of `Swap.layers`, as further inputs after its own.

    Its samples go round with no adapter, the first, the second and so on, each at least once.
    Without layers it is returned as it is.
    """
    if not layers:
        return part
    inputs, axes = swap_inputs(layers)
    lowered: nn.Module
    if isinstance(part.lowered, LoweredDecoder):
        lowered = part.lowered.with_extra(Extra(inputs, axes, partial(bind, layers)))
    else:
        lowered = Bound(part.lowered if part.lowered is not None else part.module, layers)

    def reference(feeds: Tensors) -> Tensors:
        own, given = _apart(feeds)
        with bind(layers, {name: torch.from_numpy(value) for name, value in given.items()}):
            return part.expect(own)

    return replace(
        part,
        lowered=lowered,
        inputs=part.inputs | inputs,
        axes=part.axes | axes,
        samples=_samples(
            part.samples, [swap.arrays(layers, one) for one in (None, *swap.adapters)]
        ),
        reference=reference,
    )


def add_defaults(model: Path) -> None:
    """Give the adapter inputs of an ONNX file a default of rank 0, which a run may leave them at.

    Call it last: a tool that takes every initializer for a constant would fold the inputs away.
    External data is left where it is.
    """
    proto = onnx.load(model, load_external_data=False)
    known = {initializer.name for initializer in proto.graph.initializer}
    for value in proto.graph.input:
        if not value.name.endswith((A_SUFFIX, B_SUFFIX)) or value.name in known:
            continue
        kind = value.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
        proto.graph.initializer.append(
            onnx.TensorProto(name=value.name, data_type=kind.elem_type, dims=shape, raw_data=b"")
        )
    onnx.save(proto, model)


class Bound(nn.Module):
    """A module that takes the adapter inputs of `layers` beside its own."""

    def __init__(self, module: nn.Module, layers: Sequence[SwapLinear]) -> None:
        super().__init__()
        self.module = module
        # No children: they are the module's already, whose parameters would then have two names.
        self._layers = tuple(layers)

    def around(self, module: nn.Module) -> "Bound":
        """The same inputs beside those of another module that runs the layers."""
        return Bound(module, self._layers)

    def forward(self, **inputs: Tensor) -> Any:
        """What the module gives, each layer with the adapter that was passed for it."""
        own, given = _apart(inputs)
        with bind(self._layers, given):
            return self.module(**own)


def _apart(inputs: Mapping[str, V]) -> tuple[dict[str, V], dict[str, V]]:
    """Inputs that are a part's own, and those of adapters."""
    own: dict[str, V] = {}
    given: dict[str, V] = {}
    for name, value in inputs.items():
        (given if name.endswith((A_SUFFIX, B_SUFFIX)) else own)[name] = value
    return own, given


def _layers_run(part: Part) -> list[SwapLinear]:
    """The layers of a part that take adapters and that it runs, in the order of its module."""
    layers = swap_layers(part.module)
    if not layers:
        return []
    run: set[nn.Module] = set()
    handles = [layer.register_forward_hook(lambda layer, *_: run.add(layer)) for layer in layers]
    try:
        if part.lowered is None or isinstance(part.lowered, LoweredDecoder):
            # A lowered decoder is traced with inputs of its own.
            part.expect({name: value.numpy() for name, value in part.inputs.items()})
        else:
            with torch.no_grad():
                part.lowered(**part.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in layers if layer in run]


def _samples(samples: Samples, choices: Sequence[Tensors]) -> Samples:
    def each() -> Iterator[Any]:
        last: Any = None
        used = 0
        for kind, feeds, *rest in samples():
            last = kind, feeds, *rest
            yield kind, feeds | choices[used % len(choices)], *rest
            used += 1
        for arrays in choices[used:] if last is not None else ():
            kind, feeds, *rest = last
            yield kind, feeds | arrays, *rest

    return each


def _take(
    base: Any, name: str, spec: AdapterSpec, folder: Path, keys: dict[str, str]
) -> SwapAdapter:
    """Read an adapter as arrays; `keys` gets the layers that it changes. The base stays plain."""
    config = read_config(folder)
    if config["peft_type"] != "LORA":
        raise InputError(
            f"{folder} is a {config['peft_type']} adapter and cannot be swapped, expected LORA: "
            "only A and B are inputs of the graph. Merge it with --adapters merge."
        )
    for setting, what in _REFUSED.items():
        if config.get(setting):
            raise _not_swappable(folder, what)
    if config.get("bias", "none") != "none":
        raise _not_swappable(folder, "biases of the base")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(("pissa", "corda", "olora", "loftq")):
        raise _not_swappable(folder, f"a start ({start}) that changes the base weight itself")
    require_mergeable(folder, config)
    facts = BaseFacts.of(base)
    kept = {key: base.state_dict()[key].clone() for key in whole_names(folder, facts)}
    attached = attach_adapter(base, folder)
    if changed := sorted(attached.whole - _copies(folder, kept)):
        raise _not_swappable(folder, f"{changed[0]} whole (as PEFT's modules_to_save)")
    scales = adapter_scales(attached.model)
    arrays: Tensors = {}
    ranks = []
    for path, scale in scales.items():
        layer = attached.model.get_submodule(PREFIX + path)
        kind = layer.get_base_layer()
        if not isinstance(kind, nn.Linear | Conv1D) or layer.lora_variant:
            raise _not_swappable(folder, f"{path}, a {type(kind).__name__}")
        key = keys.setdefault(path, _key(path, keys))
        a = layer.lora_A[ADAPTER].weight.detach().float()
        b = layer.lora_B[ADAPTER].weight.detach().double() * (scale * spec.weight)
        arrays[key + A_SUFFIX] = a.T.contiguous().numpy()
        arrays[key + B_SUFFIX] = b.float().T.contiguous().numpy()
        ranks.append(len(a))
    state = attached.model.unload().state_dict()
    for key, value in kept.items():
        state[key].copy_(value)
    return SwapAdapter(
        name=name,
        arrays=arrays,
        rank=max(ranks),
        record={
            "name": name,
            "path": str(folder),
            "sha256": weights_sha256(folder),
            "method": attached.method,
            "weight": spec.weight,
            "scale": scales,
            "rank": max(ranks),
        },
        warnings=attached.warnings,
    )


def _copies(folder: Path, base: Mapping[str, Tensor]) -> set[str]:
    """The parameters of the base that the adapter carries as they are: PEFT saves a head that it
    targets, in the adapter's dtype.
    """
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name = base_name(key)
                if name in base:
                    stored = file.get_tensor(key)
                    if torch.equal(stored, base[name].to(stored.dtype)):
                        found.add(name)
    return found


def _key(path: str, keys: Mapping[str, str]) -> str:
    """A name that PyTorch's exporter keeps as it is: it changes dots and large letters."""
    key = re.sub(r"\W", "_", path.lower())
    while key in keys.values():
        key += "_"
    return key


def _not_swappable(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder} has {what}, and cannot be swapped: only A and B of linear layers are inputs of "
        "the graph. Merge it with --adapters merge."
    )


def _widths(base: nn.Module) -> tuple[int, int]:
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    rows, columns = base.weight.shape  # type: ignore[misc]  # Conv1D's is [in, out]
    return int(rows), int(columns)
