"""What long work tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far long work is.

    Attributes:
        stage: What is being done.
        done: Batches done in this stage.
        total: Batches in this stage, at most, or about, where the stage ends by what it reaches; None as long as that
            cannot be told.
        message: Newest numbers, in a few words.
        metrics: Numbers of the epoch that has just ended, by name, ``epoch`` among them; empty in all other reports.
    """

    stage: str
    done: int
    total: int | None
    message: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]


def named_stage(progress: ProgressCallback | None, stage: str) -> ProgressCallback | None:
    """A callback that reports under another stage's name."""
    return None if progress is None else lambda update: progress(replace(update, stage=stage))
