"""The command that shows the board."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fairline.cli.console import out_console, print_frame
from fairline.cli.options import parse_budgets, parse_names

if TYPE_CHECKING:
    from fairline.report.board import Panel

app = typer.Typer()

_PATTERN = "; several with commas, * stands for anything."


@app.command()
def board(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of entries, a JSON file each, in it or below.")
    ] = Path("papers/board"),
    add: Annotated[
        list[Path] | None,
        typer.Option(
            "--add",
            metavar="RESULTS",
            help="First write the entries of a study there: its folder of committed results (papers/results/STUDY). "
            "May be repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write: page, CSV tables and a PNG a panel.")
    ] = None,
    data: Annotated[str, typer.Option(help=f"Only of these data sets{_PATTERN}")] = "",
    groups: Annotated[str, typer.Option(help=f"Only by these groups{_PATTERN}")] = "",
    network: Annotated[str, typer.Option(help=f"Only of these architectures{_PATTERN}")] = "",
    method: Annotated[str, typer.Option(help=f"Only of these methods, by name or linearizer{_PATTERN}")] = "",
    finetune: Annotated[str, typer.Option(help=f"Only of these finetunes{_PATTERN}")] = "",
    study: Annotated[str, typer.Option(help=f"Only of these studies{_PATTERN}")] = "",
    kind: Annotated[str, typer.Option(help="Only measured, or only published.")] = "",
    budget: Annotated[str, typer.Option(help="Only of these budgets: 10%, 0.02 or counts, comma-separated.")] = "",
) -> None:
    """Show results side by side: accuracy of all and of the worst group against ReLUs, and what they cost."""
    from fairline.report.board import choose, panels, read_board
    from fairline.report.board_entries import add_entries
    from fairline.report.board_page import write_board

    for results in add or ():
        files = add_entries(folder, results)
        out_console.print(f"{len(files)} entries: {files[0].parent}", soft_wrap=True, highlight=False)
    asked = {
        "data": data,
        "groups": groups,
        "network": network,
        "method": method,
        "finetune": finetune,
        "study": study,
        "kind": kind,
    }
    patterns = {name: parse_names(text, name) if text else [] for name, text in asked.items()}
    entries = choose(read_board(folder), budgets=parse_budgets(budget) if budget else [], **patterns)
    _print_panels(panels(entries))
    if out is not None:
        page, *files = write_board(entries, out)
        out_console.print(f"Page: {page.resolve()}, beside it {len(files)} tables and figures", soft_wrap=True)


def _print_panels(found: Sequence[Panel]) -> None:
    """A table a panel."""
    import pandas as pd

    from fairline.report.board_page import PUBLISHED, rows_of

    for panel in found:
        rows = rows_of(list(panel.entries.values()))
        index = pd.Index([row.method + (f" ({PUBLISHED})" if row.published else "") for row in rows], name="method")
        shown = pd.DataFrame(
            {
                "ReLUs": [row.percent for row in rows],
                "overall": [row.overall for row in rows],
                "95 %": [row.overall_limits for row in rows],
                "worst": [row.worst for row in rows],
                "95 % ": [row.worst_limits for row in rows],
                "which": [row.group for row in rows],
                "s": [row.seconds for row in rows],
                "MB": [row.megabytes for row in rows],
                "seeds": [row.seeds for row in rows],
            },
            index=index,
        )
        empty = [name for name in ("s", "MB", "95 %", "95 % ") if not shown[name].any()]
        print_frame(shown.drop(columns=empty), panel.title)
        costs = dict.fromkeys(row.cost_of for row in rows if row.cost_of)
        if costs:
            out_console.print(f"Seconds and MB of one image: {'; '.join(costs)}.", soft_wrap=True, highlight=False)
