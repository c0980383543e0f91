"""Budgets of layers by their Shapley values, and within each layer the ReLUs that a second-order estimate ranks first.

A layer's Shapley value (1953) is what its ReLUs add to the accuracy on held-out images, in the mean over all orders in
which layers may get theirs: v(S) is measured with the ReLUs of the layers in S alone, all others linear. The values add
up to v(all) − v(none), and layers that do the same have the same. Few layers, or stages, are enumerated; of many,
orders are drawn in pairs, each with its reverse (Mitchell, Cooper, Frank and Holmes, JMLR 2022), and the values of each
order add up, so that their mean does.

Source: PrivShap (Xu, Wang, Ning, Xin and Wu, TMLR 2025), of which the abstract alone was read, and no code was found:
budgets assigned by layer-wise Shapley values of ReLUs, estimated by trimming a tree. Left open, and chosen here:

- *Trimming*: how their tree is trimmed is not in the abstract; here orders are drawn, which any value allows.
- *v*: accuracy, or minus the mean cross-entropy in nats, on held-out images, with weights as they are.
- *From values to budgets*: in proportion to the values, as SENet divides by sensitivities; what a full layer cannot
  take goes to the others, and a layer of no positive value gets ReLUs when all others are full.
- *Which ReLUs of a layer*: see :mod:`fairline.linearize.taylor`; magnitudes or chance on request.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fairline._io import load_state, save_state
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize.base import Cut, Linearization, Linearizer, held_out
from fairline.linearize.division import divided
from fairline.linearize.magnitude import Magnitude
from fairline.linearize.random import Random
from fairline.linearize.ranked import keep_only, ranking
from fairline.linearize.structure import close, execution_order, stages_of
from fairline.linearize.taylor import Taylor
from fairline.masking import copy_model, masked_relus
from fairline.ranks import here
from fairline.training import Progress

logger = logging.getLogger(__name__)

#: What a set of layers is worth: from the set, a number.
Worth = Callable[[frozenset[str]], float]
Players = Literal["layer", "stage"]
Within = Literal["taylor", "magnitude", "random"]


@dataclass(kw_only=True)
class Shapley(Linearizer):
    """Divide budgets among layers in proportion to Shapley values, and rank within layers. Weights stay as they are.

    Attributes:
        players: What has a value: a ``"layer"``, or a ``"stage"``, whose share is divided among its layers by size.
        stages: Modules of each stage, as for :class:`~fairline.linearize.deepreduce.DeepReDuce`.
        worth: ``"accuracy"``, or ``"loss"``: minus the mean cross-entropy.
        permutations: Orders to draw, rounded up to an even number. Where enumerating all sets takes no more
            measurements, they are enumerated.
        within: What ranks the ReLUs of a layer: ``"taylor"``, ``"magnitude"`` or ``"random"``.
        samples: Images to measure on, at most.
        held_out: Share of the training part that is set aside to measure on where there is no validation part.

    Raises:
        FairlineError: A setting is impossible.
    """

    name = "shapley"
    # Made again in no time from the values, which are kept.
    keeps_snapshots: ClassVar[bool] = False
    measures: ClassVar[bool] = True

    players: Players = "layer"
    stages: Mapping[str, Sequence[str]] | Sequence[str] | str | None = None
    worth: Literal["accuracy", "loss"] = "accuracy"
    permutations: int = 20
    within: Within = "taylor"
    samples: int = 2000
    held_out: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("players", ("layer", "stage")),
            ("worth", ("accuracy", "loss")),
            ("within", ("taylor", "magnitude", "random")),
        ):
            if getattr(self, name) not in known:
                raise FairlineError(f"Shapley values know {name} {' or '.join(known)}, not '{getattr(self, name)}'.")
        if self.permutations < 1 or self.samples < 1 or not 0 < self.held_out < 1:
            raise FairlineError(
                f"Shapley values need permutations ≥ 1, samples ≥ 1 and held_out in (0, 1), not {self.permutations}, "
                f"{self.samples} and {self.held_out}."
            )
        if isinstance(self.stages, str):
            self.stages = [word.strip() for word in self.stages.split(",") if word.strip()]

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Measure the values, divide each budget, rank within layers.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget; ``info["layer_budgets"]`` says how many ReLUs each layer keeps.

        Raises:
            FairlineError: A stage does not exist, or none is found.
        """
        measuring, _ = held_out(run, self.held_out, self.samples, self.seed)
        members = self._members(run)
        values = self._values(run, measuring, members)
        order = ranking(run.student, self._scores(run, measuring), self.seed)
        sizes = {name: layer.num_kept for name, layer in masked_relus(run.student).items()}
        for position, budget in enumerate(run.budgets, start=1):
            network = copy_model(run.student)
            given = self._given(values, members, sizes, budget)
            keep_only(network, _first_of_each(order, given, run))
            if run.progress is not None:
                message = f"{budget:,} of {run.total:,} ReLUs"
                run.progress(Progress("shapley masks", position, len(run.budgets), message))
            yield Cut(budget, network, {"layer_budgets": given})

    def _members(self, run: Linearization) -> dict[str, list[str]]:
        """Layers with ReLUs of each player."""
        layers = masked_relus(run.student)
        if self.players == "layer":
            return {name: [name] for name in execution_order(run.student) if layers[name].num_kept}
        stages = stages_of(run.student, self.stages)
        found = {stage: [name for name in own if layers[name].num_kept] for stage, own in stages.items()}
        return {stage: own for stage, own in found.items() if own}

    def _values(
        self, run: Linearization, measuring: GroupedData, members: Mapping[str, Sequence[str]]
    ) -> dict[str, float]:
        """Shapley values of the players, measured now or by an interrupted run."""
        measured = _Measured(self, run, measuring, members)
        values, errors = shapley_values(list(members), measured, permutations=self.permutations, seed=self.seed)
        layers = masked_relus(run.student)
        rows: list[dict[str, Any]] = [
            {
                "player": name,
                "relus": sum(layers[own].num_kept for own in members[name]),
                "shapley": value,
                "standard_error": errors[name],
            }
            for name, value in values.items()
        ]
        for row in rows:
            logger.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
        run.rows = rows
        return values

    def _scores(self, run: Linearization, measuring: GroupedData) -> Mapping[str, Tensor]:
        network = copy_model(run.student).eval()
        if self.within == "taylor":
            return Taylor(seed=self.seed, samples=self.samples).scores(network, measuring)
        other = (
            Magnitude(samples=self.samples, seed=self.seed) if self.within == "magnitude" else Random(seed=self.seed)
        )
        return other.scores(network, measuring)

    def _given(
        self,
        values: Mapping[str, float],
        members: Mapping[str, Sequence[str]],
        sizes: Mapping[str, int],
        budget: int,
    ) -> dict[str, int]:
        """ReLUs that each layer keeps of a budget."""
        whole = {name: sum(sizes[layer] for layer in own) for name, own in members.items()}
        given = dict.fromkeys(sizes, 0)
        for name, share in divided(values, whole, budget).items():
            own = {layer: sizes[layer] for layer in members[name]}
            given |= divided({layer: float(size) for layer, size in own.items()}, own, share)
        return given


