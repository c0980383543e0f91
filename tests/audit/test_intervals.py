from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq

from fairline.audit import intervals
from fairline.audit.accuracy import relative_drop
from fairline.audit.intervals import (
    draw,
    draws_needed,
    gap_interval,
    lowest_interval,
    mean_interval,
    percentile_interval,
    pooled,
    student_interval,
    wilson_interval,
)
from tests.reference.bootstrap import paired_shares
from tests.scripts import script_at

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coverage.py"


def benchmark():
    return script_at(SCRIPT)


def shares(right: int, n: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    correct = np.arange(n)[:, None] < right
    return draw(correct, draws, np.random.default_rng(seed)).shares([0], [1])[0]


def test_draws_are_those_of_weighting_images_one_at_a_time():
    rng = np.random.default_rng(0)
    before = rng.random(30) < 0.8
    correct = before & (rng.random(30) < 0.9) | (rng.random(30) < 0.02)
    drawn = draw(np.stack([correct, before], axis=1), 40_000, np.random.default_rng(1))
    fast = drawn.shares([0, 1], [1, -1])
    slow = np.stack(paired_shares(correct, before, 20_000, np.random.default_rng(2)))
    np.testing.assert_allclose(fast.mean(1), slow.mean(1), atol=0.003)
    np.testing.assert_allclose(fast.std(1), slow.std(1), rtol=0.03)
    assert np.corrcoef(*fast)[0, 1] == pytest.approx(np.corrcoef(*slow)[0, 1], abs=0.02)
    for of in (lambda after, before: after - before, lambda after, before: relative_drop(before, after) / 100):
        assert percentile_interval(of(*fast)) == pytest.approx(percentile_interval(of(*slow)), abs=0.01)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (2, 2), (1, 2), (7, 10), (10, 10), (45, 50)])
def test_limits_of_a_share_are_the_mid_p_limits(k, n):
    """Those shares at which the data are in the tail with 2.5 %, what was seen counted half."""

    def above(p):
        return stats.binom.sf(k, n, p) + stats.binom.pmf(k, n, p) / 2

    low = 0 if k == 0 else brentq(lambda p: above(p) - 0.025, 0, 1)
    high = 1 if k == n else brentq(lambda p: above(p) - 0.975, 0, 1)
    assert percentile_interval(shares(k, n, 200_000)) == pytest.approx((low, high), abs=0.004)


@pytest.mark.parametrize(("k", "n"), [(0, 3), (3, 3), (7, 10)])
def test_without_the_coin_they_are_clopper_and_pearsons(k, n):
    drawn = draw(np.arange(n)[:, None] < k, 200_000, np.random.default_rng(0))
    exact = stats.binomtest(k, n).proportion_ci(method="exact")
    low = np.quantile(drawn.right[0] / (drawn.total + drawn.extra), 0.025)
    high = np.quantile((drawn.right[0] + drawn.extra) / (drawn.total + drawn.extra), 0.975)
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.004)


def test_many_images_leave_the_one_more_without_weight():
    rng = np.random.default_rng(0)
    n = 5000
    before = rng.random(n) < 0.9
    after = before & (rng.random(n) < 0.97)
    drawn = draw(np.stack([after, before], axis=1), 20_000, rng).shares([1, 0], [1, -1])
    error = (before.astype(float) - after).std() / np.sqrt(n)
    difference = before.mean() - after.mean()
    expected = difference - 1.96 * error, difference + 1.96 * error
    assert percentile_interval(drawn[0] - drawn[1]) == pytest.approx(expected, abs=0.0005)


def test_pairing_narrows_a_difference():
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.7
    correct = before & (rng.random(400) < 0.97)
    first, second = draw(np.stack([correct, before], axis=1), 4000, rng).shares([0, 1], [1, -1])
    paired = np.ptp(percentile_interval(relative_drop(second, first)))
    unpaired = np.ptp(percentile_interval(relative_drop(rng.permutation(second), first)))
    assert paired < 0.5 * unpaired


