"""Whose checkpoints a folder holds: a run goes on with its own only.

Source: none.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairline._io import read_json, write_json
from fairline.data.grouped import GroupedData, content_digest
from fairline.errors import FairlineError
from fairline.masking import unwrap
from fairline.objectives.base import Objective

_FILE = "linearization.json"


def claim(folder: Path, own: Mapping[str, Any]) -> None:
    """Make a checkpoint folder a run's own.

    Args:
        folder: New, empty, or of the same run.
        own: All that determines what the run finds, as plain JSON.

    Raises:
        FairlineError: The folder holds checkpoints of another run, or of an unknown one.
    """
    file = folder / _FILE
    advice = "take another folder, or delete it"
    if not file.exists():
        if any(folder.glob("*.safetensors")):
            raise FairlineError(f"{folder} holds checkpoints that do not say of which run they are; {advice}.")
        write_json(file, own)
        return
    theirs = read_json(file)
    for name in own:
        if theirs.get(name) != own[name]:
            what = f"{name} is {theirs.get(name)} there and {own[name]} here"
            if name in ("network", "training images", "validation images"):
                what = f"its {name} {'was' if name == 'network' else 'were'} another"
            raise FairlineError(f"{folder} holds checkpoints of another run ({what}); {advice}.")


def described(value: object) -> Any:
    """A setting as plain JSON that is equal for equal settings.

    Args:
        value: Of a method's field: a scalar, a sequence, a mapping, an objective, a network, a function, or a dataclass
            of such.

    Returns:
        JSON.

    Examples:
        >>> described((1, 0.5, "pixel"))
        [1, 0.5, 'pixel']
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [described(each) for each in value]
    if isinstance(value, nn.Module):
        return network_digest(value)
    if isinstance(value, Objective):
        # What its constructors take; the rest is what it learns, or knows of the data.
        taken = {name for kind in type(value).__mro__[:-1] for name in inspect.signature(kind).parameters}
        options = {name: described(each) for name, each in vars(value).items() if name in taken}
        return {"objective": _name(type(value)), **dict(sorted(options.items()))}
    if is_dataclass(value) and not isinstance(value, type):
        own = {each.name: described(getattr(value, each.name)) for each in fields(value)}
        return {"kind": _name(type(value)), **own}
    return _name(value if callable(value) else type(value))


def network_digest(model: nn.Module) -> str:
    """Digest of a network: the names, shapes and values of its weights, buffers and masks.

    Args:
        model: On any device.

    Returns:
        Hexadecimal.
    """
    content = hashlib.blake2b(digest_size=16)
    # A copy of a network may list them in another order.
    for name, value in sorted(unwrap(model).state_dict().items()):
        if isinstance(value, Tensor):
            content.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            _add(content, value)
    return content.hexdigest()


def data_digest(data: GroupedData) -> str:
    """Digest of images, labels, groups, their order, and how they are normalised.

    Args:
        data: On any device.

    Returns:
        Hexadecimal.
    """
    return content_digest(data, start=str(data.normalization()))


def _add(content: Any, tensor: Tensor) -> None:
    content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
