"""Quantized weights: what bitsandbytes stores is taken over as it is, and misfits are named."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from mmopt_kernels import Int8Weight, KernelInputError, NF4Weight, dequantize_nf4, lora_linear
from mmopt_kernels.quantized import (
    Weight,
    check,
    dense,
    flatten,
    layout_shape,
    nf4_code,
    size,
    tensors_in,
    unflatten,
)
from nf4_weights import dense64, random_nf4

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weights() -> dict[str, tuple[Weight, str]]:
    values = torch.arange(-12, 12, dtype=torch.int8).view(6, 4)
    return {
        "dense": (torch.randn(6, 4), ""),
        "nf4": (random_nf4(6, 33), "nf4:6x33:64"),
        "nf4-nested": (random_nf4(6, 33, nested=True, blocksize=32), "nf4:6x33:32:256"),
        "int8": (Int8Weight(values, torch.rand(6)), "int8"),
    }


@pytest.mark.parametrize("kind", weights())
def test_the_layout_and_the_tensors_rebuild_the_weight(kind: str) -> None:
    weight, expected = weights()[kind]
    check("op", weight)
    main, rest, layout = flatten(weight)
    assert layout == expected
    assert len(rest) == tensors_in(layout)
    assert layout_shape(main.shape, layout) == size(weight)
    want = dense(main, rest, layout, torch.float32)
    assert tuple(want.shape) == size(weight)
    again = flatten(unflatten(main, rest, layout))
    assert again[2] == layout
    assert torch.equal(dense(*again, torch.float32), want)


def test_flattening_copies_nothing_but_the_table() -> None:
    weight = random_nf4(6, 64, nested=True)
    main, rest, _ = flatten(weight)
    assert main.data_ptr() == weight.packed.data_ptr()
    assert rest[0] is weight.absmax
    assert rest[2] is weight.nested_absmax


def test_a_dense_weight_is_itself() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    assert dense(*flatten(weight), torch.float32) is weight


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_int8_is_the_bytes_times_the_scale_over_127(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (9, 14), generator=g).to(torch.int8)
    scb = torch.rand(9, generator=g) + 0.5
    got = dense(*flatten(Int8Weight(values, scb)), dtype)
    assert got.dtype == dtype
    want = values.double() * scb.double()[:, None] / 127
    error = (got.double() - want).abs() / want.abs().clamp(min=1e-30)
    # One rounding to the dtype, and two of the scale to float32.
    assert error.max() <= torch.finfo(dtype).eps / 2 * 1.001 + 2**-22


def linear4bit(nested: bool = True, storage: torch.dtype = torch.uint8, **kwargs: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # Rows of whole blocks: see test_blocks_that_cross_rows_are_read_as_they_were_written.
    layer = bnb.nn.Linear4bit(
        128, 64, quant_type="nf4", compress_statistics=nested, quant_storage=storage, **kwargs
    )
    return layer.to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_linear4bit_is_taken_over_with_any_storage(nested: bool, storage: torch.dtype) -> None:
    layer = linear4bit(nested, storage)
    weight = NF4Weight.from_bitsandbytes(layer.weight)
    assert weight.packed.data_ptr() == layer.weight.data_ptr()
    assert not weight.packed.requires_grad
    from bitsandbytes.functional import dequantize_4bit

    want = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantize_nf4(weight, want.dtype), want)
    # The state by itself, as a wrapper that strips the parameter leaves it.
    bare = NF4Weight.from_bitsandbytes(layer.weight.data, layer.quant_state)
    assert torch.equal(dequantize_nf4(bare, want.dtype), want)


def test_blocks_that_cross_rows_are_read_as_they_were_written() -> None:
    """Which bitsandbytes' AVX512 kernel does not for K = 96: it reads every row as whole blocks."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(values, quant_type="nf4")
    got = dequantize_nf4(NF4Weight.from_bitsandbytes(packed, state), torch.float32)
    absmax = values.view(-1, 64).abs().amax(1).repeat_interleave(64).view(64, 96)
    # The widest gap of the table is 0.304 of absmax; half of it is the most that rounding does.
    assert ((got - values).abs() <= 0.153 * absmax).all()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_saved_and_loaded_state_dict_is_the_same_weight(nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = linear4bit(nested, bias=False)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    data = state.pop("weight")
    stats = {name.removeprefix("weight."): value for name, value in state.items()}
    loaded = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu")
    want = dequantize_nf4(NF4Weight.from_bitsandbytes(layer.weight), torch.float32)
    got = dequantize_nf4(NF4Weight.from_bitsandbytes(loaded), torch.float32)
    assert torch.equal(got, want)


def test_linear8bit_is_taken_over_before_and_after_its_first_forward() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(96, 64, has_fp16_weights=False)
    with pytest.raises(KernelInputError, match=r"without its row scales SCB, expected a quantized"):
        Int8Weight.from_bitsandbytes(layer)
    layer = layer.to("cpu")
    want = layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127
    for _ in range(2):
        weight = Int8Weight.from_bitsandbytes(layer)
        assert weight.values.data_ptr() == layer.weight.data_ptr()
        got = dense(*flatten(weight), torch.float32).double()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        layer(torch.randn(3, 96))
    assert layer.weight.CB is None
    trained = bnb.nn.Linear8bitLt(96, 64, has_fp16_weights=True)
    with pytest.raises(KernelInputError, match="has_fp16_weights=True, expected False"):
        Int8Weight.from_bitsandbytes(trained)


def test_a_weight_repacked_for_the_cpu_is_refused_and_one_taken_before_is_not_harmed() -> None:
    """bitsandbytes does it in place, in a layer's first forward in eval mode."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = linear4bit()
    weight = NF4Weight.from_bitsandbytes(layer.weight)
    want = dequantize_nf4(weight, torch.float32)
    state = layer.weight.quant_state
    # Called here, for it happens by itself only on some CPUs.
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, state)
    assert torch.equal(dequantize_nf4(weight, torch.float32), want)
    message = r"repacked the weight for its CPU kernel, expected its storage format.*Load the layer"
    with pytest.raises(KernelInputError, match=message):
        NF4Weight.from_bitsandbytes(layer.weight)


def test_a_weight_whose_repacking_was_undone_is_what_bitsandbytes_makes_of_it() -> None:
    """Saving undoes it: double-quantized absmax is quantized again, plain stays in bfloat16."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

    layer = linear4bit(nested=True)
    state = layer.weight.quant_state
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, state)
    layer.state_dict()
    want = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    got = dequantize_nf4(NF4Weight.from_bitsandbytes(layer.weight), want.dtype)
    assert torch.equal(got, want)

    layer = linear4bit(nested=False)
    state = layer.weight.quant_state
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, state)
    layer.state_dict()
    with pytest.raises(KernelInputError, match=r"absmax of .* has dtype torch\.bfloat16, expected"):
        NF4Weight.from_bitsandbytes(layer.weight)


