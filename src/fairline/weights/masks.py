"""Masks as people have them, into a masked network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking import MaskedReLU, masked_relus
from fairline.weights.files import Contents, contents, read_file
from fairline.weights.names import canonical, listed


def import_masks(model: nn.Module, masks: Mapping[str, Any] | Sequence[Any] | str | Path) -> dict[str, str]:
    """Set a network's masks from arrays of zeros and ones; 1 keeps a ReLU.

    Args:
        model: Returned by :func:`fairline.mask_relus`; changed in place, and only if all masks fit.
        masks: By layer (``"layer1.0.relu1"``, or any tensor of that module), or in the order of the layers: a dict, a
            list, or a file of them (safetensors, ``torch.save``, ``.npz``), whole checkpoints of SNL's published code
            included. Shapes are those of the activations, (C, H, W), or broadcast to them.

    Returns:
        Which mask each layer got, by its name or place.

    Raises:
        FairlineError: The network has no masks, the file cannot be read, or the masks are not this network's.
    """
    layers = masked_relus(model)
    if not layers:
        raise FairlineError(f"{type(model).__name__} has no masks to set; mask it first (fairline.mask_relus).")
    from_file = isinstance(masks, str | Path)
    content = read_file(masks) if isinstance(masks, str | Path) else contents(masks)
    where = str(masks) if from_file else "What was given"
    chosen = assign(content, layers, where)
    set_masks(layers, {name: content.tensors[key] for name, key in chosen.items()}, where)
    return chosen


def assign(content: Contents, layers: Mapping[str, MaskedReLU], where: str) -> dict[str, str]:
    """Which tensor is the mask of which layer.

    Args:
        content: What holds the masks, and perhaps other tensors.
        layers: Of the network.
        where: The masks come from, for the error message.

    Returns:
        The name of each layer's tensor.

    Raises:
        FairlineError: Neither names nor order and shapes tell.
    """
    tensors = content.tensors
    named: dict[str, list[str]] = {name: [] for name in layers}
    if not content.listed:
        for key, tensor in tensors.items():
            name = _layer_of(key, layers)
            if name is not None and _fits(tensor, layers[name]):
                named[name].append(key)
    if all(len(keys) == 1 for keys in named.values()):
        return {name: keys[0] for name, keys in named.items()}
    # Names that fit some layers only are no order either.
    orders = [] if any(named.values()) else [order for order in _orders(content) if len(order) == len(layers)]
    fitting = [
        order
        for order in orders
        if all(_fits(tensors[key], layer) for key, layer in zip(order, layers.values(), strict=True))
    ]
    if len(fitting) == 1:
        return dict(zip(layers, fitting[0], strict=True))
    shapes = ", ".join(str(layer.shape) for layer in list(layers.values())[:5])
    raise FairlineError(
        f"{where} does not hold the masks of this network, which has {len(layers)} layers of ReLUs "
        f"({listed(list(layers))}) of shapes {shapes}{', …' if len(layers) > 5 else ''}: "
        + _what_is_wrong(tensors, layers, named, orders, fitting)
    )


def _what_is_wrong(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, MaskedReLU],
    named: Mapping[str, list[str]],
    orders: Sequence[Sequence[str]],
    fitting: Sequence[Sequence[str]],
) -> str:
    if any(named.values()):
        missing = [name for name, keys in named.items() if not keys]
        return f"none is named after {listed(missing)}." if missing else "several are named after one layer."
    if fitting:
        return "several sets of tensors fit; name them after the layers."
    for order in orders:
        for key, (name, layer) in zip(order, layers.items(), strict=True):
            if not _fits(tensors[key], layer):
                return f"'{key}' has shape {tuple(tensors[key].shape)}, the activation of '{name}' {layer.shape}."
    found = ", ".join(f"'{key}' {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:5])
    return f"it holds {len(tensors)} tensors{f', first {found}' if found else ''}."


def _layer_of(key: str, layers: Mapping[str, MaskedReLU]) -> str | None:
    """The layer that a tensor is named after: by the layer's name, or as a tensor of it, after any prefix."""
    words = canonical(key).split(".")
    found = None
    for name in layers:
        own = canonical(name).split(".")
        after = [words[-len(own) :], words[-len(own) - 1 : -1]]
        if own in after and (found is None or len(name) > len(found)):
            found = name
    return found


def _orders(content: Contents) -> Iterator[list[str]]:
    """Sets of tensors that may be the masks, in the order of the layers: all, and those that end in the same word."""
    groups: dict[str, list[str]] = {"": list(content.tensors)}
    for key in content.tensors:
        groups.setdefault(re.sub(r"\d+", "", key.split(".")[-1]) or "#", []).append(key)
    seen = []
    for keys in groups.values():
        if not content.ordered:
            # Numbers in otherwise equal names are an order.
            if len({re.sub(r"\d+", "#", key) for key in keys}) > 1:
                continue
            keys = sorted(keys, key=lambda key: [int(number) for number in re.findall(r"\d+", key)])
        if keys not in seen:
            seen.append(keys)
            yield keys


def _fits(tensor: Tensor, layer: MaskedReLU) -> bool:
    return _without_batch(tensor, layer) is not None


def _without_batch(tensor: Tensor, layer: MaskedReLU) -> Tensor | None:
    """A mask with as many axes as the activation, each as long or of length one; None if it is none."""
    while tensor.ndim > len(layer.shape) and tensor.shape[0] == 1:
        tensor = tensor[0]
    same = tensor.ndim == len(layer.shape)
    return tensor if same and all(n in (1, m) for n, m in zip(tensor.shape, layer.shape, strict=True)) else None


def set_masks(layers: Mapping[str, MaskedReLU], masks: Mapping[str, Tensor], where: str) -> None:
    """Set all masks, or none.

    Args:
        layers: Of the network.
        masks: For each of them, of its shape.
        where: The masks come from, for the error message.

    Raises:
        FairlineError: A mask holds something else than zeros and ones.
    """
    for name, mask in masks.items():
        other = mask[(mask != 0) & (mask != 1)]
        if len(other):
            raise FairlineError(
                f"{where}: the mask of '{name}' holds {other[0].item():.4g}, not zeros and ones; cut a mask that was "
                "learned first: SNL's published code keeps what is above 0.01."
            )
    for name, mask in masks.items():
        kept = _without_batch(mask, layers[name])
        assert kept is not None
        layers[name].set_mask(kept.bool())


def binary(tensor: Tensor) -> bool:
    """Whether a tensor holds zeros and ones alone."""
    return bool(((tensor == 0) | (tensor == 1)).all())
