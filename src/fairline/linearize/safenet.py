"""SAFENet (Lou, Shen, Jin and Jiang, ICLR 2021): each channel keeps its ReLUs or gets a polynomial of its own degree.

The most useful channels keep their ReLUs; the others become a cubic, a quadratic or zero. How many of a layer's
channels are replaced differs from layer to layer, and is found by population-based hyperparameter optimisation
(:mod:`~fairline.linearize.population`).

Taken from the abstract and from how later papers tell it: channels as the unit, polynomials of several degrees, shares
by layer, an automatic search for them. The algorithm's details could not be read again, and no code is public. Chosen
here:

- *How useful a channel is*: what its ReLUs' removal does to the loss, estimated on training images as
  ``E[(∂L/∂y)²·(relu(x) − g(x))²]``, a sum over its units, with g the best of its polynomials; per ReLU.
- *Which degree*: the lowest whose estimate is worse than the best one's by at most ``slack`` times what a channel that
  is cut has in the mean. So zero is for channels that hardly matter, cubics for those that matter most.
- *A plan* has two numbers a layer. By one all its channels count for more or less than they were estimated to, so that
  it keeps more or fewer of them; the other is its slack. The first plan takes the estimates as they are.
- *The budget* is of ReLUs, and met as nearly as whole channels allow, never exceeded.
- *Gradual exchange* of activations and clipped gradients, as in DELPHI's planner.
- *A network that is linearized already*: channels that have lost ReLUs keep what stands in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import logits_of
from fairline.linearize.base import Linearization
from fairline.linearize.population import Plan, Planner, PopulationSearch
from fairline.linearize.surrogates import cut, errors, fit, moments_of, of_degree, put
from fairline.masking import (
    OF_DEGREE,
    SURROGATES,
    Surrogate,
    copy_model,
    keep_largest,
    mask_relus,
    masked_relus,
)

#: Added to estimates, so that channels that never matter have a logarithm.
_LEAST = 1e-30


@dataclass(kw_only=True)
class SAFENet(PopulationSearch):
    """Search for the channels that are replaced, each by a polynomial of its own degree.

    :class:`PopulationSearch` lists all other settings.

    Attributes:
        samples: Training images that usefulness is estimated on, at most.
        slack: At the start, how much worse than the best polynomial one of a lower degree may be, as a share of the
            mean estimate of the channels that are cut.
        spread: Standard deviation of a change to how much a layer's channels count, in logarithms.
        surrogate: The highest degree: ``"cubic"``, as published, or ``"quadratic"``.
    """

    name = "safenet"
    title: ClassVar[str] = "SAFENet"

    samples: int = 1000
    slack: float = 0.1
    spread: float = 1.0
    surrogate: Surrogate = "cubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not SURROGATES[self.surrogate].learned:
            raise FairlineError(
                "SAFENet chooses among zero and polynomials up to surrogate='quadratic' or 'cubic', not "
                f"'{self.surrogate}'."
            )
        if self.samples < 1 or not self.slack >= 0 or not self.spread >= 0:
            raise FairlineError(
                f"SAFENet needs samples ≥ 1, slack ≥ 0 and spread ≥ 0, not {self.samples}, {self.slack} and "
                f"{self.spread}."
            )

    def start(self, model: nn.Module, train: GroupedData, device: torch.device) -> nn.Module:
        """A masked copy of the network; what stands in the place of ReLUs that were cut before stays.

        Args:
            model: The network.
            train: Training part.
            device: Where to put it.

        Returns:
            The student.
        """
        return mask_relus(model, train.normalized(slice(2))).to(device)

    def planner(self, run: Linearization) -> Planner:
        """Estimates how useful channels are.

        Args:
            run: What there is to work with.

        Returns:
            What makes plans of it.
        """
        return _Channels(run, self)


class _Channels(Planner):
    """Plans that say how much a layer's channels count, and how low their degrees may be."""

    def __init__(self, run: Linearization, settings: SAFENet) -> None:
        self.student, self.settings = run.student, settings
        highest = SURROGATES[settings.surrogate].degree
        self.degrees = [0, *range(2, highest + 1)]
        plain, weighted = loss_moments(run.student, run.train, highest, samples=settings.samples, seed=settings.seed)
        self.moments = plain
        #: Of each layer, (degrees, C): the estimate for each degree.
        self.estimates = {
            name: torch.stack([estimated(plain[name], weighted[name], degree) for degree in self.degrees])
            for name in plain
        }
        self.layers = [name for name, layer in masked_relus(run.student).items() if layer.num_kept]

    def first(self, place: int, generator: torch.Generator) -> Plan:
        """The estimates as they are, and changes of that."""
        plan = {name: [0.0, self.settings.slack] for name in self.layers}
        return plan if place == 1 else self.changed(plan, 0, generator)

    def changed(self, plan: Plan, budget: int, generator: torch.Generator) -> Plan:
        """Both numbers of every second layer, at random."""
        chosen = torch.rand(len(plan), generator=generator) < 0.5
        shifts = (self.settings.spread * torch.randn(len(plan), generator=generator)).tolist()
        doubled = (torch.rand(len(plan), generator=generator) < 0.5).tolist()
        return {
            name: [shift + more, slack * (2 if up else 0.5)] if change else [shift, slack]
            for (name, (shift, slack)), change, more, up in zip(
                plan.items(), chosen.tolist(), shifts, doubled, strict=True
            )
        }

    def arrange(self, network: nn.Module, plan: Plan, budget: int) -> Mapping[str, Tensor]:
        """The masks of a plan; channels that are not cut yet get its degrees, and fits where these are new."""
        chosen, ranks = copy_model(self.student), {}
        for name, layer in masked_relus(chosen).items():
            layer.learn("channel")
            best = self.estimates[name].amin(0) / layer.covered().flatten().clamp_min(1).cpu()
            ranks[name] = (best + _LEAST).log() + plan.get(name, [0.0])[0]
        keep_largest(chosen, budget, ranks)
        start = masked_relus(self.student)
        lost = [self.estimates[name].amin(0)[cut(layer).cpu()] for name, layer in masked_relus(chosen).items()]
        mean = torch.cat(lost).mean().nan_to_num(0.0)
        for name, layer in masked_relus(network).items():
            before = layer.channel_degrees
            wanted = self._lowest(name, plan[name][1] * mean).to(before) if name in plan else before
            wanted = torch.where(cut(start[name]), before, wanted)
            if not torch.equal(wanted, before) or layer.degrees is None:
                layer.use_degrees(wanted)
            if layer.coefficients is not None:
                put(layer, self.moments[name], wanted != before)
        return {name: layer.kept for name, layer in masked_relus(chosen).items()}

    def _lowest(self, name: str, more: Tensor) -> Tensor:
        """The lowest degree of each channel that is worse than the best by so much at most, int64, (C,)."""
        estimates = self.estimates[name]
        enough = estimates <= estimates.amin(0) + more + _LEAST
        return torch.tensor(self.degrees)[enough.int().argmax(0)]

    def facts(self, network: nn.Module) -> dict[str, Any]:
        """Which layers keep ReLUs, and how many channels have lost theirs to a polynomial of each degree."""
        counts = dict.fromkeys(range(4), 0)
        for layer in masked_relus(network).values():
            for degree in layer.channel_degrees[cut(layer)].tolist():
                counts[degree] += 1
        told = {f"channels_{OF_DEGREE[degree]}": count for degree, count in counts.items() if degree != 1 or count}
        return {**super().facts(network), **told}


