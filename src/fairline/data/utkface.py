"""UTKFace (Zhang, Song and Qi 2017): faces whose file name carries age, gender and race."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline.data._groups import Groups, cells_of, parse_groups
from fairline.data._images import IMAGE_SUFFIXES, Source, Undecoded, decode
from fairline.data._options import parse_size, refuse_unknown, require_root
from fairline.data._tables import ParquetTable, image_column
from fairline.data.decoding import UnusableImage
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

logger = logging.getLogger(__name__)

RACES = ("White", "Black", "Asian", "Indian", "Others")
GENDERS = ("male", "female")
#: The paper's bands; ages 0–1 are left out (Section 5).
AGE_BANDS = ((2, 12), (13, 17), (18, 64), (65, 200))
AGES = ("2–12", "13–17", "18–64", "65+")
NAMES = {"age": AGES, "gender": GENDERS, "race": RACES}
#: Those bands for groups of all ages.
AGE_BINS = "0-1,2-12,13-17,18-64,65+"

# The date is not needed, so its odd forms do not matter.
_FILE_NAME = re.compile(r"^(?P<age>\d{1,3})_(?P<gender>\d)_(?P<race>\d)_")


def parse_name(name: str) -> dict[str, int] | str:
    """Attributes from a file name ``[age]_[gender]_[race]_[date&time].jpg``.

    Returns:
        Class indices by attribute (``age`` is absent for ages 0–1), or why the name cannot be used.

    >>> parse_name("26_1_2_20170104023102422.jpg")
    {'gender': 1, 'race': 2, 'age': 2}
    """
    match = _FILE_NAME.match(name)
    if match is None:
        return "name is not age_gender_race_datetime"
    age, gender, race = (int(match[field]) for field in ("age", "gender", "race"))
    if gender >= len(GENDERS):
        return f"gender {gender} is unknown"
    if race >= len(RACES):
        return f"race {race} is unknown"
    found = {"gender": gender, "race": race}
    for index, (low, high) in enumerate(AGE_BANDS):
        if low <= age <= high:
            found["age"] = index
    return found


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    groups: Groups | None = None,
    image_size: int | tuple[int, int] | str | None = 32,
    pack: bool = False,
    **options: Any,
) -> GroupedData:
    """Load UTKFace from a parquet table or from a folder of the original JPEGs.

    Args:
        root: A parquet file, or a folder that holds ``utkface*.parquet`` or the JPEGs (at any depth).
        task: What to predict: ``"age"``, ``"race"`` or ``"gender"``.
        groups: What makes the groups, likewise, or bins of the age and intersections, as for
            :meth:`GroupedData.regroup`: ``"race,age:0-17,18+"``. The label by default; ``"age"`` are the paper's bands.
        image_size: Side in pixels, or height and width.
        pack: Leave the images in a packed file, even if they fit into memory.
        options: None are known.

    Returns:
        Images (N, 3, H, W). Faces of age 0–1 are left out where age is label or group,
        as in the paper, unless the group names its own bins. Files whose name lacks a field are skipped and listed.

    Raises:
        FairlineError: The folder is missing or holds no face, or a task is unknown.
    """
    refuse_unknown("utkface", options)
    task = _known(task)
    groups = groups or task
    named, plain = _grouped_by(groups)
    size = parse_size(image_size, "utkface")
    path = require_root(root, f"utkface:{task}")
    names, images, files = _find(path)
    parsed = [parse_name(name) for name in names]
    left_out = [isinstance(found, dict) and not {task, *plain} <= found.keys() for found in parsed]
    if any(left_out):
        logger.info("utkface: %d faces of age 0–1 are left out", sum(left_out))
    wanted = [found for found, out in zip(parsed, left_out, strict=True) if not out]
    if not any(isinstance(found, dict) for found in wanted):
        raise FairlineError(f"{path} holds no UTKFace image with a usable name ({len(wanted)} skipped).")
    # What else a name says of a face does not decide whether it is decoded, so tasks share packed images.
    source = Source("utkface", path, files, [i for i, out in enumerate(left_out) if out], len(wanted))
    decoded = decode(_named(images, parsed, left_out), size, source, pack=pack)
    attributes = [found for found in (wanted[position] for position in decoded.kept) if isinstance(found, dict)]
    left = [name for name, out in zip(names, left_out, strict=True) if not out]
    table = _metadata([left[position] for position in decoded.kept], attributes)
    index, group_names = _index(table, groups, attributes, plain if len(named) == 1 else [])
    return GroupedData(
        decoded.images,
        torch.tensor([found[task] for found in attributes]),
        index,
        NAMES[task],
        group_names,
        name=f"utkface:{task}" + ("" if named == plain == [task] else f" by {' × '.join(named)}"),
        skipped=tuple(decoded.skipped),
        metadata=table,
        bins={"age": AGE_BINS},
    )


def _known(task: str | None) -> str:
    if task is None:
        raise FairlineError("Data 'utkface' needs a task: utkface:age, utkface:race or utkface:gender.")
    if task not in NAMES:
        raise FairlineError(f"UTKFace has no task '{task}'; choose age, race or gender.")
    return task


def _index(
    table: pd.DataFrame, groups: Groups, attributes: Sequence[dict[str, int]], alone: Sequence[str]
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The group of each face, and the groups' names: of an attribute that stands alone all that there may be."""
    if alone:
        return torch.tensor([found[alone[0]] for found in attributes]), NAMES[alone[0]]
    cells = cells_of(table, groups, "UTKFace", {"age": AGE_BINS})
    return torch.from_numpy(cells.index), cells.names


def _grouped_by(groups: Groups) -> tuple[list[str], list[str]]:
    """The attributes that make the groups, and those of them that are named without bins."""
    if isinstance(groups, str) and groups not in NAMES and not set(groups) & set(",:"):
        raise FairlineError(f"UTKFace has no groups '{groups}'; choose age, race or gender.")
    parts = parse_groups(groups, list(NAMES), "UTKFace")
    return [part.name for part in parts], [part.name for part in parts if not part.bins]


def _metadata(names: Sequence[str], attributes: Sequence[dict[str, int]]) -> pd.DataFrame:
    """What the names of faces say."""
    coded = {
        field: pd.Categorical.from_codes([found[field] for found in attributes], list(NAMES[field]))
        for field in ("gender", "race")
    }
    return pd.DataFrame({"file_name": list(names), "age": [int(name.partition("_")[0]) for name in names], **coded})


def _named(
    images: Iterable[Undecoded], parsed: Sequence[dict[str, int] | str], left_out: Sequence[bool]
) -> Iterator[Undecoded]:
    """The images that are not left out, each with the reason where its name cannot be used."""
    for image, found, out in zip(images, parsed, left_out, strict=True):
        if not out:
            yield replace(image, content=UnusableImage(found)) if isinstance(found, str) else image


def _find(path: Path) -> tuple[list[str], Iterable[Undecoded], list[Path]]:
    """File names, images and the files that hold them, in an order that does not depend on the file system."""
    tables = [path] if path.is_file() else sorted(path.glob("utkface*.parquet"))
    if tables:
        table = ParquetTable(tables, path if path.is_dir() else path.parent)
        column = image_column(table)
        return [Path(name).name for name in table.image_names(column)], table.images(column), tables
    files = sorted(
        (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES), key=lambda file: (file.name, file)
    )
    if not files:
        raise FairlineError(f"{path} holds neither utkface*.parquet nor any image.")
    return [file.name for file in files], (Undecoded(file.name, file) for file in files), files
