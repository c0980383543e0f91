"""The whole path in one call, with settings for a short run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairline.jobs.audit import audit_job
from fairline.jobs.finetune import finetune_job
from fairline.jobs.linearize import linearize_job
from fairline.jobs.train import train_job
from fairline.runs import DataSpec, Run
from fairline.training import ProgressCallback


@dataclass(frozen=True)
class _Schedule:
    """Settings of a short run.

    Masks are learned with a larger learning rate and λ than SNL publishes, so that they close within it.
    """

    model: str
    batch_size: int
    epochs: int
    finetune_epochs: int
    max_epochs: int
    mask_lr: float
    lam: float


_DIGITS = _Schedule("cnn", 32, epochs=40, finetune_epochs=40, max_epochs=200, mask_lr=0.01, lam=3e-4)
_PHOTOS = _Schedule("resnet18", 128, epochs=20, finetune_epochs=10, max_epochs=40, mask_lr=3e-3, lam=1e-3)


def run_demo(
    out: str | Path,
    data: DataSpec,
    *,
    model: str | None = None,
    width: int | None = None,
    budgets: Sequence[float] | None = None,
    epochs: int | None = None,
    finetune_epochs: int | None = None,
    max_epochs: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Train, linearize, finetune and audit into subfolders of ``out``; resumes what an earlier call began.

    Args:
        out: Folder of the four runs.
        data: What to train on.
        model: Architecture; ``cnn`` for digits, else ``resnet18``.
        width: Channels of its first stage.
        budgets: ReLUs to keep; 50, 10 and 2 % by default.
        epochs: Of base training.
        finetune_epochs: Of each finetune.
        max_epochs: Of mask learning, at most.
        seed: Of everything.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.

    Returns:
        The audit run.
    """
    usual = _DIGITS if data.name == "digits" else _PHOTOS
    out = Path(out)
    common: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    steps = {**common, "batch_size": usual.batch_size}
    options = {} if width is None else {"width": width}
    base = train_job(
        out / "train", data, model or usual.model, options, epochs=epochs or usual.epochs, lr=0.05, **steps
    )
    learned: dict[str, Any] = {"lr": usual.mask_lr, "lam": usual.lam, "max_epochs": max_epochs or usual.max_epochs}
    cuts = linearize_job(base.folder, out / "linearize", budgets or (0.5, 0.1, 0.02), "snl", **learned, **steps)
    students = finetune_job(
        cuts.folder, out / "finetune", epochs=finetune_epochs or usual.finetune_epochs, lr=5e-3, **steps
    )
    return audit_job([students.folder], out / "audit", **common)
