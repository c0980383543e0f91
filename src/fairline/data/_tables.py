"""Tables of images: CSV and parquet files, read as they are written."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fairline.data._images import IMAGE_SUFFIXES, Undecoded
from fairline.data._names import BadCell, cell_text
from fairline.data.decoding import UnusableImage, first_line, to_uint8
from fairline.errors import FairlineError

_DELIMITERS = (",", ";", "\t")

#: What the column of the images' names is called where they lie in the table.
FILE_NAME = "file_name"

#: Rows of a parquet file that are read at once.
_ROWS = 16


class Table(Protocol):
    """Rows of images, each with texts in named columns."""

    #: What the column of images may be called; the first that is there.
    image_columns: ClassVar[tuple[str, ...]]

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns."""

    def texts(self, column: str) -> list[str | None]:
        """The cells of a column as names, None where one is missing."""

    def images(self, column: str) -> Iterator[Undecoded]:
        """The image of each row."""

    def paths(self, column: str) -> list[Path]:
        """The image files that the column names."""

    def metadata(self, column: str) -> pd.DataFrame:
        """All columns that hold no image, and the file name of the images of ``column``; a row an image."""

    @property
    def files(self) -> Sequence[Path]:
        """The table's own files."""

    def __str__(self) -> str:
        """The files, for messages."""


def require_columns(table: Table, *columns: str) -> None:
    """Refuse a table that lacks one of the columns, or has it twice.

    Raises:
        FairlineError: Names the column.
    """
    for column in columns:
        if column not in table.columns:
            raise FairlineError(f"{table} has no column '{column}'; its columns are {', '.join(table.columns)}.")
        if list(table.columns).count(column) > 1:
            raise FairlineError(f"{table} has the column '{column}' twice.")


def image_column(table: Table) -> str:
    """The column of images.

    Args:
        table: Where to look.

    Returns:
        The first of the table's ``image_columns`` that is there.

    Raises:
        FairlineError: There is none, or it is there twice.
    """
    column = next((name for name in table.image_columns if name in table.columns), table.image_columns[0])
    if column not in table.columns and any(name.lower().endswith(IMAGE_SUFFIXES) for name in table.columns):
        raise FairlineError(f"{table} has no header; its first line must name the columns, '{column}' among them.")
    require_columns(table, column)
    return column


class CsvTable:
    """A CSV file that names image files: in UTF-8 or UTF-16, its cells separated by commas, semicolons or tabs.

    Args:
        file: The CSV.
        folder: What the names of images are relative to.

    Raises:
        FairlineError: The file is missing, or no such CSV.
    """

    image_columns: ClassVar[tuple[str, ...]] = ("file_name", "file", "image", "img")

    def __init__(self, file: Path, folder: Path) -> None:
        self.file, self.files, self.folder = file, [file], folder
        if not file.is_file():
            raise FairlineError(f"{file.parent} holds no {file.name}.")
        try:
            text = _decode(file.read_bytes())
            self.columns, self._rows = _parse(text)
        except (UnicodeDecodeError, csv.Error) as error:
            raise FairlineError(f"{file} is not a readable CSV ({first_line(error)}).") from None

    def texts(self, column: str) -> list[str | None]:
        """The cells of a column as names, None where one is empty."""
        position = self.columns.index(column)
        return [cell_text(row[position]) for _, row in self._rows]

    def images(self, column: str) -> Iterator[Undecoded]:
        """The image file of each row."""
        position = self.columns.index(column)
        for line, row in self._rows:
            yield _undecoded(row[position], self.folder, f"line {line} of {self.file.name}")

    def paths(self, column: str) -> list[Path]:
        """The image file of each row that names one."""
        return [image.content for image in self.images(column) if isinstance(image.content, Path)]

    def metadata(self, column: str) -> pd.DataFrame:
        """All columns as texts, that of the image files among them."""
        names = [name for name in self.columns if name and self.columns.count(name) == 1]
        return pd.DataFrame({name: pd.Series(self.texts(name), dtype="str") for name in names})

    def __str__(self) -> str:
        return str(self.file)


