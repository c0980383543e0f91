"""The claims of the paper as tests on what studies measured, and the page that puts the two side by side.

A claim is tested in every panel (a study's data, network and masks) that has what it speaks of. One number is taken
of each seed; its mean over seeds, with Student's 95 % interval, decides: the claim *holds* where the whole interval
lies on its side of a threshold, *does not hold* where the whole interval lies on the other, and is *undecided*
otherwise, and with one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fairline.audit.intervals import student_interval
from fairline.data.grouped import OVERALL
from fairline.report.page import write_page
from fairline.report.panels import (
    DR,
    R18,
    SNL,
    VGG,
    WRN,
    Panel,
    finetuned,
    panels,
    rows_of,
    variants_of_mu,
)
from fairline.report.paper_figures import FIGURES, draw, draw_others

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"

#: Points of overall accuracy that "hardly moves" allows, and points that μ may make of a difference.
HARDLY = 2.0


@dataclass(frozen=True)
class Finding:
    """One claim in one panel.

    Attributes:
        claim: Its number.
        panel: Where it was tested, in words.
        effect: Mean over seeds.
        low: Lower 95 % limit, Student's.
        high: Upper limit.
        seeds: How many.
        verdict: ``holds``, ``does not hold`` or ``undecided``.
        note: Which groups and budgets it is about.
        agrees: Whether the mean, whatever its interval, lies on the claim's side; None where there is none.
    """

    claim: int
    panel: str
    effect: float
    low: float
    high: float
    seeds: int
    verdict: str
    note: str = ""
    agrees: bool | None = None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        text: What the paper finds.
        source: Where.
        effect: What the tested number is, with its unit.
        rule: When the claim holds.
        test: Takes the table and yields findings.
    """

    text: str
    source: str
    effect: str
    rule: str
    test: Callable[[pd.DataFrame], Iterator[Finding]]


def judge(
    claim: int, panel: str, values: Sequence[float] | pd.Series, above: float = 0.0, note: str = "", sign: int = 1
) -> Finding:
    """Test whether a mean lies above a threshold.

    Args:
        claim: Number of the claim.
        panel: Where.
        values: One number a seed; those that are not finite are left out.
        above: The threshold.
        note: What the numbers are about.
        sign: −1 tests whether it lies below.

    Returns:
        The finding, with the numbers as they were given.
    """
    own = np.asarray(values, float)
    own = own[np.isfinite(own)]
    mean = float(own.mean()) if len(own) else math.nan
    agrees = None if math.isnan(mean) else sign * mean > sign * above
    if len(own) < 2:
        return Finding(claim, panel, mean, math.nan, math.nan, len(own), UNDECIDED, note, agrees)
    low, high = student_interval(own)
    near, far = (low, high) if sign > 0 else (-high, -low)
    verdict = HOLDS if near > sign * above else FAILS if far < sign * above else UNDECIDED
    return Finding(claim, panel, mean, low, high, len(own), verdict, note, agrees)


@dataclass(frozen=True)
class _Extreme:
    """The group with the most or the fewest training images; or those, where several have as many to 1 %."""

    groups: tuple[str, ...]
    which: str

    def __str__(self) -> str:
        return self.groups[0] if len(self.groups) == 1 else f"the {len(self.groups)} {self.which} groups"

    def of(self, wide: pd.DataFrame) -> pd.Series:
        """Their mean in a table with a column a group."""
        return wide.reindex(columns=list(self.groups)).mean(axis=1)


def _extremes(rows: pd.DataFrame) -> tuple[_Extreme, _Extreme]:
    """The largest and the smallest group."""
    sizes = rows[rows["group"] != OVERALL].groupby("group", sort=False)["train_n"].mean()
    largest, smallest = sizes.index[sizes >= 0.99 * sizes.max()], sizes.index[sizes <= 1.01 * sizes.min()]
    return _Extreme(tuple(map(str, largest)), "largest"), _Extreme(tuple(map(str, smallest)), "smallest")


