"""The scale of pixels that a network was trained on: mean and deviation of each channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

Scale = tuple[tuple[float, ...], tuple[float, ...]]

#: What torchvision's and most other weights for ImageNet were trained with.
IMAGENET: Scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: ``data`` is the training part's own.
NORMALIZATIONS = ("imagenet", "data", "none")


def scaled(data: GroupedData, normalization: str | None = "data", mean: Any = None, std: Any = None) -> GroupedData:
    """The data, normalised as they are told.

    Args:
        data: The data.
        normalization: ``"data"`` for mean and deviation of the training part; ``"imagenet"`` for those of ImageNet;
            ``"none"`` or None for pixels from 0 to 1.
        mean: Of each channel, or one for all, of pixels from 0 to 1; with ``std``, instead of ``normalization``.
        std: Standard deviation, likewise.

    Returns:
        The data; their own statistics are taken, or kept, for ``"data"``.

    Raises:
        FairlineError: They are of no such form, of another number of channels, or said twice.
    """
    channels = data.images.shape[1]
    if mean is not None or std is not None:
        if mean is None or std is None:
            raise FairlineError("Mean and deviation (std) of the pixels belong together; give both, or neither.")
        if normalization != "data":
            raise FairlineError(f"The normalization '{normalization}' and a mean are both given; give one of them.")
        return replace(data, mean=_values(mean, "mean", channels), std=_values(std, "std", channels))
    if normalization == "data":
        return data
    mean, std = scale(normalization, channels)
    return replace(data, mean=mean, std=std)


def scale(normalization: str | None, channels: int) -> Scale:
    """Mean and deviation of a normalization that does not depend on the data.

    Args:
        normalization: ``"imagenet"``, or ``"none"`` or None.
        channels: Of the images.

    Returns:
        Both, a number a channel.

    Raises:
        FairlineError: There is no such normalization, or not for so many channels.
    """
    if normalization in ("none", None):
        return (0.0,) * channels, (1.0,) * channels
    if normalization != "imagenet":
        raise FairlineError(f"The normalization is one of {', '.join(NORMALIZATIONS)}, not '{normalization}'.")
    if channels != len(IMAGENET[0]):
        raise FairlineError(f"ImageNet's normalization is of 3 channels; these images have {channels}.")
    return IMAGENET


def _values(given: Any, what: str, channels: int) -> tuple[float, ...]:
    parts = given.split(",") if isinstance(given, str) else given
    parts = list(parts) if isinstance(parts, Sequence) else [parts]
    try:
        values = [float(part) for part in parts if not isinstance(part, bool)]
    except (TypeError, ValueError):
        values = []
    if not values or len(values) != len(parts) or not all(map(math.isfinite, values)):
        raise FairlineError(f"'{given}' is no {what}: give a number for each channel, such as 0.485,0.456,0.406.")
    if len(values) not in (1, channels):
        raise FairlineError(f"The {what} '{given}' has {len(values)} numbers, but the images have {channels} channels.")
    if any(value < 0 or value > 1 or (what == "std" and value == 0) for value in values):
        lowest = "above 0" if what == "std" else "from 0"
        raise FairlineError(
            f"The {what} '{given}' is of pixels from 0 to 1, so {lowest} to 1; divide by 255 if need be."
        )
    return tuple(values * channels if len(values) == 1 else values)
