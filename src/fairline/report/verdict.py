"""What every page, table and terminal says of a network: one object, so that no sentence contradicts another.

A :class:`Candidate` is a network with its verdict (:mod:`fairline.audit.verdict`), what the control explains of it and
what it saves. Headlines, boxes, tables and warnings are made from candidates, never from the numbers anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd

from fairline.audit.cells import cells, named
from fairline.audit.comparison import BASE, whole_of
from fairline.audit.control import Control, beside, control_of
from fairline.audit.verdict import CANNOT_TELL, LEAST, MAY, MAY_NOT, Verdict, verdict

#: Of a loss, the share that the control has as well from which on it is "mostly" or "hardly" the ReLUs.
MOSTLY = 2 / 3

#: What a page styles an answer by.
KINDS = {MAY: "may", MAY_NOT: "may-not", CANNOT_TELL: "open"}

#: Sets of images, of :mod:`fairline.audit.cells`, in words.
_KINDS = {"overall": "all", "group": "groups", "class": "classes", "cell": "classes in a group"}

#: Of fewer images than this a page says how many are right, of more their share.
_COUNTED = 500

#: Further sets that lose are named up to so many.
_MENTIONED = 2

#: More images than this nobody collects.
MANY = 1_000_000


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

    @classmethod
    def of(
        cls,
        model: str,
        row: Mapping[str, Any],
        judged: Verdict,
        control: Control | None = None,
        costs: Sequence[Mapping[str, Any]] = (),
    ) -> Candidate:
        """A network of an audit.

        Args:
            model: Its key in the tables.
            row: With ``variant``, ``budget``, ``relus``, ``percent`` and ``total_relus``.
            judged: Its verdict.
            control: What the control explains.
            costs: What it saves.

        Returns:
            The candidate.
        """
        return cls(
            model,
            str(row["variant"]),
            str(row["budget"]),
            int(row["relus"]),
            float(row["percent"]),
            judged,
            control,
            bool(row["relus"] == row["total_relus"]),
            tuple(costs),
        )

    @property
    def name(self) -> str:
        """The one name of the network on all pages."""
        return network_name(self.variant, self.budget)

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
        control = self.control
        who = named(self.verdict.decisive)
        same = f"with all ReLUs kept and finetuned alike, {who} {moved(control.change)}"
        rest = f"the remaining {signed(control.beyond)} points are linearization’s{_limits(control.low, control.high)}"
        unsure = ", which may be none" if control.low <= 0 <= control.high else ""
        if math.isnan(control.low):
            unsure = "; all seeds agree, so there are no limits, and it may be chance"
        whose = {
            "finetune": "It is mostly the finetune, not the ReLUs",
            "ReLUs": "It is mostly the ReLUs",
            "both": "It is both the finetune and the ReLUs",
        }.get(self.whose_told())
        return f"{whose}: {same}; {rest}{unsure}." if whose else f"{same[0].upper()}{same[1:]}; {rest}{unsure}."

    def whose_told(self) -> str:
        """Whose the change is, in a word or two, for tables."""
        change = float(self.verdict.decisive["change"])
        if self.is_control:
            return "finetune"
        if self.control is None:
            return "no control"
        if change >= 0:
            return "no loss"
        share = self.control.change / change
        return "finetune" if share >= MOSTLY else ("ReLUs" if share <= 1 - MOSTLY else "both")

    def overall_told(self) -> str:
        """What happens to all images, and to the classes on average."""
        overall = self.verdict.overall
        before, after = self.verdict.balanced()
        balanced = (
            ""
            if math.isnan(before)
            else f"; balanced accuracy {moved(100 * (after - before))} ({_pair(before, after)})"
        )
        limits = f"95 % interval {signed(overall['low'])} to {signed(overall['high'])}"
        limits = "all seeds agree" if math.isnan(overall["low"]) else limits
        pair = _pair(overall["before"], overall["after"])
        return f"Overall accuracy {moved(float(overall['change']))} ({pair}; {limits}){balanced}."

    def sure_told(self) -> str:
        """What the verdict rests on."""
        judged = self.verdict
        kinds = [words for kind, words in _KINDS.items() if kind in set(judged.cells["kind"])]
        sets = f"Asked are {len(judged.cells)} sets of images: {_listed(kinds)}"
        if judged.too_small:
            sets += f"; not asked are {judged.too_small} classes in a group of fewer than {LEAST} images"
        if judged.seeds > 1:
            return f"{sets}. The unit is the base network: {judged.seeds} seeds, Student’s t."
        n = int(judged.overall["n"])
        return (
            f"{sets}. It is one network on {n:,} images (Tango’s paired limits); training again with another seed may "
            "tell otherwise."
        )

    def saved_told(self) -> str:
        """What it saves over each network between the parties."""
        if not self.costs:
            return f"It keeps {self.relus:,} ReLUs ({self.budget}); what a private inference then costs was not asked."
        told = []
        for protocol in dict.fromkeys(str(row["protocol"]) for row in self.costs):
            own = [row for row in self.costs if row["protocol"] == protocol]
            over = [
                f"{_percent(row['seconds_saved_percent'])} of the seconds over a {str(row['network']).upper()}"
                for row in own
                if not pd.isna(row["seconds_saved_percent"])
            ]
            over += [
                f"{_percent(saved)} of the bytes" for saved in [own[0]["bytes_saved_percent"]] if not pd.isna(saved)
            ]
            basis = " and ".join(dict.fromkeys(str(row["saved_basis"]) for row in own))
            if over:
                told.append(f"on {protocol} {_listed(over)} ({basis})")
        compiled = "Compiled as it is" if self.costs[0]["compiled"] else "As it is, not compiled"
        return f"{compiled}, it saves {'; '.join(told)}." if told else "What the base network costs is not known."

    def saved(self, cost: str, network: str | None = None) -> float:
        """What it saves of a cost, in per cent, on the first protocol.

        Args:
            cost: ``bytes``, ``rounds`` or ``seconds``.
            network: Between the parties; the first by default.

        Returns:
            The percentage; NaN where it is not known.
        """
        for row in self.costs:
            if row["protocol"] == self.costs[0]["protocol"] and network in (None, row["network"]):
                return float(row[f"{cost}_saved_percent"])
        return math.nan


def moved(change: float) -> str:
    """A change in words.

    >>> moved(-1.23), moved(0.0)
    ('loses 1.2 points', 'stays the same')

    Returns:
        The words.
    """
    if round(abs(change), 1) == 0:
        return "stays the same"
    return f"{'loses' if change < 0 else 'gains'} {abs(change):.1f} points"


def signed(number: float) -> str:
    """A number of points with its sign, as pages and the terminal write it.

    >>> signed(-6.04), signed(0.01)
    ('−6.0', '0.0')

    Returns:
        The text.
    """
    text = f"{number:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def sentence(text: str) -> str:
    """Words with a capital at their beginning."""
    return text[0].upper() + text[1:]


def limits_told(cell: Mapping[str, Any]) -> str:
    """Limits of a change in brackets; nothing where there are none."""
    return "" if math.isnan(cell["low"]) else f" [{signed(cell['low'])}, {signed(cell['high'])}]"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def reason(judged: Verdict) -> str:
    """Why a verdict is what it is, in a sentence: who pays, and how sure that is."""
    cell = judged.decisive
    who, change = named(cell), float(cell["change"])
    moves = f"{who} {moved(change)} ({_shares(cell, judged)}{_interval(cell, judged)})"
    tolerated = f"the {judged.within:g} points tolerated"
    critical = bool(cell["critical"])
    if judged.answer == MAY_NOT:
        if not _surely_more(cell, judged):
            return f"{moves}, and was named critical: its recall may not fall."
        return f"{moves}, more than {tolerated}; that it loses is beyond chance{_corrected(judged)}.{_others(judged)}"
    if judged.answer == MAY:
        sure = f"by their 95 % intervals no group and no class loses more than {tolerated}"
        worst = f"even the one that does worst loses nothing: {moves}" if change >= 0 else f"at worst {moves}"
        return f"{sure}; {worst}.{_hinted(judged)}"
    if change < -judged.within:
        doubt = f"more than {tolerated}, but that may be chance"
    elif critical and change < 0:
        doubt = "and was named critical; that may be chance"
    elif math.isnan(cell["low"]):
        doubt = f"which does not say that others would lose no more than {tolerated}"
    else:
        doubt = f"so that a loss of more than {tolerated} is not excluded"
    return f"{moves}, {doubt}.{_needed(cell, judged)}"


def _others(judged: Verdict) -> str:
    """What else loses more than is tolerated, beyond chance."""
    cells = judged.cells[judged.cells["beyond"]].drop(index=judged.decisive.name).sort_values("change")
    told: dict[bool, list[str]] = {True: [], False: []}
    for cell in cells.to_dict("records"):
        told[_surely_more(cell, judged)].append(f"{named(cell)} ({_shares(cell, judged)})")
    sure, critical = told[True], told[False]
    words = f" So {'does' if len(sure) == 1 else 'do'} {_first(sure)}." if sure else ""
    if critical:
        words += (
            f" {sentence(_first(critical))} {'was' if len(critical) == 1 else 'were'} named critical and may not fall."
        )
    return words


def _surely_more(cell: Mapping[str, Any], judged: Verdict) -> bool:
    """Whether a set loses more than is tolerated, beyond chance after Holm; a critical class may be refused without."""
    return bool(cell["flag"] == "loss" and cell["change"] < -judged.within)


def _first(told: Sequence[str]) -> str:
    rest = len(told) - _MENTIONED
    return f"{', '.join(told[:_MENTIONED])} and {rest} more" if rest > 0 else _listed(told)


def _shares(cell: Mapping[str, Any], judged: Verdict) -> str:
    """How much of a set is right before and after: in images where they are few enough to be counted."""
    if judged.seeds > 1 or cell["n"] >= _COUNTED:
        images = "" if judged.seeds > 1 else f" of {int(cell['n']):,} images"
        return f"{_pair(cell['before'], cell['after'])}{images}"
    n = int(cell["n"])
    return f"{round(cell['before'] * n)} to {round(cell['after'] * n)} of {n} images right"


def _hinted(judged: Verdict) -> str:
    """A class in a group that seems to lose more than is tolerated, though that may be chance."""
    inner = judged.cells[(judged.cells["kind"] == "cell") & (judged.cells["change"] < -judged.within)]
    if inner.empty:
        return ""
    cell = inner.loc[inner["change"].idxmin()]
    return f" Look at {named(cell)}: it {moved(cell['change'])} on {int(cell['n']):,} images, which may be chance."


def _pair(before: float, after: float) -> str:
    return f"{before:.1%} to {after:.1%}"


def _interval(cell: Mapping[str, Any], judged: Verdict) -> str:
    if math.isnan(cell["low"]):
        return f"; all {judged.seeds} seeds agree, so there are no limits"
    over = f" over {judged.seeds} seeds" if judged.seeds > 1 else ""
    return f"; 95 % interval {signed(cell['low'])} to {signed(cell['high'])}{over}"


def _limits(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" (95 % interval {signed(low)} to {signed(high)})"


def _corrected(judged: Verdict) -> str:
    return f", also after Holm’s correction for {len(judged.cells)} sets of images"


def _needed(cell: Mapping[str, Any], judged: Verdict) -> str:
    needed = float(cell["needed"])
    if math.isnan(cell["low"]):
        return " More seeds would tell."
    if math.isinf(needed) or needed > MANY:
        return " The measured loss is so near to the tolerance that no reasonable number would tell."
    if judged.seeds > 1:
        return f" About {needed:.0f} seeds would tell." if needed > judged.seeds else " More seeds would tell."
    if needed <= cell["n"]:
        return ""
    rounded = float(f"{needed:.2g}")
    return f" About {rounded:,.0f} images of it would tell."


def _percent(saved: float) -> str:
    digits = 1 if 0 < abs(saved) < 1 else 0
    if round(abs(saved), digits) == 0:
        return "0 %"
    return f"{saved:.{digits}f} %" if saved >= 0 else f"−{-saved:.{digits}f} % (it costs more)"


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
        control = control_of(row, about)
        counted = cells(own if control is None else beside(own, images[control]))
        judged = verdict([counted], within, critical)
        priced = [] if costs is None else costs[costs["model"] == model].to_dict("records")
        against = None
        if control is not None:
            against = Control.of(network_name(*about.loc[control, ["variant", "budget"]]), judged, [counted])
        found.append(Candidate.of(model, row, judged, against, priced))
    return found


def network_name(variant: str, budget: str) -> str:
    """What a network is called: what was done to it, and the ReLUs that it keeps."""
    return f"{variant}, {budget} of the ReLUs"


def methods(
    frame: pd.DataFrame, predictions: pd.DataFrame, within: float = 5.0, critical: Sequence[str] = ()
) -> list[Candidate]:
    """Judge every method of a comparison at every budget; with several base networks, over these.

    Args:
        frame: Rows of ``comparison.parquet`` with ``budget``, a label of ``percent``.
        predictions: ``predictions.parquet`` of the comparison.
        within: Loss that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.

    Returns:
        A candidate for each method and budget, in the order of the comparison; none where a comparison of an earlier
        version does not tell the classes.

    Raises:
        FairlineError: The tolerance is no percentage, or there is no such class.
    """
    if "label" not in predictions:
        return []
    parts = dict(list(predictions.groupby(["method", "relus", "base"], sort=False)))
    bases = list(dict.fromkeys(predictions["base"]))
    total = int(predictions["total"].iloc[0])
    before = {base: parts[BASE, total, base].set_index("sample")["correct"] for base in bases}

    @cache
    def images(method: str, relus: int) -> list[pd.DataFrame]:
        own = [parts[method, relus, base] for base in bases if (method, relus, base) in parts]
        return [
            part.assign(index=part["sample"], reference_correct=part["sample"].map(before[str(part["base"].iloc[0])]))
            for part in own
        ]

    found = []
    # A comparison of an earlier version names each network by what it keeps.
    of_networks = frame.assign(kept=frame["kept" if "kept" in frame else "relus"])[frame["measure"] == "accuracy"]
    about = of_networks[["method", "relus", "percent", "budget", "kept"]].drop_duplicates(["method", "relus"])
    columns = list(about[["method", "relus"]].itertuples(index=False, name=None))
    for row in about.to_dict("records"):
        own = images(row["method"], row["relus"])
        control, _ = whole_of(row["method"], columns, total)
        is_control = row["relus"] == total
        whole = [] if is_control else images(control, total)
        if whole:
            own = [beside(mine, other) for mine, other in zip(own, whole, strict=True)]
        counted = [cells(part) for part in own]
        judged = verdict(counted, within, critical)
        found.append(
            Candidate(
                f"{row['method']}, {row['relus']} ReLUs",
                row["method"],
                row["budget"],
                round(row["kept"]),
                float(row["percent"]),
                judged,
                Control.of(network_name(control, "100 %"), judged, counted) if whole else None,
                is_control,
            )
        )
    return found


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The one to ship: of those that may, the cheapest in seconds where that is known of all, else in ReLUs."""
    may = [each for each in found if each.answer == MAY and not each.is_control]
    priced = all(each.costs for each in may)
    return min(may, key=lambda each: (_seconds(each) if priced else 0.0, each.relus, -_change(each)), default=None)


