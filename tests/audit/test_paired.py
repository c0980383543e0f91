"""The score of a paired change, its limits and the images it takes: brute force, closed forms, simulation."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fairline.audit.paired import QUANTILE, change_interval, images_needed, p_below, score
from tests.reference import paired_score

counts = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 200)).map(lambda t: (t[0], t[1], sum(t)))


@settings(max_examples=60)
@given(counts, st.floats(-0.95, 0.95).map(lambda x: round(x, 3)))
def test_the_score_is_that_of_the_likeliest_probabilities(table, change):
    lost, gained, n = table
    assume(abs(change) > 1e-6 or lost + gained)
    assert float(score(lost, gained, n, change)) == pytest.approx(
        paired_score.score(lost, gained, n, change), rel=1e-3, abs=1e-3
    )


@given(counts)
def test_without_a_change_it_is_mcnemars(table):
    lost, gained, n = table
    assume(lost + gained)
    assert float(score(lost, gained, n, 0)) == pytest.approx((gained - lost) / math.sqrt(lost + gained))


@given(counts, st.floats(-0.9, 0.9))
def test_exchanging_the_networks_turns_the_sign(table, change):
    lost, gained, n = table
    assert float(score(lost, gained, n, change)) == pytest.approx(-float(score(gained, lost, n, -change)), abs=1e-6)


@given(counts)
def test_limits_are_where_the_score_is_the_quantile(table):
    lost, gained, n = table
    low, high = map(float, change_interval(lost, gained, n))
    assert -1 <= low < (gained - lost) / n < high <= 1 or abs(gained - lost) == n
    for limit, expected in ((low, QUANTILE), (high, -QUANTILE)):
        if abs(limit) < 0.999:
            assert float(score(lost, gained, n, limit)) == pytest.approx(expected, abs=1e-4)


def test_a_test_and_its_interval_agree():
    for lost, gained, n, change in [(10, 2, 50, -0.05), (3, 3, 40, 0.1), (0, 0, 60, -0.05), (25, 1, 80, -0.2)]:
        low, high = change_interval(lost, gained, n)
        beyond = float(p_below(score(lost, gained, n, change))) < 0.025
        assert beyond == bool(high < change)
        within = float(p_below(-score(lost, gained, n, change))) < 0.025
        assert within == bool(low > change)


def test_p_is_the_normal_distributions():
    z = np.linspace(-6, 6, 41)
    assert p_below(z) == pytest.approx(norm.cdf(z))


@given(counts, st.sampled_from([-0.1, -0.05, 0.0, 0.05]))
def test_so_many_images_tell_and_fewer_do_not(table, change):
    lost, gained, n = table
    needed = images_needed(lost, gained, n, change)
    if math.isinf(needed):
        assert (gained - lost) / n == pytest.approx(change)
        return
    for images, tells in ((needed, True), (needed * 0.98 - 1, False)):
        scale = images / n
        assert (abs(float(score(lost * scale, gained * scale, images, change))) >= QUANTILE - 1e-9) == tells


@pytest.mark.parametrize(("n", "losing", "gaining"), [(40, 0.1, 0.05), (150, 0.2, 0.02), (300, 0.02, 0.02)])
def test_limits_hold_the_truth_as_often_as_they_say(n, losing, gaining):
    drawn = np.random.default_rng(0).multinomial(n, [losing, gaining, 1 - losing - gaining], size=4000)
    low, high = change_interval(drawn[:, 0], drawn[:, 1], n)
    held = np.mean((low <= gaining - losing) & (gaining - losing <= high))
    assert 0.94 < held < 0.975
