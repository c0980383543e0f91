"""Images of a data set in one file, read as they are asked for. No source.

A packed folder holds ``images.u8``, raw uint8 (N, C, H, W); ``index.safetensors``, with a digest of each image and what
else there is for each; and ``packed.json``. The three are whole, since the folder gets its name last.

Images are read and not mapped: mapped pages count as resident memory until the system wants them back. Each image is
compared with its digest when a process first reads it, so that no number comes from damaged pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairline._io import json_digest, load_tensors, read_json, reading, save_tensors, write_json
from fairline.errors import FairlineError

Positions = np.ndarray[Any, np.dtype[np.int64]]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FORMAT = 1
IMAGES, INDEX, HEADER, DERIVED = "images.u8", "index.safetensors", "packed.json", "derived.json"
DIGEST_BYTES = 16

_AGAIN = "delete the folder and pack the images again"


def image_digest(pixels: Pixels) -> bytes:
    """Digest of one image's pixels (C, H, W)."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=DIGEST_BYTES).digest()


def seal(folder: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write what describes the images of a folder.

    Args:
        folder: Holds ``images.u8``.
        header: Plain JSON, with the ``shape`` of the images.
        tensors: Of as many rows as there are images; ``digests``, uint8 (N, 16), among them.

    Raises:
        FairlineError: The folder cannot be written.
    """
    save_tensors(folder / INDEX, tensors, locked=True)
    header = {"format": FORMAT, **header}
    write_json(folder / HEADER, {**header, "digest": _digest(folder, header)}, locked=True)


def _digest(folder: Path, header: Mapping[str, Any]) -> str:
    with reading(folder / INDEX), (folder / INDEX).open("rb") as opened:
        index = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
    return json_digest([header, index])


class PackedFile:
    """An open packed folder.

    Args:
        folder: The folder.

    Attributes:
        header: What ``packed.json`` holds.
        digest: Of the header and of the tensors, and so of all images.
        tensors: What ``index.safetensors`` holds.
        shape: (N, C, H, W).

    Raises:
        FairlineError: There is none, it is damaged, or of a format that is not known.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / IMAGES
        header = read_json(self.folder / HEADER)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise FairlineError(f"{self.folder} does not hold images packed in a format that is known; {_AGAIN}.")
        self.digest = header.pop("digest", None)
        self.tensors, _ = load_tensors(self.folder / INDEX)
        if self.digest != _digest(self.folder, header):
            raise FairlineError(f"{self.folder / HEADER} or {INDEX} beside it is damaged; {_AGAIN}.")
        self.header: dict[str, Any] = header
        self.shape = torch.Size(header["shape"])
        self.row = self.shape[1:].numel()
        self.digests: Pixels = self.tensors["digests"].numpy()
        # Each image is compared with its digest once.
        self._checked = np.zeros(self.shape[0], dtype=np.bool_)
        with reading(self.file):
            self._handle = os.open(self.file, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            size = os.fstat(self._handle).st_size
        if size != self.shape.numel():
            raise FairlineError(f"{self.file} is damaged: it has {size:,} bytes, not {self.shape.numel():,}; {_AGAIN}.")

    def __reduce__(self) -> tuple[type[PackedFile], tuple[Path]]:
        return PackedFile, (self.folder,)

    def read(self, positions: Positions, into: Pixels) -> None:
        """Read images.

        Args:
            positions: Which, (n,), in any order.
            into: Where to, (n, C·H·W).

        Raises:
            FairlineError: The file cannot be read, or an image is not what was packed.
        """
        # In the order of the file, neighbours in one piece where they stay neighbours.
        order = np.argsort(positions, kind="stable")
        sorted_positions = positions[order]
        apart = np.flatnonzero((np.diff(sorted_positions) != 1) | (np.diff(order) != 1)) + 1
        pieces = list(zip([0, *apart.tolist()], [*apart.tolist(), len(order)], strict=True)) if len(order) else []
        with reading(self.file):
            if len(pieces) > 1 and hasattr(os, "posix_fadvise"):
                # The disk fetches them all while the first are copied.
                for begin, end in pieces:
                    at, size = int(sorted_positions[begin]) * self.row, (end - begin) * self.row
                    os.posix_fadvise(self._handle, at, size, os.POSIX_FADV_WILLNEED)
            for begin, end in pieces:
                first = int(order[begin])
                self._fill(into[first : first + end - begin], int(sorted_positions[begin]) * self.row)
        self._check(positions, into)

    def _fill(self, rows: Pixels, at: int) -> None:
        """Read bytes from a place in the file; one call of the system may bring fewer."""
        left = rows.reshape(-1).data
        while left:
            got = os.preadv(self._handle, [left], at)
            if got == 0:
                raise FairlineError(f"{self.file} is damaged: it was cut short while it was read; {_AGAIN}.")
            left, at = left[got:], at + got

    def _check(self, positions: Positions, rows: Pixels) -> None:
        """Refuse images that are not those that were packed."""
        for number in np.flatnonzero(~self._checked[positions]).tolist():
            position = positions[number]
            if image_digest(rows[number]) != self.digests[position].tobytes():
                raise FairlineError(f"{self.file} is damaged: image {position} is not what was packed; {_AGAIN}.")
        self._checked[positions] = True

    def derived(self, key: str, compute: Callable[[], Any]) -> Any:
        """What follows from the images, kept beside them.

        Args:
            key: All that it depends on besides the images.
            compute: Finds it, as plain JSON.

        Returns:
            The value.
        """
        file = self.folder / DERIVED
        known = _intact(file)
        if key in known:
            return known[key][0]
        value = json.loads(json.dumps(compute()))
        try:
            write_json(file, {**_intact(file), key: [value, json_digest([key, value])]})
        except FairlineError:
            # A read-only or full disk: it is found again next time.
            return value
        return value


def _intact(file: Path) -> dict[str, Any]:
    """Those of the values that are kept that are not damaged."""
    try:
        known = read_json(file)
        return {key: entry for key, entry in known.items() if entry[1] == json_digest([key, entry[0]])}
    except (FairlineError, AttributeError, LookupError, TypeError):
        return {}


class PackedImages:
    """uint8 images (n, C, H, W) of a packed folder, or some of them: a view by index, of which indexing reads a tensor.

    Args:
        file: Where they are.
        index: Positions in the file, (n,); all by default.
    """

    dtype = torch.uint8
    device = torch.device("cpu")
    ndim = 4

    def __init__(self, file: PackedFile, index: Positions | None = None) -> None:
        self.file = file
        self.index: Positions = np.arange(file.shape[0]) if index is None else index

    @property
    def shape(self) -> torch.Size:
        """(n, C, H, W)."""
        return torch.Size((len(self.index), *self.file.shape[1:]))

    def __len__(self) -> int:
        return len(self.index)

    def numel(self) -> int:
        """Bytes of all images."""
        return self.shape.numel()

    def view(self, index: Tensor | slice) -> PackedImages:
        """Some of the images; nothing is read.

        Args:
            index: Positions among these images, int64 or bool, or a slice.

        Returns:
            Those at the positions.

        Raises:
            IndexError: There is no such position.
        """
        chosen = index if isinstance(index, slice) else index.detach().cpu().numpy()
        return PackedImages(self.file, self.index[chosen])

    def read(self, index: Tensor | slice, *, pin: bool = False) -> Tensor:
        """Read some of the images.

        Args:
            index: As for :meth:`view`.
            pin: Into memory that an accelerator copies from by itself.

        Returns:
            uint8, (n, C, H, W).
        """
        chosen = self.view(index)
        images = torch.empty(chosen.shape, dtype=torch.uint8, pin_memory=pin)
        self.file.read(chosen.index, images.numpy().reshape(len(chosen), self.file.row))
        return images

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.read(index)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, ``size`` at a time."""
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]

    @property
    def digests(self) -> Pixels:
        """Digest of each image, (n, 16)."""
        return self.file.digests[self.index]

    def derived(self, what: str, compute: Callable[[], Any]) -> Any:
        """A value that follows from these images in this order, kept beside them; see :meth:`PackedFile.derived`."""
        return self.file.derived(f"{what} of {self.key}", compute)

    @property
    def key(self) -> str:
        """Digest of which images these are, and in which order."""
        index = np.ascontiguousarray(self.index)
        return hashlib.blake2b(self.file.digest.encode() + index.tobytes(), digest_size=DIGEST_BYTES).hexdigest()


#: Images in memory or in a packed file.
Images = Tensor | PackedImages


def derived(images: Images, what: str, compute: Callable[[], Any]) -> Any:
    """A value that follows from images and from what ``what`` names; beside a packed file it is kept.

    Args:
        images: In their order.
        what: Names the value, and all else that it depends on.
        compute: Finds it, as plain JSON.

    Returns:
        The value; tuples may come back as lists.
    """
    return images.derived(what, compute) if isinstance(images, PackedImages) else compute()
