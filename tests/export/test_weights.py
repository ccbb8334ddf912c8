"""Tensors of a checkpoint one at a time; quantized ones under the names of those they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmopt_export.weights import dequantized, stored_tensors
from mmopt_kernels import NF4Weight
from mmopt_kernels.errors import InputError
from mmopt_kernels.quantized import NF4_CODE
from nf4_weights import dense64, random_nf4

STATE = "quant_state.bitsandbytes__nf4"


def nf4_tensors(name: str, weight: NF4Weight, **settings: Any) -> dict[str, Tensor]:
    """A weight as bitsandbytes saves it."""
    state = {
        "shape": list(weight.shape),
        "blocksize": weight.blocksize,
        "dtype": "float32",
        "quant_type": "nf4",
    }
    tensors = {
        name: weight.packed.reshape(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": torch.tensor(NF4_CODE),
    }
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None
        assert weight.offset is not None
        state |= {"nested_blocksize": 256, "nested_offset": weight.offset.item()}
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = weight.nested_code
    text = json.dumps(state | settings).encode()
    tensors[f"{name}.{STATE}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def int8_tensors(name: str) -> dict[str, Tensor]:
    values = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4)
    module = name.removesuffix("weight")
    return {
        name: values,
        f"{module}SCB": torch.tensor([1.0, 2.0, 3.0]),
        f"{module}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def read(folder: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "model.safetensors"
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    return dequantized(stored_tensors([path]), "bitsandbytes")


@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
def test_a_quantized_weight_takes_the_place_of_its_parts(nested: bool, tmp_path: Path) -> None:
    """No part is left under a name that the model does not have."""
    weight = random_nf4(6, 64, nested=nested)
    other = torch.rand(3)
    kept, note = read(tmp_path, {"norm.weight": other} | nf4_tensors("a.weight", weight))
    assert sorted(kept) == ["a.weight", "norm.weight"]
    assert note == {
        "method": "nf4",
        "blocksize": 64,
        "double": nested,
        "dtype": "float32",
        "weights": 1,
    }
    assert kept["a.weight"].get_shape() == [6, 64]
    torch.testing.assert_close(kept["a.weight"].read().double(), dense64(weight))
    assert torch.equal(kept["norm.weight"][...], other)


def test_int8_weights_take_the_place_of_their_parts(tmp_path: Path) -> None:
    kept, note = read(tmp_path, int8_tensors("a.weight") | int8_tensors("b.weight"))
    assert sorted(kept) == ["a.weight", "b.weight"]
    assert note == {"method": "int8", "weights": 2}
    assert kept["a.weight"].get_shape() == [3, 4]


def test_a_table_of_other_values_is_followed(tmp_path: Path) -> None:
    weight = random_nf4(6, 64)
    tensors = nf4_tensors("a.weight", weight)
    tensors["a.weight.quant_map"] = torch.tensor(NF4_CODE) / 2
    kept, _ = read(tmp_path, tensors)
    torch.testing.assert_close(kept["a.weight"].read().double(), dense64(weight) / 2)


def test_scales_shared_by_another_number_of_blocks_are_refused(tmp_path: Path) -> None:
    tensors = nf4_tensors("a.weight", random_nf4(6, 64, nested=True), nested_blocksize=128)
    kept, _ = read(tmp_path, tensors)
    with pytest.raises(
        InputError, match=r"a\.weight is damaged .*nested_blocksize 128, expected 25"
    ):
        kept["a.weight"].read()


def test_a_dtype_that_torch_does_not_have_is_bad_input(tmp_path: Path) -> None:
    kept, _ = read(tmp_path, nf4_tensors("a.weight", random_nf4(6, 64), dtype="float31"))
    with pytest.raises(InputError, match=r"quantized weight a\.weight is damaged .*float31"):
        kept["a.weight"].read()


def test_a_mix_of_quantizations_is_refused(tmp_path: Path) -> None:
    mixed = nf4_tensors("a.weight", random_nf4(6, 64)) | int8_tensors("b.weight")
    with pytest.raises(InputError, match="the model mixes int8 and nf4, expected one of them"):
        read(tmp_path, mixed)


def test_int8_scales_without_their_weight_are_refused(tmp_path: Path) -> None:
    tensors = int8_tensors("a.weight")
    for weight in ({}, {"a.weight": tensors["a.weight"].float()}):
        rest = {name: one for name, one in tensors.items() if name != "a.weight"}
        with pytest.raises(InputError, match=r"holds a\.SCB without the int8 a\.weight it belongs"):
            read(tmp_path, rest | weight)


def test_a_tensor_without_values_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.empty(0, 3, dtype=torch.float16)}, tmp_path / "model.safetensors")
    found = stored_tensors([tmp_path / "model.safetensors"])["a"].read()
    assert (found.shape, found.dtype) == ((0, 3), torch.float16)


def test_what_is_read_may_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.arange(5)}, path)
    stored = stored_tensors([path])
    stored["a"].read().fill_(7)
    assert torch.equal(stored["a"].read(), torch.ones(3))
    assert torch.equal(stored["b"][1:], torch.arange(1, 5))


def test_a_file_that_lost_its_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path)
    stored = stored_tensors([path])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="ends within a: it was truncated while it was read"):
        stored["a"].read()


def test_a_type_that_torch_does_not_have_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputError, match=r"holds a as F4, expected one of BOOL, .*another dtype"):
        stored_tensors([path])
