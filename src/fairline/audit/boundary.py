"""Distance to the decision boundary of each sample and group, three ways (paper, Section 5.2, Figures 8 and 14)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairline.audit.base import Row, Subject
from fairline.audit.functional import Functional
from fairline.audit.intervals import mean_interval
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError

Floats = NDArray[np.float64]


def softmax_margins(logits: Tensor) -> Tensor:
    """p₁ − p₂ of each sample: the lead of the predicted class, be it right or wrong.

    Args:
        logits: (N, K), K ≥ 2.

    Returns:
        float64, (N,), in [0, 1].

    >>> softmax_margins(torch.tensor([[0.7, 0.2, 0.1]]).log())
    tensor([0.5000], dtype=torch.float64)
    """
    top = logits.double().softmax(1).topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def proximities(logits: Tensor) -> Tensor:
    """h(1 − h) of each sample for a binary classifier, ¼ on the boundary (paper, Proposition 4.5).

    Args:
        logits: (N, 2); h is the softmax probability of class 1.

    Returns:
        float64, (N,), in [0, ¼].

    >>> proximities(torch.tensor([[0.0, 0.0], [0.9, 0.1]]).log1p())
    tensor([0.2500, 0.2322], dtype=torch.float64)
    """
    h = torch.sigmoid(logits[:, 1].double() - logits[:, 0].double())
    return h * (1 - h)


class _Differences:
    """z_c − z_k and its gradient for every other class k, c being the class that each sample starts in."""

    def __init__(self, functional: Functional) -> None:
        self.functional = functional
        # A step of 1 in intensity is a step of 1/std in what the network sees.
        _, std = functional.data.normalization()
        self.std = torch.tensor(std, device=functional.device, dtype=functional.dtype).view(1, -1, 1, 1)

    def logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.functional.logits(self.functional.parameters, images)

    def __call__(self, images: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Differences (K − 1, B) and gradients for intensities (K − 1, B, C, H, W), by K − 1 backward passes."""
        parameters = {name: parameter.detach() for name, parameter in self.functional.parameters.items()}
        images = images.detach().requires_grad_()
        logits = self.functional.logits(parameters, images)
        classes = logits.shape[1]
        values, gradients = [], []
        for offset in range(1, classes):
            other = (start + offset) % classes
            difference = logits.gather(1, start[:, None]) - logits.gather(1, other[:, None])
            (gradient,) = torch.autograd.grad(difference.sum(), images, retain_graph=offset < classes - 1)
            values.append(difference[:, 0].detach())
            gradients.append(gradient / self.std)
        return torch.stack(values), torch.stack(gradients)