def test_all_images_have_one_more_image_in_all():
    rng = np.random.default_rng(0)
    groups = [np.arange(n)[:, None] < right for n, right in ((2, 2), (3, 1), (40, 30))]
    together = draw(np.concatenate(groups), 100_000, rng).shares([0], [1])[0]
    parts = pooled([draw(group, 100_000, rng) for group in groups], rng).shares([0], [1])[0]
    assert percentile_interval(parts) == pytest.approx(percentile_interval(together), abs=0.004)


@settings(max_examples=30)
@given(
    groups=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=2, max_size=5), seed=st.integers(0, 1000)
)
def test_limits_of_lowest_and_gap(groups, seed):
    """They hold the value that was seen, do not depend on the groups' order, and a gap is never below 0."""
    rights = [(round(n * share), n) for n, share in groups]
    draws = np.stack([shares(right, n, 500, seed + place) for place, (right, n) in enumerate(rights)])
    seen = np.array([right / n for right, n in rights])
    for limits, value in ((lowest_interval, seen.min()), (gap_interval, np.ptp(seen))):
        low, high = limits(draws)
        assert low - 1e-9 <= value <= high + 1e-9
        assert low < high
        assert limits(draws[::-1]) == (low, high)
    assert gap_interval(draws)[0] >= 0
    assert lowest_interval(draws)[0] == min(percentile_interval(own)[0] for own in draws)


def test_the_gap_of_two_groups_is_their_difference_folded():
    few, many = shares(12, 40), shares(36, 40, seed=1)
    assert gap_interval(np.stack([few, many])) == pytest.approx(percentile_interval(many - few))
    alike = shares(30, 40), shares(30, 40, seed=1)
    assert gap_interval(np.stack(alike))[0] == 0
    assert np.isnan(gap_interval(few[None])).all()


def test_tails_of_many_groups_have_draws():
    assert draws_needed(2, 2000) == 2000
    assert draws_needed(50, 2000) * 0.05 / (50 * 49) == pytest.approx(1)


def test_limits_of_means():
    values = np.random.default_rng(0).exponential(size=40)
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    assert student_interval(values) == pytest.approx((low, high))
    assert mean_interval(values, most=1.05) == pytest.approx((low, 1.05))
    assert mean_interval(np.array([0.0, 1.0]), least=0, most=1) == (0, 1)
    rounded = 100 * (np.array([0.6, 0.8]) - np.array([0.5, 0.7]))
    assert rounded[0] != rounded[1]
    for nothing in (np.array([]), np.array([2.0]), np.array([2.0, 2.0, 2.0]), rounded, rounded - rounded[0]):
        assert np.isnan(mean_interval(nothing)).all()


@pytest.mark.parametrize("freedom", [1, 4, 30])
def test_students_quantile_without_scipy(monkeypatch, freedom):
    intervals._student_quantile.cache_clear()
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert intervals._student_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)
    intervals._student_quantile.cache_clear()


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (71, 71), (3, 40)])
def test_wilson_interval_is_scipys(k, n):
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k / n, n) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n", [2, 10, 50])
def test_limits_hold_what_they_promise(n):
    """A quick version of ``benchmarks/coverage.py``: 200 data sets, whose share scatters by 1.5 points around 95 %."""
    module = benchmark()
    found = module.coverage(module.SCENARIOS["equal"], [n] * 5, draws=200, resamples=500)
    assert set(found) == set(module.truth(module.SCENARIOS["equal"], [n] * 5))
    assert all(share >= 0.9 for share in found.values()), found


def test_the_benchmark_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--draws", "3", "--resamples", "50", "--sizes", "4"])
    module = benchmark()
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(module.SCENARIOS) + 1
    for line in lines[2:]:
        cells = [float(cell) for cell in line.strip("| ").split(" | ")[2:]]
        assert len(cells) == len(module.truth(module.SCENARIOS["equal"], [4] * 5))
        assert all(0 <= cell <= 100 for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["equal", "unequal", "two groups"])
def test_limits_of_many_images_are_no_wider_than_promised(scenario):
    module = benchmark()
    groups = module.SCENARIOS[scenario]
    found = module.coverage(groups, [1000] * len(groups), draws=1000, resamples=2000)
    assert all(0.93 <= found[name] <= 0.975 for name in ("accuracy", "difference", "relative drop", "worst group")), (
        found
    )
