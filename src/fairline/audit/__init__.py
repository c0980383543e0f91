"""Measurements of a model, group by group. ``audit(model, data, reference)`` returns an :class:`AuditReport`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from fairline._io import resolve_device, write_table
from fairline._registry import fitting, kinds_of_arguments
from fairline.audit.base import Row, Subject, class_name
from fairline.data.grouped import OVERALL, GroupedData
from fairline.errors import FairlineError
from fairline.masking import unwrap
from fairline.training import ProgressCallback

if TYPE_CHECKING:
    from fairline.audit.verdict import Verdict


@dataclass(frozen=True)
class Measure:
    """A measurement that an audit can take.

    Attributes:
        source: ``module:function``; the function takes the subject and its own options and returns rows.
        needs_reference: Whether it compares with a reference.
        binary: Whether it is about binary classifiers alone.
        masks: Whether it takes ReLUs out, so that masks must reach them.
    """

    source: str
    needs_reference: bool = False
    binary: bool = False
    masks: bool = False


REGISTRY: dict[str, Measure] = {
    "accuracy": Measure("fairline.audit.accuracy:measure"),
    "recall": Measure("fairline.audit.recall:measure"),
    "gradient_norm": Measure("fairline.audit.gradients:measure"),
    "curvature": Measure("fairline.audit.curvature:measure"),
    "margin": Measure("fairline.audit.boundary:margin"),
    "boundary_distance": Measure("fairline.audit.boundary:minimal"),
    "first_order_distance": Measure("fairline.audit.boundary:first_order"),
    "parameter_distance": Measure("fairline.audit.distance:measure", needs_reference=True),
    "excess_loss_bound": Measure("fairline.audit.bounds:excess_loss_bound", needs_reference=True),
    "binary_curvature_bound": Measure("fairline.audit.bounds:binary_curvature_bound", binary=True),
    "correlation": Measure("fairline.audit.correlation:measure"),
    "corrections": Measure("fairline.audit.corrections:measure", masks=True),
}

#: All with which the paper explains the disparity, with the options that ``fairline audit --explain`` gives them.
EXPLAIN: dict[str, dict[str, Any]] = {
    "accuracy": {},
    "recall": {},
    "gradient_norm": {"per_sample": True},
    "curvature": {"matrices": ["hessian", "ggn"]},
    "margin": {},
    "boundary_distance": {},
    "first_order_distance": {},
    "parameter_distance": {},
    "excess_loss_bound": {},
    "binary_curvature_bound": {"samples": 200},
    "correlation": {},
    "corrections": {},
}

COLUMNS = ["model", "split", "group", "class", "measure", "value", "low", "high", "n"]


@dataclass(frozen=True, eq=False)
class AuditReport:
    """The numbers of one model on one split.

    Attributes:
        frame: Tidy: one row a (model, split, group, class, measure), columns ``value``, ``low``, ``high`` (95 % limits,
            NaN where a measure has none) and ``n``; ``class`` is empty for all classes. What compares groups, and what
            a network has one of, is in rows of the group ``overall``; a layer's own number in rows of the measure
            ``name/layer``.
        predictions: One row a sample: ``index``, ``label``, ``group``, ``prediction``, ``correct``, ``loss``,
            ``reference_correct`` where there is a reference, the columns that measures add, such as ``margin``, and
            those of the data's metadata, such as ``file_name``; one that is called like another one is
            ``metadata_NAME``.
    """

    frame: pd.DataFrame
    predictions: pd.DataFrame

    @property
    def by_group(self) -> pd.DataFrame:
        """One row a group; columns ``n`` and the measures, with ``_low`` and ``_high`` where they have limits."""
        rows = self._of_all_classes()
        return _wide(rows[(rows["group"] != OVERALL) & ~rows["measure"].str.contains("/")])

    @property
    def by_class(self) -> pd.DataFrame:
        """One row a class: ``n``, ``recall`` and, with a reference, ``recall_change`` in points, with their limits."""
        rows = self.frame[(self.frame["class"] != "") & (self.frame["group"] == OVERALL)]
        return _wide(rows, "class")

    @property
    def by_group_and_class(self) -> pd.DataFrame:
        """The same, one row a group and class that have images in common."""
        rows = self.frame[(self.frame["class"] != "") & (self.frame["group"] != OVERALL)]
        return _wide(rows, "group", "class")

    @property
    def overall(self) -> pd.Series[Any]:
        """The same for all samples together, and what a network has one of, such as ``parameter_distance``."""
        rows = self._of_all_classes()
        names = rows["measure"]
        return _wide(rows[(rows["group"] == OVERALL) & ~names.map(compares_groups) & ~names.str.contains("/")]).loc[
            OVERALL
        ]

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer, one column a measure that has a number for each layer."""
        rows = self._of_layers()
        return _pivoted(rows[rows["group"] == OVERALL], "layer")

    @property
    def layers_by_group(self) -> pd.DataFrame:
        """The same for groups: one row a layer, or a unit where a measure has numbers for units, and group."""
        rows = self._of_layers()
        return _pivoted(rows[rows["group"] != OVERALL], "layer", "group")

    def _of_all_classes(self) -> pd.DataFrame:
        return self.frame[self.frame["class"] == ""]

    def _of_layers(self) -> pd.DataFrame:
        rows = self.frame[self.frame["measure"].str.contains("/")]
        names = rows["measure"].str.split("/", n=1, expand=True).reindex(columns=[0, 1])
        return pd.DataFrame({"layer": names[1], "measure": names[0], "group": rows["group"], "value": rows["value"]})

    @property
    def gaps(self) -> pd.DataFrame:
        """What compares groups, one row a measure: ``value``, ``low``, ``high``, and the ``group`` meant.

        ``accuracy_gap`` names the worst and best group; ``worst_group_accuracy`` the worst;
        ``minority_correction_share_gap`` the largest group and the smallest.
        """
        rows = self.frame[(self.frame["group"] == OVERALL) & self.frame["measure"].map(compares_groups)]
        measured = set(self.frame["measure"])
        table = rows.set_index("measure")[["value", "low", "high"]]
        named = {}
        if "accuracy" in measured:
            accuracy = self.by_group["accuracy"]
            named = {
                "accuracy_gap": f"{accuracy.idxmin()} to {accuracy.idxmax()}",
                "worst_group_accuracy": str(accuracy.idxmin()),
            }
        if "relative_drop" in measured:
            drop = self.by_group["relative_drop"]
            if drop.notna().any():
                named["relative_drop_gap"] = f"{drop.idxmin()} to {drop.idxmax()}"
        if "minority_correction_share_gap" in measured:
            role = self.by_group["correction_compared"]
            small, (largest,) = (list(role.index[role == sign]) for sign in (1, -1))
            text = f"{largest} to {', '.join(small)}"
            named |= {f"{prefix}minority_correction_share_gap": text for prefix in ("", "centred_")}
        return table.assign(group=[named.get(str(name), "") for name in table.index])

    def verdict(self, within: float = 5.0, critical: Sequence[str] = ()) -> Verdict:
        """Whether the network may ship in place of its reference; see :mod:`fairline.audit.verdict`.

        Args:
            within: Loss that is tolerated, in percentage points.
            critical: Classes whose recall may not fall.

        Returns:
            The verdict.

        Raises:
            FairlineError: There is no reference, the tolerance is no percentage, or there is no such class.
        """
        from fairline.audit.cells import cells
        from fairline.audit.verdict import verdict

        if "reference_correct" not in self.predictions:
            raise FairlineError("A verdict compares with a reference network, and the audit had none.")
        return verdict([cells(self.predictions)], within, critical)

    def to_frame(self) -> pd.DataFrame:
        """The tidy table."""
        return self.frame.copy()

    def to_parquet(self, path: str | Path) -> None:
        """Write the tidy table atomically."""
        write_table(path, self.frame)


