"""CIFAR-100 (Krizhevsky 2009), from the official binary files or from parquet: 100 classes in 20 superclasses."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairline._io import reading
from fairline.data._groups import Groups
from fairline.data._options import parse_size, refuse_unknown, require_root, require_whole
from fairline.data._parts import PARTS, Content, by_class, read_parquet, require_unbalanced, unbalanced_halves
from fairline.data.decoding import Size, first_line
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

#: The five classes of each superclass, in the order and under the names of the official files.
SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
#: Names by label: classes are numbered alphabetically, superclasses in the order above.
NAMES = {
    "fine": tuple(sorted(name for names in SUPERCLASSES.values() for name in names)),
    "coarse": tuple(SUPERCLASSES),
}

#: The superclass of each class.
COARSE_OF_FINE = tuple(
    next(place for place, names in enumerate(SUPERCLASSES.values()) if name in names) for name in NAMES["fine"]
)

_FOLDER, _ARCHIVE = "cifar-100-binary", "cifar-100-binary.tar.gz"
_PICKLES = ("cifar-100-python", "cifar-100-python.tar.gz", "meta")
_PIXELS = 3 * 32 * 32
#: A record: the superclass, the class, then red, green and blue, row by row.
_RECORD = 2 + _PIXELS


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    groups: Groups | None = None,
    unbalanced: bool | str = False,
    image_size: int | tuple[int, int] | str | None = 32,
    seed: int = 0,
    pack: bool = False,
    **options: Any,
) -> GroupedData:
    """Load CIFAR-100 with its official test split.

    Args:
        root: A folder with ``cifar-100-binary.tar.gz`` or what is in it (``cifar-100-binary``, or ``train.bin`` and
            ``test.bin`` themselves), or with ``cifar100_train*.parquet`` and ``cifar100_test*.parquet`` as Hugging Face
            has them. The Python version holds pickles, and is not read.
        task: What to predict: ``"fine"``, the 100 classes, by default, or ``"coarse"``, the 20 superclasses.
        groups: What makes the groups: ``"fine"`` or ``"coarse"``; the label by default.
        unbalanced: Keep 90 % of the first half of the labels and 10 % of the second, in both parts;
            ``"train"`` leaves the test part whole.
        image_size: Side in pixels, or height and width (only parquet can be resized).
        seed: Of the thinning.
        pack: Leave the images in a packed file, even if they fit into memory (only parquet).
        options: None are known.

    Returns:
        Images (N, 3, H, W), with the columns ``fine`` and ``coarse`` as metadata.

    Raises:
        FairlineError: The files are missing or not what they should be.
    """
    refuse_unknown("cifar100", options)
    task = task or "fine"
    if task not in NAMES:
        raise FairlineError(f"CIFAR-100 has no task '{task}'; choose fine or coarse.")
    unbalanced = require_unbalanced(unbalanced, "cifar100")
    size, seed = parse_size(image_size, "cifar100"), require_whole(seed, "seed", "cifar100")
    content = _read(require_root(root, "cifar100"), size, pack)
    coded = {
        column: pd.Categorical.from_codes(content.labels[f"{column}_label"].tolist(), list(names))
        for column, names in NAMES.items()
    }
    content = content._replace(metadata={**content.metadata, **coded})
    name = "cifar100" if task == "fine" else f"cifar100:{task}"
    data = by_class(name, content, f"{task}_label", NAMES[task])
    if groups is not None and groups != task:
        named = groups if isinstance(groups, str) else " × ".join(groups)
        data = replace(data.regroup(groups), name=f"{data.name} by {named}")
    return unbalanced_halves(data, unbalanced, seed)


def _read(path: Path, size: Size | None, pack: bool) -> Content:
    """The binary files, wherever they lie, or the parquet tables."""
    archive = path if path.is_file() else path / _ARCHIVE
    folders = [folder for folder in (path / _FOLDER, path) if (folder / "test.bin").exists()]
    if not folders and not archive.is_file():
        if any((path / name).exists() for name in _PICKLES) and not any(path.glob("cifar100_*.parquet")):
            raise FairlineError(f"{path} holds the Python version of CIFAR-100, which is pickled; bring {_ARCHIVE}.")
        names = {f"{column}_label": classes for column, classes in NAMES.items()}
        content = read_parquet("cifar100", path, names, size, pack=pack, instead=f"{_ARCHIVE} nor {_FOLDER}/test.bin")
        _require_superclasses(content.labels, str(path))
        return content
    if size not in (None, (32, 32)):
        raise FairlineError("The binary files of CIFAR-100 are 32×32; image_size cannot be changed for them.")
    if folders:
        read = [_records(_content_of(folders[0] / f"{part}.bin"), folders[0] / f"{part}.bin") for part in PARTS]
    else:
        read = [_records(raw, f"{archive}: {part}.bin") for part, raw in zip(PARTS, _unpacked(archive), strict=True)]
    images, coarse, fine = (torch.cat(parts) for parts in zip(*read, strict=True))
    test = torch.zeros(len(fine), dtype=torch.bool)
    test[len(read[0][2]) :] = True
    return Content(images, {"fine_label": fine, "coarse_label": coarse}, test)


def _content_of(file: Path) -> bytes:
    with reading(file):
        return file.read_bytes()


def _unpacked(archive: Path) -> list[bytes]:
    """The files of both parts; nothing is extracted."""
    try:
        with tarfile.open(archive) as opened:
            held = {Path(member.name).name: member for member in opened.getmembers() if member.isfile()}
            contents = []
            for part in PARTS:
                file = opened.extractfile(held[f"{part}.bin"]) if f"{part}.bin" in held else None
                if file is None:
                    raise FairlineError(f"{archive} holds no {part}.bin; bring the binary version of CIFAR-100.")
                contents.append(file.read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise FairlineError(f"{archive} is not a whole archive ({first_line(error).rstrip(':')}).") from None
    return contents


def _records(raw: bytes, where: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, 32, 32), superclasses (n,) and classes (n,) of one file."""
    if not raw or len(raw) % _RECORD:
        raise FairlineError(f"{where} has {len(raw):,} bytes, which are no whole number of images of {_RECORD:,}.")
    records = np.frombuffer(raw, np.uint8).reshape(-1, _RECORD)
    coarse, fine = (torch.from_numpy(records[:, column].astype(np.int64)) for column in (0, 1))
    _require_superclasses({"fine_label": fine, "coarse_label": coarse}, str(where))
    return torch.from_numpy(records[:, 2:].reshape(-1, 3, 32, 32).copy()), coarse, fine


def _require_superclasses(labels: Mapping[str, Tensor], where: str) -> None:
    """Refuse labels that are none, or whose superclass is another's: then the bytes are not what they should be."""
    fine, coarse = labels["fine_label"], labels["coarse_label"]
    known = torch.tensor([*COARSE_OF_FINE, -1])
    wrong = torch.nonzero(known[fine.clamp_max(len(COARSE_OF_FINE))] != coarse).flatten().tolist()
    if wrong:
        first = wrong[0]
        raise FairlineError(
            f"{where}: image {first + 1:,} has class {int(fine[first])} and superclass {int(coarse[first])}, which do "
            "not belong together."
        )
