"""ReLUs ranked by a Taylor estimate of the loss that their removal costs, to second order, once or round by round.

In the coordinates of the masks, unit i's output is ``a = m·relu(x) + (1 − m)·g(x)`` and its removal is ``m: 1 → 0``,
which moves it by ``d = g(x) − relu(x)``: for the identity, by min(x, 0). With J the Jacobian of the logits in the
unit's output, p their softmax and means over held-out images, the loss rises by about

    mean ∂ℓ/∂a·d  +  ½ mean (Jd)ᵀ(diag(p) − p·pᵀ)(Jd),

the gradient and the diagonal of the generalized Gauss–Newton matrix (Schraudolph 2002). Of a network that is piecewise
linear, as with the identity for surrogate, the logits are so in each mask entry, and this diagonal is the Hessian's.
The curvature of the cross-entropy has a root with a column for each of the K classes, ``diag(√p) − p·√pᵀ``: K backward
passes give the diagonal exactly for all units at once, and fewer with random signs give it without bias (Hutchinson
1990). What two removals cost together beyond their sum is in no diagonal; it is in the next round's estimate, which is
taken where the last removals led.

So a removal that seems to lower the loss is no gift: units that are chosen for that all push the same way, and together
they overshoot: where many go at once, a loss that the signed estimate expects to fall can rise many times over. Units
are ranked by the absolute first-order term plus the second-order one: how strongly, not which way, a unit pulls.

Source: ReLUPruner (Li, Liu, Wang, Wang and Pan, AAAI 2026), of which the abstract and the published code were read, not
the paper: importances from first and second order, weights of layers, and global masks that close progressively under
distillation. What the code does, and what is done here:

- *Second order*: the code takes ½ E[x²]·E[(∂ℓ/∂a)²] with the gradient of a batch's mean loss; here the Gauss–Newton
  term of each image, so that both terms are nats and may be added.
- *First order*: the code takes E|∂ℓ/∂a·x| times the share of x < 0; here |E ∂ℓ/∂a·d|. ``first="per_image"`` takes
  E|∂ℓ/∂a·d|, and ``"signed"`` E ∂ℓ/∂a·d.
- *Images*: the code measures on training batches, averaged over steps; here on images that are held out.
- *Weights of layers*: the code multiplies by gradient norms, scaled to [0.1, 1.1] and rising with depth; nats need no
  weight, and ``weigh_layers`` has the code's.
- *Rounds*: the code makes all masks anew every 100 steps, so that ReLUs may come back, for a share that falls as a
  cosine; here a share ``rate`` of what is left goes each round and stays away, so that budgets nest, and each is exact.
- *Training*: the code weighs CE by 0.01 to 0.5 and KD by 0.3 to 0.5 over 150 epochs, then finetunes; here CE + T²·KL, a
  few epochs a round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.data.memory import images_at_once
from fairline.errors import FairlineError
from fairline.inference import logits_of, predict, require_classes
from fairline.linearize.base import Cut, Linearization, Linearizer, held_out
from fairline.linearize.ranked import first_of, keep_only, ranking
from fairline.linearize.rounds import Rounds, falling
from fairline.linearize.structure import execution_order
from fairline.masking import MaskedReLU, copy_model, masked_relus, relu_count
from fairline.objectives.base import Objective
from fairline.ranks import here
from fairline.training import choose

logger = logging.getLogger(__name__)

#: How the images' first-order terms are put together.
FirstOrder = Literal["absolute", "per_image", "signed"]
FIRST_ORDER: tuple[FirstOrder, ...] = get_args(FirstOrder)

#: How much more a last layer counts than the first in the published code's weights.
DEPTH = 0.2


@dataclass(kw_only=True)
class Taylor(Linearizer):
    """Remove first what is estimated to matter least to the loss on held-out images. Budgets are exact and nested.

    Attributes:
        rate: Share of the remaining ReLUs that a round removes; fewer where the next budget is nearer. 1 estimates
            once, before anything is removed: every budget is the start of one ranking, weights stay as they are, and
            ``refresh_epochs`` is not used.
        refresh_epochs: Epochs of training after each round; 0 estimates again with the weights as they are.
        order: 1 takes the first-order term alone, 2 both.
        first: The first-order term: ``"absolute"``, the absolute mean over images; ``"per_image"``, the mean of
            absolute values, as the published code; or ``"signed"``, which is the estimate itself.
        weigh_layers: Multiply by the published code's weights of layers.
        probes: Backward passes for the second order, at most: exact where there are no more classes, else an unbiased
            estimate with as many random signs.
        samples: Images to measure on, at most.
        held_out: Share of the training part that is set aside to measure on where there is no validation part.
        lr: Of the training: SGD with momentum 0.9 and weight decay 5e-4, cosine in each round.
        batch_size: Images in a training step.
        objective: Of the training; CE + T²·KL by default. Its state, such as Algorithm 1's λ, lives through all rounds.

    Raises:
        FairlineError: A setting is impossible.
    """

    name = "taylor"
    measures: ClassVar[bool] = True

    rate: float = 0.25
    refresh_epochs: int = 1
    order: int = 2
    first: FirstOrder = "absolute"
    weigh_layers: bool = False
    probes: int = 10
    samples: int = 2000
    held_out: float = 0.1
    lr: float = 5e-3
    batch_size: int = 128
    objective: Objective | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 1 or not 0 < self.held_out < 1 or not self.lr > 0:
            raise FairlineError(
                f"Taylor estimates need rate in (0, 1], held_out in (0, 1) and lr > 0, not {self.rate}, "
                f"{self.held_out} and {self.lr}."
            )
        if self.order not in (1, 2):
            raise FairlineError(f"Taylor estimates are of order 1 or 2, not {self.order}.")
        if self.first not in FIRST_ORDER:
            raise FairlineError(f"A first-order term is {', '.join(FIRST_ORDER)}, not '{self.first}'.")
        for name in ("probes", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise FairlineError(f"Taylor estimates need {name} ≥ 1, not {getattr(self, name)}.")
        if self.refresh_epochs < 0:
            raise FairlineError(f"Taylor estimates need refresh_epochs ≥ 0, not {self.refresh_epochs}.")

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Remove ReLUs, estimate again, train, round by round; or rank once.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget.
        """
        if self.rate < 1:
            yield from _Rounds(self, run).cuts()
            return
        measuring, _ = held_out(run, self.held_out, self.samples, self.seed)
        yield from first_of(ranking(run.student, self.scores(run.student, measuring), self.seed), run, self.name)

    def scores(self, model: nn.Module, data: GroupedData) -> dict[str, Tensor]:
        """What the removal of each unit is ranked by, in nats.

        Args:
            model: Masked, masks fixed; not changed.
            data: Images to measure on.

        Returns:
            For each masked layer float64 of the mask's shape; 0 where the unit is removed already.
        """
        return self.scored(self.terms(model, data), model)

    def terms(self, model: nn.Module, data: GroupedData) -> dict[str, Terms]:
        """What the scores are made of; arguments as there."""
        return taylor_terms(model, data, probes=self.probes if self.order == 2 else 0, seed=self.seed)

    def scored(self, terms: Mapping[str, Terms], model: nn.Module) -> dict[str, Tensor]:
        """The scores of a model's units from their terms."""
        first = {
            "signed": lambda own: own.first,
            "absolute": lambda own: own.first.abs(),
            "per_image": lambda own: own.per_image,
        }[self.first]
        weights = layer_weights(terms, execution_order(model)) if self.weigh_layers else dict.fromkeys(terms, 1.0)
        return {name: (first(own) + own.second) * weights[name] for name, own in terms.items()}


