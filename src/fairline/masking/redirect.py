"""Masks for ReLUs that are not modules of their own: functions, and one ``nn.ReLU`` that is called several times.

The user's code stays as it is. While the module whose code calls them is running, a ``TorchFunctionMode`` sees its
calls of ReLUs and hands each to the mask that belongs to the place in the code: the line that calls, and which call
from there it is. So ``self.training``, branches, ``no_grad`` and whatever else the code does keep their meaning.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from fairline.errors import FairlineError
from fairline.masking.watch import Caller, Place, caller, line_of, relu_input

Key = tuple[int, Place, int]


@dataclass
class Sites:
    """The ReLUs that one module's code calls.

    Attributes:
        names: Which child is the mask of a call, of the ``nn.ReLU`` that is called or else of the module; None for a
            ReLU that stays as it is.
        turns: How often a forward pass runs the module.
        turn: Which run comes next.
        write_back: Whether an in-place ReLU overwrites its input.
    """

    names: dict[Key, str | None]
    turns: int
    write_back: bool
    turn: int = 0
    #: Calls from each place with a mask, in each turn.
    totals: Counter[tuple[int, Place]] = field(init=False)

    def __post_init__(self) -> None:
        masked = {key[:2] for key, name in self.names.items() if name is not None}
        self.totals = Counter(key[:2] for key in self.names if key[:2] in masked)


def redirect(module: nn.Module, sites: Sites) -> None:
    """Send the calls of ReLUs in a module's code to its masks, as a class of the same name over the module's own."""
    module.__dict__[_SITES] = sites
    kind: Any = type(module)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(self):
            return kind.__call__(self, *args, **kwargs)

    body = {"__call__": __call__, "__module__": kind.__module__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (kind,), body)


def restart(model: nn.Module, *_: Any) -> None:
    """Forget a forward pass that was broken off."""
    for module in model.modules():
        if (sites := vars(module).get(_SITES)) is not None:
            sites.turn = 0


_SITES = "_fairline_sites"


class _Redirect(TorchFunctionMode):
    """One run of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.sites: Sites = vars(module)[_SITES]
        self.turn = self.sites.turn
        self.counts: Counter[Place] = Counter()

    def __enter__(self) -> _Redirect:
        # Also where a checkpoint runs the module again: whole rounds, or a single turn.
        self.sites.turn = (self.turn + 1) % self.sites.turns
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            for place, count in self.counts.items():
                if count != self.sites.totals.get((self.turn, place), count):
                    raise self.unknown(place)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = relu_input(func, args, kwargs)
        who = None if found is None else caller(innermost=True)
        if found is None or who is None or not self.owns(who):
            return func(*args, **kwargs)
        key = (self.turn, who.place, self.counts[who.place])
        self.counts[who.place] += 1
        if key not in self.sites.names:
            raise self.unknown(who.place)
        name = self.sites.names[key]
        if name is None:
            return func(*args, **kwargs)
        x, in_place = found
        layer = getattr(who.relu if who.relu is not None and name in who.relu._modules else self.module, name)
        if in_place and self.sites.write_back:
            return x.copy_(layer(x.clone()))
        return layer(x)

    def owns(self, who: Caller) -> bool:
        """Whether the module's own code calls; what its children call is theirs."""
        return not who.modules or vars(who.modules[0]) is vars(self.module)

    def unknown(self, place: Place) -> FairlineError:
        return FairlineError(
            f"{type(self.module).__name__} evaluates other ReLUs at {line_of(place)} than it did when it was masked "
            "(torch.compile does too: it moves lines); make each of them an nn.ReLU of its own."
        )
