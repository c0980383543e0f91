"""The command line: parses, calls :mod:`fairline.jobs`, draws progress."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fairline import __version__
from fairline.cli import board, pipeline, private, publish, study
from fairline.cli.console import err_console, out_console, warnings_shown
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
app.add_typer(publish.app)
app.add_typer(board.app)
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
        _require_values(sys.argv[1:])
        with warnings_shown():
            app()
    except FairlineError as error:
        _stop(str(error))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _stop(f"{error.strerror or error}{where}.")


def _require_values(words: Sequence[str]) -> None:
    """Refuse empty words, such as a shell's variable that is not set: an empty path would be the working folder."""
    for before, word in zip(["fairline", *words], words, strict=False):
        if not word.strip():
            raise FairlineError(f"Nothing stands after '{before}' where a value belongs.")
        if word.startswith("--") and word.endswith("="):
            raise FairlineError(f"'{word}' gives no value.")


def _stop(sentence: str) -> None:
    err_console.print(f"Error: {sentence}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)
