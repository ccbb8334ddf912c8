"""Pure functions over samples. None of them knows what was measured, or decides what it means.

Describing samples: `median`, `percentile`, `bootstrap_median`, `samples_for_percentile`;
`bootstrap_ratio` for two sets of them.
A mean against a bound: `mean_test`, `trimmed_mean_test`, `paired_log_ratio`, `equivalence`.
Two sets of samples: `mann_whitney`. Many tests at once: `holm`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from mmopt_kernels.errors import InputError

RESAMPLES = 2000
"""Efron and Tibshirani 1993, section 14.3: an interval's ends want 1000 resamples or more."""

EXACT_WORK = 5000
"""`mann_whitney` is exact while (size of the smaller set) x (size of both together) is within this:
50 against 50, 5 against 995. The table of rank sums then stays below 5000 x 100 entries."""


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
    percentile interval); David and Nagaraja 2003, "Order Statistics", chapter 2 (how the middle
    values of a resample are drawn).
    """
    medians = _resampled_medians(samples, confidence, resamples, np.random.default_rng(seed))
    return _percentile_interval(medians, confidence)


def bootstrap_ratio(
    base: Sequence[float],
    head: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Confidence interval of median(head) / median(base), the two resampled independently.

    Like `bootstrap_median` it covers the scatter of samples within the two runs, and nothing that
    differs between them besides the program: where two processes of one program differ by 3%, so
    does this interval from 1.

    Args:
        base, head: positive, in one unit; one sample or more each.
        confidence: between 0 and 1.
        resamples: how many pairs of resamples are drawn.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        InputError: no samples, one that is not positive and finite, or a confidence outside 0 to 1.

    Source: as `bootstrap_median`; Efron and Tibshirani 1993, section 8.3 (two samples).
    """
    for value in (*base, *head):
        if not value > 0:  # NaN as well
            raise InputError(f"bootstrap: {value} has no ratio, expected above 0.")
    rng = np.random.default_rng(seed)
    below = _resampled_medians(base, confidence, resamples, rng)
    above = _resampled_medians(head, confidence, resamples, rng)
    return _percentile_interval(above / below, confidence)


def supported_percentile(samples: Sequence[float], percent: float, *, calls: int) -> float | None:
    """The percentile where it means something: of single calls, and with enough of them.

    Args:
        samples: seconds per call, in any order.
        percent: above 50.
        calls: calls averaged in one sample; the mean of several hides the slow ones.

    Returns:
        The percentile in the unit of the samples; None where it would mean nothing.
    """
    if calls > 1 or len(samples) < samples_for_percentile(percent):
        return None
    return percentile(samples, percent)


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


@dataclass(frozen=True)
class MeanTest:
    """A mean whose distance from the true mean, in standard errors, follows Student's t.

    An error of 0 (all values equal) leaves nothing to doubt: the p values are then 0 or 1, and 1 at
    the bound itself. Two values that happen to be equal give that too, so whoever decides by a p
    value says how many values it takes.

    Attributes:
        mean: in the unit of the values.
        error: the standard error of the mean, in the same unit; 0 or more.
        degrees: degrees of freedom of the t distribution; above 0.
    """

    mean: float
    error: float
    degrees: float

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.mean, self.error, self.degrees)))
        if not finite or self.error < 0 or self.degrees <= 0:
            raise InputError(
                f"MeanTest: mean {self.mean}, error {self.error}, degrees {self.degrees}; expected "
                f"finite numbers, an error of 0 or more, and degrees above 0."
            )

    def p_above(self, bound: float) -> float:
        """p of the hypothesis that the true mean is `bound` or less: small means it is above.

        Raises:
            InputError: a bound that is NaN.
        """
        distance = self._distance(bound)
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return _t_tail(distance / self.error, self.degrees)

    def p_below(self, bound: float) -> float:
        """p of the hypothesis that the true mean is `bound` or more: small means it is below.

        Raises:
            InputError: a bound that is NaN.
        """
        distance = self._distance(bound)
        if self.error == 0:
            return 0.0 if distance < 0 else 1.0
        return _t_tail(-distance / self.error, self.degrees)

    def interval(self, confidence: float = 0.95) -> Interval:
        """The two-sided confidence interval of the true mean, in the unit of the values.

        Raises:
            InputError: a confidence outside 0 to 1.
        """
        if not 0 < confidence < 1:
            raise InputError(f"interval: confidence is {confidence}, expected between 0 and 1.")
        if self.error == 0:
            return Interval(self.mean, self.mean)
        reach = self.error * _t_cut((1 - confidence) / 2, self.degrees)
        return Interval(self.mean - reach, self.mean + reach)

    def _distance(self, bound: float) -> float:
        if math.isnan(bound):
            raise InputError("MeanTest: the bound is NaN, expected a number.")
        return self.mean - bound


