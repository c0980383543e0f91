"""What a network minimises. One file an objective; the interface is :class:`Objective`."""

from __future__ import annotations

from typing import Any

from fairline._registry import build_named
from fairline.objectives.arl import ARL
from fairline.objectives.base import Batch, Objective, distillation_loss
from fairline.objectives.chi2_dro import Chi2DRO
from fairline.objectives.erm import ERM
from fairline.objectives.group_dro import GroupDRO
from fairline.objectives.lagrangian import Lagrangian
from fairline.objectives.last_layer import retrain_last_layer
from fairline.objectives.logit_adjust import LogitAdjust
from fairline.objectives.reweighting import Reweighting

#: Name on the command line → class.
REGISTRY: dict[str, type[Objective]] = {
    "erm": ERM,
    "lagrangian": Lagrangian,
    "group_dro": GroupDRO,
    "chi2_dro": Chi2DRO,
    "arl": ARL,
    "reweighting": Reweighting,
    "logit_adjust": LogitAdjust,
}


def build(name: str, **options: Any) -> Objective:
    """Build an objective by name.

    Args:
        name: A key of :data:`REGISTRY`.
        options: Of its constructor.

    Returns:
        The objective.

    Raises:
        FairlineError: The name or an option is unknown.
    """
    return build_named("objective", REGISTRY, name, options)


__all__ = [
    "ARL",
    "ERM",
    "REGISTRY",
    "Batch",
    "Chi2DRO",
    "GroupDRO",
    "Lagrangian",
    "LogitAdjust",
    "Objective",
    "Reweighting",
    "build",
    "distillation_loss",
    "retrain_last_layer",
]
