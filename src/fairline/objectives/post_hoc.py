"""Rebalancing classes after training, folded into the last linear layer: logits of rare classes are raised.

Three ways, each with a strength τ; τ = 0 leaves the network. With z the logits, w_c the last layer's weights of class c
and π its share of the training images:

- ``logit_adjust``: z_c − τ log π_c (Menon et al., *Long-tail learning via logit adjustment*, ICLR 2021, Equation 9).
- ``tau_norm``: z_c / ‖w_c‖^τ (Kang et al., *Decoupling representation and classifier*, ICLR 2020, Section 4.2). They
  drop the biases, which hardly matter to them; here these are scaled alike.
- ``weight_scale``: z_c · f_c^τ, the factors f learned on the training images, every class with as much weight (their
  LWS). They have no τ: it is 1; f is kept positive here.

As a scale and a shift of each class's row they change no shape, so a private inference costs what it did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.masking import copy_model
from fairline.objectives.choice import Rule, Strength, accuracies, as_given, chosen, require_rule, strengths_of
from fairline.objectives.last_layer import output_layer

logger = logging.getLogger(__name__)

Method = Literal["logit_adjust", "tau_norm", "weight_scale"]

#: Strengths that are tried.
TAUS = tuple(round(0.125 * step, 3) for step in range(25))

_Transform = Callable[[float], tuple[Tensor, Tensor]]


def adjust(
    model: nn.Module,
    train: GroupedData,
    val: GroupedData | None = None,
    *,
    method: Method = "logit_adjust",
    tau: Strength = None,
    reference: nn.Module | None = None,
    rule: Rule = "worst_group",
    within: float = 1.0,
) -> nn.Module:
    """Raise the logits of rare classes of a trained network.

    Args:
        model: Any network whose output is that of its last ``nn.Linear``.
        train: The training data: their class shares, and what ``weight_scale`` is fitted to.
        val: Data to choose τ on; without them, and without ``tau``, τ is 1.
        method: ``"logit_adjust"``, ``"tau_norm"`` or ``"weight_scale"``.
        tau: The strength, or several to choose from on ``val``, beside the network as it is; by default from 0 to 3 in
            eighths.
        reference: Network that losses are counted against, for the rule ``"largest_loss"``.
        rule: ``"worst_group"``: the highest worst-group accuracy on ``val`` among strengths whose overall accuracy is
            within ``within`` points of the network's own. ``"largest_loss"``: the strength at which the group that
            loses most against ``reference`` loses least.
        within: In percentage points.

    Returns:
        A new network.

    Raises:
        FairlineError: There is no last linear layer with a bias, a class has no training image, a group no validation
            image, a setting is out of range, or τ so large that the layer would overflow or vanish.

    >>> from fairline.models import build
    >>> labels = torch.tensor([0, 0, 0, 1])
    >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    >>> data = GroupedData(images, labels, labels, ("many", "few"), ("many", "few"))
    >>> network = build("cnn", num_classes=2, in_channels=1, image_size=8, width=2)
    >>> moved = predict(adjust(network, data, tau=1.0), data) - predict(network, data)
    >>> (moved[0] - moved[0, 0]).round(decimals=3)  # log 3, as the first class is three times as frequent
    tensor([0.0000, 1.0990])
    """
    changed = copy_model(model)
    adjust_in_place(changed, train, val, method=method, tau=tau, reference=reference, rule=rule, within=within)
    return changed


def adjust_in_place(
    model: nn.Module,
    train: GroupedData,
    val: GroupedData | None = None,
    *,
    method: Method = "logit_adjust",
    tau: Strength = None,
    reference: nn.Module | None = None,
    rule: Rule = "worst_group",
    within: float = 1.0,
) -> dict[str, Any]:
    """As :func:`adjust`, of the network itself.

    Returns:
        The ``tau``, and what was ``tried``: for each strength its ``tau``, ``accuracy``, ``worst_group_accuracy`` and,
        with a reference, ``largest_loss`` in points on ``val``. Nothing was tried where τ was given.

    Raises:
        FairlineError: As :func:`adjust`.
    """
    tau = as_given(tau, "τ")
    require_settings(method, rule, within)
    _require_shares(train)
    layer, transform = _prepared(model, train, method)
    tried: list[dict[str, float]] = []
    taus = strengths_of(tau, TAUS if val is not None else (1.0,), "τ")
    taken = taus[0]
    if len(taus) > 1:
        if val is None:
            raise FairlineError("Of several τ one is chosen on validation data: give them, or one τ.")
        taken, tried = _chosen(predict(model, val).double(), transform, val, reference, rule, within, taus)
    scale, shift = transform(taken)
    with torch.no_grad():
        rows = slice(0, len(scale))
        weight = (layer.weight[rows].double() * scale[:, None]).to(layer.weight)
        bias = (layer.bias[rows].double() * scale + shift).to(layer.bias)
        if _is_usable(layer.weight[rows], layer.bias[rows]) and not _is_usable(weight, bias):
            numbers = str(weight.dtype).removeprefix("torch.")
            raise FairlineError(
                f"With τ = {taken:g} {method} leaves a last layer beyond what {numbers} can hold; take a τ nearer to 0."
            )
        layer.weight[rows], layer.bias[rows] = weight, bias
    logger.info("%s: τ = %g, factors %s, shifts %s", method, taken, scale.tolist(), shift.tolist())
    return {"tau": taken, "tried": tried}


def _is_usable(weight: Tensor, bias: Tensor) -> bool:
    """Whether outputs can be computed in the layer's own numbers: none overflows, and not every weight underflows."""
    held = torch.finfo(weight.dtype)
    largest = float(weight.abs().max())
    # Below the root of the largest number a product with an input still is one.
    return held.tiny <= largest <= held.max**0.5 and float(bias.abs().max()) <= held.max**0.5


