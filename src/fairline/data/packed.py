"""Data in a folder that :meth:`GroupedData.pack` has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairline.data._groups import Groups
from fairline.data._options import refuse_unknown, require_root
from fairline.data.grouped import GroupedData


def load(
    root: str | Path | None = None, *, task: str | None = None, groups: Groups | None = None, **options: Any
) -> GroupedData:
    """Load packed data, which say themselves what their labels and groups are.

    Args:
        root: The packed folder.
        task: None; there is one task.
        groups: Other groups, as for :meth:`GroupedData.regroup`.
        options: None are known.

    Returns:
        The data; images are read when they are asked for.
    """
    refuse_unknown("packed", options, task)
    data = GroupedData.from_packed(require_root(root, "packed"))
    return data if groups is None else data.regroup(groups)
