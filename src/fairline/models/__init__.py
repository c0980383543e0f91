"""Network architectures. ``build("resnet18", num_classes=5)`` returns a plain ``nn.Module``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fairline import _own as own
from fairline.errors import FairlineError

#: Architecture → (module, function). The function takes num_classes, in_channels, image_size and its options.
REGISTRY: dict[str, tuple[str, str]] = {
    "cnet": ("fairline.models.cnet", "cnet"),
    "cnn": ("fairline.models.cnn", "cnn"),
    "resnet18": ("fairline.models.resnet", "resnet18"),
    "resnet34": ("fairline.models.resnet", "resnet34"),
    "vgg19": ("fairline.models.vgg", "vgg19"),
    "wide_resnet22_8": ("fairline.models.wide_resnet", "wide_resnet22_8"),
}


def build(
    name: str, num_classes: int, in_channels: int = 3, image_size: int | Sequence[int] = 32, **options: Any
) -> nn.Module:
    """Build an untrained network.

    Args:
        name: A registered architecture, or ``module:function`` or ``file.py:function`` of your own, which is
            called with ``num_classes``, ``in_channels`` and ``image_size`` (those that it takes).
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of the image in pixels, or (height, width); a function of your own gets a tuple only
            if they differ.
        options: Passed on; ``width`` for all, ``stem_stride`` for all but the tiny one, ``stem_relu`` for the ResNets,
            ``final_relu`` for the wide ones, ``layers``, ``skips``, ``kernels``, … for CNets.

    Returns:
        The network, in training mode.

    Raises:
        FairlineError: The name or an option is unknown, the network does not take images of this size, or your own
            function cannot be imported, raises, or returns something else.

    >>> import torch
    >>> network = build("cnn", num_classes=5, image_size=16, width=4)
    >>> network(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """
    sides = image_sides(image_size)
    size = sides[0] if sides[0] == sides[1] else sides
    arguments = {"num_classes": num_classes, "in_channels": in_channels, "image_size": size}
    source = name.rpartition(":")[0]
    failed = f"Model '{name}' cannot be built" + ("" if isinstance(size, int) else f" with image_size={size}")
    with _found(name) as make:
        with own.told(failed, source):
            known = inspect.signature(make).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            for option in options:
                if option not in known:
                    raise FairlineError(f"Model '{name}' knows no option '{option}'; it takes {', '.join(known)}.")
            arguments = {key: value for key, value in arguments.items() if key in known}
        with own.told(failed, source):
            model = make(**arguments, **options)
    if not isinstance(model, nn.Module):
        raise FairlineError(f"'{name}' returned a {type(model).__name__}, not an nn.Module.")
    return model


@contextmanager
def _found(name: str) -> Iterator[Callable[..., Any]]:
    """The function that builds a network, while the block runs."""
    if name in REGISTRY:
        module, function = REGISTRY[name]
        yield getattr(importlib.import_module(module), function)
    elif own.is_own(name):
        with own.found(name) as make:
            yield make
    else:
        raise FairlineError(
            f"There is no model '{name}'; choose one of {', '.join(REGISTRY)}, or name your own as module:function or "
            "file.py:function."
        )


def files(name: str) -> dict[str, str]:
    """The user's files that decide which network a name stands for.

    Args:
        name: As for :func:`build`.

    Returns:
        A digest of each by its path: the file or module that the name says, and what it imports from beside it; none of
        an architecture of this package.

    Raises:
        FairlineError: A file cannot be read, or the module cannot be imported.
    """
    return own.files(name)


def image_sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image of this size.

    Args:
        image_size: Side of a square image, or height and width.

    Returns:
        Both in pixels.

    >>> image_sides(32), image_sides([48, 64])
    ((32, 32), (48, 64))
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def rescaled(model: nn.Module, alpha: float, rho: float) -> tuple[nn.Module, dict[str, int]]:
    """A new, untrained network of α times the channels and ρ times the resolution (DeepReDuce's Reshape).

    Args:
        model: One of this package's networks.
        alpha: Its width becomes ``int(α·width)``.
        rho: The stride of its stem becomes ``int(1/ρ)`` times what it was.

    Returns:
        The network, and the options of :func:`build` that differ.

    Raises:
        FairlineError: The network does not say how it was built or has no stride of a stem, or nothing is left of it.
    """
    arguments = getattr(model, "arguments", None)
    if not isinstance(arguments, dict) or "width" not in arguments or "stem_stride" not in arguments:
        raise FairlineError(
            f"{type(model).__name__} cannot be rescaled: it has no 'arguments' with its width and stem_stride."
        )
    if not (0 < alpha <= 1 and 0 < rho <= 1) or int(alpha * arguments["width"]) < 1:
        raise FairlineError(
            f"A network of width {arguments['width']} cannot be rescaled by α = {alpha} and ρ = {rho}: both lie in "
            "(0, 1], and one channel must be left."
        )
    changed = {
        "width": int(alpha * arguments["width"]),
        "stem_stride": int(1 / rho) * arguments["stem_stride"],
    }
    return type(model)(**{**arguments, **changed}), changed


__all__ = ["REGISTRY", "build", "files", "image_sides", "rescaled"]
