"""Coordinate descent on the binary mask, after Rakhlin, Jevnisek and Avidan (2025, arXiv 2511.11781).

The mask is binary throughout, so no threshold at the end costs accuracy. ReLUs go a block at a time: random blocks are
tried one after the other, and the first whose removal costs less than ``tolerance`` of the accuracy on the training set
is removed, or else the one that costs least. After each round the weights are refreshed under distillation.

Where the description and the published code leave something open or differ, this is what is done here:

- *Where to start*: from the network that is given. The authors start from one that SNL has linearized to some thousand
  ReLUs more than the budget, with the whole network as the teacher (``teacher``); with their steps of 100 ReLUs and 20
  epochs a step, a whole network takes thousands of epochs. ``rate`` makes the steps larger while there are many ReLUs.
- *What a cost is compared to*: the accuracy before the block was removed; in the published code it is that of the
  candidate tried last.
- *Which grid point*: steps of 100, 50 candidates and 0.3 points, one of many in their scripts; which one made which
  table is not said.
- *The refresh*: SGD with a cosine schedule of its own after each removal, as published; its last epoch is kept, where
  the published code also writes down the best on the test set.

``within_layers`` is ours, and cheaper: a block lies in one layer, so that it is tried from cached activations, and on
one batch, by the objective's loss. It empties layers without being asked, since one block can hold all that a layer has
left.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import logits_of, predict
from fairline.linearize.base import Cut, Linearization, Linearizer, set_aside
from fairline.linearize.rounds import Rounds, falling
from fairline.masking import masked_graph, masked_relus, relu_count
from fairline.objectives.base import Batch, Objective
from fairline.ranks import here

logger = logging.getLogger(__name__)

#: In-place functions and what computes the same without touching a cached activation.
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


@dataclass
class CoordinateDescent(Linearizer):
    """Remove ReLUs greedily, in rounds.

    Attributes:
        step: ReLUs that a round removes; fewer where the next budget is nearer.
        rate: Share of the remaining ReLUs that a round removes in place of ``step``, if that is more.
        blocks: Blocks that a round removes, one after the other; 1 as published.
        candidates: Blocks that are tried for each one removed, at most.
        tolerance: A candidate that costs less accuracy (in [0, 1]) is removed at once.
        samples: Training images that candidates are tried on, drawn anew for each block; all, as published, by default.
        held_out: Share of the training part that is set aside for trying candidates; 0, as published, tries them on the
            training images themselves.
        refresh_epochs: Epochs of training after each round.
        lr: Of the refresh: SGD with momentum 0.9 and weight decay 5e-4, cosine.
        batch_size: Samples in a training step.
        within_layers: Draw each block from one layer, a layer in proportion to the ReLUs that it still has, and try it
            by the objective's mean loss on ``batch_size`` images; ``tolerance`` and ``samples`` are not used. Ours.
        empty_layers: Deployment-aware, within layers only: nats that a candidate is credited for the share of its
            layer's remaining ReLUs that it removes; the block that empties a layer, which saves protocol rounds, gets
            all of it. Layers are then drawn with equal probability, so that those nearly empty are tried too.
        objective: Of the refresh, and within layers whose mean loss decides; CE + T²·KL by default. Its state, such as
            λ of Algorithm 1, lives through all rounds.
        surrogate: What stands in a ReLU's place: ``"identity"``, as published, or another, fitted and learned.
        teacher: Source of distillation; the network itself, before this run, by default.
        seed: Of the whole run.
    """

    name = "coordinate_descent"

    step: int = 100
    rate: float = 0.0
    blocks: int = 1
    candidates: int = 50
    tolerance: float = 3e-3
    samples: int | None = None
    held_out: float = 0.0
    refresh_epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 128
    within_layers: bool = False
    empty_layers: float = 0.0
    objective: Objective | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.rate < 1 and 0 <= self.held_out < 1):
            raise FairlineError(
                f"Coordinate descent needs rate and held_out in [0, 1), not {self.rate} and {self.held_out}."
            )
        for name in ("step", "blocks", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise FairlineError(f"Coordinate descent needs {name} ≥ 1, not {getattr(self, name)}.")
        if not 0 <= self.tolerance <= 1 or (self.samples is not None and self.samples < 1):
            raise FairlineError(
                f"Coordinate descent needs tolerance in [0, 1] and samples ≥ 1, "
                f"not {self.tolerance} and {self.samples}."
            )
        if not self.empty_layers >= 0:
            raise FairlineError(f"Coordinate descent needs empty_layers ≥ 0, not {self.empty_layers}.")
        if self.empty_layers > 0 and not self.within_layers:
            raise FairlineError(
                "Coordinate descent empties layers only where a block lies in one layer: set within_layers beside "
                "empty_layers."
            )
        if self.refresh_epochs < 0 or not self.lr > 0:
            raise FairlineError(
                f"Coordinate descent needs refresh_epochs ≥ 0 and lr > 0, not {self.refresh_epochs} and {self.lr}."
            )

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Remove ReLUs and refresh the weights, round by round.

        Args:
            run: What there is to work with.

        Yields:
            A network for each budget, after the round that ends at it.
        """
        yield from _Rounds(self, run).cuts()

    def plan(self, count: int, budgets: list[int]) -> list[int]:
        """ReLUs after each round; every budget is among them.

        Args:
            count: ReLUs at the start.
            budgets: Counts below it, from the largest on.

        Returns:
            The counts, falling.

        Examples:
            >>> CoordinateDescent(step=100).plan(1000, [750, 700])
            [900, 800, 750, 700]
            >>> CoordinateDescent(step=100, rate=0.5).plan(1000, [100])
            [500, 250, 125, 100]
        """
        return falling(count, budgets, self.rate, self.step)


