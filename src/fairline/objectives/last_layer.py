"""Deep feature reweighting: the last layer retrained on group-balanced held-out data (Kirichenko et al., ICLR 2023)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fairline._registry import is_whole
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.objectives.choice import Strength, is_within, require_rule, strengths_of

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

#: Inverse penalties C that are tried.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)


def retrain_last_layer(
    model: nn.Module,
    held_out: GroupedData,
    *,
    balance: str = "group",
    strengths: Sequence[float] = PENALTIES,
    repeats: int = 10,
    within: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Replace the last linear layer by a logistic regression on balanced held-out features.

    As published: features are standardised; the strength of the penalty is chosen by the worst group's accuracy on one
    half of the held-out data after a fit on the other; then the coefficients of ``repeats`` fits, each on another
    balanced subset of all of them, are averaged. They penalise L1; with the few held-out images of a small group L2
    is the stabler choice, and its optimum is unique. Everything before the layer stays, ReLUs and masks too.

    Args:
        model: Any network whose output is that of its last ``nn.Linear``; changed in place.
        held_out: Data that the weights were not trained on; the validation part.
        balance: As many images of each ``"group"``, ``"class"`` or, where they occur, ``"group_and_class"``. By class
            and on the training images it is cRT (Kang et al., *Decoupling representation and classifier*, ICLR 2020),
            as a regression in place of some epochs.
        strengths: Inverse penalties C to choose from.
        repeats: Balanced subsets to average over.
        within: Choose only among penalties that cost no more overall accuracy on the second half, in percentage points
            against the network as it is; where none is left it stays as it is. As published there is no such limit.
        seed: Of halves and subsets.

    Returns:
        ``strength`` that was chosen, None if none was within; ``per_cell`` images in a balanced subset; and
        ``worst_group_accuracy`` and ``accuracy`` on the second half, for each strength.

    Raises:
        FairlineError: There is no last linear layer, a group has one held-out image, or a setting is out of range.
    """
    penalties = penalties_of(strengths)
    _require_possible(held_out, balance, repeats, within)
    layer, features, logits = output_layer(model, held_out)
    labels, groups = held_out.labels.cpu().numpy(), held_out.groups.cpu().numpy()
    cells = {"group": groups, "class": labels}.get(balance, groups * held_out.num_classes + labels)
    rng = np.random.default_rng(seed)
    halves = Halves(half_of_each_group(groups, rng), groups)
    right = {}
    for strength in sorted(penalties):
        chosen = _balanced(cells, halves.first, rng=np.random.default_rng(seed))
        weight, bias = _mean_of([_fit(features, labels, chosen, strength, held_out.num_classes)], features)
        right[float(strength)] = (features @ weight.T + bias).argmax(1) == labels
    # Of equals the stronger penalty.
    found = halves.chosen(right, within, logits.argmax(1).cpu().numpy() == labels)
    found["per_cell"] = int(np.unique(cells, return_counts=True)[1].min())
    logger.info("last layer: %s", found)
    if (penalty := found["strength"]) is None:
        return found

    everything = np.ones_like(halves.first)
    subsets = (_balanced(cells, everything, rng) for _ in range(int(repeats)))
    fits = [_fit(features, labels, subset, penalty, held_out.num_classes) for subset in subsets]
    _replace(layer, *_mean_of(fits, features))
    return found


def _mean_of(fits: Sequence[tuple[Floats, Floats]], features: Floats) -> tuple[Floats, Floats]:
    """Mean weights and biases of fits; of each class, of those that held it. A class that none held is not chosen."""
    weights, biases = (np.stack(parts) for parts in zip(*fits, strict=True))
    held = np.isfinite(biases)
    count = np.maximum(held.sum(0), 1)
    weight = np.where(held[..., None], weights, 0).sum(0) / count[:, None]
    bias = np.where(held, biases, 0).sum(0) / count
    ever = held.any(0)
    bias[~ever] = (features @ weight[ever].T + bias[ever]).min() - 1e2
    return weight, bias


@dataclass(frozen=True)
class Halves:
    """Held-out samples, one half of each cell to fit on and the other to choose on.

    Attributes:
        first: Which are in the first half, (n,).
        cells: Group, or class, of each, (n,).
    """

    first: NDArray[np.bool_]
    cells: NDArray[np.int64]

    def judged(self, right: NDArray[np.bool_]) -> tuple[float, float]:
        """Of what is right, (n,), the worst cell's share and that of all, on the second half."""
        parts = [right[~self.first & (self.cells == cell)] for cell in np.unique(self.cells)]
        return min(float(part.mean()) for part in parts if len(part)), float(right[~self.first].mean())

    def chosen(
        self, right: Mapping[float, NDArray[np.bool_]], within: float | None, before: NDArray[np.bool_]
    ) -> dict[str, Any]:
        """The strength whose worst cell is best, of equals the first.

        Args:
            right: What is right under each strength, (n,).
            within: Points of overall accuracy that it may cost; None for any.
            before: What is right in the network as it is, (n,).

        Returns:
            ``strength``, None where none is within, and ``worst_group_accuracy`` and ``accuracy`` of each.
        """
        worst, overall = ({each: self.judged(own)[which] for each, own in right.items()} for which in (0, 1))
        limit = self.judged(before)[1]
        allowed = [each for each in worst if within is None or is_within(overall[each], within, limit)]
        best = max(allowed, key=lambda each: worst[each], default=None)
        return {"strength": best, "worst_group_accuracy": worst, "accuracy": overall}


