"""Decoding the images of a data set to one uint8 tensor, a few at a time."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairline.data.decoding import Pixels, Size, UnusableImage, decode_image, quiet_pillow
from fairline.data.grouped import Skipped
from fairline.errors import FairlineError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")

#: Images that one thread decodes in a row, and threads.
_CHUNK = 16
_THREADS = min(32, (os.cpu_count() or 1) + 4)


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
class Decoded:
    """The images of a data set.

    Attributes:
        images: uint8, (n, 3, H, W).
        kept: Position of each among those that were to be decoded, in order.
        skipped: The others, and why.
    """

    images: Tensor
    kept: list[int]
    skipped: list[Skipped]


def decode(
    undecoded: Iterable[Undecoded], size: Size | None, *, crop: int | None = None, white: float | None = None
) -> Decoded:
    """Decode and resize images; :func:`fairline.data.decoding.decode_image` tells how.

    Args:
        undecoded: Read as they are needed, so they may come from a generator.
        size: Height and width; by default the commonest size of the images, and others are skipped.
        crop: Side of the centre that is kept before resizing; all of the image by default.
        white: The value of white in files of 16-bit grey values or floats.

    Returns:
        What could be decoded, and what could not.

    Raises:
        FairlineError: Not one image could be decoded.
    """

    def load(image: Undecoded) -> Pixels | Skipped:
        try:
            if isinstance(image.content, UnusableImage):
                raise image.content
            # A copy, which frees the image at its full size.
            return decode_image(image.content, size=size, crop=crop, white=white).transpose(2, 0, 1).copy()
        except UnusableImage as unusable:
            return Skipped(image.name, str(unusable))

    names: list[str] = []
    loaded: list[Pixels | Skipped] = []
    with quiet_pillow():
        for image, pixels in _in_threads(load, undecoded):
            names.append(image.name)
            loaded.append(pixels)
    loaded = _of_one_size(loaded, names)
    skipped = [item for item in loaded if isinstance(item, Skipped)]
    kept = [position for position, item in enumerate(loaded) if not isinstance(item, Skipped)]
    if not kept:
        reason = f"; the first: {skipped[0].file}, {skipped[0].reason}" if skipped else ""
        raise FairlineError(f"None of the {len(skipped)} images can be read{reason}.")
    # Contiguous NCHW: a permuted view would count as channels_last in every later layer.
    images = torch.from_numpy(np.stack([item for item in loaded if not isinstance(item, Skipped)]))
    return Decoded(images, kept, skipped)


def _in_threads(
    load: Callable[[Undecoded], Pixels | Skipped], undecoded: Iterable[Undecoded]
) -> Iterator[tuple[Undecoded, Pixels | Skipped]]:
    """Each image with what ``load`` makes of it, in order; only a few undecoded ones are held at a time."""

    def load_all(chunk: list[Undecoded]) -> list[tuple[Undecoded, Pixels | Skipped]]:
        return [(image, load(image)) for image in chunk]

    images = iter(undecoded)
    waiting: deque[Future[list[tuple[Undecoded, Pixels | Skipped]]]] = deque()
    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor(_THREADS) as pool:
        while chunk := list(islice(images, _CHUNK)):
            waiting.append(pool.submit(load_all, chunk))
            if len(waiting) > _THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _of_one_size(loaded: list[Pixels | Skipped], names: list[str]) -> list[Pixels | Skipped]:
    """The images of the commonest size, the larger of two equally common ones; others are skipped."""
    shapes = Counter(item.shape[1:] for item in loaded if not isinstance(item, Skipped))
    if len(shapes) < 2:
        return loaded
    height, width = max(shapes, key=lambda shape: (shapes[shape], shape))
    return [
        item
        if isinstance(item, Skipped) or item.shape[1:] == (height, width)
        else Skipped(name, f"has {item.shape[1]}×{item.shape[2]} pixels, most others have {height}×{width}")
        for item, name in zip(loaded, names, strict=True)
    ]
