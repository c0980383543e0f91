"""Selective last-layer finetuning: on the points where two networks disagree (SELF; LaBonte et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fairline._registry import is_whole
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.objectives.anchored import Weigh, class_balanced, refit
from fairline.objectives.choice import Strength, strengths_of

#: Numbers of points that are tried.
POINTS = (20, 100, 500)


def finetune_last_layer(
    model: nn.Module,
    held_out: GroupedData,
    *,
    reference: nn.Module | None = None,
    points: int | Sequence[int] | None = None,
    ridge: float = 0.01,
    within: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Finetune the last layer on the held-out points that the network is wrong about, or two disagree on.

    The points are those with the largest ``KL(reference ‖ network)`` of their outputs, or, without a reference, the
    largest cross-entropy; classes weigh alike among them. Groups that a network has not learned are found there far
    above their share, and none is named. So in the code published with the paper (read for this), where the other
    network is the same one before its training ended. A linearized network has a natural other one, the network
    before. They finetune by some steps of SGD from the present weights; the ridge to these stands for it here, as in
    :func:`~fairline.objectives.afr.reweight_last_layer`, so that no learning rate decides.

    Args:
        model: Any network whose output is that of its last ``nn.Linear``; changed in place.
        held_out: Data that the weights were not trained on; the validation part.
        reference: The other network.
        points: How many, or all where there are fewer. Of several, as by default, chosen on halves by the worst group's
            accuracy, as they do: groups serve this choice only, and where there is one group the worst class's does.
        ridge: λ.
        within: Choose only among numbers that cost no more overall accuracy, in percentage points.
        seed: Of the halves.

    Returns:
        ``strength``, the number of points, None if none was within; ``worst_group_accuracy`` and ``accuracy`` of each.

    Raises:
        FairlineError: There is no last linear layer, a group cannot be halved, the networks have unlike outputs, or a
            setting is out of range.
    """
    numbers = points_of(points)
    labels = held_out.labels.cpu()
    other = None if reference is None else predict(reference, held_out).double().cpu().log_softmax(1)

    def prepared(logits: Tensor) -> Weigh:
        if other is None:
            scores = cross_entropy(logits, labels, reduction="none")
        elif other.shape != logits.shape:
            raise FairlineError(
                f"The networks have {logits.shape[1]} and {other.shape[1]} outputs; SELF compares them."
            )
        else:
            scores = (other.exp() * (other - logits.log_softmax(1))).sum(1)

        def weigh(strength: float, rows: Tensor) -> Tensor:
            chosen = scores[rows].topk(min(int(strength), len(rows))).indices
            weights = torch.zeros(len(rows), dtype=torch.float64)
            weights[chosen] = class_balanced(labels[rows][chosen])
            return weights

        return weigh

    return refit(model, held_out, prepared, numbers, ridge, within, seed)


def points_of(points: Strength) -> tuple[float, ...]:
    """The numbers of points to choose from.

    Args:
        points: One, several, or None for the default.

    Returns:
        One or more.

    Raises:
        FairlineError: They are no different whole numbers from 1 on.
    """
    found = strengths_of(points, POINTS, "SELF's number of points")
    for each in found:
        if not is_whole(each):
            raise FairlineError(f"SELF takes a number of points, not {each}.")
        if each < 1:
            raise FairlineError(f"SELF needs one point at least, not {each}.")
    return found
