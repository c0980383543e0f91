"""GroupedData: images with a label and a group each, in memory or in a file, the only thing that leaves ``data``."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairline._io import json_digest
from fairline.data._fetch import chosen_images, fetch, image_digests, placed, read_images
from fairline.data._groups import Groups, cells_of
from fairline.data._items import read_item, read_items
from fairline.data._metadata import described, read_metadata, write_metadata
from fairline.data._names import clean_name
from fairline.data._packed import Images, PackedFile, PackedImages, derived, image_digest
from fairline.data._packing import InMemory, Packing, packing
from fairline.data._split import deal_together, tells_whose, tied
from fairline.data.memory import fits, images_at_once
from fairline.errors import FairlineError

logger = logging.getLogger(__name__)

Index = np.ndarray[Any, np.dtype[np.int64]]

#: Data and columns whose parting was told of.
_told: set[tuple[str, str]] = set()

#: Fewer images of a group than these cannot be judged: a 95 % interval of their accuracy spans about ±18 points.
TOO_SMALL = 30

#: So many of them are named.
_NAMED = 10

#: Row that stands for all groups together in every table.
OVERALL = "overall"
#: Row that stands for the group with the lowest accuracy, whichever it is.
WORST = "worst group"


@dataclass(frozen=True)
class Skipped:
    """A file that could not be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True, eq=False)
