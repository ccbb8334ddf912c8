"""When the gate decides, and how often it is wrong where the truth is known."""

import math

import numpy as np
import pytest

from mmopt.measure.gate.decision import LOOKS, Contest, Verdict, judge, of_suite
from mmopt.measure.statistics import trimmed_mean_test

MARGIN = 0.03


def contest(*log_ratios: float, margin: float = MARGIN, name: str = "bench") -> Contest:
    return Contest(name, margin, log_ratios=list(log_ratios))


def decide(suite: list[Contest], *, alpha: float = 0.01, beta: float = 0.01) -> list[Contest]:
    judge(suite, alpha=alpha, beta=beta)
    return suite


def run_suite(ratios: np.ndarray) -> list[Contest]:
    """Feed one row of log-ratios per benchmark, pair by pair, as the gate does."""
    suite = [Contest(f"bench{i}", MARGIN) for i in range(len(ratios))]
    for number in range(LOOKS[-1]):
        for row, one in zip(ratios, suite, strict=True):
            if one.verdict is None:
                one.log_ratios.append(float(row[number]))
        decide(suite)
    return suite


def scatter(rng: np.random.Generator, tails: str, shape: tuple[int, int]) -> np.ndarray:
    """Noise of about 1.5% between pairs, symmetric as that of two equal programs is."""
    if tails == "normal":
        return rng.normal(0, 0.015, shape)
    return 0.009 * rng.standard_t(2, shape)  # the scatter of a busy machine: rare, far outliers


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_equal_programs_are_almost_never_called_regressed(tails: str) -> None:
    """At most 1% of suites of ten may be; 300 suites give up to 6 with probability 0.97."""
    rng = np.random.default_rng(0)
    suites = [run_suite(scatter(rng, tails, (10, LOOKS[-1]))) for _ in range(300)]
    alarms = sum(any(one.verdict is Verdict.REGRESSED for one in suite) for suite in suites)
    assert alarms <= 6
    passed = [one.verdict is Verdict.PASSED for suite in suites for one in suite]
    assert np.mean(passed) > 0.95


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_a_slowdown_by_the_margin_is_found_and_does_not_pass(tails: str) -> None:
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(200):
        ratios = scatter(rng, tails, (10, LOOKS[-1]))
        ratios[3] += math.log1p(MARGIN)
        verdicts.append(run_suite(ratios)[3].verdict)
    assert verdicts.count(Verdict.REGRESSED) >= 190
    assert verdicts.count(Verdict.PASSED) <= 4


@pytest.mark.parametrize("pairs", [1, 2, LOOKS[0] - 1, LOOKS[0] + 1])
def test_nothing_is_decided_between_looks(pairs: int) -> None:
    (one,) = decide([contest(*[math.log(2)] * pairs)])
    assert one.verdict is None


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(1.0, "PASSED"), (1.05, "REGRESSED"), (0.95, "IMPROVED"), (1.01, "PASSED"), (0.995, "PASSED")],
)
def test_pairs_without_scatter_decide_at_the_first_look(ratio: float, verdict: str) -> None:
    (one,) = decide([contest(*[math.log(ratio)] * LOOKS[0])])
    assert one.verdict == verdict


def test_a_slowdown_known_to_be_below_the_margin_passes() -> None:
    """2.5% is certain here, but the user allowed 3%."""
    ratios = np.log(1.025) + np.linspace(-1e-4, 1e-4, LOOKS[0])
    (one,) = decide([contest(*ratios)])
    assert one.p_slower < 1e-6
    assert one.verdict is Verdict.PASSED


def test_a_significant_but_small_slowdown_is_not_regressed() -> None:
    """0.5% with little scatter: significance alone does not decide."""
    ratios = np.log(1.005) + np.linspace(-1e-3, 1e-3, LOOKS[0])
    assert decide([contest(*ratios)])[0].verdict is Verdict.PASSED


def test_every_look_is_paid_for_whether_or_not_it_is_taken() -> None:
    ratios = np.log(1.02) + np.linspace(-0.02, 0.03, LOOKS[0])
    test = trimmed_mean_test(ratios)
    (slower,) = decide([contest(*ratios)])
    (faster,) = decide([contest(*-ratios)])
    assert slower.p_slower == pytest.approx(len(LOOKS) * test.p_above(0.0))
    assert slower.p_within == 1.0  # of more than one there is no less
    assert faster.p_faster == pytest.approx(len(LOOKS) * test.p_above(0.0))
    assert faster.p_within == pytest.approx(len(LOOKS) * test.p_above(-math.log1p(MARGIN)))


def test_a_larger_suite_asks_for_more_evidence() -> None:
    """Holm: the same pairs convict one benchmark alone, but not one of a hundred."""
    ratios = np.log(1.03) + np.linspace(-0.02, 0.02, 12)
    (alone,) = decide([contest(*ratios)])
    crowd = [Contest(f"other{i}", MARGIN, verdict=Verdict.PASSED) for i in range(999)]
    among = decide([contest(*ratios), *crowd])[0]
    assert alone.verdict is Verdict.REGRESSED
    assert among.verdict is None


def test_each_benchmark_has_its_own_margin() -> None:
    ratios = np.log(1.05) + np.linspace(-1e-3, 1e-3, LOOKS[0])
    strict, loose = decide(
        [contest(*ratios, name="strict"), contest(*ratios, margin=0.2, name="loose")]
    )
    assert (strict.verdict, loose.verdict) == (Verdict.REGRESSED, Verdict.PASSED)


def test_one_wild_pair_in_six_does_not_decide() -> None:
    """A 20% trimmed mean drops the largest and the smallest of six."""
    ratios = [*np.linspace(-1e-3, 1e-3, LOOKS[0] - 1), math.log(5)]
    assert decide([contest(*ratios)])[0].verdict is Verdict.PASSED


def test_a_decided_benchmark_keeps_its_verdict() -> None:
    one = contest(*[0.0] * LOOKS[0])
    decide([one])
    one.log_ratios[:] = [1.0] * LOOKS[1]
    decide([one])
    assert one.verdict is Verdict.PASSED


def test_slowdown_and_interval_are_shares() -> None:
    one = contest(*(np.log(1.1) + np.linspace(-0.01, 0.01, 12)))
    assert one.slowdown == pytest.approx(0.1, abs=1e-9)
    assert one.interval is not None
    assert 0.09 < one.interval.low < 0.1 < one.interval.high < 0.11
    assert contest(0.1).interval is None


@pytest.mark.parametrize(
    ("verdicts", "suite"),
    [
        (["PASSED", "PASSED"], "PASSED"),
        (["PASSED", "IMPROVED"], "IMPROVED"),
        (["PASSED", "NEW"], "PASSED"),
        (["PASSED", "INCONCLUSIVE", "IMPROVED"], "INCONCLUSIVE"),
        (["PASSED", "FAILED"], "INCONCLUSIVE"),
        (["INCONCLUSIVE", "REGRESSED"], "REGRESSED"),
        (["PASSED", "MISSING"], "REGRESSED"),
        (["FAILED", "REGRESSED"], "REGRESSED"),
        (["NEW"], "INCONCLUSIVE"),
        ([], "INCONCLUSIVE"),
    ],
)
def test_the_suite_is_as_bad_as_its_worst_benchmark(verdicts: list[str], suite: str) -> None:
    assert of_suite([Verdict(verdict) for verdict in verdicts]) == suite