def _nearest(values: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (B,) to the nearest of the linearised boundaries, and the step there (B, C, H, W)."""
    norms = gradients.flatten(2).norm(dim=2)
    distances = torch.where(norms > 0, values / norms, torch.inf)
    distance, chosen = distances.min(0)
    rows = torch.arange(len(distance), device=distance.device)
    # Against the gradient of the difference, so that it shrinks to zero; no step where every gradient is zero.
    length = torch.where(
        distance.isfinite(), distance / norms[chosen, rows].clamp_min(torch.finfo(norms.dtype).tiny), 0
    )
    return distance, -length.view(-1, 1, 1, 1) * gradients[chosen, rows]


def first_order_distances(functional: Functional) -> Tensor:
    """Smallest over k of (z_c − z_k)/‖∇ₓ(z_c − z_k)‖ for the predicted class c, (N,).

    Exact for a linear classifier; elsewhere what the slope at the sample promises. Costs K − 1 backward passes.

    Args:
        functional: The network on its data, K ≥ 2 outputs.

    Returns:
        Euclidean distances over all pixels and channels, intensities in [0, 1]; ∞ where no class has a gradient.
    """
    differences = _Differences(functional)
    found = []
    everything = torch.arange(len(functional.data))
    for images, _ in functional.batches(functional.own(everything)):
        start = differences.logits(images).argmax(1)
        found.append(_nearest(*differences(images, start))[0])
    return functional.gather(torch.cat(found), everything)


@dataclass(frozen=True)
class Minimal:
    """What DeepFool found.

    Attributes:
        distance: (N,): length of the perturbation that reaches the boundary; ∞ where none was found.
        first_order: (N,): the first step's promise, equal to :func:`first_order_distances`.
        steps: (N,), int64: linearisations taken.
    """

    distance: Tensor
    first_order: Tensor
    steps: Tensor


def deepfool(
    functional: Functional, index: Tensor | None = None, *, max_steps: int = 50, overshoot: float = 0.02
) -> Minimal:
    """Minimal L2 perturbations by DeepFool (Moosavi-Dezfooli et al. 2016, Algorithm 2), batched.

    Linearises all class boundaries, steps to the nearest, and repeats until the class changes. The published
    algorithm then returns its last point, which lies behind the boundary; here the crossing is located on the line
    from the sample to that point, so the overshoot does not enter the distance. Intensities are not
    clipped to [0, 1]. The result bounds the true minimal distance from above.

    Args:
        functional: The network on its data, K ≥ 2 outputs.
        index: Sample positions; all by default.
        max_steps: Linearisations at most.
        overshoot: How far beyond the linearised boundary to look for another class.

    Returns:
        Euclidean distances over all pixels and channels, intensities in [0, 1].
    """
    differences = _Differences(functional)
    index = torch.arange(len(functional.data)) if index is None else index
    parts = [_deepfool(differences, images, max_steps, overshoot) for images, _ in functional.batches(index)]
    return Minimal(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _deepfool(
    differences: _Differences, images: Tensor, max_steps: int, overshoot: float
) -> tuple[Tensor, Tensor, Tensor]:
    start = differences.logits(images).argmax(1)
    total = torch.zeros_like(images)
    first_order = torch.full((len(images),), torch.inf, device=images.device, dtype=images.dtype)
    steps = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    crossed = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    active = torch.arange(len(images), device=images.device)
    for step in range(max_steps):
        reach = images[active] + (1 + overshoot) * total[active] / differences.std if step else images[active]
        distance, move = _nearest(*differences(reach, start[active]))
        if step == 0:
            first_order = distance.clone()
        total[active] += move
        steps[active] += 1
        reach = images[active] + (1 + overshoot) * total[active] / differences.std
        flipped = differences.logits(reach).argmax(1) != start[active]
        crossed[active] = flipped
        # Without a gradient, or with a step too small to move a float, there is nowhere left to go.
        active = active[~flipped & distance.isfinite() & (move.flatten(1).norm(dim=1) > 0)]
        if len(active) == 0:
            break
    length = total.flatten(1).norm(dim=1)
    result = torch.full_like(first_order, torch.inf)
    at = torch.nonzero(crossed).flatten()
    if len(at):
        result[at] = length[at] * _crossing(differences, images[at], total[at], start[at], 1 + overshoot)
    # A sample on the boundary is at distance 0 though no step moves it.
    result[first_order == 0] = 0
    return result, first_order, steps


def _crossing(differences: _Differences, images: Tensor, total: Tensor, start: Tensor, end: float) -> Tensor:
    """Where images + t·total leave their class, t in [0, end], (B,): false position, halving what stays (Illinois)."""

    def lead(t: Tensor, at: Tensor) -> Tensor:
        logits = differences.logits(images[at] + t.view(-1, 1, 1, 1) * total[at] / differences.std)
        own = logits.gather(1, start[at, None])[:, 0]
        return own - logits.scatter(1, start[at, None], -torch.inf).amax(1)

    open_ = torch.arange(len(images), device=images.device)
    low, high = torch.zeros_like(images[:, 0, 0, 0]), torch.full_like(images[:, 0, 0, 0], end)
    at_low, at_high = lead(low, open_), lead(high, open_)
    close = 4 * torch.finfo(images.dtype).eps * at_low
    result, side = high.clone(), torch.zeros_like(high)
    for _ in range(40):
        spread = at_low - at_high
        guess = torch.where(spread > 0, (high * at_low - low * at_high) / spread, (low + high) / 2)
        value = lead(guess, open_)
        result[open_] = guess
        inside = value > 0
        # The end that stays a second time is weighed half, or it would never move.
        at_high = torch.where(inside, torch.where(side > 0, at_high / 2, at_high), value)
        at_low = torch.where(inside, value, torch.where(side < 0, at_low / 2, at_low))
        low, high = torch.where(inside, guess, low), torch.where(inside, high, guess)
        side = torch.where(inside, 1.0, -1.0)
        left = (value.abs() > close) & (high - low > 1e-5 * high)
        if not left.any():
            break
        open_, low, high, at_low, at_high, side, close = (
            column[left] for column in (open_, low, high, at_low, at_high, side, close)
        )
    return result


def margin(subject: Subject) -> list[Row]:
    """Rows for the softmax margin p₁ − p₂, unitless, in [0, 1].

    Measures: ``margin``, with ``margin_correct`` and ``margin_wrong`` over the samples that the model gets right and
    wrong; ``margin_normalized``, the group's mean as a share of the largest group mean (Figure 14 says
    "normalized" and not how; this is our reading). For a model of two outputs also ``proximity``, h(1 − h).
    Each sample's value becomes a column of that name.

    Args:
        subject: The model.

    Returns:
        The rows.
    """
    logits = _two_or_more(subject)
    values = softmax_margins(logits).numpy()
    rows = _rows(subject, "margin", values, most=1)
    means = {row.group: row.value for row in rows if row.measure == "margin"}
    largest = max(value for group, value in means.items() if group != OVERALL)
    sizes = {row.group: row.n for row in rows if row.measure == "margin"}
    rows += [
        Row(group, "margin_normalized", value / largest if largest > 0 else math.nan, n=sizes[group])
        for group, value in means.items()
    ]
    if logits.shape[1] == 2:
        rows += _rows(subject, "proximity", proximities(logits).numpy(), most=0.25)
    return rows


def first_order(subject: Subject) -> list[Row]:
    """Rows ``first_order_distance``, ``…_correct`` and ``…_wrong``; see :func:`first_order_distances`.

    Intensities in [0, 1]. Each sample's value becomes a column of that name.

    Args:
        subject: The model.

    Returns:
        The rows.
    """
    _two_or_more(subject)
    values = subject.once("first order", lambda: first_order_distances(subject.functional).double().cpu().numpy())
    return _rows(subject, "first_order_distance", values)


def minimal(subject: Subject, *, max_steps: int = 50, overshoot: float = 0.02) -> list[Row]:
    """Rows ``boundary_distance``, ``boundary_distance_correct`` and ``…_wrong``: minimal L2; see :func:`deepfool`.

    Means are over the samples for which a boundary was found; where it was not for some,
    ``boundary_distance_missed`` counts them. Each sample's value becomes a column of that name.

    Args:
        subject: The model.
        max_steps: Linearisations at most.
        overshoot: How far beyond the linearised boundary to look for another class.

    Returns:
        The rows.

    Raises:
        FairlineError: There is no step, the overshoot is not positive, or the model has one output.
    """
    if max_steps < 1 or overshoot <= 0:
        raise FairlineError(
            f"DeepFool needs a step and a positive overshoot, not {max_steps} steps and overshoot {overshoot:g}."
        )
    _two_or_more(subject)
    functional, found = subject.functional, []
    everything = torch.arange(len(subject.data))
    chunks = functional.own(everything).split(functional.batch_size)
    for position, chunk in enumerate(chunks, start=1):
        found.append(deepfool(functional, chunk, max_steps=max_steps, overshoot=overshoot))
        subject.report("distance to the boundary", position, len(chunks))
    distance, promise = (
        functional.gather(torch.cat(own), everything).double().cpu().numpy()
        for own in zip(*((part.distance, part.first_order) for part in found), strict=True)
    )
    subject.once("first order", lambda: promise)
    return _rows(subject, "boundary_distance", distance)


def _two_or_more(subject: Subject) -> Tensor:
    logits = subject.predictions.logits
    if logits.shape[1] < 2:
        raise FairlineError(f"{subject.name} has one output; a decision boundary needs two.")
    return logits


def _rows(subject: Subject, measure: str, values: Floats, most: float = math.inf) -> list[Row]:
    """Mean of a per-sample number in [0, most] for each group and overall, correct and wrong apart, with limits."""
    subject.samples[measure] = values
    correct = subject.predictions.correct
    rows = []
    everything = np.arange(len(values))
    for name, index in [*subject.group_index(), (OVERALL, everything)]:
        found = np.isfinite(values[index])
        right = correct[index]
        for suffix, chosen in (("", found), ("_correct", found & right), ("_wrong", found & ~right)):
            own = values[index[chosen]]
            if len(own) == 0:
                rows.append(Row(name, measure + suffix, math.nan, n=0))
                continue
            rows.append(Row(name, measure + suffix, float(own.mean()), *mean_interval(own, 0, most), n=len(own)))
        if not found.all():
            rows.append(Row(name, f"{measure}_missed", int((~found).sum()), n=len(index)))
    return rows
