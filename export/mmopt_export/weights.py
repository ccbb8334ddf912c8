"""Reads a checkpoint's tensors one at a time, 4-bit and 8-bit ones dequantized on the way.

A mapped file counts as memory of the process for as long as it is mapped, so each tensor has a
mapping of its own. One that is converted gives its back at once: at any moment the model exists
once, plus what is being converted. One that needs no conversion stays mapped, and the system may
take its memory back.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmopt_kernels import Int8Weight, NF4Weight, dequantize_nf4
from mmopt_kernels.errors import InputError, KernelInputError
from mmopt_kernels.quantized import NESTED_BLOCKSIZE, check, dense, flatten

_STATE = ".quant_state.bitsandbytes__"
_NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, read anew each time it is indexed.

    transformers takes it where it takes a slice of a file: both are read with ``[...]``.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> Tensor:
        """The tensor, in a mapping of its own that may be written to and is gone with it."""
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)
        start = self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                data = mmap.mmap(
                    file.fileno(),
                    start + self.size,
                    offset=self.offset - start,
                    access=mmap.ACCESS_COPY,
                )
        except ValueError as error:  # it would reach behind the file's end
            raise InputError(
                f"{self.path} ends within {self.key}: it was truncated while it was read. "
                "Download or save it again."
            ) from error
        flat = torch.frombuffer(data, dtype=torch.uint8, count=self.size, offset=start)
        return flat.view(self.dtype).reshape(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def get_shape(self) -> list[int]:
        """As that of a slice of a safetensors file."""
        return list(self.shape)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight that bitsandbytes quantized, dequantized to float32 each time it is indexed.

    Attributes:
        main: the packed bytes (NF4) or the int8 values.
        parts: its other tensors: by suffix of their key (NF4), or `SCB` (int8).
        state: NF4's description of itself; None for int8.
    """

    main: StoredTensor
    parts: Mapping[str, StoredTensor]
    state: Mapping[str, Any] | None

    def read(self) -> Tensor:
        """``[N, K]`` float32: what the adapter saw in training.

        bitsandbytes dequantizes into the dtype that the checkpoint names, so values are rounded to
        it first.
        """
        try:
            if self.state is None:
                weight = Int8Weight(self.main.read(), self.parts["SCB"].read())
                check(self.main.key, weight)
                return dense(*flatten(weight), torch.float32, "reference")
            dtype = getattr(torch, self.state["dtype"])
            return dequantize_nf4(self._nf4(self.state), dtype, impl="reference").float()
        except (KernelInputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.main.path}: the quantized weight {self.main.key} is damaged ({error!r}). "
                "Download or save it again."
            ) from error

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def get_shape(self) -> list[int]:
        """The shape of the weight that it stands for."""
        return list(self.main.shape if self.state is None else self.state["shape"])

    def _nf4(self, state: Mapping[str, Any]) -> NF4Weight:
        rows, columns = state["shape"]
        nested = ".nested_absmax" in self.parts
        return NF4Weight(
            packed=self.main.read(),
            absmax=self.parts[".absmax"].read(),
            shape=(rows, columns),
            blocksize=state["blocksize"],
            nested_absmax=self.parts[".nested_absmax"].read() if nested else None,
            nested_code=self.parts[".nested_quant_map"].read() if nested else None,
            offset=torch.tensor(state["nested_offset"]) if nested else None,
            nested_blocksize=state["nested_blocksize"] if nested else NESTED_BLOCKSIZE,
            code=self.parts[".quant_map"].read(),
        )


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by key; nothing but their headers is read.

    Raises:
        InputError: a tensor of a type that torch does not have.
    """
    # Large, and whoever only measures or runs an artifact imports this module too.
    from transformers.modeling_utils import str_to_torch_dtype

    found = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in str_to_torch_dtype:
                raise InputError(
                    f"{path} holds {key} as {entry['dtype']}, expected one of "
                    f"{', '.join(str_to_torch_dtype)}. Save it in another dtype."
                )
            start, end = entry["data_offsets"]
            found[key] = StoredTensor(
                path=path,
                key=key,
                dtype=str_to_torch_dtype[entry["dtype"]],
                shape=tuple(entry["shape"]),
                offset=8 + length + start,
                size=end - start,
            )
    return found


def dequantized(
    tensors: Mapping[str, StoredTensor], method: str
) -> tuple[dict[str, StoredTensor | QuantizedTensor], dict[str, Any]]:
    """Put a `QuantizedTensor` in the place of the tensors that make up each quantized weight.

    Args:
        tensors: of a checkpoint, as `stored_tensors` gives them.
        method: the checkpoint's `quant_method`.

    Returns:
        The tensors under the names of an unquantized checkpoint, and what they were quantized
        with, for the manifest.

    Raises:
        InputError: not NF4 or int8 of bitsandbytes, or parts of a weight are missing.
    """
    if method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise InputError(
            f"the model is quantized with {method}, expected bitsandbytes' NF4 or int8. "
            "Pass the model that it was quantized from."
        )
    kept: dict[str, StoredTensor | QuantizedTensor] = dict(tensors)
    notes: list[dict[str, Any]] = []
    for key in tensors:
        if _STATE in key:
            name, _, kind = key.partition(_STATE)
            weight, note = _nf4_weight(tensors, kept, name, kind)
        elif key.endswith(".SCB"):
            name = key.removesuffix("SCB") + "weight"
            weight, note = _int8_weight(tensors, kept, name, key)
        else:
            continue
        kept[name] = weight
        notes.append(note)
    if not notes:
        raise InputError(
            "config.json says that the model is quantized, but its weights are not. Remove "
            "quantization_config from config.json, or save the quantized model again."
        )
    kinds = sorted({note["method"] for note in notes})
    if len(kinds) > 1:
        raise InputError(f"the model mixes {' and '.join(kinds)}, expected one of them.")
    return kept, {**notes[0], "weights": len(notes)}


def _nf4_weight(
    tensors: Mapping[str, StoredTensor],
    kept: dict[str, StoredTensor | QuantizedTensor],
    name: str,
    kind: str,
) -> tuple[QuantizedTensor, dict[str, Any]]:
    if kind != "nf4":
        raise InputError(
            f"{name} is quantized to {kind}, expected nf4. Pass the model that it was quantized "
            "from."
        )
    key = f"{name}{_STATE}{kind}"
    try:
        state = json.loads(bytes(tensors[key].read().tolist()).decode())
        parts = {part: tensors[name + part] for part in _NF4_PARTS if name + part in tensors}
        main = tensors[name]
        note = {
            "method": kind,
            "blocksize": int(state["blocksize"]),
            "double": ".nested_absmax" in parts,
            "dtype": str(state["dtype"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{tensors[key].path}: {key} is damaged ({error!r}). Download or save it again."
        ) from error
    for taken in (key, *(name + part for part in parts)):
        kept.pop(taken)
    return QuantizedTensor(main, parts, state), note


def _int8_weight(
    tensors: Mapping[str, StoredTensor],
    kept: dict[str, StoredTensor | QuantizedTensor],
    name: str,
    key: str,
) -> tuple[QuantizedTensor, dict[str, Any]]:
    if name not in tensors or tensors[name].dtype != torch.int8:
        raise InputError(f"{tensors[key].path} holds {key} without the int8 {name} it belongs to.")
    kept.pop(key)
    kept.pop(f"{name}_format", None)
    return QuantizedTensor(tensors[name], {"SCB": tensors[key]}, None), {"method": "int8"}
