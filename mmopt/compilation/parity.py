"""Holds the tensors of one run against those of another."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from mmopt.measure.statistics import median

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
        worst: the tensor that is furthest off for its tolerance, None when there is nothing to
            compare.
        error: its largest absolute difference over the largest reference value; None when it is
            not finite, or missing.
        tolerance: what `error` must not exceed.
        eager_error: in half precision, the error of eager PyTorch in the same dtype; None when it
            is not finite, and in float32, where eager is the reference itself.
    """

    group: str
    tensors: int
    worst: str | None
    error: float | None
    tolerance: float = TOLERANCE
    eager_error: float | None = None

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
            "eager_error": self.eager_error,
            "holds": self.holds,
        }

    def __str__(self) -> str:
        if self.worst is None:
            return f"{self.group}: nothing to compare"
        error = "not finite or missing" if self.error is None else f"{self.error:.1e}"
        eager = "" if self.eager_error is None else f"; eager's own: {self.eager_error:.1e}"
        return (
            f"{self.group}: {'match eager' if self.holds else 'DO NOT MATCH eager'}; worst of "
            f"{self.tensors} is {self.worst}: {error} (at most {self.tolerance:.1e}{eager})"
        )


def compare(
    group: str,
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    *,
    same_dtype: Mapping[str, Tensor] | None = None,
    rounding: float = 0.0,
) -> Parity:
    """Measure `actual` against `expected`, name by name; a name that one side lacks is furthest.

    Args:
        group: what the tensors are.
        expected: the reference.
        actual: what is measured.
        same_dtype: what eager PyTorch gives in `actual`'s dtype, a half precision, where `expected`
            is of a wider one. A tensor may then be off by twice the largest of: eager's own error
            there; one rounding; and the middle one of eager's errors in the group, because a
            tensor of few values is exact in eager by luck. Without it, by `TOLERANCE`.
        rounding: the relative size of one rounding in that dtype, `torch.finfo(dtype).eps`.
    """
    sides = [expected, actual, expected if same_dtype is None else same_dtype]
    names = {name for side in sides for name in side}
    if lone := sorted(name for name in names if any(name not in side for side in sides)):
        return Parity(group, len(expected), lone[0], None)
    errors = _errors(expected, actual)
    if same_dtype is None:
        allowed = dict.fromkeys(errors, TOLERANCE)
        eager = {}
    else:
        eager = _errors(expected, same_dtype)
        usual = median([error for error in eager.values() if isfinite(error)] or [0.0])
        allowed = {
            name: 2 * max(error if isfinite(error) else 0.0, usual, rounding)
            for name, error in eager.items()
        }
    if not errors:
        return Parity(group, 0, None, None)
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    own = eager.get(worst, inf)
    return Parity(
        group,
        len(expected),
        worst,
        errors[worst] if isfinite(errors[worst]) else None,
        allowed[worst],
        own if isfinite(own) else None,
    )


def _errors(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each tensor by `Parity.error`'s measure; infinite where not finite."""
    largest = max((_largest(value) for value in expected.values()), default=0.0)
    errors = {}
    for name, reference in expected.items():
        difference = _largest(actual[name].float() - reference.float())
        scale = max(_largest(reference), FLOOR * largest)
        off = difference / scale if scale > 0 else difference
        errors[name] = off if isfinite(off) else inf
    return errors


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of every trainable parameter that the loss depends on; stores none."""
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None
    }
