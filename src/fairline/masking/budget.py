"""ReLU counts, and the masks that a budget allows.

Source: none; :func:`fullest` is the subset-sum recursion of Bellman (1957) on the bits of an integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking.find import mask_relus
from fairline.masking.layer import masked_relus


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

    Entries that cover several units (channel- and layer-wise masks) may not fit the budget exactly. As many units as
    possible are kept; which entries those are is said by :func:`fullest`, the largest first.

    Args:
        model: With learned masks. ReLUs that were cut before they were learned stay cut and count for nothing.
        budget: ReLUs to keep for each sample.
        ranks: What to compare in place of the masks, for each layer a tensor of its learned mask's shape.

    Returns:
        ReLUs kept: exactly ``budget`` for pixel-wise masks, if the network has as many; else the most that fits.
    """
    named = {name: layer for name, layer in masked_relus(model).items() if layer.weight is not None}
    compared = {name: cast(Tensor, layer.weight).detach() for name, layer in named.items()} if ranks is None else ranks
    values = torch.cat([compared[name].flatten() for name in named]).cpu()
    sizes = torch.cat([layer.covered().flatten() for layer in named.values()]).cpu()
    # Stable, so that ties fall the same way on every device.
    order = torch.sort(values, descending=True, stable=True).indices
    order = order[sizes[order] > 0]
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[fullest(sizes[order].tolist(), budget)]] = True
    parts = chosen.split([cast(Tensor, layer.weight).numel() for layer in named.values()])
    for layer, own in zip(named.values(), parts, strict=True):
        layer.set_mask(own.view(cast(Tensor, layer.weight).shape).to(layer.kept.device) & layer.kept)
    return relu_count(model)


def fullest(sizes: Sequence[int], budget: int) -> Tensor:
    """Which entries to keep so that as many units as possible fit into a budget, and the first entries if they can be.

    The sum of the kept sizes is the largest that any choice allows. Of the choices with this sum it is the one that
    keeps the first entry if one of them does, then the second if one of those does, and so on.

    Args:
        sizes: Units of each entry, positive, the most wanted entry first.
        budget: Units to keep, at most.

    Returns:
        bool, (len(sizes),).

    Examples:
        >>> fullest([64, 48, 48], budget=96).tolist()
        [False, True, True]
        >>> fullest([64, 48, 16, 16, 16], budget=96).tolist()
        [True, False, True, True, False]
    """
    if sum(sizes) <= budget:
        return torch.ones(len(sizes), dtype=torch.bool)
    unit = math.gcd(*sizes)
    sizes, budget = [size // unit for size in sizes], budget // unit
    if max(sizes) == 1:
        return torch.arange(len(sizes)) < budget
    # Subset sums as the bits of an integer: those of every stretch-th tail, the others again when they are needed.
    stretch = math.isqrt(len(sizes)) + 1
    tails = {len(sizes): 1}
    sums = 1
    for place in reversed(range(len(sizes))):
        sums = _with(sums, sizes[place], budget)
        if place % stretch == 0:
            tails[place] = sums
    left = sums.bit_length() - 1
    kept = []
    for start in range(0, len(sizes), stretch):
        stop = min(start + stretch, len(sizes))
        behind = [tails[stop]]
        for place in reversed(range(start + 1, stop)):
            behind.append(_with(behind[-1], sizes[place], budget))
        for place in range(start, stop):
            after = behind.pop()
            kept.append(sizes[place] <= left and after >> (left - sizes[place]) & 1 == 1)
            left -= sizes[place] * kept[-1]
    return torch.tensor(kept)


def _with(sums: int, size: int, limit: int) -> int:
    """The sums up to a limit that one more entry allows."""
    return (sums | sums << size) & ((1 << limit + 1) - 1)
