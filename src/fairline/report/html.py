"""The fairness report: one HTML file that opens offline and says what may ship and who pays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fairline.audit.verdict import CANNOT_TELL, MAY, MAY_NOT
from fairline.charts import save_charts
from fairline.data.grouped import OVERALL, TOO_SMALL
from fairline.report import corrections, explanations, figures
from fairline.report import costs as cost_panel
from fairline.report.page import by_groups, settings, too_small, write_page
from fairline.report.verdict import (
    KINDS,
    Candidate,
    answer_told,
    candidates,
    cautions,
    focus,
    limits_told,
    named,
    sentence,
    signed,
)
from fairline.runs import Run

#: Below this, about ±10 points.
SMALL = 100

#: A relative drop divides by the images that the base network gets right; of fewer than these it is noise.
RARELY = 10


#: Networks of the table of all that are not folded.
FIRST = 6


def write_report(
    audit: str | Path,
    out: str | Path | None = None,
    *,
    costs: str | Path | None = None,
    within: float = 5.0,
    critical: Sequence[str] = (),
) -> Path:
    """Write the report of an audit run.

    Args:
        audit: Folder of a finished audit run.
        out: The HTML file; ``report.html`` in that folder by default.
        costs: Folder of a frontier run of this audit, for the cost panel.
        within: Percentage points that any group or class may lose.
        critical: Classes whose recall may not fall.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no finished audit, the costs are another's, or the tolerance or a class is none.
    """
    run = Run.read(audit, "audit")
    frame, found = judged(run, within, critical, costs)
    predictions = run.table("predictions.parquet")
    chosen = focus(found)
    variants = figures.main_variants(frame)
    variants.sort(key=lambda variant: chosen is not None and variant != chosen.variant)
    charts = figures.figures(frame, found, within)
    why = explanations.figures(frame, predictions) if explanations.explains(frame) else {}
    split = corrections.figures(frame)
    priced, content = ({}, {}) if costs is None else cost_panel.panel(costs, within, run, critical)
    return write_page(
        Path(out) if out is not None else run.folder / "report.html",
        "report.html.j2",
        charts | why | split | priced,
        title=f"Who pays for linearization: {run.data.name}{by_groups(run)}",
        verdict=_verdict(found, chosen, frame),
        networks=[_network_row(each, chosen) for each in _in_order(found, chosen)],
        first=FIRST,
        priced=any(each.costs for each in found),
        warnings=cautions(found) + warnings(frame, run) + explanations.warnings(frame),
        cards=[_card(frame, found, variant, charts) for variant in variants],
        why=_by_variant(why, variants),
        # What may ship stands at the top alone.
        costs=content | {"answers": []} if content else {},
        corrections=corrections.panel(frame, predictions) if split else [],
        correction_charts=split.keys(),
        **_explained(frame, found, variants),
        gaps=_gap_table(frame),
        counts=_counts_table(run.table("counts.parquet")),
        settings=settings(run),
        rare=_rare(frame),
        within=within,
        critical=list(critical),
        weights=weights_file(run),
        resamples=run.config["resamples"],
        split=run.config["split"],
    )


def _explained(frame: pd.DataFrame, found: Sequence[Candidate], variants: Sequence[str]) -> dict[str, Any]:
    """What the template shows of why groups pay, and what it asks of the rows."""
    return {
        "why_told": explanations.told(frame, found),
        "bounds": [(variant, table) for variant in variants if (table := explanations.bound_table(frame, variant))],
        "binary": explanations.binary_table(frame),
        "balance": explanations.balance_table(frame),
        "measured": set(frame["measure"]),
        "has_drop": bool((frame["measure"] == "relative_drop").any()),
        "has_linearized": bool((frame["stage"] != "base").any()),
        "has_control": any(each.control is not None for each in found),
    }


def judged(
    run: Run, within: float = 5.0, critical: Sequence[str] = (), costs: str | Path | None = None
) -> tuple[pd.DataFrame, list[Candidate]]:
    """An audit's rows, and its networks with their verdicts.

    Args:
        run: The audit.
        within: Percentage points that any group or class may lose.
        critical: Classes whose recall may not fall.
        costs: Folder of a frontier run of this audit.

    Returns:
        Rows from :func:`fairline.report.figures.prepare`; the candidates.

    Raises:
        FairlineError: The tolerance is none, there is no such class or the costs cannot be read.
    """
    frame = figures.prepare(run.table("audit.parquet"), run.table("counts.parquet"))
    saved = cost_panel.savings(run, None if costs is None else Run.read(costs, "frontier"))
    return frame, candidates(frame, run.table("predictions.parquet"), within, critical, saved)


def weights_file(run: Run) -> str:
    """The file that the base network's weights came from; empty if it began at random."""
    lineage: Mapping[str, Any] = run.config.get("lineage") or {str(each.folder): each.config for each in run.lineage()}
    files = [
        config["weights"]["file"]
        for config in lineage.values()
        if config.get("weights") and config["command"] == "train"
    ]
    return Path(files[0]).name if files else ""


