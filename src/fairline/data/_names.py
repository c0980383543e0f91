"""Names of classes and groups, and the numbers that stand for them.

A name is any text but a blank one: "None", "NA" and "01" are names like all others.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from fairline.errors import FairlineError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class BadCell(ValueError):
    """A cell that is no name or no index; the text follows "is"."""


def clean_name(text: str) -> str:
    """A name without spaces around it, in Unicode's composed form (NFC), so that names which look the same are."""
    return unicodedata.normalize("NFC", text.strip())


def cell_text(value: Any) -> str | None:
    """The name in a cell, as a CSV would hold it.

    Args:
        value: A text, number, truth value or date.

    Returns:
        The name, or None where it is missing (null, NaN or blank).

    Raises:
        BadCell: The cell holds several values.

    >>> cell_text(" NA "), cell_text(1.0), cell_text(float("nan")), cell_text(" ")
    ('NA', '1.0', None, None)
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, list | dict):
        raise BadCell(f"{value}, where one name is needed")
    return clean_name(str(value)) or None


def encode(names: Sequence[str], where: str) -> tuple[list[int], tuple[str, ...]]:
    """Indices into the sorted distinct names; numbers sort as numbers, before texts.

    Args:
        names: One for each sample.
        where: What they are, for the error message.

    Returns:
        The index of each, and the distinct names.

    Raises:
        FairlineError: One number is written in two ways, which may be one class or two.

    >>> encode(["b", "10", "9", "b"], "labels")
    ([2, 1, 0, 2], ('9', '10', 'b'))
    """
    written: dict[float, str] = {}
    for name in dict.fromkeys(names):
        if _NUMBER.fullmatch(name) and written.setdefault(float(name), name) != name:
            first = written[float(name)]
            raise FairlineError(f"{where} writes one number as '{first}' and as '{name}'; write it one way.")
    value = {name: number for number, name in written.items()}
    distinct = sorted(dict.fromkeys(names), key=lambda name: (name not in value, value.get(name, 0.0), name))
    position = {name: index for index, name in enumerate(distinct)}
    return [position[name] for name in names], tuple(distinct)


def class_index(value: Any, names: Sequence[str] | None = None) -> int | None:
    """The index that a cell means: a name, its index (1, 1.0 or "1"), or a one-hot vector.

    Args:
        value: The cell, or what a data set returns as label.
        names: By index; where there are none, any index is right and any text is wrong.

    Returns:
        The index, or None where it is missing (null, NaN or blank).

    Raises:
        BadCell: It means none.

    >>> names = ("bird", "cat")
    >>> [class_index(value, names) for value in ("cat", 1.0, "1", [0, 1], None)]
    [1, 1, 1, 1, None]
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    value = _position(value, names) if isinstance(value, list | tuple) else value
    if isinstance(value, str | bytes):
        text = cell_text(value)
        if text is None or (names is not None and text in names):
            return None if text is None or names is None else list(names).index(text)
        if not _NUMBER.fullmatch(text):
            raise BadCell(f"'{text}', which is " + ("not a number" if names is None else f"none of {', '.join(names)}"))
        value = float(text)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise BadCell(f"{value}, which is not a whole number")
    if value < 0:
        raise BadCell(f"{value:g}, which is negative")
    if names is not None and value >= len(names):
        raise BadCell(f"{value:g}, but there are {len(names)} names")
    return int(value)


def _position(values: Sequence[Any], names: Sequence[str] | None) -> Any:
    """Where a one-hot vector is one, or the only value of a vector."""
    if len(values) == 1:
        return values[0]
    if any(value not in (0, 1) for value in values) or sum(values) != 1:
        raise BadCell(f"{list(values)}, which is neither one value nor a one-hot vector")
    if names is not None and len(values) != len(names):
        raise BadCell(f"a one-hot vector of {len(values)} values, but there are {len(names)} names")
    return list(values).index(1)
