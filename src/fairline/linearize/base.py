"""What every linearizer takes and gives: ``Method(...).linearize(model, train, budgets)``.

Source: none. :class:`Linearizer` does what all methods do; a method implements :meth:`Linearizer.cuts`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fairline._io import load_tensors, read_json, resolve_device, save_tensors, write_json
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.linearize.identity import claim, data_digest, described, network_digest
from fairline.linearize.surrogates import start_masked
from fairline.masking import Surrogate, copy_model, masked_relus, relu_count, require_surrogate
from fairline.precision import Arithmetic, Precision, require_precision
from fairline.ranks import here
from fairline.training import TRIAL_IMAGES, ProgressCallback, choose

if TYPE_CHECKING:
    from fairline.linearize.for_cost import ForCost

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Linearized:
    """A network at a ReLU budget.

    Attributes:
        model: Masked, masks fixed; finetune it next.
        budget: ReLU count asked for.
        relus: ReLUs kept for each sample.
        total: ReLUs before linearization.
        method: Name of the linearizer.
        seed: Of the run.
        info: What the method wants to say, e.g. the epoch at which the budget was crossed.
    """

    model: nn.Module
    budget: int
    relus: int
    total: int
    method: str
    seed: int | None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Share of the ReLUs that is kept."""
        return self.relus / self.total


