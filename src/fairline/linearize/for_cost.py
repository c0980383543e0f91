"""Masks for what a network costs: layers are emptied from the end, before a method learns where its ReLUs go.

Under private inference a ReLU costs more than itself. Every layer that keeps any is a level of the protocol, with its
rounds and its matrix product, and what follows the last ReLU is one matrix: so few layers, and early ones, are cheap.
Adam divides a price out again (see ``docs/architecture.md``), so layers are not priced out but emptied, and stay so:

1. *The end.* Stages are emptied from the last one on, as far as the accuracy allows; then blocks of the last stage that
   is left, then layers of its last block. The candidates are nested, so that the furthest is found by bisection.
2. *The rest.* Blocks, then layers, of what is left: each alone is measured, and then they are emptied together in the
   order of what they save for the accuracy that they lose, again as far as it allows.

Accuracy collapses when layers are emptied, and most of it comes back within a fraction of an epoch. So a candidate is
finetuned under distillation on a part of the training images before it is measured on the validation part, and compared
with the network of which nothing is emptied, finetuned likewise. Without a validation part it is measured on images set
aside from the training part; a network that has learned these by heart seems to lose more than it does.

Source: none; the choice is ours. Stages from least to most critical are DeepReDuce's (Jha et al., ICML 2021).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairline._io import load_state, load_tensors, save_state, save_tensors
from fairline.errors import FairlineError
from fairline.inference import group_mean, predict
from fairline.linearize.base import set_aside
from fairline.linearize.structure import blocks_of, close, execution_order, named_stages, stages_of
from fairline.masking import copy_model, masked_relus, relu_count
from fairline.ranks import here
from fairline.training import finetune, named_stage

if TYPE_CHECKING:
    from fairline.linearize.base import Linearization

logger = logging.getLogger(__name__)

#: Units that each masked layer keeps → what the network costs, in any unit.
Cost = Callable[[Mapping[str, int]], float]
#: A masked network and an image of its shape, (1, C, H, W) → its cost.
CostModel = Callable[[nn.Module, Tensor], Cost]

#: What saves less than this share of the cost is not worth a measurement.
WORTHWHILE = 0.01


@dataclass(frozen=True)
class ForCost:
    """Which layers may keep ReLUs, by what they cost and what the network can do without them.

    A candidate costs what a network costs whose ReLUs are spread evenly over the layers that it leaves, as a share of
    the cost with all layers; the mean over the budgets. What is left has ReLUs enough for the largest budget.

    Attributes:
        cost: Predicts the cost, such as :class:`fairline.compiler.PredictedCost`.
        may_lose: Accuracy on the images measured on that the empty layers may cost together, as a share of the images.
        adapt: Part of an epoch that a candidate is finetuned for before it is measured.
        measurements: Candidates to measure, at most.
        held_out: Share of the training part that is set aside where there is no validation part.
        lr: Of the finetune.
        batch_size: Images in its steps.
    """

    cost: CostModel
    may_lose: float = 0.02
    adapt: float = 0.25
    measurements: int = 10
    held_out: float = 0.1
    lr: float = 0.01
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            FairlineError: One of them is impossible.
        """
        if not callable(self.cost):
            raise FairlineError(f"Masks for a cost need a model of it, not {self.cost!r}.")
        if not 0 <= self.may_lose < 1 or not 0 < self.adapt <= 1 or not 0 < self.held_out < 1:
            raise FairlineError(
                "Masks for a cost need may_lose in [0, 1), adapt in (0, 1] and held_out between 0 and 1, "
                f"not {self.may_lose}, {self.adapt} and {self.held_out}."
            )
        if self.measurements < 1 or self.batch_size < 1 or not self.lr > 0:
            raise FairlineError(
                "Masks for a cost need measurements ≥ 1, batch_size ≥ 1 and lr > 0, "
                f"not {self.measurements}, {self.batch_size} and {self.lr}."
            )

    def choose(self, run: Linearization, seed: int) -> None:
        """Empty layers of a run's student, and leave it as it was finetuned for its measurement.

        Args:
            run: Before the method has begun. Its ``choice`` gets a row for each measurement; what an interrupted run
                has measured is read from its folder.
            seed: Of the images that are set aside, and of finetuning.

        Raises:
            FairlineError: No layer can be emptied, or there are too few images to set some aside.
        """
        budget = max(run.budgets)
        if budget == 0:
            return
        least = min(layer.num_kept for layer in masked_relus(run.student).values() if layer.num_kept)
        if run.open - least < budget:
            raise FairlineError(
                f"A budget of {budget} ReLUs leaves no layer to empty: of the network's {run.open} ReLUs the smallest "
                f"layer has {least}; take smaller budgets, or do without masks for a cost."
            )
        search = _Search(self, run, seed)
        search.choose()
        run.choice = search.rows
        run.student = search.student()
        run.emptied = tuple(name for name in search.layers if name in search.emptied)
        run.open = relu_count(run.student)
        logger.info("emptied for the cost: %s", ", ".join(run.emptied) or "nothing")


