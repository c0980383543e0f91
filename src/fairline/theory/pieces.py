"""Linear pieces: how well n of them approximate, and how many a ReLU network has (paper, Propositions 4.1 and 4.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from fairline.errors import FairlineError
from fairline.masking import MaskedReLU

Floats = NDArray[np.float64]
Function = Callable[[float], float]


@dataclass(frozen=True)
class PiecewiseLinear:
    """A continuous piecewise linear function.

    Attributes:
        knots: (n + 1,), rising: the ends of its n segments.
        values: (n + 1,): its values there.
        error: Largest distance to the function that it approximates.
    """

    knots: Floats
    values: Floats
    error: float

    def __call__(self, x: Floats) -> Floats:
        """Values at x, within the knots."""
        return np.interp(x, self.knots, self.values)


def optimal_approximation(function: Function, low: float, high: float, segments: int) -> PiecewiseLinear:
    """The best approximation Δ(f*ₙ) of a strictly convex function by n linear segments, in the largest distance.

    On one segment the best line runs parallel to the chord, half the largest gap between chord and function below
    it. With knots such that this gap is equal on all segments, the lines meet, and no other knots do better
    (Proposition 4.1). The error falls as O(1/n²): n²·Δ tends to (∫√f″)²/16.

    Args:
        function: Strictly convex on [low, high].
        low: Left end.
        high: Right end.
        segments: n.

    Returns:
        The approximation.

    Raises:
        FairlineError: The interval is empty, n < 1, or the function is not strictly convex there.

    >>> best = optimal_approximation(lambda x: x * x, 0, 1, 4)
    >>> best.knots.round(6).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> round(16 * best.error, 6)  # (∫√f″)²/16 = 1/8 for every n
    0.125
    """
    from scipy.optimize import brentq

    if segments < 1:
        raise FairlineError(f"An approximation needs a segment at least, not {segments}.")
    _require_convex(function, low, high)
    width = high - low

    def next_knot(left: float, gap: float) -> float:
        """Where a segment from ``left`` must end to have this gap; beyond ``high`` if the rest has a smaller one."""
        rest = _chord_gap(function, left, high)
        if rest <= gap:
            # Continued as for constant curvature, so that the outer root finding sees a continuous function.
            return left + (high - left) * math.sqrt(gap / rest) if rest > 0 else high + width * math.sqrt(gap)
        return float(brentq(lambda t: _chord_gap(function, left, t) - gap, left, high, xtol=1e-15 * width, rtol=1e-14))

    def knots_of(gap: float) -> list[float]:
        knots = [low]
        while len(knots) <= segments and knots[-1] < high:
            knots.append(next_knot(knots[-1], gap))
        return knots

    def overshoot(gap: float) -> float:
        knots = knots_of(gap)
        # Unused segments count as far beyond the end.
        return knots[-1] - high + (segments + 1 - len(knots)) * width

    whole = _chord_gap(function, low, high)
    gap = whole
    if segments > 1:
        gap = float(brentq(overshoot, whole / (8 * segments) ** 2, whole, xtol=1e-14 * whole, rtol=1e-12))
    knots = np.array(knots_of(gap)[: segments + 1])
    knots[-1] = high
    gaps = [_chord_gap(function, a, b) for a, b in itertools.pairwise(knots)]
    error = max(gaps) / 2
    return PiecewiseLinear(knots, np.array([function(t) for t in knots]) - error, error)


def _chord_gap(function: Function, left: float, right: float) -> float:
    """Largest height of the chord above a convex function on [left, right]."""
    from scipy.optimize import minimize_scalar

    if right <= left:
        return 0.0
    at_left = function(left)
    slope = (function(right) - at_left) / (right - left)
    found = minimize_scalar(
        lambda x: function(x) - (at_left + slope * (x - left)),
        bounds=(left, right),
        method="bounded",
        options={"xatol": 1e-9 * (right - left)},
    )
    return max(0.0, -float(found.fun))


def _require_convex(function: Function, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise FairlineError(f"[{low:g}, {high:g}] is no interval.")
    x = np.linspace(low, high, 201)
    y = np.array([function(float(t)) for t in x])
    bend = y[2:] - 2 * y[1:-1] + y[:-2]
    noise = 8 * np.finfo(float).eps * np.abs(y).max()
    if not np.isfinite(y).all():
        raise FairlineError(f"The function is not finite at {x[~np.isfinite(y)][0]:g}.")
    if (bend <= noise).any():
        raise FairlineError(f"The function is not strictly convex near {x[1:-1][bend <= noise][0]:g}.")


def approximation_rate(function: Function, low: float, high: float, segments: Sequence[int]) -> pd.DataFrame:
    """Errors of the optimal approximations, and n²·error, which Proposition 4.1 says stays bounded.

    Args:
        function: Strictly convex on [low, high].
        low: Left end.
        high: Right end.
        segments: Values of n.

    Returns:
        One row a value of n: ``error`` and ``scaled``, n²·error.
    """
    errors = [optimal_approximation(function, low, high, n).error for n in segments]
    index = pd.Index(list(segments), name="segments")
    return pd.DataFrame({"error": errors, "scaled": [n * n * e for n, e in zip(segments, errors, strict=True)]}, index)


def piece_bound(widths: Sequence[int]) -> int:
    """At most 2^(k−1)·(ω₁ + 1)·ω₂·…·ω_k linear pieces for a ReLU network ℝ → ℝ (Proposition 4.2; Arora et al. 2018).

    Args:
        widths: ω₁ … ω_k, units of each hidden layer.

    Returns:
        The bound; 1 for a network without hidden layers.

    Raises:
        FairlineError: A width is below 1.

    >>> piece_bound([2, 3])
    18
    """
    if any(width < 1 for width in widths):
        raise FairlineError(f"Every hidden layer needs a unit, not {list(widths)}.")
    if not widths:
        return 1
    return int(2 ** (len(widths) - 1) * (widths[0] + 1) * math.prod(widths[1:]))


def kept_piece_bound(kept: Sequence[int]) -> int:
    """At most ∏(rᵢ + 1) linear pieces for an ℝ → ℝ network that keeps rᵢ ReLUs in hidden layer i.

    A kept ReLU bends at most once on each piece of its input, and a linearized one never, so layer i multiplies the
    pieces by rᵢ + 1 at most. Never above Proposition 4.2, and it falls with every ReLU that is linearized.

    Args:
        kept: r₁ … r_k; 0 for a layer that is wholly linear.

    Returns:
        The bound; 1 where no ReLU is kept.

    >>> kept_piece_bound([2, 3]), kept_piece_bound([2, 0])
    (12, 3)
    """
    return math.prod(r + 1 for r in kept)


@dataclass(frozen=True)
class Pieces:
    """A network ℝ → ℝᵐ along the line.

    Attributes:
        breakpoints: (p − 1,), rising: where its slope changes.
        slopes: (p, m): slope of each of the p pieces.
        offsets: (p, m): piece i is ``slopes[i]·x + offsets[i]``.
    """

    breakpoints: Floats
    slopes: Floats
    offsets: Floats

    @property
    def count(self) -> int:
        """How many linear pieces there are."""
        return len(self.slopes)

    def __call__(self, x: Floats) -> Floats:
        """Values (n, m) at x (n,)."""
        piece = np.searchsorted(self.breakpoints, x)
        result: Floats = self.slopes[piece] * np.asarray(x)[:, None] + self.offsets[piece]
        return result


def linear_pieces(network: nn.Sequential, low: float = -math.inf, high: float = math.inf) -> Pieces:
    """The exact linear pieces of a ReLU network ℝ → ℝᵐ on [low, high], masks included.

    Carries the pieces through the layers: on each, every unit is a line, so a ReLU that is kept splits it where that
    line crosses zero. Neighbours of equal slope are one piece. float64.

    Args:
        network: ``nn.Linear``, ``nn.ReLU``, :class:`~fairline.MaskedReLU` with fixed masks and ``nn.Identity``.
        low: Left end of the line.
        high: Right end.

    Returns:
        The pieces.

    Raises:
        FairlineError: The network takes more than one number, or holds another kind of layer.

    >>> pieces = linear_pieces(figure_10_network())
    >>> pieces.count, pieces.breakpoints.tolist()
    (3, [-0.5, 0.5])
    """
    if not low < high:
        raise FairlineError(f"[{low:g}, {high:g}] is no interval.")
    slopes, offsets = np.ones((1, 1)), np.zeros((1, 1))
    breaks = np.empty(0)
    for name, layer in network.named_children():
        if isinstance(layer, nn.Linear):
            if layer.in_features != slopes.shape[1]:
                raise FairlineError(
                    f"Layer '{name}' takes {layer.in_features} numbers but gets {slopes.shape[1]}; linear pieces are "
                    "counted for networks of one input."
                )
            weight = layer.weight.detach().double().cpu().numpy()
            slopes, offsets = slopes @ weight.T, offsets @ weight.T
            if layer.bias is not None:
                offsets = offsets + layer.bias.detach().double().cpu().numpy()
        elif isinstance(layer, nn.ReLU | MaskedReLU):
            kept = np.ones(slopes.shape[1], dtype=bool)
            if isinstance(layer, MaskedReLU):
                if layer.weight is not None:
                    raise FairlineError(f"The mask of layer '{name}' is still being learned; fix it (keep_largest).")
                if layer.signs is not None:
                    raise FairlineError(f"Units of layer '{name}' share signs; linear pieces are counted without that.")
                kept = layer.kept.cpu().numpy().reshape(-1)
            breaks, slopes, offsets = _through_relu(breaks, slopes, offsets, kept, low, high)
        elif not isinstance(layer, nn.Identity):
            raise FairlineError(
                f"Layer '{name}' is a {type(layer).__name__}; linear pieces are counted through Linear, ReLU and "
                "masked ReLU alone."
            )
    return _merged(breaks, slopes, offsets)


def _through_relu(
    breaks: Floats, slopes: Floats, offsets: Floats, kept: NDArray[np.bool_], low: float, high: float
) -> tuple[Floats, Floats, Floats]:
    ends = np.concatenate([[low], breaks, [high]])
    found, new_slopes, new_offsets = [], [], []
    for piece, (left, right) in enumerate(itertools.pairwise(ends)):
        slope, offset = slopes[piece], offsets[piece]
        with np.errstate(divide="ignore", invalid="ignore"):
            roots = np.where(kept & (slope != 0), -offset / slope, np.nan)
        # A root at an end, up to rounding, cuts nothing off.
        near = 1e-12 * np.maximum(1, np.abs(roots))
        inner = np.unique(roots[(roots - left > near) & (right - roots > near)])
        cuts = np.concatenate([[left], inner, [right]])
        for a, b in itertools.pairwise(cuts):
            on = ~kept | (slope * _between(a, b) + offset > 0)
            new_slopes.append(np.where(on, slope, 0))
            new_offsets.append(np.where(on, offset, 0))
        found += [*inner, right]
    return np.array(found[:-1]), np.array(new_slopes), np.array(new_offsets)


def _between(left: float, right: float) -> float:
    """A point inside an interval that may be unbounded."""
    if math.isinf(left) and math.isinf(right):
        return 0.0
    if math.isinf(left):
        return right - 1 - abs(right)
    if math.isinf(right):
        return left + 1 + abs(left)
    return (left + right) / 2


def _merged(breaks: Floats, slopes: Floats, offsets: Floats) -> Pieces:
    """Neighbours whose slopes agree up to rounding are one piece."""
    keep = [0]
    for piece in range(1, len(slopes)):
        scale = max(np.abs(slopes[piece]).max(), np.abs(slopes[keep[-1]]).max())
        if np.abs(slopes[piece] - slopes[keep[-1]]).max() > 1e-9 * scale:
            keep.append(piece)
    return Pieces(breaks[[piece - 1 for piece in keep[1:]]], slopes[keep], offsets[keep])


def figure_10_network() -> nn.Sequential:
    """Two hidden ReLUs, three linear pieces (paper, Figure 10a); masking one of them leaves two (10b)."""
    import torch

    hidden, out = nn.Linear(1, 2), nn.Linear(2, 1)
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        hidden.bias.copy_(torch.tensor([-0.5, -0.5]))
        out.weight.copy_(torch.tensor([[1.0, 0.6]]))
        out.bias.zero_()
    return nn.Sequential(hidden, nn.ReLU(), out)
