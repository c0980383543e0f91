"""Masks as safetensors files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from fairline._io import load_tensors, save_tensors
from fairline.errors import FairlineError
from fairline.masking.layer import (
    masked_relus,
    surrogate_of,
)


@dataclass(frozen=True)
class MaskInfo:
    """What a mask file says of itself."""

    method: str
    budget: int
    seed: int | None
    layers: dict[str, list[int]]
    surrogate: str = "identity"


def save_masks(path: str | Path, model: nn.Module, *, method: str, budget: int, seed: int | None) -> None:
    """Write fixed masks to a safetensors file; the coefficients of a quadratic surrogate are weights, and not in it.

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
    info = MaskInfo(method, budget, seed, shapes, surrogate_of(model))
    save_tensors(path, {name: layer.kept for name, layer in layers.items()}, asdict(info))


def load_masks(path: str | Path, model: nn.Module) -> MaskInfo:
    """Set a masked model's masks from a file.

    Args:
        path: Written by :func:`save_masks`.
        model: Returned by :func:`mask_relus`; changed in place.

    Returns:
        What the file says of itself.

    Raises:
        FairlineError: The file is broken, or belongs to another model.
    """
    tensors, metadata = load_tensors(path)
    if not isinstance(metadata, dict) or not {"method", "budget", "seed", "layers"} <= metadata.keys():
        raise FairlineError(f"{path} is not a mask file.")
    layers = masked_relus(model)
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
    surrogate = metadata.get("surrogate", "identity")
    if surrogate != surrogate_of(model):
        raise FairlineError(
            f"{path} was made for {surrogate} surrogates, but the model's are {surrogate_of(model)}; "
            f"mask it with surrogate='{surrogate}'."
        )
    for name, layer in layers.items():
        layer.set_mask(tensors[name])
    return MaskInfo(metadata["method"], metadata["budget"], metadata["seed"], metadata["layers"], surrogate)