class ParquetTable:
    """Parquet files with the same columns, read a row group at a time at most.

    Images are encoded bytes, paths, both in a struct (as Hugging Face writes them), or pixels (H, W), (H, W, C) or
    (C, H, W).

    Args:
        files: In order.
        folder: What paths of images are relative to.

    Raises:
        FairlineError: A file is not parquet.
    """

    image_columns: ClassVar[tuple[str, ...]] = ("image", "img", "file_name", "file")

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files, self.folder = files, folder
        self._schemas = [self._schema(file) for file in files]

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns that all files have."""
        return [name for name in self._schemas[0].names if all(name in schema.names for schema in self._schemas)]

    def cells(self, column: str) -> Iterator[tuple[str, Any]]:
        """Where each cell of a column stands (row and file), and what it holds."""
        for file in self.files:
            try:
                with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as opened:
                    batches = opened.iter_batches(_ROWS, columns=[column])
                    cells = (cell for batch in batches for cell in batch.column(0).to_pylist())
                    for row, cell in enumerate(cells, start=1):
                        yield f"row {row} of {file.name}", cell
            except (pa.ArrowException, OSError) as error:
                raise FairlineError(f"{file} is not a readable parquet file ({first_line(error)}).") from None

    def texts(self, column: str) -> list[str | None]:
        """The cells of a column as names; class labels of Hugging Face by theirs.

        Args:
            column: Its name.

        Returns:
            A name a row, None where it is missing.

        Raises:
            FairlineError: A cell holds several values.
        """
        names = _class_labels(self._schemas[0], column)
        texts = []
        for where, cell in self.cells(column):
            try:
                known = isinstance(cell, int) and 0 <= cell < len(names)
                texts.append(cell_text(names[cell] if known else cell))
            except BadCell as error:
                raise FairlineError(f"{where}: column '{column}' is {error}.") from None
        return texts

    def images(self, column: str) -> Iterator[Undecoded]:
        """The image of each row."""
        for where, cell in self.cells(column):
            yield _undecoded(cell, self.folder, where)

    def paths(self, column: str) -> list[Path]:
        """The image file of each row that names one, whether or not the table holds the image as well."""
        kind = self._schemas[0].field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            column = f"{column}.path"
        elif not _is_text(kind):
            return []
        cells = (cell.get("path") if isinstance(cell, dict) else cell for _, cell in self.cells(column))
        located = (locate(self.folder, cell) for cell in cells if isinstance(cell, str) and cell.strip())
        return [path for path in located if isinstance(path, Path)]

    def image_names(self, column: str) -> list[str]:
        """What the image of each row is called, without reading the images."""
        kind = self._schemas[0].field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            return [_name((cell or {}).get("path"), where) for where, cell in self.cells(f"{column}.path")]
        return [image.name for image in self.images(column)]

    def metadata(self, column: str) -> pd.DataFrame:
        """All columns of one value a row, class labels of Hugging Face as names, and the images' ``file_name``."""
        plain = [name for name in self.columns if _is_plain(self._schemas[0].field(name).type)]
        kept = [name for name in plain if name != column and self.columns.count(name) == 1]
        tables = []
        for file, schema in zip(self.files, self._schemas, strict=True):
            try:
                table = pq.read_table(file, columns=kept).to_pandas(integer_object_nulls=True)
            except (pa.ArrowException, OSError) as error:
                raise FairlineError(f"{file} is not a readable parquet file ({first_line(error)}).") from None
            for name in kept:
                known = dict(enumerate(_class_labels(schema, name)))
                table[name] = table[name].map(known) if known else table[name]
            tables.append(table)
        names = {} if FILE_NAME in kept else {FILE_NAME: self.file_names(column)}
        return pd.DataFrame({**names, **pd.concat(tables, ignore_index=True)})

    def file_names(self, column: str) -> list[str]:
        """As :meth:`image_names`, without reading images that have no other name than their row."""
        kind = self._schemas[0].field(column).type
        if _is_text(kind) or (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0):
            return self.image_names(column)
        rows = [pq.read_metadata(file).num_rows for file in self.files]
        return [
            f"row {row} of {file.name}" for file, n in zip(self.files, rows, strict=True) for row in range(1, n + 1)
        ]

    def __str__(self) -> str:
        return ", ".join(map(str, self.files))

    def _schema(self, file: Path) -> pa.Schema:
        try:
            return pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise FairlineError(f"{file} is not a readable parquet file ({first_line(error)}).") from None