def test_what_is_no_nf4_weight_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    fp4 = bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")
    with pytest.raises(KernelInputError, match="quant_type is 'fp4', expected 'nf4'"):
        NF4Weight.from_bitsandbytes(fp4.weight)
    unquantized = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    with pytest.raises(KernelInputError, match=r"float32 \(64, 64\) without a quant_state"):
        NF4Weight.from_bitsandbytes(unquantized.weight)
    packed, state = bnb.functional.quantize_4bit(torch.randn(2, 3, 64), quant_type="nf4")
    with pytest.raises(KernelInputError, match=r"has shape \(2, 3, 64\), expected \(N, K\)"):
        NF4Weight.from_bitsandbytes(packed, state)


NF4_MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"shape": (6, 65)}, r"has 192 packed bytes, expected 195 because its shape is \(6, 65\)"),
    ({"shape": (-6, -64)}, r"has shape \(-6, -64\), expected \(N, K\), neither negative"),
    ({"shape": (384,)}, r"has shape \(384,\), expected \(N, K\)"),
    ({"blocksize": 48}, r"has blocksize 48, expected one of 32, 64,"),
    ({"blocksize": 32}, r"absmax of .* has 6 values, expected 12, because a weight of \(6, 64\)"),
    ({"absmax": torch.rand(6)}, r"absmax .* dtype torch\.float32, expected torch\.uint8 with"),
    ({"absmax": torch.zeros(6, dtype=torch.uint8, device="meta")}, "is on meta, expected cpu like"),
    ({"nested_absmax": torch.rand(2)}, "nested_absmax of .* has 2 values, expected 1, because abs"),
    ({"nested_code": torch.rand(16)}, "nested_code of .* has 16 values, expected 256"),
    ({"nested_code": None}, "has nested_absmax, offset and lacks nested_code, expected all of"),
    ({"offset": torch.rand(2)}, "offset of .* has 2 values, expected 1"),
    ({"offset": torch.rand(1).half()}, r"offset of .* dtype torch\.float16, expected torch\.float"),
    ({"nested_blocksize": 64}, "has nested_blocksize 64, expected 256"),
    ({"code": torch.rand(256)}, "code of .* has 256 values, expected 16"),
]


