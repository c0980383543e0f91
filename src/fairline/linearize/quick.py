"""Settings of SNL for a short run: masks that close within a few epochs, whatever the data's size. Quick, not as good.

Adam moves a mask by about the learning rate a step, so masks need ``1/lr`` steps to close; the rest of a run is λ
growing, at a pace, until enough of them do. The published settings take hundreds of epochs for it, which leaves ReLUs
time to prove useful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairline.errors import FairlineError

#: Epochs in which a mask may go from one to zero: on a processor, and on an accelerator, where more are affordable.
MOVING, MOVING_FAST = 3, 8

#: Steps that an epoch should have, so that λ can be told from epoch to epoch; small data get smaller batches.
STEPS = 32

#: λ at the start, and its growth where masks are behind their pace: 1e-2 after eleven epochs, and none resist.
LAM, GROWTH = 1e-4, 1.5

#: Epochs for λ to grow until half of the ReLUs close, and for each halving after that.
GROWING, HALVING = 8, 1.5


@dataclass(frozen=True)
class Quick:
    """Settings that are proposed.

    Attributes:
        settings: Of :class:`~fairline.linearize.snl.SNL`.
        steps: An epoch has.
        epochs: Within which the budgets should be reached; ``max_epochs`` allows for half as many again.
    """

    settings: dict[str, Any]
    steps: int
    epochs: int

    def __str__(self) -> str:
        """In a sentence."""
        said = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        return (
            f"{said}: {self.steps} steps an epoch; the budgets are aimed at within {self.epochs} epochs. Quick, not as "
            "good as slower learning."
        )


def quick(images: int, total: int, budgets: Sequence[int], *, accelerator: bool = False, **given: Any) -> Quick:
    """Propose settings under which SNL reaches its budgets in a few epochs.

    Args:
        images: In the training part.
        total: ReLUs of the network.
        budgets: To keep.
        accelerator: Whether it runs on one.
        given: Settings that are kept as they are; the others are made to fit them.

    Returns:
        The proposal, ``given`` included where it is one of the settings that are proposed.

    Raises:
        FairlineError: There is no image.

    >>> print(quick(16_000, 122_880, [24_576, 6_144]))
    batch_size 128, lr 0.00266667, lam 0.0001, growth 1.5, patience 3, pace 16, max_epochs 24: 125 steps an epoch; the \
budgets are aimed at within 16 epochs. Quick, not as good as slower learning.
    """
    if images < 1:
        raise FairlineError("Settings cannot be made to fit a training part without images.")
    moving = MOVING_FAST if accelerator else MOVING
    fitting = [size for size in (128, 64, 32, 16) if images >= STEPS * size]
    batch_size = int(given.get("batch_size") or (fitting[0] if fitting else 8))
    steps = math.ceil(images / batch_size)
    # Weights learn at the same rate; beyond a hundredth they forget what they knew.
    lr = float(given.get("lr") or min(1e-2, max(1e-3, 1 / (moving * steps))))
    lam, growth = float(given.get("lam") or LAM), float(given.get("growth") or GROWTH)
    closing = math.ceil(1 / (lr * steps))
    patience = int(given.get("patience", closing))
    halvings = math.log2(max(total, 1) / max(min(budgets, default=0), 1))
    growing = math.ceil(GROWING + HALVING * max(0.0, halvings - 1))
    # Where masks are slow, so is what λ does: they follow it after as many epochs.
    pace = int(given.get("pace") or max(closing, patience) + growing + 2 * max(0, closing - moving))
    proposed = {"batch_size": batch_size, "lr": lr, "lam": lam, "growth": growth, "patience": patience, "pace": pace}
    return Quick({**proposed, "max_epochs": int(given.get("max_epochs") or math.ceil(1.5 * pace))}, steps, pace)
