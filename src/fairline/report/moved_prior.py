"""How much of a group's drop is a moved prior: what a free shift of the output biases gives back (beside claim 1)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pandas as pd

from fairline.jobs import settings_told
from fairline.report.finding import Finding, extremes, judge, tested_panels, wide_of
from fairline.report.panels import SNL, finetuned, rows_of

#: Variants of claim 1.
MOVED = "moved prior"
SHIFTED = "in points, lowest budget, biases shifted"
SHIFTED_CONTROL = "in points, lowest budget, against the control, biases shifted"


def moved_prior(table: pd.DataFrame, compared: pd.DataFrame) -> Iterator[Finding]:
    """What a shift by τ·log π gives back at the lowest budget, τ chosen on validation images.

    With a(τ) the accuracy of the linearized network, b(τ) that of its base network and τ̂ what the validation images
    chose for the linearized one, a group's drop is b(0) − a(0) before and b(τ̂) − a(τ̂) after the shift; the difference
    is what linearization took by moving the prior (``undone_beyond_base`` of :mod:`fairline.audit.above_null`). The
    control, which kept all its ReLUs, is shifted by the τ̂ of its own.

    Args:
        table: The table of one or more studies.
        compared: What their comparisons say of each seed, of :func:`fairline.study.store.read_by_seed`.

    Yields:
        The findings of each panel whose study has such a comparison.
    """
    for panel in tested_panels(table) if len(compared) else []:
        rows = rows_of(table, panel)
        own = finetuned(rows)
        one = own.iloc[0]
        fits = (compared["study"] == one["study"]) & (compared["results"] == one["data_label"])
        of_method = compared[fits & (compared["method"] == _label(one)) & (compared["class"] == "")]
        shifted = of_method[of_method["percent"] < 100]
        if "undone" not in set(shifted["measure"]):
            continue
        largest, smallest = extremes(rows)
        least = shifted[shifted["relus"] == shifted["relus"].min()]
        lost, back, beyond = (wide_of(least, name) for name in ("drop_points", "undone", "undone_beyond_base"))
        note = f"{smallest}, with {least['percent'].iloc[0]:.3g} % of the ReLUs"
        yield judge(1, panel.title, smallest.of(beyond), note=note, variant=MOVED)
        after = lost - beyond
        note = f"{smallest} against {largest}, with {least['percent'].iloc[0]:.3g} % of the ReLUs"
        yield judge(1, panel.title, smallest.of(after) - largest.of(after), note=note, variant=SHIFTED)
        whole = of_method[of_method["percent"] == 100]
        if whole.empty:
            continue
        # Both drops are from one base network, which cancels.
        control = (wide_of(whole, "drop_points") - wide_of(whole, "undone")).droplevel("percent")
        against = (lost - back).droplevel("percent") - control
        yield judge(1, panel.title, smallest.of(against) - largest.of(against), note=note, variant=SHIFTED_CONTROL)


def _label(network: pd.Series) -> str:
    """What a comparison calls a network that was finetuned, and nothing else."""
    told = settings_told(network["objective"], json.loads(network["objective_options"] or "{}"))
    return told if network["method"] == SNL else f"{network['method']}: {told}"
