"""A folder of images with a table (CSV or parquet) that names a label and a group for each."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline.data._groups import Groups, cells_of
from fairline.data._images import IMAGE_SUFFIXES, Decoded, Source, Undecoded, decode
from fairline.data._names import encode
from fairline.data._options import parse_size, refuse_unknown, require_flag, require_root
from fairline.data._tables import CsvTable, ParquetTable, Table, image_column, require_columns
from fairline.data.decoding import Size, UnusableImage, picture_size, quiet_pillow
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

logger = logging.getLogger(__name__)


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    label: str = "label",
    groups: Groups | None = None,
    split: str = "split",
    metadata: str = "metadata.csv",
    test_metadata: str | None = None,
    image_size: int | tuple[int, int] | str | None = 32,
    white: float | None = None,
    flip: bool = True,
    pack: bool = False,
    **options: Any,
) -> GroupedData:
    """Load images named in a table, in the layout of Hugging Face's ``imagefolder``.

    Args:
        root: The folder, or one parquet file that holds images, labels and groups.
        task: None; there is one task.
        label: Column of the label.
        groups: Column of the group, bins of a number or intersections, as for :meth:`GroupedData.regroup`; the label by
            default.
        split: Column whose value ``test`` marks an official test split, which stays the test part; all other rows are
            dealt to the training and validation parts, whatever they are marked as. Ignored where it is absent.
        metadata: The table inside the folder, with a column ``file_name`` (or ``file``, ``image``, ``img``); where
            there is no ``metadata.csv``, ``metadata.parquet``. A pattern, ``data/train-*.parquet``, takes several.
        test_metadata: A second table of the same columns, whose rows are an official test split. FairFace, for one:
            ``metadata="fairface_label_train.csv", test_metadata="fairface_label_val.csv", label="race"``.
        image_size: Side in pixels, or height and width: ``(48, 64)`` or ``"48x64"``. None keeps the images as they are
            and skips those that are not of the commonest size.
        white: The value of white in files of 16-bit grey values or floats: 4095 for 12 bits.
        flip: Whether a mirrored image keeps its label.
        pack: Leave the images in a packed file, even if they fit into memory.
        options: None are known.

    Returns:
        Images (N, 3, H, W); names sorted, without spaces around them; all columns of the table as ``metadata``. Rows
        without a readable image, label or group are skipped and listed.

    Raises:
        FairlineError: The folder, the table or a column is missing, or no row can be used.
    """
    refuse_unknown("folder", options, task)
    size, flip = parse_size(image_size, "folder"), require_flag(flip, "flip", "folder")
    if white is not None and not (isinstance(white, int | float) and white > 0):
        raise FairlineError(f"Data 'folder': white is a number above 0, not '{white}'.")
    path = require_root(root, "folder")
    tables = [_find(path, str(name)) for name in (metadata, test_metadata) if name is not None]
    # The command line reads a column called 1 as a number.
    label = str(label)
    rows = _Rows(tables, label, groups or label, str(split) if test_metadata is None else None, path.resolve().name)
    source = rows.source(path)
    decoded = decode(rows.images(), size, source, white=white, pack=pack)
    listed = {file for file in source.files if file.exists()}.difference(*(table.files for table in tables))
    _warn_of_unlisted(listed, {file.parent for file in listed}, tables)
    return rows.grouped(decoded, path.resolve().name, flip)


@dataclass(frozen=True)
class Preview:
    """What is known of a folder before its images are decoded.

    Attributes:
        num_classes: Distinct labels.
        sizes: Heights and widths of the images: one if all have it, else two of them.
    """

    num_classes: int
    sizes: list[Size]


def preview(
    root: str | Path | None = None,
    *,
    label: str = "label",
    metadata: str = "metadata.csv",
    test_metadata: str | None = None,
    **_: Any,
) -> Preview:
    """Look at labels, and at the headers of images until two differ.

    Args:
        root: As for :func:`load`.
        label: Column of the label.
        metadata: The table.
        test_metadata: The second one.

    Returns:
        What is there.

    Raises:
        FairlineError: The folder, the table or the column is missing.
    """
    path = require_root(root or os.environ.get("FAIRLINE_DATA"), "folder")
    tables = [_find(path, str(name)) for name in (metadata, test_metadata) if name is not None]
    rows = _Rows(tables, str(label), str(label), None, path.resolve().name)
    sizes: list[Size] = []
    with quiet_pillow():
        for image in rows.images():
            size = None if isinstance(image.content, UnusableImage) else picture_size(image.content)
            if size is not None and size not in sizes:
                sizes.append(size)
                if len(sizes) > 1:
                    break
    return Preview(len({text for text in rows.labels if text is not None}), sizes)


class _Rows:
    """Label, group and part of every row of the tables.

    Args:
        tables: One, or the training and the test table.
        label: Column of the label.
        groups: What makes the groups.
        split: Column of the part, or None where the second table is the test part.
        name: Of the data, for messages.
    """

    def __init__(self, tables: Sequence[Table], label: str, groups: Groups, split: str | None, name: str) -> None:
        self.image_columns = [image_column(table) for table in tables]
        for table in tables:
            require_columns(table, label)
        named = zip(tables, self.image_columns, strict=True)
        self.metadata = pd.concat([table.metadata(column) for table, column in named], ignore_index=True)
        self.tables, self.columns = tables, (label, groups if isinstance(groups, str) else ",".join(groups))
        self.labels = [name for table in tables for name in table.texts(label)]
        self.groups, self.group_names = self._grouped_by(groups, name)
        if not self.labels:
            raise FairlineError(f"{tables[0]} has no rows.")
        if split is None:
            self.test = [table is not tables[0] for table in tables for _ in table.texts(label)]
        elif split in tables[0].columns:
            self.test = [(part or "").lower() == "test" for part in tables[0].texts(split)]
        else:
            self.test = [False] * len(self.labels)
        self._listed: dict[Path, tuple[str, str]] = {}

    def _grouped_by(self, groups: Groups, name: str) -> tuple[list[str | None], Sequence[str] | None]:
        """The group of each row, and the names in their order where that is not the order of texts."""
        column = groups if isinstance(groups, str) or len(groups) != 1 else groups[0]
        if isinstance(column, str) and (column in self.tables[0].columns or not set(column) & set(",:")):
            for table in self.tables:
                require_columns(table, column)
            return [text for table in self.tables for text in table.texts(column)], None
        cells = cells_of(self.metadata, groups, name, name_missing=False)
        return cells.texts(), cells.names

    def source(self, root: Path) -> Source:
        """What decides which images are decoded. Rows that name one file twice may be refused for what they say."""
        missing = [i for i, row in enumerate(zip(self.labels, self.groups, strict=True)) if None in row]
        named = zip(self.tables, self.image_columns, strict=True)
        paths = [path for table, column in named for path in table.paths(column)]
        rows = [missing] if len(set(paths)) == len(paths) else [missing, self.labels, self.groups]
        files = [*(file for table in self.tables for file in table.files), *paths]
        return Source("folder", root, files, rows, len(self.labels))

    def images(self) -> Iterator[Undecoded]:
        """The image of each row; where the row cannot be used, with the reason."""
        sources = zip(self.tables, self.image_columns, strict=True)
        images = (image for table, column in sources for image in table.images(column))
        for image, label, group in zip(images, self.labels, self.groups, strict=True):
            reason = self._unusable(image, label, group)
            yield image if reason is None else replace(image, content=UnusableImage(reason))

    def _unusable(self, image: Undecoded, label: str | None, group: str | None) -> str | None:
        if label is None or group is None:
            return f"its {self.columns[label is not None]} is empty"
        if not isinstance(image.content, Path):
            return None
        before = self._listed.setdefault(image.content, (label, group))
        if before != (label, group):
            return "is listed before with " + " and ".join(f"'{name}'" for name in dict.fromkeys(before))
        return None

    def grouped(self, decoded: Decoded, name: str, flip: bool) -> GroupedData:
        """The data of the rows whose image could be decoded."""
        labels, class_names = self._indices(self.labels, self.columns[0], decoded)
        groups, group_names = self._indices(self.groups, self.columns[1], decoded, self.group_names)
        test = torch.tensor([self.test[position] for position in decoded.kept])
        return GroupedData(
            decoded.images,
            labels,
            groups,
            class_names,
            group_names,
            name=name,
            flip=flip,
            official_test=test if test.any() else None,
            skipped=tuple(decoded.skipped),
            metadata=self.metadata.iloc[decoded.kept],
        )

    def _indices(
        self, texts: Sequence[str | None], column: str, decoded: Decoded, order: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Index of each decoded row's name, and the names, sorted or in their order."""
        found = [text for text in (texts[position] for position in decoded.kept) if text is not None]
        if order is None:
            index, names = encode(found, f"{self.tables[0]}: column '{column}'")
        else:
            names = tuple(name for name in order if name in set(found))
            index = [names.index(text) for text in found]
        gone = sorted({text for text in texts if text is not None}.difference(names))
        if gone:
            logger.warning("no image of %s '%s' can be used", column, "', '".join(gone))
        return torch.tensor(index), names


def _find(path: Path, metadata: str) -> Table:
    """The table of that name or pattern."""
    if path.is_file():
        csv = path.suffix.lower() in (".csv", ".tsv", ".txt")
        return CsvTable(path, path.parent) if csv else ParquetTable([path], path.parent)
    if metadata == "metadata.csv" and not (path / metadata).exists() and (path / "metadata.parquet").exists():
        metadata = "metadata.parquet"
    if not metadata.lower().endswith(".parquet"):
        return CsvTable(path / metadata, path)
    files = sorted(path.glob(metadata)) if "*" in metadata else [path / metadata]
    if not files or not files[0].exists():
        raise FairlineError(f"{path} holds no {metadata}.")
    return ParquetTable(files, path)


def _warn_of_unlisted(listed: Container[Path], folders: Iterable[Path], tables: Sequence[Table]) -> None:
    """Log how many images lie beside the listed ones without being listed."""
    beside = (file for folder in folders if folder.is_dir() for file in folder.iterdir())
    images = (file for file in beside if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
    unlisted = [file for file in images if file not in listed]
    if unlisted:
        table = " and ".join(map(str, tables))
        logger.warning("%d images are not listed in %s, first %s", len(unlisted), table, min(unlisted))