@dataclass(frozen=True)
class Cut:
    """What a method gives for a budget.

    Attributes:
        budget: ReLU count asked for.
        model: Masked, masks fixed, and not changed any more.
        info: Goes into :attr:`Linearized.info`.
    """

    budget: int
    model: nn.Module
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Linearization:
    """A linearization in progress: what a method has in hand.

    Attributes:
        teacher: A copy of the trained network on ``device``, in evaluation mode.
        student: A masked copy on ``device``, its surrogates fitted; the method may change it. It keeps the ReLUs that
            the network has: all, or what an earlier linearization left.
        train: Training part on ``device``.
        val: Validation part on ``device``, if there is one.
        total: ReLUs of the network, cut ones counted.
        open: Those of them that it has still.
        asked: All budgets as counts, from the largest to the smallest.
        budgets: Those of them that the method must still give a network for.
        device: Where the work is done.
        precision: What was asked for; :attr:`arithmetic` is what came of it.
        progress: Called after every batch.
        folder: Of checkpoints, if any are kept.
        rows: History so far, one row an epoch; the method replaces or extends it.
        choice: Rows on the layers that were emptied before the method began; see
            :class:`~fairline.linearize.for_cost.ForCost`.
        emptied: Those layers.
    """

    teacher: nn.Module
    student: nn.Module
    train: GroupedData
    total: int
    open: int
    asked: tuple[int, ...]
    budgets: list[int]
    device: torch.device
    val: GroupedData | None = None
    precision: Precision | Arithmetic | None = None
    progress: ProgressCallback | None = None
    folder: Path | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    choice: list[dict[str, Any]] = field(default_factory=list)
    emptied: tuple[str, ...] = ()

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """What training and the passes within it compute in; settled when first asked for, and kept in the folder."""
        return here().first(self._settled)

    def _settled(self) -> Arithmetic:
        file = None if self.folder is None else self.folder / "precision.json"
        if file is not None and file.exists():
            return Arithmetic(**read_json(file))
        found = choose(self.precision, self.student, self.train.normalized(slice(TRIAL_IMAGES)), self.device)
        if file is not None:
            write_json(file, found.to_dict())
        return found

    def file(self, name: str) -> Path | None:
        """A checkpoint's path, ``name.safetensors`` in the folder; None where none are kept."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def save(self, cut: Cut) -> None:
        """Keep a network, with the history that led to it, for a run that resumes."""
        file = self.file(f"snapshot-{cut.budget}")
        if file is not None:
            save_tensors(file, cut.model.state_dict(), {"info": dict(cut.info), "rows": self.rows})

    def saved(self) -> Iterator[Cut]:
        """Take budgets that an interrupted run has met off the list, from the largest on.

        Yields:
            Their networks; ``rows`` is the history up to each.
        """
        while self.budgets:
            file = self.file(f"snapshot-{self.budgets[0]}")
            if file is None or not file.exists():
                return
            tensors, about = load_tensors(file)
            network = copy_model(self.student)
            network.load_state_dict(tensors)
            self.rows = about["rows"]
            yield Cut(self.budgets.pop(0), network, about["info"])


@dataclass(kw_only=True)
class Linearizer(ABC):
    """A method that switches ReLUs off. Subclasses are dataclasses of their settings and implement :meth:`cuts`.

    A network that is linearized already may be given to every method: what is cut stays cut, and budgets are counted
    against all ReLUs that it had at first.

    Attributes:
        surrogate: What stands in a ReLU's place: ``"identity"``, ``"zero"``, or ``"quadratic"`` or ``"cubic"``, fitted.
        precision: What methods that train compute in: ``"fp32"``, ``"bf16"`` or ``"auto"``; float32 on a CPU if None.
            See :func:`fairline.training.choose`.
        for_cost: Which layers are emptied before the method begins, for what the network costs then; none by default.
        teacher: Source of distillation; the network that is linearized, as it is given, by default.
        seed: Of the whole run.
    """

    #: On the command line and in tables.
    name: ClassVar[str] = ""
    #: Whether networks go to the checkpoint folder as budgets are met; False where they are made again in no time.
    keeps_snapshots: ClassVar[bool] = True
    #: Whether the method itself measures on the validation part.
    measures: ClassVar[bool] = False

    surrogate: Surrogate = "identity"
    precision: Precision | Arithmetic | None = None
    for_cost: ForCost | None = None
    teacher: nn.Module | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            FairlineError: One of them is impossible.
        """
        require_surrogate(self.surrogate)
        if isinstance(self.precision, str):
            require_precision(self.precision)
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise FairlineError(f"A teacher is a network (nn.Module), not {self.teacher!r}.")
        if self.for_cost is not None and not hasattr(self.for_cost, "choose"):
            raise FairlineError(f"Option 'for_cost' says which layers are emptied (ForCost), not {self.for_cost!r}.")

    @abstractmethod
    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Give a network for each of ``run.budgets``; called once, and only where there is one left.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget, from the largest budget to the smallest.
        """

    def untouched(self, run: Linearization) -> Iterator[Cut]:
        """Take budgets that the student meets as it is off the list.

        Args:
            run: What there is to work with.

        Yields:
            The student itself for each of them.
        """
        while run.budgets and run.budgets[0] >= run.open:
            yield Cut(run.budgets.pop(0), copy_model(run.student))

    def linearize(
        self,
        model: nn.Module,
        train: GroupedData,
        budgets: Sequence[float],
        *,
        val: GroupedData | None = None,
        device: str | torch.device | None = None,
        progress: ProgressCallback | None = None,
        checkpoint: str | Path | None = None,
        history: list[dict[str, float]] | None = None,
    ) -> Iterator[Linearized]:
        """Yield one network a budget, from the largest budget to the smallest.

        Args:
            model: The trained network, linearized already or not; not changed.
            train: Training part.
            budgets: Fractions (float, up to 1.0) or counts (int) of ReLUs to keep.
            val: Validation part, on which ``for_cost`` measures what may be emptied, and methods that search measure
                what they find.
            device: The accelerator if there is one, by default.
            progress: Called after every batch.
            checkpoint: Folder to resume from and to save to. It is this run's: other settings, budgets, data or another
                network need another folder.
            history: Rows, one a measurement of ``for_cost`` and one an epoch, are put here before each yield.

        Yields:
            The networks, as they are found: whoever stops early saves the rest of the work.

        Raises:
            FairlineError: A budget is impossible, the model has no ReLU, the method cannot act on the model or data, or
                the checkpoint folder is another run's.
        """
        run = self._start(model, train, budgets, resolve_device(device), progress, checkpoint, val)
        for cut in self._all_cuts(run):
            if history is not None:
                history[:] = [*run.choice, *run.rows]
            kept = relu_count(cut.model)
            info = {"reached": True, **({"emptied": list(run.emptied)} if self.for_cost else {}), **cut.info}
            logger.info("%s, budget %d: %d of %d ReLUs; %s", self.name, cut.budget, kept, run.total, info)
            yield Linearized(cut.model, cut.budget, kept, run.total, self.name, self.seed, info)

    def start(self, model: nn.Module, train: GroupedData, device: torch.device) -> nn.Module:
        """The student as a run begins with it: a masked copy of the network that computes what the network does.

        Args:
            model: The network.
            train: Training part, that surrogates are fitted on.
            device: Where to put it.

        Returns:
            The student.
        """
        return start_masked(model, train, self.surrogate, device, seed=self.seed)

    def _start(
        self,
        model: nn.Module,
        train: GroupedData,
        budgets: Sequence[float],
        device: torch.device,
        progress: ProgressCallback | None,
        checkpoint: str | Path | None,
        val: GroupedData | None = None,
    ) -> Linearization:
        student = self.start(model, train, device)
        total = sum(layer.kept.numel() for layer in masked_relus(student).values())
        counts = resolve_budgets(budgets, total)
        folder = None if checkpoint is None else Path(checkpoint)
        if folder is not None:
            settings = {each.name: described(getattr(self, each.name)) for each in fields(self)}
            images, network = data_digest(train), network_digest(model)
            own = {"method": self.name, "budgets": counts, **settings, "training images": images, "network": network}
            if self.measures or (val is not None and self.for_cost is not None):
                own["validation images"] = None if val is None else data_digest(val)
            claim(folder, own)
        return Linearization(
            teacher=copy_model(self.teacher or model).to(device).eval(),
            student=student,
            train=train.to(device),
            total=total,
            open=relu_count(student),
            asked=tuple(counts),
            budgets=counts,
            device=device,
            val=None if val is None else val.to(device),
            precision=self.precision,
            progress=progress,
            folder=folder,
        )

    def _all_cuts(self, run: Linearization) -> Iterator[Cut]:
        """What the network meets as it is, what an interrupted run has met, then what the method finds."""
        yield from self.untouched(run)
        if run.budgets and any(layer.signs is not None for layer in masked_relus(run.student).values()):
            raise FairlineError(
                f"Units of {type(run.student).__name__} share signs, {run.open} for each image; no method goes on from "
                "there; start from the network before that."
            )
        if self.for_cost is not None and run.budgets:
            self.for_cost.choose(run, self.seed)
            yield from self.untouched(run)
        if self.keeps_snapshots:
            yield from run.saved()
            # What is saved from here on is not what another process looks for.
            here().barrier()
        if not run.budgets:
            return
        for cut in self.cuts(run):
            if self.keeps_snapshots:
                run.save(cut)
            yield cut


def set_aside(train: GroupedData, share: float, seed: int) -> tuple[GroupedData, GroupedData]:
    """Split the training part into images to measure on and images to train on.

    Args:
        train: Training part.
        share: Of it that is measured on.
        seed: Of the choice.

    Returns:
        Both parts.

    Raises:
        FairlineError: There are too few images.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    aside = int(share * len(train))
    if not 0 < aside < len(train):
        raise FairlineError(f"{train.name}: {len(train)} images are too few to set {share:.0%} aside.")
    return train.select(order[:aside]), train.select(order[aside:])


