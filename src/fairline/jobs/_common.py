"""What several jobs share."""

from __future__ import annotations

from dataclasses import replace

from fairline.errors import FairlineError
from fairline.runs import (
    DataSpec,
    Run,
)

#: Commands whose runs hold linearized networks.
STUDENTS = ("linearize", "finetune", "last-layer")


def require_split(split: str) -> None:
    """Refuse a part that data do not have.

    Raises:
        FairlineError: It is none of the three.
    """
    if split not in ("train", "val", "test"):
        raise FairlineError(f"The split is train, val or test, not '{split}'.")


def data_of(run: Run, root: str | None) -> DataSpec:
    """The run's data, from another folder if they have moved."""
    return run.data if root is None else replace(run.data, root=root)