def _change(candidate: Candidate) -> float:
    return float(candidate.verdict.decisive["change"])


def _seconds(candidate: Candidate) -> float:
    seconds = [float(row["seconds"]) for row in candidate.costs if not pd.isna(row["seconds"])]
    return seconds[0] if seconds else math.inf


def focus(found: Sequence[Candidate]) -> Candidate | None:
    """The one that pages show first: the one to ship, else the nearest to that, else the one that loses least."""
    chosen = best(found)
    judged = [each for each in found if not each.is_control] or list(found)
    if chosen is not None or not judged:
        return chosen
    open_ = [each for each in judged if each.answer == CANNOT_TELL]
    if open_:
        return max(open_, key=lambda each: _number(each.verdict.decisive["low"]))
    return max(judged, key=lambda each: float(each.verdict.decisive["change"]))


def _number(value: float) -> float:
    return -math.inf if math.isnan(value) else float(value)


def answer_told(found: Sequence[Candidate]) -> str:
    """Which may ship, in a few words, for the top of a page."""
    judged = [each for each in found if not each.is_control]
    if not judged:
        return "There is no linearized network to judge"
    within = judged[0].verdict.within
    if chosen := best(found):
        more = sum(each.answer == MAY for each in judged) - 1
        others = f" ({more} more may)" if more else ""
        return f"{chosen.name}: may ship{others}"
    if any(each.answer == CANNOT_TELL for each in judged):
        return f"Of no network is it sure that it keeps every group and class within {within:g} points"
    return f"No network may ship within {within:g} points"


