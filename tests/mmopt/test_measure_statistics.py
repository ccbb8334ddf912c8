"""`mmopt.measure.statistics` against numpy and scipy."""

import itertools
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mmopt.measure.statistics import (
    EXACT_WORK,
    MeanTest,
    bootstrap_median,
    bootstrap_ratio,
    equivalence,
    holm,
    mann_whitney,
    mean_test,
    median,
    paired_log_ratio,
    percentile,
    samples_for_percentile,
    supported_percentile,
    trimmed_mean_test,
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


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_bootstrap_draws_medians_as_often_as_resampling_by_hand_does(size: int) -> None:
    """Few samples, so that a wrong place by one would show: every percentile agrees."""
    samples = sorted(_samples(size))
    rows = np.random.default_rng(1).integers(size, size=(40000, size))
    medians = np.median(np.asarray(samples)[rows], axis=1)
    for confidence in (0.1, 0.5, 0.8, 0.95):
        ours = bootstrap_median(samples, confidence=confidence, resamples=40000)
        for end, percent in ((ours.low, 50 - 50 * confidence), (ours.high, 50 + 50 * confidence)):
            below, above = np.mean(medians < end - 1e-12), np.mean(medians <= end + 1e-12)
            assert below - 0.012 <= percent / 100 <= above + 0.012


def test_bootstrap_of_a_million_samples_needs_no_table_of_draws() -> None:
    samples = np.random.default_rng(0).lognormal(sigma=0.3, size=1_000_000).tolist()
    tracemalloc.start()
    interval = bootstrap_median(samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # the table would take 16 GB
    assert 0.998 < interval.low < interval.high < 1.002


def test_bootstrap_ratio_agrees_with_scipy_and_turns_around_with_its_sides() -> None:
    base, head = _samples(31, 1), [1.2 * value for value in _samples(40, 2)]
    ours = bootstrap_ratio(base, head)
    theirs = scipy.stats.bootstrap(
        (base, head),
        lambda a, b, axis: np.median(b, axis=axis) / np.median(a, axis=axis),
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    slack = 0.2 * (theirs.high - theirs.low)
    assert ours.low == pytest.approx(float(theirs.low), abs=slack)
    assert ours.high == pytest.approx(float(theirs.high), abs=slack)
    turned = bootstrap_ratio(head, base)
    assert 1 / turned.high == pytest.approx(ours.low, abs=slack)
    assert 1 / turned.low == pytest.approx(ours.high, abs=slack)


def test_bootstrap_ratio_of_one_sample_each_is_their_ratio() -> None:
    interval = bootstrap_ratio([2.0], [3.0])
    assert (interval.low, interval.high) == (1.5, 1.5)
    assert bootstrap_ratio([1.0, 2.0], [3.0], seed=1) == bootstrap_ratio([1.0, 2.0], [3.0], seed=1)


@pytest.mark.parametrize(
    ("base", "head"),
    [([], [1.0]), ([1.0], []), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0]),
     ([1.0], [math.inf])],
)  # fmt: skip
def test_samples_without_a_ratio_are_refused(base: list[float], head: list[float]) -> None:
    with pytest.raises(InputError, match="expected"):
        bootstrap_ratio(base, head)


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


def test_the_module_imports_without_torch() -> None:
    code = "import sys, mmopt.measure.statistics; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


# Student's t


@pytest.mark.parametrize("degrees", [1, 2, 3, 4.5, 7, 15, 60, 199, 200, 201, 1000, 1e4])
def test_p_values_of_a_mean_equal_scipy_far_into_the_tail(degrees: float) -> None:
    """Down to p of 1e-12 and far below, and up to 1 - p of the same size."""
    test = MeanTest(0.0, 1.0, degrees)
    for t in (0.01, 0.1, 0.5, 1, 1.5, 2, 3, 5, 7, 7.1, 10, 30, 1000):
        tail = float(scipy.stats.t.sf(t, degrees))
        if tail > 1e-280:
            assert test.p_above(-t) == pytest.approx(tail, rel=1e-10, abs=0)
            assert test.p_below(t) == pytest.approx(tail, rel=1e-10, abs=0)
            assert test.p_above(t) == pytest.approx(1 - tail, rel=1e-15)
    assert float(scipy.stats.t.sf(7.1, 1e4)) < 1e-12  # the grid does go that far
    assert test.p_above(0) == test.p_below(0) == 0.5


@pytest.mark.parametrize("t", [1e-300, 1e-8, 0.3, 1, 40, 1e12, 1e200])
def test_p_values_equal_the_closed_forms_for_one_and_two_degrees(t: float) -> None:
    """Where scipy is no oracle: at 1 degree its t.sf(1e-8) is off in the ninth digit."""
    one = math.atan(1 / t) / math.pi if t > 1 else 0.5 - math.atan(t) / math.pi
    two = 1 / (math.hypot(t, math.sqrt(2)) * (math.hypot(t, math.sqrt(2)) + t))
    assert MeanTest(t, 1.0, 1).p_above(0) == pytest.approx(one, rel=1e-12, abs=0)
    if t < 1e100:
        assert MeanTest(t, 1.0, 2).p_above(0) == pytest.approx(two, rel=1e-12, abs=0)


def test_p_values_of_a_million_degrees_equal_scipy() -> None:
    for t in (0.5, 2, 7, 10):
        expected = float(scipy.stats.t.sf(t, 1e6))
        assert MeanTest(t, 1.0, 1e6).p_above(0) == pytest.approx(expected, rel=1e-10, abs=0)


@pytest.mark.parametrize("degrees", [1, 3, 11, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99, 1 - 1e-12])
def test_the_interval_of_a_mean_equals_scipy(degrees: int, confidence: float) -> None:
    interval = MeanTest(2.0, 0.5, degrees).interval(confidence)
    reach = 0.5 * float(scipy.stats.t.isf((1 - confidence) / 2, degrees))
    assert interval.high - 2 == pytest.approx(reach, rel=1e-9)
    assert 2 - interval.low == pytest.approx(reach, rel=1e-9)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20),
    st.floats(allow_nan=False),
    st.sampled_from([0.0, 0.1, 0.2]),
)
def test_p_values_are_never_nan_and_the_two_sides_cover_everything(
    values: list[float], bound: float, trim: float
) -> None:
    test = trimmed_mean_test(values, trim=trim)
    above, below = test.p_above(bound), test.p_below(bound)
    assert 0 <= above <= 1
    assert 0 <= below <= 1
    assert above + below >= 1 - 1e-12
    interval = test.interval()
    assert interval.low <= test.mean <= interval.high


