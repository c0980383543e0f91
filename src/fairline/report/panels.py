"""What a table of studies holds, panel by panel, and its means over seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fairline.audit.accuracy import relative_drop
from fairline.audit.intervals import mean_interval
from fairline.errors import FairlineError
from fairline.report.figures import METHOD_NAMES, budget_labels

RACE, AGE, SVHN, CIFAR = "utkface:race", "utkface:age", "svhn", "cifar10"
R18, R34, VGG, WRN = "resnet18", "resnet34", "vgg19", "wide_resnet22_8"
SNL, DR = "snl", "deepreduce"

_DATA = {RACE: "UTKFace, race", AGE: "UTKFace, age", SVHN: "SVHN", CIFAR: "CIFAR-10"}
_MODELS = {R18: "ResNet-18", R34: "ResNet-34", VGG: "VGG-19", WRN: "WRN-22-8"}


@dataclass(frozen=True)
class Panel:
    """What one panel is of."""

    data: str
    model: str = R18
    method: str = SNL

    @property
    def title(self) -> str:
        """In words."""
        method = METHOD_NAMES.get(self.method, self.method)
        return f"{_DATA.get(self.data, self.data)} · {_MODELS.get(self.model, self.model)} · {method}"


def panels(table: pd.DataFrame) -> list[Panel]:
    """Every combination of data, model and linearizer that was finetuned."""
    own = table[_plain(table)][["data", "model", "method"]].drop_duplicates()
    return [Panel(*row) for row in own.itertuples(index=False, name=None)]


def rows_of(table: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """The base networks of a panel and all that was made of them by the method alone, in all their classes.

    Masks that were learned under another objective, that empty layers or that have a surrogate are another method's.

    Args:
        table: All rows.
        panel: Which.

    Returns:
        Its rows with ``budget``, a label of the share of ReLUs kept; empty if there are none. Rows of one class are
        left out: they stand under their group, or under ``overall``, and would count twice.

    Raises:
        FairlineError: Two studies, or two masks of one, hold the panel, so that its numbers would be of two recipes.
    """
    fits = (table["data"] == panel.data) & (table["model"] == panel.model) & (table["class"] == "")
    made = table[fits & (table["method"] == panel.method) & _plain(table)]
    studies = list(made["study"].unique())
    if len(studies) > 1:
        names = " and ".join(studies)
        raise FairlineError(f"{panel.title} is in the studies {names}; choose one, as with --study {studies[0]}.")
    masks = list(made["masks"].unique())
    if len(masks) > 1:
        raise FairlineError(
            f"{panel.title} has the masks {' and '.join(masks)} in study {studies[0]}, and none is the panel."
        )
    base = table[fits & (table["stage"] == "base") & table["study"].isin(studies)]
    rows = pd.concat([base, made], ignore_index=True)
    # Where a method keeps what it can, as DeepReDuce does, seeds differ; the budget asked for is the same.
    asked = rows.groupby("asked")["percent"].mean()
    labels = budget_labels(asked.unique())
    return rows.assign(percent=rows["asked"].map(asked), budget=rows["asked"].map(asked).map(labels))


def _plain(table: pd.DataFrame) -> pd.Series[bool]:
    return (table["stage"] == "finetuned") & (table["placement"] == "") & (table["surrogate"] == "identity")


def finetuned(rows: pd.DataFrame, objective: str = "erm") -> pd.DataFrame:
    """Rows of the networks finetuned under one objective; of several variants of it, the one without a label."""
    own = rows[(rows["stage"] == "finetuned") & (rows["objective"] == objective)]
    return own[own["finetune"] == objective] if (own["finetune"] == objective).any() else own


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds.

    Args:
        rows: Rows of one method, with ``percent``, ``budget``, ``group``, ``measure``, ``seed`` and ``value``.

    Returns:
        A row for each budget, group and measure: ``value``, ``low``, ``high`` (Student's; with one seed, its own
        limits), ``seeds``, and mean ``n`` and ``train_n``.
    """
    found = []
    for (percent, budget, group, measure), part in rows.groupby(
        ["percent", "budget", "group", "measure"], sort=False, observed=True
    ):
        values = part.dropna(subset=["value"]).groupby("seed")["value"].mean().to_numpy()
        low, high = float("nan"), float("nan")
        if len(values) > 1:
            low, high = mean_interval(values)
        elif len(part) == 1:
            low, high = part["low"].iloc[0], part["high"].iloc[0]
        found.append(
            {
                "percent": percent,
                "budget": budget,
                "group": group,
                "measure": measure,
                "value": float(values.mean()) if len(values) else float("nan"),
                "low": low,
                "high": high,
                "seeds": len(values),
                "n": round(part["n"].mean()),
                "train_n": round(part["train_n"].mean()),
            }
        )
    return pd.DataFrame(found)


def mitigation_drop(rows: pd.DataFrame, finetune: str = "lagrangian") -> pd.DataFrame:
    """Compute the paper's drop between the network before and after mitigation, in percent (Section 6).

    (J̄(θ̃; Sᵃ) − J̄(θ̃_mit; Sᵃ)) / J̄(θ̃; Sᵃ) · 100 at each budget and seed: negative where mitigation helps. A seed in
    which the unmitigated network gets no image of a group right has no such drop for it.

    Args:
        rows: Of one panel, from :func:`rows_of`.
        finetune: Name of the finetune that mitigates.

    Returns:
        A row for each budget, group and seed that has one, with the measure ``mitigation_drop``.
    """
    accuracy = rows[(rows["measure"] == "accuracy") & (rows["stage"] == "finetuned")]
    keys = ["percent", "budget", "group", "seed"]
    before = finetuned(accuracy).set_index(keys)
    after = accuracy[accuracy["finetune"] == finetune].set_index(keys)
    joined = before[["value", "n", "train_n"]].join(after["value"].rename("after"), how="inner").reset_index()
    joined = joined[joined["value"] > 0]
    return joined.assign(
        value=relative_drop(joined["value"], joined["after"]), low=np.nan, high=np.nan, measure="mitigation_drop"
    ).drop(columns="after")


def variants_of_mu(rows: pd.DataFrame) -> list[tuple[float, str]]:
    """Each μ that Algorithm 1 was run with, smallest first, and the finetune's name."""
    own = rows[rows["objective"] == "lagrangian"][["objective_options", "finetune"]].drop_duplicates()
    return sorted(
        (float(json.loads(text).get("mu", 0)), str(name)) for text, name in own.itertuples(index=False, name=None)
    )
