"""How much memory images may take. No source."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fairline.errors import FairlineError
from fairline.ranks import here

#: Share of the memory that the images of a data set may take; splitting them takes as much again.
SHARE = 0.25
#: The variable that says another.
SHARE_VARIABLE = "FAIRLINE_MEMORY_SHARE"

#: Images of more pixels are taken fewer at a time.
_PIXELS = 64 * 64

#: Limits of a container, of the two versions of control groups; "max" is none.
_CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def share() -> float:
    """Share of the memory that images may take.

    Returns:
        What ``FAIRLINE_MEMORY_SHARE`` says, or a quarter.

    Raises:
        FairlineError: The variable is no share.
    """
    text = os.environ.get(SHARE_VARIABLE, "").strip()
    try:
        value = float(text) if text else SHARE
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise FairlineError(f"{SHARE_VARIABLE} is a share of memory from 0 to 1, not '{text}'.")
    return value


def fits(size: int, device: torch.device) -> bool:
    """Whether images may be kept whole on a device.

    Args:
        size: Their bytes.
        device: Of CUDA, whose free memory counts; else all memory of the host does.

    Returns:
        Whether they take no more than :func:`share` of it; on the host, in each of several processes.

    Raises:
        FairlineError: ``FAIRLINE_MEMORY_SHARE`` is no share.
    """
    if device.type == "cuda":
        return size <= share() * torch.cuda.mem_get_info(device)[0]
    return size * here().size <= share() * _host_memory()


def images_at_once(most: int, shape: torch.Size) -> int:
    """How many images to take at a time, so that larger ones take no more memory than those of 64×64 pixels.

    Args:
        most: As many of small images.
        shape: Of the images, (…, H, W).

    Returns:
        A number from 1 to ``most``.

    >>> images_at_once(100, torch.Size([3, 64, 64])), images_at_once(100, torch.Size([3, 224, 224]))
    (100, 8)
    """
    return min(most, max(1, most * _PIXELS // (shape[-2] * shape[-1])))


def _host_memory() -> int:
    """Bytes that this process may take."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _CONTAINER:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)