@dataclass(frozen=True)
class Terms:
    """What the removal of each unit of a layer does to the mean loss, to second order.

    Attributes:
        first: Mean of the images' first-order terms ∂ℓ/∂a·d, float64, of the mask's shape.
        per_image: Mean of their absolute values.
        second: Half the diagonal of the Gauss–Newton matrix; 0 if it was not asked for.
        gradient_norm: Mean over the images of ‖∂ℓ/∂a‖ over the layer's units.
        gradient_square: Mean of (∂ℓ/∂a)² over images and units.
    """

    first: Tensor
    per_image: Tensor
    second: Tensor
    gradient_norm: float
    gradient_square: float


def taylor_terms(
    model: nn.Module, data: GroupedData, *, probes: int = 10, seed: int = 0, batch_size: int | None = None
) -> dict[str, Terms]:
    """Estimate what each ReLU's removal does to the mean cross-entropy.

    Args:
        model: Masked, masks fixed; not changed.
        data: Images to measure on; several processes at work together take some of the batches each.
        probes: Backward passes for the second order, at most; 0 leaves it out.
        seed: Of the random signs, where there are more classes than probes.
        batch_size: Images at a time; 250 by default, and 64 on a CPU.

    Returns:
        The terms of each masked layer; 0 for units that are removed already.

    Raises:
        FairlineError: The model has fewer outputs than the data have classes.
    """
    network = copy_model(model).eval().requires_grad_(False)
    device = next(iter(masked_relus(network).values())).kept.device
    dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
    arithmetic = choose("fp32", network, data.normalized(slice(2)).to(device, dtype), device)
    arithmetic.place(network, device)
    layers = {name: layer for name, layer in masked_relus(network).items() if layer.num_kept}
    size = images_at_once(batch_size or (64 if device.type == "cpu" else 250), data.images.shape)
    order = torch.arange(len(data))[here().part(len(data), size)]
    sums = _Sums(layers, masked_relus(network))
    for index, batch in data.batches(order, size) if layers else ():
        images = arithmetic.order(batch.to(device, dtype))
        with _moved(layers) as (displacements, leaves):
            logits = require_classes(logits_of(network(images), network, images), data)
            loss = F.cross_entropy(logits, data.labels[index].to(device), reduction="sum")
            # The loss's gradient comes first, then as many rows of the curvature's root.
            sums.add_first(_gradients(loss, leaves, None), displacements)
            for row, share in _curvature_root(logits.detach(), probes, seed + int(index[0])):
                sums.add_second(_gradients(logits, leaves, row), displacements, share)
    return sums.means(len(data), size)


