"""Building what a user names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Number
from typing import Any, TypeVar

from fairline.errors import FairlineError

T = TypeVar("T")


def build_named(kind: str, registry: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """An instance of the class registered under ``name``.

    Args:
        kind: What the registry holds, for the error message.
        registry: Classes by name.
        name: Which one.
        options: Arguments of its constructor.

    Returns:
        The instance.

    Raises:
        FairlineError: The name or an option is unknown, or an option is no number, or none that is finite, where one is
            needed.
    """
    if name not in registry:
        raise FairlineError(f"There is no {kind} '{name}'; choose one of {', '.join(registry)}.")
    known = inspect.signature(registry[name]).parameters
    for option, value in options.items():
        if isinstance(value, str) and option in known and isinstance(known[option].default, Number):
            what = "true or false" if isinstance(known[option].default, bool) else "a number"
            raise FairlineError(f"{kind.capitalize()} '{name}': option '{option}' is {what}, not '{value}'.")
        if isinstance(value, float) and not math.isfinite(value):
            raise FairlineError(f"{kind.capitalize()} '{name}': option '{option}' must be finite, not {value}.")
    try:
        return registry[name](**options)
    except TypeError as error:
        raise FairlineError(f"{kind.capitalize()} '{name}': {error}.") from None
