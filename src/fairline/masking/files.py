"""Masks as safetensors files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from fairline._io import load_tensors, save_tensors
from fairline.errors import FairlineError
from fairline.masking.layer import (
    masked_relus,
    surrogate_of,
)
from fairline.masking.sharing import require_signs

#: What follows a layer's name in the name of its shared signs.
SIGNS = ".signs"


@dataclass(frozen=True)
class MaskInfo:
    """What a mask file says of itself.

    Attributes:
        method: What chose the masks.
        budget: The ReLU count asked for.
        seed: Of the run.
        layers: Shapes of the activations.
        surrogate: What stands in a ReLU's place, ``"mixed"`` where channels differ.
        degrees: Of layers whose channels were given surrogates of their own: the degree of each.
        shared: Layers whose units share signs.
    """

    method: str
    budget: int
    seed: int | None
    layers: dict[str, list[int]]
    surrogate: str = "identity"
    degrees: dict[str, list[int]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()


def save_masks(path: str | Path, model: nn.Module, *, method: str, budget: int, seed: int | None) -> None:
    """Write fixed masks to a safetensors file; the coefficients of surrogates are weights, and not in it.

    Args:
        path: The file.
        model: With fixed masks.
        method: What chose them.
        budget: The ReLU count asked for.
        seed: Of the run.

    Raises:
        FairlineError: The model has no masks, or they are still being learned.
    """
    layers = masked_relus(model)
    if not layers or any(layer.weight is not None for layer in layers.values()):
        raise FairlineError(f"{type(model).__name__} has no fixed masks to save.")
    shapes = {name: list(layer.shape) for name, layer in layers.items()}
    signs = {f"{name}{SIGNS}": layer.signs for name, layer in layers.items() if layer.signs is not None}
    shared = tuple(name.removesuffix(SIGNS) for name in signs)
    surrogate = surrogate_of(model)
    # A network whose surrogates are all zero says so by their name.
    degrees = {} if surrogate == "zero" else {name: layer.degrees for name, layer in layers.items()}
    chosen = {name: own.tolist() for name, own in degrees.items() if own is not None}
    about = asdict(MaskInfo(method, budget, seed, shapes, surrogate, chosen, shared))
    if not chosen:
        del about["degrees"]
    if not shared:
        del about["shared"]
    save_tensors(path, {**{name: layer.kept for name, layer in layers.items()}, **signs}, about)


def load_masks(path: str | Path, model: nn.Module) -> MaskInfo:
    """Set a masked model's masks from a file.

    Args:
        path: Written by :func:`save_masks`.
        model: Returned by :func:`mask_relus`; changed in place. Surrogates that were chosen channel by channel come
            from the file as well.

    Returns:
        What the file says of itself.

    Raises:
        FairlineError: The file is broken, or belongs to another model.
    """
    tensors, metadata = load_tensors(path)
    if not isinstance(metadata, dict) or not {"method", "budget", "seed", "layers"} <= metadata.keys():
        raise FairlineError(f"{path} is not a mask file.")
    layers = masked_relus(model)
    shared = tuple(metadata.get("shared", ()))
    signs = {name: tensors.pop(f"{name}{SIGNS}", None) for name in shared}
    unknown = sorted(tensors.keys() - layers.keys()) or sorted(layers.keys() - tensors.keys())
    if unknown:
        where = "the model" if unknown[0] in tensors else "the file"
        raise FairlineError(
            f"{path} belongs to another model: layer '{unknown[0]}' is not in {where} "
            f"({len(tensors)} masks in the file, {len(layers)} in the model)."
        )
    for name, layer in layers.items():
        if tuple(tensors[name].shape) != layer.shape:
            raise FairlineError(
                f"{path} belongs to another model: mask '{name}' has shape {tuple(tensors[name].shape)}, "
                f"the model's activation {layer.shape}."
            )
    surrogate, degrees = metadata.get("surrogate", "identity"), metadata.get("degrees", {})
    if not degrees and surrogate != surrogate_of(model):
        raise FairlineError(
            f"{path} was made for {surrogate} surrogates, but the model's are {surrogate_of(model)}; "
            f"mask it with surrogate='{surrogate}'."
        )
    for name, own in signs.items():
        if own is None or name not in layers:
            raise FairlineError(f"{path} is broken: it does not hold the signs that units of '{name}' share.")
        require_signs(own, layers[name].shape)
    for name, layer in layers.items():
        if name in degrees:
            layer.use_degrees(torch.tensor(degrees[name]))
        layer.set_mask(tensors[name])
        layer.share(signs.get(name))
    about = metadata["method"], metadata["budget"], metadata["seed"], metadata["layers"]
    return MaskInfo(*about, surrogate, degrees, shared)