@pytest.mark.parametrize("size", [2, 3, 10, 100])
def test_mean_test_equals_scipys_one_sample_t(size: int) -> None:
    values = _samples(size)
    test = mean_test(values)
    for bound in (0.5, 1.0, 1.3):
        for side, ours in (("greater", test.p_above(bound)), ("less", test.p_below(bound))):
            theirs = scipy.stats.ttest_1samp(values, bound, alternative=side)
            assert ours == pytest.approx(float(theirs.pvalue), rel=1e-10, abs=0)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.99)
    assert test.interval(0.99).low == pytest.approx(float(expected.low), rel=1e-9)
    assert test.interval(0.99).high == pytest.approx(float(expected.high), rel=1e-9)


@pytest.mark.parametrize("size", [5, 12, 16, 31])
@pytest.mark.parametrize("trim", [0.1, 0.2, 0.25])
def test_trimmed_mean_equals_scipy_and_its_error_the_winsorized_variance(
    size: int, trim: float
) -> None:
    values = _samples(size)
    test = trimmed_mean_test(values, trim=trim)
    assert test.mean == pytest.approx(float(scipy.stats.trim_mean(values, trim)), rel=1e-14)
    winsorized = np.asarray(scipy.stats.mstats.winsorize(np.asarray(values), (trim, trim)))
    kept = size - 2 * int(trim * size)
    yuen = np.sum((winsorized - winsorized.mean()) ** 2) / (kept * (kept - 1))
    assert test.error == pytest.approx(math.sqrt(yuen), rel=1e-12)
    assert test.degrees == kept - 1