def compares_groups(measure: str) -> bool:
    """Whether a measure under ``overall`` compares groups, rather than speaking of all samples."""
    return measure.endswith("_gap") or measure.startswith("worst_group_")


def _pivoted(rows: pd.DataFrame, *index: str) -> pd.DataFrame:
    table = rows.pivot_table(index=list(index), columns="measure", values="value", sort=False)
    return table.rename_axis(columns=None)


def _wide(rows: pd.DataFrame, *index: str) -> pd.DataFrame:
    keys = list(index or ("group",))
    wide = rows.groupby(keys, sort=False)[["n"]].max()
    for name, part in rows.groupby("measure", sort=False):
        indexed = part.set_index(keys)
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
    measures: Sequence[str] = ("accuracy", "recall"),
    name: str = "model",
    split: str = "test",
    seed: int = 0,
    resamples: int = 2000,
    device: str | torch.device | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: ProgressCallback | None = None,
) -> AuditReport:
    """Measure a model group by group, in evaluation mode and over the whole of each group.

    Args:
        model: The model.
        data: What to measure it on, usually the test part.
        reference: What drops, distances and bounds are relative to, usually the network before linearization.
        measures: Which; see :data:`REGISTRY`.
        name: What to call the model in the table.
        split: What to call the data in the table.
        seed: Of the bootstrap and of every other random choice.
        resamples: Bootstrap resamples.
        device: The accelerator if there is one, by default.
        options: Settings of measures: ``{"curvature": {"tolerance": 1e-3}}``.
        progress: Told how far long measures are.

    Returns:
        The report.

    Raises:
        FairlineError: A measure or option is unknown or does not suit the model, a group has no sample, or the loss is
            not finite.
    """
    where = resolve_device(device)
    before = None
    if reference is not None:
        before = Subject(unwrap(reference), data, None, where, seed, resamples, "reference", progress)
    subject = Subject(unwrap(model), data, before, where, seed, resamples, name, progress)
    return audit_subject(subject, measures, split=split, options=options)