def penalties_of(strength: Strength) -> tuple[float, ...]:
    """The inverse penalties C to choose from.

    Args:
        strength: One, several, or None for the default.

    Returns:
        One or more.

    Raises:
        FairlineError: They are no different, finite numbers above 0.
    """
    found = strengths_of(strength, PENALTIES, "The strength of a retrained last layer")
    if min(found) <= 0:
        raise FairlineError(f"The strength of a retrained last layer is above 0, not {min(found):g}.")
    return found


def _require_possible(held_out: GroupedData, balance: str, repeats: int, within: float | None) -> None:
    """Refuse settings out of range, and groups that cannot be halved."""
    if balance not in ("group", "class", "group_and_class"):
        raise FairlineError(f"Held-out data are balanced by group, class or group_and_class, not '{balance}'.")
    if not (is_whole(repeats) and repeats >= 1):
        raise FairlineError(f"Retraining averages over one subset at least, a whole number: repeats={repeats}.")
    require_rule("worst_group", within or 0.0)
    require_halves(held_out)


def require_halves(held_out: GroupedData) -> None:
    """Refuse groups that cannot be halved.

    Raises:
        FairlineError: A group has fewer than two held-out images.
    """
    held_out.require_groups("retraining the last layer")
    for name, n in held_out.counts()["n"].items():
        if n < 2:
            raise FairlineError(f"{held_out.name}: group “{name}” has one held-out image; two halves need two.")


def half_of_each_group(groups: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which samples are in the first half, (n,); each group is halved, the first half taking the odd one."""
    half = np.zeros(len(groups), bool)
    for group in range(groups.max() + 1):
        members = rng.permutation(np.flatnonzero(groups == group))
        half[members[: (len(members) + 1) // 2]] = True
    return half


def _replace(layer: nn.Linear, weight: Floats, bias: Floats) -> None:
    """Write weights (K, F) and biases (K,); outputs for classes that the data do not have are never chosen."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[: len(weight)] = torch.from_numpy(weight).to(layer.weight)
        layer.bias.fill_(float(bias.min()) - 1e4)
        layer.bias[: len(bias)] = torch.from_numpy(bias).to(layer.bias)


def output_layer(model: nn.Module, data: GroupedData) -> tuple[nn.Linear, Floats, Tensor]:
    """The last linear layer, what goes into it, and the logits that come out.

    Args:
        model: Any network whose output is that of its last ``nn.Linear``.
        data: The samples.

    Returns:
        The layer, its inputs, float64, (N, F), and outputs, (N, K).

    Raises:
        FairlineError: There is none, or the network does something with its output.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise FairlineError(f"{type(model).__name__} has no nn.Linear to retrain.")
    layer = linear[-1]
    if layer.bias is None:
        raise FairlineError(f"The last nn.Linear of {type(model).__name__} has no bias to retrain.")
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(arguments[0].detach().clone())
        outputs.append(output.detach().float().clone())

    handle = layer.register_forward_hook(keep)
    try:
        logits = predict(model, data)
    finally:
        handle.remove()
    if not torch.equal(torch.cat(outputs), logits):
        raise FairlineError(
            f"The last nn.Linear of {type(model).__name__} is not its output layer, so it cannot be retrained alone."
        )
    return layer, torch.cat(inputs).double().cpu().numpy(), logits


def _balanced(cells: NDArray[np.int64], among: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Equally many samples of every cell, drawn without replacement."""
    members = [np.flatnonzero((cells == cell) & among) for cell in np.unique(cells)]
    size = min(len(m) for m in members if len(m))
    return np.concatenate([rng.choice(m, size, replace=False) for m in members if len(m)])


def _fit(
    features: Floats, labels: NDArray[np.int64], chosen: NDArray[np.int64], strength: float, num_classes: int
) -> tuple[Floats, Floats]:
    """Logistic regression on standardised features: weights (K, F), biases (K,), NaN of a class that is not held."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels[chosen])) < 2:
        raise FairlineError("The balanced held-out images are all of one class; the last layer cannot be retrained.")
    scaler = StandardScaler().fit(features[chosen])
    model = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(features[chosen]), labels[chosen])
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight, bias = np.full((num_classes, features.shape[1]), np.nan), np.full(num_classes, np.nan)
    weight[model.classes_] = coefficients / scaler.scale_
    bias[model.classes_] = intercepts - (coefficients * scaler.mean_ / scaler.scale_).sum(1)
    return weight, bias
