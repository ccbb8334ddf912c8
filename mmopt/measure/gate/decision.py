"""When a benchmark is decided, and how: pure functions over log-ratios, one number per pair.

Two statements are tested on the trimmed mean of the pairs' log-ratios (head over base):

- *slower by the margin or more.* Rejected with an error of at most `beta` for each benchmark: the
  benchmark PASSED, or IMPROVED where it is faster beyond doubt.
- *not slower at all.* Rejected with an error of at most `alpha` for the whole suite (Holm), and the
  estimate is at least half the margin: it REGRESSED.

So a program as fast as before is called REGRESSED in at most `alpha` of all suites, and one slower
by the margin is let pass with probability `beta` at most. Between none and the margin either answer
may come, and a slowdown known to be below the margin passes: that is what a margin says. As pairs
are added the tests are repeated, only at LOOKS, and each p value is multiplied by their number.

Sources: Yuen 1974, "The two-sample trimmed t for unequal population variances" (Biometrika 61), the
one-sample form of Tukey and McLaughlin 1963; Holm 1979, "A simple sequentially rejective multiple
test procedure"; Wellek 2010, "Testing Statistical Hypotheses of Equivalence and Noninferiority",
section 1.2, for passing by rejecting the margin; Jennison and Turnbull 1999, "Group Sequential
Methods", chapter 2, for why looks must be paid for (Bonferroni here, which needs no model).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from mmopt.measure.statistics import Interval, MeanTest, holm, trimmed_mean_test

LOOKS = (6, 8, 10, 12, 16, 20, 24, 32, 40)
"""Numbers of pairs at which a benchmark is judged; the last is the most pairs there are.

Fewer than 6 leave a trimmed mean with too few values. Many early looks are worth their price
(docs/lab-notes.md, "How often the gate should look").
"""

SMALLEST_EFFECT = 0.5
"""REGRESSED and IMPROVED need an estimate of at least this share of the margin: significance alone
would call a slowdown of a thousandth."""


class Verdict(StrEnum):
    """What the gate says of a benchmark, an exact figure or the suite."""

    REGRESSED = "REGRESSED"
    MISSING = "MISSING"  # in base, not in head
    FAILED = "FAILED"  # did not run on one side
    INCONCLUSIVE = "INCONCLUSIVE"
    IMPROVED = "IMPROVED"
    PASSED = "PASSED"
    NEW = "NEW"  # in head, not in base


@dataclass
class Contest:
    """One benchmark of the suite while pairs come in.

    Attributes:
        name: pytest's node id.
        margin: the slowdown that must not pass, 0.03 for 3%.
        log_ratios: log(head / base), one per pair.
        base_seconds, head_seconds: the pair's medians of seconds per call.
        verdict: None until it is decided.
        note: what a reader should know of it.
        p_slower, p_faster, p_within: smallest p values so far, paid for LOOKS looks; of "not
            slower", "not faster" and "slower by the margin or more".
    """

    name: str
    margin: float
    log_ratios: list[float] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)
    head_seconds: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    note: str | None = None
    p_slower: float = 1.0
    p_faster: float = 1.0
    p_within: float = 1.0

    def estimate(self) -> MeanTest | None:
        """The trimmed mean of the log-ratios; None with fewer than two pairs."""
        return trimmed_mean_test(self.log_ratios) if len(self.log_ratios) >= 2 else None

    @property
    def slowdown(self) -> float | None:
        """How much slower head is, 0.03 for 3%; negative is faster; None with too few pairs."""
        test = self.estimate()
        return None if test is None else math.expm1(test.mean)

    @property
    def interval(self) -> Interval | None:
        """95% confidence interval of `slowdown`, as if this had been the only look."""
        test = self.estimate()
        if test is None:
            return None
        ends = test.interval(0.95)
        return Interval(math.expm1(ends.low), math.expm1(ends.high))


def judge(contests: Sequence[Contest], *, alpha: float, beta: float) -> None:
    """Give a verdict to each undecided benchmark whose number of pairs is one of LOOKS.

    Args:
        contests: every timed benchmark of the suite, decided or not: Holm counts them all.
        alpha: of all suites without a slowdown, the share that may be called REGRESSED.
        beta: of all benchmarks slower by their margin, the share that may pass.
    """
    looking = [c for c in contests if c.verdict is None and len(c.log_ratios) in LOOKS]
    tests: dict[str, MeanTest] = {}
    for contest in looking:
        test = tests[contest.name] = trimmed_mean_test(contest.log_ratios)
        margin = math.log1p(contest.margin)
        contest.p_slower = min(contest.p_slower, len(LOOKS) * test.p_above(0.0))
        contest.p_faster = min(contest.p_faster, len(LOOKS) * test.p_below(0.0))
        contest.p_within = min(contest.p_within, len(LOOKS) * test.p_below(margin))

    slower = _rejected(contests, [c.p_slower for c in contests], alpha)
    faster = _rejected(contests, [c.p_faster for c in contests], alpha)
    for contest in looking:
        effect = SMALLEST_EFFECT * math.log1p(contest.margin)
        mean = tests[contest.name].mean
        if contest.p_within <= beta:
            improved = contest.name in faster and mean <= -effect
            contest.verdict = Verdict.IMPROVED if improved else Verdict.PASSED
        elif contest.name in slower and mean >= effect:
            contest.verdict = Verdict.REGRESSED


def _rejected(contests: Sequence[Contest], p_values: Sequence[float], level: float) -> set[str]:
    adjusted = holm([min(1.0, p) for p in p_values])
    return {c.name for c, p in zip(contests, adjusted, strict=True) if p <= level}


def of_suite(verdicts: Sequence[Verdict]) -> Verdict:
    """The suite's verdict: the worst there is, and never PASSED without a benchmark that passed."""
    found = set(verdicts)
    if found & {Verdict.REGRESSED, Verdict.MISSING}:
        return Verdict.REGRESSED
    if found & {Verdict.FAILED, Verdict.INCONCLUSIVE} or not found - {Verdict.NEW}:
        return Verdict.INCONCLUSIVE
    return Verdict.IMPROVED if Verdict.IMPROVED in found else Verdict.PASSED
