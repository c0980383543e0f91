"""Tiny ImageNet (Stanford CS 231N): 200 classes of ImageNet at 64×64, from the official folder or its zip."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from fairline._io import reading
from fairline.data._images import Source, Undecoded, decode
from fairline.data._options import parse_size, refuse_unknown, require_root, require_whole
from fairline.data._parts import Content, by_class, require_unbalanced, unbalanced_halves
from fairline.data._tables import FILE_NAME
from fairline.data.decoding import UnusableImage, first_line
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

_FOLDER, _ARCHIVE = "tiny-imagenet-200", "tiny-imagenet-200.zip"
_WNIDS, _WORDS, _ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
_SUFFIXES = (".jpeg", ".jpg")

#: What zipfile raises for a damaged, encrypted or strangely compressed file in a zip.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


def load(
    root: str | Path | None = None,
    *,
    task: str | None = None,
    unbalanced: bool | str = False,
    image_size: int | tuple[int, int] | str | None = 64,
    seed: int = 0,
    pack: bool = False,
    **options: Any,
) -> GroupedData:
    """Load Tiny ImageNet, one group a class. The official validation part is the test part: the test labels are secret.

    Args:
        root: The folder ``tiny-imagenet-200`` or its zip, or what holds one of them.
        task: None; there is one task.
        unbalanced: Keep 90 % of the first half of the classes and 10 % of the second, in both parts;
            ``"train"`` leaves the test part whole.
        image_size: Side in pixels, or height and width.
        seed: Of the thinning.
        pack: Leave the images in a packed file, even if they fit into memory.
        options: None are known.

    Returns:
        Images (N, 3, H, W), grey ones as RGB; classes in the order of their WordNet numbers, as folders are commonly
        numbered, called by their first word; the column ``wnid`` as metadata.

    Raises:
        FairlineError: A file is missing or not what it should be.
    """
    refuse_unknown("tiny_imagenet", options, task)
    unbalanced = require_unbalanced(unbalanced, "tiny_imagenet")
    size, seed = parse_size(image_size, "tiny_imagenet"), require_whole(seed, "seed", "tiny_imagenet")
    with _opened(require_root(root, "tiny_imagenet")) as place:
        wnids = _wnids(place)
        names = _class_names(place, wnids)
        listed = _listed(place, wnids)
        files = [name for name, _, _ in listed]
        source = Source("tiny_imagenet", place.root, place.decisive(files), None, len(files))
        decoded = decode(place.images(files), size, source, pack=pack)
    kept = [listed[position] for position in decoded.kept]
    content = Content(
        decoded.images,
        {"wnid": torch.tensor([wnids.index(wnid) for _, wnid, _ in kept])},
        torch.tensor([test for _, _, test in kept]),
        tuple(decoded.skipped),
        {FILE_NAME: [name for name, _, _ in kept], "wnid": [wnid for _, wnid, _ in kept]},
    )
    return unbalanced_halves(by_class("tiny_imagenet", content, "wnid", names), unbalanced, seed)


class _Place(Protocol):
    """Where the official files are; names are relative to the folder ``tiny-imagenet-200``."""

    root: Path

    def text(self, name: str) -> str:
        """A text file."""

    def listed(self) -> list[str]:
        """Names of all images of the training and the validation part."""

    def images(self, names: Sequence[str]) -> Iterator[Undecoded]:
        """The images of these names."""

    def decisive(self, names: Sequence[str]) -> list[Path]:
        """Files on disk that hold these images."""


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def text(self, name: str) -> str:
        with reading(self.root / name):
            return _decoded((self.root / name).read_bytes(), self.root / name)

    def listed(self) -> list[str]:
        files = [*(self.root / "train").glob("*/images/*"), *(self.root / "val" / "images").glob("*")]
        return [file.relative_to(self.root).as_posix() for file in files]

    def images(self, names: Sequence[str]) -> Iterator[Undecoded]:
        return (Undecoded(name, self.root / name) for name in names)

    def decisive(self, names: Sequence[str]) -> list[Path]:
        return [self.root / name for name in names]


class _Zip:
    """The zip as it is: nothing is extracted."""

    def __init__(self, file: Path, opened: zipfile.ZipFile, inside: str) -> None:
        self.file, self.root, self.opened, self.inside = file, file, opened, inside

    def text(self, name: str) -> str:
        where = f"{self.file}: {name}"
        try:
            return _decoded(self.opened.read(self.inside + name), where)
        except KeyError:
            raise FairlineError(f"{self.file} holds no {name}.") from None
        except _DAMAGED as error:
            raise FairlineError(f"{where} is damaged ({first_line(error)}).") from None

    def listed(self) -> list[str]:
        names = (name.removeprefix(self.inside) for name in self.opened.namelist() if name.startswith(self.inside))
        return [name for name in names if not name.endswith("/") and "images" in name.split("/")[:-1]]

    def images(self, names: Sequence[str]) -> Iterator[Undecoded]:
        for name in names:
            try:
                yield Undecoded(name, self.opened.read(self.inside + name))
            except KeyError:
                yield Undecoded(name, UnusableImage("file does not exist"))
            except _DAMAGED as error:
                yield Undecoded(name, UnusableImage(f"not a readable image ({first_line(error)})"))

    def decisive(self, names: Sequence[str]) -> list[Path]:
        return [self.file]


@contextmanager
def _opened(path: Path) -> Iterator[_Place]:
    """The folder, or the zip, in or at a path."""
    folders = [] if path.is_file() else [path / _FOLDER, path]
    folder = next((each for each in folders if (each / _WNIDS).exists() or (each / "train").is_dir()), None)
    if folder is not None:
        yield _Folder(folder)
        return
    file = path if path.is_file() else path / _ARCHIVE
    if not file.is_file():
        raise FairlineError(f"{path} holds neither {_FOLDER}/{_WNIDS} nor {_ARCHIVE}.")
    try:
        opened = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError) as error:
        raise FairlineError(f"{file} is not a whole zip file ({first_line(error)}).") from None
    with opened:
        ends = [name for name in opened.namelist() if PurePosixPath(name).name == _WNIDS]
        if not ends:
            raise FairlineError(f"{file} holds no {_WNIDS}.")
        yield _Zip(file, opened, min(ends, key=len).removesuffix(_WNIDS))


def _decoded(raw: bytes, where: str | Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FairlineError(f"{where} is no text ({error.reason}).") from None


def _wnids(place: _Place) -> list[str]:
    """The WordNet numbers of the classes, sorted."""
    wnids = place.text(_WNIDS).split()
    twice = next((wnid for wnid, count in Counter(wnids).items() if count > 1), None)
    if not wnids or twice is not None:
        what = f"names {twice} twice" if wnids else "names no class"
        raise FairlineError(f"{place.root}: {_WNIDS} {what}.")
    return sorted(wnids)


def _listed(place: _Place, wnids: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Name, class and part of every image, training images first, in an order that no file system decides."""
    held = sorted(name for name in place.listed() if name.lower().endswith(_SUFFIXES))
    train: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    for name in held:
        part, wnid, *_ = name.split("/")
        if part == "train" and wnid in train:
            train[wnid].append(name)
    lacking = [wnid for wnid, names in train.items() if not names]
    if lacking:
        raise FairlineError(
            f"{place.root}: {len(lacking)} of {len(wnids)} classes have no training image, first {lacking[0]} "
            f"(train/{lacking[0]}/images)."
        )
    found = [(name, wnid, False) for wnid, names in train.items() for name in sorted(names, key=_by_number)]
    annotated = _annotations(place, wnids)
    unlisted = [name for name in held if name.startswith("val/") and name.rpartition("/")[2] not in annotated]
    if unlisted:
        raise FairlineError(
            f"{place.root}: {_ANNOTATIONS} lacks {len(unlisted)} images of its folder, first {unlisted[0]}."
        )
    test = [(f"val/images/{file}", wnid, True) for file, wnid in annotated.items()]
    if not set(held) & {name for name, _, _ in test}:
        raise FairlineError(f"{place.root}: val/images holds none of the images that {_ANNOTATIONS} names.")
    return found + test


