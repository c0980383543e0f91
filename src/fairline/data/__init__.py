"""Data sets with groups. ``load("utkface:race", root=...)`` returns a :class:`GroupedData`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fairline.data._groups import Groups
from fairline.data._order import ordered, read_classes
from fairline.data._packed import PackedImages
from fairline.data._scale import IMAGENET, NORMALIZATIONS, scaled
from fairline.data.grouped import OVERALL, GroupedData, Skipped
from fairline.errors import FairlineError

#: Data set name → module with a ``load(root, *, task, **options)``.
REGISTRY: dict[str, str] = {
    "digits": "fairline.data.digits",
    "utkface": "fairline.data.utkface",
    "cifar10": "fairline.data.cifar10",
    "cifar100": "fairline.data.cifar100",
    "tiny_imagenet": "fairline.data.tiny_imagenet",
    "svhn": "fairline.data.svhn",
    "celeba": "fairline.data.celeba",
    "folder": "fairline.data.folder",
    "packed": "fairline.data.packed",
}

#: Data sets that come with a library and need no folder.
WITHOUT_ROOT = frozenset({"digits"})

#: Files or folders by which a data set is known; image files alone, such as UTKFace's, are not.
_MARKS: dict[str, tuple[str, ...]] = {
    "utkface": ("utkface*.parquet",),
    "cifar10": ("cifar-10-batches-py", "test_batch", "cifar10_test*.parquet"),
    "cifar100": ("cifar-100-binary.tar.gz", "cifar-100-binary", "cifar100_test*.parquet"),
    "tiny_imagenet": ("tiny-imagenet-200", "tiny-imagenet-200.zip", "wnids.txt"),
    "svhn": ("test_32x32.mat",),
    "celeba": ("list_attr_celeba.txt", "celeba/list_attr_celeba.txt"),
    "folder": ("metadata.csv", "metadata.parquet"),
}


def found_in(root: str | Path | None = None) -> list[str]:
    """Data sets that can be loaded here, by what their files are called; they are not opened.

    Args:
        root: Where to look; the environment variable ``FAIRLINE_DATA`` by default.

    Returns:
        Names of :data:`REGISTRY`, those that need no folder first.

    >>> "digits" in found_in("nowhere")
    True
    """
    root = root or os.environ.get("FAIRLINE_DATA")
    path = None if root is None else Path(root).expanduser()
    found = [name for name in REGISTRY if name in WITHOUT_ROOT]
    if path is not None:
        found += [name for name, marks in _MARKS.items() if any(any(path.glob(mark)) for mark in marks)]
    return found


def load(
    name: str,
    root: str | Path | None = None,
    *,
    pack: bool = False,
    classes: Sequence[str] | None = None,
    normalization: str | None = "data",
    mean: Sequence[float] | float | str | None = None,
    std: Sequence[float] | float | str | None = None,
    keep_together: str | None = None,
    **options: Any,
) -> GroupedData:
    """Load a data set by name.

    Images that would take more than a quarter of the memory (the variable ``FAIRLINE_MEMORY_SHARE`` says another share)
    are decoded to a file once and stay there; ``FAIRLINE_PACKED`` names the folder of such files.

    Args:
        name: ``"digits"``, ``"utkface:age"``, ``"utkface:race"``, ``"utkface:gender"``, ``"cifar10"``, ``"cifar100"``,
            ``"cifar100:coarse"``, ``"tiny_imagenet"``, ``"svhn"``, ``"celeba:Smiling"``, ``"folder"`` or ``"packed"``;
            what follows the colon is the task.
        root: Where the files are; the environment variable ``FAIRLINE_DATA`` by default.
        pack: Do so whatever they take.
        classes: All classes, in the order of the labels that they get: that of a trained network's outputs.
        normalization: What a network sees: ``"data"``, pixels normalised by the training part's mean and deviation;
            ``"imagenet"``, by those of ImageNet; ``"none"``, pixels from 0 to 1.
        mean: Of each channel, or one for all, of pixels from 0 to 1; with ``std``, instead of ``normalization``.
        std: Standard deviation, likewise.
        keep_together: The column of the metadata whose values no split may part, such as the patient.
        options: Passed to the data set's own ``load``.

    Returns:
        The whole data set; call :meth:`GroupedData.split` next.

    Raises:
        FairlineError: The name is unknown, an option is empty or of no such form, the files are missing or unusable, or
            there is no room to pack the images.

    >>> load("digits").split(seed=0)[2].counts()["n"].tolist()
    [71, 73, 71, 73, 72, 73, 72, 72, 70, 72]
    """
    family, _, task = name.partition(":")
    if family not in REGISTRY:
        raise FairlineError(f"There is no data set '{name}'; choose one of {', '.join(REGISTRY)}.")
    groups = options.get("groups")
    if not isinstance(groups, str | list | tuple | None):
        # The command line reads a column called 1 as a number.
        options["groups"] = str(groups)
    _require_options(name, {**options, "keep_together": keep_together})
    if pack:
        options["pack"] = True
    module = importlib.import_module(REGISTRY[family])
    data: GroupedData = module.load(root or os.environ.get("FAIRLINE_DATA"), task=task or None, **options)
    data = scaled(data, normalization, mean, std)
    data = data if keep_together is None else replace(data, keep_together=str(keep_together))
    return data if classes is None else ordered(data, classes)


def _require_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that is empty, or that is the task."""
    if "task" in options:
        named = f"{name.partition(':')[0]}:{options['task']}"
        raise FairlineError(f"Data '{name}' take no option 'task'; it stands behind the name: '{named}'.")
    for option, value in options.items():
        texts = value if isinstance(value, list | tuple) else [value]
        if value == [] or any(isinstance(text, str) and not text.strip() for text in texts):
            raise FairlineError(f"Data '{name}': option '{option}' is empty.")


__all__ = [
    "IMAGENET",
    "NORMALIZATIONS",
    "OVERALL",
    "REGISTRY",
    "WITHOUT_ROOT",
    "GroupedData",
    "Groups",
    "PackedImages",
    "Skipped",
    "found_in",
    "load",
    "read_classes",
]
