"""What every measurement takes and gives: a subject in, tidy rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fairline.audit.functional import Functional
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.ranks import here
from fairline.training import Progress, ProgressCallback, choose

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        group: Group name, or ``"overall"``.
        measure: Name of the measure.
        value: The number.
        low: Lower 95 % limit; NaN where the measure has none.
        high: Upper 95 % limit, likewise.
        n: Samples behind it.
        label: Name of the class whose samples they are; empty for all classes.
    """

    group: str
    measure: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0
    label: str = ""


@dataclass(frozen=True)
class Predictions:
    """What a model says of each sample, on the CPU.

    Attributes:
        logits: float32, (N, K).
        loss: float64, (N,): cross-entropy in nats.
        correct: bool, (N,).
    """

    logits: Tensor
    loss: NDArray[np.float64]
    correct: NDArray[np.bool_]


def predictions(model: nn.Module, data: GroupedData, device: torch.device) -> Predictions:
    """Predictions of a model, in evaluation mode.

    Args:
        model: Maps (B, C, H, W) to (B, K).
        data: The samples.
        device: Where to compute.

    Returns:
        Logits, losses and what is right, of every sample.

    Raises:
        FairlineError: A logit is not finite.
    """
    arithmetic = choose("fp32", model, data.normalized(slice(2)), device)
    logits = predict(model, data, device=device, arithmetic=arithmetic, ranks=here()).cpu()
    broken = ~logits.isfinite().all(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise FairlineError(
            f"The loss of {type(model).__name__} is not finite on {int(broken.sum())} of {len(data)} images "
            f"of {data.name} (the first is number {first}, group '{data.group_names[int(data.groups[first])]}')."
        )
    labels = data.labels.cpu()
    loss = F.cross_entropy(logits.double(), labels, reduction="none").numpy()
    return Predictions(logits, loss, (logits.argmax(1) == labels).numpy())


@dataclass(eq=False)
class Subject:
    """A model under audit.

    Attributes:
        model: The model.
        data: What it is measured on.
        reference: The model that it is compared with, on the same data, or None.
        device: Where to compute.
        seed: Of the bootstrap and of every other random choice.
        resamples: Bootstrap resamples.
        name: What to call the model.
        progress: Told how far long measures are, or None.
        sizes: How many training images each group has, where that is known.
        samples: Columns of the per-sample table, (N,) each; a measure may add its own.
        rows: Those of the measures taken so far.
    """

    model: nn.Module
    data: GroupedData
    reference: Subject | None
    device: torch.device
    seed: int = 0
    resamples: int = 2000
    name: str = "model"
    progress: ProgressCallback | None = None
    sizes: Mapping[str, int] | None = None
    samples: dict[str, NDArray[Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def predictions(self) -> Predictions:
        """Of the model."""
        return predictions(self.model, self.data, self.device)

    @cached_property
    def functional(self) -> Functional:
        """The model's loss as a function of its parameters."""
        return Functional(self.model, self.data, self.device)

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """The result of ``compute``, which runs once for each key: measures share what is dear."""
        if key not in self._kept:
            self._kept[key] = compute()
        value: T = self._kept[key]
        return value

    def group_index(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Name and sample positions of each group."""
        groups = self.data.groups.cpu().numpy()
        for position, name in enumerate(self.data.group_names):
            yield name, np.flatnonzero(groups == position)

    def report(self, stage: str, done: int, total: int, message: str = "") -> None:
        """Tell whoever watches."""
        if self.progress is not None and here().is_first:
            self.progress(Progress(f"{self.name}: {stage}", done, total, message))


def class_name(data: GroupedData, index: int) -> str:
    """Name of an output; a model may have more of them than the data have classes."""
    return data.class_names[index] if index < data.num_classes else f"output {index}"
