"""DELPHI's planner (Mishra, Lehmkuhl, Srinivasan, Zheng and Popa, USENIX Security 2020): which layers become quadratic.

A layer keeps all of its ReLUs or becomes a quadratic polynomial. Which, is searched for by population-based training
(:mod:`~fairline.linearize.population`) over the accuracy on held-out data; networks with quadratic layers are trained
by exchanging activations gradually, ``m·relu(x) + (1 − m)·g(x)`` with m from 1 to 0, and with clipped gradients, since
quadratic networks diverge otherwise.

Taken from the description (from memory and from how later papers tell it; no code of the planner is public): the choice
by layers, the population, the score on held-out data, gradual exchange, clipping. Open there or different here:

- *The search is for a ReLU budget*, the accuracy the score; the description asks for the fewest ReLUs at an accuracy
  that it is told. ``cost`` and ``price`` score what a network costs as well.
- *A plan is an order of the layers*: they keep their ReLUs in this order as far as the budget goes. So a plan means
  something for every budget, and a change moves one layer in it.
- *Budgets are filled* by a random part of the layer at which one ends, so that methods compare at equal cost
  (``exact``); without it whole layers alone keep ReLUs, and what a network keeps is the most that its order allows.
- *The polynomial* is each channel's fit with coefficients that are learned, as everywhere here; theirs is the square.
- *Learning rates and other hyperparameters* are not searched for.
- *Training continues*: a member goes on from its parent's weights, and so does the finetune that follows. Momentum
  starts anew in each generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fairline.linearize.base import Linearization
from fairline.linearize.population import Plan, Planner, PopulationSearch
from fairline.linearize.structure import execution_order
from fairline.masking import Surrogate, masked_relus

#: Changes of a plan to try before one that changes no mask is taken.
_TRIES = 20


@dataclass(kw_only=True)
class Delphi(PopulationSearch):
    """Search for the layers that become quadratic. :class:`PopulationSearch` lists all other settings.

    Attributes:
        exact: Fill each budget with a random part of the layer at which it ends.
        surrogate: What a layer without ReLUs computes: ``"quadratic"``, as published, or another.
    """

    name = "delphi"
    title: ClassVar[str] = "DELPHI"

    exact: bool = True
    surrogate: Surrogate = "quadratic"

    def planner(self, run: Linearization) -> Planner:
        """Orders of the layers.

        Args:
            run: What there is to work with.

        Returns:
            What makes them.
        """
        return _Orders(run, exact=self.exact, seed=self.seed)


class _Orders(Planner):
    """Plans that are orders of the layers; they keep ReLUs in it."""

    def __init__(self, run: Linearization, *, exact: bool, seed: int) -> None:
        masked = masked_relus(run.student)
        self.there = {name: masked[name].kept.cpu() for name in execution_order(run.student)}
        self.sizes = {name: int(kept.sum()) for name, kept in self.there.items() if kept.any()}
        self.exact, self.seed = exact, seed

    def first(self, place: int, generator: torch.Generator) -> Plan:
        """Any order."""
        layers = list(self.sizes)
        return [layers[index] for index in torch.randperm(len(layers), generator=generator).tolist()]

    def changed(self, plan: Plan, budget: int, generator: torch.Generator) -> Plan:
        """One layer, moved so that other layers keep ReLUs, where that can be."""
        before, order = self.kept(plan, budget), list(plan)
        for _ in range(_TRIES):
            order = list(plan)
            start, stop = torch.randint(len(order), (2,), generator=generator).tolist()
            order.insert(stop, order.pop(start))
            if self.kept(order, budget) != before:
                break
        return order

    def kept(self, plan: Plan, budget: int) -> dict[str, int]:
        """How many ReLUs each layer keeps."""
        found, left = {}, budget
        for name in plan:
            size = self.sizes[name]
            found[name] = min(size, left) if self.exact else size if size <= left else 0
            left -= found[name]
        return found

    def arrange(self, network: nn.Module, plan: Plan, budget: int) -> Mapping[str, Tensor]:
        """The masks of an order."""
        counts = self.kept(plan, budget)
        return {name: _part(there, counts.get(name, 0), self.seed) for name, there in self.there.items()}

    def facts(self, network: nn.Module) -> dict[str, Any]:
        """Which layers keep ReLUs, and which of those not all."""
        layers = masked_relus(network)
        partly = [name for name, size in self.sizes.items() if 0 < layers[name].num_kept < size]
        return {**super().facts(network), "partly": " ".join(partly)}


def _part(there: Tensor, count: int, seed: int) -> Tensor:
    """A mask that keeps so many of the units that are there, at random."""
    open_units = there.flatten().nonzero().flatten()
    chosen = open_units[torch.randperm(len(open_units), generator=torch.Generator().manual_seed(seed))[:count]]
    mask = torch.zeros(there.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(there.shape)