def mean_test(values: Sequence[float]) -> MeanTest:
    """The ordinary one-sample t test: mean, s / sqrt(n), n - 1 degrees of freedom.

    Args:
        values: two or more, independent of each other.

    Raises:
        InputError: fewer than two values, or one that is not finite.

    Source: Student 1908, "The Probable Error of a Mean", Biometrika 6(1).
    """
    return trimmed_mean_test(values, trim=0.0)


def trimmed_mean_test(values: Sequence[float], *, trim: float = 0.2) -> MeanTest:
    """The t test of a trimmed mean, which one wild value in a few cannot move far.

    Of n values the floor(trim n) smallest and as many of the largest are cut, h remain. The mean is
    that of the h; the error is sqrt(SSW / (h (h - 1))) with SSW the sum of squares of all n values
    around their mean after each cut value was replaced by the nearest one kept; the degrees of
    freedom are h - 1. It is the mean of a symmetric distribution; of a skewed one it is a number
    of its own, between median and mean.

    Args:
        values: independent of each other; two or more must remain.
        trim: the share cut at each end, 0 to below 0.5; 0 is `mean_test`.

    Raises:
        InputError: fewer than two values remain, one is not finite, or an impossible trim.

    Source: Tukey and McLaughlin 1963, Sankhya A 25(3); written as in Yuen 1974, "The two-sample
    trimmed t for unequal population variances", Biometrika 61(1).
    """
    if not 0 <= trim < 0.5:
        raise InputError(f"trimmed_mean_test: trim is {trim}, expected 0 to below 0.5.")
    ordered = sorted(_checked(values, "mean test"))
    if max(-ordered[0], ordered[-1]) > _LARGEST:
        raise InputError(f"mean test: a value is beyond {_LARGEST:g} in size, expected smaller.")
    # A share such as 0.29 of 100 is a hair below 29 in binary.
    cut = math.floor(trim * len(ordered) + 1e-9)
    kept = ordered[cut : len(ordered) - cut]
    if len(kept) < 2:
        raise InputError(
            f"mean test: {len(kept)} of {len(ordered)} values remain after trimming {trim:g} at "
            f"each end, expected at least 2. Measure more, or trim less."
        )
    degrees = len(kept) - 1
    if kept[0] == kept[-1]:  # said exactly: the rounding of a mean would look like an error
        return MeanTest(kept[0], 0.0, degrees)
    winsorized = cut * [kept[0]] + kept + cut * [kept[-1]]
    centre = math.fsum(winsorized) / len(winsorized)
    spread = math.hypot(*(value - centre for value in winsorized))
    error = spread / math.sqrt(len(kept) * degrees)
    return MeanTest(math.fsum(kept) / len(kept), error, degrees)


def paired_log_ratio(
    base_medians: Sequence[float], head_medians: Sequence[float], *, trim: float = 0.0
) -> MeanTest:
    """The t test of log(head / base), one value per pair of processes.

    A mean of 0 says that both are as fast, 0.03 that the head takes exp(0.03) times as long, and
    exp(mean) is the ratio. What slows both sides of a pair alike cancels.

    Args:
        base_medians, head_medians: one positive value per pair and side, in any unit, position by
            position of the same pair.
        trim: as in `trimmed_mean_test`.

    Raises:
        InputError: lists of different lengths, a value that is not positive and finite, or fewer
            than two pairs after trimming.

    Source: Kalibera and Jones 2013, "Rigorous Benchmarking in Reasonable Time", ISMM (what repeats
    is the process, not the call); Fleming and Wallace 1986, CACM 29(3) (ratios are averaged as
    logarithms).
    """
    if len(base_medians) != len(head_medians):
        raise InputError(
            f"paired_log_ratio: {len(base_medians)} base values and {len(head_medians)} head "
            f"values, expected one of each per pair."
        )
    for value in (*base_medians, *head_medians):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"paired_log_ratio: {value} has no logarithm, expected above 0.")
    pairs = zip(base_medians, head_medians, strict=True)
    return trimmed_mean_test([math.log(head) - math.log(base) for base, head in pairs], trim=trim)


def equivalence(test: MeanTest, low: float, high: float) -> float:
    """p of the hypothesis that the true mean lies outside `low` to `high`: small means within.

    Two one-sided tests, of which the worse counts; no correction for two is due.

    Raises:
        InputError: a `low` that is not below `high`.

    Source: Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15(6).
    """
    if not low < high:
        raise InputError(f"equivalence: low is {low}, expected below high, which is {high}.")
    return max(test.p_above(low), test.p_below(high))


@dataclass(frozen=True)
class MannWhitney:
    """Whether two sets of samples come from one distribution.

    Attributes:
        u: of the pairs (a, b), how many have a > b, a tie counting one half; 0 to len(a) len(b).
        p_value: two-sided: twice the smaller tail, at most 1.
        exact: counted over all ways to deal the values out, not approximated.
    """

    u: float
    p_value: float
    exact: bool


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> MannWhitney:
    """The rank sum test, two-sided, exact for small sets, with ties as well.

    Exact: every way to deal the values out to sets of the same two sizes is equally likely, and the
    rank sums, ties sharing their mean rank, are counted over all of them. The smallest p there is
    is therefore 2 / C(n, k): 1/3 for 2 against 2, 0.0022 for 6 against 6, however far apart. Beyond
    `EXACT_WORK` the normal approximation stands in, corrected for ties and continuity.

    Args:
        a, b: one or more values each, independent of each other, within a set and between the two.

    Raises:
        InputError: an empty set, or a value that is not finite.

    Source: Mann and Whitney 1947, Ann. Math. Statist. 18(1); ties and the approximation: Lehmann
    1975, "Nonparametrics", sections 1.3 and 1.4; counting: the shift algorithm of Streitberg and
    Röhmel 1986, Statistical Software Newsletter 12(1).
    """
    first = np.asarray(_checked(a, "mann_whitney"), dtype=np.float64)
    second = np.asarray(_checked(b, "mann_whitney"), dtype=np.float64)
    _, where, counts = np.unique(
        np.concatenate([first, second]), return_inverse=True, return_counts=True
    )
    # Twice the ranks, which are whole numbers: the ties after `below` others share the mean of
    # below + 1 ... below + count.
    below = np.cumsum(counts) - counts
    doubled = (2 * below + counts + 1)[where.reshape(-1)]
    size, other = len(first), len(second)
    u = float(doubled[:size].sum() - size * (size + 1)) / 2
    if len(counts) == 1:
        return MannWhitney(u, 1.0, exact=True)
    if min(size, other) * (size + other) <= EXACT_WORK:
        smaller = doubled[:size] if size <= other else doubled[size:]
        return MannWhitney(u, _rank_sum_p(doubled, smaller), exact=True)
    total = size + other
    ties = float((counts.astype(np.float64) ** 3 - counts).sum()) / (total * (total - 1))
    deviation = math.sqrt(size * other / 12 * (total + 1 - ties))
    z = (abs(u - size * other / 2) - 0.5) / deviation
    return MannWhitney(u, min(1.0, math.erfc(z / math.sqrt(2))), exact=False)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for being many, in the order given.

    Comparing each with alpha keeps the chance of even one false finding among all of them below
    alpha, whether or not the tests depend on each other.

    Raises:
        InputError: a p value that is NaN or outside 0 to 1.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian
    Journal of Statistics 6(2).
    """
    for p in p_values:
        if not 0 <= p <= 1:  # NaN as well
            raise InputError(f"holm: {p} is no p value, expected 0 to 1.")
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - done) * p_values[index]))
        adjusted[index] = worst
    return adjusted


_LARGEST = 1e300
"""Sums and differences of a few million such values are still finite."""


def _resampled_medians(
    samples: Sequence[float], confidence: float, resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Medians of `resamples` draws of as many samples, with replacement."""
    if not 0 < confidence < 1:
        raise InputError(f"bootstrap: confidence is {confidence}, expected between 0 and 1.")
    ordered = np.sort(np.asarray(_checked(samples, "bootstrap"), dtype=np.float64))
    size = len(ordered)
    # A draw of sample floor(size u) with u uniform; only the middle u of each resample is needed,
    # and those have a known distribution. Drawing all would take resamples x size numbers.
    middle = (size + 1) // 2
    lower = rng.beta(middle, size + 1 - middle, size=resamples)
    upper = lower
    if size % 2 == 0:  # the least of the size - middle that lie above
        upper = 1 - (1 - lower) * rng.uniform(size=resamples) ** (1 / (size - middle))
    places = np.minimum((np.stack([lower, upper]) * size).astype(np.int64), size - 1)
    medians: npt.NDArray[np.float64] = ordered[places].mean(axis=0)
    return medians