def layer_weights(terms: Mapping[str, Terms], order: Sequence[str]) -> dict[str, float]:
    """The published code's weights of layers: gradient norm times root of squared gradients, rising with depth.

    Args:
        terms: Of each masked layer.
        order: Names of the layers as a forward pass meets them.

    Returns:
        Weights in [0.1, 1.1]; 1 where all are alike.
    """
    last = max(len(order) - 1, 1)
    raw = {
        name: terms[name].gradient_norm * (terms[name].gradient_square + 1e-8) ** 0.5 * (1 + DEPTH * place / last)
        for place, name in enumerate(order)
    }
    low, high = min(raw.values()), max(raw.values())
    return {name: (value - low) / (high - low) + 0.1 if high > low else 1.0 for name, value in raw.items()}


@contextmanager
def _moved(layers: Mapping[str, MaskedReLU]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Watch a forward pass, and add a zero to the output of each layer.

    The gradient in that zero is the gradient in the output, whatever is done to the output in place afterwards.

    Yields:
        How far each kept unit would move if it were removed, and the zeros; (B, *shape), filled by the pass.
    """
    displacements: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def before(name: str, x: Tensor) -> None:
        layer, seen = layers[name], x.detach()
        displacements[name] = (layer.substitute(seen) - seen.clamp_min(0)) * layer.kept

    def after(name: str, output: Tensor) -> Tensor:
        leaves[name] = torch.zeros_like(output, requires_grad=True)
        return output + leaves[name]

    handles = []
    for each, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda _, given, name=each: before(name, given[0])))
        handles.append(layer.register_forward_hook(lambda _m, _g, output, name=each: after(name, output)))
    try:
        yield displacements, leaves
    finally:
        for handle in handles:
            handle.remove()


def _gradients(output: Tensor, leaves: Mapping[str, Tensor], row: Tensor | None) -> dict[str, Tensor]:
    """Of each image, in the outputs of each masked layer, (B, *shape)."""
    found = torch.autograd.grad(output, tuple(leaves.values()), row, retain_graph=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _curvature_root(logits: Tensor, probes: int, seed: int) -> Iterator[tuple[Tensor, float]]:
    """The columns of diag(√p) − p·√pᵀ of each image; where there are more classes than probes, random sums of them.

    Yields:
        Rows (B, K) and shares: the outer products, weighed and added up, are diag(p) − p·pᵀ, or so in expectation.
    """
    p = logits.double().softmax(1)
    root, classes = p.sqrt(), logits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    for number in range(min(probes, classes)):
        if classes <= probes:
            signs = F.one_hot(torch.full((len(p),), number), classes)
        else:
            signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
        scaled = root * signs.to(p)
        row = scaled - p * scaled.sum(1, keepdim=True)
        yield row.to(logits.dtype), 1.0 if classes <= probes else 1 / probes


class _Sums:
    """Terms, added up over batches.

    Args:
        layers: Layers with ReLUs.
        everywhere: All masked layers.
    """

    def __init__(self, layers: Mapping[str, MaskedReLU], everywhere: Mapping[str, MaskedReLU]) -> None:
        # first, per image and second
        self.units = {
            name: torch.zeros(3, *layer.shape, dtype=torch.float64, device=layer.kept.device)
            for name, layer in everywhere.items()
        }
        # norm and squared norm
        self.norms = {name: torch.zeros(2, dtype=torch.float64, device=own.device) for name, own in self.units.items()}

    def add_first(self, gradients: Mapping[str, Tensor], displacements: Mapping[str, Tensor]) -> None:
        """The gradients of the images' losses."""
        for name, gradient in gradients.items():
            term = gradient * displacements[name]
            self.units[name][0] += term.sum(0)
            self.units[name][1] += term.abs().sum(0)
            norms = gradient.flatten(1).double().norm(dim=1)
            self.norms[name] += torch.stack([norms.sum(), norms.square().sum()])

    def add_second(self, gradients: Mapping[str, Tensor], displacements: Mapping[str, Tensor], share: float) -> None:
        """The gradients along one row of the curvature's root."""
        for name, gradient in gradients.items():
            self.units[name][2] += (gradient * displacements[name]).square().sum(0) * (share / 2)

    def means(self, images: int, batch_size: int) -> dict[str, Terms]:
        """Over all processes' images."""
        found = {}
        for name, own in self.units.items():
            first, per_image, second = here().sum(own, images, batch_size) / images
            norm, square = (here().sum(self.norms[name], images, batch_size) / images).tolist()
            found[name] = Terms(first, per_image, second, norm, square / max(first.numel(), 1))
        return found


class _Rounds(Rounds):
    """Each round removes what is estimated to cost least where the last one led.

    Args:
        method: Settings.
        run: Its student is changed.
    """

    def __init__(self, method: Taylor, run: Linearization) -> None:
        self.method = method
        self.measuring, training = held_out(run, method.held_out, method.samples, method.seed)
        super().__init__(
            method.name,
            run,
            falling(relu_count(run.student), [budget for budget in run.asked if budget < run.open], method.rate),
            training,
            epochs=method.refresh_epochs,
            lr=method.lr,
            batch_size=method.batch_size,
            objective=method.objective,
            seed=method.seed,
        )

    def remove(self) -> None:
        """Remove the next round's ReLUs, and begin its row with what was estimated and what it did cost."""
        student, target = self.run.student, self.plan[self.removed]
        self.removed += 1
        terms = self.method.terms(student, self.measuring)
        order = ranking(student, self.method.scored(terms, student), self.method.seed + 1000 * self.removed)
        before = self._loss()
        keep_only(student, order[:target])
        # A last bit may decide between two ReLUs.
        here().agree(student)
        rises = torch.cat([(own.first + own.second).flatten().cpu() for own in terms.values()])
        row: dict[str, Any] = {
            "round": self.removed,
            "relus": target,
            "layers": sum(layer.num_kept > 0 for layer in masked_relus(student).values()),
            "held_out_loss": before,
            "estimated_rise": float(rises[order[target:]].sum()),
            "rise": self._loss() - before,
        }
        self.rows.append(row)
        logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def _loss(self) -> float:
        """On the images that are measured on, in nats."""
        data = self.measuring
        logits = predict(self.run.student, data, ranks=here())
        return float(F.cross_entropy(logits.double(), data.labels.to(logits.device)))
