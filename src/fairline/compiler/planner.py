"""The cheapest chain of blocks from a network's input to its output: a shortest path over its frontiers.

Costs of blocks add up, so the best plan that reaches a frontier goes on from the best plan that reaches an earlier one.
With a bound on the weights, the plans that reach a frontier and that none beats in cost and weights are kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import pandas as pd

from fairline.compiler.dense import SCHEDULES
from fairline.compiler.pieces import Piece
from fairline.compiler.regions import Block, Form, Plan, Regions, weights_of
from fairline.errors import FairlineError
from fairline.private.cost import PROTOCOL_COSTS, Cost, ProtocolCost, layer_costs, require_cost_model
from fairline.private.graph import kept_relus
from fairline.private.wire import NETWORKS, Network
from fairline.training.progress import Progress, ProgressCallback

Measure = Literal["seconds", "bytes", "rounds"]
MEASURES: tuple[Measure, ...] = ("seconds", "bytes", "rounds")

#: Numbers that a compiled network's weights may be, unless told otherwise: 400 MB.
MAX_WEIGHTS = 100_000_000


@dataclass(frozen=True)
class Terms:
    """What a network is compiled for.

    Attributes:
        protocol: A key of :data:`~fairline.private.PROTOCOL_COSTS`.
        network: Between the parties.
        batch_size: Images in a call.
        minimise: ``"seconds"`` of a call, ``"bytes"`` (those that are sent ahead of time too) or ``"rounds"``.
        max_weights: Numbers that all weights may be, or as many as the network has, if that is more.
    """

    protocol: str = "cheetah"
    network: Network = NETWORKS["lan"]
    batch_size: int = 1
    minimise: Measure = "seconds"
    max_weights: int = MAX_WEIGHTS

    def check(self) -> None:
        """Refuse terms that nothing can be compiled for.

        Raises:
            FairlineError: There is no such protocol or measure, a number is not positive, or seconds are not known.
        """
        require_cost_model(self.protocol)
        if self.minimise not in MEASURES:
            raise FairlineError(f"What is minimised is one of {', '.join(MEASURES)}, not '{self.minimise}'.")
        if self.batch_size < 1:
            raise FairlineError("A batch holds at least one image.")
        if self.max_weights < 1:
            raise FairlineError(f"A network has at least one weight, so max_weights cannot be {self.max_weights}.")
        if self.minimise == "seconds" and math.isnan(self.costs.relu(1).compute_seconds):
            raise FairlineError(f"No source tells how long {self.protocol} takes; minimise bytes or rounds.")

    @property
    def costs(self) -> ProtocolCost:
        """Of the protocol."""
        return PROTOCOL_COSTS[self.protocol]()

    def seconds(self, cost: Cost) -> float:
        """Of a cost: compute and network."""
        return cost.compute_seconds + self.network.seconds(cost.bytes, cost.rounds)

    def price(self, cost: Cost, weights: int) -> tuple[float, ...]:
        """What is minimised; where that is equal the other measures, then the weights."""
        seconds = self.seconds(cost)
        prices = {
            "seconds": 0.0 if math.isnan(seconds) else seconds,
            "bytes": cost.bytes + cost.offline_bytes,
            "rounds": cost.rounds,
        }
        first = prices.pop(self.minimise)
        return (first, *prices.values(), float(weights))


class Priced(NamedTuple):
    """A block, what it costs, and how many weights it has."""

    block: Block
    cost: Cost
    weights: int
    price: tuple[float, ...]


@dataclass(frozen=True)
class LeftOut:
    """A block that would be cheaper and was left out because of its size.

    Attributes:
        where: Layers that it spans.
        form: Of it.
        weights: Numbers in its weights.
        limit: What it exceeds, in words.
    """

    where: str
    form: Form
    weights: int
    limit: str

    def __str__(self) -> str:
        return f"{self.where} is not one {self.form} block: its {self.weights:,} weights go beyond {self.limit}."


@dataclass(frozen=True)
class Planned:
    """A plan, with what was left out."""

    plan: Plan
    left_out: tuple[LeftOut, ...]


def plan(regions: Regions, terms: Terms, progress: ProgressCallback | None = None) -> Planned:
    """Find the cheapest plan.

    Args:
        regions: Of the graph.
        terms: What is minimised, and what for.
        progress: Told how many frontiers' blocks are priced.

    Returns:
        The plan. By the measure that is minimised it costs at most what the network costs as it stands.

    Raises:
        FairlineError: The terms are not met by anything.
    """
    terms.check()
    limit = max(terms.max_weights, weights_of(regions.graph))
    blocks = list(priced_blocks(regions, terms, progress))
    memory = _memory_weights()
    best = cheapest(blocks, len(regions.frontiers) - 1, None)
    chosen = best
    if sum(each.weights for each in best) > limit or any(each.weights > memory for each in best):
        fitting = [each for each in blocks if each.weights <= memory or each.block.form == "as it stands"]
        chosen = cheapest(fitting, len(regions.frontiers) - 1, limit)
    kept = {each.block for each in chosen}
    left_out = [
        LeftOut(
            regions.dense(each.block.start, each.block.stop).name,
            each.block.form,
            each.weights,
            "this machine's memory" if each.weights > memory else f"the limit of {limit:,} for all",
        )
        for each in best
        if each.block not in kept and each.block.form != "as it stands"
    ]
    return Planned(tuple(_merged([each.block for each in chosen])), tuple(left_out))


def _merged(blocks: Sequence[Block]) -> Iterator[Block]:
    """Neighbours that stay as they stand as one block."""
    waiting: Block | None = None
    for block in blocks:
        if block.form == "as it stands":
            waiting = Block(waiting.start if waiting else block.start, block.stop)
            continue
        if waiting:
            yield waiting
            waiting = None
        yield block
    if waiting:
        yield waiting


def _memory_weights() -> float:
    """Weights, eight bytes each, in half of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 16
    except (AttributeError, ValueError, OSError):
        return math.inf


