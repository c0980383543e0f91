"""What a study's comparison will call its methods, before anything is run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fairline import jobs
from fairline.errors import FairlineError
from fairline.study.cell import Cell

#: The default baseline: plain distillation under masks that are placed as SNL says.
PLAIN = "erm"


def told(cell: Cell) -> str:
    """What is done to a cell's networks after their masks were placed, as a comparison calls it.

    Args:
        cell: One that is compared: ``finetune``, ``choose``, ``last-layer`` or ``adjust``.

    Returns:
        ``"lagrangian mu=0.005, last layer"``.
    """
    chain = [cell]
    while chain[0].kind in ("last-layer", "adjust"):
        chain.insert(0, chain[0].parents[0])
    return ", ".join(text for each in chain for text in _steps(each))


def may_be_called(cell: Cell, name: str) -> bool:
    """Whether a comparison may call a cell's networks so.

    Masks that are placed otherwise than SNL does by itself are told before the rest, which is not looked into; nor are
    settings, which a comparison tells where nothing else differs: ``"masks lam=0.01, erm, epochs=3"``.

    Returns:
        Whether it may.
    """
    own, plain = told(cell), _without_settings(name)
    if _plainly_placed(cell):
        return own in (name, plain)
    return any(each.endswith((f", {own}", f": {own}")) for each in (name, plain))


def _without_settings(name: str) -> str:
    """A method's name without the settings of masks before it and of a finetune behind it."""
    return re.sub(r"(, \w+=[^\s,]+)+$", "", re.sub(r"^masks \w+=\S+( \w+=\S+)*, ", "", name))


def baseline_among(cells: Sequence[Cell], wanted: str) -> str | None:
    """What a comparison of some cells is against: what is wanted, if it is there.

    Returns:
        Its name; none if the comparison is to take its own default.
    """
    return wanted if any(may_be_called(cell, wanted) for cell in cells) else None


def require_baseline(cells: Iterable[Cell], wanted: str) -> None:
    """Refuse a baseline that no method will be called, before hours have gone into all of them.

    Args:
        cells: Those that are compared.
        wanted: The baseline; the default fits whatever is compared.

    Raises:
        FairlineError: It is nothing that a comparison may call one of the cells.
    """
    if wanted == PLAIN:
        return
    compared = list(cells)
    found = [cell for cell in compared if may_be_called(cell, wanted)]
    # Settings are told where several methods have one name.
    if not found or (len(found) == 1 and wanted != told(found[0]) and _plainly_placed(found[0])):
        names = dict.fromkeys(told(cell) if _plainly_placed(cell) else f"…: {told(cell)}" for cell in compared)
        raise FairlineError(f"No method will be called '{wanted}'; choose among {', '.join(names)}.")


def _steps(cell: Cell) -> list[str]:
    if cell.kind != "choose":
        return jobs.steps_told(_config(cell), {})
    first, second = (_config(one) for one in cell.parents[1:3])
    options, others = first["objective_options"], second["objective_options"]
    (option,) = (name for name in options if options[name] != others[name])
    return jobs.steps_told({"command": "choose", "option": option, **cell.arguments}, first)


def _config(cell: Cell) -> Mapping[str, Any]:
    """What the config of its run will say that names it."""
    given = cell.arguments
    if cell.kind == "finetune":
        distill = given["settings"].get("distill", True)
        given = {"objective": given["objective"], "objective_options": given["options"], "distill": distill}
    return {"command": cell.kind, **given}


def _plainly_placed(cell: Cell) -> bool:
    """Whether nothing is told of how the masks were placed."""
    (placed,) = (one for one in cell.ancestors() if one.kind == "linearize")
    given = placed.arguments
    fair = given["objective"] != PLAIN or given["options"]
    settings = given["settings"]
    told_of = {"for_cost", "surrogate"} & {*settings} or jobs.placement_of({"settings": settings})
    return given["method"] == "snl" and not fair and not told_of
