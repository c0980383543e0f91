from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline.errors import FairlineError
from fairline.masking import MaskedReLU
from fairline.theory.pieces import (
    approximation_rate,
    figure_10_network,
    kept_piece_bound,
    linear_pieces,
    optimal_approximation,
    piece_bound,
)
from tests.reference.pieces import best_error, pieces_on_a_grid


@pytest.mark.parametrize("segments", [1, 2, 3, 7, 20])
def test_a_parabola_in_closed_form(segments):
    found = optimal_approximation(lambda x: x * x, 0, 1, segments)
    assert found.error == pytest.approx(1 / (8 * segments**2), rel=1e-6)
    np.testing.assert_allclose(found.knots, np.linspace(0, 1, segments + 1), atol=1e-5)
    x = np.linspace(0, 1, 5001)
    assert np.abs(found(x) - x * x).max() == pytest.approx(found.error, rel=1e-4)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [(math.exp, 0, 2), (lambda x: -math.log(x), 0.1, 2), (lambda x: x**4 + x * x, -1, 2), (math.cosh, -2, 2)],
)
@pytest.mark.parametrize("segments", [1, 2, 3, 5])
def test_the_error_is_the_same_on_all_segments_and_alternates(function, low, high, segments):
    found = optimal_approximation(function, low, high, segments)
    for left, right in zip(found.knots[:-1], found.knots[1:], strict=True):
        x = np.linspace(left, right, 2001)
        difference = found(x) - np.array([function(t) for t in x])
        # Below at both ends, above in the middle, by the same amount: the best line on this segment.
        assert difference[0] == pytest.approx(-found.error, rel=1e-6)
        assert difference[-1] == pytest.approx(-found.error, rel=1e-6)
        assert difference.max() == pytest.approx(found.error, rel=1e-4)


@pytest.mark.parametrize("segments", [2, 3])
def test_no_search_finds_a_better_one(segments):
    for function, low, high in ((math.exp, 0, 2), (lambda x: x**4 + x * x, -1, 2)):
        optimal = optimal_approximation(function, low, high, segments).error
        searched = best_error(function, low, high, segments)
        assert optimal <= searched * (1 + 1e-3)
        if segments == 2:  # with more knots the search gets stuck before the optimum
            assert searched == pytest.approx(optimal, rel=0.05)


@pytest.mark.parametrize(
    ("function", "low", "high", "integral"),
    [
        (math.exp, 0, 2, 2 * (math.e - 1)),
        (lambda x: -math.log(x), 0.05, 1, math.log(20)),
        (lambda x: x * x, -1, 3, 4 * 2**0.5),
    ],
)
def test_the_rate_of_proposition_4_1(function, low, high, integral):
    table = approximation_rate(function, low, high, [1, 2, 4, 8, 16, 64])
    assert table["error"].is_monotonic_decreasing
    assert table["scaled"].iloc[-1] == pytest.approx(integral**2 / 16, rel=1e-2)
    # O(1/n²): n²·error is bounded over all n.
    assert table["scaled"].max() < 1.5 * integral**2 / 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x: -x * x, 0, 1, 2), "not strictly convex near"),
        ((lambda x: x, 0, 1, 2), "not strictly convex near"),
        ((lambda x: x * x, 1, 1, 2), r"\[1, 1\] is no interval"),
        ((lambda x: x * x, 0, 1, 0), "needs a segment at least, not 0"),
        ((lambda x: math.inf if x == 0 else 1 / x, 0, 1, 2), "not finite at 0"),
    ],
)
def test_bad_approximations(arguments, message):
    with pytest.raises(FairlineError, match=message):
        optimal_approximation(*arguments)


