"""Methods that learn masks with the weights, under a price of sparsity that grows: the loop of SNL and AutoReP.

Since the price only grows, one run passes every budget on its way down, and each is snapshotted as it is crossed.

Source: Cho et al. (ICML 2022), Algorithm 1, lines 1 to 11; ``protect`` and ``empty_layers`` are ours.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from fairline.errors import FairlineError
from fairline.linearize.base import Cut, Linearization, Linearizer
from fairline.linearize.pace import WINDOW, epochs_left
from fairline.linearize.protect import Protection, covered
from fairline.masking import (
    GRANULARITIES,
    Granularity,
    MaskedReLU,
    Surrogate,
    copy_model,
    keep_largest,
    masked_relus,
    relu_count,
)
from fairline.objectives.base import Objective
from fairline.objectives.erm import ERM
from fairline.training import Epoch, Progress, ProgressCallback, run_epochs

logger = logging.getLogger(__name__)

#: Puts an entry behind or before all others, whatever its weight.
_FAR = 1e4


@dataclass(kw_only=True)
class MaskLearning(Linearizer):
    """Minimise ``objective + λ·Σ wᵢ·mᵢ`` over weights and masks; subclasses say what a mask is.

    Attributes:
        lam: λ at the start.
        growth: Factor by which λ grows after an epoch in which the number of ReLUs did not fall below its lowest.
        patience: Epochs before λ may grow.
        pace: Epochs within which the last budget should be reached. Where the same share of ReLUs closes in each, so
            many are open by now; after an epoch with more, λ grows too, and once more for each time that there are
            twice as many, three times at most. None is as published: λ grows where none closes.
        threshold: Where a mask counts as a ReLU.
        lr: Of Adam.
        temperature: T of the distillation.
        batch_size: Samples in a step; λ grows by the epoch, so that it matters. 128 as in the published scripts.
        max_epochs: The run stops here at the latest; budgets not reached take the largest masks as they are.
        granularity: One mask a ``"pixel"`` (as published), ``"channel"`` or ``"layer"``.
        exact: Keep exactly the budgeted number of ReLUs, those with the largest masks. False is the published
            rule: keep the masks that count, which are as many as the budget or fewer.
        augment: Random crops and flips; the fairness paper uses none.
        objective: What weights and masks minimise beside sparsity; ERM at ``temperature`` by default. Any objective
            of :mod:`fairline.objectives` makes the placement fair in its sense.
        protect: κ ≥ 0: prices ReLUs by their use to the group that suffers most, anew after each epoch (see
            :class:`~fairline.linearize.protect.Protection`); 0 is as published.
        protect_samples: Training images of each group that prices are measured on.
        empty_layers: In [0, 1]: deployment-aware; after each epoch a layer is emptied for good if the share of its
            ReLUs that is open is less than ``empty_layers`` times the share over all layers still in use. Each empty
            layer saves protocol rounds. 0 is as published.
        control: Give a budget that keeps every ReLU, as the last of all, a network that was trained for as many epochs
            as the masks took, with λ = 0 and the learning rate of the beginning: what the further training does by
            itself. False is as published: the network as it is.
        surrogate: What stands in a ReLU's place: ``"identity"`` or another, polynomials fitted and learned.
        seed: Of the whole run.
    """

    #: In messages and reports.
    title: ClassVar[str] = ""

    lam: float = 1e-5
    growth: float = 1.1
    patience: int = 5
    pace: int | None = None
    threshold: float = 1e-2
    lr: float = 1e-3
    temperature: float = 4.0
    batch_size: int = 128
    max_epochs: int = 2000
    granularity: Granularity = "pixel"
    exact: bool = True
    augment: bool = False
    objective: Objective | None = None
    protect: float = 0.0
    protect_samples: int = 200
    empty_layers: float = 0.0
    control: bool = False
    surrogate: Surrogate = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in GRANULARITIES:
            raise FairlineError(f"Granularity is pixel, channel or layer, not '{self.granularity}'.")
        for name in ("lam", "lr", "temperature"):
            if not getattr(self, name) > 0:
                raise FairlineError(f"{self.title} needs {name} > 0, not {getattr(self, name)}.")
        if self.growth < 1 or self.patience < 0 or self.max_epochs < 1:
            raise FairlineError(
                f"{self.title} needs growth ≥ 1, patience ≥ 0 and max_epochs ≥ 1, "
                f"not {self.growth}, {self.patience} and {self.max_epochs}."
            )
        if self.pace is not None and not self.pace > self.patience:
            raise FairlineError(f"{self.title} needs pace > patience, not {self.pace} and {self.patience}.")
        if not self.protect >= 0 or self.protect_samples < 1:
            raise FairlineError(
                f"{self.title} needs protect ≥ 0 and protect_samples ≥ 1, "
                f"not {self.protect} and {self.protect_samples}."
            )
        if not 0 <= self.empty_layers <= 1:
            raise FairlineError(f"{self.title} needs empty_layers in [0, 1], not {self.empty_layers}.")
        if self.control and self.for_cost is not None:
            raise FairlineError("A control keeps every ReLU, and for_cost empties layers: give one of them.")

    def prepare(self, student: nn.Module) -> None:
        """Make the masks of a student learnable."""
        for layer in masked_relus(student).values():
            layer.learn(self.granularity)

    def optimizer(self, student: nn.Module) -> Optimizer:
        """Over weights and masks."""
        return Adam(student.parameters(), lr=self.lr)

    @abstractmethod
    def sparsity(self, layer: MaskedReLU) -> Tensor:
        """What a layer's masks add to Σ m, each; of the compact shape."""

    @abstractmethod
    def open(self, layer: MaskedReLU) -> Tensor:
        """Which of a layer's masks count as ReLUs, bool of the compact shape."""

    def close(self, layer: MaskedReLU) -> None:
        """Close all of a layer's masks, and keep them closed."""
        weight = cast(nn.Parameter, layer.weight)
        with torch.no_grad():
            weight.zero_()
        weight.requires_grad_(False)

    def price_scale(self, total: int) -> float:
        """Of λ, for a network of ``total`` ReLUs."""
        return 1.0

    def charged(self, kept: Tensor, budget: int) -> Tensor:
        """What is paid for of Σ wᵢ·mᵢ (scalar) on the way to a budget; all of it, unless a subclass says otherwise."""
        return kept

    def steps_to_close(self) -> float:
        """How many steps a mask needs to close, at least; 0 where nothing is known of it."""
        return 0.0

    def _warn_if_short(self, images: int) -> None:
        """Say before a run that its epochs are too few for any mask to close, where that is sure."""
        steps = math.ceil(images / self.batch_size)
        needed = self.steps_to_close() / steps
        if needed > self.max_epochs:
            logger.warning(
                "%s: at lr %g a mask needs about %.0f steps to close, %d epochs of %d steps, and there are %d "
                "at most: no budget will be reached. Give a larger lr, smaller batches or more epochs; --quick chooses "
                "them.",
                self.title,
                self.lr,
                self.steps_to_close(),
                math.ceil(needed),
                steps,
                self.max_epochs,
            )

    def epochs_at_budget(self) -> int:
        """How long a run stays at a budget before the network is taken; by default it is taken when it is crossed."""
        return 0

    def settle(self, optimizer: Optimizer, epochs: int) -> None:
        """Change learning rates, ``epochs`` epochs after a budget was reached (0: it is not); by default do nothing."""

    def untouched(self, run: Linearization) -> Iterator[Cut]:
        """As for every method, but that a control waits for the last.

        Args:
            run: What there is to work with.

        Yields:
            The student itself for each budget that it meets.

        Raises:
            FairlineError: There is no budget that says how long a control is trained.
        """
        if not self.control:
            yield from super().untouched(run)
            return
        waiting = [budget for budget in run.budgets if budget >= run.open]
        run.budgets[:] = [budget for budget in run.budgets if budget < run.open] + waiting
        if len(waiting) == len(run.asked):
            raise FairlineError("A control is trained for as long as masks are learned: give a smaller budget as well.")

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Learn until the last budget is crossed; what is not crossed takes the largest masks as they are.

        Args:
            run: What there is to work with.

        Yields:
            A network for each budget, as it is crossed; a control last.
        """
        controls = [budget for budget in run.budgets if budget >= run.open]
        run.budgets[:] = [budget for budget in run.budgets if budget < run.open]
        network = copy_model(run.student) if controls else None
        if run.budgets:
            yield from self._learned(run)
        if network is not None:
            self._train_control(run, network)
            for budget in controls:
                yield Cut(budget, copy_model(network), {"epoch": len(run.rows), "control": True})

    def _train_control(self, run: Linearization, network: nn.Module) -> None:
        """Train a network on as the masks' network was, for as many epochs, with nothing to pay for a ReLU."""
        kept = {name: layer.kept.clone() for name, layer in masked_relus(network).items()}
        self.prepare(network)
        epochs = self.train(
            run,
            network,
            epochs=len(run.rows),
            optimizer=self.optimizer(network),
            stage=f"{self.title} control",
            progress=run.progress,
            checkpoint=run.file(f"{self.name}-control"),
        )
        for _ in epochs:
            pass
        for name, layer in masked_relus(network).items():
            layer.set_mask(kept[name])

    def train(self, run: Linearization, network: nn.Module, **settings: Any) -> Iterator[Epoch]:
        """Train a network of the run under the objective and the settings that masks are learned under.

        Args:
            run: What there is to work with.
            network: Trained in place.
            settings: Others, see :func:`~fairline.training.run_epochs`.

        Returns:
            The epochs, as they are done.
        """
        return run_epochs(
            network,
            run.train,
            objective=self.objective or ERM(self.temperature),
            teacher=run.teacher,
            batch_size=self.batch_size,
            augment=self.augment,
            seed=self.seed,
            device=run.device,
            precision=run.arithmetic,
            **settings,
        )

    def _learned(self, run: Linearization) -> Iterator[Cut]:
        """A network for each budget below what is open."""
        self._warn_if_short(len(run.train))
        self.prepare(run.student)
        learning = _Learning(self, run)
        for epoch in learning.epochs():
            learning.after(epoch)
            yield from learning.met()
            if not run.budgets:
                return
        while run.budgets:
            budget = run.budgets.pop(0)
            logger.warning(
                "%s stopped after %d epochs with %d ReLUs open; budget %d keeps the largest masks as they are",
                self.title,
                self.max_epochs,
                learning.state.count,
                budget,
            )
            yield learning.cut(budget)

    def _fix(self, snapshot: nn.Module, budget: int, *, fill: bool) -> int:
        """Make the masks binary; returns ReLUs kept."""
        layers = masked_relus(snapshot)
        opens = {name: self.open(layer) for name, layer in layers.items()}
        if not fill:
            for name, layer in layers.items():
                layer.set_mask(opens[name] & layer.kept)
            return relu_count(snapshot)
        ranks = {}
        for name, layer in layers.items():
            # Open masks come first, then closed ones of layers that are still in use.
            ranks[name] = cast(Tensor, layer.weight).detach().double() + _FAR * opens[name]
            if self.empty_layers > 0 and not opens[name].any():
                ranks[name] -= _FAR
        return keep_largest(snapshot, budget, ranks)

    def _empty(self, layers: dict[str, MaskedReLU], state: _State) -> None:
        """Close layers of low density for good."""
        using = {name: open_in(self, layer) for name, layer in layers.items() if name not in state.closed}
        density = sum(using.values()) / sum(layers[name].kept.numel() for name in using)
        for name, count in using.items():
            if count / layers[name].kept.numel() < self.empty_layers * density:
                state.closed.append(name)
                logger.info("%s is emptied: %d of its ReLUs were open", name, count)
        for name in state.closed:
            self.close(layers[name])


