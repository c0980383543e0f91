"""Methods that switch ReLUs off. One file a method; the interface is :class:`Linearizer`."""

from __future__ import annotations

from typing import Any

from fairline.errors import FairlineError
from fairline.linearize.base import Linearized, Linearizer, resolve_budgets
from fairline.linearize.snl import SNL

#: Name on the command line → class.
REGISTRY: dict[str, type[Linearizer]] = {"snl": SNL}


def build(name: str, **options: Any) -> Linearizer:
    """Build a linearizer by name.

    Raises:
        FairlineError: The name or an option is unknown.
    """
    if name not in REGISTRY:
        raise FairlineError(f"There is no linearizer '{name}'; choose one of {', '.join(REGISTRY)}.")
    try:
        return REGISTRY[name](**options)
    except TypeError as error:
        raise FairlineError(f"Linearizer '{name}': {error}.") from None


__all__ = ["REGISTRY", "SNL", "Linearized", "Linearizer", "build", "resolve_budgets"]
