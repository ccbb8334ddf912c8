"""`mmopt.measure.statistics` against numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats

from mmopt.measure.statistics import (
    bootstrap_median,
    median,
    percentile,
    samples_for_percentile,
)
from mmopt_kernels.errors import InputError

SIZES = [1, 2, 3, 10, 31, 100]


def _samples(size: int, seed: int = 0) -> list[float]:
    """Skewed, as latencies are."""
    return np.random.default_rng(seed).lognormal(sigma=0.3, size=size).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_median_equals_numpy(size: int) -> None:
    samples = _samples(size)
    assert median(samples) == pytest.approx(float(np.median(samples)), rel=1e-15)


@pytest.mark.parametrize("percent", [0, 2.5, 50, 95, 99, 100])
@pytest.mark.parametrize("size", SIZES)
def test_percentile_equals_numpy(size: int, percent: float) -> None:
    samples = _samples(size)
    assert percentile(samples, percent) == pytest.approx(
        float(np.percentile(samples, percent)), rel=1e-14
    )


@pytest.mark.parametrize("size", [10, 31, 100])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_bootstrap_interval_agrees_with_scipy(size: int, confidence: float) -> None:
    """Two independent sets of draws: the ends agree to a fifth of the interval's width."""
    samples = _samples(size)
    ours = bootstrap_median(samples, confidence=confidence)
    theirs = scipy.stats.bootstrap(
        (samples,),
        np.median,
        confidence_level=confidence,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    slack = 0.2 * (theirs.high - theirs.low)
    assert ours.low == pytest.approx(float(theirs.low), abs=slack)
    assert ours.high == pytest.approx(float(theirs.high), abs=slack)


def test_bootstrap_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    """300 trials at 95%: a right rate of 0.95 leaves 0.91 to 0.99 once in thousands of runs."""
    covered = 0
    for seed in range(300):
        interval = bootstrap_median(_samples(31, seed), resamples=1000)
        covered += interval.low <= 1.0 <= interval.high  # the median of this lognormal is 1
    assert 0.91 <= covered / 300 <= 0.99


def test_bootstrap_interval_depends_on_the_seed_alone() -> None:
    samples = _samples(1000)
    assert bootstrap_median(samples, seed=3) == bootstrap_median(samples, seed=3)
    assert bootstrap_median(samples, seed=3) != bootstrap_median(samples, seed=4)


def test_one_sample_gives_an_interval_of_no_width() -> None:
    interval = bootstrap_median([2.5])
    assert (interval.low, interval.high) == (2.5, 2.5)


@pytest.mark.parametrize(("percent", "count"), [(90, 64), (95, 130), (99, 662)])
def test_samples_for_percentile_is_mlperf_early_stopping(percent: float, count: int) -> None:
    """The binomial bound itself, from scipy: enough at `count`, not enough with one fewer."""
    assert samples_for_percentile(percent) == count
    above = 1 - percent / 100
    assert scipy.stats.binom.cdf(1, count, above) <= 0.01
    assert scipy.stats.binom.cdf(1, count - 1, above) > 0.01


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_samples_that_mean_nothing_are_refused(bad: list[float]) -> None:
    for function in (median, bootstrap_median):
        with pytest.raises(InputError, match=r"expected (at least one|finite samples)"):
            function(bad)


def test_impossible_percentages_are_refused() -> None:
    with pytest.raises(InputError, match="101 is no percentage"):
        percentile([1.0], 101)
    with pytest.raises(InputError, match="confidence is 1"):
        bootstrap_median([1.0], confidence=1)
    for percent in (50, 100):
        with pytest.raises(InputError, match="not above 50 and below 100"):
            samples_for_percentile(percent)
