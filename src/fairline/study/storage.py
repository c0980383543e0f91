"""Where the cells of studies are kept: a local folder, or any fsspec path, such as ``s3://bucket/studies``.

STORE/
  cells/KEY/                the run folder of a cell; cell.json says what its hash is of
  errors/KEY.json           why its last try failed
  STUDY/spec.json           what the study runs
  STUDY/results.parquet     every measure (fairline.study.store)
  STUDY/DATA-SEED/NAME      the cells by name (links, in a local folder)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fairline._io import alone, read_json, write_json, write_text
from fairline.errors import FairlineError
from fairline.runs import Run
from fairline.study.cell import Cell

#: Folder of local copies of cells that are kept elsewhere.
SCRATCH = "FAIRLINE_SCRATCH"


@dataclass(frozen=True)
class Storage:
    """A store of cells. Plain data, so that it can be sent to workers.

    On a remote path a cell is worked on in a local folder and uploaded when it is finished, ``status.json`` last, so
    that what looks finished is whole. A cell that a lost machine had begun is begun anew; on the same machine it
    goes on from its checkpoint.

    Attributes:
        path: A folder, or a path with a protocol that fsspec knows.
    """

    path: str

    @property
    def remote(self) -> bool:
        """Whether it is reached through fsspec."""
        return "://" in self.path

    @cached_property
    def local(self) -> Path:
        """The folder, or that of the local copies."""
        if not self.remote:
            return Path(self.path)
        scratch = Path(os.environ.get(SCRATCH) or Path.home() / ".cache" / "fairline" / "studies")
        return scratch / hashlib.sha256(self.path.encode()).hexdigest()[:16]

    def folder(self, cell: Cell) -> Path:
        """Where a cell is worked on."""
        return self.local / "cells" / cell.key

    def finished(self, cell: Cell) -> bool:
        """Whether a cell is done, here or in the remote store."""
        if not self.remote:
            return Run(self.folder(cell)).finished
        return self._exists(f"cells/{cell.key}/status.json")

    def fetch(self, cell: Cell) -> Path:
        """The run folder of a finished cell, downloaded if need be, with all that it was built on."""
        if self.remote:
            for one in (*cell.ancestors(), cell):
                folder = self.folder(one)
                if Run(folder).finished or not self.finished(one):
                    continue
                with alone(self.local / "cells" / f".{one.key}.lock"):
                    if not Run(folder).finished:
                        arriving = folder.with_name(f".{one.key}.{uuid.uuid4().hex}")
                        self._system.get(self._at(f"cells/{one.key}"), str(arriving), recursive=True)
                        shutil.rmtree(folder, ignore_errors=True)
                        arriving.replace(folder)
        return self.folder(cell)

    def publish(self, cell: Cell, seconds: float, resumed: bool) -> None:
        """Keep a finished cell, and what its hash is of.

        Args:
            cell: The cell.
            seconds: That it took.
            resumed: Whether they are only those since it was interrupted.
        """
        folder = self.folder(cell)
        if not (folder / "cell.json").exists():
            write_json(folder / "cell.json", {**cell.content, "seconds": round(seconds, 2), "resumed": resumed})
        if self.remote and not self.finished(cell):
            files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
            for file in sorted(files, key=lambda file: file.name == "status.json"):
                self.upload(file, f"cells/{cell.key}/{file.relative_to(folder)}")
        self.clear_error(cell)

    def busy(self, cell: Cell) -> bool:
        """Whether a process of this machine is at work on a cell."""
        try:
            lock = (self.folder(cell) / ".lock").open("r+")
        except OSError:
            return False
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
            return False

    def record_error(self, cell: Cell, error: str) -> None:
        """Keep why a cell's last try failed; where even that cannot be written, it is only told."""
        with contextlib.suppress(OSError, FairlineError):
            self.write_text(f"errors/{cell.key}.json", json.dumps({"error": error, "time": time.time()}) + "\n")

    def error(self, cell: Cell) -> str:
        """Why a cell's last try failed; empty if it did not."""
        content = self.read_json(f"errors/{cell.key}.json")
        return "" if content is None else str(content["error"])

    def clear_error(self, cell: Cell) -> None:
        """Forget a failed try."""
        if not self.remote:
            (self.local / "errors" / f"{cell.key}.json").unlink(missing_ok=True)
        elif self._exists(f"errors/{cell.key}.json"):
            self._system.rm_file(self._at(f"errors/{cell.key}.json"))

    def notes(self) -> dict[str, dict[str, Any]]:
        """What is known of the cells that are done on this machine: ``cell.json`` of each, by key."""
        return {file.parent.name: read_json(file) for file in sorted((self.local / "cells").glob("*/cell.json"))}

    def studies(self) -> list[str]:
        """Names of the studies."""
        if not self.remote:
            return sorted(file.parent.name for file in self.local.glob("*/spec.json"))
        found = self._system.glob(self._at("*/spec.json"))
        return sorted(str(name).rsplit("/", 2)[-2] for name in found)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file of the store."""
        if not self.remote:
            write_text(self.local / name, text)
            return
        self._system.pipe_file(self._target(name), text.encode())

    def read_json(self, name: str) -> Any:
        """Read a small file of the store.

        Returns:
            Its content; None if it is not there.

        Raises:
            FairlineError: It is not JSON.
        """
        if not self.remote:
            return read_json(self.local / name) if (self.local / name).exists() else None
        if not self._exists(name):
            return None
        try:
            return json.loads(self._system.cat_file(self._at(name)))
        except ValueError as error:
            raise FairlineError(f"{self._at(name)} is not valid JSON ({error}).") from None

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file into a remote store; a local one holds it already."""
        if self.remote:
            self._system.put_file(str(file), self._target(name))

    def link(self, study: str, cell: Cell) -> None:
        """Give a cell its name for people."""
        if self.remote:
            return
        link = self.local / study / cell.where
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(self.folder(cell), link.parent)
        if link.is_symlink() and os.readlink(link) == target:  # noqa: PTH115
            return
        temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
        temporary.symlink_to(target)
        temporary.replace(link)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the store's path on it."""
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.path)
        except (ValueError, ImportError) as error:
            raise FairlineError(f"{self.path} cannot be used as a store: {error}.") from None
        return system, str(path).rstrip("/")

    @property
    def _system(self) -> Any:
        return self._place[0]

    def _at(self, name: str) -> str:
        return f"{self._place[1]}/{name}"

    def _target(self, name: str) -> str:
        """Where a file will be written; its folder is there."""
        path = self._at(name)
        self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def _exists(self, name: str) -> bool:
        # Other machines write; what was listed a while ago does not count.
        self._system.invalidate_cache()
        return bool(self._system.exists(self._at(name)))
