"""Parts of data in which images that belong together stay together. No source."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.data._groups import texts_of

Index = NDArray[np.int64]

#: Words in the name of a column that says whose image it is.
_WHOSE = re.compile(r"(^|[^a-z])(id|ids|patient|subject|lesion|person|participant|identity|case|study)([^a-z]|$)")

#: A column of texts of which each stands for fewer images than this looks like a name of patients.
_REPEATS = 50

#: Values of a column that looks so, at least.
_VALUES = 20


def tied(content: Index, values: pd.Series[Any], where: str) -> Index:
    """One number an image, equal where images belong together: alike, of one value, or through other images.

    Args:
        content: A number an image, equal where the images are alike, (n,).
        values: A value an image; one without a value is tied to its like alone.
        where: What the values are, for messages.

    Returns:
        int64, (n,).

    >>> tied(np.array([0, 1, 1, 2]), pd.Series(["ann", "ann", "bob", None]), "patient").tolist()
    [0, 0, 0, 2]
    """
    codes = pd.factorize(np.array(texts_of(values, where), dtype=object))[0].astype(np.int64)
    alone = codes < 0
    codes[alone] = codes.max(initial=-1) + 1 + np.arange(alone.sum())
    same = content
    while True:
        before = same
        for shared in (codes, content):
            lowest = np.full(int(shared.max()) + 1, len(content) + int(content.max()), np.int64)
            np.minimum.at(lowest, shared, same)
            same = lowest[shared]
        if np.array_equal(before, same):
            return same


def deal_together(
    unit: Index, groups: Index, labels: Index, shares: Sequence[float], rng: np.random.Generator
) -> Index:
    """Deal units of images into parts, so that each part has its share of the images, groups and classes.

    The largest units first, each goes where it leaves the least squared distance from what was asked for, relative to
    that, summed over all images, its groups, and its classes within them. Then a group that a part lacks, and a class
    that the last part lacks, gets its smallest unit from a part that can spare it.

    Args:
        unit: Of each image, in ``range(units)``, (n,).
        groups: Likewise.
        labels: Likewise.
        shares: Of the parts, which sum to 1.
        rng: Orders units of one size.

    Returns:
        Part of each unit.
    """
    strata = _strata(groups, labels)
    wanted = np.outer(shares, np.bincount(strata.ravel())).astype(np.float64)
    dealt = np.zeros_like(wanted)
    sizes = np.bincount(unit)
    members = np.split(np.argsort(unit, kind="stable"), np.cumsum(sizes)[:-1])
    part_of_unit = np.empty(len(sizes), np.int64)
    shuffled = rng.permutation(len(sizes))
    for own in shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist():
        held, count = np.unique(strata[members[own]], return_counts=True)
        there = wanted[:, held]
        part = int(np.argmin(((2 * (dealt[:, held] - there) + count) * count / there).sum(1)))
        dealt[part, held] += count
        part_of_unit[own] = part
    _complete(part_of_unit, unit, groups, range(len(shares)), groups)
    _complete(part_of_unit, unit, labels, [len(shares) - 1], groups)
    return part_of_unit


def _strata(groups: Index, labels: Index) -> Index:
    """What each image counts for: all, its group, and its class within the group, (n, 3)."""
    cell = np.unique(np.stack([groups, labels]), axis=1, return_inverse=True)[1].reshape(-1)
    group = np.unique(groups, return_inverse=True)[1].reshape(-1)
    return np.stack([np.zeros_like(group), 1 + group, 2 + group.max() + cell], axis=1)


def _complete(part_of_unit: Index, unit: Index, kind: Index, parts: Collection[int], groups: Index) -> None:
    """Move units, so that each of ``parts`` has an image of each kind, if no part loses its last image of a group."""
    sizes = np.bincount(unit)
    pairs = np.unique(np.stack([unit, groups]), axis=1)
    for wanted in np.unique(kind).tolist():
        holders = np.unique(unit[kind == wanted])
        for part in parts:
            if (part_of_unit[holders] == part).any():
                continue
            for own in holders[np.argsort(sizes[holders], kind="stable")].tolist():
                left = (part_of_unit[pairs[0]] == part_of_unit[own]) & (pairs[0] != own)
                if np.isin(pairs[1][pairs[0] == own], pairs[1][left]).all():
                    part_of_unit[own] = part
                    break


def tells_whose(table: pd.DataFrame, used: Collection[str] = ()) -> str | None:
    """A column that looks like the name of a patient or lesion with several images.

    Args:
        table: A row an image.
        used: Columns that are something else.

    Returns:
        Its name, or None.

    >>> tells_whose(pd.DataFrame({"age": [1, 2, 3, 3], "patient": ["a", "b", "b", "c"]}))
    'patient'
    """
    for name in table.columns:
        values = table[name]
        if name in used or isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_float_dtype(values):
            continue
        try:
            distinct, told = values.nunique(), values.count()
        except TypeError:
            continue
        named = bool(_WHOSE.search(str(name).lower()))
        if not 1 < distinct < told or (not named and distinct > 0.95 * told):
            continue
        texts = not pd.api.types.is_numeric_dtype(values) and pd.to_numeric(values, errors="coerce").isna().any()
        if named or (texts and distinct >= _VALUES and told < _REPEATS * distinct):
            return str(name)
    return None
