"""Settings for ``fairline linearize --quick``, from what a train run says of its data and network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairline import linearize as linearizers
from fairline._io import resolve_device
from fairline.errors import FairlineError
from fairline.jobs._common import load_base, load_parts
from fairline.linearize.quick import Quick, quick
from fairline.runs import Run


def quick_settings(
    source: str | Path,
    budgets: Sequence[float],
    method: str = "snl",
    given: Mapping[str, Any] | None = None,
    *,
    root: str | None = None,
    device: str | None = None,
) -> Quick:
    """Propose settings under which :func:`~fairline.jobs.linearize_job` reaches its budgets in a few epochs.

    Args:
        source: A train run.
        budgets: As for that job.
        method: As there; SNL.
        given: Settings that were given, and are kept.
        root: Where the data are now, if they have moved.
        device: Where it will run.

    Returns:
        The proposal; its settings are given to the job like any others.

    Raises:
        FairlineError: The method is another.
    """
    if method != "snl":
        raise FairlineError(f"Quick settings are known for snl, not for '{method}'.")
    run = Run.read(source, "train")
    _, info = load_base(run)
    kept = linearizers.resolve_budgets(budgets, info.total)
    images = len(load_parts(run, root)["train"])
    accelerator = resolve_device(device).type != "cpu"
    return quick(images, info.total, kept, accelerator=accelerator, **(given or {}))
