"""What every page, table and terminal says of a network: one object, so that no sentence contradicts another.

A :class:`Candidate` is a network with its verdict (:mod:`fairline.audit.verdict`), what the control explains of it and
what it saves. Headlines, boxes, tables and warnings are made from candidates, never from the numbers anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fairline.audit.cells import cells
from fairline.audit.paired import change_interval
from fairline.audit.verdict import CANNOT_TELL, MAY, MAY_NOT, Verdict, verdict
from fairline.data.grouped import OVERALL

#: Of a loss, the share that the control has as well from which on it is "mostly" or "hardly" the ReLUs.
MOSTLY = 2 / 3

#: More images than this nobody collects.
MANY = 1_000_000


@dataclass(frozen=True, eq=False)
class Control:
    """What the network that kept all its ReLUs and was finetuned alike says of the set that decides.

    Attributes:
        name: What the control is called.
        change: Its change of the set, in points.
        beyond: Change of the network less the control's, in points.
        low: Lower 95 % limit of that.
        high: Upper limit.
    """

    name: str
    change: float
    beyond: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network, or a method over several seeds, at a budget, and what is known of it.

    Attributes:
        model: Its key in the tables.
        variant: What was done to it, in words.
        budget: ReLUs kept, as a label.
        relus: The same, a number.
        percent: The same, of all.
        verdict: Against the network that it was made of.
        control: What the control explains, where there is one.
        is_control: Whether it keeps all ReLUs itself.
        costs: Rows of :func:`fairline.report.costs.savings`, where they are known.
    """

    model: str
    variant: str
    budget: str
    relus: int
    percent: float
    verdict: Verdict
    control: Control | None = None
    is_control: bool = False
    costs: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The one name of the network on all pages."""
        return f"{self.variant}, {self.budget} of the ReLUs"

    @property
    def answer(self) -> str:
        """``may ship``, ``may not ship`` or ``cannot tell``."""
        return self.verdict.answer

    def reason(self) -> str:
        """Who pays, and how sure that is."""
        return reason(self.verdict)

    def control_told(self) -> str:
        """What part of the change is not the ReLUs'."""
        if self.is_control:
            return "It keeps all its ReLUs: what changes here is the further training, not linearization."
        if self.control is None:
            return "No control kept all its ReLUs (budget 100 %), so it is open what part is the finetune’s."
        change = float(self.verdict.decisive["change"])
        control = self.control
        same = f"{named(self.verdict.decisive)} changes by {control.change:+.1f} points with all ReLUs kept"
        rest = f"{control.beyond:+.1f} of {change:+.1f} points are linearization’s{_limits(control.low, control.high)}"
        if change >= 0:
            return f"{same} and finetuned alike; {rest}."
        share = control.change / change
        whose = (
            "It is mostly the finetune, not the ReLUs"
            if share >= MOSTLY
            else ("It is mostly the ReLUs" if share <= 1 - MOSTLY else "It is both the finetune and the ReLUs")
        )
        unsure = ", which does not exclude none" if control.low <= 0 <= control.high else ""
        return f"{whose}: {same} and finetuned alike; {rest}{unsure}."

    def saved_told(self) -> str:
        """What it saves over each network between the parties."""
        if not self.costs:
            return f"It keeps {self.relus:,} ReLUs ({self.budget}); what a private inference then costs was not asked."
        told = []
        for protocol in dict.fromkeys(str(row["protocol"]) for row in self.costs):
            own = [row for row in self.costs if row["protocol"] == protocol]
            over = ", ".join(
                f"{_percent(row['seconds_saved_percent'])} of the seconds over a {str(row['network']).upper()}"
                for row in own
                if not pd.isna(row["seconds_saved_percent"])
            )
            basis = ", ".join(dict.fromkeys(str(row["basis"]) for row in own))
            saved = _percent(own[0]["bytes_saved_percent"])
            told.append(f"{protocol}: {over + ' and ' if over else ''}{saved} of the bytes ({basis})")
        return f"It saves {'; '.join(told)}."


