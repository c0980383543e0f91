"""What makes the groups: columns of a table, bins of numbers, and intersections of them. No source.

    race                          a group for each value of the column
    age:0-17,18-64,65+            a group for each bin of a number; bins run on as long as what follows a comma is a bin
    race,sex                      intersections
    sex,age:0-17,18-64,65+,race   likewise; the same as the list ["sex", "age:0-17,18-64,65+", "race"]

A text that is the name of a column means that column, whatever commas and colons are in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.data._names import BadCell, cell_text, encode
from fairline.errors import FairlineError

#: Groups that an audit can tell apart at most.
MOST = 100

#: Between the names of an intersection.
CROSS = " × "

#: A column, bins or intersections; several are intersected.
Groups = str | Sequence[str]

_NUMBER = r"-?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*[-–]\s*({_NUMBER})")
_FROM = re.compile(rf"({_NUMBER})\+")
_BELOW = re.compile(rf"<\s*({_NUMBER})")
_ONE = re.compile(rf"({_NUMBER})")
_CELL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Bin:
    """Numbers from ``low`` to ``high``, both among them. Of bins of whole numbers a number's floor counts."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """A column that makes groups; where ``bins`` are empty, each of its values does."""

    name: str
    bins: tuple[Bin, ...] = ()


@dataclass(frozen=True)
class Cells:
    """The group of each row.

    Attributes:
        index: int64, (n,), in ``range(len(names))``; −1 where a row has none.
        names: Of the groups that have a row, in their natural order.
    """

    index: NDArray[np.int64]
    names: tuple[str, ...]

    def texts(self) -> list[str | None]:
        """The name of each row's group, None where it has none."""
        return [None if place < 0 else self.names[place] for place in self.index.tolist()]


def parse_groups(groups: Groups, columns: Collection[str], where: str) -> list[Column]:
    """Read what makes the groups.

    Args:
        groups: As the head of this module tells.
        columns: Those that there are.
        where: What they are of, for messages.

    Returns:
        The columns that are intersected.

    Raises:
        FairlineError: A column is unknown or named twice, or bins are none or overlap.

    >>> [(part.name, [b.name for b in part.bins]) for part in parse_groups("sex,age:0-17,18+", ("age", "sex"), "faces")]
    [('sex', []), ('age', ['0–17', '18+'])]
    """
    found: list[tuple[str, list[str]]] = []
    for text in [groups] if isinstance(groups, str) else map(str, groups):
        begin = len(found)
        for token in [text.strip()] if text.strip() in columns else [part.strip() for part in text.split(",")]:
            if len(found) > begin and found[-1][1] and _bin(token) is not None:
                found[-1][1].append(token)
                continue
            name, _, first = (token, "", "") if token in columns else _halves(token)
            if name not in columns:
                known = ", ".join(map(str, columns))
                raise FairlineError(f"{where} has no column '{name}' to make groups of; it has {known}.")
            found.append((name, [first] if first else []))
    if not found:
        raise FairlineError(f"{where}: nothing was named to make groups of.")
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise FairlineError(f"{where}: groups name the column '{name}' twice.")
    return [Column(name, _bins(texts, f"{where}: bins of '{name}'")) for name, texts in found]


def cells_of(
    table: pd.DataFrame,
    groups: Groups,
    where: str,
    bins: Mapping[str, str] | None = None,
    *,
    name_missing: bool = True,
) -> Cells:
    """The group of each row of a table.

    Args:
        table: A column for each name.
        groups: What makes the groups.
        where: What the table is of, for messages.
        bins: Of columns that are named without any.
        name_missing: Whether a row without a value is in a group of such rows, ``no COLUMN``, rather than in none.

    Returns:
        The groups; intersections without a row are left out.

    Raises:
        FairlineError: The groups cannot be read, a number lies outside of all bins, or there are more than
            :data:`MOST` groups.
    """
    index = np.zeros(len(table), np.int64)
    missing = np.zeros(len(table), np.bool_)
    levels: list[tuple[str, ...]] = []
    parts = parse_groups(groups, list(table.columns), where)
    for part in parts:
        usual = (bins or {}).get(part.name)
        if usual and not part.bins:
            part = parse_groups(f"{part.name}:{usual}", [part.name], where)[0]
        codes, names = _levels(table[part.name], part, f"{where}: column '{part.name}'")
        if (count := len(np.unique(codes[codes >= 0]))) > MOST:
            raise FairlineError(_too_many(where, [part], count))
        missing |= codes < 0
        if name_missing and (codes < 0).any():
            codes, names = np.where(codes < 0, len(names), codes), (*names, f"no {part.name}")
        levels.append(names)
        index = index * len(names) + codes
    there, index[~missing | name_missing] = np.unique(index[~missing | name_missing], return_inverse=True)
    if len(there) > MOST:
        raise FairlineError(_too_many(where, parts, len(there)))
    if not name_missing:
        index[missing] = -1
    return Cells(index, tuple(_name(int(place), levels) for place in there))


