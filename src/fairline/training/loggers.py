"""Numbers of each epoch to the tool where a person looks at her runs: TensorBoard, MLflow, Weights & Biases, or a CSV.

All of them come through the one door, the progress callback, and are written by the tools' own clients.

Source: none.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from fairline._io import make_folder, read_json, write_text
from fairline.errors import FairlineError
from fairline.training.progress import Progress, ProgressCallback

#: What a name may hold everywhere; MLflow is the strictest.
_ALLOWED = re.compile(r"[^\w\-. /:]", re.ASCII)


class Logger(Protocol):
    """What a tool's client is asked for."""

    def log(self, stage: str, epoch: int, numbers: Mapping[str, float]) -> None:
        """Note the numbers of an epoch."""

    def close(self) -> None:
        """Write what is held back."""


class _Csv:
    """A row a number in ``metrics.csv``: ``stage``, ``epoch``, ``name``, ``value``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        file = make_folder(folder) / "metrics.csv"
        begun = file.exists()
        self.file = file.open("a", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        if not begun:
            self.writer.writerow(["stage", "epoch", "name", "value"])

    def log(self, stage: str, epoch: int, numbers: Mapping[str, float]) -> None:
        self.writer.writerows([stage, epoch, name, value] for name, value in numbers.items())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        if config:
            self.writer.add_text("config", "\n".join(f"- **{key}**: {value}" for key, value in _flat(config).items()))

    def log(self, stage: str, epoch: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(f"{stage}/{name}", value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _MLflow:
    """A run of the tracking server that ``MLFLOW_TRACKING_URI`` names, else of a database in the folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow.tracking import MlflowClient

        make_folder(folder)
        local = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self.client = MlflowClient(None if mlflow.tracking.is_tracking_uri_set() else local)
        known = folder / "run_id.txt"
        if known.exists():
            self.run = known.read_text().strip()
            self.client.update_run(self.run, "RUNNING")
            return
        found = self.client.get_experiment_by_name("fairline")
        experiment = self.client.create_experiment("fairline") if found is None else found.experiment_id
        name = folder.parents[1].name
        self.run = self.client.create_run(experiment, run_name=name).info.run_id
        for key, value in _flat(config).items():
            self.client.log_param(self.run, _ALLOWED.sub("_", key), str(value)[:500])
        write_text(known, self.run)

    def log(self, stage: str, epoch: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.run, f"{stage}/{name}", value, step=epoch)

    def close(self) -> None:
        self.client.set_terminated(self.run)


class _WandB:
    """A run of the project that ``WANDB_PROJECT`` names, else of ``fairline``; ``WANDB_MODE=offline`` keeps it here."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        make_folder(folder)
        run = folder.parents[1]
        self.run = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else "fairline",
            name=run.name,
            # The same for a run that goes on.
            id=hashlib.blake2b(str(run.resolve()).encode(), digest_size=8).hexdigest(),
            resume="allow",
            dir=str(folder),
            config=_flat(config),
        )

    def log(self, stage: str, epoch: int, numbers: Mapping[str, float]) -> None:
        self.run.log({f"{stage}/epoch": epoch} | {f"{stage}/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        self.run.finish()


#: Tool → what makes its logger, and the package that it takes.
LOGGERS: dict[str, tuple[Callable[[Path, Mapping[str, Any]], Logger], str]] = {
    "csv": (_Csv, ""),
    "tensorboard": (_TensorBoard, "tensorboard"),
    "mlflow": (_MLflow, "mlflow"),
    "wandb": (_WandB, "wandb"),
}


@contextmanager
def log_to(tools: str | Sequence[str], folder: str | Path) -> Iterator[ProgressCallback]:
    """A progress callback that notes the numbers of each epoch in one or more tools.

    Args:
        tools: Which of :data:`LOGGERS`.
        folder: Of the run; each tool writes to ``logs/TOOL`` in it, if anything at all, and its ``config.json``, if
            there is one, goes along.

    Yields:
        The callback, for ``progress=`` of whatever trains. Names are ``STAGE/NUMBER``, such as
        ``finetuning/val_accuracy``, steps are epochs.

    Raises:
        FairlineError: There is no such tool, or its package is not installed.

    >>> import tempfile
    >>> from fairline.training import Progress
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with log_to("csv", folder) as progress:
    ...         progress(Progress("training", 10, 20, metrics={"epoch": 1, "loss": 0.5}))
    ...     print((Path(folder) / "logs/csv/metrics.csv").read_text().split())
    ['stage,epoch,name,value', 'training,1,loss,0.5']
    """
    names = [tools] if isinstance(tools, str) else list(dict.fromkeys(tools))
    for name in names:
        if name not in LOGGERS:
            raise FairlineError(f"There is no logger '{name}'; choose among {', '.join(LOGGERS)}.")
        package = LOGGERS[name][1]
        if package and importlib.util.find_spec(package) is None:
            raise FairlineError(f"The logger '{name}' takes the extra: pip install 'fairline[{name}]'.")
    opened: list[Logger] = []
    with ExitStack() as held:

        def report(update: Progress) -> None:
            numbers = dict(update.metrics)
            epoch = numbers.pop("epoch", None)
            if epoch is None:
                return
            if not opened:
                # The folder is the run's by now.
                for name in names:
                    opened.append(LOGGERS[name][0](Path(folder) / "logs" / name, _config(Path(folder))))
                    held.callback(opened[-1].close)
            kept = {_plain(name): float(value) for name, value in numbers.items() if _is_number(value)}
            for logger in opened:
                logger.log(_plain(update.stage), int(epoch), kept)

        yield report


def _plain(name: str) -> str:
    """A name that every tool takes: ``lambda[Others]`` becomes ``lambda/Others``."""
    return _ALLOWED.sub("_", name.replace("[", "/").replace("]", ""))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    content = read_json(file) if file.exists() else {}
    # Where it comes from would be longer than itself.
    return {key: value for key, value in content.items() if key != "lineage"}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


__all__ = ["LOGGERS", "Logger", "log_to"]