def named(cell: Mapping[str, Any]) -> str:
    """A set of images in words.

    >>> named({"kind": "cell", "group": "old", "class": "melanoma"})
    'class “melanoma” in group “old”'

    Returns:
        The words.
    """
    if cell["kind"] == "overall":
        return "overall accuracy"
    if cell["kind"] == "class":
        return f"class “{cell['class']}”"
    if cell["kind"] == "cell":
        return f"class “{cell['class']}” in group “{cell['group']}”"
    return f"group “{cell['group']}”"


def reason(judged: Verdict) -> str:
    """Why a verdict is what it is, in a sentence: who pays, and how sure that is."""
    cell = judged.decisive
    who, change = named(cell), float(cell["change"])
    verb = "loses" if change < 0 else "gains"
    moves = f"{who} {verb} {abs(change):.1f} points ({_shares(cell)}{_interval(cell, judged)})"
    tolerated = f"the {judged.within:g} points tolerated"
    critical = bool(cell["critical"])
    if judged.answer == MAY_NOT:
        if critical and change >= -judged.within:
            return f"{moves}, and was named critical: its recall may not fall."
        return f"{moves}, more than {tolerated}; that it loses is beyond chance{_corrected(judged)}."
    if judged.answer == MAY:
        sure = f"by their 95 % intervals no group and no class loses more than {tolerated}"
        return f"{sure}; at worst {moves}." if change < 0 else f"no group or class loses: at worst {moves}; {sure}."
    if change < -judged.within:
        doubt = f"more than {tolerated}, but that may be chance"
    elif critical and change < 0:
        doubt = "and was named critical; that may be chance"
    else:
        doubt = f"so that a loss of more than {tolerated} is not excluded"
    return f"{moves}, {doubt}.{_needed(cell, judged)}"


def _shares(cell: Mapping[str, Any]) -> str:
    return f"{cell['before']:.1%} to {cell['after']:.1%}"


def _interval(cell: Mapping[str, Any], judged: Verdict) -> str:
    if math.isnan(cell["low"]):
        return f"; all {judged.seeds} seeds agree, so there are no limits"
    over = f"over {judged.seeds} seeds" if judged.seeds > 1 else f"over {int(cell['n']):,} images"
    return f"; 95 % interval {cell['low']:+.1f} to {cell['high']:+.1f} {over}"