def test_a_trimmed_mean_hardly_notices_one_wild_value() -> None:
    values = _samples(12)
    wild = [*values[:-1], 1e9]
    assert trimmed_mean_test(wild).mean == pytest.approx(trimmed_mean_test(values).mean, rel=0.1)
    assert trimmed_mean_test(wild).error < 2 * trimmed_mean_test(values).error
    assert mean_test(wild).mean > 1e7


def test_a_share_that_is_no_binary_fraction_cuts_whole_values() -> None:
    """0.29 of 100 is 28.999999999999996 in binary."""
    assert trimmed_mean_test(_samples(100), trim=0.29).degrees == 100 - 2 * 29 - 1


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_the_interval_of_a_mean_covers_the_true_mean_about_as_often_as_it_says(trim: float) -> None:
    """2000 trials at 95%: the rate's own standard deviation is 0.005."""
    draws = np.random.default_rng(7).normal(loc=3.0, size=(2000, 16))
    covered = 0
    for row in draws.tolist():
        interval = trimmed_mean_test(row, trim=trim).interval(0.95)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.93 <= covered / len(draws) <= 0.97


@pytest.mark.parametrize("value", [0.1, -7.3, 0.0, 1e300])
def test_equal_values_leave_no_error_and_a_p_of_zero_or_one(value: float) -> None:
    test = trimmed_mean_test([value] * 7)
    assert (test.mean, test.error) == (value, 0.0)
    assert test.p_above(value) == test.p_below(value) == 1.0
    assert test.p_above(math.nextafter(value, -math.inf)) == 0.0
    assert test.p_below(math.nextafter(value, -math.inf)) == 1.0
    assert test.p_below(math.nextafter(value, math.inf)) == 0.0
    assert (test.interval().low, test.interval().high) == (value, value)


def test_values_that_differ_by_next_to_nothing_are_not_called_equal() -> None:
    """The squares of such differences are 0 in floating point."""
    assert 0 < mean_test([0.0, 1e-200]).error < 1e-199


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "there are no samples"),
        ([1.0], "1 of 1 values remain"),
        ([1.0, math.nan], "NaN or infinite"),
        ([1.0, math.inf], "NaN or infinite"),
        ([1e301, -1e301], "beyond 1e"),
    ],
)
def test_values_without_a_mean_test_are_refused(values: list[float], message: str) -> None:
    for function in (mean_test, trimmed_mean_test):
        with pytest.raises(InputError, match=message):
            function(values)


def test_a_trim_that_leaves_fewer_than_two_values_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 of 3 values remain after trimming 0\.4"):
        trimmed_mean_test([1.0, 2.0, 3.0], trim=0.4)
    assert trimmed_mean_test([1.0, 2.0, 3.0, 4.0], trim=0.4).degrees == 1
    for trim in (-0.1, 0.5, math.nan):
        with pytest.raises(InputError, match=r"expected 0 to below 0\.5"):
            trimmed_mean_test([1.0, 2.0, 3.0], trim=trim)


def test_impossible_mean_tests_bounds_and_confidences_are_refused() -> None:
    for fields in ((math.nan, 1, 1), (0, -1, 1), (0, math.inf, 1), (0, 1, 0)):
        with pytest.raises(InputError, match="expected finite numbers"):
            MeanTest(*fields)
    test = MeanTest(0.0, 1.0, 3)
    for side in (test.p_above, test.p_below):
        with pytest.raises(InputError, match="the bound is NaN"):
            side(math.nan)
    for confidence in (0, 1, math.nan):
        with pytest.raises(InputError, match="expected between 0 and 1"):
            test.interval(confidence)


# Log ratios and equivalence


