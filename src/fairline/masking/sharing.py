"""Units that share a sign: one comparison decides for all of them, and each is multiplied with its result.

A ReLU is ``x·[x > 0]``: a sign and a product. Of them the sign is dear under cryptography. Where a sign s is shared,

    y_u = x_u·[Σ_{v votes for s} x_v > 0]    for every unit u that s decides,

and the gradient goes through the units that are let through, the sign being a constant. With patches, the units of a
patch both vote and are decided (block ReLU; Gorski, Jevnisek and Avidan, "Securing Neural Networks with Knapsack
Optimization", 2023; their code takes the sign of the mean and lets nothing through at 0, as here). With prototypes, the
units of some channels vote alone, each for itself and for those at its place in other channels (DeepShare; Bornfeld and
Avidan 2025, read as an abstract: no code was public).

Who votes and who is decided is public, as masks are: ``signs``, int32 or int64, (2, *shape). ``signs[0]`` says which
sign decides each unit, ``signs[1]`` which one it votes for, both -1 where none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairline.errors import FairlineError

#: Height and width of a patch.
Block = tuple[int, int]


def patches(shape: Sequence[int], blocks: Block | Sequence[Block]) -> Tensor:
    """Signs of patches; those at the lower and right edge may be smaller.

    Args:
        shape: Of the activation without the batch axis, (C, H, W).
        blocks: Height and width of the patches, of all channels or of each.

    Returns:
        int32, (2, C, H, W).

    Raises:
        FairlineError: The activation has no height and width, a side is below 1, or there are not as many blocks as
            channels.

    >>> patches((1, 3, 4), (2, 2))[0]
    tensor([[[0, 0, 1, 1],
             [0, 0, 1, 1],
             [2, 2, 3, 3]]], dtype=torch.int32)
    """
    if len(shape) != 3:
        raise FairlineError(f"Patches need an activation of shape (C, H, W), not {tuple(shape)}.")
    channels, height, width = shape
    sizes = torch.tensor(blocks)
    sizes = sizes.expand(channels, 2) if sizes.ndim == 1 else sizes
    if sizes.shape != (channels, 2) or bool((sizes < 1).any()):
        raise FairlineError(f"Patches of {channels} channels need a height and a width of at least 1 each: {blocks}.")
    rows, columns = (torch.arange(side) // sizes[:, axis, None] for axis, side in enumerate((height, width)))
    across = (width + sizes[:, 1] - 1) // sizes[:, 1]
    counts = signs_of((height, width), sizes)
    first = counts.cumsum(0) - counts
    own = first[:, None, None] + rows[:, :, None] * across[:, None, None] + columns[:, None, :]
    return own.int().expand(2, -1, -1, -1).contiguous()


def signs_of(sides: tuple[int, int], blocks: Tensor) -> Tensor:
    """How many patches of each size cover a channel.

    Args:
        sides: Height and width of the channel.
        blocks: int64, (…, 2).

    Returns:
        int64, (…,).
    """
    height, width = ((side + blocks[..., axis] - 1) // blocks[..., axis] for axis, side in enumerate(sides))
    return height * width


def prototypes(shape: Sequence[int], of: Sequence[int]) -> Tensor:
    """Signs of prototype channels.

    Args:
        shape: Of the activation without the batch axis, (C, …).
        of: The channel that decides for each; one that decides for itself is a prototype.

    Returns:
        int32, (2, C, …).

    Raises:
        FairlineError: There is no such channel, or a channel is decided by one that is no prototype.

    >>> prototypes((3, 2), [0, 0, 2]).tolist()
    [[[0, 1], [0, 1], [4, 5]], [[0, 1], [-1, -1], [4, 5]]]
    """
    chosen = list(of)
    wrong = [c for c in chosen if not 0 <= c < shape[0] or chosen[c] != c]
    if len(chosen) != shape[0] or wrong:
        raise FairlineError(f"Each of {shape[0]} channels needs a prototype, which decides for itself: {chosen}.")
    units = torch.arange(math.prod(shape), dtype=torch.int32).view(*shape)
    index = torch.tensor(chosen)
    own = (index == torch.arange(len(index))).view(-1, *[1] * (len(shape) - 1))
    return torch.stack([units[index], torch.where(own, units, -1)])


def require_signs(signs: Tensor, shape: Sequence[int]) -> None:
    """Refuse what does not say who votes and who is decided.

    Raises:
        FairlineError: It has another shape or kind of number, or a sign decides for which no unit votes.
    """
    if tuple(signs.shape) != (2, *shape) or signs.dtype not in (torch.int32, torch.int64):
        raise FairlineError(
            f"Shared signs of an activation of shape {tuple(shape)} are integers of shape {(2, *shape)}, not "
            f"{signs.dtype} of shape {tuple(signs.shape)}."
        )
    missing = set(signs[0].unique().tolist()) - set(signs[1].unique().tolist()) - {-1}
    if missing or bool((signs < -1).any()):
        raise FairlineError("A sign is a number from 0 on, or -1 for none, and decides only where units vote for it.")


def effective(signs: Tensor, kept: Tensor) -> Tensor:
    """Signs of the units that a mask keeps, numbered by the first unit that they decide; votes for no other.

    Args:
        signs: (2, *shape).
        kept: bool, (*shape): all others pass.

    Returns:
        int64, (2, *shape).
    """
    decides, votes = torch.where(kept, signs[0], -1).flatten().long(), signs[1].flatten().long()
    places = (decides >= 0).nonzero().flatten()
    wanted, which = torch.unique(decides[places], return_inverse=True)
    first = places.new_full((len(wanted),), len(decides)).scatter_reduce(0, which, places, "amin")
    number = torch.argsort(torch.argsort(first))
    found = torch.full((2, len(decides)), -1, device=signs.device)
    if len(wanted):
        found[0, places] = number[which]
        among = torch.searchsorted(wanted, votes).clamp_max(len(wanted) - 1)
        found[1] = torch.where(wanted[among] == votes, number[among], -1)
    return found.view(signs.shape)


def count_signs(signs: Tensor, kept: Tensor | None = None) -> int:
    """How many signs decide a unit, of those that a mask keeps."""
    own = signs[0] if kept is None else signs[0][kept]
    return len(own[own >= 0].unique())


@dataclass(frozen=True)
class Sharing:
    """Who votes and who is decided, in a flattened activation, as what computes them needs it.

    Attributes:
        voters: For each number k of voters that signs have, int64, (S_k, k): positions of the voters of each of those
            signs. Signs are numbered in this order.
        decided: int64, (n,): positions of the units that a sign decides.
        sign: int64, (n,): which sign decides each of them.
        rest: int64: positions of all other units, which pass.
        inverse: int64: where in ``[decided, rest]`` each unit is.
        gate: int64: the sign of each unit; S, one beyond the last, for those that pass.
    """

    voters: tuple[Tensor, ...]
    decided: Tensor
    sign: Tensor
    rest: Tensor
    inverse: Tensor
    gate: Tensor

    @classmethod
    def of(cls, signs: Tensor) -> Sharing:
        """From signs, (2, *shape); those that decide nothing are left out."""
        decides, votes = (row.flatten().long() for row in signs)
        wanted, place = torch.unique(decides[decides >= 0], return_inverse=True)
        votes_for = torch.searchsorted(wanted, votes).clamp_max(max(0, len(wanted) - 1))
        voting = (wanted[votes_for] == votes).nonzero().flatten() if len(wanted) else votes.new_empty(0)
        order = torch.sort(votes_for[voting], stable=True).indices
        counts = torch.bincount(votes_for[voting], minlength=len(wanted))
        starts = counts.cumsum(0) - counts
        voters, numbered = [], []
        for k in counts.unique().tolist():
            own = (counts == k).nonzero().flatten()
            numbered.append(own)
            voters.append(voting[order[starts[own, None] + torch.arange(k, device=own.device)]])
        renamed = torch.argsort(torch.cat(numbered)) if numbered else place
        decided, rest = (decides >= 0).nonzero().flatten(), (decides < 0).nonzero().flatten()
        gate = torch.full_like(decides, len(wanted))
        sign = renamed[place]
        gate[decided] = sign
        return cls(tuple(voters), decided, sign, rest, torch.argsort(torch.cat([decided, rest])), gate)

    @property
    def signs(self) -> int:
        """How many there are."""
        return sum(map(len, self.voters))

    def to(self, device: torch.device) -> Sharing:
        """The same on a device."""
        others = [each.to(device) for each in (self.decided, self.sign, self.rest, self.inverse, self.gate)]
        return Sharing(tuple(each.to(device) for each in self.voters), *others)


def shared_relu(x: Tensor, sharing: Sharing) -> Tensor:
    """Every decided unit where its sign is positive, 0 where it is not; all others as they are.

    Args:
        x: (B, *shape).
        sharing: Of that shape, on its device.

    Returns:
        (B, *shape).
    """
    flat = x.detach().flatten(1)
    sums = [
        flat.index_select(1, own.flatten()).unflatten(1, own.shape).sum(2) if own.shape[1] > 1 else flat[:, own[:, 0]]
        for own in sharing.voters
    ]
    positive = torch.cat([*(each > 0 for each in sums), flat.new_ones((len(flat), 1), dtype=torch.bool)], 1)
    gate = positive.index_select(1, sharing.gate).view(x.shape)
    if x.ndim == 4 and x.stride(1) == 1 < x.stride(3):
        gate = gate.contiguous(memory_format=torch.channels_last)
    # Not a product: of what is not let through nothing is left, infinities neither.
    return torch.where(gate, x, x.new_zeros(()))
