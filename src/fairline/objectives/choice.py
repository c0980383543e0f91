"""One rule by which a strength is chosen on held-out images: an adjustment's, an objective's, whatever has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fairline._registry import is_number
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

Rule = Literal["worst_group", "largest_loss"]

#: One strength, several to choose from, or None for the default.
Strength = float | Sequence[float] | None


def strengths_of(given: Strength, default: Sequence[float], what: str) -> tuple[float, ...]:
    """The strengths to choose from; one is no choice.

    Args:
        given: One, several, or None for the default.
        default: Several.
        what: They are called, for the message.

    Returns:
        One or more.

    Raises:
        FairlineError: They are no finite numbers, or one is named twice.

    >>> strengths_of(None, (0.5, 1.0), "τ"), strengths_of(2.0, (0.5, 1.0), "τ"), strengths_of([1, 2], (0.5,), "τ")
    ((0.5, 1.0), (2.0,), (1, 2))
    """
    if given is None:
        return tuple(default)
    found: tuple[Any, ...] = (given,) if is_number(given) else ()
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        found = tuple(given)
    if not found or not all(map(is_number, found)) or len(set(found)) < len(found):
        told = found[0] if len(found) == 1 else given
        raise FairlineError(f"{what} is a finite number, or several different ones to choose from, not {told}.")
    # Fractions and numbers of arrays too.
    return tuple(each if isinstance(each, int) else float(each) for each in found)


def as_given(strength: Strength, what: str) -> float | list[float] | None:
    """A strength as a config holds it: a number, a list of several, or None.

    Args:
        strength: One, several, or None.
        what: They are called, for the message.

    Returns:
        The same; of a list of one, that one.

    Raises:
        FairlineError: As :func:`strengths_of`.
    """
    if strength is None:
        return None
    found = strengths_of(strength, (), what)
    return float(found[0]) if len(found) == 1 else list(map(float, found))


def chosen(tried: Sequence[Mapping[str, float]], rule: Rule, within: float, accuracy: float) -> int | None:
    """What a rule takes of all that was tried; of equals the first.

    Args:
        tried: ``accuracy`` and ``worst_group_accuracy`` in [0, 1] of each; under the rule ``"largest_loss"`` also
            ``largest_loss`` in points.
        rule: ``"worst_group"``: the highest worst-group accuracy among those whose accuracy is at most ``within``
            points below ``accuracy``. ``"largest_loss"``: where the group that loses most loses least.
        within: In percentage points.
        accuracy: Overall, of what has no strength.

    Returns:
        Its position; None where nothing is within.

    >>> tried = [{"accuracy": 0.80, "worst_group_accuracy": 0.3}, {"accuracy": 0.785, "worst_group_accuracy": 0.5}]
    >>> chosen(tried, "worst_group", 1.0, 0.80), chosen(tried, "worst_group", 2.0, 0.80)
    (0, 1)
    """
    places = range(len(tried))
    if rule == "largest_loss":
        return min(places, key=lambda place: tried[place]["largest_loss"])
    allowed = [place for place in places if is_within(tried[place]["accuracy"], within, accuracy)]
    return max(allowed, key=lambda place: tried[place]["worst_group_accuracy"], default=None)


def is_within(own: float, within: float, accuracy: float) -> bool:
    """Whether an accuracy is at most ``within`` points below another one; a point is no matter of the last bit."""
    return 100 * (accuracy - own) <= within + 1e-9


def require_rule(rule: str, within: float, what: str = "τ") -> None:
    """Refuse a rule that there is not, or a number out of range.

    Args:
        rule: Its name.
        within: In percentage points.
        what: Is chosen, for the message.

    Raises:
        FairlineError: There is no such rule, or the points are negative or not finite.
    """
    if rule not in get_args(Rule):
        raise FairlineError(f"{what} is chosen by {' or '.join(get_args(Rule))}, not '{rule}'.")
    if not (is_number(within) and within >= 0):
        raise FairlineError(f"The overall accuracy that may go is in percentage points, 0 or more, not {within}.")


def accuracies(logits: Tensor, data: GroupedData) -> tuple[float, list[float]]:
    """What is right of all images and of each group's, in [0, 1]; logits are (N, K), every group has an image."""
    right = (logits.argmax(1).cpu() == data.labels.cpu()).double()
    groups = data.groups.cpu()
    by_group: list[float] = (torch.bincount(groups, right) / torch.bincount(groups)).tolist()
    return float(right.mean()), by_group
