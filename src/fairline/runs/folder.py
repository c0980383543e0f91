"""The folder of a run: who writes it, how it is resumed, and what a following job reads of it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline._io import make_folder, read_json, read_table, reading, write_json, write_table
from fairline.errors import FairlineError
from fairline.ranks import here
from fairline.runs.data import DataSpec
from fairline.runs.environment import environment

logger = logging.getLogger(__name__)


class FolderInUse(FairlineError):
    """Another process is at work in the run folder."""


def digest(files: Sequence[Path]) -> str:
    """Digest of the content of some files."""
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


class Run:
    """A run folder that is being written, or that is read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    @contextlib.contextmanager
    def write(cls, folder: str | Path, command: str, config: Mapping[str, Any], device: torch.device) -> Iterator[Run]:
        """Start or resume the job in a folder; the status becomes ``finished`` when the block succeeds.

        Args:
            folder: Created if missing. If it holds the same job, that is resumed.
            command: Name of the job.
            config: What determines the result.
            device: Where the job computes.

        Yields:
            The run; ``finished`` is true where nothing is left to do.

        Raises:
            FairlineError: The folder holds something else, or another process is at work in it.
        """
        run = cls(folder)
        wanted = json.loads(json.dumps({"command": command, **config}))
        with contextlib.ExitStack() as held:
            if here().first(lambda: run._taken(held, wanted, device)):
                yield run
                return
            with _logged_to(run.folder / "log.txt"):
                logger.info("%s in %s on %s", command, run.folder, device)
                try:
                    yield run
                    # Until then another process may be reading what follows removes.
                    here().barrier()
                    write_json(run.folder / "status.json", {"status": "finished"})
                    if here().is_first:
                        shutil.rmtree(run.checkpoint, ignore_errors=True)
                except BaseException as error:
                    logger.error("%s stopped: %s", command, error or type(error).__name__)
                    if isinstance(error, FairlineError) and here().is_first and run._is_empty:
                        # What cannot be done need not be deleted before something else is.
                        write_json(run.folder / "status.json", {"status": "refused"})
                    raise

    def _taken(self, held: contextlib.ExitStack, wanted: Mapping[str, Any], device: torch.device) -> bool:
        """Lock the folder as long as ``held`` lasts and write what it is to hold; or find that it is done already."""
        with reading(self.folder):
            self._require_free_or_same(wanted)
        held.enter_context(self._locked())
        with reading(self.folder):
            # Before the lock another process may have begun something else here.
            self._require_free_or_same(wanted)
        if self.finished:
            return True
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()
        write_json(self.folder / "config.json", wanted)
        write_json(self.folder / "environment.json", environment(device))
        write_json(self.folder / "status.json", {"status": "running"})
        return False

    def note_device(self, what: str) -> None:
        """Say more of what the run computes on, for whoever reads where its numbers come from."""
        file = self.folder / "environment.json"
        made = read_json(file)
        if what not in made["device"].split(", "):
            write_json(file, {**made, "device": f"{made['device']}, {what}"})

    def _require_free_or_same(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a folder that holds something else than the run of this config."""
        if self.folder.exists() and not self.folder.is_dir():
            raise FairlineError(f"{self.folder} is a file, not a folder.")
        config_file = self.folder / "config.json"
        if config_file.exists():
            different = difference(read_json(config_file), wanted)
            if different and not (self._status == "refused" and self._is_empty):
                raise FairlineError(
                    f"{self.folder} holds another run ({different}); choose another --out or delete the folder."
                )
        elif self.folder.exists():
            names = [path.name for path in self.folder.iterdir()]
            strange = [name for name in names if name != ".lock" and not re.fullmatch(r"\..*\.tmp", name)]
            # The config comes first, so what another process has just put here stands beside one.
            if strange and not config_file.exists():
                raise FairlineError(f"{self.folder} is not empty and is not a run folder; choose another --out.")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it."""
        make_folder(self.folder)
        try:
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise FairlineError(f"{self.folder} cannot be written ({error.strerror}).") from None
        with lock:
            try:
                # The kernel drops the lock with the process, however it dies.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderInUse(f"{self.folder} is in use by another process.") from None
            yield

    @classmethod
    def read(cls, folder: str | Path, *commands: str) -> Run:
        """Open a finished run.

        Args:
            folder: Its folder.
            commands: Jobs that it may be of; any by default.

        Returns:
            The run.

        Raises:
            FairlineError: The folder is no run, not of one of these commands, or not finished.
        """
        run = cls(folder)
        with reading(folder):
            if not (run.folder / "config.json").exists():
                raise FairlineError(f"{folder} is not a run folder (it holds no config.json).")
        if commands and run.command not in commands:
            needed = " or ".join(f"'{command}'" for command in commands)
            raise FairlineError(f"{folder} holds a '{run.command}' run; {needed} is needed.")
        if run._status == "refused":
            raise FairlineError(f"The {run.command} run in {folder} was refused; its log.txt says why.")
        if not run.finished:
            raise FairlineError(f"The {run.command} run in {folder} is not finished; repeat its command to resume it.")
        return run

    @property
    def checkpoint(self) -> Path:
        """Where the job keeps what it resumes from."""
        return self.folder / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether the job is done."""
        return self._status == "finished"

    @property
    def _status(self) -> str:
        """``running``, ``finished``, or ``refused`` where there was bad input; empty where nothing is said."""
        status = self.folder / "status.json"
        return str(read_json(status).get("status")) if status.exists() else ""

    @property
    def _is_empty(self) -> bool:
        """Whether nothing is there but what every run begins with."""
        files = {file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if not file.is_dir()}
        return files <= {".lock", "config.json", "environment.json", "log.txt", "status.json"}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What determines the result."""
        content = read_json(self.folder / "config.json")
        if not isinstance(content, dict) or "command" not in content:
            raise FairlineError(f"{self.folder / 'config.json'} is not a run's config.")
        return content

    @property
    def command(self) -> str:
        """The job."""
        return str(self.config["command"])

    @property
    def data(self) -> DataSpec:
        """The data that the run used."""
        return DataSpec.from_json(self.config["data"])

    def networks(self) -> dict[str, Path]:
        """Folders of the networks, by name, most ReLUs first."""
        folders = [file.parent for file in (self.folder / "networks").glob("*/network.json")]
        order = {folder: -read_json(folder / "network.json").get("relus", 0) for folder in folders}
        return {folder.name: folder for folder in sorted(folders, key=lambda folder: (order[folder], folder.name))}

    def base_network(self) -> Path:
        """Folder of the network that a training run made.

        Returns:
            The folder.

        Raises:
            FairlineError: It is gone, or cannot be read.
        """
        found = self.networks().get("base")
        if found is None:
            raise FairlineError(f"{self.folder} has no readable networks/base/network.json any more.")
        return found

    def network_folder(self, name: str) -> Path:
        """Where a network of this run goes."""
        return self.folder / "networks" / name

    def lineage(self) -> list[Run]:
        """The runs that this one was built on, the training run first, and this one last."""
        if "parent" not in self.config:
            return [self]
        return [*self._named(self.config["parent"]).lineage(), self]

    def sources(self) -> list[Run]:
        """The runs whose networks this one measures, in their order; of others none."""
        return [self._named(entry) for entry in self.config.get("sources", ())]

    def candidates(self) -> list[Run]:
        """The runs that a ``choose`` run chose from, what they were compared with first; of other runs none."""
        if self.command != "choose":
            return []
        return [self._named(entry) for entry in (self.config["reference"], *self.config["sources"])]

    def _named(self, entry: Mapping[str, str]) -> Run:
        """A finished run that this one's config names."""
        folder = Path(entry["folder"])
        if not folder.exists():
            # The runs may have been moved together.
            folder = self.folder.resolve().parent / folder.name
        return Run.read(folder)

    def base(self) -> Run:
        """The training run at the start of the lineage."""
        return self.lineage()[0]

    def parent_entry(self) -> dict[str, str]:
        """How a following job names this one: its folder, as it was given, and a digest of its networks."""
        files = [file for folder in self.networks().values() for file in sorted(folder.iterdir())]
        # Links stay: a study's networks are known by them.
        return {"folder": str(self.folder.absolute()), "digest": digest(files)}

    def table(self, name: str) -> pd.DataFrame:
        """Rows of one of its parquet tables."""
        return read_table(self.folder / name)

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one row an epoch."""
        write_table(self.folder / "metrics.parquet", pd.DataFrame(list(rows)))


def linearized_networks(runs: Sequence[Run]) -> dict[str, Path]:
    """Folders of the networks of some runs but for base networks, by run and name: ``students/budget-307``."""
    return {
        f"{run.folder.name}/{name}": path
        for run in runs
        if run.command != "train"
        for name, path in run.networks().items()
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Find the first entry in which two configs differ.

    >>> difference({"seed": 0, "settings": {"lr": 0.1}}, {"seed": 0, "settings": {"lr": 0.2}})
    'settings.lr is 0.1 there and 0.2 here'
    >>> difference({"code": {"mine.py": "0f3a"}}, {"code": {"mine.py": "91bc"}})
    'mine.py has changed since'

    Returns:
        It, in words; empty if there is none.
    """
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            return difference(before, after, f"{prefix}{key}.")
        if prefix.startswith("code.") and before and after:
            return f"{key} has changed since"
        return f"{prefix}{key} is {before!r} there and {after!r} here"
    return ""


@contextlib.contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Append what fairline logs to a file; of several processes the first one's."""
    if not here().is_first:
        yield
        return
    handler = _Log(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("fairline")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


class _Log(logging.FileHandler):
    """A log whose lines are lost where they cannot be written: what ends a run on a full disk is its results."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on."""