def priced_blocks(
    regions: Regions, terms: Terms, progress: ProgressCallback | None = None, *, to_the_end: bool = False
) -> Iterator[Priced]:
    """All blocks that a plan may have: each step as it stands, and each dense block under its cheapest schedule.

    Args:
        regions: Of the graph.
        terms: What is minimised, and what for.
        progress: Told how many frontiers' blocks are priced.
        to_the_end: Of the others only those that stop at the network's end.

    Yields:
        Blocks with their prices.
    """
    steps = standing_costs(regions, terms)
    count = len(regions.frontiers) - 1
    for start in range(count):
        cost, weights = steps[start]
        yield Priced(Block(start, start + 1), cost, weights, terms.price(cost, weights))
        for stop in range(count if to_the_end else start + 1, count + 1):
            if regions.mergeable(start, stop) and (merged := regions.merged(start, stop)).folded:
                yield _priced(regions, Block(start, stop, "merged"), merged.piece, terms)
            if _sensible(regions, start, stop):
                yield min(_priced_dense(regions, start, stop, terms), key=lambda each: each.price)
        if progress is not None:
            progress(Progress("Plan", start + 1, count, f"{start + 1} of {count} frontiers"))


def _sensible(regions: Regions, start: int, stop: int) -> bool:
    """Whether a dense block may pay: one that starts with a nonlinear node or stops with one only copies its units."""
    nodes, (first, last) = regions.anatomy.nodes, (regions.frontiers[place].position for place in (start, stop))
    nonlinear = regions.anatomy.nonlinear
    return not nonlinear(nodes[first]) and (last == len(nodes) or not nonlinear(nodes[last - 1]))


def _priced_dense(regions: Regions, start: int, stop: int, terms: Terms) -> Iterator[Priced]:
    dense = regions.dense(start, stop)
    # With one level of products they are all the same.
    for schedule in SCHEDULES if dense.levels else SCHEDULES[:1]:
        piece = dense.piece(schedule)
        yield _priced(regions, Block(start, stop, "dense", schedule), piece, terms)


def _priced(regions: Regions, block: Block, piece: Piece, terms: Terms) -> Priced:
    cost = _total(regions, piece, terms)
    return Priced(block, cost, piece.weights, terms.price(cost, piece.weights))


def _total(regions: Regions, piece: Piece, terms: Terms) -> Cost:
    """Of a piece's nodes, without opening what the last one gives."""
    costs = layer_costs(piece.graph(regions.graph, regions.anatomy.shapes), terms.costs, terms.batch_size)
    return sum((cost for node, cost in costs if node is not None), Cost())


