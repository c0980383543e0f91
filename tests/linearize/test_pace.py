"""How long mask learning takes is told from how fast ReLUs close, and is not told where that says nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairline.linearize import SNL
from fairline.linearize.pace import WINDOW, epochs_left

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=30)


@given(COUNTS, st.integers(0, 10**6), st.integers(0, 2000))
def test_it_is_never_negative_never_beyond_what_is_left_and_0_once_reached(counts, aim, most):
    left = epochs_left(counts, aim, most)
    assert left is None or 0 <= left <= most
    if counts[-1] <= aim:
        assert left == 0


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30).map(sorted), st.integers(0, 500))
def test_it_is_unknown_where_nothing_closes(rising, more):
    assert epochs_left(rising, 0, 100) is None
    assert epochs_left([more + 1] * len(rising), 0, 100) is None


@given(st.integers(10, 5000), st.integers(3, 20), st.integers(1, 40))
def test_it_is_the_truth_where_as_many_close_in_each_epoch(speed, done, left):
    aim = 17
    start = aim + speed * (done + left)
    counts = [start - speed * epoch for epoch in range(done + 1)]
    assert epochs_left(counts, aim, 1000) == pytest.approx(left, rel=0.02)


@given(st.floats(0.3, 0.9), st.integers(3, 15), st.floats(1, 15))
def test_it_is_the_truth_where_the_same_share_closes_in_each_epoch(keep, done, left):
    counts = [round(10**9 * keep**epoch) for epoch in range(done + 1)]
    aim = round(counts[-1] * keep**left)
    if aim > 1000:
        assert epochs_left(counts, aim, 1000) == pytest.approx(left, rel=0.02)


def test_it_comes_to_the_truth_as_a_run_goes_on():
    # Flat while masks are on their way, a fall, then ever slower: what SNL does.
    counts = [round(122880 if e < 3 else 200 + 20000 * math.exp(-(e - 3) / 4)) for e in range(25)]
    aim = 400
    truth = next(e for e, count in enumerate(counts) if count <= aim)
    off = [abs((epochs_left(counts[: e + 1], aim, 100) or 0) - (truth - e)) for e in range(4 + WINDOW, truth)]
    assert off[-1] < 1
    assert off == sorted(off, reverse=True)


def test_one_epoch_that_leaps_counts_for_little():
    counts = [1000 - 50 * e for e in range(8)]
    counts[5] += 200
    assert epochs_left(counts, 100, 100) == pytest.approx((counts[-1] - 100) / 50, rel=0.1)


def test_progress_says_when_it_does_not_know_and_then_about_when_it_ends(parts, trained):
    updates = []
    method = SNL(lr=0.01, lam=0.01, batch_size=16, max_epochs=60)
    (cut,) = method.linearize(trained, parts[0], [0.1], progress=updates.append)
    assert cut.info["reached"]
    batches = max(u.done for u in updates) // cut.info["epoch"]
    first = [update for update in updates if update.done <= 2 * batches and not update.metrics]
    assert all(
        update.total is None and "time left not known yet (at most 60 epochs)" in update.message for update in first
    )
    known = [update for update in updates if update.total is not None]
    assert known
    assert all(update.done <= update.total <= 60 * batches for update in known)
    # The last epochs know that they are.
    assert updates[-1].total <= 1.2 * updates[-1].done
