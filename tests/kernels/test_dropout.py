"""mmopt::dropout: its mask, and the promises that the LoRA ops rely on."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

import mmopt_kernels.dropout.ops  # noqa: F401 - registers the op
from mmopt_kernels._philox import dropout_scales
from mmopt_kernels.dropout.reference import keep_mask
from mmopt_kernels.errors import KernelInputError
from program_order import last_program_first

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLS = ["reference", *["triton"] * HAS_TRITON]
SEED = -(3 << 40) + 12345  # negative, and wider than 32 bits


def seed() -> Tensor:
    return torch.tensor([SEED], device=DEVICE)


def dropout(x: Tensor, p: float, impl: str = "auto") -> Tensor:
    return torch.ops.mmopt.dropout(x, seed(), p, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(43, 101), (2, 3, 5), (7,), (1, 1), (3, 600)], ids=str)
def test_kept_values_are_scaled_and_others_zero(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    """Leading dimensions count as one; the factor rounds once."""
    x = torch.randn(shape, device=DEVICE).to(dtype)
    y = dropout(x, 0.3, impl)
    K = shape[-1]
    kept = keep_mask(seed(), 0.3, x.numel() // K, K).view(shape)
    assert y.dtype == dtype
    assert torch.equal(y != 0, kept & (x != 0))
    want = torch.where(kept, x.double() / 0.7, 0.0)
    # Triton's interpreter cuts bfloat16 off: a unit in the last place instead of half of one.
    torch.testing.assert_close(y.double(), want, atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_goes_through_the_same_mask(impl: str) -> None:
    x = torch.randn(9, 30, device=DEVICE, requires_grad=True)
    g = torch.randn(9, 30, device=DEVICE)
    (dx,) = torch.autograd.grad(dropout(x, 0.5, impl), x, g)
    assert torch.equal(dx, dropout(g, 0.5, impl))


def test_float64_gradients_pass_gradcheck() -> None:
    """First and second derivatives."""
    x = torch.randn(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dropout(t, 0.4), x)
    assert torch.autograd.gradgradcheck(lambda t: dropout(t, 0.4), x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p: float, impl: str) -> None:
    """A copy even where nothing is dropped: the op never returns its input."""
    x = torch.randn(2, 5, 7, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.mmopt.dropout.default, (x, seed(), dropout_p, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_between_nan_are_read_and_not_touched(impl: str) -> None:
    buffer = torch.full((12, 40), float("nan"), device=DEVICE)
    for view in (buffer[1:8, 3:33], buffer[1:8, 3:33].t()):
        view.copy_(torch.arange(view.numel(), device=DEVICE).view(view.shape))
        before = buffer.clone()
        y = dropout(view, 0.2, impl)
        assert y.is_contiguous()
        assert torch.equal(y, dropout(view.contiguous(), 0.2, impl))
        assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("impl", IMPLS)
def test_dropped_nan_is_zero_and_kept_nan_stays(impl: str) -> None:
    y = dropout(torch.full((20, 20), float("nan"), device=DEVICE), 0.5, impl)
    assert torch.equal(y.isnan(), keep_mask(seed(), 0.5, 20, 20))
    assert not y.nan_to_num().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_no_rows(impl: str) -> None:
    assert dropout(torch.empty(2, 0, 5, device=DEVICE), 0.5, impl).shape == (2, 0, 5)
    assert dropout(torch.empty(3, 0, device=DEVICE), 0.5, impl).shape == (3, 0)


@pytest.mark.skipif(not HAS_TRITON, reason="runs a Triton kernel")
def test_mask_does_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmopt_kernels.dropout import kernel

    x = torch.ones(37, 70, device=DEVICE)
    want = kernel.launch(x, seed(), 0.4)
    for rows, columns in ((16, 16), (2, 64), (64, 32)):
        monkeypatch.setattr(kernel, "BLOCK_M", rows)
        monkeypatch.setattr(kernel, "BLOCK_K", columns)
        assert torch.equal(kernel.launch(x, seed(), 0.4), want)


@pytest.mark.skipif(DEVICE == "cuda" or not HAS_TRITON, reason="a GPU has its own order")
def test_no_program_writes_into_the_place_of_another() -> None:
    """Rows and columns that fill no tile, whichever program comes last."""
    x = torch.ones(37, 700, device=DEVICE)
    want = dropout(x, 0.4, "reference")
    with last_program_first():
        assert torch.equal(dropout(x, 0.4, "triton"), want)


def test_rows_that_are_far_apart_are_read_where_they_are() -> None:
    """As the last tokens of long sequences are: past 2**31 elements from the first."""
    stride = 1_200_000_000
    # Memory that is never touched takes none. An offset that wraps would fall into it too.
    buffer = torch.empty(2 * 10**9 + 2 * stride + 64, dtype=torch.float16, device=DEVICE)
    near = torch.randn(3, 64, device=DEVICE).half()
    far = buffer.as_strided(near.shape, (stride, 1), 2 * 10**9).copy_(near)
    for impl in IMPLS:
        assert torch.equal(dropout(far, 0.4, impl), dropout(near, 0.4, impl))


if HAS_TRITON:
    import triton
    import triton.language as tl

    from mmopt_kernels.dropout.kernel import kept

    @triton.jit
    def draw(p_seed, p_kept, i_m, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """What the kernels keep of the rows from i_m on."""
        o_m = i_m + tl.arange(0, ROWS).to(tl.int64)
        o_kept = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        m_kept = kept(tl.load(p_seed), o_m, 0, threshold, COLUMNS)
        tl.store(p_kept + o_kept, m_kept.to(tl.int8))


@pytest.mark.skipif(not HAS_TRITON, reason="runs a Triton kernel")
@pytest.mark.parametrize("start", [2**31 - 7, 2**32 - 7, 2**40 + 5])
def test_kernels_count_rows_in_64_bits(start: int) -> None:
    threshold, _ = dropout_scales(0.4)
    got = torch.empty(16, 32, dtype=torch.int8, device=DEVICE)
    draw[(1,)](seed(), got, start, threshold, ROWS=16, COLUMNS=32)
    assert torch.equal(got.bool(), keep_mask(seed(), 0.4, 16, 32, start))


def test_rows_in_blocks_draw_what_all_rows_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes rows in blocks; a row's number reaches beyond 32 bits."""
    from mmopt_kernels.dropout import reference

    every = keep_mask(seed(), 0.5, 50, 21)
    assert torch.equal(keep_mask(seed(), 0.5, 13, 21, start=20), every[20:33])
    far = keep_mask(seed(), 0.5, 50, 21, start=2**32)
    assert 0.3 < (far != every).double().mean().item() < 0.7
    x = torch.ones(50, 21, device=DEVICE)
    whole = reference.reference(x, seed(), 0.5)
    monkeypatch.setattr(reference, "_BLOCK", 21 * 2)
    assert torch.equal(reference.reference(x, seed(), 0.5), whole)
    assert torch.equal(whole != 0, every)


