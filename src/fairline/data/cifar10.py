"""CIFAR-10 (Krizhevsky 2009), from the official Python batches or from parquet."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairline.data._images import Source, decode
from fairline.data._names import BadCell, class_index
from fairline.data._options import parse_size, refuse_unknown, require_root, require_whole
from fairline.data._packed import Images
from fairline.data._tables import FILE_NAME, ParquetTable, image_column, require_columns
from fairline.data.decoding import Size, UnusableImage
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
    if unbalanced not in (False, True, "train"):
        raise FairlineError(f"Data 'cifar10': unbalanced must be true, false or 'train', not '{unbalanced}'.")
    size, seed = parse_size(image_size, "cifar10"), require_whole(seed, "seed", "cifar10")
    path = require_root(root, "cifar10")
    folder = path / "cifar-10-batches-py" if (path / "cifar-10-batches-py").is_dir() else path
    content = _from_batches(folder, size) if (folder / "test_batch").exists() else _from_parquet(path, size, pack)
    data = GroupedData(
        content.images,
        content.labels,
        content.labels.clone(),
        CLASSES,
        CLASSES,
        name="cifar10",
        official_test=content.test,
        skipped=content.skipped,
        metadata=pd.DataFrame(dict(content.metadata)),
    )
    if unbalanced:
        data = data.unbalance(PAPER_IMBALANCE, seed, part="train" if unbalanced == "train" else "all")
    return data


class _Content(NamedTuple):
    """Images (n, 3, H, W), labels (n,), which are of the test part, bool (n,), and what else is known of them."""

    images: Images
    labels: Tensor
    test: Tensor
    skipped: tuple[Skipped, ...] = ()
    metadata: Mapping[str, Any] = MappingProxyType({})


def _from_batches(folder: Path, size: Size | None) -> _Content:
    if size not in (None, (32, 32)):
        raise FairlineError("The CIFAR-10 batches are 32×32; image_size cannot be changed for them.")
    images, labels = zip(*(_read_batch(folder / name) for name in (*_TRAIN_BATCHES, "test_batch")), strict=True)
    test = torch.zeros(sum(map(len, labels)), dtype=torch.bool)
    test[-len(labels[-1]) :] = True
    return _Content(torch.cat(images), torch.cat(labels), test)


def _from_parquet(path: Path, size: Size | None, pack: bool) -> _Content:
    tables, labels, images, names = [], [], [], []
    for part in ("train", "test"):
        files = sorted(path.glob(f"cifar10_{part}*.parquet")) if path.is_dir() else []
        if not files:
            raise FairlineError(f"{path} holds neither cifar-10-batches-py/test_batch nor cifar10_{part}*.parquet.")
        table = ParquetTable(files, path)
        column = image_column(table)
        require_columns(table, "label")
        tables.append(table)
        labels.append(_labels(table, path))
        images.append(table.images(column))
        names += table.file_names(column)
    everything = [label for part in labels for label in part]
    missing = [position for position, label in enumerate(everything) if label is None]
    undecoded = (
        replace(image, content=UnusableImage("its label is empty")) if label is None else image
        for image, label in zip(chain(*images), everything, strict=True)
    )
    source = Source("cifar10", path, [file for table in tables for file in table.files], missing, len(everything))
    decoded = decode(undecoded, size, source, pack=pack)
    test = torch.tensor([position >= len(labels[0]) for position in decoded.kept])
    kept = torch.tensor([everything[position] for position in decoded.kept])
    metadata = {FILE_NAME: [names[position] for position in decoded.kept]}
    return _Content(decoded.images, kept, test, tuple(decoded.skipped), metadata)


def _labels(table: ParquetTable, path: Path) -> list[int | None]:
    """The label of each row, None where it is missing."""
    labels = []
    for where, cell in table.cells("label"):
        try:
            labels.append(class_index(cell, CLASSES))
        except BadCell as error:
            raise FairlineError(f"{path}: the label in {where} is {error}.") from None
    return labels


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
