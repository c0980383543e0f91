"""CIFAR-10 (Krizhevsky 2009), from the official Python batches or from parquet."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairline.data._images import decode, read_parquet, require_root
from fairline.data.digits import PAPER_IMBALANCE
from fairline.data.grouped import GroupedData, Skipped
from fairline.errors import FairlineError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    unbalanced: bool | str = False,
    image_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> GroupedData:
    """Load CIFAR-10, one group a class, with its official test split.

    Args:
        root: A folder with ``cifar-10-batches-py`` (or its content), or with ``cifar10_train*.parquet`` and
            ``cifar10_test*.parquet``.
        task: None; there is one task.
        unbalanced: Keep 90 % of classes 0–4 and 10 % of classes 5–9, in both parts as in the paper;
            ``"train"`` leaves the test part whole.
        image_size: Side in pixels (only parquet can be resized).
        seed: Of the thinning.
        options: None are known.

    Returns:
        Images (N, 3, image_size, image_size).

    Raises:
        FairlineError: The files are missing or not what they should be.
    """
    if options or task:
        raise FairlineError(f"Data 'cifar10' knows no option '{task or next(iter(options))}'.")
    if unbalanced not in (False, True, "train"):
        raise FairlineError(f"Data 'cifar10': unbalanced must be true, false or 'train', not '{unbalanced}'.")
    path = require_root(root, "cifar10")
    folder = path / "cifar-10-batches-py" if (path / "cifar-10-batches-py").is_dir() else path
    if (folder / "test_batch").exists():
        if image_size != 32:
            raise FairlineError("The CIFAR-10 batches are 32×32; image_size cannot be changed for them.")
        train = [_read_batch(folder / name) for name in _TRAIN_BATCHES]
        test = _read_batch(folder / "test_batch")
        images = torch.cat([batch[0] for batch in [*train, test]])
        labels = torch.cat([batch[1] for batch in [*train, test]])
        num_test = len(test[1])
        skipped: list[Skipped] = []
    else:
        parts = []
        for part in ("train", "test"):
            files = sorted(path.glob(f"cifar10_{part}*.parquet")) if path.is_dir() else []
            if not files:
                raise FairlineError(f"{path} holds neither cifar-10-batches-py/test_batch nor cifar10_{part}*.parquet.")
            parts.append(_read_tables(files, image_size))
        images = torch.cat([part[0] for part in parts])
        labels = torch.cat([part[1] for part in parts])
        num_test = len(parts[1][1])
        skipped = parts[0][2] + parts[1][2]
    official_test = torch.zeros(len(labels), dtype=torch.bool)
    official_test[len(labels) - num_test :] = True
    data = GroupedData(
        images,
        labels,
        labels.clone(),
        CLASSES,
        CLASSES,
        name="cifar10",
        official_test=official_test,
        skipped=tuple(skipped),
    )
    if unbalanced:
        data = data.unbalance(PAPER_IMBALANCE, seed, part="train" if unbalanced == "train" else "all")
    return data


def _read_tables(files: list[Path], image_size: int) -> tuple[Tensor, Tensor, list[Skipped]]:
    rows = list(read_parquet(files))
    if not rows or "label" not in rows[0]:
        raise FairlineError(f"{files[0]} has no column 'label'.")
    images, kept, skipped = decode(rows, image_size)
    return images, torch.tensor([int(rows[i]["label"]) for i in kept]), skipped


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers; every other class is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            # The constructor that the array's own pickle names, without the module's moved path.
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_batch(file: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) and labels (n,) of one official batch."""
    if not file.exists():
        raise FairlineError(f"{file} does not exist.")
    try:
        with file.open("rb") as opened:
            # Python 2's strings, array buffers among them, are bytes.
            batch = _ArraysOnly(opened, encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = torch.tensor([int(label) for label in batch[b"labels"]])
    except Exception as error:
        # A broken pickle can raise anything.
        raise FairlineError(f"{file} is not a CIFAR-10 batch ({error}).") from None
    if len(labels) != len(pixels):
        raise FairlineError(f"{file} has {len(pixels)} images but {len(labels)} labels.")
    return torch.from_numpy(pixels.copy()), labels
