"""Networks on disk: how one is built, its weights, its masks, and what stands beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fairline import models
from fairline._io import read_json, save_tensors, write_json
from fairline.errors import FairlineError
from fairline.masking import MIXED, Surrogate, load_masks, mask_relus, masked_relus, relu_count, save_masks
from fairline.weights import load_weights

if TYPE_CHECKING:
    from fairline.compiler import CompiledNetwork


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network before its weights are loaded; see :func:`fairline.models.build`.

    Attributes:
        name: Architecture.
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of a square image, or height and width.
        options: Of the architecture.
        files: Digests of the user's files that build it, by path; see :func:`fairline.models.files`.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size: int | tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """One form for each size, also when it comes from JSON: an int for a square image.

        Raises:
            FairlineError: An option is what the network is given anyway.
        """
        for option in ("name", "num_classes", "in_channels", "image_size"):
            if option in self.options:
                raise FairlineError(
                    f"Model '{self.name}' takes no option '{option}': classes, channels and image size are the data’s, "
                    "and the name stands beside the options."
                )
        height, width = models.image_sides(self.image_size)
        object.__setattr__(self, "image_size", height if height == width else (height, width))

    def build(self) -> nn.Module:
        """The untrained network.

        Returns:
            It, in training mode.

        Raises:
            FairlineError: It cannot be built, or the user's files are not those that it was built from before.
        """
        if self.files:
            found = models.files(self.name)
            changed = [file for file in {**self.files, **found} if found.get(file) != self.files.get(file)]
            if changed:
                raise FairlineError(
                    f"{changed[0]} is not what it was when the network of '{self.name}' was made; put that back, or "
                    "train again into another folder."
                )
        return models.build(self.name, self.num_classes, self.in_channels, self.image_size, **self.options)

    def to_json(self) -> dict[str, Any]:
        """As a run's config and ``network.json`` hold it."""
        content = asdict(self)
        if not self.files:
            # Networks of this package keep the form under which their runs are known.
            del content["files"]
        return content

    def example(self) -> torch.Tensor:
        """An input of the right shape."""
        return torch.zeros(2, self.in_channels, *models.image_sides(self.image_size))


@dataclass(frozen=True)
class NetworkInfo:
    """What stands beside a network's weights.

    Attributes:
        model: How to build it.
        stage: ``"base"``, ``"linearized"`` or ``"finetuned"``.
        relus: ReLUs kept for each sample.
        total: ReLUs of the unmasked network.
        budget: ReLU count asked for.
        method: Linearizer, empty for a base network.
        objective: Of the finetune, empty before it.
        seed: Of the job that made it.
        reached: Whether the method reached the budget by its own rule.
        placement: Under what the masks were learned, where that is not plain distillation: ``"lagrangian"``.
        surrogate: What stands in the place of the other ReLUs: a key of :data:`fairline.masking.SURROGATES`, or
            ``"mixed"`` where channels differ.
        compiled: Whether it is a compiled network, made of one that ``model`` builds.
    """

    model: ModelSpec
    stage: str
    relus: int
    total: int
    budget: int
    method: str = ""
    objective: str = ""
    seed: int = 0
    reached: bool = True
    placement: str = ""
    surrogate: str = "identity"
    compiled: bool = False

    @property
    def percent(self) -> float:
        """ReLUs kept, in percent."""
        return 100 * self.relus / self.total


def save_network(folder: Path, model: nn.Module, info: NetworkInfo) -> None:
    """Write weights, masks and ``network.json`` (last, so that its presence means a whole network)."""
    masks = _mask_keys(model)
    save_tensors(folder / "model.safetensors", {k: v for k, v in model.state_dict().items() if k not in masks})
    if masks:
        save_masks(folder / "masks.safetensors", model, method=info.method, budget=info.budget, seed=info.seed)
    write_json(folder / "network.json", {**asdict(info), "model": info.model.to_json()})


def save_compiled(folder: Path, model: CompiledNetwork, info: NetworkInfo) -> None:
    """Write a compiled network and ``network.json``, last."""
    model.save(folder)
    write_json(folder / "network.json", {**asdict(info), "model": info.model.to_json()})


def _mask_keys(model: nn.Module) -> set[str]:
    """What the state of a model holds that belongs to the mask file."""
    return {f"{name}.{part}" for name in masked_relus(model) for part in ("kept", "degrees", "signs")}


def load_info(folder: Path) -> NetworkInfo:
    """Read what a folder says of its network.

    Returns:
        Content of ``network.json``.

    Raises:
        FairlineError: The file is missing or broken.
    """
    content = read_json(folder / "network.json")
    try:
        return NetworkInfo(**{**content, "model": ModelSpec(**content["model"])})
    except (KeyError, TypeError, ValueError):
        raise FairlineError(f"{folder / 'network.json'} does not describe a network.") from None


def load_network(folder: Path) -> tuple[nn.Module, NetworkInfo]:
    """Read what :func:`save_network` or :func:`save_compiled` wrote.

    Returns:
        The network, in evaluation mode, and what stands beside it.

    Raises:
        FairlineError: A file is missing, broken, or does not belong to this architecture.
    """
    info = load_info(folder)
    if info.compiled:
        # Loaded by those who need it.
        from fairline.compiler import CompiledNetwork

        return CompiledNetwork.load(folder).eval(), info
    model = info.model.build()
    has_masks = info.stage != "base" or (folder / "masks.safetensors").exists()
    if has_masks:
        # Compared with its architecture before it was saved.
        surrogate = None if info.surrogate == MIXED else cast(Surrogate, info.surrogate)
        model = mask_relus(model, info.model.example(), surrogate, check=False)
        # Masks first: which coefficients there are may be told by them.
        load_masks(folder / "masks.safetensors", model)
    load_weights(model, folder / "model.safetensors")
    return model.eval(), info


def count_relus(model: nn.Module, spec: ModelSpec) -> int:
    """ReLUs of a network that may have no masks."""
    return relu_count(model, spec.example())
