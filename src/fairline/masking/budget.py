"""ReLU counts, and the masks that a budget allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking.find import mask_relus
from fairline.masking.layer import (
    MaskedReLU,
    masked_relus,
)


def relu_count(model: nn.Module, example: Tensor | None = None) -> int:
    """How many ReLUs are evaluated for each sample.

    Args:
        model: Masked, or any model if an example is given.
        example: Input (B, …); needed for a model without masks.

    Returns:
        The number of kept ReLUs; all of them for a model without masks.

    Raises:
        FairlineError: The model has no masks and no example is given.
    """
    layers = masked_relus(model)
    if not layers:
        if example is None:
            raise FairlineError(f"{type(model).__name__} has no masks; counting its ReLUs needs an example input.")
        layers = masked_relus(mask_relus(model, example))
    return sum(layer.num_kept for layer in layers.values())


def layer_table(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, kept ReLUs and all ReLUs of each masked layer."""
    for name, layer in masked_relus(model).items():
        yield name, layer.num_kept, layer.kept.numel()


def keep_largest(model: nn.Module, budget: int, ranks: Mapping[str, Tensor] | None = None) -> int:
    """Fix learned masks so that the ``budget`` largest entries are 1 and all others 0.

    Entries that cover several units (channel- and layer-wise masks) are taken from the largest on, as long as
    they fit into the budget.

    Args:
        model: With learned masks.
        budget: ReLUs to keep for each sample.
        ranks: What to compare in place of the masks, for each layer a tensor of its learned mask's shape.

    Returns:
        ReLUs kept: exactly ``budget`` for pixel-wise masks, else the most that fits.
    """
    named = {name: layer for name, layer in masked_relus(model).items() if layer.weight is not None}
    layers = list(named.values())
    compared = {name: cast(Tensor, layer.weight).detach() for name, layer in named.items()} if ranks is None else ranks
    values = torch.cat([compared[name].flatten() for name in named])
    sizes = [layer.kept.numel() // cast(Tensor, layer.weight).numel() for layer in layers]
    units = torch.cat([torch.full((cast(Tensor, w.weight).numel(),), s) for w, s in zip(layers, sizes, strict=True)])
    # Stable, so that ties fall the same way on every device.
    order = torch.sort(values.cpu(), descending=True, stable=True).indices
    chosen = torch.zeros(len(values), dtype=torch.bool)
    if max(sizes) == 1:
        chosen[order[:budget]] = True
    else:
        left = budget
        for entry, size in zip(order.tolist(), units[order].tolist(), strict=True):
            if size <= left:
                chosen[entry] = True
                left -= size
    _fix(layers, chosen)
    return relu_count(model)


def _fix(layers: list[MaskedReLU], chosen: Tensor) -> None:
    start = 0
    for layer in layers:
        weight = cast(Tensor, layer.weight)
        layer.set_mask(chosen[start : start + weight.numel()].view(weight.shape))
        start += weight.numel()
