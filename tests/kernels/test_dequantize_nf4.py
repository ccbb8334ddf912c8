"""mmopt::dequantize_nf4 against bitsandbytes, a float64 oracle, and its docstring's promises."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmopt_kernels import KernelInputError, NF4Weight, dequantize_nf4
from mmopt_kernels.quantized import flatten, nf4_code
from nf4_weights import dense64, random_nf4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton", "reference"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# An odd number of values; blocks across rows, the last one short; one value; whole blocks.
SHAPES = [(7, 33), (9, 100), (1, 1), (4, 256), (65, 130)]


def to(weight: NF4Weight, device: str) -> NF4Weight:
    parts = {n: v.to(device) for n, v in vars(weight).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(weight, **parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_values_match_the_float64_oracle(
    shape: tuple[int, int], nested: bool, dtype: torch.dtype, impl: str
) -> None:
    for blocksize in (32, 64, 4096):
        weight = random_nf4(*shape, nested=nested, blocksize=blocksize)
        got = dequantize_nf4(to(weight, DEVICE), dtype, impl=impl)
        assert got.dtype == dtype
        assert got.is_contiguous()
        want = dense64(weight)
        assert got.shape == want.shape
        # Half a unit in the last place, and float32's roundings; Triton's interpreter rounds to
        # bfloat16 towards zero, a whole unit.
        limit = torch.finfo(dtype).eps * (1 if impl == "triton" else 0.5) * 1.001 + 2**-21
        assert ((got.cpu().double() - want).abs() <= limit * want.abs()).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dequantized_values_are_bitsandbytes_bit_by_bit(
    nested: bool, dtype: torch.dtype, impl: str
) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter rounds to bfloat16 towards zero")
    functional = pytest.importorskip("bitsandbytes.functional")
    for N, K in ((64, 128), (33, 150), (7, 33)):
        values = torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype)
        packed, state = functional.quantize_4bit(
            values, quant_type="nf4", compress_statistics=nested
        )
        # For an odd K bitsandbytes compiles its own function, which takes seconds.
        with torch.compiler.set_stance("force_eager"):
            want = functional.dequantize_4bit(packed, state)
        weight = NF4Weight.from_bitsandbytes(packed, state)
        assert torch.equal(dequantize_nf4(to(weight, DEVICE), dtype, impl=impl).cpu(), want)


def test_float64_is_the_float32_value() -> None:
    weight = random_nf4(5, 70, nested=True)
    got = dequantize_nf4(weight, torch.float64)
    assert torch.equal(got, dequantize_nf4(weight, torch.float32).double())


def test_the_reference_gives_the_same_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight larger than a slice, its last block short."""
    weight = random_nf4(11, 333, nested=True)
    want = dequantize_nf4(weight, torch.float32, impl="reference")
    module = sys.modules["mmopt_kernels.dequantize_nf4.reference"]
    monkeypatch.setattr(module, "SLICE", 1024)
    assert torch.equal(dequantize_nf4(weight, torch.float32, impl="reference"), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_values_give_an_empty_weight(impl: str) -> None:
    got = dequantize_nf4(to(random_nf4(0, 64), DEVICE), torch.float32, impl=impl)
    assert got.shape == (0, 64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_nan_around_the_parts_does_not_leak_in(nested: bool, impl: str) -> None:
    """Parts are views into buffers of NaN and of bytes that would stand for other values."""
    weight = to(random_nf4(9, 75, nested=nested), DEVICE)
    want = dequantize_nf4(weight, torch.float32, impl=impl)
    parts = {}
    for name, part in vars(weight).items():
        if isinstance(part, torch.Tensor):
            fill = float("nan") if part.is_floating_point() else 255
            buffer = torch.full((part.numel() + 512,), fill, dtype=part.dtype, device=DEVICE)
            view = buffer[256 : 256 + part.numel()]
            view.copy_(part.reshape(-1))
            parts[name] = view
    got = dequantize_nf4(dataclasses.replace(weight, **parts), torch.float32, impl=impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_opcheck(nested: bool, impl: str) -> None:
    packed, (absmax, code, *inner), _ = flatten(to(random_nf4(6, 33, nested=nested), DEVICE))
    inner = inner or [None, None, None]
    args = (packed, absmax, code, *inner, 6, 33, 64, torch.bfloat16, impl)
    torch.library.opcheck(torch.ops.mmopt.dequantize_nf4.default, args)


def test_a_gradient_is_refused_with_its_reason() -> None:
    weight = random_nf4(6, 64)
    weight.absmax.requires_grad_()
    got = dequantize_nf4(weight, torch.float32)
    with pytest.raises(NotImplementedError, match="gradient of the quantized weight was requested"):
        got.sum().backward()


def test_a_table_of_ones_own_is_used() -> None:
    weight = random_nf4(6, 64)
    doubled = dataclasses.replace(weight, code=nf4_code("cpu") * 2)
    assert torch.equal(
        dequantize_nf4(doubled, torch.float32), dequantize_nf4(weight, torch.float32) * 2
    )


def test_flop_formula_counts_a_product_for_each_value() -> None:
    with FlopCounterMode(display=False) as counter:
        dequantize_nf4(random_nf4(6, 33))
    assert counter.get_total_flops() == 6 * 33


def test_unusable_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = to(random_nf4(6, 64), DEVICE)
    with pytest.raises(KernelInputError, match="weight is a Tensor, expected an NF4Weight"):
        dequantize_nf4(weight.packed)
    with pytest.raises(KernelInputError, match=r"dtype is torch\.int8, expected float16"):
        dequantize_nf4(weight, torch.int8)
    with pytest.raises(KernelInputError, match="impl is 'fused', expected one of auto, reference"):
        dequantize_nf4(weight, impl="fused")
    with pytest.raises(KernelInputError, match="has 192 packed bytes, expected 224"):
        dequantize_nf4(NF4Weight(weight.packed, weight.absmax, (7, 64)))
    with pytest.raises(KernelInputError, match=r"impl is 'triton' and dtype is torch\.float64"):
        dequantize_nf4(weight, torch.float64, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelInputError, match="tensors are on cpu, expected a GPU"):
        dequantize_nf4(random_nf4(6, 64), impl="triton")


def test_dequantizes_without_triton_and_without_bitsandbytes() -> None:
    """In a fresh process, with both blocked."""
    code = """
import sys
for name in ("triton", "bitsandbytes"): sys.modules[name] = None
import torch
import mmopt_kernels as m
weight = m.NF4Weight(torch.full((96,), 0xF0, dtype=torch.uint8), torch.full((3,), 2.0), (3, 64))
got = m.dequantize_nf4(weight, torch.float32)
assert torch.equal(got, torch.tensor([2.0, -2.0]).repeat(96).view(3, 64))
assert "mmopt_kernels.dequantize_nf4.kernel" not in sys.modules
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.slow
def test_values_past_2_31_are_where_they_belong() -> None:
    """4.3e9 values: offsets need 64 bits."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    N, K = 2**16 + 1, 2**16
    g = torch.Generator(device="cuda").manual_seed(0)
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda", generator=g)
    absmax = torch.rand(N * K // 64, device="cuda", generator=g)
    got = dequantize_nf4(NF4Weight(packed, absmax, (N, K)), torch.bfloat16)
    for row in (0, 2**15 - 1, 2**15, 2**16):
        bytes_, blocks = slice(row * K // 2, (row + 1) * K // 2), slice(row * K // 64, None)
        part = NF4Weight(packed[bytes_], absmax[blocks][: K // 64], (1, K))
        assert torch.equal(got[row : row + 1], dequantize_nf4(part, impl="reference"))
