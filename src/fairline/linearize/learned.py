"""Methods that learn masks with the weights, under a price of sparsity that grows: the loop of SNL and AutoReP.

Since the price only grows, one run passes every budget on its way down, and each is snapshotted as it is crossed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from fairline._io import load_tensors, resolve_device, save_tensors
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.linearize.base import Linearized, resolve_budgets
from fairline.linearize.protect import Protection, covered
from fairline.linearize.surrogates import require_surrogate, start_masked
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
from fairline.training import Progress, ProgressCallback, run_epochs

logger = logging.getLogger(__name__)

#: Puts an entry behind or before all others, whatever its weight.
_FAR = 1e4


@dataclass(kw_only=True)
class MaskLearning:
    """Minimise ``objective + λ·Σ wᵢ·mᵢ`` over weights and masks; subclasses say what a mask is.

    Attributes:
        lam: λ at the start.
        growth: Factor by which λ grows after an epoch in which the number of ReLUs did not fall below its lowest.
        patience: Epochs before λ may grow.
        threshold: Where a mask counts as a ReLU.
        lr: Of Adam.
        temperature: T of the distillation.
        batch_size: Samples in a step.
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
        surrogate: What stands in a ReLU's place: ``"identity"`` or ``"quadratic"``, fitted and learned.
        seed: Of the whole run.
    """

    name = ""
    title = ""

    lam: float = 1e-5
    growth: float = 1.1
    patience: int = 5
    threshold: float = 1e-2
    lr: float = 1e-3
    temperature: float = 4.0
    batch_size: int = 256
    max_epochs: int = 2000
    granularity: Granularity = "pixel"
    exact: bool = True
    augment: bool = False
    objective: Objective | None = None
    protect: float = 0.0
    protect_samples: int = 200
    empty_layers: float = 0.0
    surrogate: Surrogate = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        require_surrogate(self.surrogate)
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
        if not self.protect >= 0 or self.protect_samples < 1:
            raise FairlineError(
                f"{self.title} needs protect ≥ 0 and protect_samples ≥ 1, "
                f"not {self.protect} and {self.protect_samples}."
            )
        if not 0 <= self.empty_layers <= 1:
            raise FairlineError(f"{self.title} needs empty_layers in [0, 1], not {self.empty_layers}.")

    def prepare(self, student: nn.Module) -> None:
        """Make the masks of a student learnable."""
        for layer in masked_relus(student).values():
            layer.learn(self.granularity)

    def optimizer(self, student: nn.Module) -> Optimizer:
        """Over weights and masks."""
        return Adam(student.parameters(), lr=self.lr)

    def sparsity(self, layer: MaskedReLU) -> Tensor:
        """What a layer's masks add to Σ m, each; of the compact shape."""
        raise NotImplementedError

    def open(self, layer: MaskedReLU) -> Tensor:
        """Which of a layer's masks count as ReLUs, bool of the compact shape."""
        raise NotImplementedError

    def close(self, layer: MaskedReLU) -> None:
        """Close all of a layer's masks, and keep them closed."""
        weight = cast(nn.Parameter, layer.weight)
        with torch.no_grad():
            weight.zero_()
        weight.requires_grad_(False)

    def price_scale(self, total: int) -> float:
        """Of λ, for a network of ``total`` ReLUs."""
        return 1.0

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

        Args:
            model: The trained network, also the teacher; not changed.
            train: Training part.
            budgets: Fractions (float, up to 1.0) or counts (int) of ReLUs to keep.
            device: The accelerator if there is one, by default.
            progress: Called after every batch.
            checkpoint: Folder to resume from and to save to.
            history: Rows, one an epoch, are appended here.

        Raises:
            FairlineError: A budget is impossible, or the model has no ReLU.
        """
        device = resolve_device(device)
        folder = None if checkpoint is None else Path(checkpoint)
        teacher = copy_model(model).to(device)
        student = start_masked(model, train, self.surrogate, device, seed=self.seed)
        total = relu_count(student)
        pending = resolve_budgets(budgets, total)
        self.prepare(student)
        layers = masked_relus(student)
        frozen = copy_model(student)
        scale = self.price_scale(total)

        def penalty() -> Tensor:
            # Σ m over ReLUs: a mask that covers several counts for each.
            sums = []
            for name, layer in layers.items():
                masks = self.sparsity(layer)
                if state.prices:
                    sums.append((masks * state.prices[name].to(masks)).sum())
                else:
                    sums.append(masks.sum() * units_of(layer))
            return state.lam * scale * torch.stack(sums).sum()

        def report(update: Progress) -> None:
            # Where the run ends is not known beforehand; the count says how far it is.
            message = f"epoch {state.epoch + 1}, {state.count:,} of {total:,} ReLUs open, aim {smallest:,}"
            cast(ProgressCallback, progress)(replace(update, message=message))

        smallest = pending[-1]

        def reclose(closed: list[str]) -> None:
            for name in closed:
                self.close(layers[name])

        state = _State(self.lam, total, reclose)
        protection = None
        if self.protect > 0:
            protection = Protection(train.to(device), teacher, self.protect, self.protect_samples, self.seed)
        epochs = run_epochs(
            student,
            train,
            epochs=self.max_epochs,
            optimizer=self.optimizer(student),
            objective=self.objective or ERM(self.temperature),
            teacher=teacher,
            batch_size=self.batch_size,
            augment=self.augment,
            penalty=penalty,
            seed=self.seed,
            device=device,
            stage=f"{self.title} mask learning",
            progress=None if progress is None else report,
            checkpoint=None if folder is None else folder / f"{self.name}.safetensors",
            stateful={self.name: state},
        )

        def cut(budget: int) -> Linearized:
            file = None if folder is None else folder / f"snapshot-{budget}.safetensors"
            snapshot = copy_model(frozen).to(device)
            if file is not None and file.exists():
                tensors, saved = load_tensors(file)
                snapshot.load_state_dict(tensors)
                info, state.rows = saved["info"], saved["rows"]
            else:
                snapshot.load_state_dict(student.state_dict())
                info = {"epoch": state.epoch, "lambda": state.lam, "open": state.count}
                if file is not None:
                    save_tensors(file, snapshot.state_dict(), {"info": info, "rows": state.rows})
            if history is not None:
                history[:] = state.rows
            info = {**info, "reached": info["open"] <= budget}
            relus = self._fix(snapshot, budget, fill=self.exact or not info["reached"])
            return Linearized(snapshot.to(device), budget, relus, total, self.name, self.seed, info)

        # Budgets that hold before any learning (the whole network), or that an interrupted run has crossed.
        state.count = total
        while pending and (pending[0] >= total or _crossed(folder, pending[0])):
            yield cut(pending.pop(0))
        if not pending:
            return
        for epoch in epochs:
            state.epoch = epoch.epoch
            state.count = open_relus(self, student)
            if state.count < state.lowest:
                state.lowest = state.count
            elif epoch.epoch > self.patience:
                state.lam *= self.growth
            if self.empty_layers > 0:
                self._empty(layers, state)
                state.count = open_relus(self, student)
            logger.info("epoch %d: %d ReLUs open, λ = %.3g", state.epoch, state.count, state.lam)
            row = {**epoch.row(), "relus": state.count, "lambda": state.lam}
            if protection is not None:
                worst, prices = protection.prices(student)
                state.prices = {name: covered(price, layers[name]) for name, price in prices.items()}
                row["protected_group"] = worst
            row["layers"] = sum(bool(self.open(layer).any()) for layer in layers.values())
            state.rows.append(row)
            while pending and state.count <= pending[0]:
                yield cut(pending.pop(0))
            if not pending:
                return
        for budget in pending:
            logger.warning(
                "%s stopped after %d epochs with %d ReLUs open; budget %d keeps the largest masks as they are",
                self.title,
                self.max_epochs,
                state.count,
                budget,
            )
            yield cut(budget)

    def _fix(self, snapshot: nn.Module, budget: int, *, fill: bool) -> int:
        """Make the masks binary; returns ReLUs kept."""
        layers = masked_relus(snapshot)
        opens = {name: self.open(layer) for name, layer in layers.items()}
        if not fill:
            for name, layer in layers.items():
                layer.set_mask(opens[name])
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
        using = {name: self.open(layer) for name, layer in layers.items() if name not in state.closed}
        density = sum(float(o.double().mean()) * layers[n].kept.numel() for n, o in using.items())
        density /= sum(layers[name].kept.numel() for name in using)
        for name, is_open in using.items():
            if float(is_open.double().mean()) < self.empty_layers * density:
                state.closed.append(name)
                logger.info(
                    "%s is emptied: %d of its ReLUs were open", name, int(is_open.sum()) * units_of(layers[name])
                )
        for name in state.closed:
            self.close(layers[name])


def units_of(layer: MaskedReLU) -> int:
    """How many ReLUs one entry of a learned mask covers."""
    return layer.kept.numel() // cast(Tensor, layer.weight).numel()


def open_relus(method: MaskLearning, model: nn.Module) -> int:
    """How many ReLUs have a mask that counts."""
    return sum(int(method.open(layer).sum()) * units_of(layer) for layer in masked_relus(model).values())


def _crossed(folder: Path | None, budget: int) -> bool:
    return folder is not None and (folder / f"snapshot-{budget}.safetensors").exists()


class _State:
    """What changes from epoch to epoch."""

    def __init__(self, lam: float, total: int, reclose: Callable[[list[str]], object]) -> None:
        self.lam = lam
        self.lowest = total
        self.count = total
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
