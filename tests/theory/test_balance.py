from __future__ import annotations

import numpy as np
import pytest
import torch

import fairline as fl
from fairline.theory.balance import check, converged_regression, gradient_balance, two_groups


@pytest.fixture(scope="module")
def digits():
    return fl.data.load("digits").split(seed=0)[0]


@pytest.fixture(scope="module")
def table(digits):
    return check(digits)


def test_with_two_groups_norms_are_inverse_to_sizes(table):
    pair = table[table["groups"] == 2]
    assert (pair["residual"] < 1e-4).all()
    np.testing.assert_allclose(pair["ratio"], pair["inverse_size"], rtol=1e-3)
    np.testing.assert_allclose(pair["gradient_share"], 0.5, atol=1e-3)


def test_with_ten_groups_they_are_not(table):
    ten = table[table["groups"] == 10]
    assert (ten["residual"] < 1e-4).all()
    assert ten["gradient_share"].max() <= 0.5
    assert (ten["ratio"] / ten["inverse_size"] - 1).abs().max() > 0.2


def test_two_groups_split_by_size(digits):
    pair = two_groups(digits)
    sizes = digits.counts()["n"]
    frequent, rare = (
        [int(sizes.iloc[int(g)]) for g in digits.groups[pair.groups == group].unique()] for group in (0, 1)
    )
    assert len(frequent) == len(rare) == 5
    assert min(frequent) >= max(rare)


def test_away_from_a_minimum_the_residual_says_so(digits):
    model = converged_regression(digits)
    with torch.no_grad():
        model[2].bias.add_(torch.arange(10.0))
    assert gradient_balance(model, two_groups(digits))[1].residual > 0.1
