"""CIFAR-10 (Krizhevsky 2009), from the official Python batches or from parquet."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairline.data._options import parse_size, refuse_unknown, require_root, require_whole
from fairline.data._parts import Content, by_class, read_parquet, require_unbalanced, unbalanced_halves
from fairline.data.decoding import Size
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LABEL = "label"
_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    unbalanced: bool | str = False,
    image_size: int | tuple[int, int] | str | None = 32,
    seed: int = 0,
    pack: bool = False,
    **options: Any,
) -> GroupedData:
    """Load CIFAR-10, one group a class, with its official test split.

    Args:
        root: A folder with ``cifar-10-batches-py`` (or its content), or with ``cifar10_train*.parquet`` and
            ``cifar10_test*.parquet``.
        task: None; there is one task.
        unbalanced: Keep 90 % of classes 0–4 and 10 % of classes 5–9, in both parts as in the paper;
            ``"train"`` leaves the test part whole.
        image_size: Side in pixels, or height and width (only parquet can be resized).
        seed: Of the thinning.
        pack: Leave the images in a packed file, even if they fit into memory (only parquet).
        options: None are known.

    Returns:
        Images (N, 3, H, W).

    Raises:
        FairlineError: The files are missing or not what they should be.
    """
    refuse_unknown("cifar10", options, task)
    unbalanced = require_unbalanced(unbalanced, "cifar10")
    size, seed = parse_size(image_size, "cifar10"), require_whole(seed, "seed", "cifar10")
    path = require_root(root, "cifar10")
    folder = path / "cifar-10-batches-py" if (path / "cifar-10-batches-py").is_dir() else path
    if (folder / "test_batch").exists():
        content = _from_batches(folder, size)
    else:
        batches = "cifar-10-batches-py/test_batch"
        content = read_parquet("cifar10", path, {_LABEL: CLASSES}, size, pack=pack, instead=batches)
    return unbalanced_halves(by_class("cifar10", content, _LABEL, CLASSES), unbalanced, seed)


def _from_batches(folder: Path, size: Size | None) -> Content:
    if size not in (None, (32, 32)):
        raise FairlineError("The CIFAR-10 batches are 32×32; image_size cannot be changed for them.")
    images, labels = zip(*(_read_batch(folder / name) for name in (*_TRAIN_BATCHES, "test_batch")), strict=True)
    test = torch.zeros(sum(map(len, labels)), dtype=torch.bool)
    test[-len(labels[-1]) :] = True
    return Content(torch.cat(images), {_LABEL: torch.cat(labels)}, test)


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
