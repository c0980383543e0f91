"""SVHN, cropped digits (Netzer et al. 2011), from the official .mat files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairline.data._options import refuse_unknown, require_flag, require_root, require_whole
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

#: The code published with the paper keeps this share of the digits 5–9.
PUBLISHED_IMBALANCE: dict[str | int, float] = dict.fromkeys("56789", 0.3)


def load(
    root: str | Path | None = None, *, task: str | None = None, unbalanced: bool = False, seed: int = 0, **options: Any
) -> GroupedData:
    """Load SVHN with its natural imbalance, one group a digit, with its official test split.

    Args:
        root: A folder with ``train_32x32.mat`` and ``test_32x32.mat``.
        task: None; there is one task.
        unbalanced: Also keep only 30 % of the digits 5–9, in training and test, as the code published with the paper
            does.
        seed: Of which ones.
        options: None are known.

    Returns:
        Images (N, 3, 32, 32).

    Raises:
        FairlineError: The files are missing or not what they should be.
    """
    refuse_unknown("svhn", options, task)
    unbalanced, seed = require_flag(unbalanced, "unbalanced", "svhn"), require_whole(seed, "seed", "svhn")
    path = require_root(root, "svhn")
    images, labels = zip(*(_read_mat(path / f"{part}_32x32.mat") for part in ("train", "test")), strict=True)
    official_test = torch.zeros(len(labels[0]) + len(labels[1]), dtype=torch.bool)
    official_test[len(labels[0]) :] = True
    digits = torch.cat(labels)
    names = tuple(str(digit) for digit in range(10))
    data = GroupedData(
        torch.cat(images),
        digits,
        digits.clone(),
        names,
        names,
        name="svhn",
        flip=False,
        official_test=official_test,
    )
    return data.unbalance(PUBLISHED_IMBALANCE, seed) if unbalanced else data


def _read_mat(file: Path) -> tuple[Tensor, Tensor]:
    from scipy.io import loadmat

    if not file.exists():
        raise FairlineError(f"{file} does not exist.")
    try:
        content = loadmat(str(file), variable_names=["X", "y"])
    except Exception as error:
        # A broken file can raise almost anything in the reader.
        raise FairlineError(f"{file} is not a readable .mat file ({error}).") from None
    if "X" not in content or "y" not in content:
        raise FairlineError(f"{file} lacks the variable X or y.")
    pixels, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    if pixels.ndim != 4 or pixels.shape[2] != 3 or pixels.shape[3] != len(labels):
        raise FairlineError(f"{file}: X has shape {pixels.shape}, y {len(labels)} entries; (H, W, 3, N) is needed.")
    # (H, W, C, N) to (N, C, H, W); the digit 0 is stored as 10.
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)).astype(np.uint8))
    return images, torch.from_numpy(labels % 10)
