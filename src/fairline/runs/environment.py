"""Where a result came from: versions, device, commit and time."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "fairline",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "fairlearn",
    "pillow",
    "pyarrow",
    "safetensors",
    "altair",
    "spu",
    "jax",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and time, for a run's record."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "packages": versions,
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def provenance(machines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where results came from.

    Args:
        machines: The environments (:func:`environment`) of all runs behind them.

    Returns:
        ``commits``, ``devices``, ``platforms`` and ``python``, each sorted; ``packages``; and ``written``, the date.
    """
    packages: dict[str, str] = {}
    for machine in machines:
        packages |= machine["packages"]
    return {
        "commits": sorted({str(machine["commit"]) for machine in machines}),
        "devices": sorted({machine["device"] for machine in machines}),
        "platforms": sorted({machine["platform"] for machine in machines}),
        "python": sorted({machine["python"] for machine in machines}),
        "packages": packages,
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _commit() -> str | None:
    """Commit of the source tree that this package runs from; of a copy without history, what FAIRLINE_COMMIT says."""
    here = Path(__file__).resolve().parents[1]
    try:
        answers = [
            subprocess.run(["git", "-C", str(here), *query], capture_output=True, text=True, check=True).stdout.strip()
            for query in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(here)])
        ]
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FAIRLINE_COMMIT")
    return answers[0] + ("-dirty" if answers[1] else "")
