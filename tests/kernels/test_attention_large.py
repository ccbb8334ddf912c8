"""Offsets beyond 2^31 elements, in every axis and every tensor that the kernels touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="runs Triton kernels")

from mmopt_kernels import Intervals, attention
from mmopt_kernels.attention import kernel, kernel_backward, kernel_decode
from mmopt_kernels.attention.reference import reference

# Two of these make an offset that needs more than 31 bits. One alone fits: a stride that did not
# would itself be passed as 64 bits, and hide a product of 32.
FAR = 2**30 + 64
N, D = 3, 16  # of every axis but the last, and the last


class Sparse:
    """Float16 tensors whose steps along one axis are FAR, in a file of which little exists."""

    def __init__(self, folder: Path, axis: int) -> None:
        size = 2 * FAR + 2**16
        self.all = torch.from_file(
            str(folder / "sparse"), shared=True, size=size, dtype=torch.float16
        )
        self.axis = axis
        self.used = 0

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        strides = [N * D, D]
        strides.insert(self.axis, FAR)
        view = self.all.as_strided(shape, (*strides, 1), self.used)
        self.used += N * N * D
        assert self.used < 2**16
        return view

    def like(self, x: Tensor) -> Tensor:
        return self.empty(tuple(x.shape)).copy_(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot read a file's pages")
@pytest.mark.parametrize(
    ("axis", "Hkv"), [(0, N), (1, N), (2, N), (1, 1)], ids=["batch", "head", "row", "head-of-group"]
)
def test_offsets_of_64_bits(
    axis: int, Hkv: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise what the same kernels make of tensors that lie close together."""
    sparse = Sparse(tmp_path, axis)
    g = torch.Generator().manual_seed(0)
    near = [torch.randn(N, h, N, D, generator=g).half() for h in (N, Hkv, Hkv, N)]
    far = [sparse.like(x) for x in near]
    # All the rows see something, and bounds come from memory too.
    lo = torch.tensor([[0, 1, 0]], dtype=torch.int32).expand(N, N).contiguous()
    bounds = (lo, torch.full_like(lo, N))
    rest = (None, None, True, 0.3, None, 0.0)

    def forward(x: list[Tensor]) -> list[Tensor]:
        ordinary = kernel.launch(*x[:3], *bounds, *rest)
        decoded = kernel_decode.launch_decode(*x[:3], *bounds, *rest)
        return [*ordinary, *decoded]

    def backward(x: list[Tensor], out: Tensor, lse: Tensor) -> list[Tensor]:
        grads = kernel_backward.launch_backward(
            x[3], None, *x[:3], out, lse, *bounds, None, None, *rest[2:]
        )
        return list(grads[:3])

    want = forward(near)
    want_grads = backward(near, want[0], want[1])
    new_empty = torch.Tensor.new_empty

    def far_outputs(self: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        """Outputs, [B, S, H, D], are the only such tensors that the launchers make."""
        if size in ((N, N, N, D), (N, N, Hkv, D)) and not kwargs:
            return sparse.empty(size)
        return new_empty(self, *size, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", far_outputs)
    got = forward(far)
    grads = backward(far, sparse.like(want[0]), want[1])
    assert all(max(x.stride()) == FAR for x in (*far, got[0], got[2], *grads))
    for x, expected in zip(got + grads, want + want_grads, strict=True):
        assert torch.equal(x, expected)


@pytest.mark.gpu
def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    """The last rows of the last head, forward and backward, against a call on those rows alone."""
    H, S, D, window = 8, 2**21 + 67, 128, 40
    assert H * S * D > 2**31
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, S, H, D, generator=g, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bounds = Intervals.sliding_window(window, 0, S, S, device="cuda")
    out = attention(*leaves, intervals=bounds, impl="triton")
    grads = torch.autograd.grad(out, leaves, grad)
    # Rows whose whole window lies within the part, and keys that no row before it sees.
    part, inner = 500, 500 - window
    small = [x[:, -1:, -part:].detach().double().requires_grad_() for x in (q, k, v)]
    seen = Intervals.sliding_window(window, 0, part, part, device="cuda")
    want, _ = reference(*small, seen.lo, seen.hi, None, None, False, D**-0.5, None, 0.0)
    weight = grad[:, -1:, -part:].double().clone()
    weight[:, :, :window] = 0
    wanted = torch.autograd.grad((want * weight).sum(), small)
    got = [out[:, -1:, -inner:], *(x[:, -1:, -inner + window :] for x in grads)]
    expected = [want[:, :, -inner:], *(x[:, :, -inner + window :] for x in wanted)]
    for x, y in zip(got, expected, strict=True):
        limit = 3e-2 * max(1.0, y.abs().max().item())
        assert (x.double() - y).abs().max().item() <= limit


@pytest.mark.gpu
def test_cache_of_more_than_two_to_the_31_elements_decodes() -> None:
    """The last of the sequences, whose keys begin beyond 2^31."""
    B, T, Hkv, D = 33, 65536, 8, 128
    assert (B - 1) * T * Hkv * D >= 2**31
    g = torch.Generator("cuda").manual_seed(0)
    k = torch.randn(B, T, Hkv, D, generator=g, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    q = torch.randn(B, 32, 1, D, generator=g, device="cuda", dtype=torch.bfloat16)
    assert kernel_decode.uses_decode(q, k, 0.0)
    out = attention(q, k, k, causal=True, impl="triton")
    want = attention(q[-1:], k[-1:], k[-1:], causal=True, impl="reference")
    torch.testing.assert_close(out[-1:], want, atol=2e-3, rtol=1e-2)