def _verdict(found: Sequence[Candidate], chosen: Candidate | None, frame: pd.DataFrame) -> dict[str, Any]:
    """The box at the top: the answer, and of the network that it is about who pays, what it saves and how sure."""
    if chosen is None or chosen.is_control:
        if (frame["stage"] != "base").any() and not found:
            told = "These predictions do not say what the base network gets right, so nothing can be said of who loses."
            return {
                "answer": "Cannot tell",
                "kind": "open",
                "title": "There is no base network to compare with",
                "told": told,
            }
        return {"answer": "", "kind": "none", "title": answer_told(found), "told": _base_told(frame)}
    answer, kind = sentence(chosen.answer), KINDS[chosen.answer]
    lead = {"may": "", "open": "Nearest: ", "may-not": "Mildest: "}[kind]
    return {
        "answer": answer,
        "kind": kind,
        "title": answer_told(found),
        "told": f"{lead}{chosen.name if lead else ''}{'. ' if lead else ''}{sentence(chosen.reason())}",
        "rows": [
            ("What it saves", chosen.saved_told()),
            ("ReLUs or finetune", chosen.control_told()),
            ("All images", chosen.overall_told()),
            ("How sure", chosen.sure_told()),
        ],
    }


def _in_order(found: Sequence[Candidate], chosen: Candidate | None) -> list[Candidate]:
    """The one that the page is about, then what may ship, what is open and what may not; controls last."""
    rank = [MAY, CANNOT_TELL, MAY_NOT]
    return sorted(found, key=lambda each: (each is not chosen, each.is_control, rank.index(each.answer)))


def _network_row(each: Candidate, chosen: Candidate | None) -> dict[str, Any]:
    """A network in the table of all: its answer, who pays and what it saves, and in full what its box would say."""
    answer, kind = sentence(each.answer), KINDS[each.answer]
    cell = each.verdict.decisive
    low, high = float(cell["low"]), float(cell["high"])
    limits = "" if math.isnan(low) else f"{signed(low)} to {signed(high)}"
    return {
        "name": each.name,
        "answer": answer,
        "kind": kind,
        "control": each.is_control,
        "chosen": each is chosen,
        "who": named(cell),
        "change": signed(float(cell["change"])),
        "limits": limits,
        "whose": each.whose_told(),
        "wan": _saved(each.saved("seconds", "wan")),
        "bytes": _saved(each.saved("bytes")),
        "told": [sentence(each.reason()), each.control_told(), each.saved_told(), each.overall_told()],
    }


def _saved(percent: float) -> str:
    return "" if math.isnan(percent) else f"{percent:.0f} %".replace("-", "−")


