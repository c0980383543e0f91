"""Colours, theme and files of every chart: the ground floor of whoever draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairline._io import atomic_path

#: Okabe and Ito's colours, told apart by all common kinds of colour vision.
PALETTE = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#8C6D31",
    "#999999",
    "#5E3C99",
]
#: For more names than that; the last ones are less easily told apart.
MORE = [
    *("#B2182B", "#66C2A5", "#BF812D", "#C51B7D", "#7FBC41", "#4D4D4D", "#80B1D3", "#FDB462"),
    *("#1B4D3E", "#FB8072", "#2F2FA2", "#A89A00", "#5D3A1A", "#F781BF"),
]
#: Of lines and figures of no network; the base network; a network that kept all its ReLUs; the one to ship; others.
INK, BASE, CONTROL, SHIPPED = "#222222", "#7d8590", "#d97706", "#0b3d6e"
RAMP = ["#4f86b5", "#7fadd1", "#a9cbe4", "#c8dff0"]

#: What a colour is on a dark page.
DARK = {
    **{INK: "#d5dbe1", BASE: "#9aa3ad", CONTROL: "#f0a04b", SHIPPED: "#a6d5ff"},
    **dict(zip(RAMP, ["#5a9bd0", "#3f78a8", "#315d83", "#274a68"], strict=True)),
    **{"#000000": "#f0f3f6", "#000": "#f0f3f6", "#222": "#d5dbe1", "#444": "#b7c0c9", "#1f4e79": "#8bb8da"},
}
#: How wide a picture is whose chart takes the width of its page.
_WIDE = 560

_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def palette(names: Sequence[str]) -> dict[str, str]:
    """One colour a name; beyond 24 they repeat."""
    chosen = [*PALETTE, *MORE]
    return {name: chosen[place % len(chosen)] for place, name in enumerate(names)}


def themed(chart: Any) -> Any:
    """The house style."""
    return (
        chart.configure(font=_FONT, background="white")
        .configure_view(stroke=None)
        .configure_axis(grid=True, gridColor="#e8e8e8", labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_axisX(grid=False)
        .configure_legend(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=14, anchor="start", offset=12)
    )


def save_charts(charts: Mapping[str, Any], folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write each chart in each format (svg, png or pdf); returns the files."""
    files = []
    for name, chart in charts.items():
        for suffix in formats:
            options = {"scale_factor": 2} if suffix == "png" else {}
            files.append(folder / f"{name}.{suffix}")
            with atomic_path(files[-1]) as temporary:
                _as_wide(chart).save(str(temporary), format=suffix, **options)
    return files


def _as_wide(chart: Any) -> Any:
    """A chart with a width of its own: a file is not in a page."""
    if getattr(chart, "width", None) != "container":
        return chart
    copy = chart.copy(deep=False)
    copy.width = _WIDE
    return copy