def locate(folder: Path, written: str) -> Path | UnusableImage:
    """The file in a folder that a table names, also with backslashes or in another form of Unicode.

    Args:
        folder: What the name is relative to; links inside it may lead elsewhere.
        written: The name; absolute ones must lie in the folder as well.

    Returns:
        The file, which may not exist, or why it is not to be read.
    """
    root = Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would follow links)
    portable = written.strip().replace("\\", "/")
    spellings = [written, *(unicodedata.normalize(form, portable) for form in ("NFC", "NFD"))]
    paths = [Path(os.path.abspath(root / spelling)) for spelling in spellings]  # noqa: PTH100
    if not all(path.is_relative_to(root) for path in paths):
        return UnusableImage(f"lies outside of {folder}")
    return next((path for path in paths if os.path.exists(path)), paths[1])  # noqa: PTH110 (false for odd names)


def _decode(raw: bytes) -> str:
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if utf16 else "utf-8-sig")


def _parse(text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with its line number; rows are as long as the header."""
    first = text.lstrip().splitlines()[:1]
    if not first:
        raise csv.Error("it is empty")
    delimiter = max(_DELIMITERS, key=lambda delimiter: len(next(csv.reader(first, delimiter=delimiter))))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] = []
    rows = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not columns:
                columns = [name.strip() for name in row]
                continue
            if any(cell.strip() for cell in row[len(columns) :]):
                raise csv.Error(f"{len(row)} cells, but the header has {len(columns)}; names with commas need quotes")
            rows.append((reader.line_num, row[: len(columns)] + [""] * (len(columns) - len(row))))
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None
    return columns, rows


def _undecoded(cell: Any, folder: Path, where: str) -> Undecoded:
    """The image that a cell holds or names."""
    path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    name = _name(path, where)
    if isinstance(content, list):
        return Undecoded(name, _pixels(content))
    if isinstance(content, bytes):
        return Undecoded(name, content)
    if isinstance(path, str) and path.strip():
        return Undecoded(name, locate(folder, path))
    known = cell is None or isinstance(cell, dict | str)
    return Undecoded(name, UnusableImage("there is no image" if known else f"{cell!r} is no image"))


def _name(path: Any, where: str) -> str:
    return path.strip() if isinstance(path, str) and path.strip() else where


def _pixels(rows: list[Any]) -> np.ndarray[Any, np.dtype[np.uint8]] | UnusableImage:
    """Nested lists as pixels (H, W, C)."""
    try:
        array = np.asarray(rows)
    except ValueError:
        return UnusableImage("is no array: its rows differ in length")
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)
    channels_first = array.ndim == 3 and array.shape[2] > 4 >= array.shape[0]
    try:
        return to_uint8(torch.from_numpy(array) if channels_first else array).permute(1, 2, 0).numpy()
    except UnusableImage as error:
        return error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_plain(kind: pa.DataType) -> bool:
    """Whether a cell is one value that a person would read."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return not (pa.types.is_nested(kind) or "binary" in str(kind) or pa.types.is_null(kind))


def _class_labels(schema: pa.Schema, column: str) -> list[str]:
    """Names of a Hugging Face ``ClassLabel``, none for other columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column].get("names") or []]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