def require_settings(method: str, rule: str, within: float) -> None:
    """Refuse settings out of range.

    Raises:
        FairlineError: There is no such method or rule, or a number is out of range.
    """
    if method not in get_args(Method):
        raise FairlineError(f"Classes are rebalanced by {', '.join(get_args(Method))}, not '{method}'.")
    require_rule(rule, within)


def _require_shares(train: GroupedData) -> None:
    """Refuse a class without images."""
    sizes = torch.bincount(train.labels, minlength=train.num_classes)
    if (empty := torch.nonzero(sizes == 0)).numel():
        raise FairlineError(
            f"{train.name}: class “{train.class_names[int(empty[0])]}” has no training image, so it has no share."
        )


def _prepared(model: nn.Module, train: GroupedData, method: Method) -> tuple[nn.Linear, _Transform]:
    """The output layer, and what a strength does: a factor and a shift of each class, float64, (K,)."""
    classes = train.num_classes
    if method == "weight_scale":
        layer, _, logits = output_layer(model, train)
        log_factors = balanced_scale(logits[:, :classes].double(), train.labels.to(logits.device)).log()
        return layer, lambda tau: ((tau * log_factors).exp(), torch.zeros_like(log_factors))
    layer, _, _ = output_layer(model, train.select(torch.arange(1)))
    if method == "tau_norm":
        norms = layer.weight.detach()[:classes].double().norm(dim=1).clamp_min(1e-12)
        return layer, lambda tau: (norms**-tau, torch.zeros_like(norms))
    shares = torch.bincount(train.labels, minlength=classes).double().to(layer.weight.device) / len(train)
    return layer, lambda tau: (torch.ones_like(shares), -tau * shares.log())


def balanced_scale(logits: Tensor, labels: Tensor) -> Tensor:
    """Factors of logits that minimise the mean over classes of each one's cross-entropy.

    Args:
        logits: z, float64, (N, K).
        labels: Every class occurs, (N,).

    Returns:
        f > 0, (K,), of ``Σ_i CE(f ∘ z_i, y_i) / (K n_{y_i})``.
    """
    weight = 1 / torch.bincount(labels, minlength=logits.shape[1]).to(logits)
    log_factors = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_factors], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        # Their mean is weighted by the classes of the images, which is the mean over classes.
        value = cross_entropy(logits * log_factors.exp(), labels, weight=weight)
        value.backward()
        return value

    optimizer.step(loss)
    return log_factors.detach().exp()


def _chosen(
    logits: Tensor,
    transform: _Transform,
    val: GroupedData,
    reference: nn.Module | None,
    rule: Rule,
    within: float,
    taus: Sequence[float],
) -> tuple[float, list[dict[str, float]]]:
    """The strength that a rule takes, and all that were tried; of equals the first, and 0 before all."""
    val.require_groups("choosing τ")
    if rule == "largest_loss" and reference is None:
        raise FairlineError("The largest loss of a group is counted against a network: give a reference.")
    before = None if reference is None else accuracies(predict(reference, val), val)[1]
    tried = []
    for tau in (0.0, *(each for each in taus if each != 0)):
        scale, shift = transform(tau)
        moved = logits.clone()
        moved[:, : len(scale)] = moved[:, : len(scale)] * scale + shift
        overall, groups = accuracies(moved, val)
        row = {"tau": tau, "accuracy": overall, "worst_group_accuracy": min(groups)}
        if before is not None:
            row["largest_loss"] = max(100 * (b - a) for b, a in zip(before, groups, strict=True))
        tried.append(row)
    return best_strength(tried, within, rule), tried


def best_strength(tried: Sequence[Mapping[str, float]], within: float, rule: Rule = "worst_group") -> float:
    """The strength that a rule takes; of equals the first.

    Args:
        tried: ``tau`` of each, and what :func:`~fairline.objectives.choice.chosen` asks for; the first leaves the
            network as it is.
        within: Overall accuracy that may go, in percentage points.
        rule: See there.

    Returns:
        Its τ.
    """
    place = chosen(tried, rule, within, tried[0]["accuracy"])
    assert place is not None  # the first is always within
    return tried[place]["tau"]


__all__ = ["TAUS", "Method", "Rule", "adjust", "adjust_in_place", "balanced_scale", "best_strength", "require_settings"]
