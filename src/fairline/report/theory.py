"""Figures 2 and 10 of the paper, and the rate of Proposition 4.1, as Altair charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import torch
from torch import nn

from fairline.charts import save_charts, themed
from fairline.masking import mask_relus, masked_relus
from fairline.runs import Run
from fairline.theory import toy
from fairline.theory.pieces import figure_10_network, linear_pieces
from fairline.theory.rates import rates

MAJORITY, MINORITY = "#0072B2", "#D55E00"


def figure_2(result: toy.Toy) -> Any:
    """Where networks with all and with half of their ReLUs draw the boundary, and what either group's accuracy is."""
    seeds = result.accuracy["seed"].nunique()
    maps = [_map(result, variant, seeds, legend=position == 0) for position, variant in enumerate(toy.VARIANTS)]
    chart = alt.hconcat(*maps, _accuracies(result), spacing=32).resolve_legend(color="independent")
    return themed(chart.properties(title=f"Half of the ReLUs, {seeds} networks of each kind"))


def _map(result: toy.Toy, variant: str, seeds: int, legend: bool) -> Any:
    axis, shares = result.grid, result.shares[variant]
    half = (axis[1] - axis[0]) / 2
    cells = pd.DataFrame(
        {
            "x1": np.tile(axis - half, len(axis)),
            "to1": np.tile(axis + half, len(axis)),
            "x2": np.repeat(axis - half, len(axis)),
            "to2": np.repeat(axis + half, len(axis)),
            "share": shares.reshape(-1),
        }
    )
    square = alt.Scale(domain=[-1, 1], nice=False)
    x, y = alt.X("x1:Q", scale=square, title="x₁"), alt.Y("x2:Q", scale=square, title="x₂")
    ground = (
        alt.Chart(cells)
        .mark_rect(clip=True)
        .encode(
            x=x,
            x2="to1:Q",
            y=y,
            y2="to2:Q",
            color=alt.Color(
                "share:Q",
                scale=alt.Scale(domain=[0, 0.5, 1], range=["#cfe3f1", "#ffffff", "#f7cdb0"], interpolate="rgb"),
                legend=alt.Legend(format="%", title=f"of {seeds} networks say minority", orient="bottom")
                if legend
                else None,
            ),
        )
    )
    line = np.linspace(-1, 1, 200)
    truth = pd.DataFrame({"x1": line, "x2": toy.boundary(torch.from_numpy(line)).numpy()})
    curve = alt.Chart(truth).mark_line(color="black", strokeDash=[3, 3], clip=True).encode(x=x, y=y)
    dots = (
        alt.Chart(result.points)
        .mark_circle(size=9, opacity=0.7)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "group:N",
                scale=alt.Scale(domain=list(toy.GROUPS), range=[MAJORITY, MINORITY]),
                legend=alt.Legend(title="training points of one seed", orient="bottom") if legend else None,
            ),
        )
    )
    return (
        alt.layer(ground, dots, curve)
        .resolve_scale(color="independent")
        .properties(width=280, height=280, title=f"{variant}; dotted: true boundary")
    )


def _accuracies(result: toy.Toy) -> Any:
    table = result.summary()
    table = table[table["variant"] != "difference"]
    order = ["global", *toy.GROUPS]
    x = alt.X("measure:N", sort=order, title=None, axis=alt.Axis(labelAngle=0))
    offset = alt.XOffset("variant:N", sort=list(toy.VARIANTS))
    colour = alt.Color(
        "variant:N",
        sort=list(toy.VARIANTS),
        scale=alt.Scale(domain=list(toy.VARIANTS), range=["#1f4e79", "#e69f00"]),
        legend=alt.Legend(title=None, orient="bottom"),
    )
    base = alt.Chart(table)
    scale = alt.Scale(zero=False)
    whisker = base.mark_rule(strokeWidth=2).encode(
        x=x,
        xOffset=offset,
        y=alt.Y("low:Q", scale=scale, title="accuracy", axis=alt.Axis(format="%")),
        y2="high:Q",
        color=colour,
    )
    point = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=x, xOffset=offset, y=alt.Y("mean:Q", scale=scale), color=colour
    )
    return alt.layer(whisker, point).properties(width=240, height=280, title="Mean and 95 % interval over seeds")


