"""The claims of the paper as tests on what studies measured.

A claim is tested in every panel (a study's data, network and masks) that has what it speaks of. One number is taken
of each seed; its mean over seeds, with Student's 95 % interval, decides: the claim *holds* where the whole interval
lies on its side of a threshold, *does not hold* where the whole interval lies on the other, and is *undecided*
otherwise, and with one seed. Beside that stand the verdict after Holm's correction for all tests of the table, and over
the panels of a claim a random-effects mean and a sign test; see :mod:`fairline.report.evidence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd

from fairline.audit.intervals import LEVEL
from fairline.data.grouped import OVERALL
from fairline.report.evidence import Pooled, corrected, pooled, seeds_needed, sign_test
from fairline.report.finding import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Extreme,
    Finding,
    comparable,
    extremes,
    judge,
    lowest,
    tested_panels,
    wide_of,
)
from fairline.report.moved_prior import MOVED, MOVED_CONTROL, SHIFTED, SHIFTED_CONTROL, moved_prior
from fairline.report.panels import DR, R18, SNL, VGG, WRN, Panel, bases, finetuned, rows_of, variants_of_mu

#: Points of overall accuracy that "hardly moves" allows, and points that μ may make of a difference.
HARDLY = 2.0

#: Variants of a claim's number, shown beside it.
POINTS, CONTROL = "in points", "against the control"
LOWEST, LOWEST_CONTROL = "in points, lowest budget", "in points, lowest budget, against the control"
DISTANCE_CONTROL = "lowest budget, against the control"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        text: What the paper finds.
        source: Where.
        effect: What the tested number is, with its unit.
        rule: When the claim holds.
        test: Takes the table and yields findings.
        threshold: What the number is tested against.
        ratio: Whether the number is a ratio, whose logarithm is tested.
        least: Whether the number is of the group that is worst off, which chance alone puts on one side, so that panels
            have no sign test and no mean.
        variants: What other numbers are, by their names.
    """

    text: str
    source: str
    effect: str
    rule: str
    test: Callable[[pd.DataFrame], Iterator[Finding]]
    threshold: float = 0.0
    ratio: bool = False
    least: bool = False
    variants: Mapping[str, str] = field(default_factory=dict)


def _slopes(values: pd.Series) -> pd.Series:
    """Least-squares slope of each seed's values against halvings of the ReLUs."""
    slopes = {}
    for seed, own in values.dropna().groupby(level="seed"):
        percent = own.index.get_level_values("percent").to_numpy(float)
        kept = percent > 0
        if len(set(percent[kept])) > 1:
            slopes[seed] = np.polyfit(np.log2(100 / percent[kept]), own.to_numpy()[kept], 1)[0]
    return pd.Series(slopes, dtype=float)


def _disparity_slopes(rows: pd.DataFrame) -> tuple[pd.Series, str]:
    largest, smallest = extremes(rows)
    wide = wide_of(finetuned(rows), "relative_drop")
    difference = smallest.of(wide) - largest.of(wide)
    note = f"{smallest} against {largest}"
    never = smallest.of(wide).isna().groupby(level="seed").all()
    if never.any():
        note += f"; the base network of {never.sum()} of {len(never)} seeds gets none of {smallest} right"
    return _slopes(difference), note


def _judged_slopes(claim: int, panel: Panel, table: pd.DataFrame, more: str = "") -> Iterator[Finding]:
    """Test that the disparity grows; where no drop is defined, the finding says so."""
    rows = rows_of(table, panel)
    if finetuned(rows)["asked"].nunique() > 1:
        slopes, note = _disparity_slopes(rows)
        yield judge(claim, panel.title, slopes, note=note + more)


