"""The whole path in one call, with settings for a short run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fairline.jobs.audit import audit_job
from fairline.jobs.finetune import finetune_job
from fairline.jobs.linearize import linearize_job
from fairline.jobs.train import train_job
from fairline.runs import DataSpec, Run
from fairline.training import ProgressCallback


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

    Mask learning here uses a larger learning rate and λ than SNL publishes, so that masks close within a short
    run; the settings are in each run's config.

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
    small = data.name == "digits"
    out = Path(out)
    batch_size = 32 if small else 128
    base = train_job(
        out / "train",
        data,
        model or ("cnn" if small else "resnet18"),
        {} if width is None else {"width": width},
        epochs=epochs or (40 if small else 20),
        lr=0.05,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    cuts = linearize_job(
        base.folder,
        out / "linearize",
        budgets or (0.5, 0.1, 0.02),
        "snl",
        lr=0.01 if small else 3e-3,
        lam=3e-4 if small else 1e-3,
        max_epochs=max_epochs or (200 if small else 40),
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    students = finetune_job(
        cuts.folder,
        out / "finetune",
        epochs=finetune_epochs or (40 if small else 10),
        lr=5e-3,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    return audit_job([students.folder], out / "audit", seed=seed, device=device, progress=progress)