def figure_10() -> Any:
    """Two hidden ReLUs give three linear pieces; with one of them linearized, two are left."""
    network = figure_10_network()
    cut = mask_relus(network, torch.zeros(2, 1))
    next(iter(masked_relus(cut).values())).set_mask(torch.tensor([True, False]))
    masked = nn.Sequential(network[0], next(iter(masked_relus(cut).values())), network[2])
    return themed(alt.hconcat(_lines(network, "Two ReLUs"), _lines(masked, "One ReLU, one linear unit"), spacing=40))


def _lines(network: nn.Sequential, title: str) -> Any:
    line = torch.linspace(-2, 2, 401)[:, None]
    with torch.no_grad():
        hidden = network[:2](line) * network.get_parameter("2.weight")[0]
        output = network(line)[:, 0]
    names = ["first unit", "second unit", "output"]
    table = pd.concat(
        pd.DataFrame({"x": line[:, 0], "value": values, "line": name})
        for name, values in zip(names, (hidden[:, 0], hidden[:, 1], output), strict=True)
    )
    pieces = linear_pieces(network)
    points = pd.DataFrame({"x": pieces.breakpoints, "value": pieces(pieces.breakpoints)[:, 0]})
    colour = alt.Color(
        "line:N",
        scale=alt.Scale(domain=names, range=["#E69F00", "#0072B2", "#009E73"]),
        sort=names,
        legend=alt.Legend(title=None, orient="bottom"),
    )
    y = alt.Y("value:Q", title="contribution and output", scale=alt.Scale(domain=[-1.75, 1.75], nice=False))
    x = alt.X("x:Q", title="input x")
    whole = table["line"] == "output"
    # Where lines lie on each other, the dashes of the units show on the output.
    below = alt.Chart(table[whole]).mark_line(strokeWidth=5, opacity=0.6).encode(x=x, y=y, color=colour)
    drawn = alt.Chart(table[~whole]).mark_line(strokeWidth=2, strokeDash=[6, 4]).encode(x=x, y=y, color=colour)
    marks = alt.Chart(points).mark_point(filled=True, size=70, color="black", opacity=1).encode(x="x:Q", y="value:Q")
    return alt.layer(below, drawn, marks).properties(
        width=300, height=240, title=f"{title}: {pieces.count} linear pieces"
    )


def rate() -> Any:
    """Error of the optimal approximation of three strictly convex functions by n segments (Proposition 4.1)."""
    errors, limits, segments = rates()
    colour = alt.Color(
        "function:N",
        scale=alt.Scale(domain=list(errors["function"].unique()), range=["#0072B2", "#009E73", "#D55E00"]),
        legend=alt.Legend(title=None, orient="bottom"),
    )
    x = alt.X("segments:Q", scale=alt.Scale(type="log", base=2), title="segments n", axis=alt.Axis(values=segments))
    log = alt.Scale(type="log")
    points = (
        alt.Chart(errors)
        .mark_point(filled=True, size=55, opacity=1)
        .encode(
            x=x,
            y=alt.Y(
                "error:Q",
                scale=log,
                title="largest error",
                axis=alt.Axis(format=".0e", values=[1e-4, 1e-3, 1e-2, 1e-1, 1]),
            ),
            color=colour,
        )
    )
    lines = alt.Chart(limits).mark_line(strokeDash=[4, 3]).encode(x=x, y=alt.Y("limit:Q", scale=log), color=colour)
    return themed(
        alt.layer(lines, points).properties(
            width=420, height=280, title="Optimal piecewise linear approximation; dashed: (∫√f″)² / (16 n²)"
        )
    )


def write_theory_figures(folder: str | Path) -> list[Path]:
    """Draw a theory run's figures into its folder, SVG and PNG; those that are there stay.

    Args:
        folder: Of a finished theory run.

    Returns:
        The files drawn.

    Raises:
        FairlineError: The folder holds no finished theory run.
    """
    run = Run.read(folder, "theory")
    if all((run.folder / f"{name}.png").exists() for name in ("figure_2", "figure_10", "proposition_4_1")):
        return []
    accuracy, points, shares = (run.table(f"figure_2{part}.parquet") for part in ("", "_points", "_map"))
    charts = {
        "figure_2": figure_2(toy.Toy.from_tables(accuracy, points, shares)),
        "figure_10": figure_10(),
        "proposition_4_1": rate(),
    }
    return save_charts(charts, run.folder)
