"""The page of a compile run: which parts of each network were folded, and what that saves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.charts import save_charts, themed
from fairline.report.page import settings, write_page
from fairline.runs import Run

#: What is drawn: column of the plan, title of the axis, and what a value is divided by.
PRICES = {"seconds": ("seconds", 1.0), "bytes": ("MB", 1e6), "rounds": ("rounds", 1.0)}

#: Forms of a block and their colours.
FORMS = {"as it stands": "#b5d3e9", "merged": "#009E73", "dense": "#D55E00"}

BEFORE, AFTER = "original", "compiled"


def write_compiled(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a compile run.

    Args:
        folder: Of a finished compile run.
        out: The HTML file; ``compiled.html`` in that folder by default.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no finished compile run.
    """
    run = Run.read(folder, "compile")
    table, plan = run.table("compiled.parquet"), run.table("plan.parquet")
    return write_page(
        Path(out) if out is not None else run.folder / "compiled.html",
        "compiled.html.j2",
        _charts(plan, run),
        title=f"What compiling saves: {run.data.name}",
        sentences=[told(row) for row in table.to_dict("records")],
        left_out=[str(text) for text in table["left_out"] if text],
        networks=[_network_row(row) for row in table.to_dict("records")],
        blocks=[(str(name), [_block_row(row) for row in part.to_dict("records")]) for name, part in _by_network(plan)],
        terms=_terms(run),
        settings=settings(run),
    )


def write_compiled_figures(folder: str | Path, out: str | Path) -> list[Path]:
    """Write the figures of a compile run as SVG and PNG.

    Returns:
        The files.

    Raises:
        FairlineError: The folder holds no finished compile run.
    """
    run = Run.read(folder, "compile")
    return save_charts(_charts(run.table("plan.parquet"), run), Path(out))


def told(row: dict[str, Any]) -> str:
    """What became of one network, in a sentence.

    Args:
        row: Of ``compiled.parquet``.

    Returns:
        The sentence.
    """
    same = "every image" if row["same"] == row["images"] else f"{row['same']:,} of {row['images']:,} images"
    # Of some protocols no source tells the seconds.
    seconds = "" if math.isnan(row["seconds"]) else f"{row['seconds']:.3g} s for {row['seconds_before']:.3g}, "
    return (
        f"{row['network']}: {row['relus']:,} ReLUs on {row['levels']} levels, predicted at {seconds}"
        f"{row['bytes'] / 1e6:.3g} MB for {row['bytes_before'] / 1e6:.3g} and {row['rounds']:.0f} rounds for "
        f"{row['rounds_before']:.0f}. It gives {same} ({row['images']:,} compared) the class that the original gives; "
        f"the largest difference of a logit is {row['difference']:.1e}, the largest logit {row['largest_logit']:.3g}."
    )


def plan_chart(plan: pd.DataFrame, price: str) -> Any:
    """What each block of each network costs, as it stands in the original and in the plan.

    Args:
        plan: Rows of ``plan.parquet``.
        price: A key of :data:`PRICES`.

    Returns:
        An Altair chart: a bar for each original and compiled network, a stretch of it for each block.
    """
    title, factor = PRICES[price]
    stretches = []
    for which, end in ((BEFORE, "_before"), (AFTER, "")):
        part = plan[["network", "block", "form", "first", "last", "levels"]].copy()
        part["which"], part["value"] = which, plan[f"{price}{end}"] / factor
        for column in ("relus", "weights"):
            part[column] = plan[f"{column}{end}"]
        stretches.append(part)
    table = pd.concat(stretches)
    chart = (
        alt.Chart(table)
        .mark_bar(stroke="white", strokeWidth=1)
        .encode(
            y=alt.Y("which:N", sort=[BEFORE, AFTER], title=None),
            x=alt.X("value:Q", title=f"{title} a call, predicted", axis=alt.Axis(tickCount=6)),
            color=alt.Color(
                "form:N",
                title="what became of the part",
                scale=alt.Scale(domain=list(FORMS), range=list(FORMS.values())),
                legend=alt.Legend(orient="bottom"),
            ),
            order="block:Q",
            tooltip=[
                alt.Tooltip("first:N", title="from"),
                alt.Tooltip("last:N", title="to"),
                alt.Tooltip("form:N"),
                alt.Tooltip("levels:Q"),
                alt.Tooltip("relus:Q", title="ReLUs", format=","),
                alt.Tooltip("weights:Q", format=","),
                alt.Tooltip("value:Q", title=title, format=".3~g"),
            ],
        )
        .properties(width=640, height=56)
    )
    networks = list(dict.fromkeys(plan["network"]))
    return chart.facet(
        row=alt.Row("network:N", sort=networks, title=None, header=alt.Header(labelAngle=0, labelAlign="left")),
        spacing=8,
    ).properties(title=f"Every block of the plan, as it stands in the original and compiled: {title}")


def _charts(plan: pd.DataFrame, run: Run) -> dict[str, Any]:
    """What was minimised first."""
    first = run.config["minimise"]
    prices = [first, *(price for price in PRICES if price != first)]
    return {f"plan_{price}": themed(plan_chart(plan, price)) for price in prices if plan[price].notna().all()}


def _terms(run: Run) -> str:
    config = run.config
    return (
        f"{config['protocol']} over {config['network']['name']}, {config['batch_size']} image"
        f"{'' if config['batch_size'] == 1 else 's'} a call, {config['minimise']} minimised"
    )


def _by_network(plan: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    return list(plan.groupby("network", sort=False))


def _network_row(row: dict[str, Any]) -> dict[str, str]:
    cells = {"network": str(row["network"])}
    for key, factor, digits in (
        ("relus", 1, 0),
        ("weights", 1, 0),
        ("multiply_adds", 1e6, 2),
        ("file_bytes", 1e6, 2),
        ("seconds", 1, 2),
        ("bytes", 1e6, 2),
        ("rounds", 1, 0),
    ):
        before, after = row[f"{key}_before"] / factor, row[key] / factor
        cells[key] = f"{before:,.{digits}f} → {after:,.{digits}f}"
    return cells


def _block_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "part": str(row["first"]) if row["first"] == row["last"] else f"{row['first']} … {row['last']}",
        "form": str(row["form"]) + (f", {row['schedule']}" if row["schedule"] else ""),
        "levels": f"{row['levels']:.0f}",
        **{
            key: f"{row[f'{key}_before'] / factor:,.{digits}f} → {row[key] / factor:,.{digits}f}"
            for key, factor, digits in (
                ("relus", 1, 0),
                ("weights", 1, 0),
                ("seconds", 1, 3),
                ("bytes", 1e6, 2),
                ("rounds", 1, 0),
            )
        },
    }
