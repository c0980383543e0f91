"""Data sets that come in a training and a test part, as parquet tables with a column for each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from fairline.data._images import Source, decode
from fairline.data._names import BadCell, class_index
from fairline.data._packed import Images
from fairline.data._tables import FILE_NAME, ParquetTable, image_column, require_columns
from fairline.data.decoding import Size, UnusableImage
from fairline.data.grouped import GroupedData, Skipped
from fairline.errors import FairlineError

PARTS = ("train", "test")

#: The paper's imbalance (Section 5): what is kept of the first half of the classes, and of the second.
FIRST_HALF, SECOND_HALF = 0.9, 0.1


class Content(NamedTuple):
    """What the files of both parts hold.

    Attributes:
        images: uint8, (n, 3, H, W).
        labels: By the name of the column, int64, (n,).
        test: Which are of the test part, bool, (n,).
        skipped: What could not be used.
        metadata: What else is known of each image.
    """

    images: Images
    labels: Mapping[str, Tensor]
    test: Tensor
    skipped: tuple[Skipped, ...] = ()
    metadata: Mapping[str, Any] = MappingProxyType({})


def read_parquet(
    name: str, path: Path, names: Mapping[str, Sequence[str]], size: Size | None, *, pack: bool, instead: str
) -> Content:
    """Read ``NAME_train*.parquet`` and ``NAME_test*.parquet``.

    Args:
        name: Of the data set.
        path: The folder.
        names: The classes of each column of labels.
        size: Height and width of the images.
        pack: Whether to leave the images in a packed file.
        instead: The other files that would do, for the message.

    Returns:
        What they hold; a row without a label is skipped and listed.

    Raises:
        FairlineError: A part or a column is missing, or a label means no class.
    """
    tables, images, file_names = [], [], []
    labels: dict[str, list[int | None]] = {column: [] for column in names}
    counts = []
    for part in PARTS:
        files = sorted(path.glob(f"{name}_{part}*.parquet")) if path.is_dir() else []
        if not files:
            raise FairlineError(f"{path} holds neither {instead} nor {name}_{part}*.parquet.")
        table = ParquetTable(files, path)
        column = image_column(table)
        require_columns(table, *names)
        tables.append(table)
        for label, classes in names.items():
            labels[label] += _labels(table, label, classes, path)
        counts.append(len(labels[next(iter(names))]))
        images.append(table.images(column))
        file_names += table.file_names(column)
    rows = list(zip(*labels.values(), strict=True))
    missing = [position for position, row in enumerate(rows) if None in row]
    undecoded = (
        replace(image, content=UnusableImage("its label is empty")) if None in row else image
        for image, row in zip(chain(*images), rows, strict=True)
    )
    source = Source(name, path, [file for table in tables for file in table.files], missing, len(rows))
    decoded = decode(undecoded, size, source, pack=pack)
    return Content(
        decoded.images,
        {label: torch.tensor([cells[position] for position in decoded.kept]) for label, cells in labels.items()},
        torch.tensor([position >= counts[0] for position in decoded.kept]),
        tuple(decoded.skipped),
        {FILE_NAME: [file_names[position] for position in decoded.kept]},
    )


def _labels(table: ParquetTable, column: str, classes: Sequence[str], path: Path) -> list[int | None]:
    """The label of each row, None where it is missing."""
    labels = []
    for where, cell in table.cells(column):
        try:
            labels.append(class_index(cell, classes))
        except BadCell as error:
            raise FairlineError(f"{path}: the {column.replace('_', ' ')} in {where} is {error}.") from None
    return labels


def require_unbalanced(value: Any, name: str) -> bool | str:
    """Refuse what is no value of the option ``unbalanced``.

    Args:
        value: Of the option.
        name: Of the data set.

    Returns:
        The value.

    Raises:
        FairlineError: It is neither a truth value nor ``"train"``.
    """
    if value not in (False, True, "train"):
        raise FairlineError(f"Data '{name}': unbalanced must be true, false or 'train', not '{value}'.")
    chosen: bool | str = value
    return chosen


def by_class(name: str, content: Content, column: str, classes: Sequence[str]) -> GroupedData:
    """The data that files of two parts hold, a group a class.

    Args:
        name: Of the data set.
        content: What the files hold.
        column: The labels to predict.
        classes: Their names.

    Returns:
        The data, with the official test part.
    """
    labels, names = content.labels[column], tuple(classes)
    return GroupedData(
        content.images,
        labels,
        labels.clone(),
        names,
        names,
        name=name,
        official_test=content.test,
        skipped=content.skipped,
        metadata=pd.DataFrame(dict(content.metadata)),
    )


def unbalanced_halves(data: GroupedData, unbalanced: bool | str, seed: int) -> GroupedData:
    """Keep 90 % of the first half of the classes and 10 % of the second, as the paper does for CIFAR-10.

    Args:
        data: Whole.
        unbalanced: Whether; ``"train"`` leaves the official test part whole.
        seed: Of the choice.

    Returns:
        The thinned data.
    """
    if not unbalanced:
        return data
    half = data.num_classes // 2
    shares: dict[str | int, float] = {
        label: FIRST_HALF if label < half else SECOND_HALF for label in range(data.num_classes)
    }
    return data.unbalance(shares, seed, part="train" if unbalanced == "train" else "all")
