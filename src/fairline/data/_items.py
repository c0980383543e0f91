"""Items of a map-style data set, ``(image, label)`` or ``(image, label, group)``. No source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairline.data._names import BadCell, class_index, clean_name, encode
from fairline.data._packed import Pixels
from fairline.data._packing import InMemory, Packing
from fairline.errors import FairlineError


class Item(NamedTuple):
    """One item: uint8 pixels (C, H, W), the label, and the group if there is one."""

    pixels: Pixels
    told: list[Any]


class Read(NamedTuple):
    """Labels and groups of all items, int64 (n,), and their names."""

    labels: Tensor
    groups: Tensor
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]


def read_item(dataset: Any, position: int, name: str, shape: tuple[int, ...] | None = None) -> Item:
    """Read one item.

    Args:
        dataset: Map-style.
        position: Of the item.
        name: Of the data, for messages.
        shape: What the image must have; any by default.

    Returns:
        The item.

    Raises:
        FairlineError: It is not of such a form, or its image of another shape.
    """
    # Here, because Pillow may be missing where arrays suffice.
    from fairline.data.decoding import UnusableImage, to_uint8

    item = dataset[position]
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise FairlineError(f"{name}: item {position} is not (image, label) or (image, label, group).")
    try:
        pixels = to_uint8(item[0])
    except UnusableImage as error:
        raise FairlineError(f"{name}: image {position} {error}.") from None
    if shape is not None and tuple(pixels.shape) != shape:
        raise FairlineError(f"{name}: image {position} has shape {tuple(pixels.shape)}, but the first has {shape}.")
    return Item(pixels.numpy(), list(item[1:]))


def read_items(
    dataset: Any,
    place: InMemory | Packing,
    name: str,
    class_names: Sequence[str] | None,
    group_names: Sequence[str] | None,
) -> Read:
    """Read the items that a place does not hold yet, and what labels and groups mean.

    Args:
        dataset: Map-style.
        place: Where images go.
        name: Of the data, for messages.
        class_names: By label, if they are known.
        group_names: By group, likewise.

    Returns:
        Labels and groups.

    Raises:
        FairlineError: An item is not of such a form.
    """
    for position in range(len(place.items), len(dataset)):
        shape = place.items[0].shape if place.items else None
        item = read_item(dataset, position, name, shape)
        place.add(item.pixels, item.told)
    labels = [item.note[0] for item in place.items]
    groups = [group for item in place.items for group in item.note[1:]]
    if groups and len(groups) < len(labels):
        raise FairlineError(f"{name}: only {len(groups)} of the {len(labels)} items have a group.")
    label_index, classes = _indices(labels, class_names, name, "label")
    group_index, by_group = _indices(groups, group_names, name, "group") if groups else (label_index, classes)
    if group_names is None and group_index == label_index:
        by_group = classes
    named = by_group if groups or group_names is None else tuple(group_names)
    return Read(torch.tensor(label_index), torch.tensor(group_index), classes, named)


def _indices(
    values: Sequence[Any], names: Sequence[str] | None, data: str, what: str
) -> tuple[list[int], tuple[str, ...]]:
    """The index that each item's label or group means, and the names."""
    if names is None and all(isinstance(value, str) and clean_name(value) for value in values):
        return encode([clean_name(value) for value in values], f"{data}: the {what}s")
    known = None if names is None else tuple(clean_name(str(name)) for name in names)
    indices = []
    for position, value in enumerate(values):
        try:
            index = class_index(value, known)
        except BadCell as error:
            raise FairlineError(f"{data}: the {what} of item {position} is {error}.") from None
        if index is None:
            raise FairlineError(f"{data}: the {what} of item {position} is missing.")
        indices.append(index)
    return indices, known or tuple(str(index) for index in range(max(indices) + 1))
