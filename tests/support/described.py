"""Launches that load through descriptors, on a machine that may have no GPU with TMA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from mmopt_kernels import _triton


def on_sm_90() -> AbstractContextManager[None]:
    """Launchers take the interpreter for a GPU with TMA; a GPU is taken as it is."""
    from mmopt_kernels._descriptors import has_tma  # Triton

    if not torch.cuda.is_available():
        return _triton.assuming("sm_90")
    if not has_tma(_triton.target(torch.device("cuda", torch.cuda.current_device()))):
        pytest.skip("this GPU has no TMA")
    return nullcontext()


def descriptors_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what launchers describe from here on, in order."""
    from mmopt_kernels import _descriptors  # Triton

    shapes: list[tuple[int, ...]] = []
    describe = _descriptors.TensorDescriptor

    def record(x: torch.Tensor, *rest: Any) -> Any:
        shapes.append(tuple(x.shape))
        return describe(x, *rest)

    monkeypatch.setattr(_descriptors, "TensorDescriptor", record)
    return shapes
