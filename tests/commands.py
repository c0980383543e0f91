"""Running the command line in processes of its own.

They are forked from one that has imported PyTorch and pandas already, which takes three seconds otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

TRAIN = [
    "train",
    "--data",
    "digits",
    "--model",
    "cnn",
    "--width",
    "4",
    "--epochs",
    "3",
    "--batch-size",
    "64",
    "--lr",
    "0.05",
]
LINEARIZE = ["--budgets", "0.5,10%,20", "--lr", "0.03", "--lam", "1e-3", "--batch-size", "64", "--max-epochs", "12"]
FINETUNE = ["--epochs", "2", "--batch-size", "64", "--lr", "0.01"]
AUDIT = ["--resamples", "100"]
EXPLAIN = [*AUDIT, "--explain", "--option", "correlation.resamples=50"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fairline.cli", "--threads", "1", *map(str, arguments)]


#: Without a data folder of the developer's, and wide enough for one-line messages.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "FAIRLINE_DATA"} | {"COLUMNS": "160"}


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "tests.commands",
        "fairline.jobs",
        "fairline.jobs.private",
        "fairline.report.comparison",
        "fairline.report.html",
        "fairline.report.paper_figures",
        "fairline.study.run",
    ]
)


def fairline(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = command(*arguments)[3:]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _FORKS.Process(target=_run, args=(words, ENVIRONMENT, cwd or Path.cwd(), out, err))
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run(words: Sequence[str], environment: Mapping[str, str], cwd: Path, out: Path, err: Path) -> None:
    """What ``python -m fairline.cli`` does."""
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["fairline", *words]
    runpy.run_module("fairline.cli", run_name="__main__", alter_sys=True)


def ok(*arguments: str | Path, **more) -> str:
    done = fairline(*arguments, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout
