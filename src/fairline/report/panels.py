"""What a table of studies holds, panel by panel, and its means over seeds."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fairline.audit.accuracy import relative_drop
from fairline.audit.intervals import mean_interval
from fairline.errors import FairlineError
from fairline.objectives import Lagrangian
from fairline.report.figures import METHOD_NAMES, budget_labels

RACE, AGE, SVHN, CIFAR = "utkface:race", "utkface:age", "svhn", "cifar10"
R18, R34, VGG, WRN = "resnet18", "resnet34", "vgg19", "wide_resnet22_8"
SNL, DR = "snl", "deepreduce"

#: Of Algorithm 1 by default.
_MU = float(inspect.signature(Lagrangian).parameters["mu"].default)

_DATA = {RACE: "UTKFace, race", AGE: "UTKFace, age", SVHN: "SVHN", CIFAR: "CIFAR-10"}
_MODELS = {R18: "ResNet-18", R34: "ResNet-34", VGG: "VGG-19", WRN: "WRN-22-8"}


@dataclass(frozen=True)
class Panel:
    """What one panel is of: a selection of rows of one recipe. The paper's are named by data, network and method alone.

    Attributes:
        data: Data set.
        model: Network.
        method: Linearizer.
        study: Only of this study; of any, if empty.
        label: Only of the data of this name in its study.
        masks: Only of the masks of this name in its study, whatever they were placed for; plain ones, if empty.
        mark: What else the title says, where it would be another's.
    """

    data: str
    model: str = R18
    method: str = SNL
    study: str = ""
    label: str = ""
    masks: str = ""
    mark: str = ""

    @property
    def title(self) -> str:
        """In words."""
        method = METHOD_NAMES.get(self.method, self.method.replace("_", " "))
        model = _MODELS.get(self.model, self.model.rpartition("/")[2])
        known = _DATA.get(self.data, self.data)
        # What a loader is called says little of the user's own data.
        own = self.label and self.data not in _DATA and self.label != self.data
        data = f"{self.label} ({known})" if own else known
        return " · ".join(filter(None, [data, model, method, self.mark]))

    @property
    def kind(self) -> tuple[str, str, str]:
        """Data, model and method."""
        return self.data, self.model, self.method

    def of(self, table: pd.DataFrame) -> pd.Series[bool]:
        """Which rows are of its data and network, its study and label, and of all classes."""
        fits = (table["data"] == self.data) & (table["model"] == self.model) & (table["class"] == "")
        for column, wanted in (("study", self.study), ("data_label", self.label)):
            if wanted:
                fits &= table[column] == wanted
        # What the paper shows, it shows by the groups that the data have of themselves.
        return fits if self.label else fits & ~table["data_options"].str.contains('"groups"', regex=False)

    def made(self, table: pd.DataFrame) -> pd.Series[bool]:
        """Which rows are of networks that were made by its method."""
        recipe = table["masks"] == self.masks if self.masks else _plain(table)
        return self.of(table) & (table["stage"] == "finetuned") & (table["method"] == self.method) & recipe


def panels(table: pd.DataFrame, *, plain: bool = True) -> list[Panel]:
    """Every recipe that was finetuned: of each study, data set and masks.

    Args:
        table: All rows.
        plain: Whether only masks count that were placed as the method says, for nothing else and without a surrogate.

    Returns:
        The panels, each with a title of its own.
    """
    rows = table[_plain(table) if plain else table["stage"] == "finetuned"]
    columns = ["data", "model", "method", "study", "data_label", "masks"]
    rows = rows[[*columns, "data_options"]].drop_duplicates(columns)
    found = [
        replace(Panel(data, model, method, study, label, masks), mark=_grouping(options))
        for data, model, method, study, label, masks, options in rows.itertuples(index=False, name=None)
    ]
    by_title: dict[str, list[Panel]] = {}
    for panel in found:
        by_title.setdefault(panel.title, []).append(panel)
    return [replace(panel, mark=_mark(panel, by_title[panel.title])) for panel in found]


def _grouping(options: str) -> str:
    """The groups that were asked for, in words; empty for those that the data have of themselves."""
    groups = (json.loads(options) if options else {}).get("groups")
    return f"by {groups if isinstance(groups, str) else ' × '.join(groups)}" if groups else ""


def _mark(panel: Panel, alike: list[Panel]) -> str:
    """Its grouping, and what tells a panel from others of its title."""
    told = [getattr(panel, name) for name in ("label", "masks", "study") if len({getattr(o, name) for o in alike}) > 1]
    return ", ".join(filter(None, [panel.mark, *told]))


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
    made = table[panel.made(table)]
    studies = list(made["study"].unique())
    if len(studies) > 1:
        names = " and ".join(studies)
        raise FairlineError(f"{panel.title} is in the studies {names}; choose one, as with --study {studies[0]}.")
    for what, column in (("masks", "masks"), ("data", "data_label")):
        held = list(made[column].unique())
        if len(held) > 1:
            raise FairlineError(
                f"{panel.title} has the {what} {' and '.join(held)} in study {studies[0]}, and none is the panel."
            )
    base = table[panel.of(table) & (table["stage"] == "base") & table["study"].isin(studies)]
    base = base[base["data_label"].isin(made["data_label"].unique())]
    rows = pd.concat([base, made], ignore_index=True)
    # Where a method keeps what it can, as DeepReDuce does, seeds differ; the budget asked for is the same.
    asked = rows.groupby("asked")["percent"].mean()
    labels = budget_labels(asked.unique())
    return rows.assign(percent=rows["asked"].map(asked), budget=rows["asked"].map(asked).map(labels))


def recipes(table: pd.DataFrame, panel: Panel) -> list[tuple[str, str, str]]:
    """Study, data and masks by their names in it, of every recipe whose rows a panel holds."""
    made = table[panel.made(table)][["study", "data_label", "masks"]].drop_duplicates()
    return list(made.itertuples(index=False, name=None))


def _plain(table: pd.DataFrame) -> pd.Series[bool]:
    return (table["stage"] == "finetuned") & (table["placement"] == "") & (table["surrogate"] == "identity")


def bases(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the base networks."""
    return rows[rows["stage"] == "base"]


