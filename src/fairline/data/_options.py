"""Checks of the options that several loaders take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairline.data.decoding import Size
from fairline.errors import FairlineError


def refuse_unknown(name: str, options: Mapping[str, Any], task: str | None = None) -> None:
    """Refuse options (and a task) that the data set ``name`` does not know.

    Raises:
        FairlineError: Names the first.
    """
    if options or task:
        raise FairlineError(f"Data '{name}' knows no option '{task or next(iter(options))}'.")


def require_root(root: str | Path | None, name: str) -> Path:
    """The folder or file that holds the data.

    Args:
        root: As the user gave it.
        name: Of the data set, for the error message.

    Returns:
        The path, with ``~`` expanded.

    Raises:
        FairlineError: No root was given, or it does not exist.
    """
    if root is None:
        raise FairlineError(f"Data '{name}' needs a folder: pass root (--root) or set FAIRLINE_DATA.")
    path = Path(root).expanduser()
    if not path.exists():
        raise FairlineError(f"Data folder {path} does not exist.")
    return path


def parse_size(value: Any, name: str) -> Size | None:
    """Height and width from ``32``, ``(48, 64)`` or ``"48x64"``; None stays.

    Args:
        value: The option ``image_size``.
        name: Of the data set, for the error message.

    Returns:
        Height and width in pixels.

    Raises:
        FairlineError: It is no size.

    >>> parse_size("48x64", "folder")
    (48, 64)
    >>> parse_size(32, "folder")
    (32, 32)
    """
    if value is None:
        return None
    sides = value.lower().replace("×", "x").split("x") if isinstance(value, str) else value
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    try:
        pixels = [int(side) for side in sides if not isinstance(side, bool | float)]
    except (TypeError, ValueError):
        pixels = []
    if len(pixels) != len(sides) or len(pixels) not in (1, 2) or min(pixels) < 1:
        raise FairlineError(f"Data '{name}': image_size is pixels (32) or HEIGHTxWIDTH (48x64), not '{value}'.")
    return pixels[0], pixels[-1]


def require_whole(value: Any, option: str, name: str, least: int = 0) -> int:
    """Refuse what is not a whole number of at least ``least``.

    Args:
        value: Of the option.
        option: Its name.
        name: Of the data set.
        least: The smallest that is right.

    Returns:
        The value.

    Raises:
        FairlineError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FairlineError(f"Data '{name}': {option} is a whole number of at least {least}, not '{value}'.")
    return value


def require_flag(value: Any, option: str, name: str) -> bool:
    """Refuse what is neither true nor false.

    Args:
        value: Of the option.
        option: Its name.
        name: Of the data set.

    Returns:
        The value.

    Raises:
        FairlineError: It is neither.
    """
    if not isinstance(value, bool):
        raise FairlineError(f"Data '{name}': {option} is true or false, not '{value}'.")
    return value
