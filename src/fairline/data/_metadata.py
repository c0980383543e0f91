"""What is known of each image beside its label and group: a table, also beside packed images. No source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fairline._io import atomic_path
from fairline.errors import FairlineError

METADATA = "metadata.parquet"

#: The column that every image has, where nothing else is known of it: its number.
ROW = "row"


def described(table: pd.DataFrame | Mapping[str, Any] | None, n: int, where: str) -> pd.DataFrame:
    """A table of as many rows as there are images.

    Args:
        table: A table or a mapping of arrays; of neither columns nor rows where nothing is known.
        n: How many images there are.
        where: What they are of, for messages.

    Returns:
        The table, its rows numbered from 0.

    Raises:
        FairlineError: It has another number of rows, or two columns of one name.
    """
    known: pd.DataFrame = table if isinstance(table, pd.DataFrame) else _table(table or {}, where)
    if not len(known.columns):
        return pd.DataFrame({ROW: np.arange(n)})
    if len(known) != n:
        raise FairlineError(f"{where}: the metadata have {len(known)} rows, but there are {n} images.")
    names = [str(name) for name in known.columns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FairlineError(f"{where}: the metadata have the column '{twice}' twice.")
    return known.set_axis(names, axis=1).reset_index(drop=True)


def _table(arrays: Mapping[str, Any], where: str) -> pd.DataFrame:
    try:
        return pd.DataFrame({name: np.asarray(own) if hasattr(own, "shape") else own for name, own in arrays.items()})
    except ValueError as error:
        raise FairlineError(f"{where}: the metadata are no table ({error}).") from None


def write_metadata(folder: Path, table: pd.DataFrame) -> None:
    """Put a table beside packed images.

    Args:
        folder: The packed folder.
        table: A row an image.

    Raises:
        FairlineError: Another table is there, or the folder cannot be written.
    """
    before = read_metadata(folder, len(table))
    if described(before, len(table), str(folder)).astype(str).equals(table.astype(str)):
        return
    if before is not None:
        raise FairlineError(f"{folder} holds these images with other metadata; take another folder, or delete it.")
    with atomic_path(folder / METADATA) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)


def read_metadata(folder: Path, n: int) -> pd.DataFrame | None:
    """The table beside packed images.

    Args:
        folder: The packed folder.
        n: How many images it holds.

    Returns:
        The table, or None where there is none.

    Raises:
        FairlineError: It is damaged.
    """
    file = folder / METADATA
    if not file.exists():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: pd.DataFrame = pq.read_table(file, page_checksum_verification=True).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairlineError(f"{file} is damaged ({reason}); delete the folder and pack the images again.") from None
    if len(table) != n:
        raise FairlineError(f"{file} is damaged: it has {len(table)} rows, not {n}; pack the images again.")
    return table