def standing_costs(regions: Regions, terms: Terms) -> list[tuple[Cost, int]]:
    """Cost and weights of the nodes between each two neighbouring frontiers, as they stand."""
    graph = regions.graph
    costs = [cost for node, cost in layer_costs(graph, terms.costs, terms.batch_size) if node is not None]
    seen: set[str] = set()
    result = []
    for first, last in pairwise(regions.frontiers):
        nodes = graph.nodes[first.position : last.position]
        own = {name for node in nodes for name in node.weights} - seen
        seen |= own
        weights = sum(math.prod(graph.shapes[name]) for name in own)
        result.append((sum(costs[first.position : last.position], Cost()), weights))
    return result


def cheapest(blocks: Sequence[Priced], count: int, limit: int | None) -> list[Priced]:
    """The cheapest chain of blocks from frontier 0 to frontier ``count``.

    Args:
        blocks: All that there are.
        count: The last frontier.
        limit: The most weights that the chain may have; None for no bound.

    Returns:
        The chain. If nothing is within the limit, the one with the fewest weights.
    """
    starting: dict[int, list[Priced]] = {}
    for each in blocks:
        starting.setdefault(each.block.start, []).append(each)
    # Of each frontier the chains that reach it: price, weights and the way.
    labels: dict[int, list[tuple[tuple[float, ...], int, tuple[Priced, ...]]]] = {0: [((0.0,) * 4, 0, ())]}
    for place in range(count):
        for price, weights, way in labels.pop(place, []):
            for each in starting.get(place, []):
                total = tuple(a + b for a, b in zip(price, each.price, strict=True))
                label = (total, weights + each.weights, (*way, each))
                own = labels.setdefault(each.block.stop, [])
                beaten = any(a[0] <= total and (limit is None or a[1] <= label[1]) for a in own)
                if not beaten:
                    own[:] = [a for a in own if not (total <= a[0] and (limit is None or label[1] <= a[1]))]
                    own.append(label)
    ends = labels[count]
    fitting = [label for label in ends if limit is None or label[1] <= limit]
    best = min(fitting, key=lambda label: label[0]) if fitting else min(ends, key=lambda label: label[1])
    return list(best[2])


def table(regions: Regions, plan: Plan, terms: Terms) -> pd.DataFrame:
    """A plan beside the network as it stands.

    Args:
        regions: Of the graph.
        plan: A plan of it.
        terms: Whose costs are told.

    Returns:
        A row a block: ``block``, ``form``, ``schedule``, ``first`` and ``last`` layer, ``levels`` of nonlinear units,
        ``relus``, ``weights``, ``bytes``, ``offline_bytes``, ``rounds`` and ``seconds``; the last six also of the same
        part of the network as it stands, ``relus_before`` and so on.
    """
    steps = standing_costs(regions, terms)
    rows = []
    for place, block in enumerate(plan):
        piece = regions.piece(block)
        standing = steps[block.start : block.stop]
        first, last = (regions.frontiers[index].position for index in (block.start, block.stop))
        nodes = regions.graph.nodes[first:last]
        own = (
            _total(regions, piece, terms)
            if block.form != "as it stands"
            else sum((cost for cost, _ in standing), Cost())
        )
        levels = len(regions.dense(block.start, block.stop).levels) if block.form == "dense" else None
        evaluated = [node for node in nodes if regions.anatomy.nonlinear(node)]
        weights = sum(count for _, count in standing)
        rows.append(
            {
                "block": place,
                "form": block.form,
                "schedule": block.schedule if block.form == "dense" else "",
                "first": nodes[0].layer,
                "last": nodes[-1].layer,
                "levels": len(evaluated) if levels is None else levels,
                **_told(piece.relus, weights if block.form == "as it stands" else piece.weights, own, terms),
                **{
                    f"{key}_before": value
                    for key, value in _told(
                        sum(kept_relus(regions.graph, node) for node in nodes),
                        weights,
                        sum((cost for cost, _ in standing), Cost()),
                        terms,
                    ).items()
                },
            }
        )
    return pd.DataFrame(rows)


def _told(relus: int, weights: int, cost: Cost, terms: Terms) -> dict[str, float]:
    return {
        "relus": relus,
        "weights": weights,
        "bytes": cost.bytes,
        "offline_bytes": cost.offline_bytes,
        "rounds": cost.rounds,
        "seconds": terms.seconds(cost),
    }