def finetuned(rows: pd.DataFrame, objective: str = "erm") -> pd.DataFrame:
    """Rows of the networks finetuned under one objective; of several variants of it, the one without a label."""
    own = rows[(rows["stage"] == "finetuned") & (rows["objective"] == objective)]
    return own[own["finetune"] == objective] if (own["finetune"] == objective).any() else own


def one_of_several(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of one value of a sweep, whatever was chosen of it."""
    tried = pd.to_numeric(rows["tried"], errors="coerce")
    return (tried == 1) & (rows["strength"] != "")


def reference(rows: pd.DataFrame) -> str:
    """The finetune that others are set beside: plain distillation if there is one, else the first; empty for none."""
    plain = finetuned(rows)
    own = plain if len(plain) else rows[rows["stage"] == "finetuned"]
    return str(own["finetune"].iloc[0]) if len(own) else ""


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
    before = accuracy[accuracy["finetune"] == reference(rows)].set_index(keys)
    after = accuracy[accuracy["finetune"] == finetune].set_index(keys)
    joined = before[["value", "n", "train_n"]].join(after["value"].rename("after"), how="inner").reset_index()
    joined = joined[joined["value"] > 0]
    return joined.assign(
        value=relative_drop(joined["value"], joined["after"]), low=np.nan, high=np.nan, measure="mitigation_drop"
    ).drop(columns="after")


def variants_of_mu(rows: pd.DataFrame) -> list[tuple[float, str]]:
    """Values of μ that Algorithm 1 was run with, and that nothing else tells apart; none that was chosen.

    Args:
        rows: Of one panel, from :func:`rows_of`.

    Returns:
        Each μ, smallest first, and the finetune's name; of several sets of other options that with most values.
    """
    tried = pd.to_numeric(rows["tried"], errors="coerce").fillna(1)
    own = rows[(rows["objective"] == "lagrangian") & (tried <= 1)]
    own = own[["objective_options", "finetune"]].drop_duplicates()
    found: dict[str, dict[float, str]] = {}
    for text, name in own.itertuples(index=False, name=None):
        options = json.loads(text or "{}")
        mu = float(options.pop("mu", _MU))
        found.setdefault(json.dumps(options, sort_keys=True), {}).setdefault(mu, str(name))
    return sorted(max(found.values(), key=len, default={}).items())