def perceptron(widths, seed: int, masked: float | None = None) -> nn.Sequential:
    """ℝ → ℝ with the given hidden layers, in float64; with ``masked``, that share of the ReLUs is linearized."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in zip([1, *widths[:-1]], widths, strict=True):
        linear = nn.Linear(before, after)
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)
        relu: nn.Module = nn.ReLU()
        if masked is not None:
            relu = MaskedReLU((after,))
            relu.set_mask(torch.rand(after) >= masked)
        layers += [linear, relu]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1)).double()


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
    masked=st.sampled_from([None, 0.3, 0.7, 1.0]),
)
def test_pieces_are_the_network_and_obey_the_bounds(widths, seed, masked):
    network = perceptron(widths, seed, masked)
    pieces = linear_pieces(network)
    x = np.linspace(-20, 20, 4001)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)[:, None]).numpy()
    np.testing.assert_allclose(pieces(x), expected, rtol=1e-7, atol=1e-8)
    kept = [widths[i] if masked is None else network[2 * i + 1].num_kept for i in range(len(widths))]
    assert pieces.count <= kept_piece_bound(kept) <= kept_piece_bound(widths) <= piece_bound(widths)
    assert len(pieces.breakpoints) == pieces.count - 1
    assert (np.diff(pieces.breakpoints) > 0).all()
    if masked == 1.0:
        assert pieces.count == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("masked", [None, 0.5])
def test_pieces_by_counting_on_a_fine_grid(seed, masked):
    network = perceptron([4, 3], seed, masked)
    pieces = linear_pieces(network, -4, 4)
    gaps = np.diff(np.concatenate([[-4], pieces.breakpoints, [4]]))
    if gaps.min() > 1e-3:  # pieces that the grid can resolve
        assert pieces_on_a_grid(network, -4, 4) == pieces.count
    assert ((pieces.breakpoints > -4) & (pieces.breakpoints < 4)).all()


def test_figure_10_goes_from_three_pieces_to_two():
    network = figure_10_network()
    assert linear_pieces(network).count == 3 == piece_bound([2])
    assert pieces_on_a_grid(figure_10_network(), -2, 2) == 3
    mask = MaskedReLU((2,))
    mask.set_mask(torch.tensor([True, False]))
    cut = nn.Sequential(network[0], mask, network[2]).double()
    assert linear_pieces(cut).count == 2 == kept_piece_bound([1])
    assert pieces_on_a_grid(cut, -2, 2) == 2


def test_the_bound_of_proposition_4_2():
    assert piece_bound([2]) == 3
    assert piece_bound([3, 4]) == 2 * 4 * 4
    assert piece_bound([3, 4, 5]) == 4 * 4 * 4 * 5
    assert piece_bound([]) == 1
    with pytest.raises(FairlineError, match="needs a unit"):
        piece_bound([3, 0])


def test_a_sawtooth_doubles_its_pieces_with_each_layer():
    """Two units a layer fold the line in two (Telgarsky 2015)."""
    layers: list[nn.Module] = []
    for depth in range(4):
        fold = nn.Linear(1 if depth == 0 else 2, 2)
        with torch.no_grad():
            hat = torch.tensor([[1.0]]) if depth == 0 else torch.tensor([[2.0, -4.0]])
            fold.weight.copy_(hat.expand(2, -1))
            fold.bias.copy_(torch.tensor([0.0, -0.5]))
        layers += [fold, nn.ReLU()]
    out = nn.Linear(2, 1)
    with torch.no_grad():
        out.weight.copy_(torch.tensor([[2.0, -4.0]]))
        out.bias.zero_()
    pieces = linear_pieces(nn.Sequential(*layers, out), 0, 1)
    assert pieces.count == 2**4
    np.testing.assert_allclose(pieces.breakpoints, np.arange(1, 16) / 16)


def test_other_networks_are_refused():
    learning = MaskedReLU((2,))
    learning.learn()
    for network, message in (
        (nn.Sequential(nn.Linear(2, 1)), "takes 2 numbers but gets 1"),
        (nn.Sequential(nn.Linear(1, 1), nn.Tanh()), "'1' is a Tanh"),
        (nn.Sequential(nn.Linear(1, 2), learning), "still being learned"),
    ):
        with pytest.raises(FairlineError, match=message):
            linear_pieces(network)
    with pytest.raises(FairlineError, match="is no interval"):
        linear_pieces(figure_10_network(), 1, 0)
    assert linear_pieces(nn.Sequential(nn.Linear(1, 1), nn.Identity())).count == 1
