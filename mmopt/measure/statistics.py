"""Pure functions over samples. None of them knows what was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmopt_kernels.errors import InputError

RESAMPLES = 2000
"""Efron and Tibshirani 1993, section 14.3: an interval's ends want 1000 resamples or more."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends included, in the unit of the samples."""

    low: float
    high: float


def median(samples: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle values, in the unit of the samples."""
    return percentile(samples, 50)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` (0 to 100) of the samples lie, in their unit.

    Between two samples the value is interpolated linearly.

    Raises:
        InputError: no samples, a sample that is not finite, or a percent outside 0 to 100.

    Source: Hyndman and Fan 1996, "Sample Quantiles in Statistical Packages", definition 7.
    """
    if not 0 <= percent <= 100:
        raise InputError(f"percentile: {percent} is no percentage, expected 0 to 100.")
    ordered = sorted(_checked(samples, "percentile"))
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def bootstrap_median(
    samples: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Confidence interval of the median, in the unit of the samples.

    It says how far the median of as many samples, drawn from the same process in the same
    minute, would scatter. It does not cover what differs between processes or days.

    Args:
        samples: taken independently; one sample gives an interval of no width.
        confidence: between 0 and 1.
        resamples: how many samples of the same size are drawn with replacement.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        InputError: no samples, a sample that is not finite, or a confidence outside 0 to 1.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3 (the
    percentile interval).
    """
    if not 0 < confidence < 1:
        raise InputError(f"bootstrap: confidence is {confidence}, expected between 0 and 1.")
    values = np.asarray(_checked(samples, "bootstrap"), dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    medians = np.median(values[draws], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Interval(float(low), float(high))


def samples_for_percentile(percent: float, *, confidence: float = 0.99) -> int:
    """The fewest samples from which a percentile above 50 means something.

    With this many, two or more samples lie above the true percentile with probability
    `confidence`, so that the estimate rests on what was seen and not on the one largest sample:
    64 for p90, 130 for p95, 662 for p99.

    Raises:
        InputError: a percent that is not above 50 and below 100.

    Source: MLPerf Inference rules (mlcommons/inference_policies, inference_rules.adoc), the early
    stopping criterion with one query allowed above the percentile.
    """
    if not 50 < percent < 100:
        raise InputError(f"samples_for_percentile: {percent} is not above 50 and below 100.")
    below = percent / 100
    count = 2
    while below**count + count * (1 - below) * below ** (count - 1) > 1 - confidence:
        count += 1
    return count


def _checked(samples: Sequence[float], caller: str) -> Sequence[float]:
    if not samples:
        raise InputError(f"{caller}: there are no samples, expected at least one.")
    if not all(map(math.isfinite, samples)):
        raise InputError(f"{caller}: a sample is NaN or infinite, expected finite samples only.")
    return samples