def _annotations(place: _Place, wnids: Sequence[str]) -> dict[str, str]:
    """The class of each image of the official validation part: file, WordNet number and a box, a line each."""
    found: dict[str, str] = {}
    for number, line in enumerate(place.text(_ANNOTATIONS).splitlines(), start=1):
        if not line.strip():
            continue
        cells = line.split("\t")
        where = f"{place.root}: line {number} of {_ANNOTATIONS}"
        if len(cells) != 6 or cells[1] not in wnids:
            raise FairlineError(f"{where} is no file, class and box.")
        if found.setdefault(cells[0], cells[1]) != cells[1]:
            raise FairlineError(f"{where} names {cells[0]} again, with another class.")
    if not found:
        raise FairlineError(f"{place.root}: {_ANNOTATIONS} names no image.")
    return found


def _class_names(place: _Place, wnids: Sequence[str]) -> tuple[str, ...]:
    """The first word of each class; where several classes have it, with their numbers."""
    words = dict(line.split("\t", 1) for line in place.text(_WORDS).splitlines() if "\t" in line)
    lacking = [wnid for wnid in wnids if not words.get(wnid, "").strip()]
    if lacking:
        raise FairlineError(f"{place.root}: {_WORDS} has no word for {lacking[0]} ({len(lacking)} classes in all).")
    first = {wnid: words[wnid].split(",")[0].strip() for wnid in wnids}
    counts = Counter(first.values())
    return tuple(name if counts[name] == 1 else f"{name} ({wnid})" for wnid, name in first.items())


def _by_number(name: str) -> tuple[int, str]:
    """``…_2`` before ``…_10``."""
    number = name.rpartition("_")[2].partition(".")[0]
    return (int(number) if number.isdigit() else -1, name)