def audit_subject(
    subject: Subject,
    measures: Sequence[str] = ("accuracy", "recall"),
    *,
    split: str = "test",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> AuditReport:
    """:func:`audit` of a subject, which keeps what measures share: several audits may have one reference in common."""
    if not measures:
        raise FairlineError(f"An audit needs at least one measure; choose among {', '.join(REGISTRY)}.")
    for measure in [*measures, *(options or {})]:
        if measure not in REGISTRY:
            raise FairlineError(f"There is no measure '{measure}'; choose among {', '.join(REGISTRY)}.")
    if subject.resamples < 1:
        raise FairlineError(f"The bootstrap needs at least one resample, not {subject.resamples}.")
    subject.data.require_groups("an audit")
    subject.rows.clear()
    subject.samples.clear()
    for measure in dict.fromkeys(measures):
        entry = REGISTRY[measure]
        if entry.needs_reference and subject.reference is None:
            raise FairlineError(f"The measure '{measure}' compares with a reference network, and there is none.")
        subject.rows += _call(measure)(subject, **measure_options(measure, (options or {}).get(measure, {})))
    frame = pd.DataFrame([vars(row) for row in subject.rows]).rename(columns={"label": "class"})
    frame = frame.assign(model=subject.name, split=split)[COLUMNS]
    return AuditReport(frame, _per_sample(subject))


def _call(measure: str) -> Callable[..., list[Row]]:
    module, _, function = REGISTRY[measure].source.partition(":")
    call: Callable[..., list[Row]] = getattr(importlib.import_module(module), function)
    return call


def measure_options(measure: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a measure as they are handed on.

    Args:
        measure: A key of :data:`REGISTRY`.
        options: Their values.

    Returns:
        The values.

    Raises:
        FairlineError: It knows no such option, or one is of another kind.
    """
    kinds = kinds_of_arguments(_call(measure))
    for option in options:
        if option not in kinds:
            takes = f"it takes {', '.join(kinds)}" if kinds else "it takes none"
            raise FairlineError(f"The measure '{measure}' knows no option '{option}'; {takes}.")
    return fitting(f"Measure '{measure}'", kinds, options)


def explaining(subject: Subject) -> dict[str, dict[str, Any]]:
    """The measures of :data:`EXPLAIN` that suit the subject, with their options.

    Args:
        subject: The model. Weights are compared with the reference's where the two share any.

    Returns:
        Options by name.
    """
    from fairline.audit import corrections, distance

    reference = subject.reference
    comparable = reference is not None and distance.comparable(subject.model, reference.model)
    binary = subject.data.num_classes == subject.predictions.logits.shape[1] == 2
    return {
        name: dict(options)
        for name, options in EXPLAIN.items()
        if (comparable or not REGISTRY[name].needs_reference)
        and (binary or not REGISTRY[name].binary)
        and (not REGISTRY[name].masks or corrections.suits(subject))
    }


def _per_sample(subject: Subject) -> pd.DataFrame:
    data, own = subject.data, subject.predictions
    groups, labels = data.groups.cpu().numpy(), data.labels.cpu().numpy()
    table = pd.DataFrame(
        {
            "index": range(len(data)),
            "label": [data.class_names[label] for label in labels],
            "group": [data.group_names[group] for group in groups],
            "prediction": [class_name(data, int(k)) for k in own.logits.argmax(1)],
            "correct": own.correct,
            "loss": own.loss,
        }
    )
    if subject.reference is not None:
        table["reference_correct"] = subject.reference.predictions.correct
    table = table.assign(**subject.samples)
    taken = {*table.columns, "model", "reference_correct"}
    known = data.metadata.rename(columns=lambda name: f"metadata_{name}" if name in taken else name)
    # A table's own column of labels says the same again.
    again = [name for name in known if name == "metadata_label" and known[name].equals(table["label"])]
    return pd.concat([table, known.drop(columns=again)], axis=1)


__all__ = [
    "COLUMNS",
    "EXPLAIN",
    "REGISTRY",
    "AuditReport",
    "Measure",
    "Row",
    "Subject",
    "audit",
    "audit_subject",
    "compares_groups",
    "explaining",
    "measure_options",
]
