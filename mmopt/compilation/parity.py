"""Holds the tensors of one run against those of another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# In float32 a reordered sum through a few dozen layers moves a value by some 1e-6 of the largest
# one, and a wrong mask, scale or adapter by more than 1e-2.
TOLERANCE = 1e-4

# A tensor is measured against its own largest value, but not below this share of the group's
# largest: gradients that are zero in exact arithmetic (of a key projection's bias, which softmax
# cancels) hold rounding noise only.
FLOOR = 1e-2


@dataclass(frozen=True)
class Parity:
    """How far one group of tensors (outputs, gradients) is from the reference.

    Attributes:
        group: what was compared.
        tensors: how many.
        worst: the tensor that is furthest off, None when there is nothing to compare.
        error: its largest absolute difference over the largest reference value; None when it is
            not finite.
        tolerance: what `error` must not exceed.
    """

    group: str
    tensors: int
    worst: str | None
    error: float | None
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether the worst tensor is finite and within tolerance."""
        return self.worst is None or (self.error is not None and self.error <= self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "group": self.group,
            "tensors": self.tensors,
            "worst": self.worst,
            "error": self.error,
            "tolerance": self.tolerance,
            "holds": self.holds,
        }


def compare(group: str, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> Parity:
    """Measure `actual` against `expected`, name by name; a name that one side lacks is furthest."""
    if lone := sorted(set(expected) ^ set(actual)):
        return Parity(group, len(expected), lone[0], None)
    largest = max((_largest(value) for value in expected.values()), default=0.0)
    worst, error = None, -1.0
    for name, reference in expected.items():
        difference = _largest(actual[name].float() - reference.float())
        scale = max(_largest(reference), FLOOR * largest)
        off = difference / scale if scale > 0 else difference
        if off != off or off == float("inf"):
            return Parity(group, len(expected), name, None)
        if off > error:
            worst, error = name, off
    return Parity(group, len(expected), worst, error if worst is not None else None)


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of every trainable parameter that the loss depends on; stores none."""
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None
    }