class _Rounds(Rounds):
    """Removes what costs least of the sets that are drawn.

    Args:
        method: Settings.
        run: Its student is changed.
    """

    def __init__(self, method: CoordinateDescent, run: Linearization) -> None:
        self.method = method
        self.trying, training = run.train, run.train
        if method.held_out > 0:
            self.trying, training = set_aside(run.train, method.held_out, method.seed)
        super().__init__(
            method.name,
            run,
            method.plan(relu_count(run.student), [budget for budget in run.asked if budget < run.open]),
            training,
            epochs=method.refresh_epochs,
            lr=method.lr,
            batch_size=method.batch_size,
            objective=method.objective,
            seed=method.seed,
        )
        # Blocks within a layer are tried under the objective, the first ones before the loop has shown it the teacher.
        if method.within_layers and getattr(self.objective, "sees_teacher", False):
            seen = (training if run.val is None else run.val).to(run.device)
            self.objective.see_teacher(predict(run.teacher, seen), seen, run.val is not None)

    def remove(self) -> None:
        """Remove the next round's ReLUs, and begin its row."""
        student, target = self.run.student, self.plan[self.removed]
        self.removed += 1
        generator = torch.Generator().manual_seed(self.method.seed + 1000 * self.removed)
        count = relu_count(student) - target
        size = -(-count // self.method.blocks)
        tried, value = 0, 0.0
        take = self._take_within_a_layer if self.method.within_layers else self._take_anywhere
        while count > 0:
            removed, more, value = take(min(size, count), generator)
            count, tried = count - removed, tried + more
        # A last bit may decide between two candidates.
        here().agree(student)
        measure = "loss_when_removed" if self.method.within_layers else "accuracy_when_removed"
        used = sum(layer.num_kept > 0 for layer in masked_relus(student).values())
        self.rows.append({"round": self.removed, "relus": target, "layers": used, measure: value, "tried": tried})
        logger.info("round %d: %d ReLUs, %s %.4f", self.removed, target, measure.replace("_", " "), value)

    def _take_anywhere(self, size: int, generator: torch.Generator) -> tuple[int, int, float]:
        """Remove a block of all layers; how many ReLUs went, how many blocks were tried, and the accuracy it leaves."""
        student, data, method = self.run.student, self.trying, self.method
        if method.samples is not None:
            data = data.select(torch.randperm(len(data), generator=generator)[: method.samples])
        before = {name: layer.kept for name, layer in masked_relus(student).items()}
        enough = _accuracy(student, data) - method.tolerance
        best, chosen, tried = -1.0, before, 0
        while tried < method.candidates and best <= enough:
            masks = draw_anywhere(before, size, generator)
            _set(student, masks)
            accuracy = _accuracy(student, data)
            tried += 1
            if accuracy > best:
                best, chosen = accuracy, masks
        _set(student, chosen)
        return size, tried, best

    def _take_within_a_layer(self, size: int, generator: torch.Generator) -> tuple[int, int, float]:
        """Remove a block of one layer; how many ReLUs went, how many blocks were tried, and the loss it leaves."""
        student, data, method = self.run.student, self.trying, self.method
        layers = masked_relus(student)
        student.eval()
        index = torch.randperm(len(data), generator=generator)[: method.batch_size].to(data.device)
        batch = Batch(data.normalized(index), data.labels[index], data.groups[index], index)
        options = []
        with torch.no_grad():
            targets = logits_of(self.run.teacher(batch.images), self.run.teacher, batch.images).float()
            evaluate = cached_forward(student, batch.images)
            for _ in range(method.candidates):
                name, units = draw_within_a_layer(layers, size, generator, evenly=method.empty_layers > 0)
                kept = layers[name].kept
                without = kept.clone().view(-1)
                without[units.to(without.device)] = False
                layers[name].set_mask(without.view(kept.shape))
                loss = float(self.objective.losses(evaluate(name).float(), targets, batch).mean())
                credit = method.empty_layers * len(units) / int(kept.sum())
                options.append((loss - credit, loss, name, without.view(kept.shape), len(units)))
                layers[name].set_mask(kept)
        _, loss, name, mask, removed = min(options, key=lambda option: option[0])
        layers[name].set_mask(mask)
        return removed, len(options), loss


def _accuracy(model: nn.Module, data: GroupedData) -> float:
    return float((predict(model, data).argmax(1) == data.labels).double().mean())


def _set(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, layer in masked_relus(model).items():
        layer.set_mask(masks[name])


def draw_anywhere(kept: Mapping[str, Tensor], size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks without ``size`` of the ReLUs that they keep, drawn with equal probability over all layers.

    Args:
        kept: Mask of each layer, bool.
        size: How many, at most as many as there are.
        generator: On the CPU.

    Returns:
        The masks that are left.
    """
    flat = torch.cat([mask.flatten().cpu() for mask in kept.values()])
    there = flat.nonzero().flatten()
    flat[there[torch.randperm(len(there), generator=generator)[:size]]] = False
    parts = flat.split([mask.numel() for mask in kept.values()])
    return {name: part.view(mask.shape) for (name, mask), part in zip(kept.items(), parts, strict=True)}


def draw_within_a_layer(
    layers: Mapping[str, Any], size: int, generator: torch.Generator, *, evenly: bool = False
) -> tuple[str, Tensor]:
    """A random layer, in proportion to the ReLUs that it keeps or evenly, and up to ``size`` of them.

    Args:
        layers: Masked ReLUs by name.
        size: How many, at most.
        generator: On the CPU.
        evenly: Draw every layer that has any with the same probability.

    Returns:
        The layer's name, and positions in its flat mask.
    """
    names = list(layers)
    weights = torch.tensor([float(layers[name].num_kept) for name in names])
    name = names[int(torch.multinomial(weights.clamp_max(1) if evenly else weights, 1, generator=generator))]
    kept = layers[name].kept.flatten().nonzero().flatten().cpu()
    return name, kept[torch.randperm(len(kept), generator=generator)[:size]]


def cached_forward(model: nn.Module, images: Tensor) -> Callable[[str], Tensor]:
    """A forward pass that can be repeated from a masked layer on, whatever came before it taken from a first pass.

    Args:
        model: From :func:`~fairline.masking.mask_relus`, in evaluation mode.
        images: (B, C, H, W).

    Returns:
        A function of a masked layer's name: the logits under the masks as they are now, provided that only that layer's
        mask has changed. Models that ``torch.fx`` could not trace, or that change an activation in place, are run
        whole.
    """
    pure = _pure_graph(model, images[:2])
    if pure is None:
        return lambda _name: logits_of(model(images), model, images)
    graph = pure.graph
    interpreter = fx.Interpreter(pure, garbage_collect_values=False)
    interpreter.run(images)
    values = dict(interpreter.env)
    position = {node: number for number, node in enumerate(graph.nodes)}
    sites = {node.target: position[node] for node in graph.nodes if node.op == "call_module"}

    def forward(name: str) -> Tensor:
        before = {node: value for node, value in values.items() if position[node] < sites[name]}
        return logits_of(fx.Interpreter(pure).run(images, initial_env=before), model, images)

    return forward


def _pure_graph(model: nn.Module, images: Tensor) -> fx.GraphModule | None:
    """The model's graph without in-place operations; None where there is no graph, or no way to avoid one."""
    traced = masked_graph(model, images)
    if traced is None:
        return None
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        in_place = node.op == "call_method" and str(node.target).endswith("_")
        if node.op == "call_module":
            in_place = bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
        if in_place or node.kwargs.get("inplace"):
            return None
    traced.recompile()
    return traced