class GroupedData:
    """Labelled images whose every sample belongs to one group.

    Attributes:
        images: uint8, (N, C, H, W): a tensor, or, of data larger than memory, images in a file, which indexing reads.
        labels: int64, (N,), in ``range(len(class_names))``.
        groups: int64, (N,), in ``range(len(group_names))``.
        class_names: Name of each class.
        group_names: Name of each group.
        name: What the data are called in tables and reports.
        mean: Mean of each channel in [0, 1]; :meth:`split` sets it from the training part.
        std: Standard deviation of each channel, likewise.
        flip: Whether a mirrored image keeps its label (digits do not).
        official_test: bool, (N,): the samples of a fixed, published test split, if there is one.
        skipped: Files that could not be used.
        metadata: A row an image, in their order: what else is known of it, such as its file name. A table, or a mapping
            of arrays; by default the number of the image, ``row``.
        bins: Of columns of numbers, for where :meth:`regroup` is asked for a column alone: ``{"age": "0-17,18+"}``.
        keep_together: The column of ``metadata`` whose values no split may part, such as the patient.

    Raises:
        FairlineError: Shapes, types or index ranges do not fit together.
    """

    images: Images
    labels: Tensor
    groups: Tensor
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]
    name: str = "data"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = True
    official_test: Tensor | None = None
    skipped: tuple[Skipped, ...] = ()
    metadata: pd.DataFrame = field(default_factory=pd.DataFrame)
    bins: Mapping[str, str] = field(default_factory=dict)
    keep_together: str | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        for names_of in ("class_names", "group_names"):
            object.__setattr__(self, names_of, tuple(clean_name(str(name)) for name in getattr(self, names_of)))
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise FairlineError(
                f"{self.name}: images must be uint8 of shape (N, C, H, W), "
                f"not {self.images.dtype} of shape {tuple(self.images.shape)}."
            )
        n = len(self.images)
        if n == 0:
            raise FairlineError(f"{self.name}: there is no usable image.")
        for what, index, names in (
            ("labels", self.labels, self.class_names),
            ("groups", self.groups, self.group_names),
        ):
            if index.dtype != torch.int64 or index.shape != (n,):
                raise FairlineError(
                    f"{self.name}: {what} must be int64 of shape ({n},), "
                    f"not {index.dtype} of shape {tuple(index.shape)}."
                )
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= len(names):
                raise FairlineError(f"{self.name}: {what} run from {low} to {high}, but there are {len(names)} names.")
            if "" in names:
                raise FairlineError(f"{self.name}: the name of number {names.index('')} of the {what} is empty.")
            if len(set(names)) != len(names):
                raise FairlineError(f"{self.name}: {what} have a name twice: {', '.join(names)}.")
        for reserved in (OVERALL, WORST):
            if reserved in self.group_names:
                raise FairlineError(f"{self.name}: a group cannot be called '{reserved}', a row of every table.")
        if self.official_test is not None and self.official_test.shape != (n,):
            raise FairlineError(f"{self.name}: official_test must have shape ({n},).")
        object.__setattr__(self, "metadata", described(self.metadata, n, self.name))
        if self.keep_together is not None:
            self._require_column(self.keep_together)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return len(self.group_names)

    @property
    def device(self) -> torch.device:
        """Where labels, groups and normalised images are; images may stay in memory or in a file."""
        return self.labels.device

    @property
    def groups_are_classes(self) -> bool:
        """Whether every sample's group is its label."""
        return self.class_names == self.group_names and torch.equal(self.labels, self.groups)

    def to(self, device: str | torch.device) -> GroupedData:
        """The same data on ``device``, but for images that would take too much of an accelerator's memory.

        Args:
            device: Where to.

        Returns:
            The data; images that stay come in batches (:meth:`batches`).
        """
        device = torch.device(device)
        return replace(
            self,
            images=placed(self.images, device),
            labels=self.labels.to(device),
            groups=self.groups.to(device),
            official_test=None if self.official_test is None else self.official_test.to(device),
        )

    def select(self, index: Tensor) -> GroupedData:
        """The samples at ``index`` (int64 or bool, (n,)); images in a file are not read."""
        chosen = chosen_images(self.images, index)
        index = index.to(self.device)
        return replace(
            self,
            images=chosen,
            labels=self.labels[index],
            groups=self.groups[index],
            official_test=None if self.official_test is None else self.official_test[index],
            metadata=self.metadata.iloc[index.cpu().numpy()],
        )

    def regroup(self, groups: Groups) -> GroupedData:
        """The same images in other groups.

        Args:
            groups: A column of ``metadata`` (``"race"``), bins of a number (``"age:0-17,18-64,65+"``), or several of
                them, which are intersected: ``"sex,age:0-17,18-64,65+"``, or a list. ``label`` is the class, where no
                column is called so.

        Returns:
            The data in groups such as ``female × 65+``; intersections without an image are left out, and images without
            a value are in the group ``no COLUMN``.

        Raises:
            FairlineError: A column is unknown, bins overlap or leave a number out, or there are more than 100 groups.

        >>> images = torch.zeros(4, 1, 1, 1, dtype=torch.uint8)
        >>> table = {"age": [70, 30, 8, 9], "sex": ["f", "m", "m", "f"]}
        >>> data = GroupedData(images, torch.arange(4) % 2, torch.arange(4) % 2, ("a", "b"), ("a", "b"), metadata=table)
        >>> data.regroup("sex,age:0-17,18+").group_names
        ('f × 0–17', 'f × 18+', 'm × 0–17', 'm × 18+')
        """
        return regrouped({"all": self}, groups)["all"]

    def without_empty_groups(self) -> GroupedData:
        """The same data without the names of groups that have no image."""
        there, index = torch.unique(self.groups, return_inverse=True)
        return replace(self, groups=index, group_names=tuple(self.group_names[place] for place in there.tolist()))

    def sample_by_group(self, samples: int, seed: int = 0) -> list[Tensor]:
        """Positions of up to ``samples`` random samples of each group, int64, (≤ samples,) a group."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self.device)
        return [order[self.groups[order] == group][:samples] for group in range(self.num_groups)]

    def counts(self, by: Literal["group", "class"] = "group") -> pd.DataFrame:
        """How many samples each group has.

        Args:
            by: ``"group"`` for size and share; ``"class"`` for one column a class.

        Returns:
            Indexed by group name: ``n`` and ``share_percent``, or one count a class.
        """
        index = pd.Index(self.group_names, name="group")
        if by == "class":
            cells = torch.bincount(
                self.groups * self.num_classes + self.labels, minlength=self.num_groups * self.num_classes
            )
            table = cells.view(self.num_groups, self.num_classes).cpu().numpy()
            return pd.DataFrame(table, index=index, columns=list(self.class_names))
        n = torch.bincount(self.groups, minlength=self.num_groups).cpu().numpy()
        return pd.DataFrame({"n": n, "share_percent": 100 * n / n.sum()}, index=index)

    def require_groups(self, purpose: str) -> None:
        """Refuse data in which a named group has no sample.

        Raises:
            FairlineError: Names the empty groups.
        """
        n = self.counts()["n"]
        empty = [str(group) for group in n.index[n == 0]]
        if empty:
            raise FairlineError(f"{self.name}: {purpose} needs every group, but {_listed(empty)} no image.")

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of these images unless :meth:`split` has set them."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        return self._own_normalization

    @cached_property
    def _own_normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, std = derived(self.images, "normalization", self._measured_normalization)
        return tuple(mean), tuple(std)

    def _measured_normalization(self) -> tuple[list[float], list[float]]:
        channels = self.images.shape[1]
        total = torch.zeros(channels, dtype=torch.float64, device=self.images.device)
        squares = torch.zeros_like(total)
        height, width = self.images.shape[2:]
        # Of small images as many as ever: the sums' last bits depend on it.
        step = 4096 if height * width <= 64 * 64 else images_at_once(512, self.images.shape)
        for chunk in self.images.split(step):
            values = chunk.double().div_(255)
            total += values.sum((0, 2, 3))
            squares += values.square_().sum((0, 2, 3))
        count = self.images.numel() / channels
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        # A constant channel has no spread to divide by.
        std = torch.where(std > 1e-3, std, 1.0)
        return mean.tolist(), std.tolist()

    def normalized(self, index: Tensor | slice | None = None) -> Tensor:
        """The images as a network sees them.

        Args:
            index: Which samples; all by default.

        Returns:
            float32, (n, C, H, W): ``(image / 255 − mean) / std`` a channel.
        """
        return self._normalized(read_images(self.images, slice(None) if index is None else index).to(self.device))

    def _normalized(self, images: Tensor) -> Tensor:
        mean, std = self.normalization()
        scale = torch.tensor([1 / (255 * s) for s in std], device=self.device).view(1, -1, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=self.device)
        return torch.addcmul(shift.view(1, -1, 1, 1), images.float(), scale)

    def batches(self, order: Tensor, sizes: int | list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples in batches. Of images that lie elsewhere the next batch is fetched while one is used.

        Args:
            order: Positions of the samples, int64, (n,).
            sizes: Of the batches, or of each but the last.

        Yields:
            Positions (B,) and normalised images (B, C, H, W) of a batch, on the device of the data.
        """
        fetched = fetch(self.images, order.to(self.images.device).split(sizes), self.device)
        for index, images in zip(order.to(self.device).split(sizes), fetched, strict=True):
            yield index, self._normalized(images)

    def content_ids(self) -> Tensor:
        """One number an image, equal where the images are byte-identical; int64, (N,)."""
        digests = image_digests(self.images)
        return torch.from_numpy(np.unique(digests, return_inverse=True)[1].reshape(-1).astype(np.int64))

    def split(
        self, seed: int = 0, *, val: float = 0.1, test: float = 0.2, keep_together: str | None = None
    ) -> tuple[GroupedData, GroupedData, GroupedData]:
        """Split into training, validation and test parts.

        Every group is split in the same proportions, and within it every class as nearly as whole images
        allow. Byte-identical images stay in one part, and so do images that share a value of the column
        ``keep_together``, for which proportions are as near as the values allow. Where the data have an official test
        split, it is the test part, and training images that it also holds, or whose value it holds, are dropped.

        Args:
            seed: Of the shuffle.
            val: Share of what is not test that becomes the validation part.
            test: Share that becomes the test part, where no official one exists.
            keep_together: A column of ``metadata``, such as the patient; the data's own by default.

        Returns:
            Training, validation and test part, all normalised by the training part's mean and deviation.

        Raises:
            FairlineError: A group is too small to have an image in every part, or a class has none in the training
                part.

        >>> images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
        >>> data = GroupedData(images, torch.arange(40) % 2, torch.arange(40) // 30, ("a", "b"), ("many", "few"))
        >>> [part.counts()["n"].tolist() for part in data.split(seed=0, val=0.25, test=0.2)]
        [[18, 6], [6, 2], [6, 2]]
        """
        if not (0 < val < 1 and 0 < test < 1):
            raise FairlineError(f"Split shares must lie between 0 and 1, not val={val}, test={test}.")
        self.require_groups("a split")
        column = keep_together or self.keep_together
        content = self._units(column)
        deal = partial(self._deal, content=content, rng=np.random.default_rng(seed), together=column)
        if self.official_test is not None:
            in_test = self.official_test.cpu().numpy()
            leaked = ~in_test & np.isin(content, content[in_test])
            if leaked.any():
                level = logging.INFO if column is None else logging.WARNING
                shared = "are" if column is None else f"are, or share their '{column}' with images that are,"
                logger.log(
                    level, "%s: %d training images %s also in the test part; dropped", self.name, leaked.sum(), shared
                )
            parts = [np.flatnonzero(in_test), *deal(np.flatnonzero(~in_test & ~leaked), shares=[val])]
        else:
            parts = deal(np.arange(len(self)), shares=[test, (1 - test) * val])
        test_index, val_index, train_index = (torch.from_numpy(np.sort(part)) for part in parts)
        train = self.select(train_index)
        self._require_learnable(train)
        mean, std = train.normalization()

        def part(index: Tensor, label: str) -> GroupedData:
            chosen = replace(self.select(index), mean=mean, std=std, official_test=None)
            chosen.require_groups(f"the {label} part")
            return chosen

        return part(train_index, "training"), part(val_index, "validation"), part(test_index, "test")

    def _require_learnable(self, train: GroupedData) -> None:
        """Refuse a split whose training part lacks a class that the other parts have."""
        everywhere, learned = (torch.bincount(part.labels, minlength=self.num_classes) for part in (self, train))
        for label in torch.nonzero((everywhere > 0) & (learned == 0)).flatten().tolist():
            raise FairlineError(
                f"{self.name}: class '{self.class_names[label]}' has {int(everywhere[label])} images, but none in the "
                "training part; leave it out, or split with another seed."
            )

    def _units(self, column: str | None) -> Index:
        """One number an image, equal where no split may part them."""
        content: Index = self.content_ids().numpy()
        if column is not None:
            self._require_column(column)
            return tied(content, self.metadata[column], f"{self.name}: column '{column}'")
        whose = tells_whose(self.metadata)
        if whose is not None and (self.name, whose) not in _told:
            _told.add((self.name, whose))
            logger.warning(
                "%s: column '%s' looks like the name of a patient or lesion, whose images the split parts; "
                "keep_together='%s' (--keep-together) keeps them in one part",
                self.name,
                whose,
                whose,
            )
        return content

    def _require_column(self, column: str) -> None:
        if column not in self.metadata.columns:
            known = ", ".join(self.metadata.columns)
            raise FairlineError(f"{self.name} has no column '{column}' to keep together; it has {known}.")

    def _deal(
        self, samples: Index, content: Index, shares: Sequence[float], rng: np.random.Generator, together: str | None
    ) -> list[Index]:
        """Deal samples into ``len(shares) + 1`` parts, the last taking the rest; equal content stays together."""
        labels, groups = self.labels.cpu().numpy(), self.groups.cpu().numpy()
        _, first, unit, size = np.unique(content[samples], return_index=True, return_inverse=True, return_counts=True)
        unit = unit.reshape(-1)
        if together is not None:
            self._require_enough(unit, groups[samples], len(shares) + 1, together)
            rest = 1 - sum(shares)
            dealt = deal_together(unit, groups[samples], labels[samples], [*shares, rest], rng)[unit]
            return [samples[dealt == part] for part in range(len(shares) + 1)]
        unit_label, unit_group = labels[samples[first]], groups[samples[first]]
        part_of_unit = np.empty(len(first), dtype=np.int64)
        for group in range(self.num_groups):
            members = rng.permutation(np.flatnonzero(unit_group == group))
            if len(members) <= len(shares):
                raise FairlineError(
                    f"{self.name}: group '{self.group_names[group]}' has {len(members)} distinct images"
                    + ("" if self.official_test is None else " outside of the official test part")
                    + f", too few for {len(shares) + 1} parts."
                )
            # Ordering by relative rank within the class deals every class evenly (systematic sampling).
            key = np.empty(len(members))
            for label in np.unique(unit_label[members]):
                same = np.flatnonzero(unit_label[members] == label)
                key[same] = (np.arange(len(same)) + rng.random()) / len(same)
            members = members[np.argsort(key, kind="stable")]
            filled = np.cumsum(size[members])
            start = 0
            for part in range(len(shares)):
                quota = sum(shares[: part + 1]) * filled[-1]
                stop = int(np.searchsorted(filled, quota + 0.5, side="right"))
                stop = min(max(stop, start + 1), len(members) - (len(shares) - part))
                part_of_unit[members[start:stop]] = part
                start = stop
            part_of_unit[members[start:]] = len(shares)
        assigned = part_of_unit[unit]
        return [samples[assigned == part] for part in range(len(shares) + 1)]

    def _require_enough(self, unit: Index, groups: Index, parts: int, together: str) -> None:
        """Refuse to deal units of which too few have an image of a group."""
        units = np.bincount(np.unique(np.stack([unit, groups]), axis=1)[1], minlength=self.num_groups)
        for group in np.flatnonzero(units < parts).tolist():
            raise FairlineError(
                f"{self.name}: group '{self.group_names[group]}' has images of {units[group]} different '{together}', "
                f"which are kept together, too few for {parts} parts."
            )

    def unbalance(
        self, fractions: Mapping[str | int, float], seed: int = 0, *, part: Literal["all", "train"] = "all"
    ) -> GroupedData:
        """Keep a random fraction of some classes, as the paper does for CIFAR-10 (Section 5).

        Args:
            fractions: Fraction to keep, by class name or index; a class not named stays whole.
            seed: Of the choice.
            part: ``"train"`` leaves an official test split whole.

        Returns:
            The thinned data, in the original order.

        Raises:
            FairlineError: A class does not exist, or a fraction is not in [0, 1].
        """
        generator = torch.Generator().manual_seed(seed)
        labels = self.labels.cpu()
        keep = torch.ones(len(self), dtype=torch.bool)
        thinned = torch.ones_like(keep)
        if part == "train" and self.official_test is not None:
            thinned = ~self.official_test.cpu()
        tests = torch.zeros_like(keep) if self.official_test is None else self.official_test.cpu()
        for key, fraction in fractions.items():
            label = self._class_index(key)
            if not 0 <= fraction <= 1:
                raise FairlineError(f"{self.name}: fraction {fraction} of class '{key}' is not in [0, 1].")
            # The official parts are thinned apart, so that each keeps the fraction exactly.
            for side in (~tests, tests):
                members = torch.nonzero((labels == label) & thinned & side).squeeze(1)
                order = torch.randperm(len(members), generator=generator)
                keep[members[order[round(fraction * len(members)) :]]] = False
        return self.select(torch.nonzero(keep).squeeze(1))

    def _class_index(self, key: str | int) -> int:
        if isinstance(key, str) and key in self.class_names:
            return self.class_names.index(key)
        if isinstance(key, int) and 0 <= key < self.num_classes:
            return key
        raise FairlineError(f"{self.name}: there is no class {key!r}; the classes are {', '.join(self.class_names)}.")

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        class_names: Sequence[str] | None = None,
        group_names: Sequence[str] | None = None,
        name: str = "dataset",
        flip: bool = True,
        pack: str | Path | None = None,
        metadata: pd.DataFrame | Mapping[str, Any] | None = None,
    ) -> GroupedData:
        """Read a map-style ``torch.utils.data.Dataset`` of ``(image, label)`` or ``(image, label, group)``.

        Args:
            dataset: Images may be PIL images (of which grey ones have one channel, others three; read as
                :mod:`fairline.data.decoding` tells), uint8 tensors or arrays, or float tensors in [0, 1]; tensors are
                (C, H, W), arrays (H, W) or (H, W, C). Labels are whole numbers (also 1.0), names or one-hot vectors,
                and groups likewise. Without a group, the label is the group.
            class_names: Names by label; by default ``"0"``, ``"1"``, …, or the labels themselves, sorted, if they
                are names.
            group_names: Names by group, likewise.
            name: What to call the data.
            flip: Whether a mirrored image keeps its label.
            pack: A folder to keep the images in, for data larger than memory. An interrupted call goes on, and the next
                one finds it whole, if name, names, number of items and the first image are the same.
            metadata: What else is known of each item; a row an item, in their order.

        Returns:
            The data, in memory or packed.

        Raises:
            FairlineError: An item is not of this form, images differ in shape, or they cannot be packed.

        >>> pixels = np.zeros((8, 8, 3), np.uint8)
        >>> data = GroupedData.from_dataset([(pixels, "cat", 1), (pixels, "bird", 0)], group_names=["dark", "light"])
        >>> data.class_names, data.labels.tolist(), data.counts()["n"].to_dict()
        (('bird', 'cat'), [1, 0], {'dark': 1, 'light': 1})
        """
        if len(dataset) == 0:
            raise FairlineError(f"{name}: the data set is empty.")
        first = read_item(dataset, 0, name).pixels
        channels, height, width = first.shape
        size = len(dataset) * first.nbytes
        if pack is None and not fits(size, torch.device("cpu")):
            logger.warning("%s: from_dataset(pack=FOLDER) keeps the images in a file instead of in memory", name)
        table = described(metadata, len(dataset), name)
        key = json_digest([name, len(dataset), str(class_names), str(group_names), flip, image_digest(first).hex()])
        with nullcontext(InMemory()) if pack is None else packing(Path(pack), key, size) as place:
            if isinstance(place, Packing) and place.whole is not None:
                write_metadata(place.whole.folder, table)
                return cls._from_packed(place.whole)
            read = read_items(dataset, place, name, class_names, group_names)
            # Names and indices are checked before the images are taken for whole.
            nothing = torch.empty((len(dataset), *first.shape), dtype=torch.uint8, device="meta")
            data = cls(nothing, *read, name=name, flip=flip, metadata=table)
            images = place.finish((channels, height, width), *data._description())
            if isinstance(images, PackedImages):
                write_metadata(images.file.folder, table)
            return replace(data, images=images)

    def pack(self, folder: str | Path) -> GroupedData:
        """The same data with the images in a packed folder, from which ``load("packed", root=folder)`` reads them all.

        Args:
            folder: New, half-packed with the same data, or packed with them.

        Returns:
            The data; images are read from the folder when they are asked for.

        Raises:
            FairlineError: The folder holds other data, or there is no room.
        """
        header, tensors = self._description()
        key = content_digest(self, start=json.dumps(header))
        # No part of the key, so that folders packed without them are taken.
        since = {"bins": dict(self.bins), "keep_together": self.keep_together}
        header["data"] |= {name: value for name, value in since.items() if value}
        with packing(Path(folder), key, self.images.numel()) as place:
            if place.whole is None:
                step = images_at_once(4096, self.images.shape)
                for begin in range(len(place.items), len(self), step):
                    for image in self.images[begin : begin + step].cpu().numpy():
                        place.add(image)
                _, channels, height, width = self.images.shape
                place.finish((channels, height, width), header, tensors)
            write_metadata(Path(folder), self.metadata)
        return self.from_packed(folder)

    @classmethod
    def from_packed(cls, folder: str | Path) -> GroupedData:
        """The data that :meth:`pack` or :meth:`from_dataset` packed, where the folder is now.

        Args:
            folder: The packed folder.

        Returns:
            The data; images are read when they are asked for.

        Raises:
            FairlineError: There are none, or they are damaged.
        """
        return cls._from_packed(PackedFile(folder))

    @classmethod
    def _from_packed(cls, file: PackedFile) -> GroupedData:
        fields = file.header.get("data")
        if fields is None:
            raise FairlineError(f"{file.folder} holds images only; load the data set that they were decoded from.")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        fields["skipped"] = tuple(Skipped(*item) for item in fields["skipped"])
        return cls(
            PackedImages(file),
            file.tensors["labels"],
            file.tensors["groups"],
            official_test=file.tensors.get("official_test"),
            metadata=read_metadata(file.folder, file.shape[0]),
            **fields,
        )

    def _columns(self) -> pd.DataFrame:
        """What groups can be made of."""
        if "label" in self.metadata.columns:
            return self.metadata
        classes = pd.Categorical.from_codes(self.labels.cpu().numpy(), list(self.class_names))
        return self.metadata.assign(label=classes)

    def _description(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All but the images, as plain JSON and tensors."""
        fields = {name: getattr(self, name) for name in ("class_names", "group_names", "name", "mean", "std", "flip")}
        skipped = [[item.file, item.reason] for item in self.skipped]
        tensors = {"labels": self.labels, "groups": self.groups}
        if self.official_test is not None:
            tensors["official_test"] = self.official_test
        return {"data": {**fields, "skipped": skipped}}, tensors


def regrouped(parts: Mapping[str, GroupedData], groups: Groups) -> dict[str, GroupedData]:
    """Parts of one data set in other groups, the same in all of them; see :meth:`GroupedData.regroup`.

    Args:
        parts: By name.
        groups: What makes the groups.

    Returns:
        The parts; a group may have no image in one of them.

    Raises:
        FairlineError: As of :meth:`GroupedData.regroup`.
    """
    first = next(iter(parts.values()))
    table = pd.concat([part._columns() for part in parts.values()], ignore_index=True)
    cells = cells_of(table, groups, first.name, first.bins)
    ends = np.cumsum([len(part) for part in parts.values()])
    index = np.split(cells.index, ends[:-1])
    return {
        name: replace(part, groups=torch.from_numpy(own.copy()).to(part.device), group_names=cells.names)
        for (name, part), own in zip(parts.items(), index, strict=True)
    }


def too_few(sizes: Mapping[str, float] | pd.Series[Any], part: str, quotes: str = "''") -> str:
    """Which groups have too few images to be judged, in words.

    Args:
        sizes: Images of each group, by name.
        part: That they are in: ``train``, ``val`` or ``test``.
        quotes: Around a name.

    Returns:
        A sentence without its full stop, of the first ten; empty where every group has enough.

    >>> too_few({"many": 900, "few": 20}, "val")
    "Fewer than 30 images in the validation part, too few to judge: 'few' (20)"
    """
    named = [f"{quotes[0]}{name}{quotes[1]} ({int(n)})" for name, n in sizes.items() if n < TOO_SMALL]
    if not named:
        return ""
    where = {"train": "training", "val": "validation"}.get(part, part)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"Fewer than {TOO_SMALL} images in the {where} part, too few to judge: {', '.join(named[:_NAMED])}{more}"


def content_digest(*parts: GroupedData, start: str = "") -> str:
    """Digest of images, labels and groups of data, in their order.

    Args:
        parts: One after the other.
        start: What else goes into the digest, before them.

    Returns:
        32 hexadecimal digits.
    """

    def compute() -> str:
        content = hashlib.blake2b(start.encode(), digest_size=16)
        for part in parts:
            for chunk in part.images.split(images_at_once(4096, part.images.shape)):
                content.update(chunk.cpu().contiguous().numpy().data)
            for index in (part.labels, part.groups):
                content.update(index.cpu().numpy().tobytes())
        return content.hexdigest()

    packed = [part.images for part in parts if isinstance(part.images, PackedImages)]
    if len(packed) < len(parts):
        return compute()
    known = hashlib.blake2b(start.encode(), digest_size=16)
    for part, images in zip(parts, packed, strict=True):
        for content in (images.key.encode(), part.labels.cpu().numpy().tobytes(), part.groups.cpu().numpy().tobytes()):
            known.update(content)
    digest: str = derived(packed[0], f"digest of {known.hexdigest()}", compute)
    return digest


def _listed(names: Sequence[str]) -> str:
    """``'a', 'b' have`` or ``'a' has``."""
    return ", ".join(f"'{name}'" for name in names) + (" has" if len(names) == 1 else " have")
