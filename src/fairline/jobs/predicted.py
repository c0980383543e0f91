"""The job of ``fairline audit --predictions``: predictions in a file, in place of networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline._io import write_table
from fairline.audit import AuditReport
from fairline.audit.predicted import audit_predictions
from fairline.data import Groups
from fairline.data.columns import read_columns
from fairline.errors import FairlineError
from fairline.jobs._common import do_once
from fairline.runs import Run, digest

#: Ends the name of columns that hold a probability each, and stands for the names of their classes.
EACH_CLASS = "*"


def audit_predictions_job(
    file: str | Path,
    out: str | Path,
    *,
    label: str = "label",
    prediction: str = "prediction",
    reference: str | None = None,
    groups: Groups = "group",
    resamples: int = 2000,
    seed: int = 0,
) -> Run:
    """Audit predictions in a table by group, into ``out``.

    Args:
        file: CSV or parquet, a row a sample.
        out: The run folder.
        label: Column of the classes.
        prediction: Column of the predicted classes, or ``PREFIX*``: columns of probabilities, ``PREFIX`` before the
            name of each class.
        reference: The same of what is compared with; nothing by default.
        groups: What makes the groups: a column, bins of a number, or several, which are intersected.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        The run: ``audit.parquet``, ``predictions.parquet``.

    Raises:
        FairlineError: The file cannot be read, a column is missing, or what it holds is no prediction.
    """
    report = _report(file, label, prediction, reference, groups, resamples, seed)
    config: dict[str, Any] = {
        "predictions": {"file": str(file), "digest": digest([Path(file)])},
        "label": label,
        "prediction": prediction,
        "reference": reference,
        "groups": groups,
        "resamples": resamples,
        "seed": seed,
    }

    def work(run: Run) -> None:
        write_table(run.folder / "predictions.parquet", report.predictions)
        write_table(run.folder / "audit.parquet", report.to_frame())

    return do_once(out, "audit-predictions", config, torch.device("cpu"), work)


def _report(
    file: str | Path,
    label: str,
    prediction: str,
    reference: str | None,
    groups: Groups,
    resamples: int,
    seed: int,
) -> AuditReport:
    table = read_columns(file)
    truth, own = (_columns(table, file, each) for each in (label, prediction))
    before = None if reference is None else _columns(table, file, reference)
    if isinstance(truth, pd.DataFrame):
        raise FairlineError(f"--label is one column, not '{label}'.")
    # What was predicted makes no groups.
    used = {column for each in (own, before) if each is not None for column in _names(each)} - {label}
    return audit_predictions(
        truth,
        _of_classes(own, prediction),
        table[[column for column in table if column not in used]],
        None if before is None or reference is None else _of_classes(before, reference),
        by=groups,
        name=Path(file).stem,
        seed=seed,
        resamples=resamples,
    )


def _columns(table: pd.DataFrame, file: str | Path, name: str) -> pd.Series[Any] | pd.DataFrame:
    """One column, or all that begin as it does."""
    columns = list(map(str, table.columns))
    if not name.endswith(EACH_CLASS):
        if name not in columns:
            raise FairlineError(f"{file} has no column '{name}'; its columns are {', '.join(columns)}.")
        return table[name]
    prefix = name.removesuffix(EACH_CLASS)
    found = [column for column in columns if column.startswith(prefix) and column != prefix]
    if len(found) < 2:
        raise FairlineError(f"{file} has no two columns '{name}'; its columns are {', '.join(columns)}.")
    return table[found]


def _names(columns: pd.Series[Any] | pd.DataFrame) -> Sequence[Any]:
    return list(columns) if isinstance(columns, pd.DataFrame) else [columns.name]


def _of_classes(columns: pd.Series[Any] | pd.DataFrame, name: str) -> pd.Series[Any] | pd.DataFrame:
    """Probabilities under the names of their classes."""
    if not isinstance(columns, pd.DataFrame):
        return columns
    prefix = name.removesuffix(EACH_CLASS)
    return columns.rename(columns=lambda column: str(column).removeprefix(prefix))


__all__ = ["audit_predictions_job"]
