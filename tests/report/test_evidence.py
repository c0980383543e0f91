"""Statistics over several tests against their definitions, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from fairline.audit.intervals import student_interval
from fairline.report.evidence import MOST, corrected, pooled, power, seeds_needed, sign_test, student_p
from tests.reference import evidence as reference

panels = st.lists(st.tuples(st.floats(-20, 20), st.floats(0.01, 25)), min_size=2, max_size=12)


@settings(max_examples=40)
@given(panels)
def test_the_random_effects_summary_is_dersimonian_and_lairds(given_panels):
    means, variances = map(list, zip(*given_panels, strict=True))
    found = pooled(np.array(means), np.array(variances))
    for name, value in reference.random_effects(means, variances).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-7, abs=1e-7), name
    assert found.panels == len(means)


@settings(max_examples=40)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=12), st.floats(0.01, 25))
def test_under_equal_variances_it_is_the_plain_mean(means, variance):
    found = pooled(np.array(means), np.full(len(means), variance))
    assert found.mean == pytest.approx(np.mean(means), abs=1e-9)
    # τ² is then what the means vary beyond their own variance.
    assert found.tau**2 == pytest.approx(max(0.0, np.var(means, ddof=1) - variance), abs=1e-6)


@settings(max_examples=40)
@given(st.floats(-20, 20), st.lists(st.floats(0.01, 25), min_size=2, max_size=12))
def test_identical_effects_have_no_heterogeneity(mean, variances):
    found = pooled(np.full(len(variances), mean), np.array(variances))
    assert (found.tau, found.i2) == (0, pytest.approx(0, abs=1e-9))
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.high - found.mean == pytest.approx(
        stats.t.ppf(0.975, len(variances) - 1) / math.sqrt(sum(1 / v for v in variances))
    )


def test_panels_without_a_variance_are_left_out():
    means, variances = np.array([1.0, 2.0, 90.0, 80.0, math.nan]), np.array([0.5, 0.7, math.nan, 0.0, 1.0])
    found = pooled(means, variances)
    assert found == pooled(means[:2], variances[:2])
    assert pooled(means[1:], variances[1:]) is None


@settings(max_examples=40)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=10))
def test_holms_correction_is_the_level_at_which_his_procedure_rejects(p):
    assert corrected(p) == pytest.approx(reference.holm(p), abs=1e-9)
    assert corrected([math.nan, *p])[1:] == corrected(p)


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    threshold=st.floats(-1, 1),
)
def test_the_probability_is_that_of_the_interval(values, threshold):
    own = np.array(values)
    assume(own.std() > 1e-3)
    p = student_p(own.mean(), own.std(ddof=1), len(own), threshold)
    assert p == pytest.approx(stats.ttest_1samp(values, threshold).pvalue, abs=1e-12)
    low, high = student_interval(own)
    assume(min(abs(low - threshold), abs(high - threshold)) > 1e-9)
    assert (p < 0.05) == (not low <= threshold <= high)


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 10), (1.0, 5), (2.0, 3), (0.0, 8), (7.9, 2), (30, 2)])
def test_power_is_how_often_the_interval_decides(effect, seeds):
    expected = reference.power(effect, seeds)
    assert power(effect, seeds) == pytest.approx(expected, abs=5 * math.sqrt(expected / 200_000))


@pytest.mark.parametrize("effect", [0.12, 0.3, 0.9, 2.5, 30])
def test_the_seeds_needed_are_the_fewest_that_suffice(effect):
    needed = int(seeds_needed(1 + effect, 1.0, threshold=1))
    assert power(effect, needed) >= 0.8
    assert needed == 2 or power(effect, needed - 1) < 0.8
    # Either side of the threshold is decided alike.
    assert seeds_needed(1 - effect, 1.0, threshold=1) == pytest.approx(needed, abs=1)


def test_seeds_that_nobody_counts():
    assert seeds_needed(0.001, 1.0) == math.inf
    assert seeds_needed(0.0, 1.0) == math.inf
    assert math.isnan(seeds_needed(1.0, math.nan))
    assert seeds_needed(1.0, 0.0) == 2
    assert seeds_needed(2.9 / math.sqrt(MOST), 1.0) <= MOST


@settings(max_examples=40)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_what_is_undecided_needs_more_seeds_than_it_has(values):
    own = np.array(values)
    assume(own.std() > 1e-3)
    if student_p(own.mean(), own.std(ddof=1), len(own)) > 0.05:
        assert seeds_needed(own.mean(), own.std(ddof=1)) > len(own)


def test_the_sign_test_counts_coins():
    for agreeing in range(7):
        tosses = [sum(map(int, f"{each:06b}")) for each in range(64)]
        expected = np.mean([abs(toss - 3) >= abs(agreeing - 3) for toss in tosses])
        assert sign_test(agreeing, 6) == pytest.approx(expected)
    assert math.isnan(sign_test(0, 0))
