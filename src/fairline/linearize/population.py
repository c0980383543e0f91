"""Methods that search for a plan with a population of networks (population-based training, Jaderberg et al. 2017).

A plan says which units keep their ReLU. Each member of the population is a network with a plan. In every generation all
members are trained under distillation for a while, at first with the masks on their way to the plan
(:mod:`~fairline.linearize.exchange`), and scored on held-out images. The worse part of the population is then replaced:
each of its members goes on from the weights of one of the best, with that one's plan changed a little. At the end the
best member of the last generation is what is found.

The search for a smaller budget goes on from the last population of the one before.

Source: the scheme is Jaderberg et al.'s, from memory; their hyperparameters are plans here, and the rule of succession
is their truncation selection.
"""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from fairline._io import load_state, load_tensors, save_state, save_tensors
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean, predict
from fairline.linearize.base import Cut, Linearization, Linearizer, set_aside
from fairline.linearize.exchange import Exchange
from fairline.linearize.for_cost import CostModel
from fairline.masking import copy_model, masked_relus, relu_count
from fairline.objectives.erm import ERM
from fairline.ranks import here
from fairline.training import Diverged, cut_gradients, named_stage, run_epochs

logger = logging.getLogger(__name__)

#: A plan, as plain JSON.
Plan = Any
#: A member's budget, generation (from 1) and place (from 1).
Key = tuple[int, int, int]


@dataclass
class Member:
    """A network of a population, with its plan.

    Attributes:
        key: Its budget, generation and place.
        plan: What it was trained to.
        score: Of that generation.
        state: Its tensors on the CPU; None while they lie in the checkpoint folder alone.
    """

    key: Key
    plan: Plan
    score: float
    state: dict[str, Tensor] | None = field(default=None, repr=False)


class Planner(ABC):
    """Makes plans for a run's student, and says what they mean."""

    @abstractmethod
    def first(self, place: int, generator: torch.Generator) -> Plan:
        """A plan to begin with.

        Args:
            place: Of the member, from 1.
            generator: For every random choice.

        Returns:
            The plan.
        """

    @abstractmethod
    def changed(self, plan: Plan, budget: int, generator: torch.Generator) -> Plan:
        """A plan a little different from another.

        Args:
            plan: The other.
            budget: ReLUs.
            generator: For every random choice.

        Returns:
            The plan.
        """

    @abstractmethod
    def arrange(self, network: nn.Module, plan: Plan, budget: int) -> Mapping[str, Tensor]:
        """The masks that a plan gives; and surrogates, which are set at once.

        Args:
            network: A member as it has been trained so far, on the run's device; its surrogates may be changed.
            plan: What it will be trained to.
            budget: ReLUs, at most.

        Returns:
            bool, of each layer's shape.
        """

    def facts(self, network: nn.Module) -> dict[str, Any]:
        """What to say of a network that has its plan, as plain JSON; by default which layers keep ReLUs."""
        return {"keeps": " ".join(name for name, layer in masked_relus(network).items() if layer.num_kept)}


