"""Automatic feature reweighting: the last layer refitted where the network is unsure (AFR; Qiu et al., ICML 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.anchored import Weigh, class_balanced, refit
from fairline.objectives.choice import Strength, strengths_of

#: Values of γ that are tried.
GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0)


def reweight_last_layer(
    model: nn.Module,
    held_out: GroupedData,
    *,
    gamma: Strength = None,
    ridge: float = 0.01,
    within: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Refit the last layer on held-out samples, those on which the network errs weighted up; no group is named.

    ``min Σ μᵢ·CEᵢ + λ·‖θ − θ₀‖²`` with ``μᵢ ∝ exp(−γ·pᵢ)/n_y``, pᵢ the network's probability of the label and n_y the
    samples of its class, as in the code published with the paper (read for this). They take some steps of gradient
    descent; here the minimum is found, so that no learning rate decides.

    Args:
        model: Any network whose output is that of its last ``nn.Linear``; changed in place.
        held_out: Data that the weights were not trained on; the validation part. They take a fifth of the training set.
        gamma: γ ≥ 0; 0 weights by class alone. Of several, as by default, chosen on halves by the worst group's
            accuracy, as they do: groups serve this choice only, and where there is one group the worst class's does.
        ridge: λ.
        within: Choose only among strengths that cost no more overall accuracy on the other half, in percentage points;
            where none is left the network stays as it is. As published there is no such limit.
        seed: Of the halves.

    Returns:
        The ``strength`` γ, None if none was within, and ``worst_group_accuracy`` and ``accuracy`` on the second half
        for each γ that was tried.

    Raises:
        FairlineError: There is no last linear layer, a group cannot be halved, or a setting is out of range.
    """
    gammas = gammas_of(gamma)
    labels = held_out.labels.cpu()

    def prepared(logits: Tensor) -> Weigh:
        right = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
        return lambda strength, rows: torch.exp(-strength * right[rows]) * class_balanced(labels[rows])

    return refit(model, held_out, prepared, gammas, ridge, within, seed)


def gammas_of(gamma: Strength) -> tuple[float, ...]:
    """The values of γ to choose from.

    Args:
        gamma: One, several, or None for the default.

    Returns:
        One or more.

    Raises:
        FairlineError: They are no different, finite numbers, or one is negative.
    """
    found = strengths_of(gamma, GAMMAS, "AFR's γ")
    if min(found) < 0:
        raise FairlineError(f"AFR needs γ finite and not negative, not {min(found)}.")
    return found
