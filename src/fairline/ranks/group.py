"""One of several processes that are connected by ``torch.distributed``.

All ranks compute the whole batch's loss from gathered logits. The gradient of a gathered row goes back to the rank
that computed it, times the number of ranks, and the parameters' gradients are averaged over ranks. So what each rank
adds to the loss, such as a penalty on masks, counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer

from fairline.errors import FairlineError
from fairline.ranks.alone import Ranks, Stateful
from fairline.ranks.lost import RankLost
from fairline.ranks.normalization import SharedBatchNorm

T = TypeVar("T")


class Group(Ranks):
    """This process among others; the process group of ``torch.distributed`` is there.

    Args:
        rank: Of this process.
        size: How many there are.
        device: Of this process.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._divided = False

    def divides(self, n: int, unit: int = 1) -> bool:
        """Whether there is something to do for each."""
        return -(-n // unit) >= self.size

    def part(self, n: int, unit: int = 1) -> slice:
        """Its share, as even as units allow."""
        if not self.divides(n, unit):
            return slice(0, n)
        units = -(-n // unit)
        start, stop = (min(n, units * rank // self.size * unit) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def gather(self, own: Tensor, n: int, unit: int = 1) -> Tensor:
        """All rows."""
        return cast(Tensor, _Gather.apply(own, self, n, unit)) if self.divides(n, unit) else own

    def sum(self, own: Tensor, n: int, unit: int = 1) -> Tensor:
        """The sum of all parts' sums."""
        return self.total(own.clone()) if self.divides(n, unit) else own

    @contextmanager
    def dividing(self, n: int, device: torch.device) -> Iterator[None]:
        """Statistics of the whole batch, and random numbers of this rank's own."""
        self._divided = self.divides(n)
        if not self._divided:
            yield
            return
        accelerators = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=accelerators):
            torch.manual_seed(int(torch.randint(2**62, ())) + self.rank)
            before = _random_states(accelerators)
            with SharedBatchNorm(self):
                yield
            drew = any(a.ne(b).any() for a, b in zip(before, _random_states(accelerators), strict=True))
        # The common numbers, which an objective may draw too, go on as in one process; a network that draws has others
        # for the next batch.
        if drew:
            torch.randint(2**62, ())

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Gradients of the whole batch's loss."""
        # Blocks that are computed again on the way back (activation checkpoints) normalise as they did before.
        with SharedBatchNorm(self) if self._divided else nullcontext():
            # What torch.autograd.backward calls; inside of that itself such a mode is off.
            _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            if parameter.requires_grad:
                by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for parameters in by_kind.values():
            self._average_gradients(parameters)

    @torch.no_grad()
    def _average_gradients(self, parameters: list[Tensor]) -> None:
        """In one message; a parameter that no rank's images reach keeps no gradient."""
        absent = [parameter.grad is None for parameter in parameters]
        reached = parameters[0].new_tensor([float(not missing) for missing in absent])
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        whole = self.total(torch.cat([*(each.flatten() for each in gradients), reached])).div_(self.size)
        *means, reached = whole.split([*(each.numel() for each in gradients), len(parameters)])
        # Only asked for where it matters: reading it waits for the device.
        elsewhere = reached.tolist() if any(absent) else []
        for position, (parameter, mean) in enumerate(zip(parameters, means, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif elsewhere[position] > 0:
                parameter.grad = mean.view_as(parameter).clone()

    def first(self, compute: Callable[[], T]) -> T:
        """What the first rank computes; its error, where it fails, is everybody's."""
        value, error = None, None
        if self.is_first:
            try:
                value = compute()
            except FairlineError as raised:
                error = raised
        value, error = self._from_first((value, error))
        if error is not None:
            raise error
        return cast(T, value)

    def agree(self, *parts: Stateful) -> None:
        """Load the first rank's state."""
        for part in parts:
            state = self._from_first(_on_cpu(part.state_dict()) if self.is_first else None)
            if not self.is_first:
                part.load_state_dict(state)

    def barrier(self) -> None:
        """Wait for all."""
        self.total(torch.zeros((), device=self.device))

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        with _connected(self):
            dist.all_reduce(tensor)
        return tensor

    def _from_first(self, value: Any) -> Any:
        box = [value]
        with _connected(self):
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


class _Gather(Function):
    """The rows of all ranks, each computed by one of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Group, n: int, unit: int) -> Tensor:
        ctx.ranks, ctx.part = ranks, ranks.part(n, unit)
        whole = own.new_zeros(n, *own.shape[1:])
        whole[ctx.part] = own
        return ranks.total(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad[ctx.part] * ctx.ranks.size, None, None, None


def _random_states(accelerators: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in accelerators)]


def _on_cpu(value: Any) -> Any:
    """A nested state whose tensors do not name this rank's device."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(each) for each in value)
    return value


@contextmanager
def _connected(ranks: Group) -> Iterator[None]:
    """Say in a sentence that the others are gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RankLost(
            f"Process {ranks.rank + 1} of {ranks.size} has lost the others ({reason}); repeat the command to resume."
        ) from None