class _Search:
    """The choice of layers for a run.

    Args:
        settings: What is allowed.
        run: Its student is copied.
        seed: Of the images that are set aside, and of finetuning.

    Attributes:
        layers: Those with ReLUs, in the order of execution.
        emptied: Of them, those emptied so far.
        rows: A row a measurement.
    """

    def __init__(self, settings: ForCost, run: Linearization, seed: int) -> None:
        self.settings, self.run, self.seed = settings, run, seed
        masked = masked_relus(run.student)
        order = execution_order(run.student)
        self.sizes = {name: masked[name].num_kept for name in order if masked[name].num_kept}
        self.layers = list(self.sizes)
        stages = list(stages_of(run.student).values()) if named_stages(run.student) else [order]
        self.stages, self.blocks = self._with_relus(stages), self._with_relus(blocks_of(order))
        if run.val is None:
            self.measuring, training = set_aside(run.train, settings.held_out, seed)
        else:
            shuffled = torch.randperm(len(run.train), generator=torch.Generator().manual_seed(seed))
            self.measuring, training = run.val, run.train.select(shuffled)
        self.training = training.select(torch.arange(max(2, round(settings.adapt * len(training)))))
        self.cost = settings.cost(run.student, run.train.normalized(slice(1)).cpu())
        self.emptied: frozenset[str] = frozenset()
        self.file = run.file("layers")
        # Looked up as if measured anew, so that an interrupted run decides as an unbroken one does.
        self.saved: dict[str, dict[str, Any]] = {row["emptied"]: row for row in here().first(self._saved)}
        self.rows: list[dict[str, Any]] = []
        self.known: dict[str, dict[str, Any]] = {}
        self.costs: dict[frozenset[str], dict[int, float]] = {}

    def _saved(self) -> list[dict[str, Any]]:
        """What an interrupted run has measured."""
        return [] if self.file is None or not self.file.exists() else list(load_state(self.file)["rows"])

    def _with_relus(self, groups: Iterable[Collection[str]]) -> list[frozenset[str]]:
        found = (frozenset(group) & self.sizes.keys() for group in groups)
        return [group for group in found if group]

    def choose(self) -> None:
        """Find where the network's nonlinear part may end, then what may be emptied before that."""
        self._accuracy(frozenset())
        single = [frozenset({name}) for name in self.layers]
        coarser = [frozenset(self.layers)]
        for groups in (self.stages, self.blocks, single):
            last = [group - self.emptied for group in coarser if not group <= self.emptied][-1]
            self._empty_furthest(self._tails([group & last for group in groups if group & last]))
            coarser = groups
        for groups in (self.blocks, single):
            self._empty_best([group - self.emptied for group in groups if not group <= self.emptied])

    def student(self) -> nn.Module:
        """The student with its emptied layers, as it was measured."""
        file = self.run.file("layers-student")
        network = self._emptied(self.emptied)
        state = here().first(lambda: None if file is None or not file.exists() else load_tensors(file)[0])
        if state is not None:
            network.load_state_dict(state)
            return network
        if self.emptied:
            self._adapt(network, "the layers that are left")
        if file is not None:
            save_tensors(file, network.state_dict())
        return network

    def _tails(self, groups: Sequence[frozenset[str]]) -> list[frozenset[str]]:
        """What is emptied with the last groups, from one of them to all but one."""
        tails = [self.emptied]
        for group in reversed(groups[1:]):
            tails.append(tails[-1] | group)
        return tails[1:]

    def _empty_furthest(self, nested: Sequence[frozenset[str]]) -> None:
        """Empty the last candidate whose accuracy is allowed, each holding the one before it."""
        candidates = self._worthwhile(nested)
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high + 1) // 2
            if self._allowed(candidates[middle - 1]):
                low = middle
            else:
                high = middle - 1
        if low:
            self.emptied = candidates[low - 1]

    def _empty_best(self, groups: Sequence[frozenset[str]]) -> None:
        """Empty groups, those first that save most for the accuracy they lose, as long as it is allowed."""
        single = [candidate for group in groups for candidate in self._worthwhile([self.emptied | group])]
        single.sort(key=self.price)
        # Measurements that are left must do for each alone and for the bisection.
        while single and len(single) + len(single).bit_length() - 1 > self._left():
            single.pop()
        before, price = self._accuracy(self.emptied), self.price(self.emptied)
        image = 1 / len(self.measuring)
        worth = {}
        for candidate in single:
            if self._allowed(candidate):
                lost = max(before - self._accuracy(candidate), image)
                worth[candidate] = (price - self.price(candidate)) / lost
        nested: list[frozenset[str]] = []
        for candidate in sorted(worth, key=worth.__getitem__, reverse=True):
            nested.append(candidate if not nested else nested[-1] | candidate)
        self._empty_furthest(nested)

    def _worthwhile(self, nested: Sequence[frozenset[str]]) -> list[frozenset[str]]:
        """Candidates that leave ReLUs enough for the largest budget and save something beside the one before."""
        found, price = [], self.price(self.emptied)
        for candidate in nested:
            if not self._enough(candidate):
                break
            if self.price(candidate) <= price - WORTHWHILE:
                found.append(candidate)
                price = self.price(candidate)
        return found

    def _enough(self, emptied: frozenset[str]) -> bool:
        return sum(size for name, size in self.sizes.items() if name not in emptied) >= max(self.run.budgets)

    def price(self, emptied: frozenset[str]) -> float:
        """What a candidate costs, as a share of the cost with all layers; the mean over the budgets."""
        whole = self._costs(frozenset())
        shares = [cost / whole[budget] for budget, cost in self._costs(emptied).items() if whole[budget] > 0]
        return sum(shares) / len(shares) if shares else 1.0

    def _costs(self, emptied: frozenset[str]) -> dict[int, float]:
        if emptied not in self.costs:
            left = {name: size for name, size in self.sizes.items() if name not in emptied}
            closed = dict.fromkeys(masked_relus(self.run.student), 0)
            self.costs[emptied] = {
                budget: float(self.cost(closed | spread(left, budget))) for budget in self.run.budgets if budget
            }
        return self.costs[emptied]

    def _left(self) -> int:
        return self.settings.measurements - len(self.known)

    def _allowed(self, emptied: frozenset[str]) -> bool:
        """Whether a candidate's accuracy is near enough to that of the network with all layers."""
        if self._key(emptied) not in self.known and self._left() < 1:
            logger.info("no measurement is left for a network without %s", ", ".join(sorted(emptied)))
            return False
        return self._lost(self._accuracy(emptied)) <= self.settings.may_lose

    def _lost(self, accuracy: float) -> float:
        # To whole images, so that rounding decides nothing.
        images = len(self.measuring)
        return round((self._accuracy(frozenset()) - accuracy) * images) / images

    def _key(self, emptied: frozenset[str]) -> str:
        return " ".join(name for name in self.layers if name in emptied)

    def _accuracy(self, emptied: frozenset[str]) -> float:
        """Of a candidate, on the images set aside; measured once."""
        key = self._key(emptied)
        if key not in self.known and key in self.saved:
            self.known[key] = self.saved[key]
            self.rows.append(self.saved[key])
        elif key not in self.known:
            self._measure(emptied, key)
        return float(self.known[key]["accuracy"])

    def _measure(self, emptied: frozenset[str], key: str) -> None:
        network = self._emptied(emptied)
        number = len(self.rows) + 1
        self._adapt(network, f"choosing layers, {number} of at most {self.settings.measurements}")
        right = (self._predict(network).argmax(1).cpu() == self.measuring.labels.cpu()).double()
        by_group = group_mean(right, self.measuring.groups.cpu(), self.measuring.num_groups).tolist()
        row: dict[str, Any] = {
            "measurement": number,
            "emptied": key,
            "layers": len(self.layers) - len(emptied),
            "relus": relu_count(network),
            "accuracy": float(right.mean()),
        }
        self.known[key] = row
        row |= {f"accuracy[{name}]": value for name, value in zip(self.measuring.group_names, by_group, strict=True)}
        row |= {"lost": self._lost(row["accuracy"]), "cost": self.price(emptied)}
        row |= {f"cost[{budget}]": cost for budget, cost in self._costs(emptied).items()}
        row["allowed"] = row["lost"] <= self.settings.may_lose
        self.rows.append(row)
        logger.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
        if self.file is not None:
            save_state(self.file, {"rows": self.rows})

    def _emptied(self, emptied: frozenset[str]) -> nn.Module:
        network = copy_model(self.run.student)
        close(network, emptied)
        return network

    def _adapt(self, network: nn.Module, stage: str) -> None:
        """Distil for a fraction of an epoch."""
        finetune(
            network,
            self.run.teacher,
            self.training,
            epochs=1,
            lr=self.settings.lr,
            batch_size=self.settings.batch_size,
            select="last",
            seed=self.seed,
            device=self.run.device,
            precision=self.run.arithmetic,
            progress=named_stage(self.run.progress, stage),
        )

    def _predict(self, network: nn.Module) -> Tensor:
        where: dict[str, Any] = {"device": self.run.device, "ranks": here()}
        return predict(network, self.measuring, arithmetic=self.run.arithmetic, **where)


def spread(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Divide a budget among layers in proportion to their sizes; fractions go to the largest remainders.

    >>> spread({"a": 100, "b": 50, "c": 30}, budget=18)
    {'a': 10, 'b': 5, 'c': 3}
    >>> spread({"a": 100, "b": 50, "c": 30}, budget=2)
    {'a': 1, 'b': 1, 'c': 0}

    Args:
        sizes: ReLUs of each layer.
        budget: ReLUs to keep, at most their sum.

    Returns:
        ReLUs kept in each layer; their sum is the budget.
    """
    total = sum(sizes.values())
    kept = {name: size * budget // total for name, size in sizes.items()}
    order = sorted(sizes, key=lambda name: -(sizes[name] * budget % total))
    for name in order[: budget - sum(kept.values())]:
        kept[name] += 1
    return kept
