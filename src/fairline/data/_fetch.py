"""Images in memory or in a file, asked alike; and batches of them fetched ahead. No source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairline.data._packed import DIGEST_BYTES, Images, PackedImages, image_digest
from fairline.data.memory import fits, images_at_once


def read_images(images: Images, index: Tensor | slice) -> Tensor:
    """Some images, uint8 (n, C, H, W), where they are."""
    return images[index.to(images.device) if isinstance(index, Tensor) else index]


def chosen_images(images: Images, index: Tensor) -> Images:
    """Some images, as a view where they lie in a file."""
    return images.view(index) if isinstance(images, PackedImages) else read_images(images, index)


def image_digests(images: Images) -> np.ndarray[Any, np.dtype[np.bytes_]]:
    """A digest of each image, (n,)."""
    if isinstance(images, PackedImages):
        return np.ascontiguousarray(images.digests).view(f"S{DIGEST_BYTES}").reshape(-1)
    return np.array([image_digest(image) for image in images.cpu().numpy()])


def placed(images: Images, device: torch.device) -> Images:
    """The images on a device, or where they are if they would take too much of its memory.

    Args:
        images: Anywhere.
        device: Where to.

    Returns:
        The images.
    """
    if images.device == device or (device.type != "cpu" and not fits(images.numel(), device)):
        return images
    if isinstance(images, Tensor):
        return images.to(device)
    if device.type == "cpu":
        return images
    there = torch.empty(images.shape, dtype=torch.uint8, device=device)
    begin = 0
    for chunk in images.split(images_at_once(4096, images.shape)):
        there[begin : begin + len(chunk)] = chunk.to(device)
        begin += len(chunk)
    return there


def fetch(images: Images, batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of images on a device, each fetched while the one before is used, unless they are there already.

    Args:
        images: In memory, in a file, or on the device.
        batches: Positions of each batch.
        device: Where they are needed.

    Yields:
        uint8, (B, C, H, W).
    """
    if isinstance(images, Tensor) and images.device == device:
        for index in batches:
            yield read_images(images, index)
        return
    lane = _Lane(device) if device.type == "cuda" else _Plain(device)
    waiting: Future[Any] | None = None
    with ThreadPoolExecutor(1, "fetch") as reader:
        for index in batches:
            coming = reader.submit(lane.send, images, index)
            if waiting is not None:
                yield lane.receive(waiting.result())
            waiting = coming
        if waiting is not None:
            yield lane.receive(waiting.result())


class _Plain:
    """Brings images to a device that copies them when it is told to, or that is the host itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, images: Images, index: Tensor) -> Tensor:
        return read_images(images, index)

    def receive(self, sent: Tensor) -> Tensor:
        return sent.to(self.device)


class _Lane:
    """Brings images to a CUDA device beside its computations, through pinned memory.

    torch keeps pinned memory that is given back and hands it out again once its copy is done, so two batches' worth
    is in use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, images: Images, index: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        if isinstance(images, PackedImages):
            host = images.read(index, pin=True)
        else:
            host = torch.empty((len(index), *images.shape[1:]), dtype=torch.uint8, pin_memory=True)
            torch.index_select(images, 0, index.cpu(), out=host)
        with torch.cuda.stream(self.stream):
            sent = host.to(self.device, non_blocking=True)
            return sent, self.stream.record_event()

    def receive(self, sent: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        images, there = sent
        now = torch.cuda.current_stream(self.device)
        now.wait_event(there)
        # The memory is the other stream's, which must not reuse it before this one is done.
        images.record_stream(now)
        return images
