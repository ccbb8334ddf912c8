"""The kernel of the LoRA linear layer over an NF4 base, for few rows, against float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="runs Triton kernels")

from mmopt_kernels import NF4Weight, dequantize_nf4, tuning
from mmopt_kernels.lora_linear.kernel_nf4 import up_nf4
from nf4_weights import dense64, random_nf4
from program_order import last_program_first

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.5
# Relative to the largest value: rounding of the weight, of the adapter's factor and of the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    R: int = 8
    blocksize: int = 64
    nested: bool = True
    bias: bool = True

    def __str__(self) -> str:
        kind = f"{'nested' if self.nested else 'plain'}{'-bias' if self.bias else ''}"
        return f"M{self.M}-N{self.N}-K{self.K}-R{self.R}-B{self.blocksize}-{kind}"


CASES = [
    # Whole words and blocks; over several splits of K.
    Case(3, 70, 256, R=5),
    Case(1, 130, 1024, R=16, nested=False),
    Case(64, 40, 512, R=1, bias=False),
    # Words, but blocks that cross rows or are longer than one.
    Case(17, 33, 72),
    Case(5, 65, 512, R=70, blocksize=4096),
    Case(2, 9, 640, blocksize=256, nested=False),
    Case(2, 64, 160, blocksize=32),
    # Rows that begin within a word, or within a byte.
    Case(64, 33, 100, R=20),
    Case(20, 40, 33, nested=False),
    Case(1, 1, 1, R=1),
]


def inputs(case: Case, dtype: torch.dtype, factor: torch.dtype) -> tuple[Tensor, ...]:
    """x, s, b, bias."""
    g = torch.Generator().manual_seed(1)

    def make(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, to)

    return (
        make(case.M, case.K),
        make(case.M, case.R),
        make(case.N, case.R, to=factor),
        make(case.N),
    )


def moved(weight: NF4Weight) -> NF4Weight:
    parts = {n: v.to(DEVICE) for n, v in vars(weight).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(weight, **parts)


def oracle(weight: NF4Weight, x: Tensor, s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    wide = dense64(weight).to(x.device)
    y = x.double() @ wide.t() + SCALE * (s.double() @ b.to(x.dtype).double().t())
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("factor", ["same", "fp32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_layer_matches_the_float64_oracle(
    case: Case, dtype: torch.dtype, factor: str
) -> None:
    weight = random_nf4(case.N, case.K, nested=case.nested, blocksize=case.blocksize)
    x, s, b, bias = inputs(case, dtype, dtype if factor == "same" else torch.float32)
    used = bias if case.bias else None
    y = up_nf4(x, moved(weight), s, b, used, SCALE)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert y.isfinite().all()
    want = oracle(weight, x, s, b, used)
    assert (y.double() - want).abs().max() <= TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own order")
@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
def test_no_program_writes_into_the_place_of_another(case: Case) -> None:
    """Tails of both tiles, in one part and in several, whichever program comes last."""
    weight = moved(random_nf4(case.N, case.K, nested=case.nested))
    x, s, b, bias = inputs(case, torch.float32, torch.float32)
    want = up_nf4(x, weight, s, b, bias, SCALE)
    with last_program_first():
        assert torch.equal(up_nf4(x, weight, s, b, bias, SCALE), want)


@pytest.mark.parametrize("K", [256, 100, 33])
def test_the_weight_is_the_one_that_dequantize_nf4_gives(K: int) -> None:
    """Through unit vectors, each value comes out alone: few rows and many see the same layer."""
    weight = moved(random_nf4(5, K, nested=True))
    want = dequantize_nf4(weight, torch.float16, impl="triton")
    got = []
    for start in range(0, K, 64):
        x = torch.eye(K, dtype=torch.float16, device=DEVICE)[start : start + 64]
        none = x.new_zeros(x.shape[0], 1)
        got.append(up_nf4(x, weight, none, none[:5], None, SCALE))
    # A GPU may contract a nested absmax's product and sum; the value is then rounded otherwise.
    eps = torch.finfo(torch.float16).eps if DEVICE == "cuda" else 0.0
    torch.testing.assert_close(torch.cat(got).t(), want, rtol=eps, atol=0)


@pytest.mark.parametrize("K", [256, 100, 33])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_nan_around_the_inputs_neither_leaks_in_nor_is_touched(nested: bool, K: int) -> None:
    """Views into buffers of NaN, of bytes that stand for other values, at odd offsets."""
    case = Case(7, 37, K)
    weight = moved(random_nf4(37, K, nested=nested))
    x, s, b, bias = inputs(case, torch.float32, torch.float32)
    want = up_nf4(x, weight, s, b, bias, SCALE)
    buffers: list[tuple[Tensor, Tensor]] = []

    def buried(t: Tensor) -> Tensor:
        fill = float("nan") if t.is_floating_point() else 255
        buffer = torch.full([n + 9 for n in t.shape], fill, dtype=t.dtype, device=DEVICE)
        view = buffer[tuple(slice(5, 5 + n) for n in t.shape)]
        view.copy_(t)
        buffers.append((buffer, buffer.clone()))
        return view

    parts = {
        name: buried(part.reshape(-1))
        for name, part in vars(weight).items()
        if isinstance(part, torch.Tensor)
    }
    poisoned = dataclasses.replace(weight, **parts)
    y = up_nf4(buried(x), poisoned, buried(s), buried(b), buried(bias), SCALE)
    # Packed bytes at an odd offset are read one at a time, and summed in smaller tiles.
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)
    for now, then in buffers:
        assert torch.equal(now.nan_to_num(-7), then.nan_to_num(-7))


def test_a_strided_or_expanded_bias_is_read_right() -> None:
    case = Case(7, 37, 64)
    weight = moved(random_nf4(37, 64))
    x, s, b, _ = inputs(case, torch.float32, torch.float32)
    for bias in (torch.randn(74, device=DEVICE)[::2], torch.randn(1, device=DEVICE).expand(37)):
        want = up_nf4(x, weight, s, b, bias.contiguous(), SCALE)
        assert torch.equal(up_nf4(x, weight, s, b, bias, SCALE), want)


def test_a_split_sum_is_the_same_each_time() -> None:
    case = Case(2, 33, 2048)
    weight = moved(random_nf4(33, 2048, nested=True))
    x, s, b, bias = inputs(case, torch.float32, torch.float32)
    first = up_nf4(x, weight, s, b, bias, SCALE)
    assert torch.equal(up_nf4(x, weight, s, b, bias, SCALE), first)
    assert (first.double() - oracle(weight, x, s, b, bias)).abs().max() < 1e-3


def test_a_table_entry_sets_the_tile() -> None:
    case = Case(2, 33, 256)
    weight = moved(random_nf4(33, 256))
    x, s, b, bias = inputs(case, torch.float32, torch.float32)
    want = up_nf4(x, weight, s, b, bias, SCALE)
    tile = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4}
    with tuning.forcing({"lora_linear_nf4": tile}) as asked:
        y = up_nf4(x, weight, s, b, bias, SCALE)
    assert asked["lora_linear_nf4"].width == 16
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("K", [72, 100])
def test_a_table_entry_is_for_aligned_words_alone(K: int) -> None:
    """Blocks that cross rows and rows that begin within a word need more registers."""
    x, s, b, bias = inputs(Case(2, 33, K), torch.float32, torch.float32)
    tile = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4}
    with tuning.forcing({"lora_linear_nf4": tile}) as asked:
        up_nf4(x, moved(random_nf4(33, K)), s, b, bias, SCALE)
    assert not asked


def test_no_outputs_and_no_rows_launch_nothing() -> None:
    weight = moved(random_nf4(4, 64))
    x = torch.zeros(0, 64, device=DEVICE)
    assert up_nf4(x, weight, x[:, :1], x.new_zeros(4, 1), None, SCALE).shape == (0, 4)


def test_a_layer_without_features_is_its_bias_and_adapter() -> None:
    weight = moved(random_nf4(4, 0))
    x, s, b, bias = inputs(Case(3, 4, 0, R=2), torch.float32, torch.float32)
    want = SCALE * s @ b.t() + bias
    torch.testing.assert_close(up_nf4(x, weight, s, b, bias, SCALE), want)


def test_rows_that_are_far_apart_are_read_where_they_are() -> None:
    """As the last tokens of long sequences are: past 2**31 elements from the first."""
    stride = 1_200_000_000
    # Memory that is never touched takes none. An offset that wraps would fall into it too.
    buffer = torch.empty(2 * 10**9 + 2 * stride + 64, dtype=torch.float16, device=DEVICE)
    weight = moved(random_nf4(33, 64, nested=True))
    near, s, b, bias = inputs(Case(3, 33, 64), torch.float16, torch.float16)
    x = buffer.as_strided(near.shape, (stride, 1), 2 * 10**9).copy_(near)
    want = up_nf4(near, weight, s, b, bias, SCALE)
    assert torch.equal(up_nf4(x, weight, s, b, bias, SCALE), want)
