"""The null front: what moving the output biases reaches for nothing, in (overall accuracy, worst-group accuracy).

A network with logits z, and classes with shares π of the training images. Shifted by τ it answers

    argmax_c  z_c − τ log π_c,

which is :func:`fairline.adjust` (Menon et al. 2021, Equation 9): no training, and no cost in a private inference. Its
accuracies a(τ), overall, and w(τ), of the worst group, are a curve. **An image is right exactly for the τ between two
numbers**: it must beat each other class c, z_y − z_c > τ (log π_y − log π_c), which is linear in τ. So one forward pass
gives the curve at every τ, and these two numbers of each image are all that is kept (:func:`right_between`).

The *front* of a network is the best worst-group accuracy at an overall accuracy of at least x, over the strengths
:data:`~fairline.objectives.post_hoc.TAUS` **and what coins between them reach**:

    F(x) = max_p  Σ_τ p_τ w(τ)    so that  Σ_τ p_τ a(τ) ≥ x,   p_τ ≥ 0,  Σ_τ p_τ = 1.

Which is the upper concave hull of the points, flat to the left of the highest. Why with coins: drawing τ anew for each
image costs nothing either, its accuracies are the weighted means, and its worst group is never below that mean; so the
hull is reached. A front of the single strengths alone would be a staircase, and a method just right of a step would be
praised for the grid. τ is chosen here in hindsight, on the images that are measured, which is in the null's favour:
what lies above F lies above any choice of τ.

Right of the highest overall accuracy of all, max_τ a(τ), no shift reaches and F is not defined. There F(x) is taken to
be the worst-group accuracy at that end. It is what F would be at most, since F falls, so a distance above it is at
least that large; such a method lies *past* the front's end.

Source: none; a bias shift as the line that a repair must beat is ours, as is this front.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairline.audit.intervals import Floats
from fairline.data.grouped import OVERALL, WORST
from fairline.errors import FairlineError
from fairline.objectives.post_hoc import TAUS, best_strength


def right_between(logits: Tensor, labels: Tensor, shares: Tensor) -> tuple[Floats, Floats]:
    """The strengths τ at which each image is right.

    Args:
        logits: z, (n, K) or more; outputs beyond the K classes are not shifted.
        labels: y, (n,).
        shares: π > 0, (K,).

    Returns:
        The lowest and the highest τ at which each image is right, float64, (n,) each; where the first is above the
        second it is right at none.

    Raises:
        FairlineError: A class has no share.

    >>> low, high = right_between(torch.tensor([[2.0, 0.0]] * 2), torch.tensor([0, 1]), torch.tensor([0.75, 0.25]))
    >>> [f"{low[0]:.2f} to {high[0]:.2f}", f"{low[1]:.2f} to {high[1]:.2f}"]  # 2 / log 3 = 1.82
    ['-inf to 1.82', '1.82 to inf']
    """
    if not bool((shares > 0).all()):
        empty = int(torch.nonzero(shares <= 0)[0])
        raise FairlineError(f"Class {empty} has no training image, so its bias cannot be shifted by its share.")
    found = logits.detach().double().cpu().numpy()
    own = labels.cpu().numpy()
    logs = np.zeros(found.shape[1])
    logs[: len(shares)] = np.log(shares.double().cpu().numpy())
    rows, classes = np.arange(len(own)), np.arange(found.shape[1])
    ahead = found[rows, own][:, None] - found
    rarer = logs[own][:, None] - logs
    # Of equal logits argmax takes the first, so a class before the own one must be beaten.
    strict = classes < own[:, None]
    others = classes != own[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = ahead / rarer
    highest = np.where(others & (rarer > 0), np.where(strict, np.nextafter(at, -np.inf), at), np.inf).min(1)
    lowest = np.where(others & (rarer < 0), np.where(strict, np.nextafter(at, np.inf), at), -np.inf).max(1)
    beaten = np.where(others & (rarer == 0), (ahead > 0) | (~strict & (ahead == 0)), True).all(1)
    return np.where(beaten, lowest, np.inf), np.where(beaten, highest, -np.inf)


def right_at(between: tuple[Floats, Floats], tau: float) -> NDArray[np.bool_]:
    """Which images are right when biases are shifted by τ, (n,)."""
    lowest, highest = between
    return np.asarray((lowest <= tau) & (tau <= highest))


def shifted(between: tuple[Floats, Floats], groups: NDArray[np.str_]) -> pd.DataFrame:
    """A network's accuracies at each of the strengths.

    Args:
        between: From :func:`right_between`.
        groups: Name of each image's group, (n,).

    Returns:
        Tidy: ``tau``, ``group`` (each, ``overall`` and ``worst group``), ``accuracy``, ``n``.
    """
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    tables = []
    for tau in TAUS:
        right = right_at(between, tau)
        each = np.bincount(index, right, len(names)) / sizes
        rows = {"group": [*names, OVERALL, WORST], "accuracy": [*each, right.mean(), each.min()]}
        tables.append(pd.DataFrame({"tau": tau, **rows, "n": [*map(float, sizes), float(len(right)), np.nan]}))
    return pd.concat(tables, ignore_index=True)


def chosen_tau(table: pd.DataFrame, within: float = 1.0) -> float:
    """The strength that :func:`fairline.adjust` would choose on these images.

    Args:
        table: From :func:`shifted`.
        within: Overall accuracy that may go, in percentage points.

    Returns:
        τ.
    """
    wide = table.pivot_table(index="tau", columns="group", values="accuracy")
    tried = [
        {"tau": float(tau), "accuracy": overall, "worst_group_accuracy": worst}
        for tau, overall, worst in zip(wide.index, wide[OVERALL], wide[WORST], strict=True)
    ]
    return best_strength(tried, within)


def front(x: Floats, overall: Floats, worst: Floats) -> Floats:
    """F(x): what the strengths reach, with coins, at an overall accuracy of x.

    Two strengths are enough, as the programme has two constraints: one that is at least as accurate as x, and one that
    is less.

    Args:
        x: Overall accuracies, (B,).
        overall: a of each of T strengths, (T, B).
        worst: w of each, (T, B).

    Returns:
        F(x), (B,); right of all the points, w at the last of them.

    >>> overall, worst = np.array([[0.80], [0.70]]), np.array([[0.20], [0.40]])
    >>> [round(float(front(np.array([x]), overall, worst)[0]), 2) for x in (0.60, 0.75, 0.80, 0.90)]
    [0.4, 0.3, 0.2, 0.2]
    """
    x = np.minimum(x, overall.max(0))
    enough = overall >= x
    reached = np.where(enough, worst, -np.inf).max(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        for one in range(len(overall)):
            share = (overall[one] - x) / (overall[one] - overall)
            mixed = np.where(enough[one] & ~enough, worst[one] + share * (worst - worst[one]), -np.inf)
            reached = np.maximum(reached, mixed.max(0))
    return reached


def area_between(overall: Floats, worst: Floats, null_overall: Floats, null_worst: Floats) -> tuple[Floats, Floats]:
    """The area between a method's own front, over its strengths, and the null's, and how wide it is.

    Coins are free for the method as well, so its front is made as the null's is. Both are straight between points, so
    the area is exact.

    Args:
        overall: The method's overall accuracies, (S, B).
        worst: Its worst-group accuracies, (S, B).
        null_overall: The null's, (T, B).
        null_worst: The null's, (T, B).

    Returns:
        ∫ (F_method − F) dx over the overall accuracies that both have, and the length of that range, (B,) each; NaN
        where there is none.

    >>> both = np.array([[0.80], [0.70]])
    >>> area, width = area_between(both, np.array([[0.30], [0.50]]), both, np.array([[0.20], [0.40]]))
    >>> [round(float(area[0]), 3), round(float(width[0]), 3)]
    [0.01, 0.1]
    """
    low = np.maximum(overall.min(0), null_overall.min(0))
    high = np.minimum(overall.max(0), null_overall.max(0))
    width = np.where(high > low, high - low, np.nan)
    at = np.sort(np.clip(np.concatenate([overall, null_overall]), low, np.maximum(low, high)), axis=0)
    heights = np.stack([front(x, overall, worst) - front(x, null_overall, null_worst) for x in at])
    area = ((heights[1:] + heights[:-1]) / 2 * np.diff(at, axis=0)).sum(0)
    return np.where(np.isnan(width), np.nan, area), width


__all__ = ["area_between", "chosen_tau", "front", "right_at", "right_between", "shifted"]