class _Learning:
    """One run of mask learning.

    Args:
        method: Whose masks are learned.
        run: Its student's masks are learnable.
    """

    def __init__(self, method: MaskLearning, run: Linearization) -> None:
        self.method = method
        self.run = run
        self.layers = masked_relus(run.student)
        # Snapshots start from it: training may change how the student's weights lie in memory.
        self.untrained = copy_model(run.student)
        self.units = {name: units_of(layer) for name, layer in self.layers.items()}
        self.scale = method.price_scale(run.total)
        self.aims = [budget for budget in run.asked if budget < run.open]
        self.state = _State(method.lam, run.open, self._close_again)
        self.optimizer = method.optimizer(run.student)
        self.ended: Progress | None = None
        self.protection = None
        if method.protect > 0:
            self.protection = Protection(
                run.train, run.teacher, method.protect, method.protect_samples, method.seed, run.arithmetic
            )

    def epochs(self) -> Iterator[Epoch]:
        """The training loop."""
        method, run = self.method, self.run
        return method.train(
            run,
            run.student,
            epochs=method.max_epochs,
            optimizer=self.optimizer,
            penalty=self.penalty,
            stage=f"{method.title} mask learning",
            progress=None if run.progress is None else self.report,
            checkpoint=run.file(method.name),
            stateful={method.name: self.state},
        )

    def penalty(self) -> Tensor:
        """λ times what is charged of Σ wᵢ·mᵢ over ReLUs, scalar: a mask that covers several counts for each."""
        sums = []
        for name, layer in self.layers.items():
            masks = self.method.sparsity(layer)
            if self.state.prices:
                sums.append((masks * self.state.prices[name].to(masks)).sum())
            else:
                units = self.units[name]
                sums.append(masks.sum() * units if isinstance(units, int) else (masks * units).sum())
        return self.state.lam * self.scale * self.method.charged(torch.stack(sums).sum(), self.aim)

    def report(self, update: Progress) -> None:
        """Pass a report on; that of an epoch that has ended waits until its ReLUs are counted."""
        if update.metrics:
            self.ended = update
        else:
            self.tell(update)

    def tell(self, update: Progress) -> None:
        """Where the run ends, as the ReLUs close now; the count says how far it is."""
        state, run = self.state, self.run
        left = self.epochs_left()
        message = f"epoch {state.epoch + 1}, {state.count:,} of {run.total:,} ReLUs open, aim {run.asked[-1]:,}"
        if left is None:
            message += f", time left not known yet (at most {self.method.max_epochs} epochs)"
        per_epoch = cast(int, update.total) // self.method.max_epochs
        total = None if left is None else max(update.done, math.ceil((state.epoch + left) * per_epoch))
        cast(ProgressCallback, run.progress)(replace(update, total=total, message=message))

    def epochs_left(self) -> float | None:
        """Epochs after the last whole one, if ReLUs go on closing as they did; None where nothing tells."""
        method, state = self.method, self.state
        most = method.max_epochs - state.epoch
        counts = [self.run.open] * (len(state.rows) < WINDOW) + [int(row["relus"]) for row in state.rows[-WINDOW:]]
        left = epochs_left(counts, self.aims[-1], most) if state.met < len(self.aims) else 0.0
        if left is None:
            return None
        # Where a run stays at each budget, what is left of that.
        staying = method.epochs_at_budget() * (len(self.aims) - state.met) - max(0, state.reached - 1)
        # At least the epoch under way.
        return min(float(most), max(1.0, left + max(0, staying)))

    def after(self, epoch: Epoch) -> None:
        """Count, let λ grow, empty layers, set prices, and note it all in the history."""
        method, state = self.method, self.state
        state.epoch = epoch.epoch
        state.count = open_relus(method, self.run.student)
        fell = state.count < state.lowest
        state.lowest = min(state.count, state.lowest)
        if epoch.epoch > method.patience and not state.reached:
            state.lam *= method.growth ** max(self.behind(), 0.0 if fell else 1.0)
        if method.empty_layers > 0:
            method._empty(self.layers, state)
            state.count = open_relus(method, self.run.student)
        if state.reached or state.count <= self.aim:
            state.reached += 1
        method.settle(self.optimizer, state.reached)
        logger.info("epoch %d: %d ReLUs open, λ = %.3g", state.epoch, state.count, state.lam)
        row = {**epoch.row(), "relus": state.count, "lambda": state.lam}
        if self.protection is not None:
            worst, prices = self.protection.prices(self.run.student)
            state.prices = {name: covered(price, self.layers[name]) for name, price in prices.items()}
            row["protected_group"] = worst
        row["layers"] = sum(bool(method.open(layer).any()) for layer in self.layers.values())
        state.rows.append(row)
        if self.ended is not None:
            self.tell(replace(self.ended, metrics=row))

    def behind(self) -> float:
        """How far the run is behind its pace: 0 if it is not, else from 1 to 3."""
        method, state = self.method, self.state
        if method.pace is None:
            return 0.0
        share = min(1.0, (state.epoch - method.patience) / (method.pace - method.patience))
        allowed = self.run.open * (max(self.aims[-1], 1) / self.run.open) ** max(0.0, share)
        return min(3.0, 1 + math.log2(state.count / allowed)) if state.count > allowed else 0.0

    @property
    def aim(self) -> int:
        """The budget that the run is on its way to, or stays at."""
        return self.aims[self.state.met]

    def met(self) -> Iterator[Cut]:
        """Networks of the budgets that this epoch has met, but for those that an interrupted run has given."""
        while self.state.met < len(self.aims) and self.state.reached > self.method.epochs_at_budget():
            budget = self.aim
            if budget in self.run.budgets:
                self.run.budgets.remove(budget)
                yield self.cut(budget)
            self.state.met += 1
            if self.state.met < len(self.aims):
                # It may have been crossed in the same epoch.
                self.state.reached = int(self.state.count <= self.aim)
                self.state.lowest = self.state.count
                self.method.settle(self.optimizer, self.state.reached)

    def cut(self, budget: int) -> Cut:
        """The student as it is now, its masks made binary."""
        method, state = self.method, self.state
        self.run.rows = state.rows
        network = copy_model(self.untrained)
        network.load_state_dict(self.run.student.state_dict())
        reached = budget == self.aim and state.reached > 0
        method._fix(network, budget, fill=method.exact or state.count > budget)
        return Cut(
            budget, network, {"epoch": state.epoch, "lambda": state.lam, "open": state.count, "reached": reached}
        )

    def _close_again(self, closed: list[str]) -> None:
        for name in closed:
            self.method.close(self.layers[name])


def units_of(layer: MaskedReLU) -> int | Tensor:
    """How many ReLUs each entry of a learned mask covers: one number where all cover as many."""
    counts = layer.covered()
    first = int(counts.flatten()[0])
    return first if bool((counts == first).all()) else counts


def open_in(method: MaskLearning, layer: MaskedReLU) -> int:
    """How many of a layer's ReLUs have a mask that counts."""
    return int((method.open(layer) * layer.covered()).sum())


def open_relus(method: MaskLearning, model: nn.Module) -> int:
    """How many ReLUs have a mask that counts."""
    return sum(open_in(method, layer) for layer in masked_relus(model).values())


class _State:
    """What changes from epoch to epoch."""

    def __init__(self, lam: float, total: int, reclose: Callable[[list[str]], object]) -> None:
        self.lam = lam
        self.lowest = total
        self.count = total
        #: Budgets that have been met, and epochs since the next one was reached, 0 before.
        self.met = 0
        self.reached = 0
        self.closed: list[str] = []
        self.epoch = 0
        self.rows: list[dict[str, float]] = []
        self.prices: dict[str, Tensor] = {}
        self._reclose = reclose

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_reclose"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # That a mask is no longer trained is not in the model's state.
        self._reclose(self.closed)
