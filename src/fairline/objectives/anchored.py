"""The last layer refitted near to what it was, on weighted held-out data: what AFR and SELF have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fairline._registry import is_number
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.choice import require_rule
from fairline.objectives.last_layer import Halves, half_of_each_group, output_layer, require_halves

logger = logging.getLogger(__name__)

#: Of some held-out samples (their positions), under a strength, the weight of each.
Weigh = Callable[[float, Tensor], Tensor]


def anchored_fit(
    features: Tensor, labels: Tensor, weights: Tensor, weight: Tensor, bias: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """``min Σ μᵢ·CEᵢ + λ·(‖W − W₀‖² + ‖b − b₀‖²)``, whose minimum is unique.

    Args:
        features: float64, (N, F).
        labels: int64, (N,).
        weights: μ ≥ 0, with sum 1, (N,).
        weight: W₀, (K, F).
        bias: b₀, (K,).
        ridge: λ > 0.

    Returns:
        W and b.

    >>> features, labels = torch.eye(2).double(), torch.tensor([0, 1])
    >>> start = torch.zeros(2, 2).double(), torch.zeros(2).double()
    >>> w, b = anchored_fit(features, labels, torch.tensor([0.5, 0.5]).double(), *start, ridge=0.1)
    >>> (w.diagonal() > 0).tolist(), [round(abs(x), 6) for x in b.tolist()]
    ([True, True], [0.0, 0.0])
    """
    moved = [torch.zeros_like(start, requires_grad=True) for start in (weight, bias)]
    optimizer = torch.optim.LBFGS(
        moved, max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = cross_entropy(linear(features, weight + moved[0], bias + moved[1]), labels, reduction="none")
        value = (weights * losses).sum() + ridge * (moved[0].square().sum() + moved[1].square().sum())
        value.backward()
        return value

    optimizer.step(loss)
    return weight + moved[0].detach(), bias + moved[1].detach()


def refit(
    model: nn.Module,
    held_out: GroupedData,
    prepared: Callable[[Tensor], Weigh],
    strengths: Sequence[float],
    ridge: float,
    within: float | None,
    seed: int,
) -> dict[str, Any]:
    """Refit a network's last layer in place.

    Several strengths are chosen from on halves: after a fit on one, the worst group's accuracy on the other (the worst
    class's where there is one group), of equals the first. The fit that is kept is on all the data.

    Args:
        model: Any network whose output is that of its last ``nn.Linear``.
        held_out: Data that the weights were not trained on.
        prepared: From the network's logits, (N, K), how samples are weighted.
        strengths: What to choose from; one is not tried, and needs no groups.
        ridge: λ.
        within: Choose only among strengths that cost no more overall accuracy on the other half, in percentage points
            against the network as it is; where none is left it stays as it is. None for any.
        seed: Of the halves.

    Returns:
        ``strength``, None if none was within; ``worst_group_accuracy`` and ``accuracy`` of each that was tried.

    Raises:
        FairlineError: λ is out of range, there is no last linear layer, or a group cannot be halved.
    """
    if not (is_number(ridge) and ridge > 0):
        raise FairlineError(f"The ridge to the original weights must be positive and finite, not {ridge}.")
    require_rule("worst_group", within or 0.0)
    by_class = held_out.num_groups < 2
    if len(strengths) > 1 and not by_class:
        require_halves(held_out)
    layer, inputs, logits = output_layer(model, held_out)
    labels = held_out.labels.cpu()
    features, weigh = torch.from_numpy(inputs), prepared(logits.double().cpu())
    start = layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu()

    def fitted(strength: float, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights = weigh(strength, rows)
        return anchored_fit(features[rows], labels[rows], weights / weights.sum(), *start, ridge)

    found: dict[str, Any] = {"strength": strengths[0], "worst_group_accuracy": {}, "accuracy": {}}
    if len(strengths) > 1:
        cells = (labels if by_class else held_out.groups.cpu()).numpy()
        halves = Halves(half_of_each_group(cells, np.random.default_rng(seed)), cells)
        rows = torch.from_numpy(halves.first).nonzero().flatten()
        right = {float(s): (linear(features, *fitted(s, rows)).argmax(1) == labels).numpy() for s in strengths}
        found = halves.chosen(right, within, (logits.argmax(1).cpu() == labels).numpy())
    logger.info("last layer: %s", found)
    if found["strength"] is None:
        return found
    with torch.no_grad():
        last = fitted(found["strength"], torch.arange(len(labels)))
        for parameter, value in zip((layer.weight, layer.bias), last, strict=True):
            parameter.copy_(value.to(parameter))
    return found


def class_balanced(labels: Tensor) -> Tensor:
    """Weights under which every class has as much.

    Args:
        labels: int64, (N,).

    Returns:
        ``1/n_y``, n counted among these samples, float64, (N,).

    >>> class_balanced(torch.tensor([0, 0, 2]))
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    return 1 / torch.bincount(labels).double()[labels]
