"""A process among others that do the same work; here the only one, of which everything is trivial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

T = TypeVar("T")


class Stateful(Protocol):
    """What can be made alike everywhere."""

    def state_dict(self) -> dict[str, Any]:
        """Current state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take over another one's."""
        ...


class Ranks:
    """The processes at work together, as one of them sees them: this one alone.

    Attributes:
        rank: Of this process, from 0.
        size: How many there are.
        device: Of this process; None where it may choose.
    """

    rank = 0
    size = 1
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files, reports progress and logs."""
        return self.rank == 0

    def part(self, n: int, unit: int = 1) -> slice:
        """Which of n things this process computes; all of them where there are too few to go round.

        Args:
            n: How many.
            unit: So many stay together, such as the images of a forward pass.

        Returns:
            Their positions.

        >>> Ranks().part(10, unit=4)
        slice(0, 10, None)
        """
        return slice(0, n)

    def gather(self, own: Tensor, n: int, unit: int = 1) -> Tensor:
        """All n rows, of which this process has computed those of its part; differentiable.

        Args:
            own: Rows of :meth:`part`.
            n: How many there are.
            unit: As for :meth:`part`.

        Returns:
            (n, …), the same on all ranks.
        """
        return own

    def sum(self, own: Tensor, n: int, unit: int = 1) -> Tensor:
        """Sum over n things, of which ``own`` is the sum over this process's part; ``n`` and ``unit`` as there."""
        return own

    @contextmanager
    def dividing(self, n: int, device: torch.device) -> Iterator[None]:
        """A forward pass of the part of a batch of n images.

        Batch normalisation inside is over the whole batch, and the network's own randomness is not that of the other
        ranks' images.

        Args:
            n: Images of the whole batch.
            device: Where the network is.

        Yields:
            Nothing.
        """
        yield

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Gradients, for an optimizer's parameters, of a loss that all ranks have computed from gathered logits."""
        loss.backward()

    def first(self, compute: Callable[[], T]) -> T:
        """What the first rank computes, on all; for what depends on time, on files or on the machine.

        Args:
            compute: Called on the first rank.

        Returns:
            Its result, which can be pickled.
        """
        return compute()

    def agree(self, *parts: Stateful) -> None:
        """Give all ranks the first one's state, so that what each has computed is the same to the last bit."""

    def barrier(self) -> None:
        """Wait until all are here."""


_here = Ranks()


def here() -> Ranks:
    """The ranks, as this process sees them."""
    return _here


def become(ranks: Ranks) -> None:
    """Make this process one of several."""
    global _here
    _here = ranks