def test_attention_draws_another_mask_with_the_same_seed() -> None:
    """The streams of the two ops differ in the last counter word."""
    from mmopt_kernels.attention.philox import keep_mask as attention_mask

    i, zero = torch.arange(50, device=DEVICE)[:, None], torch.zeros(1, device=DEVICE).long()
    other = attention_mask(seed(), 0.5, zero, i, 0, 40)
    assert 0.4 < (other != keep_mask(seed(), 0.5, 50, 40)).double().mean().item() < 0.6


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_keep_rate_is_within_binomial_bounds(dropout_p: float) -> None:
    """Five standard deviations: a right generator fails once in a million seeds; this is fixed."""
    keep = keep_mask(seed(), dropout_p, 300, 400)
    deviation = (dropout_p * (1 - dropout_p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - dropout_p)) < 5 * deviation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x is torch.float32 \(\), expected \[..., K\]"),
        ({"x": torch.zeros(3, 4, dtype=torch.int8)}, r"x is torch.int8 \(3, 4\), expected"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed is torch.int64 \(2,\), expected one"),
        ({"seed": torch.zeros(1)}, r"seed is torch.float32 \(1,\), expected one int64"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0, expected at least 0 and less than 1"),
        ({"impl": "fused"}, r"impl is 'fused', expected one of auto, reference, triton"),
    ],
    ids=["scalar", "dtype", "seeds", "seed-dtype", "p", "impl"],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 4),
        "seed": torch.zeros(1, dtype=torch.int64),
        "dropout_p": 0.5,
        "impl": "auto",
    }
    with pytest.raises(KernelInputError, match=message):
        torch.ops.mmopt.dropout(*(arguments | change).values())
