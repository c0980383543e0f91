"""How far the parameters moved: ‖θ̃ʳ − θ‖ (paper, Theorem 4.4 and Figure 8, left)."""

from __future__ import annotations

import math

import pandas as pd
from torch import Tensor, nn

from fairline.audit.base import Row, Subject
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError


def comparable(model: nn.Module, reference: nn.Module) -> bool:
    """Whether two networks share parameters; a compiled network shares none with what it was made of."""
    try:
        return bool(shared_parameters(model, reference))
    except FairlineError:
        return False


def shared_parameters(model: nn.Module, reference: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters of equal name and shape in both networks, θ̃ and θ.

    Buffers, such as masks and BatchNorm's running statistics, are no parameters.

    Args:
        model: θ̃.
        reference: θ.

    Returns:
        Both, by name.

    Raises:
        FairlineError: The networks share none.
    """
    theirs = dict(reference.named_parameters())
    shared = {
        name: (own.detach(), theirs[name].detach())
        for name, own in model.named_parameters()
        if name in theirs and theirs[name].shape == own.shape
    }
    if not shared:
        raise FairlineError(
            f"{type(model).__name__} and its reference {type(reference).__name__} share no parameter of equal name "
            "and shape, so there is no distance between them."
        )
    return shared


def parameter_distance(model: nn.Module, reference: nn.Module) -> pd.DataFrame:
    """‖θ̃ − θ‖ over the parameters that both share, by layer.

    Args:
        model: θ̃.
        reference: θ.

    Returns:
        One row a layer (the module that owns the parameters), in the order of the network: ``distance``,
        ``relative`` (divided by ‖θ‖ of the layer; NaN where that is 0) and ``parameters``, their number. The distance
        in all is the root of the sum of squares.

    Raises:
        FairlineError: The networks share no parameter.
    """
    squares: dict[str, list[float]] = {}
    for name, (own, theirs) in shared_parameters(model, reference).items():
        theirs = theirs.to(own.device).double()
        entry = squares.setdefault(name.rpartition(".")[0], [0.0, 0.0, 0.0])
        entry[0] += float((own.double() - theirs).square().sum())
        entry[1] += float(theirs.square().sum())
        entry[2] += own.numel()
    rows = [
        (layer, math.sqrt(moved), math.sqrt(moved / size) if size else math.nan, int(count))
        for layer, (moved, size, count) in squares.items()
    ]
    return pd.DataFrame(rows, columns=["layer", "distance", "relative", "parameters"]).set_index("layer")


def total_distance(model: nn.Module, reference: nn.Module) -> float:
    """‖θ̃ − θ‖ over the parameters that both share."""
    return float((parameter_distance(model, reference)["distance"] ** 2).sum() ** 0.5)


def measure(subject: Subject) -> list[Row]:
    """Rows for the distance, in parameter units; a network has one distance, so all are overall.

    Measures: ``parameter_distance``; ``parameter_distance_relative``, divided by ‖θ‖; ``parameters_shared``, the
    share of the model's parameters that the distance is over; ``parameter_distance/<layer>``, each layer's.

    Args:
        subject: The model; it has a reference.

    Returns:
        The rows.
    """
    assert subject.reference is not None  # audit() requires it
    model, reference = subject.model, subject.reference.model
    table = parameter_distance(model, reference)
    total = total_distance(model, reference)
    size = math.sqrt(sum(float(t.double().square().sum()) for _, t in shared_parameters(model, reference).values()))
    everything = sum(parameter.numel() for parameter in model.parameters())
    n = len(subject.data)
    rows = [
        Row(OVERALL, "parameter_distance", total, n=n),
        Row(OVERALL, "parameter_distance_relative", total / size if size else math.nan, n=n),
        Row(OVERALL, "parameters_shared", float(table["parameters"].sum()) / everything, n=n),
    ]
    rows += [
        Row(OVERALL, f"parameter_distance/{layer}", float(value), n=n) for layer, value in table["distance"].items()
    ]
    return rows
