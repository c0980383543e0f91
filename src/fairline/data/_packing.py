"""Writing packed folders, so that an interrupted one goes on. No source.

Images are appended to a file for each shape beside a journal, in a folder of another name. The journal is written after
the images that it counts are on the disk, so what it does not count is cut off when packing goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairline._io import make_folder, read_json, reading, write_json
from fairline.data._packed import (
    DIGEST_BYTES,
    HEADER,
    IMAGES,
    INDEX,
    PackedFile,
    PackedImages,
    Pixels,
    image_digest,
    seal,
)
from fairline.errors import FairlineError

#: The variable that names the place of packed images.
PLACE_VARIABLE = "FAIRLINE_PACKED"

#: Bytes of images that are written at once; an interruption costs so many at most.
BLOCK = 64 << 20

_KEY, _JOURNAL = "key.json", "journal.jsonl"

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Item:
    """What became of one image.

    Attributes:
        shape: (C, H, W) of its pixels; None where it has none.
        note: Why it has none, or what belongs to it.
    """

    shape: Shape | None
    note: Any = None


def packed_place() -> Path:
    """Where packed images are kept: what ``FAIRLINE_PACKED`` names, or a folder in the user's cache."""
    named = os.environ.get(PLACE_VARIABLE, "").strip()
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(named or Path(cache) / "fairline" / "packed").expanduser()


def open_packed(folder: Path, key: str) -> PackedFile | None:
    """The images of a packed folder, if it is there.

    Args:
        folder: Where it would be.
        key: What it must have been packed from.

    Returns:
        The images.

    Raises:
        FairlineError: They are damaged, or of other data.
    """
    with reading(folder):
        if not folder.exists():
            return None
    file = PackedFile(folder)
    if file.header.get("key") != key:
        raise FairlineError(f"{folder} holds packed images of other data; take another folder, or delete it.")
    return file


class InMemory:
    """Images that are kept in memory; the same calls as of :class:`Packing`.

    Attributes:
        items: What became of each image so far, in order.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._images: list[Pixels] = []

    def add(self, pixels: Pixels, note: Any = None) -> None:
        """Add the next image, uint8 (C, H, W), and what belongs to it."""
        self.items.append(Item(_shape(pixels), note))
        # Contiguous NCHW: a permuted view would count as channels_last in every later layer.
        self._images.append(np.ascontiguousarray(pixels))

    def skip(self, reason: str) -> None:
        """Add that the next image cannot be used."""
        self.items.append(Item(None, reason))

    def finish(self, shape: Shape, header: object = None, tensors: object = None) -> Tensor:
        """The images of one shape, uint8 (n, C, H, W)."""
        return torch.from_numpy(np.stack([pixels for pixels in self._images if pixels.shape == shape]))


@contextmanager
def packing(folder: Path, key: str, expected: int = 0) -> Iterator[Packing]:
    """Write a packed folder, or go on with one. Another process that packs the same one is waited for.

    Args:
        folder: The packed folder.
        key: What determines the images and their order.
        expected: Bytes that they will take, as far as it is known.

    Yields:
        Where images are added, unless it is whole already.

    Raises:
        FairlineError: There is no room for them, the folder cannot be written, or it holds other data.
    """
    try:
        with _locked(folder.with_name(folder.name + ".partial")) as partial, Packing(folder, partial, key) as found:
            if found.whole is None:
                _require_room(partial, expected)
            yield found
    except OSError as error:
        raise FairlineError(
            f"Images cannot be packed in {folder.parent} ({error.strerror or error}); the variable {PLACE_VARIABLE} "
            "names another place."
        ) from None


class Packing:
    """A packed folder that is being written; :func:`packing` makes one.

    Args:
        folder: The packed folder.
        partial: What it is called until it is whole.
        key: What determines the images and their order.

    Attributes:
        whole: The packed images, if there is nothing left to do.
        items: What became of each image so far, in order.

    Raises:
        FairlineError: The folder is damaged, or holds other data.
    """

    def __init__(self, folder: Path, partial: Path, key: str) -> None:
        self.folder, self.partial, self.key = folder, partial, key
        self.items: list[Item] = []
        self._waiting: list[tuple[Item, Pixels]] = []
        self._waiting_bytes = 0
        if (partial / HEADER).exists() and (partial / IMAGES).exists():
            partial.replace(folder)
        self.whole = open_packed(folder, key)
        if self.whole is None:
            self._resume()

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.whole is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
        elif not isinstance(error, OSError):
            # What was decoded is kept, whatever stopped it.
            self._flush()

    def add(self, pixels: Pixels, note: Any = None) -> None:
        """Add the next image, uint8 (C, H, W), and what belongs to it, of which the journal keeps plain JSON."""
        note = json.loads(json.dumps(note, default=_plain))
        self._add(Item(_shape(pixels), note), np.ascontiguousarray(pixels))

    def skip(self, reason: str) -> None:
        """Add that the next image cannot be used."""
        self._add(Item(None, reason), np.empty(0, np.uint8))

    def finish(
        self, shape: Shape, header: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> PackedImages:
        """Keep the images of one shape, and let them be found.

        Args:
            shape: (C, H, W).
            header: What else is to be told of them, plain JSON.
            tensors: What else there is of each, (n, …).

        Returns:
            The packed images.
        """
        self._flush()
        digests = np.frombuffer(self._file(shape, "digests").read_bytes(), np.uint8).reshape(-1, DIGEST_BYTES).copy()
        seal(
            self.partial,
            {"key": self.key, "shape": [len(digests), *shape], **(header or {})},
            {"digests": torch.from_numpy(digests), **(tensors or {})},
        )
        self._file(shape, "u8").replace(self.partial / IMAGES)
        self.partial.replace(self.folder)
        for leftover in self.folder.iterdir():
            if leftover.name not in (IMAGES, INDEX, HEADER):
                leftover.unlink()
        self.whole = PackedFile(self.folder)
        return PackedImages(self.whole)

    def _add(self, item: Item, pixels: Pixels) -> None:
        self.items.append(item)
        self._waiting.append((item, pixels))
        self._waiting_bytes += pixels.nbytes
        if self._waiting_bytes >= BLOCK:
            self._flush()

    def _file(self, shape: Shape, suffix: str) -> Path:
        return self.partial / f"{'x'.join(map(str, shape))}.{suffix}"

    def _flush(self) -> None:
        """Write what waits, then the journal of it."""
        for shape in dict.fromkeys(item.shape for item, _ in self._waiting if item.shape):
            added = [pixels for item, pixels in self._waiting if item.shape == shape]
            _append(self._file(shape, "u8"), (pixels.data for pixels in added))
            _append(self._file(shape, "digests"), map(image_digest, added))
        runs = [
            [list(item.shape or ()), item.note, sum(1 for _ in same)]
            for item, same in groupby(item for item, _ in self._waiting)
        ]
        if runs:
            _append(self.partial / _JOURNAL, [json.dumps(runs).encode() + b"\n"])
        self._waiting, self._waiting_bytes = [], 0

    def _resume(self) -> None:
        """Read the journal of an interrupted packing of the same images, and cut off what it does not count."""
        journal, key = self.partial / _JOURNAL, self.partial / _KEY
        if not journal.exists():
            write_json(key, self.key, locked=True)
            journal.touch()
        if read_json(key) != self.key:
            raise FairlineError(f"{self.partial} holds half-packed images of other data; delete it.")
        lines = journal.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(journal, sum(map(len, lines[:-1])))
            del lines[-1]
        try:
            for shape, note, count in (run for line in lines for run in json.loads(line)):
                self.items += [Item(tuple(shape) or None, note)] * count
        except (ValueError, TypeError):
            raise FairlineError(f"{journal} is damaged; delete {self.partial}.") from None
        rows = Counter(item.shape for item in self.items)
        for file in self.partial.glob("*x*.*"):
            channels, height, width = map(int, file.stem.split("x"))
            size = DIGEST_BYTES if file.suffix == ".digests" else channels * height * width
            os.truncate(file, size * rows[channels, height, width])


@contextmanager
def _locked(partial: Path) -> Iterator[Path]:
    """Make a folder, and keep other processes out of it until it is renamed."""
    while True:
        make_folder(partial)
        handle = os.open(partial, os.O_RDONLY)
        try:
            # The kernel drops the lock with the process, however it dies.
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Who held the lock may have finished the folder and renamed it.
            if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
                yield partial
                return
        finally:
            os.close(handle)


def _require_room(partial: Path, expected: int) -> None:
    """Refuse to begin what will not fit on the disk."""
    needed = expected - sum(file.stat().st_size for file in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise FairlineError(
            f"Packing the images takes {_size(needed)} more, but {partial.parent} has {_size(free)} left; the variable "
            f"{PLACE_VARIABLE} names another place."
        )


def _shape(pixels: Pixels) -> Shape:
    channels, height, width = pixels.shape
    return channels, height, width


def _plain(value: Any) -> Any:
    """Arrays, tensors and their numbers as lists and numbers; bytes and whatever else there is as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _append(file: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write at a file's end, and on the disk."""
    with file.open("ab") as opened:
        for piece in pieces:
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