def held_out(run: Linearization, share: float, samples: int, seed: int) -> tuple[GroupedData, GroupedData]:
    """Images to measure on that no weight learns from: of the validation part, or set aside where there is none.

    Args:
        run: Its data.
        share: Of the training part that is set aside where there is no validation part.
        samples: Images to measure on, at most.
        seed: Of the choice.

    Returns:
        The images to measure on, and those to train on.

    Raises:
        FairlineError: There are too few images.
    """
    measuring, training = (run.val, run.train) if run.val is not None else set_aside(run.train, share, seed)
    order = torch.randperm(len(measuring), generator=torch.Generator().manual_seed(seed))
    return (measuring.select(order[:samples]) if samples < len(measuring) else measuring), training


def resolve_budgets(budgets: Sequence[float], total: int) -> list[int]:
    """ReLU counts, from the largest to the smallest, each once.

    Args:
        budgets: A float in [0, 1] is a fraction of ``total``, an int a count; NumPy's numbers are what they are named.
        total: ReLUs of the whole network.

    Returns:
        The counts.

    Raises:
        FairlineError: There is no budget, or one is outside of the network.

    Examples:
        >>> resolve_budgets([0.1, 1.0, 20, 0.5], total=448)
        [448, 224, 45, 20]
        >>> resolve_budgets([500], total=448)
        Traceback (most recent call last):
            ...
        fairline.errors.FairlineError: A budget of 500 ReLUs is impossible: the network has 448 ReLUs.
    """
    counts = set()
    for budget in budgets:
        is_count = _is_integer(budget)
        count = int(budget) if is_count else float(budget) * total
        if not (0 <= count <= total):
            what = f"{budget} ReLUs" if is_count else f"the fraction {budget}"
            raise FairlineError(f"A budget of {what} is impossible: the network has {total} ReLUs.")
        counts.add(round(count))
    if not counts:
        raise FairlineError("No ReLU budget was given.")
    return sorted(counts, reverse=True)


def _is_integer(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)
