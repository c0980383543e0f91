"""Running the command line in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
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


def fairline(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, cwd=cwd, env=ENVIRONMENT)


def ok(*arguments: str | Path, **more) -> str:
    done = fairline(*arguments, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout
