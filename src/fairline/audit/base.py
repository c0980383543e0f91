"""What every measurement takes and gives: a subject in, tidy rows out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.inference import predict


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
    """

    group: str
    measure: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0


@dataclass(frozen=True)
class Predictions:
    """What a model says of each sample, on the CPU.

    Attributes:
        logits: float32, (N, K).
        loss: float64, (N,): cross-entropy in nats.
        correct: bool, (N,).
    """

    logits: Tensor
    loss: np.ndarray[Any, np.dtype[np.float64]]
    correct: np.ndarray[Any, np.dtype[np.bool_]]


def predictions(model: nn.Module, data: GroupedData, device: torch.device) -> Predictions:
    """Predictions of a model, in evaluation mode."""
    logits = predict(model, data, device=device).cpu()
    labels = data.labels.cpu()
    loss = F.cross_entropy(logits.double(), labels, reduction="none").numpy()
    return Predictions(logits, loss, (logits.argmax(1) == labels).numpy())


@dataclass
class Subject:
    """A model under audit.

    Attributes:
        model: The model.
        data: What it is measured on.
        reference: The model that it is compared with, or None.
        device: Where to compute.
        seed: Of the bootstrap and of every other random choice.
        resamples: Bootstrap resamples.
        options: Settings of measures, by name.
    """

    model: nn.Module
    data: GroupedData
    reference: nn.Module | None
    device: torch.device
    seed: int
    resamples: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def predictions(self) -> Predictions:
        """Of the model."""
        return predictions(self.model, self.data, self.device)

    @cached_property
    def reference_predictions(self) -> Predictions | None:
        """Of the reference."""
        return None if self.reference is None else predictions(self.reference, self.data, self.device)

    def group_index(self) -> Iterable[tuple[str, np.ndarray[Any, np.dtype[np.int64]]]]:
        """Name and sample positions of each group."""
        groups = self.data.groups.cpu().numpy()
        for position, name in enumerate(self.data.group_names):
            yield name, np.flatnonzero(groups == position)
