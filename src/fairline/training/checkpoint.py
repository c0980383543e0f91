"""A run's whole state in one safetensors file: weights, optimiser, schedule, random numbers, and what a caller adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fairline._io import load_state, save_state
from fairline.errors import FairlineError
from fairline.precision import Arithmetic


class Stateful(Protocol):
    """Something that a checkpoint must hold beside the model."""

    def state_dict(self) -> dict[str, Any]:
        """Current state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore it."""
        ...


def save(path: Path, parts: Mapping[str, Any], generator: torch.Generator, epoch: int, arithmetic: Arithmetic) -> None:
    """Write the state after an epoch, atomically.

    Args:
        path: The file.
        parts: What has a ``state_dict``, by name.
        generator: Of shuffling and augmentation; torch's global generators are kept as well.
        epoch: The last one done.
        arithmetic: What the run computes in.
    """
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    if "scheduler" in state:
        state["scheduler"] = {k: v for k, v in state["scheduler"].items() if not k.startswith("_")}
        milestones = state["scheduler"].get("milestones")
        if milestones is not None:
            state["scheduler"]["milestones"] = dict(milestones)
    random = {"shuffle": generator.get_state(), "global": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    save_state(path, {**state, "random": random, "epoch": epoch, "arithmetic": arithmetic.to_dict()})


def arithmetic_of(path: Path) -> Arithmetic | None:
    """What a run computed in before it was interrupted; None where there is no checkpoint of it, or an old one."""
    kept = load_state(path).get("arithmetic") if path.exists() else None
    return None if kept is None else Arithmetic(**kept)


def restore(path: Path, parts: Mapping[str, Any], generator: torch.Generator) -> int:
    """Put back what :func:`save` wrote.

    Args:
        path: The file.
        parts: The same parts.
        generator: Of shuffling and augmentation.

    Returns:
        The last epoch done.

    Raises:
        FairlineError: The file is broken, or its parts do not fit these.
    """
    state = load_state(path)
    try:
        for name, part in parts.items():
            if name == "scheduler" and "milestones" in state[name]:
                state[name]["milestones"] = type(part.milestones)(state[name]["milestones"])
            part.load_state_dict(state[name])
        generator.set_state(state["random"]["shuffle"])
        torch.set_rng_state(state["random"]["global"])
        if "cuda" in state["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"]["cuda"])
        return int(state["epoch"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairlineError(f"Checkpoint {path} belongs to another run ({reason}).") from None
