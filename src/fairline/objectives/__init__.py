"""What a network minimises. One file an objective; the interface is :class:`Objective`."""

from __future__ import annotations

from typing import Any

from fairline._registry import build_named
from fairline.objectives.base import Batch, Objective, distillation_loss
from fairline.objectives.erm import ERM

#: Name on the command line → class.
REGISTRY: dict[str, type[Objective]] = {"erm": ERM}


def build(name: str, **options: Any) -> Objective:
    """Build an objective by name.

    Raises:
        FairlineError: The name or an option is unknown.
    """
    return build_named("objective", REGISTRY, name, options)


__all__ = ["ERM", "REGISTRY", "Batch", "Objective", "build", "distillation_loss"]
