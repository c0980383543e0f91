"""Columns of a table that holds no images, such as predictions."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fairline._io import read_table
from fairline.data._tables import CsvTable
from fairline.errors import FairlineError


def read_columns(file: str | Path) -> pd.DataFrame:
    """All columns of a CSV or parquet file.

    Args:
        file: ``.parquet``, or a CSV in UTF-8 or UTF-16, its cells separated by commas, semicolons or tabs.

    Returns:
        A row a row; cells of a CSV as texts, None where one is empty.

    Raises:
        FairlineError: There is no such file, or it cannot be read.
    """
    path = Path(file)
    if not path.is_file():
        raise FairlineError(f"There is no file {path}.")
    if path.suffix.lower() == ".parquet":
        return read_table(path)
    return CsvTable(path, path.parent).metadata("")