def test_paired_log_ratio_is_the_t_test_of_the_logarithms() -> None:
    base, head = _samples(10, 1), _samples(10, 2)
    for trim in (0.0, 0.2):
        ours = paired_log_ratio(base, head, trim=trim)
        expected = trimmed_mean_test(np.log(np.divide(head, base)).tolist(), trim=trim)
        assert ours.mean == pytest.approx(expected.mean, abs=1e-14)
        assert ours.error == pytest.approx(expected.error, rel=1e-12)
        assert ours.degrees == expected.degrees


def test_paired_log_ratio_is_positive_for_a_slower_head_and_blind_to_a_common_factor() -> None:
    base = [1e-3, 2e-3, 5e-3, 1e-3]
    slower = [1.03 * value for value in base]
    test = paired_log_ratio(base, slower)
    assert math.exp(test.mean) - 1 == pytest.approx(0.03, abs=1e-12)
    assert test.p_above(0.015) < 1e-12
    assert paired_log_ratio(slower, base).mean == pytest.approx(-test.mean, abs=1e-14)


@pytest.mark.parametrize(
    ("base", "head", "message"),
    [
        ([1.0, 2.0], [1.0], "2 base values and 1 head values"),
        ([1.0, 0.0], [1.0, 1.0], "0.0 has no logarithm"),
        ([1.0, 2.0], [1.0, -1.0], "-1.0 has no logarithm"),
        ([1.0, 2.0], [1.0, math.nan], "nan has no logarithm"),
        ([1.0, 2.0], [1.0, math.inf], "inf has no logarithm"),
        ([1.0], [1.0], "1 of 1 values remain"),
        ([], [], "there are no samples"),
    ],
)
def test_pairs_without_a_ratio_are_refused(
    base: list[float], head: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        paired_log_ratio(base, head)


def test_equivalence_is_the_worse_of_two_one_sided_t_tests() -> None:
    values = (_samples(12, 4) - np.mean(_samples(12, 4)) + 0.01).tolist()
    low, high = -0.2, 0.3
    expected = max(
        float(scipy.stats.ttest_1samp(values, low, alternative="greater").pvalue),
        float(scipy.stats.ttest_1samp(values, high, alternative="less").pvalue),
    )
    assert equivalence(mean_test(values), low, high) == pytest.approx(expected, rel=1e-10)


def test_equivalence_is_certain_within_and_impossible_on_or_past_the_bounds() -> None:
    assert equivalence(MeanTest(0.0, 0.0, 3), -0.03, 0.03) == 0.0
    assert equivalence(MeanTest(0.03, 0.0, 3), -0.03, 0.03) == 1.0
    assert equivalence(MeanTest(0.03, 0.01, 3), -0.03, 0.03) >= 0.5
    for low, high in ((0.03, 0.03), (0.03, -0.03), (math.nan, 1)):
        with pytest.raises(InputError, match="expected below high"):
            equivalence(MeanTest(0.0, 1.0, 3), low, high)


# Mann-Whitney


def _by_enumeration(a: Sequence[float], b: Sequence[float]) -> float:
    """Every way to deal the values out, one by one; twice the smaller tail."""
    values = [*a, *b]
    ranks = scipy.stats.rankdata(values)
    seen = ranks[: len(a)].sum()
    sums = np.array(
        [ranks[list(c)].sum() for c in itertools.combinations(range(len(values)), len(a))]
    )
    return min(1.0, 2 * min(float(np.mean(sums <= seen)), float(np.mean(sums >= seen))))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 9), (2, 2), (6, 6), (7, 12), (30, 30)])
def test_mann_whitney_without_ties_equals_scipys_exact_one(first: int, second: int) -> None:
    for seed in range(5):
        a = _samples(first, seed)
        b = [1.3 * value for value in _samples(second, 100 + seed)]
        ours, theirs = mann_whitney(a, b), scipy.stats.mannwhitneyu(a, b, method="exact")
        assert ours.exact
        assert ours.u == float(theirs.statistic)
        assert ours.p_value == pytest.approx(float(theirs.pvalue), rel=1e-10, abs=0)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_mann_whitney_with_ties_equals_the_enumeration(a: list[int], b: list[int]) -> None:
    ours = mann_whitney(a, b)
    assert ours.exact
    assert ours.p_value == pytest.approx(_by_enumeration(a, b), rel=1e-12)
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert ours.u == sum(pairs)
    assert mann_whitney(b, a).p_value == pytest.approx(ours.p_value, rel=1e-12)