@dataclass(kw_only=True)
class PopulationSearch(Linearizer):
    """Search for a plan with a population of networks; subclasses say what a plan is.

    A budget takes ``population × generations × period`` epochs. ``history`` has a row for each member of each
    generation: where it came from, what it keeps, its accuracy on the held-out images as a whole and by group, and its
    score.

    Attributes:
        population: Networks.
        generations: How often each of them is trained and scored, for each budget.
        period: Epochs of training in a generation; a fraction takes part of the images, other ones each time.
        exchange: Share of a period's steps in which units that change move from one activation to the other.
        replaced: Share of the population that gives way after each generation.
        held_out: Share of the training part that is scored on where there is no validation part.
        cost: Predicts what a network costs (:class:`fairline.compiler.PredictedCost`); on the command line the name of
            a protocol. Where given, a score is the accuracy less ``price`` times the cost, as a share of the cost of
            the network with all the ReLUs that it has.
        price: Accuracy that the cost of the whole network is worth.
        lr: Of SGD with momentum 0.9.
        weight_decay: Of SGD.
        clip: Norm that gradients are cut to in each step, since squares of squares make large ones.
        batch_size: Samples in a step.
    """

    measures: ClassVar[bool] = True

    population: int = 6
    generations: int = 4
    period: float = 0.5
    exchange: float = 0.5
    replaced: float = 0.5
    held_out: float = 0.1
    cost: CostModel | None = None
    price: float = 0.1
    lr: float = 0.01
    weight_decay: float = 5e-4
    clip: float = 1.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population < 2 or self.generations < 1 or self.batch_size < 1:
            raise FairlineError(
                f"{self.title} needs population ≥ 2, generations ≥ 1 and batch_size ≥ 1, not {self.population}, "
                f"{self.generations} and {self.batch_size}."
            )
        if not self.period > 0 or not 0 <= self.exchange <= 1 or not 0 < self.replaced < 1 or not 0 < self.held_out < 1:
            raise FairlineError(
                f"{self.title} needs period > 0, exchange in [0, 1], replaced and held_out between 0 and 1, not "
                f"{self.period}, {self.exchange}, {self.replaced} and {self.held_out}."
            )
        if not self.lr > 0 or not self.clip > 0 or not self.weight_decay >= 0 or not self.price >= 0:
            raise FairlineError(
                f"{self.title} needs lr > 0, clip > 0, weight_decay ≥ 0 and price ≥ 0, not {self.lr}, {self.clip}, "
                f"{self.weight_decay} and {self.price}."
            )
        if self.cost is not None and not callable(self.cost):
            raise FairlineError(f"{self.title} needs a model of the cost, not {self.cost!r}.")

    #: In sentences.
    title: ClassVar[str] = ""

    @abstractmethod
    def planner(self, run: Linearization) -> Planner:
        """What makes plans for a run; called once.

        Args:
            run: What there is to work with.
        """

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Search for each budget.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget; ``info["accuracy"]`` is what it had on the held-out images, of the base network
            ``info["accuracy_before"]``.

        Raises:
            FairlineError: There are too few images to set some aside, or no member could be trained.
        """
        search = _Search(self, run)
        members: list[Member] = []
        met = [budget for budget in run.asked if budget < run.open and budget not in run.budgets]
        for budget in [*met, *run.budgets]:
            members = search.budget(budget, members)
            if budget in met:
                continue
            best = max(members, key=lambda member: member.score)
            if best.score == -math.inf:
                raise FairlineError(
                    f"Of {self.title}'s {self.population} networks at {budget} ReLUs none could be trained; take a "
                    "smaller lr or clip."
                )
            network = search.network(best)
            run.rows = list(search.rows)
            measured = {"accuracy": search.known[best.key]["accuracy"], "accuracy_before": search.before}
            info = {**measured, **search.planner.facts(network)}
            kept = relu_count(network)
            if kept < budget:
                logger.warning("%s keeps %d of the %d ReLUs asked for, what fits at most", self.title, kept, budget)
            yield Cut(budget, network, info)
        search.forget(members)


class _Search:
    """The search of a run, over all its budgets.

    Args:
        method: Its settings, and what a plan is.
        run: Its student is copied.

    Attributes:
        rows: One a member of a generation, in the order of training.
        known: The same by key.
        before: Accuracy of the teacher on the held-out images.
    """

    def __init__(self, method: PopulationSearch, run: Linearization) -> None:
        self.method, self.run = method, run
        if run.val is None:
            self.measuring, self.training = set_aside(run.train, method.held_out, method.seed)
        else:
            self.measuring, self.training = run.val, run.train
        self.file = run.file("population")
        self.rows: list[dict[str, Any]] = here().first(self._saved)
        self.known: dict[Key, dict[str, Any]] = {
            (row["budget"], row["generation"], row["member"]): row for row in self.rows
        }
        self.planner = method.planner(run)
        self.before = float(self._right(run.teacher).mean())
        self.whole = self._cost(run.student) if method.cost is not None else 0.0

    def _saved(self) -> list[dict[str, Any]]:
        """What an interrupted run has measured."""
        return [] if self.file is None or not self.file.exists() else list(load_state(self.file)["rows"])

    def budget(self, budget: int, before: list[Member]) -> list[Member]:
        """The last population for a budget, from that of the budget before."""
        members = before
        for generation in range(1, self.method.generations + 1):
            parents = self._succession(members, budget, generation)
            older, members = members, []
            for place, (parent, plan) in enumerate(parents, start=1):
                members.append(self._member((budget, generation, place), parent, plan))
            self.forget(older)
        return members

    def _succession(self, members: list[Member], budget: int, generation: int) -> list[tuple[Member | None, Plan]]:
        """Whom each member of the next generation goes on from, and with which plan."""
        method = self.method
        generator = torch.Generator().manual_seed(self._seed(budget, generation))
        if not members:
            return [(None, self.planner.first(place, generator)) for place in range(1, method.population + 1)]
        order = sorted(members, key=lambda member: -member.score)
        diverged = sum(member.score == -math.inf for member in order)
        gone = min(max(1, diverged, round(method.replaced * len(order))), len(order) - 1)
        best, replaced = order[:-gone], {member.key for member in order[-gone:]}
        found: list[tuple[Member | None, Plan]] = []
        for member in members:
            if member.key not in replaced:
                found.append((member, member.plan))
                continue
            parent = best[int(torch.randint(len(best), (), generator=generator))]
            found.append((parent, self.planner.changed(parent.plan, budget, generator)))
        return found

    def _member(self, key: Key, parent: Member | None, plan: Plan) -> Member:
        """A member of a generation, trained and scored now or by an interrupted run."""
        if key not in self.known:
            return self._raise(key, parent, plan)
        row = self.known[key]
        return Member(key, plan, -math.inf if row["score"] is None else row["score"])

    def _raise(self, key: Key, parent: Member | None, plan: Plan) -> Member:
        method, (budget, generation, place) = self.method, key
        network = copy_model(self.run.student) if parent is None else self.network(parent)
        targets = self.planner.arrange(network, plan, budget)
        stage = (
            f"{method.name}, generation {generation} of {method.generations}, network {place} of {method.population}"
        )
        trained = self._train(network, targets, self._seed(*key), f"{stage}, {budget:,} ReLUs")
        right = self._right(network) if trained else torch.zeros(len(self.measuring))
        accuracy = float(right.mean())
        row: dict[str, Any] = {
            "budget": budget,
            "generation": generation,
            "member": place,
            "parent": parent.key[2] if parent else 0,
            "relus": relu_count(network),
            "layers": sum(layer.num_kept > 0 for layer in masked_relus(network).values()),
            "accuracy": accuracy,
        }
        by_group = group_mean(right, self.measuring.groups.cpu(), self.measuring.num_groups).tolist()
        row |= {f"accuracy[{name}]": value for name, value in zip(self.measuring.group_names, by_group, strict=True)}
        score = accuracy if trained else -math.inf
        if method.cost is not None:
            row["cost"] = self._cost(network)
            score -= method.price * row["cost"] / self.whole if self.whole else 0.0
        row |= {"score": score if trained else None, **self.planner.facts(network)}
        logger.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
        state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        if (file := self._file(key)) is not None:
            save_tensors(file, state)
        self.rows.append(row)
        self.known[key] = row
        if self.file is not None:
            save_state(self.file, {"rows": self.rows})
        return Member(key, plan, score, state)

    def _train(self, network: nn.Module, targets: Mapping[str, Tensor], seed: int, stage: str) -> bool:
        """Distil for a period while the masks move; whether it went well."""
        method = self.method
        epochs = math.ceil(method.period)
        images = self._part(method.period / epochs, seed)
        steps = epochs * max(1, math.ceil(len(images) / method.batch_size))
        exchange = Exchange(network, targets, round(method.exchange * steps))
        own = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = SGD(own, lr=method.lr, momentum=0.9, weight_decay=method.weight_decay)
        cut_gradients(optimizer, method.clip)
        exchange.follow(optimizer)
        try:
            for _ in run_epochs(
                network,
                images,
                epochs=epochs,
                optimizer=optimizer,
                objective=ERM(),
                teacher=self.run.teacher,
                stage=stage,
                batch_size=method.batch_size,
                seed=seed,
                device=self.run.device,
                precision=self.run.arithmetic,
                progress=named_stage(self.run.progress, stage),
            ):
                pass
        except Diverged as error:
            logger.warning("%s: %s", stage, error)
            return False
        finally:
            exchange.finish()
        return True

    def _part(self, share: float, seed: int) -> GroupedData:
        """A share of the training images, in an order of the seed's."""
        if share == 1:
            return self.training
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed))
        return self.training.select(order[: max(2, round(share * len(order)))])

    def _right(self, network: nn.Module) -> Tensor:
        """Which held-out images a network is right on, 0 or 1, (N,); none where its logits are not finite."""
        where: dict[str, Any] = {"device": self.run.device, "ranks": here()}
        logits = predict(network, self.measuring, arithmetic=self.run.arithmetic, **where).cpu()
        right = (logits.argmax(1) == self.measuring.labels.cpu()) & logits.isfinite().all(1)
        return right.double()

    def _cost(self, network: nn.Module) -> float:
        assert self.method.cost is not None
        image = self.run.train.normalized(slice(1)).cpu()
        cost = self.method.cost(copy_model(network).cpu(), image)
        return float(cost({name: layer.num_kept for name, layer in masked_relus(network).items()}))

    def network(self, member: Member) -> nn.Module:
        """A copy of a member's network, on the run's device."""
        if member.state is None:
            file = self._file(member.key)
            assert file is not None
            member.state = load_tensors(file)[0]
        network = copy_model(self.run.student)
        network.load_state_dict(member.state)
        return network

    def _file(self, key: Key) -> Any:
        budget, generation, place = key
        return self.run.file(f"population-{budget}-{generation}-{place}")

    def forget(self, members: list[Member]) -> None:
        """Delete the networks of a generation that nothing will go on from."""
        for member in members:
            member.state = None
            file = self._file(member.key)
            if file is not None and here().is_first:
                file.unlink(missing_ok=True)

    def _seed(self, *parts: int) -> int:
        text = " ".join(map(str, (self.method.seed, *parts)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