class _Measured:
    """v(S), measured once for each set; kept in the checkpoint folder.

    Args:
        method: Settings.
        run: Its student is measured.
        data: Images to measure on.
        members: Layers of each player.
    """

    def __init__(
        self, method: Shapley, run: Linearization, data: GroupedData, members: Mapping[str, Sequence[str]]
    ) -> None:
        self.method, self.run, self.data, self.members = method, run, data, members
        self.network = copy_model(run.student)
        self.kept = {name: layer.kept for name, layer in masked_relus(run.student).items()}
        self.file = run.file("shapley")
        self.known: dict[str, float] = {}
        if self.file is not None and self.file.exists():
            self.known = load_state(self.file)["known"]
        # All look before the first process writes.
        here().barrier()

    def __call__(self, players: frozenset[str]) -> float:
        """Worth of a set of players."""
        key = " ".join(name for name in self.members if name in players)
        if key not in self.known:
            self.known[key] = self._measure(players)
            logger.info("with the ReLUs of %s alone: %s %.4f", key or "no layer", self.method.worth, self.known[key])
            if self.file is not None:
                save_state(self.file, {"known": self.known})
            if self.run.progress is not None:
                message = f"set {len(self.known)}: {len(players)} of {len(self.members)} {self.method.players}s"
                most = measurements(len(self.members), self.method.permutations)
                self.run.progress(Progress("shapley values", len(self.known), most, message))
        return self.known[key]

    def _measure(self, players: frozenset[str]) -> float:
        for name, layer in masked_relus(self.network).items():
            layer.set_mask(self.kept[name])
        close(self.network, {layer for name, own in self.members.items() if name not in players for layer in own})
        logits = predict(self.network, self.data, ranks=here())
        labels = self.data.labels.to(logits.device)
        if self.method.worth == "loss":
            loss = float(F.cross_entropy(logits.double(), labels))
            if not math.isfinite(loss):
                raise FairlineError(
                    f"With the ReLUs of {', '.join(sorted(players)) or 'no layer'} alone the loss is {loss}, of which "
                    "there is no mean; take worth='accuracy'."
                )
            return -loss
        return float((logits.argmax(1) == labels).double().mean())


