"""Training a base network and finetuning a linearized one: the training loop, and the best of its epochs.

Base networks are trained as by the published code of SNL (Cho et al. 2022); the finetune is line 12 of its Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Objective
from fairline.objectives.erm import ERM
from fairline.training.loop import LOOP_DEFAULTS, Epoch, LoopSettings, run_epochs

Select = Literal["accuracy", "loss", "worst_group_accuracy", "last"]


class Settings(LoopSettings, total=False):
    """What :func:`train` and :func:`finetune` share beside the loop's: keyword arguments, with :data:`DEFAULTS`.

    Attributes:
        objective: What to minimise; :class:`~fairline.objectives.erm.ERM` by default.
        momentum: Of SGD.
        weight_decay: Of SGD.
        clip: Norm that gradients are cut to in each step; None leaves them. Networks with polynomials in place of ReLUs
            can diverge without: each layer raises what the last one let through to a power.
        select: What makes an epoch the best on the validation part; ``"last"`` keeps the last one. Under an objective
            that changes its mind while it trains (λ of Algorithm 1 is 0 in the first epoch), ``"accuracy"`` may choose
            an epoch before it acts; ``"worst_group_accuracy"`` or ``"last"`` do not.
    """

    objective: Objective | None
    momentum: float
    weight_decay: float
    clip: float | None
    select: Select


DEFAULTS = Settings(**LOOP_DEFAULTS, objective=None, momentum=0.9, weight_decay=5e-4, clip=None, select="accuracy")


def train(
    model: nn.Module,
    train: GroupedData,
    val: GroupedData | None = None,
    *,
    epochs: int = 160,
    lr: float = 0.1,
    milestones: Sequence[float] = (0.5, 0.75),
    **settings: Unpack[Settings],
) -> list[dict[str, float]]:
    """Train a network from its current weights, as the published SNL code trains its base models.

    SGD with momentum; the learning rate falls tenfold at each milestone. The epoch with the best validation
    value is kept. The paper augments nothing.

    Args:
        model: Trained in place.
        train: Training part.
        val: Validation part; without it the last epoch is kept.
        epochs: How many.
        lr: Learning rate at the start.
        milestones: Fractions of ``epochs`` at which the learning rate falls.
        settings: ``objective``, ``momentum``, ``weight_decay``, ``clip`` and ``select``, see :class:`Settings`;
            ``batch_size``, ``augment``, ``seed``, ``device``, ``progress`` and ``checkpoint``, see
            :class:`~fairline.training.loop.LoopSettings`.

    Returns:
        One row an epoch: what :class:`~fairline.training.loop.Epoch` holds.
    """

    def falls(optimizer: Optimizer) -> LRScheduler:
        return MultiStepLR(optimizer, [max(1, round(epochs * fraction)) for fraction in milestones], gamma=0.1)

    return _fit(model, train, val, epochs=epochs, lr=lr, schedule=falls, stage="training", **_complete(settings))


def finetune(
    model: nn.Module,
    teacher: nn.Module | None,
    train: GroupedData,
    val: GroupedData | None = None,
    *,
    epochs: int = 100,
    lr: float = 1e-3,
    nesterov: bool = False,
    history: list[dict[str, float]] | None = None,
    **settings: Unpack[Settings],
) -> nn.Module:
    """Finetune a linearized network under knowledge distillation (Cho et al. 2022, Algorithm 1, line 12).

    SGD with momentum and a cosine schedule, on ``CE + T²·KL`` by default. Masks stay as they are. The paper augments
    nothing.

    Args:
        model: With fixed masks; trained in place.
        teacher: The network before linearization; None finetunes on the labels alone.
        train: Training part.
        val: Validation part; without it the last epoch is kept.
        epochs: How many.
        lr: Learning rate at the start.
        nesterov: Whether SGD's momentum is Nesterov's.
        history: Rows, one an epoch, are appended here.
        settings: As for :func:`train`.

    Returns:
        The model itself.
    """

    def cosine(optimizer: Optimizer) -> LRScheduler:
        return CosineAnnealingLR(optimizer, epochs)

    rows = _fit(
        model,
        train,
        val,
        epochs=epochs,
        lr=lr,
        schedule=cosine,
        stage="finetuning",
        teacher=teacher,
        nesterov=nesterov,
        **_complete(settings),
    )
    if history is not None:
        history.extend(rows)
    return model


def _complete(settings: Settings) -> Settings:
    """The settings with those not given; a typed dictionary refuses no name while a program runs."""
    for name in settings.keys() - DEFAULTS.keys():
        raise TypeError(f"There is no setting '{name}'; settings are {', '.join(DEFAULTS)}.")
    return DEFAULTS | settings


def _fit(
    model: nn.Module,
    train: GroupedData,
    val: GroupedData | None,
    *,
    epochs: int,
    lr: float,
    schedule: Callable[[Optimizer], LRScheduler],
    stage: str,
    objective: Objective | None,
    momentum: float,
    weight_decay: float,
    clip: float | None,
    select: Select,
    teacher: nn.Module | None = None,
    nesterov: bool = False,
    **loop: Unpack[LoopSettings],
) -> list[dict[str, float]]:
    """Run all epochs of SGD and leave the best weights in the model."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FairlineError(f"{type(model).__name__} has no weights to train.")
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    if clip is not None:
        cut_gradients(optimizer, clip)
    objective = objective or ERM()
    best, history = Best(model, select), History()
    for epoch in run_epochs(
        model,
        train,
        val,
        epochs=epochs,
        optimizer=optimizer,
        objective=objective,
        scheduler=schedule(optimizer),
        teacher=teacher,
        stage=stage,
        stateful={"best": best, "history": history},
        **loop,
    ):
        best.see(epoch)
        history.rows.append(epoch.row())
    best.restore()
    # One of the user's own need not have it.
    if hasattr(objective, "judge"):
        objective.judge(history.rows[best.epoch - 1])
    return history.rows


