"""Random crops and flips of a whole batch: the augmentation of He et al. (2016), Section 4.2, on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_and_flip(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shift each image by up to an eighth of its shorter side, zeros moving in, and mirror half of them.

    Args:
        images: (B, C, H, W), normalised.
        generator: On the CPU, so that a seed means the same on every device.
        flip: Whether to mirror.

    Returns:
        (B, C, H, W).
    """
    n, _, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    shifts = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator)
    mirror = torch.rand(n, generator=generator) < 0.5
    rows = shifts[:, :1] + torch.arange(height)
    columns = shifts[:, 1:] + torch.arange(width)
    if flip:
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    rows, columns = rows.to(images.device), columns.to(images.device)
    sample = torch.arange(n, device=images.device)[:, None, None]
    # Advanced indices around the channel axis put it last.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
