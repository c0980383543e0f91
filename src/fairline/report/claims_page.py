"""The page that puts each claim of the paper beside what was measured: verdicts, then effects drawn, then details."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.charts import BASE, INK, themed
from fairline.report.claims import CLAIMS, Claim, over_panels, summary
from fairline.report.evidence import MOST
from fairline.report.finding import FAILS, HOLDS, UNDECIDED
from fairline.report.moved_prior import MOVED, MOVED_CONTROL
from fairline.report.page import write_page
from fairline.report.paper_figures import FIGURES, draw, draw_others, draw_shifted

#: What the page styles a verdict by, and its colour in a figure.
_KINDS = {HOLDS: "yes", FAILS: "no", UNDECIDED: "open"}
_COLOURS = {HOLDS: "#009E73", FAILS: "#D55E00", UNDECIDED: BASE}

#: Columns of :func:`fairline.report.claims.over_panels` that count a verdict.
_COLUMNS = {"holds": HOLDS, "fails": FAILS, "undecided": UNDECIDED}

#: Height of a panel in a forest plot.
_STEP = 38


def write_claims(table: pd.DataFrame, found: pd.DataFrame, target: Path, compared: pd.DataFrame | None = None) -> Path:
    """Write the page: each claim beside what was measured, then the figures.

    Args:
        table: The table of one or more studies.
        found: Its :func:`fairline.report.claims.findings`.
        target: The HTML file.
        compared: What comparisons say of each seed (:func:`fairline.study.store.read_by_seed`), to draw what a shift
            of biases gives back.

    Returns:
        The file.

    Raises:
        FairlineError: The table does not suit, or the file cannot be written.
    """
    papers = draw(table)
    figures = {f"figure_{number}": chart for number, chart in papers.items()} | draw_others(table)
    figures |= {} if compared is None else draw_shifted(table, compared)
    words, summed = summary(found), over_panels(found)
    claims, forests = [], {}
    for number, claim in CLAIMS.items():
        own = found[found["claim"] == number]
        told = _told(claim, own, summed[summed["claim"] == number] if len(summed) else summed)
        for place, each in enumerate(told):
            each["forest"] = f"forest_{number}_{place}"
            forests[each["forest"]] = each.pop("chart")
        claims.append({"number": number, **asdict(claim), "verdict": words[number], "told": told})
    forests = {name: chart for name, chart in forests.items() if chart is not None}
    return write_page(
        target,
        "claims.html.j2",
        {**forests, **figures},
        title="The paper's claims beside what was measured",
        claims=claims,
        forests=list(forests),
        figures=list(figures),
        tests=int(found["p"].notna().sum()),
        missing=[number for number in FIGURES if number not in papers] if papers else [],
        papers=bool(papers),
        scales=list(dict.fromkeys(table["scale"])),
        studies=_studies(table),
    )


def _studies(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Where the rows come from."""
    studies = table[["study", "scale", "spec_hash", "data", "model"]].drop_duplicates("study")
    seeds = table.groupby("study")["seed"].nunique()
    commits = table.groupby("study")["commit"].agg(lambda column: ", ".join(sorted({str(c)[:9] for c in column})))
    devices = table.groupby("study")["device"].agg(lambda column: ", ".join(sorted(set(map(str, column)))))
    return [
        {**row, "seeds": seeds[row["study"]], "commit": commits[row["study"]], "device": devices[row["study"]]}
        for row in studies.to_dict("records")
    ]


def _told(claim: Claim, own: pd.DataFrame, summed: pd.DataFrame) -> list[dict[str, Any]]:
    """The claim's number, then its variants: verdicts counted, what the panels say together, a figure and rows."""
    told = []
    for row in summed.to_dict("records"):
        rows = own[own["variant"] == row["variant"]]
        told.append(
            {
                "variant": row["variant"],
                "effect": claim.variants.get(row["variant"], claim.effect),
                "pills": _pills(row, ""),
                "after_holm": _pills(row, "_holm"),
                "together": _together(row, claim),
                "signs": _signs(row),
                "power": _power(rows),
                "rows": [_row(each) for each in rows.to_dict("records")],
                "chart": forest(rows, row, claim),
            }
        )
    return told


