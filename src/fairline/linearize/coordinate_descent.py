"""Block coordinate descent on the binary mask, after Rakhlin, Jevnisek and Avidan (2025, arXiv 2511.11781).

The mask is binary throughout, so no threshold at the end costs accuracy. ReLUs go a block at a time: of some random
blocks the one whose removal raises the loss on a held-out batch least; weights are refreshed between rounds.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import SGD

from fairline._io import load_state, resolve_device, save_state
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import logits_of
from fairline.linearize.base import Linearized, resolve_budgets
from fairline.linearize.surrogates import require_surrogate, start_masked
from fairline.masking import Surrogate, copy_model, masked_graph, masked_relus, relu_count
from fairline.objectives.base import Batch, Objective
from fairline.objectives.erm import ERM
from fairline.training import Progress, ProgressCallback, run_epochs

logger = logging.getLogger(__name__)

#: In-place functions and what computes the same without touching a cached activation.
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


@dataclass
class CoordinateDescent:
    """Remove ReLUs greedily, in rounds.

    After each round the number of ReLUs is ``1 − rate`` of what it was, or the next budget if that is larger. A block
    lies in one layer, which is drawn in proportion to the ReLUs it still has; so the activations before the layer
    need not be computed again.

    Attributes:
        rate: Share of the remaining ReLUs that a round removes.
        blocks: Blocks that a round removes.
        candidates: Blocks that are tried for each one removed.
        batch_size: Held-out images that candidates are tried on, and samples in a training step.
        held_out: Share of the training part that is set aside for trying candidates.
        refresh_epochs: Epochs of training after each round.
        lr: Of the refresh: SGD with momentum 0.9 and weight decay 5e-4.
        empty_layers: Deployment-aware: nats that a candidate is credited for the share of its layer's remaining ReLUs
            that it removes; the block that empties a layer, which saves protocol rounds, gets all of it. Layers are
            then drawn with equal probability, so that those nearly empty are tried too. 0 is as published.
        objective: Of the refresh, and whose mean loss decides; CE + T²·KL by default.
        surrogate: What stands in a ReLU's place: ``"identity"``, as published, or ``"quadratic"``, fitted and learned.
        seed: Of the whole run.
    """

    name = "coordinate_descent"

    rate: float = 0.2
    blocks: int = 8
    candidates: int = 8
    batch_size: int = 256
    held_out: float = 0.1
    refresh_epochs: int = 1
    lr: float = 5e-3
    empty_layers: float = 0.0
    objective: Objective | None = None
    surrogate: Surrogate = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        require_surrogate(self.surrogate)
        if not (0 < self.rate < 1 and 0 < self.held_out < 1):
            raise FairlineError(
                f"Coordinate descent needs rate and held_out between 0 and 1, not {self.rate} and {self.held_out}."
            )
        for name in ("blocks", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise FairlineError(f"Coordinate descent needs {name} ≥ 1, not {getattr(self, name)}.")
        if not self.empty_layers >= 0:
            raise FairlineError(f"Coordinate descent needs empty_layers ≥ 0, not {self.empty_layers}.")
        if self.refresh_epochs < 0 or not self.lr > 0:
            raise FairlineError(
                f"Coordinate descent needs refresh_epochs ≥ 0 and lr > 0, not {self.refresh_epochs} and {self.lr}."
            )

    def linearize(
        self,
        model: nn.Module,
        train: GroupedData,
        budgets: Sequence[float],
        *,
        device: str | torch.device | None = None,
        progress: ProgressCallback | None = None,
        checkpoint: str | Path | None = None,
        history: list[dict[str, float]] | None = None,
    ) -> Iterator[Linearized]:
        """Yield one network a budget, from the largest budget to the smallest; see :class:`Linearizer`.

        Raises:
            FairlineError: A budget is impossible, the model has no ReLU, or there are too few images to set any aside.
        """
        where = resolve_device(device)
        teacher = copy_model(model).to(where).eval()
        student = start_masked(model, train, self.surrogate, where, seed=self.seed)
        total = relu_count(student)
        pending = resolve_budgets(budgets, total)
        train = train.to(where)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).to(where)
        aside = int(self.held_out * len(train))
        if not 0 < aside < len(train):
            raise FairlineError(f"{train.name}: {len(train)} images are too few to set {self.held_out:.0%} aside.")
        trying, training = train.select(order[:aside]), train.select(order[aside:])
        objective = self.objective or ERM()
        objective.start(training)

        plan = self._plan(total, pending)
        file = None if checkpoint is None else Path(checkpoint) / "coordinate_descent.safetensors"
        rows: list[dict[str, float]] = []
        done = 0
        if pending[0] == total:
            yield self._cut(student, pending.pop(0), total, rows, history)
        if file is not None and file.exists():
            state = load_state(file)
            student.load_state_dict(state["model"])
            rows, done = state["rows"], state["round"]
            for budget in [b for b in pending if b >= relu_count(student)]:
                snapshot = copy_model(student)
                snapshot.load_state_dict(load_state(file.with_name(f"snapshot-{budget}.safetensors")))
                yield self._cut(snapshot, budget, total, rows, history)
                pending.remove(budget)
            logger.info("coordinate descent: resumed after round %d of %d", done, len(plan))

        for number, target in enumerate(plan[done:], start=done + 1):
            generator = torch.Generator().manual_seed(self.seed + 1000 * number)
            tried, loss = self._remove(student, teacher, trying, objective, relu_count(student) - target, generator)
            used = sum(layer.num_kept > 0 for layer in masked_relus(student).values())
            row = {"round": number, "relus": target, "layers": used, "held_out_loss": loss, "tried": tried}
            if self.refresh_epochs:
                optimizer = SGD(student.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
                for epoch in run_epochs(
                    student,
                    training,
                    epochs=self.refresh_epochs,
                    optimizer=optimizer,
                    objective=copy.deepcopy(objective),
                    teacher=teacher,
                    batch_size=self.batch_size,
                    seed=self.seed + number,
                    device=where,
                ):
                    row |= {"loss": epoch.loss, "seconds": epoch.seconds}
            rows.append(row)
            if progress is not None:
                message = f"round {number}, {target:,} of {total:,} ReLUs, aim {plan[-1]:,}"
                progress(Progress("coordinate descent", number, len(plan), message))
            logger.info("round %d: %d ReLUs, held-out loss %.4f", number, target, loss)
            if file is not None:
                if target in pending:
                    save_state(file.with_name(f"snapshot-{target}.safetensors"), student.state_dict())
                save_state(file, {"model": student.state_dict(), "rows": rows, "round": number})
            if target in pending:
                pending.remove(target)
                yield self._cut(student, target, total, rows, history)

    def _plan(self, total: int, budgets: Sequence[int]) -> list[int]:
        """ReLUs after each round; every budget below the whole is among them."""
        plan = []
        count = total
        for budget in budgets:
            while count > budget:
                count = max(budget, min(count - 1, int(count * (1 - self.rate))))
                plan.append(count)
        return plan

    def _remove(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: GroupedData,
        objective: Objective,
        count: int,
        generator: torch.Generator,
    ) -> tuple[int, float]:
        """Remove ``count`` ReLUs; returns how many candidates were tried, and the loss of the last one chosen."""
        size = -(-count // self.blocks)
        layers = masked_relus(student)
        student.eval()
        tried, best = 0, 0.0
        while count > 0:
            index = torch.randperm(len(data), generator=generator)[: self.batch_size].to(data.device)
            batch = Batch(data.normalized(index), data.labels[index], data.groups[index], index)
            with torch.no_grad():
                targets = logits_of(teacher(batch.images), teacher, batch.images).float()

                def loss_of(logits: Tensor, batch: Batch = batch, targets: Tensor = targets) -> float:
                    return float(objective.losses(logits.float(), targets, batch).mean())

                evaluate = cached_forward(student, batch.images)
                options = []
                for _ in range(self.candidates):
                    name, units = _draw_block(layers, min(size, count), generator, evenly=self.empty_layers > 0)
                    kept = layers[name].kept
                    without = kept.clone().view(-1)
                    without[units.to(without.device)] = False
                    layers[name].set_mask(without.view(kept.shape))
                    loss = loss_of(evaluate(name))
                    credit = self.empty_layers * len(units) / int(kept.sum())
                    options.append((loss - credit, loss, name, without.view(kept.shape), len(units)))
                    layers[name].set_mask(kept)
            tried += len(options)
            _, best, name, mask, removed = min(options, key=lambda option: option[0])
            layers[name].set_mask(mask)
            count -= removed
        return tried, best

    def _cut(
        self, student: nn.Module, budget: int, total: int, rows: list[dict[str, float]], history: list[Any] | None
    ) -> Linearized:
        if history is not None:
            history[:] = rows
        cut = copy_model(student)
        return Linearized(cut, budget, relu_count(cut), total, self.name, self.seed, {"reached": True})


def _draw_block(
    layers: Mapping[str, Any], size: int, generator: torch.Generator, *, evenly: bool = False
) -> tuple[str, Tensor]:
    """A random layer, in proportion to the ReLUs that it keeps or evenly, and up to ``size`` of them."""
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
