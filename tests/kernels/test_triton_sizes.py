"""The sizes of launches, which the host computes without Triton's own functions."""

from __future__ import annotations

import pytest

from mmopt_kernels import _triton

triton = pytest.importorskip("triton", reason="compares with it")


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 2**31 - 1, 2**40 + 1])
def test_sizes_are_those_of_tritons_own_functions(n: int) -> None:
    assert _triton.next_power_of_2(n) == triton.next_power_of_2(n)
    for divisor in (1, 2, 16, n):
        assert _triton.cdiv(n, divisor) == triton.cdiv(n, divisor)


def test_nothing_is_no_pieces_and_still_a_width() -> None:
    assert _triton.cdiv(0, 16) == 0
    assert _triton.next_power_of_2(0) == 1