def _pills(row: Mapping[str, Any], suffix: str) -> list[dict[str, str]]:
    """How many panels have each verdict, in words and colours; none of a verdict that no panel has."""
    of = row["panels"]
    counts = {name: row[f"{column}{suffix}"] for column, name in _COLUMNS.items()}
    # A shift that gives something back speaks neither for the claim nor against it.
    words = {HOLDS: "above 0", FAILS: "below 0"} if row["variant"] in (MOVED, MOVED_CONTROL) else {}
    return [
        {"kind": _KINDS[name], "words": words.get(name, name) + ("" if count == of else f" in {count} of {of}")}
        for name, count in counts.items()
        if count
    ]


def _number(value: float) -> str:
    """A number with three digits, and its minus sign."""
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "−")


def _together(row: Mapping[str, Any], claim: Claim) -> str:
    """The random-effects mean, in a sentence."""
    if claim.least:
        return (
            "The number is of one of several groups, some of which chance alone puts below 0: the claim does not hold "
            "where a group loses after Bonferroni’s correction for the groups, and no mean over panels is told."
        )
    if not row["pooled"]:
        return "Fewer than two panels have a spread over seeds, so no mean over panels is told."
    left = row["panels"] - row["pooled"]
    of = f"{row['pooled']} panels" + (f" ({left} without a spread over seeds left out)" if left else "")
    spread = f"τ = {_number(row['tau'])}" + (" on the logarithm" if claim.ratio else "")
    return (
        f"Random-effects mean of {of}: {_number(row['mean'])} [{_number(row['low'])}, {_number(row['high'])}]; "
        f"the panels differ by {spread}, I² = {100 * row['i2']:.0f} %."
    )


def _signs(row: Mapping[str, Any]) -> str:
    """How many means lie on the claim's side."""
    if not row["signed"]:
        return ""
    side = "above 0" if row["variant"] in (MOVED, MOVED_CONTROL) else "on the claim’s side"
    if math.isnan(row["p_sign"]):
        return f"{row['on_side']} of {row['signed']} lie {side}."
    p = _probability(row["p_sign"])
    p = p if p.startswith("<") else f"= {p}"
    return f"{row['on_side']} of {row['signed']} means lie {side} (sign test: p {p})."


def _power(rows: pd.DataFrame) -> str:
    """How many seeds the undecided panels would need."""
    needed = rows["needed"].dropna()
    single = int((rows["verdict"].eq(UNDECIDED) & rows["needed"].isna()).sum())
    parts = []
    if len(needed):
        least, most = needed.min(), needed.max()
        many = f"{_seeds(least)}" if least == most else f"{_seeds(least)} to {_seeds(most)}"
        panels = "panel" if len(needed) == 1 else "panels"
        parts.append(f"{len(needed)} undecided {panels} of several seeds would need {many} of them")
    if single:
        parts.append(f"for {single} without a spread over seeds that is not known")
    told = "; ".join(parts)
    return f"{told[:1].upper()}{told[1:]}." if parts else ""


def _seeds(needed: float) -> str:
    return f"more than {MOST:,}" if math.isinf(needed) else f"{needed:.0f}"


def _probability(p: float) -> str:
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.2g}"


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "effect": "" if math.isnan(row["effect"]) else _number(row["effect"]),
        "interval": "" if math.isnan(row["low"]) else f"[{_number(row['low'])}, {_number(row['high'])}]",
        "kind": _KINDS[row["verdict"]],
        "p": _probability(row["p"]),
        "p_holm": _probability(row["p_holm"]),
        "kind_holm": _KINDS[row["corrected"]],
        "needed": "" if math.isnan(row["needed"]) else _seeds(row["needed"]),
    }


