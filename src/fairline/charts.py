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
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


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
                chart.save(str(temporary), format=suffix, **options)
    return files