def disparity_grows(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 1; in points, and beside the control, as well."""
    for panel in comparable(table):
        yield from _judged_slopes(1, panel, table)
        rows = rows_of(table, panel)
        own = finetuned(rows)
        after = wide_of(own, "accuracy")
        base = wide_of(bases(rows), "accuracy")
        if own["asked"].nunique() < 2 or base.empty:
            continue
        largest, smallest = extremes(rows)
        note = f"{smallest} against {largest}"

        def beyond(lost: pd.DataFrame, smallest: Extreme = smallest, largest: Extreme = largest) -> pd.Series:
            return smallest.of(lost) - largest.of(lost)

        in_points = beyond(_lost(after, base, relative=False))
        yield judge(1, panel.title, _slopes(in_points), note=note, variant=POINTS)
        whole, masks = _control(table, panel, own)
        control = wide_of(whole, "accuracy")
        low = after.index.get_level_values("percent") == own["percent"].min()
        if control.empty or own["percent"].min() == 100:
            continue
        note += f"; the control is that of the masks {masks}"
        slopes = _slopes(beyond(_lost(after, control, relative=True)))
        yield judge(1, panel.title, slopes, note=note, variant=CONTROL)
        yield judge(1, panel.title, in_points[low], note=note, variant=LOWEST)
        against = beyond(_lost(after, control, relative=False))[low]
        yield judge(1, panel.title, against, note=note, variant=LOWEST_CONTROL)


def _lost(after: pd.DataFrame, before: pd.DataFrame, *, relative: bool) -> pd.DataFrame:
    """What groups lose at each seed and budget, in points or relative; nothing where nothing was right before."""
    seeds = after.index.get_level_values("seed")
    start = before.droplevel("percent").reindex(index=seeds, columns=after.columns)
    start = start.where(start > 0).set_axis(after.index)
    lost = 100 * (start - after)
    return lost / start if relative else lost


def _control(table: pd.DataFrame, panel: Panel, own: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows of the network that kept all its ReLUs and was finetuned alike, and the name of its masks."""
    # With all ReLUs kept little is left of how masks were found, so another method's does where there is no own.
    whole = own[own["relus"] == own["total_relus"]]
    if whole.empty:
        study = own["study"].iloc[0]
        fits = panel.of(table) & (table["study"] == study) & (table["data_label"] == own["data_label"].iloc[0])
        rows = finetuned(table[fits & (table["relus"] == table["total_relus"])])
        whole = rows[rows["masks"] == rows["masks"].iloc[0]] if len(rows) else rows
    return whole, str(whole["masks"].iloc[0]) if len(whole) else ""


def gradient_norms_higher(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 2."""
    for panel in comparable(table):
        rows = rows_of(table, panel)
        own = lowest(finetuned(rows))
        yield from _ratio(2, panel, own, "gradient_norm", f"at {own['budget'].iloc[0]} of the ReLUs")


def eigenvalues_higher(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 3; a base network that several methods share is tested once."""
    seen = set()
    for panel in comparable(table):
        rows = bases(rows_of(table, panel))
        # Named by what they hold: studies share them.
        known = (panel.data, panel.model, panel.label, *sorted(set(rows["cell"])))
        if known not in seen:
            seen.add(known)
            yield from _ratio(
                3, replace(panel, method="base network", mark=""), rows, "hessian_max", "of the base network"
            )


def _ratio(claim: int, panel: Panel, rows: pd.DataFrame, measure: str, note: str) -> Iterator[Finding]:
    """Test the logarithm of smallest over largest group; the ratio is what is told."""
    if measure not in set(rows["measure"]):
        return
    largest, smallest = extremes(rows)
    wide = wide_of(rows, measure)
    tested = judge(
        claim, panel.title, np.log(smallest.of(wide) / largest.of(wide)), note=f"{smallest} over {largest}, {note}"
    )
    yield replace(tested, effect=math.exp(tested.effect), low=math.exp(tested.low), high=math.exp(tested.high))


def margins_lower(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 4."""
    for panel in comparable(table):
        rows = lowest(finetuned(rows_of(table, panel)))
        if "margin" in set(rows["measure"]):
            largest, smallest = extremes(rows)
            wide = wide_of(rows, "margin")
            note = f"{smallest} less {largest}, at {rows['budget'].iloc[0]} of the ReLUs"
            yield judge(4, panel.title, smallest.of(wide) - largest.of(wide), note=note, sign=-1)


def distance_grows(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 5; at the lowest budget beside the control as well."""
    for panel in tested_panels(table):
        rows = finetuned(rows_of(table, panel))
        if "parameter_distance" not in set(rows["measure"]):
            continue
        distance = wide_of(rows, "parameter_distance")[OVERALL]
        # A control is trained for as long as the lowest budget, so it is no end of the line.
        cut = rows.loc[rows["relus"] < rows["total_relus"], "percent"].unique()
        slopes = _slopes(distance[distance.index.isin(cut, level="percent")])
        if len(slopes):
            yield judge(5, panel.title, slopes)
        whole, masks = _control(table, panel, rows)
        if "parameter_distance" not in set(whole["measure"]) or rows["percent"].min() == 100:
            continue
        low = distance.xs(rows["percent"].min(), level="percent")
        further = low - wide_of(whole, "parameter_distance")[OVERALL].droplevel("percent")
        note = f"at {lowest(rows)['budget'].iloc[0]} of the ReLUs; the control is that of the masks {masks}"
        yield judge(5, panel.title, further.dropna(), note=note, variant=DISTANCE_CONTROL)


def accuracy_hardly_moves(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 6."""
    for panel in tested_panels(table):
        rows = rows_of(table, panel)
        before = bases(rows)
        if before.empty:
            continue
        own = lowest(finetuned(rows))
        base = wide_of(before, "accuracy")[OVERALL].droplevel("percent")
        after = wide_of(own, "accuracy")[OVERALL].droplevel("percent")
        note = f"{own['budget'].iloc[0]} of the ReLUs, finetuned, less all of them"
        yield judge(6, panel.title, 100 * (after - base).dropna(), -HARDLY, note)


def deepreduce_is_worse(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 7."""
    held = comparable(table)
    for panel in held:
        if panel.method != SNL:
            continue
        # Of the same base networks, since it is asked seed by seed.
        other = _like(panel, held, table, "cell", method=DR)
        if other is None:
            continue
        rows, others = (lowest(finetuned(rows_of(table, one))) for one in (panel, other))
        _, smallest = extremes(rows)
        drops = [smallest.of(wide_of(one, "relative_drop")).droplevel("percent") for one in (rows, others)]
        note = f"{smallest}, SNL at {rows['budget'].iloc[0]}, DeepReDuce at {others['budget'].iloc[0]} of the ReLUs"
        where = replace(panel, method="DeepReDuce less SNL").title
        yield judge(7, where, (drops[1] - drops[0]).dropna(), note=note)
        right = [smallest.of(wide_of(one, "accuracy")).droplevel("percent") for one in (rows, others)]
        yield judge(7, where, 100 * (right[0] - right[1]).dropna(), note=note, variant=POINTS)


def mitigation_helps_all(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 8: told of the group that gains least."""
    for panel in tested_panels(table):
        rows = rows_of(table, panel)
        if not len(finetuned(rows, "lagrangian")):
            continue
        gains = _gains(rows)
        tested = [judge(8, panel.title, gains[group], note=str(group)) for group in gains if group != OVERALL]
        if tested:
            yield _of_every_group(tested)


def _of_every_group(tested: Sequence[Finding]) -> Finding:
    """All must gain for the claim, one must lose against it: of many groups one seems to by chance (Bonferroni)."""
    least = min(tested, key=lambda one: math.inf if math.isnan(one.effect) else one.effect)
    told = f"which gains least of {len(tested)} groups"
    lost = [one for one in tested if one.effect <= 0 and not math.isnan(one.p)]
    if lost:
        surest = min(lost, key=lambda one: one.p)
        p = min(1.0, len(tested) * surest.p)
        needed = seeds_needed(surest.effect, surest.spread, tests=len(tested))
        if p < 1 - LEVEL:
            told = told if surest is least else f"which of {len(tested)} groups loses most surely"
            least = replace(surest, verdict=FAILS)
        else:
            least = replace(least, verdict=UNDECIDED)
    else:
        # The largest of the groups' says whether all gain; unknown of one group, it is unknown.
        p = float(np.max([one.p for one in tested]))
        least = replace(least, verdict=HOLDS if {one.verdict for one in tested} == {HOLDS} else UNDECIDED)
        needed = max((one.needed for one in tested if not math.isnan(one.needed)), default=math.nan)
    unsure = least.verdict == UNDECIDED and not math.isnan(p)
    note = f"{least.note}, {told}; mean over budgets"
    return replace(least, note=note, p=p, needed=needed if unsure else math.nan)


def mitigation_helps_the_smallest(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 11."""
    for panel in comparable(table):
        rows = rows_of(table, panel)
        if len(finetuned(rows, "lagrangian")):
            _, smallest = extremes(rows)
            yield judge(11, panel.title, smallest.of(_gains(rows)), note=f"{smallest}; mean over budgets")


def _gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Points of accuracy that Algorithm 1 gains, mean over budgets: a row a seed and a column a group."""
    cut = rows[rows["relus"] < rows["total_relus"]]
    before, after = (wide_of(finetuned(cut, name), "accuracy") for name in ("erm", "lagrangian"))
    return (100 * (after - before)).dropna(how="all").groupby(level="seed").mean()


def step_hardly_matters(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 9."""
    for panel in comparable(table):
        rows = rows_of(table, panel)
        variants = variants_of_mu(rows)
        if len(variants) < 2:
            continue
        _, smallest = extremes(rows)
        rows = rows[rows["relus"] < rows["total_relus"]]
        means = pd.DataFrame(
            {
                mu: smallest.of(wide_of(rows[rows["finetune"] == name], "accuracy")).groupby(level="seed").mean()
                for mu, name in variants
            }
        ).dropna()
        spread = 100 * (means.max(axis=1) - means.min(axis=1))
        note = f"{smallest}, μ from {variants[0][0]:g} to {variants[-1][0]:g}; mean over budgets"
        yield judge(9, panel.title, spread, HARDLY, note, sign=-1)


def other_networks_alike(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 10: claim 1 in other networks; how far they differ from ResNet-18 is in the note."""
    held = comparable(table)
    for panel in held:
        if panel.model not in (VGG, WRN):
            continue
        twin = _like(panel, held, table, "scale", model=R18)
        usual = f"; ResNet-18: {_disparity_slopes(rows_of(table, twin))[0].mean():+.2f}" if twin is not None else ""
        yield from _judged_slopes(10, panel, table, usual)


def _like(panel: Panel, held: Sequence[Panel], table: pd.DataFrame, shared: str, **differs: str) -> Panel | None:
    """The panel of the same data that differs in network or method alone, and whose base networks share a value."""
    kind = replace(panel, **differs).kind
    own = set(bases(rows_of(table, panel))[shared])
    alike = [
        other
        for other in held
        if other.kind == kind and other.label == panel.label and own & set(bases(rows_of(table, other))[shared])
    ]
    # Of the same study, if that has one.
    return min(alike, key=lambda other: other.study != panel.study, default=None)


#: The claims, by number.
CLAIMS: dict[int, Claim] = {
    1: Claim(
        "The disparity grows as ReLUs go: the fewer are kept, the more the smallest group loses beyond the largest.",
        "Section 5.1, Figures 1, 6 and 11",
        "relative accuracy drop of the smallest less that of the largest group, points for each halving of the ReLUs",
        "above 0",
        disparity_grows,
        variants={
            POINTS: "points of accuracy that the smallest group loses beyond the largest, for each halving",
            CONTROL: "as above, but drops are from the network that kept all its ReLUs and was trained on alike",
            LOWEST: "points that the smallest group loses beyond the largest at the lowest budget, from the base",
            LOWEST_CONTROL: "the same from the network that kept all its ReLUs and was trained on alike",
            MOVED: "points of the smallest group's drop at the lowest budget that a shift of output biases gives back, "
            "chosen on validation images, beyond what the same shift gives the base network",
            MOVED_CONTROL: "the same beyond what a shift chosen for it gives the network that kept all its ReLUs and "
            "was trained on alike",
            SHIFTED: "points that the smallest group loses beyond the largest at the lowest budget, both shifted alike",
            SHIFTED_CONTROL: "the same from the network that kept all its ReLUs and was trained on alike, each network "
            "shifted by what was chosen for it",
        },
    ),
    2: Claim(
        "Gradient norms are higher for minorities.",
        "Section 5.2, Figures 3 and 8",
        "gradient norm of the smallest group over that of the largest",
        "above 1",
        gradient_norms_higher,
        threshold=1.0,
        ratio=True,
    ),
    3: Claim(
        "The largest eigenvalue of the group Hessian is higher for minorities.",
        "Section 4, Figure 4",
        "λ_max of the smallest group over that of the largest, base network",
        "above 1",
        eigenvalues_higher,
        threshold=1.0,
        ratio=True,
    ),
    4: Claim(
        "Minorities lie nearer to the decision boundary.",
        "Section 5.3, Figures 8 and 14",
        "softmax margin of the smallest less that of the largest group",
        "below 0",
        margins_lower,
    ),
    5: Claim(
        "The weights move the further, the fewer ReLUs are kept.",
        "Section 5.2, Figure 8",
        "growth of ‖θ̃ − θ‖ for each halving of the ReLUs",
        "above 0",
        distance_grows,
        variants={
            DISTANCE_CONTROL: "‖θ̃ − θ‖ at the lowest budget less that of the network that kept all its ReLUs and was "
            "trained on alike",
        },
    ),
    6: Claim(
        "The overall accuracy hardly moves.",
        "Section 5, Figure 5",
        "change of the overall accuracy at the lowest budget, points",
        f"above −{HARDLY:g}",
        accuracy_hardly_moves,
        threshold=-HARDLY,
    ),
    7: Claim(
        "DeepReDuce hurts the smallest group more than SNL does.",
        "Section 5.1 and 7, Figure 6",
        "relative accuracy drop of the smallest group, DeepReDuce less SNL, points, at the lowest budget",
        "above 0",
        deepreduce_is_worse,
        variants={
            POINTS: "points of accuracy that the smallest group loses, DeepReDuce less SNL, at the lowest budget"
        },
    ),
    8: Claim(
        "Algorithm 1 helps every group at every budget.",
        "Section 6, Figures 9 and 12",
        "gain of accuracy over plain distillation, points",
        "above 0 for every group",
        mitigation_helps_all,
        least=True,
    ),
    9: Claim(
        "The step μ of the multipliers hardly matters.",
        "Appendix D.2, Figure 15",
        "spread of the smallest group's accuracy over the values of μ, points",
        f"below {HARDLY:g}",
        step_hardly_matters,
        threshold=HARDLY,
    ),
    10: Claim(
        "VGG-19 and WRN-22-8 behave like the ResNets.",
        "Section 5.1, Figure 7",
        "as claim 1",
        "above 0",
        other_networks_alike,
    ),
    11: Claim(
        "Algorithm 1 helps the smallest group.",
        "Section 6, Figures 9 and 12",
        "gain of its accuracy over plain distillation, points",
        "above 0",
        mitigation_helps_the_smallest,
    ),
}


def findings(table: pd.DataFrame, compared: pd.DataFrame | None = None) -> pd.DataFrame:
    """Test every claim.

    Args:
        table: The table of one or more studies (:mod:`fairline.study.store`).
        compared: What their comparisons say of each seed (:func:`fairline.study.store.read_by_seed`), of which claim 1
            tells how much of a drop is a moved prior; not told without.

    Returns:
        A row for each claim and panel, with the fields of :class:`Finding`. What several studies or masks hold is
        tested in each.
    """
    found = [asdict(finding) for claim in CLAIMS.values() for finding in claim.test(table)]
    if compared is not None:
        found += [asdict(finding) for finding in moved_prior(table, compared)]
    frame = pd.DataFrame(found, columns=list(Finding.__dataclass_fields__))
    frame["p_holm"] = corrected(frame["p"].to_numpy(float))
    frame["corrected"] = frame["verdict"].where(frame["p_holm"] < 1 - LEVEL, UNDECIDED)
    return frame


def summary(found: pd.DataFrame) -> dict[int, str]:
    """The verdict on each claim over its panels, in words; where some are undecided, how many lie on its side."""
    words = {}
    for number in CLAIMS:
        own = found[(found["claim"] == number) & (found["variant"] == "")]
        counts = own["verdict"].value_counts()
        if own.empty:
            words[number] = "not tested"
        elif len(counts) == 1:
            words[number] = str(counts.index[0])
        else:
            words[number] = ", ".join(
                f"{name} in {counts[name]}" for name in (HOLDS, FAILS, UNDECIDED) if name in counts
            )
        signs = own["agrees"].dropna()
        if UNDECIDED in counts and len(signs):
            words[number] += f" (on its side: {int(signs.sum())} of {len(signs)})"
    return words


def over_panels(found: pd.DataFrame) -> pd.DataFrame:
    """What the panels of each claim say together: they share data and base networks, so this only describes.

    Args:
        found: From :func:`findings`.

    Returns:
        A row for each claim and variant: ``panels``, ``tested`` (of two seeds or more), how many ``holds``, ``fails``
        and are ``undecided``, and the first two after Holm (``holds_holm``, ``fails_holm``); ``on_side`` of ``signed``
        means, with the sign test's ``p_sign``; of a random-effects mean ``mean``, ``low``, ``high``, ``tau``, ``i2``
        and ``pooled`` panels, missing where fewer than two have a spread. Claim 8, whose number is that of the group
        worst off, has neither test nor mean.
    """
    rows = []
    for (number, variant), own in found.groupby(["claim", "variant"], sort=False):
        signs = own["agrees"].dropna().astype(bool)
        least = CLAIMS[number].least
        summed = _columns(_NONE) if least else _pooled(own, CLAIMS[number].ratio)
        counts = {
            f"{name}{suffix}": int((own[column] == verdict).sum())
            for column, suffix in (("verdict", ""), ("corrected", "_holm"))
            for name, verdict in (("holds", HOLDS), ("fails", FAILS), ("undecided", UNDECIDED))
        }
        about = {"claim": number, "variant": variant, "panels": len(own), "tested": int((own["seeds"] > 1).sum())}
        p_sign = math.nan if least else sign_test(int(signs.sum()), len(signs))
        sides = {"on_side": int(signs.sum()), "signed": len(signs), "p_sign": p_sign}
        rows.append({**about, **counts, **sides, **summed})
    return pd.DataFrame(rows)


#: Where there is no mean over panels.
_NONE = Pooled(math.nan, math.nan, math.nan, math.nan, math.nan, 0)


def _pooled(own: pd.DataFrame, ratio: bool) -> dict[str, float]:
    """The random-effects mean of some findings; of ratios it is that of logarithms, told as a ratio."""
    means = own["effect"].to_numpy(float)
    variances = own["spread"].to_numpy(float) ** 2 / own["seeds"].clip(lower=1).to_numpy(float)
    found = pooled(np.log(means) if ratio else means, variances)
    if found is None:
        return _columns(_NONE)
    if ratio:
        mean, low, high = (math.exp(each) for each in (found.mean, found.low, found.high))
        found = replace(found, mean=mean, low=low, high=high)
    return _columns(found)


def _columns(summed: Pooled) -> dict[str, float]:
    told = asdict(summed)
    return {"pooled": told.pop("panels"), **told}