def headline(found: Sequence[Candidate]) -> str:
    """Which network may ship, in a sentence."""
    chosen = focus(found)
    if chosen is None or chosen.is_control:
        return "There is no linearized network to judge."
    if chosen.answer == MAY:
        return f"{chosen.name} may ship: {chosen.reason()}"
    nearest = "Nearest" if chosen.answer == CANNOT_TELL else "Mildest"
    return f"{answer_told(found)}. {nearest} is {chosen.name}: {chosen.reason()}"


def cautions(found: Sequence[Candidate]) -> list[str]:
    """What a reader must know before trusting the verdicts."""
    better = [each for each in found if each.verdict.overall["flag"] == "gain" and each.control is None]
    better = [each for each in better if not each.is_control]
    if not better:
        return []
    names = "; ".join(each.name for each in better)
    return [
        f"More accurate overall than the base network, which was not trained to its best: {names}. Changes there mix "
        "linearization with further training. Train the base network longer, or add the budget 100 % as a control "
        "that is finetuned alike."
    ]


__all__ = [
    "KINDS",
    "MANY",
    "MOSTLY",
    "Candidate",
    "Control",
    "answer_told",
    "best",
    "candidates",
    "cautions",
    "focus",
    "headline",
    "limits_told",
    "methods",
    "moved",
    "named",
    "reason",
    "signed",
]