def _limits(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" (95 % interval {low:+.1f} to {high:+.1f})"


def _corrected(judged: Verdict) -> str:
    return f", also after Holm’s correction for {len(judged.cells)} sets of images"


def _needed(cell: Mapping[str, Any], judged: Verdict) -> str:
    needed = float(cell["needed"])
    if math.isinf(needed) or needed > MANY:
        return " The measured loss is so near to the tolerance that no reasonable number would tell."
    if judged.seeds > 1:
        return f" About {needed:.0f} seeds would tell." if needed > judged.seeds else " More seeds would tell."
    if needed <= cell["n"]:
        return ""
    rounded = float(f"{needed:.2g}")
    return f" About {rounded:,.0f} images of it would tell."


def _percent(saved: float) -> str:
    return f"{saved:.0f} %" if saved >= 0 else f"−{-saved:.0f} % (it costs more)"


def candidates(
    frame: pd.DataFrame,
    predictions: pd.DataFrame,
    within: float = 5.0,
    critical: Sequence[str] = (),
    costs: pd.DataFrame | None = None,
) -> list[Candidate]:
    """Judge every network of an audit that was made of the base network.

    Args:
        frame: Rows from :func:`fairline.report.figures.prepare`.
        predictions: ``predictions.parquet`` of the audit.
        within: Loss that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.
        costs: What they save, from :func:`fairline.report.costs.savings`.

    Returns:
        A candidate each, in the order of the audit; none where there is no network to compare with.

    Raises:
        FairlineError: The tolerance is no percentage, or there is no such class.
    """
    if "reference_correct" not in predictions:
        return []
    about = frame[frame["stage"] != "base"].drop_duplicates("model").set_index("model")
    images = {str(name): part for name, part in predictions.groupby("model", sort=False) if name in about.index}
    found = []
    for model, own in images.items():
        row = about.loc[model]
        judged = verdict([cells(own)], within, critical)
        control = _control_of(row, about)
        priced = [] if costs is None else costs[costs["model"] == model].to_dict("records")
        found.append(
            Candidate(
                model,
                str(row["variant"]),
                str(row["budget"]),
                int(row["relus"]),
                float(row["percent"]),
                judged,
                None if control is None else _against(judged, own, images[control], _control_name(about.loc[control])),
                bool(row["relus"] == row["total_relus"]),
                tuple(priced),
            )
        )
    return found


def _control_of(row: pd.Series[Any], about: pd.DataFrame) -> str | None:
    """The network that kept all its ReLUs and was trained on alike; of several, that of the same method."""
    whole = about[(about["relus"] == about["total_relus"]) & (about["stage"] == row["stage"])]
    whole = whole[whole["objective"] == row["objective"]]
    if row["relus"] == row["total_relus"] or whole.empty:
        return None
    own = whole[whole["method"] == row["method"]]
    return str((own if len(own) else whole).index[0])


def _control_name(row: pd.Series[Any]) -> str:
    return f"{row['variant']}, {row['budget']} of the ReLUs"


def _against(judged: Verdict, own: pd.DataFrame, other: pd.DataFrame, name: str) -> Control | None:
    """A network beside its control in the set that decides."""
    cell = judged.decisive

    def of(images: pd.DataFrame) -> pd.DataFrame:
        chosen = images
        if cell["group"] != OVERALL:
            chosen = chosen[chosen["group"] == cell["group"]]
        if cell["kind"] in ("class", "cell"):
            chosen = chosen[chosen["label"] == cell["class"]]
        return chosen.set_index("index").sort_index()

    mine, whole = of(own), of(other)
    lost = int((whole["correct"] & ~mine["correct"]).sum())
    gained = int((mine["correct"] & ~whole["correct"]).sum())
    low, high = (100 * float(limit) for limit in change_interval(lost, gained, len(mine)))
    change = 100 * float(whole["correct"].mean() - whole["reference_correct"].astype(bool).mean())
    return Control(name, change, 100 * (gained - lost) / len(mine), low, high)


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The one to ship: of those that may, the cheapest in seconds where that is known of all, else in ReLUs."""
    may = [each for each in found if each.answer == MAY and not each.is_control]
    priced = all(each.costs for each in may)
    return min(may, key=lambda each: (_seconds(each) if priced else 0.0, each.relus), default=None)


def _seconds(candidate: Candidate) -> float:
    seconds = [float(row["seconds"]) for row in candidate.costs if not pd.isna(row["seconds"])]
    return seconds[0] if seconds else math.inf


def headline(found: Sequence[Candidate]) -> str:
    """Which network may ship, in a sentence."""
    chosen = best(found)
    if chosen is not None:
        return f"{chosen.name} may ship: {chosen.reason()}"
    judged = [each for each in found if not each.is_control]
    if not judged:
        return "There is no linearized network to judge."
    within = judged[0].verdict.within
    undecided = [each for each in judged if each.answer == CANNOT_TELL]
    if undecided:
        nearest = max(undecided, key=lambda each: float(each.verdict.decisive["low"]))
        sure = f"Of no network is it sure that it keeps every group and class within {within:g} points"
        return f"{sure}. Nearest is {nearest.name}: {nearest.reason()}"
    mildest = max(judged, key=lambda each: float(each.verdict.decisive["change"]))
    return f"No network may ship within {within:g} points. Mildest is {mildest.name}: {mildest.reason()}"