def cut_gradients(optimizer: Optimizer, norm: float) -> None:
    """Cut the gradient to a norm before each step of an optimizer.

    Args:
        optimizer: Its parameters' gradients are cut together.
        norm: Euclidean, of all of them.

    Raises:
        FairlineError: The norm is not positive.
    """
    if not norm > 0:
        raise FairlineError(f"Gradients are cut to a positive norm (clip), not to {norm}.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, norm)

    optimizer.register_step_pre_hook(cut)


def _score(logged: Mapping[str, float], select: Select) -> list[float]:
    """What of an epoch is compared, the larger the better; NaN first where the last epoch is the best."""
    value = math.nan if select == "last" else logged.get(f"val_{select}", math.nan)
    # A small validation part has many ties in accuracy; the loss decides them.
    return [-value if select == "loss" else value, -logged.get("val_loss", math.nan)]


def best_epoch(history: Sequence[Mapping[str, float]], select: Select) -> int:
    """Which epoch's weights a training kept.

    Args:
        history: A row an epoch, as :func:`train` and :func:`finetune` return them.
        select: As they were told.

    Returns:
        The row's place.
    """
    best, highest = 0, [-math.inf, -math.inf]
    for place, logged in enumerate(history):
        score = _score(logged, select)
        if math.isnan(score[0]) or score > highest:
            best, highest = place, score
    return best


class Best:
    """Keeps the weights of the best epoch, chosen on the validation part, or of the last one."""

    def __init__(self, model: nn.Module, select: Select) -> None:
        if select not in get_args(Select):
            raise FairlineError(f"Epochs are selected by {', '.join(get_args(Select))}, not '{select}'.")
        self.model = model
        self.select = select
        self.score = [-math.inf, -math.inf]
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def see(self, epoch: Epoch) -> None:
        """Keep the current weights if no earlier epoch was as good; without validation, always."""
        score = _score(epoch.row(), self.select)
        if math.isnan(score[0]) or score > self.score:
            self.score, self.epoch = score, epoch.epoch
            self.weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def restore(self) -> None:
        """Put the kept weights into the model."""
        self.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"score": self.score, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.score, self.epoch, self.weights = state["score"], state["epoch"], state["weights"]


class History:
    """The epochs of a run; part of the checkpoint, so that a resumed run has them all."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.rows = state["rows"]