def forest(rows: pd.DataFrame, row: Mapping[str, Any], claim: Claim) -> Any:
    """Effect and interval of each panel one below another, and the random-effects mean as a diamond.

    Args:
        rows: Findings of one claim and variant.
        row: Of :func:`fairline.report.claims.over_panels`.
        claim: The claim.

    Returns:
        An Altair chart as wide as its place; None where no panel has an effect.
    """
    shown = rows[rows["effect"].notna()]
    if shown.empty:
        return None
    names = [f"{each.panel} · n = {each.seeds}" for each in shown.itertuples()]
    frame = shown[["effect", "low", "high", "verdict", "corrected", "p", "p_holm", "note"]].assign(name=names)
    frame["firm"] = frame["corrected"] != UNDECIDED
    places = [str(place) for place in range(len(frame) + bool(row["pooled"]))]
    frame["place"] = places[: len(frame)]
    y = alt.Y("place:N", sort=places, axis=None, scale=alt.Scale(domain=places))
    scale = alt.Scale(type="log", nice=False, padding=12) if claim.ratio else alt.Scale(zero=False, padding=12)
    x = alt.X("effect:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5, grid=True))
    layers = [_threshold(claim, scale), *_effects(frame, x, y, scale)]
    if row["pooled"]:
        layers += _diamond(row, places[-1], x, y)
    return themed(alt.layer(*layers).properties(width="container", height=alt.Step(_STEP)))


def _threshold(claim: Claim, scale: alt.Scale) -> Any:
    rule = alt.Chart(pd.DataFrame({"effect": [claim.threshold]})).mark_rule(color=BASE, strokeDash=[4, 3])
    return rule.encode(x=alt.X("effect:Q", scale=scale, title=None))


def _effects(frame: pd.DataFrame, x: alt.X, y: alt.Y, scale: alt.Scale) -> Sequence[Any]:
    """Names, intervals and points; filled where the verdict stands after Holm's correction."""
    chart = alt.Chart(frame)
    colour = alt.Color("verdict:N", scale=alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values())), legend=None)
    tooltip = [
        alt.Tooltip("name:N", title="panel"),
        alt.Tooltip("effect:Q", format=".3g"),
        alt.Tooltip("low:Q", format=".3g", title="95 % from"),
        alt.Tooltip("high:Q", format=".3g", title="to"),
        alt.Tooltip("verdict:N"),
        alt.Tooltip("p:Q", format=".2g"),
        alt.Tooltip("p_holm:Q", format=".2g", title="p after Holm"),
        alt.Tooltip("note:N", title="about"),
    ]
    limits = alt.Chart(frame.dropna(subset=["low", "high"])).mark_rule(strokeWidth=2, yOffset=8)
    found = [
        _names(chart, y),
        limits.encode(y=y, x=alt.X("low:Q", scale=scale, title=None), x2="high:Q", color=colour),
    ]
    for firm in (True, False):
        own = chart.transform_filter(alt.datum.firm == firm)
        points = own.mark_point(filled=firm, size=70, strokeWidth=2, opacity=1, yOffset=8)
        found.append(points.encode(x=x, y=y, color=colour, tooltip=tooltip))
    return found


def _names(chart: Any, y: alt.Y) -> Any:
    text = chart.mark_text(align="left", baseline="middle", dy=-9, fontSize=12, color=INK)
    return text.encode(x=alt.value(0), y=y, text="name:N")


def _diamond(row: Mapping[str, Any], place: str, x: alt.X, y: alt.Y) -> Sequence[Any]:
    name = f"Random-effects mean of {row['pooled']} panels"
    values = {"effect": row["mean"], "low": row["low"], "high": row["high"], "place": place, "name": name}
    chart = alt.Chart(pd.DataFrame([values]))
    tooltip = [alt.Tooltip("name:N"), *(alt.Tooltip(f"{part}:Q", format=".3g") for part in ("effect", "low", "high"))]
    mean = chart.mark_point(shape="diamond", size=220, filled=True, opacity=1, color=INK, yOffset=8)
    return [
        _names(chart, y),
        chart.mark_rule(strokeWidth=3, color=INK, yOffset=8).encode(y=y, x="low:Q", x2="high:Q"),
        mean.encode(x=x, y=y, tooltip=tooltip),
    ]


__all__ = ["forest", "write_claims"]
