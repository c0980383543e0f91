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
#: On the validation part: what explains costs in proportion to the images, of which the test part has many more.
EXPLAIN = [*AUDIT, "--explain", "--split", "val", "--option", "correlation.resamples=50"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fairline.cli", "--threads", "1", *map(str, arguments)]


#: Without a data folder of the developer's, and wide enough for one-line messages.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "FAIRLINE_DATA"} | {"COLUMNS": "160"}


_FORKS = multiprocessing.get_context("forkserver")
#: What commands import, when they come to it, and what torch imports with the first optimizer and the first export. Not
#: ``fairline.cli``, whose consoles look at the environment.
_FORKS.set_forkserver_preload(
    [
        "tests.commands",
        "torch._dynamo",
        "torch.export",
        "networkx",
        "scipy.stats",
        "sklearn.datasets",
        "sklearn.metrics",
        "fairlearn.metrics",
        "pyarrow.parquet",
        "narwhals",
        "psutil",
        "typer",
        "rich.progress",
        "fairline.jobs",
        "fairline.jobs.private",
        "fairline.report.comparison",
        "fairline.report.html",
        "fairline.report.paper_figures",
        "fairline.study.run",
        "tests.preload",
    ]
)


class Started:
    """A command that runs in a process of its own."""

    def __init__(self, *arguments: str | Path, cwd: Path | None = None) -> None:
        self.words = command(*arguments)[3:]
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._said:
            file.touch()
        self._result: subprocess.CompletedProcess[str] | None = None
        self._process = _FORKS.Process(target=_run, args=(self.words, ENVIRONMENT, cwd or Path.cwd(), *self._said))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """How it ended, negative where a signal ended it; None if it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def result(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Wait for the end."""
        if self._result is None:
            self._process.join(timeout)
            code = self._process.exitcode
            assert code is not None, f"{self.words} still runs after {timeout} s"
            with self._folder:
                self._result = subprocess.CompletedProcess(self.words, code, *(file.read_text() for file in self._said))
        return self._result


def fairline(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return Started(*arguments, cwd=cwd).result()


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
