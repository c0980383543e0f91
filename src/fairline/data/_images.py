"""Decoding the images of a data set, a few at a time, to one uint8 tensor or to a packed folder."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from fairline._cores import given
from fairline._io import json_digest
from fairline.data._packed import Images, PackedFile, PackedImages
from fairline.data._packing import InMemory, Item, Packing, Shape, open_packed, packed_place, packing
from fairline.data.decoding import Pixels, Size, UnusableImage, decode_image, quiet_pillow
from fairline.data.grouped import Skipped
from fairline.data.memory import fits
from fairline.errors import FairlineError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")

#: Counts the changes of what pictures are decoded to; packed images of another number are not taken.
DECODER = 1

#: Images that one thread decodes in a row, and threads, as many as this process was given.
_CHUNK = 16
_THREADS = min(32, given())


@dataclass(frozen=True)
class Undecoded:
    """An image that is not decoded yet.

    Attributes:
        name: What it is called where it is skipped: its path in the data set, or its row.
        content: A file, its content, pixels (H, W) or (H, W, C), or why there is none.
    """

    name: str
    content: bytes | Path | Pixels | UnusableImage


@dataclass(frozen=True)
class Source:
    """What decides which images are decoded, so that packed ones are known again.

    Attributes:
        name: Of the data set.
        root: What the files lie in.
        files: Those that hold the images, in order.
        rows: What else decides which images are decoded; plain JSON.
        count: How many there are.
    """

    name: str
    root: Path
    files: Sequence[Path]
    rows: Any
    count: int

    def key(self, **settings: Any) -> str:
        """Digest of all that decides; a file is known by its name, its size and the time of its last change."""
        return json_digest([DECODER, self.name, [self._state(file) for file in self.files], self.rows, settings])

    def _state(self, file: Path) -> list[Any]:
        name = str(file).removeprefix(str(self.root))
        try:
            state = file.stat()
        except (OSError, ValueError):
            return [name]
        return [name, state.st_size, state.st_mtime_ns]


@dataclass(frozen=True)
class Decoded:
    """The images of a data set.

    Attributes:
        images: uint8, (n, 3, H, W).
        kept: Position of each among those that were to be decoded, in order.
        skipped: The others, and why.
    """

    images: Images
    kept: list[int]
    skipped: list[Skipped]


def decode(
    undecoded: Iterable[Undecoded],
    size: Size | None,
    source: Source,
    *,
    crop: int | None = None,
    white: float | None = None,
    pack: bool = False,
) -> Decoded:
    """Decode and resize images; :func:`fairline.data.decoding.decode_image` tells how.

    Images that would take too much of the memory go to a packed folder, and are found there the next time.

    Args:
        undecoded: Read as they are needed, so they may come from a generator.
        size: Height and width; by default the commonest size of the images, and others are skipped.
        source: Where they come from.
        crop: Side of the centre that is kept before resizing; all of the image by default.
        white: The value of white in files of 16-bit grey values or floats.
        pack: Whether to pack and leave in the file also what fits into memory.

    Returns:
        What could be decoded, and what could not.

    Raises:
        FairlineError: Not one image could be decoded, packed ones are damaged, or there is no room to pack them.
    """

    def load(image: Undecoded) -> Pixels | UnusableImage:
        try:
            if isinstance(image.content, UnusableImage):
                raise image.content
            # A copy, which frees the image at its full size.
            return decode_image(image.content, size=size, crop=crop, white=white).transpose(2, 0, 1).copy()
        except UnusableImage as unusable:
            return unusable

    key = source.key(size=size, crop=crop, white=white)
    folder = packed_place() / f"{source.name}-{key}"
    file = open_packed(folder, key)
    if file is not None:
        return _opened(file, pack)
    with quiet_pillow():
        images = iter(undecoded)
        first = list(islice(images, _CHUNK))
        expected = _expected([load(image) for image in first], source.count) if size is None else 0
        expected = 3 * size[0] * size[1] * source.count if size else expected
        if not pack and fits(expected, torch.device("cpu")):
            return _kept(InMemory(), chain(first, images), load)
        with packing(folder, key, expected) as place:
            if place.whole is None:
                logger.info("%s: %d images are packed in %s", source.name, source.count, folder)
                return _kept(place, chain(first, images), load)
            return _opened(place.whole, pack)


def _kept(
    place: InMemory | Packing, undecoded: Iterator[Undecoded], load: Callable[[Undecoded], Pixels | UnusableImage]
) -> Decoded:
    """Images decoded into a place, after those that it holds already, and those of the commonest size kept."""
    names = [image.name for image in islice(undecoded, len(place.items))]
    for image, pixels in _in_threads(load, undecoded):
        names.append(image.name)
        if isinstance(pixels, UnusableImage):
            place.skip(str(pixels))
        else:
            place.add(pixels)
    shapes = Counter(item.shape for item in place.items if item.shape)
    # The larger of two equally common ones.
    shape = max(shapes, key=lambda shape: (shapes[shape], shape), default=())
    named = zip(names, place.items, strict=True)
    skipped = [Skipped(name, _reason(item, shape)) for name, item in named if item.shape != shape]
    if not shape:
        reason = f"; the first: {skipped[0].file}, {skipped[0].reason}" if skipped else ""
        raise FairlineError(f"None of the {len(skipped)} images can be read{reason}.")
    kept = [position for position, item in enumerate(place.items) if item.shape == shape]
    header = {"skipped": [[item.file, item.reason] for item in skipped]}
    return Decoded(place.finish(shape, header, {"kept": torch.tensor(kept)}), kept, skipped)


def _reason(item: Item, shape: Shape | tuple[()]) -> str:
    if item.shape is None or not shape:
        return str(item.note)
    return f"has {item.shape[1]}×{item.shape[2]} pixels, most others have {shape[1]}×{shape[2]}"


def _opened(file: PackedFile, pack: bool) -> Decoded:
    """Images that were packed before, read into memory if they fit there and need not stay in the file."""
    images = PackedImages(file)
    whole = not pack and fits(images.numel(), images.device)
    skipped = [Skipped(name, reason) for name, reason in file.header["skipped"]]
    return Decoded(images[:] if whole else images, file.tensors["kept"].tolist(), skipped)


def _expected(first: Sequence[Pixels | UnusableImage], count: int) -> int:
    """Bytes that ``count`` images take, if they are like the first ones."""
    sizes = [image.nbytes for image in first if not isinstance(image, UnusableImage)]
    return count * sum(sizes) // len(sizes) if sizes else 0


def _in_threads(
    load: Callable[[Undecoded], Pixels | UnusableImage], undecoded: Iterable[Undecoded]
) -> Iterator[tuple[Undecoded, Pixels | UnusableImage]]:
    """Each image with what ``load`` makes of it, in order; only a few undecoded ones are held at a time."""

    def load_all(chunk: list[Undecoded]) -> list[tuple[Undecoded, Pixels | UnusableImage]]:
        return [(image, load(image)) for image in chunk]

    images = iter(undecoded)
    waiting: deque[Future[list[tuple[Undecoded, Pixels | UnusableImage]]]] = deque()
    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor(_THREADS) as pool:
        while chunk := list(islice(images, _CHUNK)):
            waiting.append(pool.submit(load_all, chunk))
            if len(waiting) > _THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
