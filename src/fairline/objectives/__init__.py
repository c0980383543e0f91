"""What a network minimises. One file an objective; the interface is :class:`Objective`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fairline._own import is_own
from fairline._registry import build_named
from fairline.data.grouped import GroupedData
from fairline.objectives.ada_alpha import AdaAlpha
from fairline.objectives.ada_margin import AdaMargin
from fairline.objectives.afr import reweight_last_layer
from fairline.objectives.arl import ARL
from fairline.objectives.balanced_kd import BalancedKD
from fairline.objectives.base import Batch, Objective, distillation_loss
from fairline.objectives.chi2_dro import Chi2DRO
from fairline.objectives.drop import GroupDrop
from fairline.objectives.erm import ERM
from fairline.objectives.group_dro import GroupDRO
from fairline.objectives.lagrangian import Lagrangian
from fairline.objectives.last_layer import retrain_last_layer
from fairline.objectives.ldam import LDAM
from fairline.objectives.logit_adjust import LogitAdjust
from fairline.objectives.long_tail_kd import LongTailKD
from fairline.objectives.own import build_own, require_whole
from fairline.objectives.post_hoc import adjust
from fairline.objectives.reweighting import Reweighting
from fairline.objectives.selective import finetune_last_layer

#: Name on the command line → class.
REGISTRY: dict[str, type[Objective]] = {
    "erm": ERM,
    "lagrangian": Lagrangian,
    "drop": GroupDrop,
    "group_dro": GroupDRO,
    "chi2_dro": Chi2DRO,
    "arl": ARL,
    "reweighting": Reweighting,
    "logit_adjust": LogitAdjust,
    "balanced_kd": BalancedKD,
    "ada_alpha": AdaAlpha,
    "ada_margin": AdaMargin,
    "long_tail_kd": LongTailKD,
    "ldam": LDAM,
}


def build(name: str, /, **options: Any) -> Objective:
    """Build an objective by name.

    Args:
        name: A key of :data:`REGISTRY`, or ``module:Class`` or ``file.py:Class`` of the user's own.
        options: Of its constructor.

    Returns:
        The objective.

    Raises:
        FairlineError: The name or an option is unknown; the user's own class cannot be imported or built, or lacks a
            part of the interface.
    """
    if is_own(name):
        return build_own(name, options)
    return build_named("objective", REGISTRY, name, options)


def try_on(name: str, options: Mapping[str, Any], train: Callable[[], GroupedData]) -> None:
    """Refuse an objective under which training would fail; those of :data:`REGISTRY` need no trial.

    Args:
        name: As for :func:`build`.
        options: As there.
        train: Gives the training data, asked for only where they are looked at.

    Raises:
        FairlineError: An objective of the user's own is not whole (:func:`~fairline.objectives.own.require_whole`).
    """
    if is_own(name):
        require_whole(name, options, train())


__all__ = [
    "ARL",
    "ERM",
    "LDAM",
    "REGISTRY",
    "AdaAlpha",
    "AdaMargin",
    "BalancedKD",
    "Batch",
    "Chi2DRO",
    "GroupDRO",
    "GroupDrop",
    "Lagrangian",
    "LogitAdjust",
    "LongTailKD",
    "Objective",
    "Reweighting",
    "adjust",
    "build",
    "distillation_loss",
    "finetune_last_layer",
    "retrain_last_layer",
    "reweight_last_layer",
    "try_on",
]
