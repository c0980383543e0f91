"""The gallery of figures and the page of claims, made of what is committed in ``papers/results``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
from PIL import Image

from fairline.report.claims import CLAIMS, summary

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "papers" / "results"

#: What the name of a figure says of it.
KINDS = {
    "drop": "relative accuracy drop by group",
    "gain": "gain over the baseline by group",
    "pareto": "overall against worst-group accuracy",
    "layers": "ReLUs kept by layer",
    "beyond_control": "gain beyond that of the control",
    "above_null": "above the free line",
    "moved_prior": "drops before and after a free shift",
    "cost_frontier": "accuracy against cost",
    "cost_groups": "each group's accuracy against cost",
    "cost_parts": "parts of the cost",
}
_WIDTH = 720


def write(pages: Path, figures: bool = True) -> list[str]:
    """Write gallery and claims.

    Args:
        pages: The site's sources.
        figures: Whether the gallery has its figures, and not their titles alone.

    Returns:
        What the section of results holds, in order.
    """
    (pages / "gallery.md").write_text("\n".join(_gallery(pages if figures else None)), encoding="utf-8")
    (pages / "claims.md").write_text("\n".join(_claims()), encoding="utf-8")
    readmes = sorted(RESULTS.rglob("README.md"), key=lambda file: (file.parent.name != "figures", str(file)))
    return ["gallery", "claims", *(str(file.relative_to(ROOT).with_suffix("")) for file in readmes)]


def _gallery(pages: Path | None) -> list[str]:
    lines = [
        "# Gallery",
        "",
        "All figures that are committed, each at the scale that its page tells. A figure leads to its whole size.",
    ]
    folders = sorted({file.parent for file in RESULTS.rglob("*.png")}, key=lambda each: (each.name != "figures", each))
    for folder in folders:
        where = folder.relative_to(RESULTS).as_posix()
        lines += ["", f"## {_heading(folder)}", ""]
        near = next((each for each in (folder, *folder.parents) if (each / "README.md").exists()), None)
        if near is not None and near.is_relative_to(RESULTS):
            lines += [
                f"[What was measured, and how](/papers/results/{near.relative_to(RESULTS).as_posix()}/README.md)",
                "",
            ]
        if pages is not None:
            lines += ["::::{grid} 1 2 2 3", ":gutter: 3", ":class-container: gallery", ""]
            for figure in sorted(folder.glob("*.png")):
                lines += _card(figure, pages, where)
            lines.append("::::")
    return [*lines, ""]


def _card(figure: Path, pages: Path, where: str) -> list[str]:
    """A small copy of a figure, which leads to the figure itself."""
    small = pages / "thumbnails" / where / f"{figure.stem}.webp"
    whole = pages / "extra" / "figures" / where
    for folder in (small.parent, whole):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(figure, whole)
    with Image.open(figure) as image:
        image.thumbnail((_WIDTH, 4 * _WIDTH))
        image.save(small, quality=82)
    return [
        ":::{grid-item-card}",
        f":img-top: /{small.relative_to(pages).as_posix()}",
        f":img-alt: {_caption(figure)}",
        f":link: figures/{where}/{figure.name}",
        "",
        _caption(figure),
        ":::",
    ]


def _heading(folder: Path) -> str:
    if (folder / "README.md").exists():
        return re.sub("^# ", "", (folder / "README.md").read_text(encoding="utf-8").partition("\n")[0])
    where = folder.relative_to(RESULTS)
    return f"`{where.as_posix()}`"


def _caption(figure: Path) -> str:
    if number := re.fullmatch(r"figure_(\d+)", figure.stem):
        return f"Figure {int(number[1])} of the paper"
    if figure.stem in KINDS:
        return KINDS[figure.stem].capitalize()
    data, _, kind = figure.stem.partition("_")
    return f"{data}: {KINDS.get(kind, kind.replace('_', ' '))}"


def _claims() -> list[str]:
    found = pd.read_csv(RESULTS / "figures" / "claims.csv", keep_default_na=False, na_values=[""])
    words = summary(found)
    lines = [
        "# Claims",
        "",
        "Each claim of the paper beside what was measured, panel by panel; Student's 95 % interval over seeds decides"
        " ([how](/docs/studies.md#claims)). [Scale, command, what to keep in mind](/papers/results/figures/README.md);"
        " [the same with its figures](/papers/results/figures/claims.html).",
    ]
    for number, claim in CLAIMS.items():
        lines += [
            "",
            f"## {number}. {claim.text}",
            "",
            f"*{claim.source}.* Measured: {claim.effect}; holds if {claim.rule}.",
            "",
        ]
        lines += [f"**{words[number].capitalize()}.**", ""]
        own = found[found["claim"] == number]
        if len(own):
            lines += ["| panel | mean [95 %] | seeds | verdict | of |", "|---|---|---|---|---|"]
        for row in own.itertuples():
            mean = "–" if pd.isna(row.effect) else f"{row.effect:.3g}"
            limits = "" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]"
            note = "" if pd.isna(row.note) else row.note
            lines.append(f"| {row.panel} | {mean}{limits} | {row.seeds} | {row.verdict} | {note} |")
    return [*lines, ""]
