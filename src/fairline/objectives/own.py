"""Objectives of the user's own: a class in a module or file. One that is not whole is refused before training.

The class may extend :class:`~fairline.objectives.base.Objective` or stand alone; what counts is that it has its parts.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fairline._io import load_state, save_state
from fairline._own import found, told
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective

#: What the training loop calls, and how many arguments it gives.
PARTS = {
    "start": 1,
    "losses": 3,
    "reduce": 2,
    "end_epoch": 2,
    "metrics": 0,
    "state_dict": 0,
    "load_state_dict": 1,
}
#: What it calls where they are there, so that objectives from before them stay whole.
LATER_PARTS = {"start_held_out": 1, "held_out": 3, "judge": 1}
#: What it reads.
ATTRIBUTES = ("subset", "needs_group_losses")


def build_own(name: str, options: Mapping[str, Any]) -> Objective:
    """An objective of the user's own.

    Args:
        name: ``module:Class`` or ``file.py:Class``.
        options: Of its constructor.

    Returns:
        The objective.

    Raises:
        FairlineError: The class cannot be imported or built, or a part of the interface is missing or takes other
            arguments; the sentence names file, class and part.
    """
    with found(name, "Objective", "class") as make, told(f"Objective '{name}' cannot be built", _file(name)):
        made = make(**options)
    for part, count in PARTS.items():
        call = getattr(made, part, None)
        if not callable(call):
            raise FairlineError(f"Objective '{name}' has no method '{part}'; extend fairline.objectives.Objective.")
        _require_arguments(name, part, call, count)
    for part, count in LATER_PARTS.items():
        if hasattr(made, part):
            _require_arguments(name, part, getattr(made, part), count)
    for part in ATTRIBUTES:
        if not hasattr(made, part):
            raise FairlineError(
                f"Objective '{name}' has no '{part}'; extend fairline.objectives.Objective{_why(made)}."
            )
    return cast(Objective, made)


def _require_arguments(name: str, part: str, call: Callable[..., Any], count: int) -> None:
    try:
        inspect.signature(call).bind(*range(count))
    except TypeError:
        raise FairlineError(
            f"Objective '{name}': '{part}' takes other arguments than the {count} that it is given."
        ) from None
    except ValueError:
        # A builtin does not say what it takes; the trial will.
        return


def _why(made: Any) -> str:
    """What a class that extends the interface has left out."""
    return " and call super().__init__() in its __init__" if isinstance(made, Objective) else ""


def _file(name: str) -> str:
    return name.rpartition(":")[0]


def require_whole(name: str, options: Mapping[str, Any], train: GroupedData) -> None:
    """Try an objective on two images, and refuse it where it could not be trained under.

    Args:
        name: ``module:Class`` or ``file.py:Class``.
        options: Of its constructor.
        train: What it will be trained on; its ``start`` sees all of it.

    Raises:
        FairlineError: A part raises, or what it returns is no tensor of the shape, not finite, or without a gradient;
            or its state cannot be kept in a checkpoint. The sentence names file, class and part.
    """
    objective = build_own(name, options)
    trial = _Trial(name, train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(objective, Objective):
            objective.total_epochs = 1
        trial.call(objective, "start", train)
        if getattr(objective, "sees_teacher", False):
            logits = torch.randn(len(train), train.num_classes, device=train.device)
            trial.call(objective, "see_teacher", logits, train, True)
        trial.step(objective, trial.outputs(2))
        if not getattr(objective, "needs_teacher", False):
            trial.step(objective, None)
        if getattr(objective, "needs_held_out", False):
            trial.held_out(objective)
        if objective.needs_group_losses:
            trial.epoch(objective)
        trial.metrics(objective)
        trial.state(objective)


class _Trial:
    """A step, an epoch's end and a checkpoint, with what is returned looked at.

    Args:
        name: Of the objective.
        train: The training data.
    """

    def __init__(self, name: str, train: GroupedData) -> None:
        self.name = name
        self.train = train
        # Two groups where there are, so that what compares groups has something to compare.
        other = int((train.groups != train.groups[0]).int().argmax()) or min(1, len(train) - 1)
        self.index = torch.tensor([0, other], device=train.device)

    def call(self, objective: Objective, part: str, *arguments: Any) -> Any:
        """Call a part; what it raises is a sentence."""
        tried = "an image of each group" if part == "held_out" else "two images"
        with told(f"Objective '{self.name}': '{part}' fails on {tried}", _file(self.name)):
            return getattr(objective, part)(*arguments)

    def refuse(self, part: str, value: Any, wanted: str) -> None:
        """Say what a part returned."""
        if isinstance(value, Tensor):
            what = f"a tensor of shape {tuple(value.shape)}"
            if value.numel() and not bool(torch.isfinite(value.detach()).all()):
                what = "a value that is not finite"
        else:
            what = f"a {type(value).__name__}"
        raise FairlineError(f"Objective '{self.name}': '{part}' returns {what}, not {wanted}.")

    def batch(self, images: Tensor) -> Batch:
        """Two images, or none of them where losses over a data set are asked for."""
        return Batch(images, self.train.labels[self.index], self.train.groups[self.index], self.index)

    def outputs(self, n: int) -> Tensor:
        """Logits of some network, (n, K)."""
        return torch.randn(n, self.train.num_classes, device=self.train.device)

    def step(self, objective: Objective, teacher: Tensor | None) -> None:
        """A forward and backward pass on two images."""
        logits = self.outputs(2).requires_grad_()
        batch = self.batch(self.train.normalized(self.index))
        losses = self.losses(objective, logits, teacher, batch)
        value = self.call(objective, "reduce", losses, batch)
        wanted = "one finite number, a scalar tensor"
        if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() > 0 or not torch.isfinite(value.detach()):
            self.refuse("reduce", value, wanted)
        if not value.requires_grad:
            raise FairlineError(
                f"Objective '{self.name}': what 'reduce' returns has no gradient to the logits, so nothing would be "
                "learned (a detach, an item() or a float() on the way?)."
            )
        with told(f"Objective '{self.name}': what 'reduce' returns cannot be differentiated", _file(self.name)):
            value.backward()
        if logits.grad is None:
            raise FairlineError(
                f"Objective '{self.name}': what 'reduce' returns does not depend on the logits, so nothing would be "
                "learned."
            )
        if not bool(torch.isfinite(logits.grad).all()):
            raise FairlineError(f"Objective '{self.name}': the gradient of what 'reduce' returns is not finite.")

    def losses(self, objective: Objective, logits: Tensor, teacher: Tensor | None, batch: Batch) -> Tensor:
        """The loss of each of two samples."""
        losses = self.call(objective, "losses", logits, teacher, batch)
        if not isinstance(losses, Tensor) or losses.shape != (2,) or not bool(torch.isfinite(losses.detach()).all()):
            self.refuse("losses", losses, "the finite loss of each image, a tensor of shape (2,)")
        return cast(Tensor, losses)

    def epoch(self, objective: Objective) -> None:
        """The end of an epoch, for which losses are computed without images."""
        teacher = self.outputs(2) if getattr(objective, "needs_teacher", False) else None
        with torch.no_grad():
            losses = self.losses(objective, self.outputs(2), teacher, self.batch(self.train.images[:0]))
        groups = losses.double().mean().expand(self.train.num_groups).clone()
        self.call(objective, "end_epoch", groups, groups.mean())

    def held_out(self, objective: Objective) -> None:
        """The validation part, for which an image of each group of the training part stands here."""
        groups = self.train.groups
        index = torch.cat([torch.nonzero(groups == group)[:1, 0] for group in range(self.train.num_groups)])
        batch = Batch(self.train.images[:0], self.train.labels[index], groups[index], index)
        self.call(objective, "start_held_out", self.train)
        self.call(objective, "held_out", self.outputs(len(index)), self.outputs(len(index)), batch)

    def metrics(self, objective: Objective) -> None:
        """What is logged."""
        said = self.call(objective, "metrics")
        if not isinstance(said, Mapping) or not all(isinstance(value, int | float) for value in said.values()):
            self.refuse("metrics", said, "numbers by name")

    def state(self, objective: Objective) -> None:
        """What a checkpoint holds, written and put back."""
        state = self.call(objective, "state_dict")
        if not isinstance(state, dict):
            self.refuse("state_dict", state, "a dict")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "state.safetensors")
            with told(f"Objective '{self.name}': what 'state_dict' returns cannot be kept in a checkpoint"):
                save_state(file, state)
                state = load_state(file)
        self.call(objective, "load_state_dict", state)
