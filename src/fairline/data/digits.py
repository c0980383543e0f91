"""Handwritten digits inside scikit-learn (1,797 grey images of 8×8): the default that needs no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairline.data._options import refuse_unknown, require_flag, require_whole
from fairline.data.grouped import GroupedData

#: The paper's imbalance for CIFAR-10 (Section 5).
PAPER_IMBALANCE: dict[str | int, float] = {digit: 0.9 if digit < 5 else 0.1 for digit in range(10)}


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    unbalanced: bool = True,
    seed: int = 0,
    **options: Any,
) -> GroupedData:
    """Load the digits, one group a digit.

    A fixed 40 % of each digit is the test part and stays whole, so that each group can be measured.

    Args:
        root: Not used.
        task: None; there is one task.
        unbalanced: Keep 90 % of digits 0–4 and 10 % of 5–9 in the part that is not test.
        seed: Of the thinning.
        options: None are known.

    Returns:
        Images (N, 1, 8, 8); label and group are the digit.
    """
    from sklearn.datasets import load_digits

    refuse_unknown("digits", options, task)
    unbalanced, seed = require_flag(unbalanced, "unbalanced", "digits"), require_whole(seed, "seed", "digits")
    bunch = load_digits()
    # Values are 0…16.
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    names = tuple(str(digit) for digit in range(10))
    official_test = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for digit in range(10):
        members = torch.nonzero(labels == digit).squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        official_test[members[order[: round(0.4 * len(members))]]] = True
    data = GroupedData(
        images, labels, labels.clone(), names, names, name="digits", flip=False, official_test=official_test
    )
    return data.unbalance(PAPER_IMBALANCE, seed, part="train") if unbalanced else data