def _percentile_interval(values: npt.NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _checked(samples: Sequence[float], caller: str) -> Sequence[float]:
    if len(samples) == 0:
        raise InputError(f"{caller}: there are no samples, expected at least one.")
    if not all(map(math.isfinite, samples)):
        raise InputError(f"{caller}: a sample is NaN or infinite, expected finite samples only.")
    return samples


def _rank_sum_p(doubled: npt.NDArray[np.int64], dealt: npt.NDArray[np.int64]) -> float:
    """Twice the smaller tail of the sum of `dealt` among all subsets of `doubled` of that size.

    ways[k, s] counts the subsets of k values with sum s. As the values are taken in one by one,
    a subset either has the new one or not. Counts above 2**53 are rounded, by parts in 1e16.
    """
    values = doubled - doubled.min()
    size = len(dealt)
    ways = np.zeros((size + 1, int(np.sort(values)[-size:].sum()) + 1))
    ways[0, 0] = 1
    for value in values:
        # The right side is computed first, from subsets without the new value.
        ways[1:, value:] += ways[:-1, : ways.shape[1] - value].copy()
    seen = int(dealt.sum() - size * doubled.min())
    counts = ways[size]
    tail = min(counts[: seen + 1].sum(), counts[seen:].sum())
    return min(1.0, float(2 * tail / counts.sum()))


def _t_tail(t: float, degrees: float) -> float:
    """The probability that Student's t is above `t`.

    Its relative error, in the far tail too, is below 1e-12 up to 10,000 degrees and below 1e-10 up
    to a million. Half the regularized incomplete beta function I_x(degrees / 2, 1 / 2) at
    x = degrees / (degrees + t t), or its complement where that converges faster.

    Source: DLMF 8.17.22 (continued fraction), 8.17.4 (complement); Lentz 1976, Applied Optics
    15(3), as modified by Thompson and Barnett 1986, for summing it.
    """
    if t < 0:
        return 1 - _t_tail(-t, degrees)
    ratio = t / math.sqrt(degrees)
    if ratio == 0:
        return 0.5
    if math.isinf(ratio):
        return 0.0
    a, b = degrees / 2, 0.5
    square = ratio * ratio
    # Logarithms of x and 1 - x, each without cancellation.
    log_x = -math.log1p(square) if math.isfinite(square) else -2 * math.log(ratio)
    log_y = 2 * math.log(ratio) + log_x
    front = math.exp(a * log_x + b * log_y + _log_gamma_step(a) - 0.5 * math.log(math.pi))
    x, y = math.exp(log_x), math.exp(log_y)
    if x < (a + 1) / (a + b + 2):
        return 0.5 * front * _beta_fraction(x, a, b) / a
    return 0.5 - 0.5 * front * _beta_fraction(y, b, a) / b


def _log_gamma_step(a: float) -> float:
    """log(gamma(a + 1/2) / gamma(a)); for a large a the two logarithms would cancel.

    Source: DLMF 5.11.13, with the terms of Tricomi and Erdelyi 1951 for a half.
    """
    if a < 100:
        return math.lgamma(a + 0.5) - math.lgamma(a)
    series = 1 / (128 * a**2) + 5 / (1024 * a**3) - 21 / (32768 * a**4) - 399 / (262144 * a**5)
    return 0.5 * math.log(a) + math.log1p(series - 1 / (8 * a))


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of DLMF 8.17.22, for x below (a + 1) / (a + b + 2)."""
    tiny = 1e-300
    c = 1.0
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 100_000):  # it takes about sqrt(a) rounds
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def _t_cut(tail: float, degrees: float) -> float:
    """The t above which `tail` (0 to 0.5) of Student's distribution lies, by bisection."""
    high = max(1.0, -NormalDist().inv_cdf(tail))
    while _t_tail(high, degrees) > tail:
        high *= 2
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_tail(middle, degrees) > tail else (low, middle)
    return high