@pytest.mark.parametrize(("change", "message"), NF4_MISFITS, ids=[m[:40] for _, m in NF4_MISFITS])
def test_nf4_parts_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    weight = dataclasses.replace(random_nf4(6, 64, nested=True), **change)
    with pytest.raises(KernelInputError, match=message):
        check("lora_linear", weight)


def test_a_plain_absmax_must_be_float32() -> None:
    weight = dataclasses.replace(random_nf4(6, 64), absmax=torch.zeros(6, dtype=torch.uint8))
    with pytest.raises(KernelInputError, match=r"expected torch\.float32 without double quant"):
        check("lora_linear", weight)


@pytest.mark.parametrize(
    ("values", "scb", "message"),
    [
        (
            torch.zeros(3, 4),
            torch.ones(3),
            r"values .* torch\.float32 \(3, 4\), expected torch\.in",
        ),
        (torch.zeros(12, dtype=torch.int8), torch.ones(3), r"torch\.int8 \(12,\), expected"),
        (torch.zeros(3, 4, dtype=torch.int8), torch.ones(4), r"float32 \(4,\), expected .* \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.int8), torch.ones(3).half(), r"float16 \(3,\), expected"),
        (torch.zeros(3, 4, dtype=torch.int8), torch.ones(3, device="meta"), "meta, expected cpu"),
    ],
)
def test_int8_parts_that_do_not_fit_are_named(values: Tensor, scb: Tensor, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        check("lora_linear", Int8Weight(values, scb))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_layer_is_taken_over_inside_one_compiled_graph(nested: bool) -> None:
    """fullgraph, dynamic, and no recompilation when the number of rows changes."""
    layer = linear4bit(nested)

    def call(x: Tensor) -> Tensor:
        main, rest, layout = flatten(NF4Weight.from_bitsandbytes(layer.weight))
        assert layout_shape(main.shape, layout) == (64, 128)
        return torch.nn.functional.linear(x, dense(main, rest, layout, x.dtype))

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for number, rows in enumerate((3, 5, 9)):
        x = torch.randn(rows, 128)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            torch.testing.assert_close(compiled(x), call(x))


def test_the_oracle_of_these_tests_is_bitsandbytes_own() -> None:
    layer = linear4bit(nested=True)
    weight = NF4Weight.from_bitsandbytes(layer.weight)
    from bitsandbytes.functional import dequantize_4bit

    want = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    torch.testing.assert_close(dense64(weight), want, rtol=1e-5, atol=1e-8)


def test_weight_may_be_an_argument_of_a_compiled_graph_with_dynamic_sizes() -> None:
    """Its sizes are symbols there, and its layout is a string of them."""
    packed = torch.randint(256, (128 * 32,), dtype=torch.uint8)
    weight = NF4Weight(packed, torch.rand(128), (128, 64), code=nf4_code("cpu"))
    a, b = torch.randn(4, 64), torch.randn(128, 4)

    def run(x: Tensor, base: NF4Weight) -> Tensor:
        return lora_linear(x, base, a, b, scale=0.5)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 5):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x, weight), run(x, weight))
