"""Launches whose programs run in another order than the interpreter's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def last_program_first() -> Iterator[None]:
    """The programs of a launch inside run from the last to the first.

    A GPU promises no order. One after the other from the first on, as Triton's interpreter runs
    them, a program overwrites what an earlier one has written in its place, beyond its own.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="runs Triton kernels")
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def from_the_end(*index: int) -> None:
        place(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", from_the_end)
        yield
