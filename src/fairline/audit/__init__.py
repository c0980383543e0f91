"""Measurements of a model, group by group. ``audit(model, data, reference)`` returns an :class:`AuditReport`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from fairline._io import atomic_path, resolve_device
from fairline.audit.base import Row, Subject
from fairline.data.grouped import OVERALL, GroupedData
from fairline.errors import FairlineError

#: Measure → module with ``measure(subject) -> list[Row]``.
REGISTRY: dict[str, str] = {"accuracy": "fairline.audit.accuracy"}

COLUMNS = ["model", "split", "group", "measure", "value", "low", "high", "n"]


@dataclass(frozen=True, eq=False)
class AuditReport:
    """The numbers of one model on one split.

    Attributes:
        frame: Tidy: one row a (model, split, group, measure), columns ``value``, ``low``, ``high`` (95 % limits,
            NaN where a measure has none) and ``n``.
        predictions: One row a sample: ``index``, ``label``, ``group``, ``prediction``, ``correct``, ``loss``, and
            ``reference_correct`` where there is a reference.
    """

    frame: pd.DataFrame
    predictions: pd.DataFrame

    @property
    def by_group(self) -> pd.DataFrame:
        """One row a group; columns ``n`` and the measures, with ``_low`` and ``_high`` where they have limits."""
        return _wide(self.frame[self.frame["group"] != OVERALL])

    @property
    def overall(self) -> pd.Series[Any]:
        """The same columns for all samples together."""
        per_group = set(self.frame.loc[self.frame["group"] != OVERALL, "measure"])
        rows = self.frame[(self.frame["group"] == OVERALL) & self.frame["measure"].isin(per_group)]
        return _wide(rows).loc[OVERALL]

    @property
    def gaps(self) -> pd.DataFrame:
        """What compares groups, one row a measure: ``value``, ``low``, ``high``, and the ``group`` meant.

        ``accuracy_gap`` names the worst and best group; ``worst_group_accuracy`` the worst.
        """
        per_group = set(self.frame.loc[self.frame["group"] != OVERALL, "measure"])
        rows = self.frame[(self.frame["group"] == OVERALL) & ~self.frame["measure"].isin(per_group)]
        table = rows.set_index("measure")[["value", "low", "high"]]
        named = {}
        if "accuracy" in per_group:
            accuracy = self.by_group["accuracy"]
            named = {
                "accuracy_gap": f"{accuracy.idxmin()} to {accuracy.idxmax()}",
                "worst_group_accuracy": str(accuracy.idxmin()),
            }
        if "relative_drop" in per_group:
            drop = self.by_group["relative_drop"]
            if drop.notna().any():
                named["relative_drop_gap"] = f"{drop.idxmin()} to {drop.idxmax()}"
        return table.assign(group=[named.get(str(name), "") for name in table.index])

    def to_frame(self) -> pd.DataFrame:
        """The tidy table."""
        return self.frame.copy()

    def to_parquet(self, path: str | Path) -> None:
        """Write the tidy table atomically."""
        with atomic_path(path) as temporary:
            self.frame.to_parquet(temporary, index=False)


def _wide(rows: pd.DataFrame) -> pd.DataFrame:
    order = list(dict.fromkeys(rows["group"]))
    wide = pd.DataFrame({"n": rows.groupby("group", sort=False)["n"].max()}, index=pd.Index(order, name="group"))
    for name, part in rows.groupby("measure", sort=False):
        indexed = part.set_index("group")
        wide[str(name)] = indexed["value"]
        if indexed[["low", "high"]].notna().any(axis=None):
            wide[f"{name}_low"] = indexed["low"]
            wide[f"{name}_high"] = indexed["high"]
    return wide


def audit(
    model: nn.Module,
    data: GroupedData,
    reference: nn.Module | None = None,
    *,
    measures: Sequence[str] = ("accuracy",),
    name: str = "model",
    split: str = "test",
    seed: int = 0,
    resamples: int = 2000,
    device: str | torch.device | None = None,
    options: Mapping[str, Any] | None = None,
) -> AuditReport:
    """Measure a model group by group, in evaluation mode.

    Args:
        model: The model.
        data: What to measure it on, usually the test part.
        reference: What drops are relative to, usually the network before linearization.
        measures: Which; see :data:`REGISTRY`.
        name: What to call the model in the table.
        split: What to call the data in the table.
        seed: Of the bootstrap and of every other random choice.
        resamples: Bootstrap resamples.
        device: The accelerator if there is one, by default.
        options: Settings of measures, by name.

    Returns:
        The report.

    Raises:
        FairlineError: A measure is unknown, or a group has no sample.
    """
    for measure in measures:
        if measure not in REGISTRY:
            raise FairlineError(f"There is no measure '{measure}'; choose among {', '.join(REGISTRY)}.")
    if resamples < 1:
        raise FairlineError(f"The bootstrap needs at least one resample, not {resamples}.")
    data.require_groups("an audit")
    subject = Subject(model, data, reference, resolve_device(device), seed, resamples, options or {})
    rows: list[Row] = []
    for measure in measures:
        function: Callable[[Subject], list[Row]] = importlib.import_module(REGISTRY[measure]).measure
        rows += function(subject)
    frame = pd.DataFrame([vars(row) for row in rows]).assign(model=name, split=split)[COLUMNS]
    return AuditReport(frame, _per_sample(subject))


def _per_sample(subject: Subject) -> pd.DataFrame:
    data, own = subject.data, subject.predictions
    groups, labels = data.groups.cpu().numpy(), data.labels.cpu().numpy()
    table = pd.DataFrame(
        {
            "index": range(len(data)),
            "label": [data.class_names[label] for label in labels],
            "group": [data.group_names[group] for group in groups],
            "prediction": [str(_class_name(data, int(k))) for k in own.logits.argmax(1)],
            "correct": own.correct,
            "loss": own.loss,
        }
    )
    if subject.reference_predictions is not None:
        table["reference_correct"] = subject.reference_predictions.correct
    return table


def _class_name(data: GroupedData, index: int) -> str:
    # A model may have more outputs than the data have classes.
    return data.class_names[index] if index < data.num_classes else f"output {index}"


__all__ = ["COLUMNS", "REGISTRY", "AuditReport", "Row", "Subject", "audit"]