def test_mann_whitney_of_many_values_is_the_tie_corrected_normal_approximation() -> None:
    for digits in (1, 8):
        a = np.round(_samples(300, 1), digits).tolist()
        b = np.round(np.multiply(1.05, _samples(400, 2)), digits).tolist()
        ours = mann_whitney(a, b)
        theirs = scipy.stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=True)
        assert not ours.exact
        assert ours.u == float(theirs.statistic)
        assert ours.p_value == pytest.approx(float(theirs.pvalue), rel=1e-10)


def test_mann_whitney_is_exact_up_to_the_documented_size_and_continuous_there() -> None:
    assert EXACT_WORK == 50 * 100
    a, b = _samples(50, 1), [1.1 * value for value in _samples(51, 2)]
    inside, outside = mann_whitney(a, b[:50]), mann_whitney(a, b)
    assert inside.exact
    assert not outside.exact
    approximate = scipy.stats.mannwhitneyu(a, b[:50], method="asymptotic")
    assert inside.p_value == pytest.approx(float(approximate.pvalue), rel=0.02)


@pytest.mark.parametrize(("size", "p"), [(2, 1 / 3), (6, 2 / 924), (10, 2 / 184756)])
def test_fully_separated_sets_reach_the_smallest_p_there_is(size: int, p: float) -> None:
    """asv could never tell 6 from 6 apart; and 2 against 2 never can be told."""
    low, high = list(range(size)), list(range(100, 100 + size))
    for a, b, u in ((low, high, 0), (high, low, size * size)):
        result = mann_whitney(a, b)
        assert (result.u, result.exact) == (u, True)
        assert result.p_value == pytest.approx(p, rel=1e-14)


@pytest.mark.parametrize("size", [1, 5, 200])
def test_values_that_are_all_equal_tell_nothing(size: int) -> None:
    result = mann_whitney([2.0] * size, [2.0] * (size + 1))
    assert (result.p_value, result.u) == (1.0, size * (size + 1) / 2)


def test_mann_whitney_refuses_empty_and_infinite_sets() -> None:
    for a, b in (([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [math.inf])):
        with pytest.raises(InputError, match=r"expected (at least one|finite samples)"):
            mann_whitney(a, b)


# Holm


def test_holm_equals_a_worked_example() -> None:
    """Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 (raised to the one before), 0.5 x 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_keeps_the_order_and_only_raises_p_values_up_to_one(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert len(adjusted) == len(p_values)
    for raw, after in zip(p_values, adjusted, strict=True):
        assert raw <= after <= 1
        # The definition, without sorting: the worst of the p values up to this one, each times
        # the number of hypotheses that had not been rejected when its turn came.
        turns = [p * sum(other >= p for other in p_values) for p in p_values if p <= raw]
        assert after == min(1.0, max(turns))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_holm_keeps_false_findings_below_alpha() -> None:
    """10 true hypotheses, 2000 trials: one or more below 0.05 in 5% of trials, not in 40%."""
    draws = np.random.default_rng(3).uniform(size=(2000, 10))
    wrong = sum(min(holm(row)) <= 0.05 for row in draws.tolist())
    assert 0.03 <= wrong / len(draws) <= 0.07


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan])
def test_holm_refuses_what_is_no_p_value(bad: float) -> None:
    with pytest.raises(InputError, match="is no p value"):
        holm([0.5, bad])


def test_a_percentile_needs_single_calls_and_enough_of_them() -> None:
    samples = [float(i) for i in range(130)]
    assert supported_percentile(samples, 95, calls=1) == percentile(samples, 95)
    assert supported_percentile(samples[1:], 95, calls=1) is None
    assert supported_percentile(samples, 95, calls=2) is None