def _card(frame: pd.DataFrame, found: Sequence[Candidate], variant: str, charts: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a variant: figures in pairs, sets of images with flags, and the paper's table."""
    own = figures.with_control(found, variant)
    here = figures.slug(variant)
    pairs = [
        [name for name in (f"{of}_by_{kind}_{here}", f"change_by_{kind}_{here}") if name in charts]
        for of, kind in (("accuracy", "group"), ("recall", "class"))
    ]
    alone = f"accuracy_by_budget_{here}"
    return {
        "variant": variant,
        "pairs": [pair for pair in pairs if pair] + ([[alone]] if alone in charts else []),
        "sets": _set_table(own, frame),
        "accuracy": _accuracy_table(frame, variant),
    }


def _by_variant(names: Iterable[str], variants: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Figures of each variant, by the end of their names; one variant's end may be another's, so the longest counts."""
    found: dict[str, list[str]] = {variant: [] for variant in variants}
    for name in names:
        ends = [variant for variant in variants if name.endswith(f"_{figures.slug(variant)}")]
        found[max(ends, key=len)].append(name)
    return [(variant, own) for variant, own in found.items() if own]


def _set_table(found: Sequence[Candidate], frame: pd.DataFrame) -> dict[str, Any]:
    """Every set of images that was asked: what each network changes there, and whether that is beyond chance."""
    if not found:
        return {}
    groups = {name: i for i, name in enumerate(figures.group_order(frame))}
    first = found[0].verdict.cells
    kinds = {"overall": 0, "group": 1, "class": 2, "cell": 3}
    order = sorted(
        first.index, key=lambda i: (kinds[first["kind"][i]], groups.get(first["group"][i], -1), str(first["class"][i]))
    )
    rows = []
    for i in order:
        cell = first.loc[i]
        entries = []
        for each in found:
            mine = each.verdict.cells.loc[i]
            flag = str(mine["flag"])
            entries.append(
                {
                    "after": f"{mine['after']:.1%}",
                    "change": f"{signed(mine['change'])}{limits_told(mine)}",
                    "flag": flag,
                }
            )
        rows.append(
            {
                "who": named(cell),
                "kind": str(cell["kind"]),
                "n": f"{int(cell['n']):,}",
                "before": f"{cell['before']:.1%}",
                "entries": entries,
            }
        )
    return {
        "networks": [figures.of_the_relus(each.budget) for each in found],
        "rows": rows,
    }


def _base_told(frame: pd.DataFrame) -> str:
    """What the base network alone gets right."""
    accuracy = _values(frame[frame["stage"] == "base"], "accuracy")
    groups = [group for group in accuracy if group != OVERALL]
    if not groups:
        return ""
    worst = min(groups, key=lambda group: accuracy[group])
    return (
        f"The base network is right on {accuracy[OVERALL]:.1%} of all images and on {accuracy[worst]:.1%} "
        f"of group “{worst}”, its worst."
    )


def _rare(frame: pd.DataFrame) -> str:
    """Groups in which a relative drop says little."""
    return ", ".join(f"“{group}” ({count})" for group, count in _rarely_right(frame).items())


def _rarely_right(frame: pd.DataFrame) -> dict[str, int]:
    """Groups in which the base network is right on too few images for a ratio of them, and how many those are."""
    sizes = frame[frame["measure"] == "accuracy"].groupby("group", sort=False)["n"].max()
    right = {group: round(accuracy * sizes[group]) for group, accuracy in _before(frame).items() if group != OVERALL}
    return {group: count for group, count in right.items() if count < RARELY}


def _before(frame: pd.DataFrame) -> dict[str, float]:
    """The base network's accuracy by group, as far as the audit tells it."""
    base = frame[frame["stage"] == "base"]
    if len(base):
        return _values(base, "accuracy")
    # Without rows of its own: a drop is (before − after) / before · 100, and undefined where before is 0.
    pairs = frame[frame["measure"] == "accuracy"].merge(
        frame.loc[frame["measure"] == "relative_drop", ["model", "group", "value"]],
        on=["model", "group"],
        suffixes=("", "_drop"),
    )
    known = pairs[pairs["value_drop"] != 100]
    before = (known["value"] / (1 - known["value_drop"] / 100)).fillna(0.0)
    return {str(group): float(values.iloc[0]) for group, values in before.groupby(known["group"], sort=False)}


def warnings(frame: pd.DataFrame, run: Run) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    sizes = (
        frame[(frame["measure"] == "accuracy") & (frame["group"] != OVERALL)].groupby("group", sort=False)["n"].max()
    )
    small = [f"“{name}” ({n})" for name, n in sizes.items() if TOO_SMALL <= n < SMALL]
    if tiny := too_small(frame, run.config["split"], "“”"):
        found.append(f"{tiny}. Do not decide anything on their accuracy.")
    if small:
        found.append(
            f"Small: {', '.join(small)} have fewer than {SMALL} images; one accuracy can be off by ten points. "
            "Read the intervals, not the points."
        )
    if run.config["split"] != "test":
        found.append(f"These numbers are from the {run.config['split']} part, which training or selection has seen.")
    if file := weights_file(run):
        found.append(
            f"The base network’s weights came from a file ({file}). They may have seen the images that it is judged on "
            "here, and then it looks better than it is: ask whoever trained them."
        )
    short = frame[~frame["reached"]]
    if len(short):
        labels = ", ".join(dict.fromkeys(short["budget"]))
        found.append(
            f"Mask learning ended before it reached {labels} of the ReLUs; there the largest masks were kept "
            "as they were, which costs accuracy. Raise max_epochs, the learning rate or λ."
        )
    return found


def _values(rows: pd.DataFrame, measure: str) -> dict[str, float]:
    part = rows[rows["measure"] == measure]
    return {str(group): float(value) for group, value in zip(part["group"], part["value"], strict=True)}


def _accuracy_table(frame: pd.DataFrame, variant: str) -> dict[str, Any]:
    """Rows: groups; columns: networks; cells: accuracy with interval, and the paper's relative drop with interval."""
    rows = figures.beside(frame, variant)
    networks = figures.network_order(rows)
    body = []
    for group in [*figures.group_order(frame), OVERALL]:
        cells = []
        for network in networks:
            here = rows[(rows["network"] == network) & (rows["group"] == group) & (rows["class"] == "")]
            here = here.set_index("measure")
            accuracy = here.loc["accuracy"]
            cell = {
                "accuracy": f"{accuracy['value']:.1%}",
                "interval": f"{accuracy['low']:.1%} – {accuracy['high']:.1%}",
            }
            if "relative_drop" in here.index and not math.isnan(here.loc["relative_drop", "value"]):
                drop = here.loc["relative_drop"]
                cell["drop"] = f"{signed(-drop['value'])} % [{signed(-drop['high'])}, {signed(-drop['low'])}]"
            cells.append(cell)
        n = int(rows[(rows["group"] == group) & (rows["measure"] == "accuracy")]["n"].max())
        body.append({"group": group, "n": f"{n:,}", "cells": cells, "small": n < TOO_SMALL})
    return {"networks": [figures.of_the_relus(network) for network in networks], "rows": body}


def _gap_table(frame: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for (variant, budget), part in frame.groupby(["variant", "budget"], sort=False):
        measures = part[(part["group"] == OVERALL) & (part["class"] == "")].set_index("measure")
        base = (part["stage"] == "base").all()
        row = {
            "name": str(variant) if base else f"{variant}, {figures.of_the_relus(str(budget))}",
            "relus": f"{int(part['relus'].iloc[0]):,}",
            "overall": f"{measures.loc['accuracy', 'value']:.1%}",
        }
        for key, measure, factor, unit in (
            ("balanced", "balanced_accuracy", 100, " %"),
            ("worst", "worst_group_accuracy", 100, " %"),
            ("gap", "accuracy_gap", 100, ""),
            ("drop_gap", "relative_drop_gap", 1, ""),
        ):
            if measure in measures.index:
                value, low, high = (factor * float(measures.loc[measure, c]) for c in ("value", "low", "high"))
                limits = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
                row[key] = f"{value:.1f}{unit}{limits}"
        rows.append(row)
    return rows


def _counts_table(counts: pd.DataFrame) -> dict[str, Any]:
    parts = [part for part in ("train", "val", "test") if part in set(counts["part"])]
    wide = counts.pivot_table(index="group", columns="part", values="n", sort=False)[parts]
    share = 100 * wide["train"] / wide["train"].sum()
    rows = [
        {"group": group, "n": [f"{int(n):,}" for n in wide.loc[group]], "share": f"{share[group]:.2f} %"}
        for group in wide["train"].sort_values(ascending=False).index
    ]
    return {"parts": parts, "rows": rows, "total": [f"{int(n):,}" for n in wide.sum()]}


def write_figures(audit: str | Path, folder: str | Path) -> list[Path]:
    """Write each figure of an audit run as SVG and PNG.

    Returns:
        The files.

    Raises:
        FairlineError: The folder holds no finished audit.
    """
    run = Run.read(audit, "audit")
    frame, found = judged(run)
    charts = figures.figures(frame, found)
    if explanations.explains(frame):
        charts |= explanations.figures(frame, run.table("predictions.parquet"))
    charts |= corrections.figures(frame)
    return save_charts(charts, Path(folder))
