"""The command line: parses, calls :mod:`fairline.jobs`, draws progress."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fairline import __version__
from fairline.cli import pipeline, private, study
from fairline.cli.console import err_console, out_console
from fairline.errors import FairlineError

app = typer.Typer(
    name="fairline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Cut the ReLUs that make private inference slow, and see who pays for it.\n\n"
    "Each command reads a run folder and writes one: [bold]train[/] → [bold]linearize[/] → [bold]finetune[/] → "
    "[bold]audit[/] → [bold]report[/]. Repeating an interrupted command resumes it.\n\n"
    "[bold]compare[/] puts finetunes side by side. "
    "[bold]demo[/] does all five.",
)
app.add_typer(pipeline.app)
app.add_typer(study.app, name="study")
app.add_typer(private.app, name="private")


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        out_console.print(f"fairline {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads for torch.")] = None,
) -> None:
    """Options before the command."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Run the command line; bad input is one sentence and exit code 2."""
    try:
        app()
    except FairlineError as error:
        err_console.print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        err_console.print(
            f"Error: {error.strerror or error}{where}.", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)