def texts_of(values: pd.Series[Any], where: str) -> list[str | None]:
    """The cells of a column as names, None where one is missing.

    Args:
        values: The column.
        where: What it is, for messages.

    Returns:
        A name a row.

    Raises:
        FairlineError: A cell holds several values.
    """
    try:
        return [None if value is pd.NA or value is pd.NaT else cell_text(value) for value in values.tolist()]
    except BadCell as error:
        raise FairlineError(f"{where} is {error}.") from None


def _halves(token: str) -> tuple[str, str, str]:
    """``age:0-17`` as column and first bin; another text as a column."""
    name, colon, first = token.rpartition(":")
    return (name.strip(), colon, first.strip() or " ") if colon else (token, "", "")


def _bin(text: str) -> tuple[str, float, float, bool] | None:
    """Name, ends, and whether the upper one is not among them; None where the text is no bin."""
    if match := _RANGE.fullmatch(text):
        return f"{match[1]}–{match[2]}", float(match[1]), float(match[2]), False
    if match := _FROM.fullmatch(text):
        return text, float(match[1]), math.inf, False
    if match := _BELOW.fullmatch(text):
        return f"<{match[1]}", -math.inf, float(match[1]), True
    if match := _ONE.fullmatch(text):
        return text, float(text), float(text), False
    return None


def _bins(texts: Sequence[str], where: str) -> tuple[Bin, ...]:
    """Bins in their natural order."""
    whole = not any("." in text for text in texts)
    bins = []
    for text in texts:
        found = _bin(text)
        if found is None:
            raise FairlineError(f"{where} are 0-17, 65+, <18 or one number, not '{text.strip()}'.")
        name, low, high, open_ended = found
        if open_ended:
            high = high - 1 if whole else math.nextafter(high, -math.inf)
        if low > high:
            raise FairlineError(f"{where}: '{text}' ends before it begins.")
        bins.append(Bin(name, low, high))
    bins.sort(key=lambda own: own.low)
    for before, after in pairwise(bins):
        # Of bins with decimals the upper one holds the edge that both name.
        if after.low < before.high or (after.low == before.high and (whole or after.low == after.high)):
            raise FairlineError(f"{where} overlap: '{before.name}' and '{after.name}'.")
    return tuple(bins)


def _levels(values: pd.Series[Any], part: Column, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Position of each row's value among the names of the values, −1 where it is missing; and those names."""
    if part.bins:
        return _binned(texts_of(values, where), part.bins, where), tuple(own.name for own in part.bins)
    if isinstance(values.dtype, pd.CategoricalDtype):
        there = values.cat.remove_unused_categories().cat
        return there.codes.to_numpy(np.int64), tuple(map(str, there.categories))
    texts = texts_of(values, where)
    index, names = encode([text for text in texts if text is not None], where)
    codes = np.full(len(texts), -1, np.int64)
    codes[[text is not None for text in texts]] = index
    return codes, names


def _binned(texts: Sequence[str | None], bins: Sequence[Bin], where: str) -> NDArray[np.int64]:
    """The bin of each number."""
    bad = next((text for text in texts if text is not None and not _CELL.fullmatch(text)), None)
    if bad is not None:
        raise FairlineError(f"{where} is '{bad}' somewhere, which is no number; bins are of numbers.")
    numbers = np.array([math.nan if text is None else float(text) for text in texts])
    whole = all(end.is_integer() or math.isinf(end) for own in bins for end in (own.low, own.high))
    compared = np.floor(numbers) if whole else numbers
    codes = np.full(len(texts), -1, np.int64)
    for place, own in enumerate(bins):
        codes[(own.low <= compared) & (compared <= own.high)] = place
    outside = (codes < 0) & ~np.isnan(numbers)
    if outside.any():
        first = texts[int(np.flatnonzero(outside)[0])]
        raise FairlineError(
            f"{where} lies outside of all bins ({', '.join(own.name for own in bins)}) for {int(outside.sum()):,} "
            f"images, first {first}; add a bin."
        )
    return codes


def _name(place: int, levels: Sequence[tuple[str, ...]]) -> str:
    """The name of an intersection, from its position among all of them."""
    names: list[str] = []
    for level in reversed(levels):
        place, own = divmod(place, len(level))
        names.insert(0, level[own])
    return CROSS.join(names)


def _too_many(where: str, parts: Sequence[Column], count: int) -> str:
    named = CROSS.join(part.name for part in parts)
    plain = next((part.name for part in parts if not part.bins), None)
    bins = "" if plain is None else f", or bins if '{plain}' is a number ({plain}:0-17,18+)"
    return f"{where}: {named} makes {count:,} groups, more than {MOST}; take fewer or coarser columns{bins}."
