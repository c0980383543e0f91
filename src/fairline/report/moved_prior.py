"""How much of a group's drop is a moved prior: what a free shift of the output biases gives back (beside claim 1)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pandas as pd

from fairline.data.grouped import OVERALL
from fairline.jobs import settings_told
from fairline.report.figures import budget_labels
from fairline.report.finding import Finding, comparable, extremes, judge, wide_of
from fairline.report.panels import SNL, Panel, finetuned, rows_of

#: Variants of claim 1.
MOVED, MOVED_CONTROL = "moved prior", "moved prior, against the control"
SHIFTED = "in points, lowest budget, biases shifted"
SHIFTED_CONTROL = "in points, lowest budget, against the control, biases shifted"


def moved_prior(table: pd.DataFrame, compared: pd.DataFrame) -> Iterator[Finding]:
    """What a shift by τ·log π gives back at the lowest budget, τ chosen on validation images.

    With a(τ) the accuracy of the linearized network, b(τ) that of its base network, c(τ) that of the control, which
    kept all its ReLUs and had the same further training, and τ̂ what the validation images chose for a network, a
    group's drop is b(0) − a(0) before and b(τ̂ₐ) − a(τ̂ₐ) after the shift; the difference is the moved prior
    (``undone_beyond_base`` of :mod:`fairline.audit.above_null`). Further training moves the prior, too: what
    linearization alone did is a(τ̂ₐ) − a(0) − (c(τ̂_c) − c(0)), each network under its own shift.

    Args:
        table: The table of one or more studies.
        compared: What their comparisons say of each seed, of :func:`fairline.study.store.read_by_seed`.

    Yields:
        The findings of each panel whose study has such a comparison.
    """
    for panel, rows, of_method in shifted_panels(table, compared):
        shifted = of_method[of_method["percent"] < 100]
        largest, smallest = extremes(rows)
        least = shifted[shifted["relus"] == shifted["relus"].min()]
        lost, back, beyond = (wide_of(least, name) for name in ("drop_points", "undone", "undone_beyond_base"))
        budget = f"with {least['percent'].iloc[0]:.3g} % of the ReLUs"
        alone, note = f"{smallest}, {budget}", f"{smallest} against {largest}, {budget}"
        yield judge(1, panel.title, smallest.of(beyond), note=alone, variant=MOVED)
        after = lost - beyond
        yield judge(1, panel.title, smallest.of(after) - largest.of(after), note=note, variant=SHIFTED)
        whole = of_method[of_method["percent"] == 100]
        if whole.empty:
            continue
        given = back.droplevel("percent") - wide_of(whole, "undone").droplevel("percent")
        yield judge(1, panel.title, smallest.of(given), note=alone, variant=MOVED_CONTROL)
        # Both drops are from one base network, which cancels.
        control = (wide_of(whole, "drop_points") - wide_of(whole, "undone")).droplevel("percent")
        against = (lost - back).droplevel("percent") - control
        yield judge(1, panel.title, smallest.of(against) - largest.of(against), note=note, variant=SHIFTED_CONTROL)


def shifted_panels(table: pd.DataFrame, compared: pd.DataFrame) -> Iterator[tuple[Panel, pd.DataFrame, pd.DataFrame]]:
    """Panels of which comparisons say what a shift gives back.

    Args:
        table: The table of one or more studies.
        compared: What their comparisons say of each seed.

    Yields:
        The panel, its rows of the table, and what is said of plain distillation there; nothing where a study has
        several masks of one method, which comparisons tell apart in words of their own.
    """
    held = comparable(table) if len(compared) else []
    for panel in held:
        if [(other.kind, other.study, other.label) for other in held].count((panel.kind, panel.study, panel.label)) > 1:
            continue
        rows = rows_of(table, panel)
        one = finetuned(rows).iloc[0]
        fits = (compared["study"] == one["study"]) & (compared["results"] == one["data_label"])
        own = compared[fits & (compared["method"] == _label(one)) & (compared["class"] == "")]
        if "undone" in set(own.loc[own["percent"] < 100, "measure"]):
            yield panel, rows, own


def drops(rows: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """The drop of each group before and after the shift, in points.

    Args:
        rows: Of one panel.
        own: What comparisons say of it, of :func:`shifted_panels`.

    Returns:
        A row for each budget, group and seed with the measures ``before`` and ``after``, as :func:`over_seeds
        <fairline.report.panels.over_seeds>` takes them.
    """
    sizes = rows[rows["group"] != OVERALL].groupby("group")["train_n"].mean()
    keys = ["percent", "group", "seed", "n"]
    wide = own[own["group"].isin(sizes.index)].pivot(index=keys, columns="measure", values="value").reset_index()
    labels = budget_labels(wide["percent"].unique())
    about = wide[keys].assign(budget=wide["percent"].map(labels), train_n=wide["group"].map(sizes))
    before, after = wide["drop_points"], wide["drop_points"] - wide["undone_beyond_base"]
    told = [about.assign(measure=name, value=value) for name, value in (("before", before), ("after", after))]
    return pd.concat(told, ignore_index=True).assign(low=np.nan, high=np.nan)


def _label(network: pd.Series) -> str:
    """What a comparison calls a network that was finetuned, and nothing else."""
    told = settings_told(network["objective"], json.loads(network["objective_options"] or "{}"))
    return told if network["method"] == SNL else f"{network['method']}: {told}"