def _wide(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Values of a measure, a row a seed and budget and a column a group."""
    own = rows[rows["measure"] == measure]
    return own.groupby(["seed", "percent", "group"], sort=False)["value"].mean().unstack("group")


def _slopes(values: pd.Series) -> pd.Series:
    """Least-squares slope of each seed's values against halvings of the ReLUs."""
    slopes = {}
    for seed, own in values.dropna().groupby(level="seed"):
        percent = own.index.get_level_values("percent").to_numpy(float)
        kept = percent > 0
        if len(set(percent[kept])) > 1:
            slopes[seed] = np.polyfit(np.log2(100 / percent[kept]), own.to_numpy()[kept], 1)[0]
    return pd.Series(slopes, dtype=float)


def _lowest(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["percent"] == rows["percent"].min()]


def _disparity_slopes(rows: pd.DataFrame) -> tuple[pd.Series, str]:
    largest, smallest = _extremes(rows)
    wide = _wide(finetuned(rows), "relative_drop")
    difference = smallest.of(wide) - largest.of(wide)
    note = f"{smallest} against {largest}"
    never = smallest.of(wide).isna().groupby(level="seed").all()
    if never.any():
        note += f"; the base network of {never.sum()} of {len(never)} seeds gets none of {smallest} right"
    return _slopes(difference), note


def _tested(table: pd.DataFrame) -> list[Panel]:
    """Panels that have groups to compare and a plain finetune, of which the claims speak."""
    held = []
    for panel in panels(table):
        rows = rows_of(table, panel)
        if len(finetuned(rows)) and rows.loc[rows["group"] != OVERALL, "group"].nunique() > 1:
            held.append(panel)
    return held


def _judged_slopes(claim: int, panel: Panel, table: pd.DataFrame, more: str = "") -> Iterator[Finding]:
    """Test that the disparity grows; where no drop is defined, the finding says so."""
    rows = rows_of(table, panel)
    if finetuned(rows)["asked"].nunique() > 1:
        slopes, note = _disparity_slopes(rows)
        yield judge(claim, panel.title, slopes, note=note + more)


def disparity_grows(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 1."""
    for panel in _tested(table):
        yield from _judged_slopes(1, panel, table)


def gradient_norms_higher(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 2."""
    for panel in _tested(table):
        rows = rows_of(table, panel)
        own = _lowest(finetuned(rows))
        yield from _ratio(2, panel, own, "gradient_norm", f"at {own['budget'].iloc[0]} of the ReLUs")


def eigenvalues_higher(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 3; a base network that several methods share is tested once."""
    seen = set()
    for panel in _tested(table):
        rows = rows_of(table, panel)
        rows = rows[rows["stage"] == "base"]
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
    largest, smallest = _extremes(rows)
    wide = _wide(rows, measure)
    tested = judge(
        claim, panel.title, np.log(smallest.of(wide) / largest.of(wide)), note=f"{smallest} over {largest}, {note}"
    )
    yield replace(tested, effect=math.exp(tested.effect), low=math.exp(tested.low), high=math.exp(tested.high))


def margins_lower(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 4."""
    for panel in _tested(table):
        rows = _lowest(finetuned(rows_of(table, panel)))
        if "margin" in set(rows["measure"]):
            largest, smallest = _extremes(rows)
            wide = _wide(rows, "margin")
            note = f"{smallest} less {largest}, at {rows['budget'].iloc[0]} of the ReLUs"
            yield judge(4, panel.title, smallest.of(wide) - largest.of(wide), note=note, sign=-1)


def distance_grows(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 5."""
    for panel in _tested(table):
        rows = finetuned(rows_of(table, panel))
        if "parameter_distance" in set(rows["measure"]):
            slopes = _slopes(_wide(rows, "parameter_distance")[OVERALL])
            if len(slopes):
                yield judge(5, panel.title, slopes)


def accuracy_hardly_moves(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 6."""
    for panel in _tested(table):
        rows = rows_of(table, panel)
        if not (rows["stage"] == "base").any():
            continue
        own = _lowest(finetuned(rows))
        base = _wide(rows[rows["stage"] == "base"], "accuracy")[OVERALL].droplevel("percent")
        after = _wide(own, "accuracy")[OVERALL].droplevel("percent")
        note = f"{own['budget'].iloc[0]} of the ReLUs, finetuned, less all of them"
        yield judge(6, panel.title, 100 * (after - base).dropna(), -HARDLY, note)


def deepreduce_is_worse(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 7."""
    held = _tested(table)
    for panel in held:
        other = _like(panel, held, method=DR)
        if panel.method != SNL or other is None:
            continue
        rows, others = (_lowest(finetuned(rows_of(table, one))) for one in (panel, other))
        _, smallest = _extremes(rows)
        drops = [smallest.of(_wide(one, "relative_drop")).droplevel("percent") for one in (rows, others)]
        note = f"{smallest}, SNL at {rows['budget'].iloc[0]}, DeepReDuce at {others['budget'].iloc[0]} of the ReLUs"
        where = replace(panel, method="DeepReDuce less SNL").title
        yield judge(7, where, (drops[1] - drops[0]).dropna(), note=note)


def mitigation_helps_all(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 8: told of the group that gains least."""
    for panel in _tested(table):
        rows = rows_of(table, panel)
        if not len(finetuned(rows, "lagrangian")):
            continue
        gains = _gains(rows)
        tested = [judge(8, panel.title, gains[group], note=str(group)) for group in gains if group != OVERALL]
        least = min(tested, key=lambda one: one.effect)
        verdicts = {one.verdict for one in tested}
        whole = FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} else UNDECIDED
        note = f"{least.note}, which gains least of {len(tested)} groups; mean over budgets"
        yield Finding(8, panel.title, least.effect, least.low, least.high, least.seeds, whole, note, least.agrees)


def mitigation_helps_the_smallest(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 11."""
    for panel in _tested(table):
        rows = rows_of(table, panel)
        if len(finetuned(rows, "lagrangian")):
            _, smallest = _extremes(rows)
            yield judge(11, panel.title, smallest.of(_gains(rows)), note=f"{smallest}; mean over budgets")


def _gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Points of accuracy that Algorithm 1 gains, mean over budgets: a row a seed and a column a group."""
    before, after = (_wide(finetuned(rows, name), "accuracy") for name in ("erm", "lagrangian"))
    return (100 * (after - before)).dropna(how="all").groupby(level="seed").mean()


def step_hardly_matters(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 9."""
    for panel in _tested(table):
        rows = rows_of(table, panel)
        variants = variants_of_mu(rows)
        if len(variants) < 2:
            continue
        _, smallest = _extremes(rows)
        means = pd.DataFrame(
            {
                mu: smallest.of(_wide(rows[rows["finetune"] == name], "accuracy")).groupby(level="seed").mean()
                for mu, name in variants
            }
        ).dropna()
        spread = 100 * (means.max(axis=1) - means.min(axis=1))
        note = f"{smallest}, μ from {variants[0][0]:g} to {variants[-1][0]:g}; mean over budgets"
        yield judge(9, panel.title, spread, HARDLY, note, sign=-1)


def other_networks_alike(table: pd.DataFrame) -> Iterator[Finding]:
    """Claim 10: claim 1 in other networks; how far they differ from ResNet-18 is in the note."""
    held = _tested(table)
    for panel in held:
        if panel.model not in (VGG, WRN):
            continue
        twin = _like(panel, held, model=R18)
        usual = f"; ResNet-18: {_disparity_slopes(rows_of(table, twin))[0].mean():+.2f}" if twin is not None else ""
        yield from _judged_slopes(10, panel, table, usual)


def _like(panel: Panel, held: Sequence[Panel], **differs: str) -> Panel | None:
    """The panel of the same data that differs in its network or method alone; of the same study, if that has one."""
    kind = replace(panel, **differs).kind
    alike = [other for other in held if other.kind == kind and other.label == panel.label]
    return min(alike, key=lambda other: other.study != panel.study, default=None)


#: The claims, by number.
CLAIMS: dict[int, Claim] = {
    1: Claim(
        "The disparity grows as ReLUs go: the fewer are kept, the more the smallest group loses beyond the largest.",
        "Section 5.1, Figures 1, 6 and 11",
        "relative accuracy drop of the smallest less that of the largest group, points for each halving of the ReLUs",
        "above 0",
        disparity_grows,
    ),
    2: Claim(
        "Gradient norms are higher for minorities.",
        "Section 5.2, Figures 3 and 8",
        "gradient norm of the smallest group over that of the largest",
        "above 1",
        gradient_norms_higher,
    ),
    3: Claim(
        "The largest eigenvalue of the group Hessian is higher for minorities.",
        "Section 4, Figure 4",
        "λ_max of the smallest group over that of the largest, base network",
        "above 1",
        eigenvalues_higher,
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
    ),
    6: Claim(
        "The overall accuracy hardly moves.",
        "Section 5, Figure 5",
        "change of the overall accuracy at the lowest budget, points",
        f"above −{HARDLY:g}",
        accuracy_hardly_moves,
    ),
    7: Claim(
        "DeepReDuce hurts the smallest group more than SNL does.",
        "Section 5.1 and 7, Figure 6",
        "relative accuracy drop of the smallest group, DeepReDuce less SNL, points, at the lowest budget",
        "above 0",
        deepreduce_is_worse,
    ),
    8: Claim(
        "Algorithm 1 helps every group at every budget.",
        "Section 6, Figures 9 and 12",
        "gain of accuracy over plain distillation, points",
        "above 0 for every group",
        mitigation_helps_all,
    ),
    9: Claim(
        "The step μ of the multipliers hardly matters.",
        "Appendix D.2, Figure 15",
        "spread of the smallest group's accuracy over the values of μ, points",
        f"below {HARDLY:g}",
        step_hardly_matters,
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


def findings(table: pd.DataFrame) -> pd.DataFrame:
    """Test every claim.

    Args:
        table: The table of one or more studies (:mod:`fairline.study.store`).

    Returns:
        A row for each claim and panel, with the fields of :class:`Finding`. What several studies or masks hold is
        tested in each.
    """
    found = [asdict(finding) for claim in CLAIMS.values() for finding in claim.test(table)]
    return pd.DataFrame(found, columns=list(Finding.__dataclass_fields__))


def summary(found: pd.DataFrame) -> dict[int, str]:
    """The verdict on each claim over its panels, in words; where some are undecided, how many lie on its side."""
    words = {}
    for number in CLAIMS:
        own = found[found["claim"] == number]
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


def write_claims(table: pd.DataFrame, found: pd.DataFrame, target: Path) -> Path:
    """Write the page: each claim beside what was measured, then the figures.

    Args:
        table: The table of one or more studies.
        found: Its :func:`findings`.
        target: The HTML file.

    Returns:
        The file.

    Raises:
        FairlineError: The table does not suit, or the file cannot be written.
    """
    papers = draw(table)
    drawn = {f"figure_{number}": chart for number, chart in papers.items()} | draw_others(table)
    words = summary(found)
    claims = []
    for number, claim in CLAIMS.items():
        rows = [_row(row) for row in found[found["claim"] == number].to_dict("records")]
        claims.append({"number": number, **asdict(claim), "rows": rows, "verdict": words[number]})
    studies = table[["study", "scale", "spec_hash", "data", "model"]].drop_duplicates("study")
    seeds = table.groupby("study")["seed"].nunique()
    commits = table.groupby("study")["commit"].agg(lambda column: ", ".join(sorted({str(c)[:9] for c in column})))
    devices = table.groupby("study")["device"].agg(lambda column: ", ".join(sorted(set(map(str, column)))))
    return write_page(
        target,
        "claims.html.j2",
        drawn,
        title="The paper's claims beside what was measured",
        claims=claims,
        missing=[number for number in FIGURES if number not in papers] if papers else [],
        papers=bool(papers),
        scales=list(dict.fromkeys(table["scale"])),
        studies=[
            {**row, "seeds": seeds[row["study"]], "commit": commits[row["study"]], "device": devices[row["study"]]}
            for row in studies.to_dict("records")
        ],
    )


def _row(row: dict[str, Any]) -> dict[str, Any]:
    interval = "" if math.isnan(row["low"]) else f"[{row['low']:.3g}, {row['high']:.3g}]"
    return {
        **row,
        "effect": "" if math.isnan(row["effect"]) else f"{row['effect']:.3g}",
        "interval": interval,
        "kind": {HOLDS: "yes", FAILS: "no"}.get(row["verdict"], "open"),
    }
