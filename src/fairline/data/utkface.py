"""UTKFace (Zhang, Song and Qi 2017): faces whose file name carries age, gender and race."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from fairline.data._images import IMAGE_SUFFIXES, decode, read_files, read_parquet, require_root
from fairline.data.grouped import GroupedData, Skipped
from fairline.errors import FairlineError

logger = logging.getLogger(__name__)

RACES = ("White", "Black", "Asian", "Indian", "Others")
GENDERS = ("male", "female")
#: The paper's bands; ages 0–1 are left out (Section 5).
AGE_BANDS = ((2, 12), (13, 17), (18, 64), (65, 200))
AGES = ("2–12", "13–17", "18–64", "65+")
NAMES = {"age": AGES, "gender": GENDERS, "race": RACES}

# The date is not needed, so its odd forms do not matter.
_FILE_NAME = re.compile(r"^(?P<age>\d{1,3})_(?P<gender>\d)_(?P<race>\d)_")


def parse_name(name: str) -> dict[str, int] | str:
    """Attributes from a file name ``[age]_[gender]_[race]_[date&time].jpg``.

    Returns:
        Class indices by attribute (``age`` is absent for ages 0–1), or why the name cannot be used.
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
    groups: str | None = None,
    image_size: int = 32,
    **options: Any,
) -> GroupedData:
    """Load UTKFace from a parquet table or from a folder of the original JPEGs.

    Args:
        root: A parquet file, or a folder that holds ``utkface*.parquet`` or the JPEGs (at any depth).
        task: What to predict: ``"age"``, ``"race"`` or ``"gender"``.
        groups: What makes the groups, likewise; the label by default.
        image_size: Side in pixels.
        options: None are known.

    Returns:
        Images (N, 3, image_size, image_size). Faces of age 0–1 are left out where age is label or group,
        as in the paper. Files whose name lacks a field are skipped and listed.

    Raises:
        FairlineError: The folder is missing or holds no face, or a task is unknown.
    """
    if options:
        raise FairlineError(f"Data 'utkface' knows no option '{next(iter(options))}'.")
    if task is None:
        raise FairlineError("Data 'utkface' needs a task: utkface:age, utkface:race or utkface:gender.")
    groups = groups or task
    for what, value in (("task", task), ("groups", groups)):
        if value not in NAMES:
            raise FairlineError(f"UTKFace has no {what} '{value}'; choose age, race or gender.")
    path = require_root(root, f"utkface:{task}")
    rows, names = _find(path)

    skipped: list[Skipped] = []
    wanted: list[int] = []
    attributes: list[dict[str, int]] = []
    outside = 0
    for position, name in enumerate(names):
        parsed = parse_name(name)
        if isinstance(parsed, str):
            skipped.append(Skipped(name, parsed))
        elif task not in parsed or groups not in parsed:
            outside += 1
        else:
            wanted.append(position)
            attributes.append(parsed)
    if not wanted:
        raise FairlineError(f"{path} holds no UTKFace image with a usable name ({len(skipped)} skipped).")
    if outside:
        logger.info("utkface: %d faces of age 0–1 are left out", outside)
    images, kept, unreadable = decode([rows[position] for position in wanted], image_size)
    skipped += unreadable
    for item in skipped:
        logger.debug("utkface: skipped %s: %s", item.file, item.reason)
    return GroupedData(
        images,
        torch.tensor([attributes[i][task] for i in kept]),
        torch.tensor([attributes[i][groups] for i in kept]),
        NAMES[task],
        NAMES[groups],
        name=f"utkface:{task}" + ("" if groups == task else f" by {groups}"),
        skipped=tuple(skipped),
    )


def _find(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Undecoded rows and original file names, in an order that does not depend on the file system."""
    tables = [path] if path.is_file() else sorted(path.glob("utkface*.parquet"))
    if tables:
        rows = list(read_parquet(tables))
        return rows, [Path(row["image"]["path"] or "").name for row in rows]
    files = sorted(
        (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES),
        key=lambda file: file.name,
    )
    if not files:
        raise FairlineError(f"{path} holds neither utkface*.parquet nor any image.")
    return list(read_files(files)), [file.name for file in files]
