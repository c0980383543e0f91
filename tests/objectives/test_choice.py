"""The rule that strengths are chosen by, against one that counts images."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.choice import accuracies, chosen, require_rule


def slow(right: list[tuple[int, int]], n: int, m: int, within: Fraction, plain: int) -> int | None:
    """Of images that are right, of all n and of the m of the worst group: exact, one after the other."""
    best = None
    for place, (overall, worst) in enumerate(right):
        if Fraction(100 * (plain - overall), n) > within:
            continue
        if best is None or Fraction(worst, m) > Fraction(right[best][1], m):
            best = place
    return best


@st.composite
def trials(draw):
    n = draw(st.integers(1, 5000))
    m = draw(st.integers(1, n))
    plain = draw(st.integers(0, n))
    within = draw(st.integers(0, 300))
    # Near the limit, where a last bit would decide.
    near = plain - n * within // 10_000
    overall = st.one_of(st.integers(0, n), st.integers(max(near - 1, 0), max(min(near + 1, n), 0)))
    right = draw(st.lists(st.tuples(overall, st.integers(0, m)), min_size=1, max_size=6))
    return right, n, m, Fraction(within, 100), plain


@given(trials())
@example(([(99, 3), (98, 9)], 100, 10, Fraction(1), 100))
@example(([(0, 9)], 100, 10, Fraction(1), 100))
def test_it_takes_what_counting_images_takes(trial):
    right, n, m, within, plain = trial
    tried = [{"accuracy": overall / n, "worst_group_accuracy": worst / m} for overall, worst in right]
    assert chosen(tried, "worst_group", float(within), plain / n) == slow(right, n, m, within, plain)


@given(st.lists(st.integers(-100, 100), min_size=1))
def test_the_largest_loss_is_least_whatever_it_costs_overall(losses):
    tried = [{"accuracy": 0.0, "worst_group_accuracy": 0.0, "largest_loss": float(loss)} for loss in losses]
    assert chosen(tried, "largest_loss", 0.0, 1.0) == losses.index(min(losses))


def test_of_equals_the_first_is_taken():
    tried = [{"accuracy": 0.8, "worst_group_accuracy": 0.5}, {"accuracy": 0.9, "worst_group_accuracy": 0.5}]
    assert chosen(tried, "worst_group", 1.0, 0.8) == 0


def test_accuracies_are_of_all_and_of_each_group():
    labels, groups = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    data = GroupedData(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), labels, groups, ("a", "b"), ("x", "y"))
    logits = torch.eye(2)[torch.tensor([0, 1, 1, 1, 0])]
    assert accuracies(logits, data) == (pytest.approx(3 / 5), [1.0, pytest.approx(1 / 3)])


@pytest.mark.parametrize(("rule", "within"), [("best", 1.0), ("worst_group", -0.1), ("worst_group", float("nan"))])
def test_a_rule_that_there_is_not_is_refused(rule, within):
    with pytest.raises(FairlineError, match=r"^[^\n]*\.$"):
        require_rule(rule, within)