def shapley_values(
    players: Sequence[str], worth: Worth, *, permutations: int = 20, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Shapley values of a game.

    Args:
        players: Their names.
        worth: v(S) of a set of players. What has been asked for once may be asked for again.
        permutations: Orders to draw, in pairs of one and its reverse; all sets are enumerated where that takes no more
            values of v.
        seed: Of the orders.

    Returns:
        The values, whose sum is v(all) − v(none), and their standard errors: 0 where they are exact, nan of one pair.

    Examples:
        Left and right gloves: a pair is worth one.

        >>> values, _ = shapley_values(["left", "right", "another right"], lambda s: float("left" in s and len(s) > 1))
        >>> {name: round(value, 3) for name, value in values.items()}
        {'left': 0.667, 'right': 0.167, 'another right': 0.167}
    """
    count = len(players)
    if 2**count <= _drawn(count, permutations):
        return _enumerated(players, worth), dict.fromkeys(players, 0.0)
    pairs = [
        (_marginals(players, order, worth) + _marginals(players, order[::-1], worth)) / 2
        for order in _orders(count, math.ceil(permutations / 2), seed)
    ]
    found = torch.stack(pairs)
    # Of one pair there is no spread.
    errors = found.std(0) / math.sqrt(len(pairs)) if len(pairs) > 1 else torch.full((count,), math.nan)
    values, spread = (dict(zip(players, each.tolist(), strict=True)) for each in (found.mean(0), errors))
    return values, spread


def measurements(players: int, permutations: int) -> int:
    """Values of v that :func:`shapley_values` asks for, each once, at most."""
    return min(2**players, _drawn(players, permutations))


def _drawn(players: int, permutations: int) -> int:
    """Values of v along the orders, the empty set and the whole one counted once."""
    return 2 * math.ceil(permutations / 2) * (players - 1) + 2


def _enumerated(players: Sequence[str], worth: Worth) -> dict[str, float]:
    """Of all orders that begin with S and then the player, each is as likely: the weight |S|!·(n − |S| − 1)!/n!."""
    count = len(players)
    values = {}
    for player in players:
        others = [other for other in players if other != player]
        values[player] = 0.0
        for size in range(count):
            weight = 1 / (count * math.comb(count - 1, size))
            for before in map(frozenset, itertools.combinations(others, size)):
                values[player] += weight * (worth(before | {player}) - worth(before))
    return values


def _orders(count: int, pairs: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(pairs):
        yield torch.randperm(count, generator=generator).tolist()


def _marginals(players: Sequence[str], order: Sequence[int], worth: Worth) -> Tensor:
    """What each player adds when they come in an order; float64, (players,)."""
    added = torch.zeros(len(players), dtype=torch.float64)
    there: frozenset[str] = frozenset()
    value = worth(there)
    for place in order:
        there |= {players[place]}
        before, value = value, worth(there)
        added[place] = value - before
    return added


def _first_of_each(order: Tensor, given: Mapping[str, int], run: Linearization) -> Tensor:
    """Positions of the ReLUs that come first in a ranking, as many in each layer as it is given."""
    layers = masked_relus(run.student)
    ends = torch.tensor([layer.kept.numel() for layer in layers.values()]).cumsum(0)
    own = torch.searchsorted(ends, order, right=True)
    return torch.cat([order[own == place][: given[name]] for place, name in enumerate(layers)])
