"""The size of images that a network brought from elsewhere takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fairline import models
from fairline.data import folder
from fairline.errors import FairlineError
from fairline.inference import logits_of
from fairline.runs import DataSpec, ModelSpec
from fairline.weights import load_weights

logger = logging.getLogger(__name__)

#: Sides of images that networks are commonly trained on.
COMMON = (28, 32, 48, 64, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384)
#: Data sets whose images come in many sizes.
_RESIZED = ("folder", "utkface", "celeba")


def settle_image_size(
    data: DataSpec, model: str, options: Mapping[str, Any] | None, weights: str | Path | None
) -> DataSpec:
    """Data at the size that the user's network takes, where nothing says one.

    The weights decide, if they fit only one common size; else the images of a folder, if they all have one size.

    Args:
        data: Which.
        model: Architecture.
        options: Its options.
        weights: The file, if there is one.

    Returns:
        The data with an ``image_size``; as they are, if the network is one of this package and is trained here.

    Raises:
        FairlineError: Neither decides, or the weights are of another architecture.
    """
    family = data.name.partition(":")[0]
    own = bool(models.files(model)) and family == "folder"
    if family not in _RESIZED or "image_size" in data.options or not (own or weights is not None):
        return data
    if family != "folder":
        raise FairlineError(f"The size of the images that {weights} was trained on must be said: --image-size 64.")
    found = folder.preview(data.root, **data.options)
    fitting = [] if weights is None else _fitting(model, found.num_classes, options or {}, weights)
    if len(fitting) == 1:
        logger.info("images of %d×%d pixels are the only common ones that the weights fit", fitting[0], fitting[0])
        return replace(data, options={**data.options, "image_size": fitting[0]})
    if len(found.sizes) == 1:
        height, width = found.sizes[0]
        logger.info("all images have %d×%d pixels, and stay so", height, width)
        size = height if height == width else [height, width]
        return replace(data, options={**data.options, "image_size": size})
    seen = " and ".join(f"{height}×{width}" for height, width in found.sizes) or "unreadable ones"
    told = "" if weights is None else f", and {weights} fits " + ("several sizes" if fitting else "no common size")
    raise FairlineError(
        f"The images of {data.root} differ in size ({seen}){told}; say which size the network takes: --image-size 64."
    )


def _fitting(model: str, num_classes: int, options: Mapping[str, Any], weights: str | Path) -> list[int]:
    """Common sizes of images that a network with these weights takes, two at most."""
    sides: list[int] = []
    reasons = []
    for side in COMMON:
        try:
            with torch.random.fork_rng():
                network = ModelSpec(model, num_classes, 3, side, options).build()
            load_weights(network, weights)
        except FairlineError as error:
            reasons.append(str(error))
            continue
        images = torch.zeros(1, 3, side, side)
        try:
            with torch.no_grad():
                logits_of(network.eval()(images), network, images)
        except Exception:
            # The user's own forward may raise anything at another size.
            continue
        sides.append(side)
        if len(sides) > 1:
            break
    if len(reasons) == len(COMMON) and len(set(reasons)) == 1:
        raise FairlineError(reasons[0])
    return sides
