"""Classes in the order of a network's outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fairline._io import reading
from fairline.data._names import clean_name
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError


def read_classes(path: str | Path) -> list[str]:
    """Read the names of classes in the order of a network's outputs.

    Args:
        path: A text file with a name a line, or a JSON list.

    Returns:
        The names, without spaces around them.

    Raises:
        FairlineError: The file cannot be read, is neither, holds none, or has one twice.
    """
    with reading(path):
        content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
        listed = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.splitlines()
    except ValueError:
        raise FairlineError(f"{path} is neither a text with a class a line nor a JSON list.") from None
    if not isinstance(listed, list) or not all(isinstance(name, str | int) for name in listed):
        raise FairlineError(f"{path} is not a list of names; write a class a line, in the order of the outputs.")
    names = [name for name in (clean_name(str(name)) for name in listed) if name]
    if not names:
        raise FairlineError(f"{path} names no class.")
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise FairlineError(f"{path} names the class '{twice}' twice.")
    return names


def ordered(data: GroupedData, classes: Sequence[str]) -> GroupedData:
    """The data with their classes in another order; groups that are classes go with them.

    Args:
        data: The data.
        classes: All their classes.

    Returns:
        The data, whose label i stands for ``classes[i]``.

    Raises:
        FairlineError: A name is not one of the data's classes, or one of those is missing; the sentence names it.

    >>> images = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    >>> data = GroupedData(images, torch.tensor([0, 1]), torch.tensor([0, 1]), ("cat", "dog"), ("cat", "dog"))
    >>> ordered(data, ["dog", "cat"]).labels.tolist()
    [1, 0]
    """
    if not isinstance(classes, Sequence) or isinstance(classes, str):
        raise FairlineError(f"Data '{data.name}': classes are a list of names, not '{classes}'.")
    names = tuple(clean_name(str(name)) for name in classes)
    known = ", ".join(data.class_names)
    for name in names:
        if name not in data.class_names:
            raise FairlineError(f"{data.name} has no class '{name}', which the order of classes names; it has {known}.")
    for name in data.class_names:
        if name not in names:
            raise FairlineError(
                f"The order of classes lacks '{name}', which {data.name} has; it names {', '.join(names)}."
            )
    if len(names) > len(set(names)):
        raise FairlineError(f"The order of classes has a name twice: {', '.join(names)}.")
    place = torch.tensor([names.index(name) for name in data.class_names], device=data.device)
    changed = replace(data, labels=place[data.labels], class_names=names)
    return replace(changed, groups=changed.labels, group_names=names) if data.groups_are_classes else changed