def estimated(plain: Tensor, weighted: Tensor, degree: int) -> Tensor:
    """What it does to the loss that a channel's ReLUs become polynomials, a number a channel.

    Args:
        plain: Moments that a polynomial is fitted to, (C, 3d + 2).
        weighted: Moments with the squared gradients as weights, of the same shape.
        degree: Of the polynomial, at most d; 0 for zero.

    Returns:
        float64, (C,).
    """
    if degree == 0:
        return errors(plain.new_zeros(len(plain), 1), weighted)
    return errors(fit(of_degree(plain, degree)), weighted)


def loss_moments(
    model: nn.Module, data: GroupedData, degree: int, *, samples: int = 1000, seed: int = 0, batch_size: int = 100
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Moments of every layer's pre-activations, as they are and weighted by the squared gradients of the loss.

    Args:
        model: Masked; evaluated as its masks are now.
        data: On the model's device.
        degree: Of the fits that they are for.
        samples: Images, at most.
        seed: Of their choice.
        batch_size: Images at a time.

    Returns:
        By layer, float64, (C, 3·degree + 2) each: means over images. The gradients are those of each image's
        cross-entropy by what the layer gives.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples]
    probes: dict[str, tuple[Tensor, Tensor]] = {}

    def probe(name: str, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added = torch.zeros_like(output, requires_grad=True)
        probes[name] = (arguments[0].detach(), added)
        return output + added

    handles = [
        layer.register_forward_hook(lambda _, arguments, output, name=name: probe(name, arguments, output))
        for name, layer in masked_relus(model).items()
    ]
    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    was_training = model.training
    model.eval()
    try:
        for index in order.to(data.device).split(batch_size):
            images = data.normalized(index)
            with torch.enable_grad():
                loss = F.cross_entropy(logits_of(model(images), model, images), data.labels[index], reduction="sum")
            gradients = torch.autograd.grad(loss, [added for _, added in probes.values()], allow_unused=True)
            for (name, (x, added)), gradient in zip(probes.items(), gradients, strict=True):
                weight = torch.zeros_like(added) if gradient is None else gradient.square()
                for total, own in zip(sums, (None, weight), strict=True):
                    found = moments_of(x, degree, own) / len(order)
                    total[name] = total[name] + found if name in total else found
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return sums
