"""CelebA (Liu et al. 2015) from its official folder: any of 40 attributes as label, any as group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fairline.data._groups import Groups, cells_of
from fairline.data._images import Source, Undecoded, decode
from fairline.data._options import parse_size, refuse_unknown, require_root, require_whole
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

#: Value of the official partition file that means test.
_TEST = 2


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    groups: Groups = "Male",
    image_size: int | tuple[int, int] | str | None = 32,
    crop: int | None = 178,
    pack: bool = False,
    **options: Any,
) -> GroupedData:
    """Load CelebA with its official test split; the official training and validation images are split anew.

    Args:
        root: A folder with ``img_align_celeba/``, ``list_attr_celeba.txt`` and ``list_eval_partition.txt``, or one that
            holds it as ``celeba/``.
        task: The attribute to predict, ``"Smiling"`` by default: ``load("celeba:Blond_Hair", ...)``.
        groups: The attribute that makes the groups, or several, which are intersected: ``"Male,Young"``.
        image_size: Side in pixels, or height and width.
        crop: Side of the centre that is kept of the 178×218 images before they are resized; None keeps all.
        pack: Leave the images in a packed file, even if they fit into memory.
        options: None are known.

    Returns:
        Images (N, 3, H, W); classes ``not ATTRIBUTE`` and ``ATTRIBUTE``, groups likewise.

    Raises:
        FairlineError: A file is missing or not what it should be, or an attribute is unknown.
    """
    refuse_unknown("celeba", options)
    size = parse_size(image_size, "celeba")
    crop = None if crop is None else require_whole(crop, "crop", "celeba", least=1)
    path = require_root(root, "celeba")
    path = path / "celeba" if (path / "celeba").is_dir() else path
    label = task or "Smiling"
    attributes = _read_attributes(path / "list_attr_celeba.txt")
    parts = ",".join([groups] if isinstance(groups, str) else groups).replace(" ", "").split(",")
    for name in (label, *parts):
        if name not in attributes:
            raise FairlineError(f"CelebA has no attribute '{name}'; choose one of {', '.join(attributes.columns)}.")
    partition = _read_partition(path / "list_eval_partition.txt", attributes.index)
    files = [path / "img_align_celeba" / name for name in attributes.index]
    images = (Undecoded(file.name, file) for file in files)
    decoded = decode(images, size, Source("celeba", path, files, None, len(files)), crop=crop, pack=pack)
    table = attributes.iloc[decoded.kept]
    metadata = _metadata(table)
    crossed = cells_of(metadata, groups, f"celeba:{label}") if len(parts) > 1 else None
    index, group_names = _sides(table, parts[0]) if crossed is None else (crossed.index, crossed.names)
    labels, class_names = _sides(table, label)
    return GroupedData(
        decoded.images,
        torch.from_numpy(labels),
        torch.from_numpy(index),
        class_names,
        group_names,
        name=f"celeba:{label}",
        official_test=torch.from_numpy((partition[table.index].to_numpy() == _TEST).copy()),
        skipped=tuple(decoded.skipped),
        metadata=metadata,
    )


def _sides(table: pd.DataFrame, name: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Without an attribute and with it: the index of each image, and the names."""
    return (table[name].to_numpy() > 0).astype(np.int64), (f"not {name}", name)


def _metadata(table: pd.DataFrame) -> pd.DataFrame:
    """The attributes as names."""
    columns = {
        name: pd.Categorical.from_codes((table[name].to_numpy() > 0).astype("int8"), [f"not {name}", str(name)])
        for name in table.columns
    }
    return pd.DataFrame({"file_name": list(map(str, table.index)), **columns})


def _read_attributes(file: Path) -> pd.DataFrame:
    """±1 for each image and attribute, indexed by file name. The file's first line is the number of images."""
    try:
        table = pd.read_csv(file, sep=r"\s+", skiprows=1, index_col=0)
        values = table.astype(int)
    except FileNotFoundError:
        raise FairlineError(f"{file} does not exist.") from None
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise FairlineError(f"{file} is not CelebA's list of attributes ({str(error).strip()}).") from None
    if values.empty or not values.isin([-1, 1]).all(axis=None):
        raise FairlineError(f"{file} is not CelebA's list of attributes (values other than 1 and -1).")
    return values


def _read_partition(file: Path, names: pd.Index[Any]) -> pd.Series[int]:
    """0 training, 1 validation, 2 test, indexed by file name; ``names`` must be among them."""
    try:
        table = pd.read_csv(file, sep=r"\s+", header=None, index_col=0)
        partition = table.iloc[:, 0].astype(int)
    except FileNotFoundError:
        raise FairlineError(f"{file} does not exist.") from None
    except (ValueError, IndexError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise FairlineError(f"{file} is not CelebA's partition ({str(error).strip()}).") from None
    missing = names.difference(partition.index)
    if len(missing):
        raise FairlineError(f"{file} lacks {missing[0]} and {len(missing) - 1} more.")
    return partition
