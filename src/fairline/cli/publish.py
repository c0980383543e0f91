"""Commands around the path: a network's card, its way to the Hub, and what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fairline.cli.console import out_console
from fairline.cli.options import Critical, Root, Within

app = typer.Typer()


@app.command()
def card(
    audit: Annotated[Path, typer.Argument(metavar="AUDIT", help="Folder of an audit run.")],
    out: Annotated[Path, typer.Option(help="Folder to write: card, weights, masks and what images must look like.")],
    license: Annotated[str, typer.Option(help="Of the weights, such as apache-2.0.")],
    intended_use: Annotated[str, typer.Option(help="Who may use it for what, in a sentence or more.")],
    network: Annotated[
        str | None, typer.Option(help="Which network of the audit, such as students/budget-307; if it has several.")
    ] = None,
    data_license: Annotated[str, typer.Option(help="Of the data that it was trained on.")] = "",
    title: Annotated[str, typer.Option(help="Of the card.")] = "",
    within: Within = 5.0,
    critical: Critical = None,
) -> None:
    """Write a network to publish, with a model card that says whom it serves how well and what it costs."""
    from fairline.report.card import About, write_card

    about = About(license, intended_use, data_license, title)
    folder = write_card(audit, out, about, network=network, within=within, critical=critical or ())
    out_console.print(f"Card: {(folder / 'README.md').resolve()}", soft_wrap=True)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Written by fairline card.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NETWORK", help="Repository; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Put a published folder on the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN."""
    from fairline.runs.hub import push

    out_console.print(f"Pushed: {push(folder, repository, private=private)}", soft_wrap=True)


@app.command()
def doctor(root: Root = None) -> None:
    """Tell what fairline works with here: versions, processor, GPU, extras, data; exit code 1 if something is wrong."""
    from rich.table import Table
    from rich.text import Text

    from fairline.jobs.doctor import examine

    table = Table(box=None, show_header=False, padding=(0, 1))
    wrong = 0
    for finding in examine(None if root is None else str(root)):
        mark = {True: "✓", False: "✗", None: " "}[finding.good]
        wrong += finding.good is False
        style = "red" if finding.good is False else ""
        table.add_row(Text(mark, style), finding.what, Text(finding.found, style, overflow="fold"))
    out_console.print(table)
    if wrong:
        raise typer.Exit(1)
