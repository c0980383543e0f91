"""What jobs that train under an objective share: how it is known, and its trial where it is the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fairline import objectives
from fairline._own import files, identity
from fairline.data import Groups
from fairline.data.grouped import GroupedData
from fairline.jobs._common import parts_once
from fairline.objectives.constrained import Constrained
from fairline.ranks import here
from fairline.runs import Run


def known_by(objective: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's config says of an objective: its name and options, and what the user's own code says."""
    code = files(objective)
    named = {"objective": identity(objective), "objective_options": dict(options)}
    return {**named, "code": code} if code else named


def uses_groups(objective: objectives.Objective) -> bool:
    """Whether an objective tells groups apart; of the user's own, whether it is derived from one that does."""
    return isinstance(objective, Constrained | objectives.GroupDRO) or getattr(objective, "by", None) == "group"


def tried_on(
    parent: Run,
    root: str | None,
    out: str | Path,
    objective: str,
    options: Mapping[str, Any],
    groups: Groups | None = None,
) -> Callable[[], dict[str, GroupedData]]:
    """Refuse an objective of the user's own that is not whole, before its run folder is made.

    Args:
        parent: The run whose data it is tried on.
        root: Where they are now, if they have moved.
        out: The run folder; of a finished run nothing is tried.
        objective: As for :func:`fairline.objectives.build`.
        options: Of its constructor.
        groups: Other groups than those that the parent was made for.

    Returns:
        Gives the parts of the data, which are loaded once, when they are asked for.
    """
    parts = parts_once(parent, root, groups)
    if not Run(out).finished:
        # Of several processes the first writes, so it tries what a checkpoint keeps; all are told.
        here().first(lambda: objectives.try_on(objective, options, lambda: parts()["train"]))
    return parts
