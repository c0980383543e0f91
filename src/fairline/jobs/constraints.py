"""What constraints on groups still lack after a finetune, on the images that it trains on and on those held out."""

from __future__ import annotations

import re

import pandas as pd

from fairline.runs import Run
from fairline.training import DEFAULTS, best_epoch

_COLUMNS = ["network", "group", "measure", "value"]

#: Columns that :meth:`fairline.objectives.constrained.Constrained.columns` logs, one a group.
_LOGGED = re.compile(r"(lambda|train_violation|val_violation)\[(.+)\]")


def constraints(run: Run) -> pd.DataFrame:
    """The violations and multipliers of each network of a finetune run, after the epoch whose weights it keeps.

    Args:
        run: Any; of another job, or under an objective without multipliers, it has none.

    Returns:
        ``network``, ``group``, ``measure`` (``train_violation``, ``val_violation`` or ``lambda``) and ``value``, in the
        unit of the objective's ρ.
    """
    if run.command != "finetune":
        return pd.DataFrame(columns=_COLUMNS)
    logged = run.table("metrics.parquet")
    select = run.config["settings"].get("select", DEFAULTS["select"])
    rows = []
    for network, own in logged.groupby("network", sort=False):
        epochs = [
            {str(name): float(value) for name, value in row.items()}
            for row in own.drop(columns="network").to_dict("records")
        ]
        kept = epochs[best_epoch(epochs, select)]
        for name, value in kept.items():
            if found := _LOGGED.fullmatch(name):
                rows.append({"network": network, "group": found[2], "measure": found[1], "value": value})
    return pd.DataFrame(rows, columns=_COLUMNS)


__all__ = ["constraints"]
