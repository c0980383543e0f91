"""Which ReLUs of a model are swapped for masks, and which calls are redirected to masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fairline.errors import FairlineError
from fairline.masking.layer import MaskedReLU
from fairline.masking.redirect import Key, Sites, redirect, restart
from fairline.masking.watch import Call, Seen, line_of


@dataclass
class Plan:
    """What to do with each ReLU.

    Attributes:
        name: Of the model, for messages.
        overwrite: Whether in-place ReLUs overwrite their input, as they did, because it is read again.
        turns: How often a forward pass in evaluation mode runs each module, by its path.
        in_place: Whether a ReLU that is masked overwrites its input.
        varies: Whether other images may call other ReLUs.
        swapped: A call of each ``nn.ReLU`` that a mask replaces, by its path.
        redirected: For each module whose code calls other ReLUs, the call whose mask each of them gets, or None.
        lost: A call whose mask the second pass of a checkpoint would not find.
    """

    name: str
    overwrite: bool
    turns: Counter[str]
    in_place: bool = False
    varies: bool = False
    swapped: dict[str, Call] = field(default_factory=dict)
    redirected: dict[str, dict[Key, Call | None]] = field(default_factory=dict)
    lost: Call | None = None

    @classmethod
    def of(cls, name: str, evaluated: Sequence[Seen], trained: Sequence[Seen], *, overwrite: bool = False) -> Plan:
        """Decide from what was seen.

        Args:
            name: Of the model, for messages.
            evaluated: Passes over batches of different sizes, in evaluation mode.
            trained: Passes in training mode.
            overwrite: Whether in-place ReLUs overwrite their input.

        Returns:
            What to do.

        Raises:
            FairlineError: There is no ReLU, or one that cannot be masked.
        """
        for path, kind in evaluated[0].hidden.items():
            raise FairlineError(
                f"{name} has ReLUs inside {repr(path) if path else 'itself'} ({kind}), which runs as one operator of "
                "torch that no mask enters; write that layer with nn.ReLU modules."
            )
        plan = cls(name, overwrite, evaluated[0].turns)
        reached = [call for seen in evaluated for call in seen.calls if call.reached]
        if not reached:
            raise FairlineError(f"{name} has no ReLU to mask{others_of(evaluated[0])}.")
        plan._require_batch_axis(evaluated)
        plan.in_place = any(call.in_place for call in reached)
        plan.varies = len({tuple((c.scope, c.key) for c in seen.calls) for seen in evaluated}) > 1
        plan._swap(evaluated, trained)
        scopes = dict.fromkeys(call.scope for call in reached if call.relu not in plan.swapped)
        for scope in scopes:
            plan._redirect(scope, evaluated, trained)
        return plan

    def _require_batch_axis(self, evaluated: Sequence[Seen]) -> None:
        shapes: dict[tuple[str, Key], tuple[int, ...]] = {}
        for seen in evaluated:
            for call in seen.calls:
                same = shapes.setdefault((call.scope, call.key), call.shape[1:]) == call.shape[1:]
                if call.reached and not (same and call.shape[:1] == (seen.size,)):
                    raise FairlineError(
                        f"The activation of {where(call)} in {self.name} has no batch axis in front: it is "
                        f"{call.shape} for {seen.size} images."
                    )

    def _key(self, call: Call) -> Key:
        """A module that runs more often while training runs the same ReLUs again."""
        return call.turn % max(1, self.turns[call.scope]), call.place, call.nth

    def _swap(self, evaluated: Sequence[Seen], trained: Sequence[Seen]) -> None:
        """ReLU modules that stand for one ReLU, of one shape of activation."""
        for path in dict.fromkeys(c.relu for seen in evaluated for c in seen.calls if c.relu is not None):
            own = [[call for call in seen.calls if call.relu == path] for seen in (*evaluated, *trained)]
            calls = [call for each in own for call in each]
            one = all(len(each) <= 1 for each in own) or len({(c.scope, self._key(c)) for c in calls}) == 1
            reached = all(call.reached for each in own[: len(evaluated)] for call in each)
            kept = self.overwrite and calls[0].in_place
            if one and reached and not kept and len({call.shape[1:] for call in calls}) == 1:
                self.swapped[path] = calls[0]

    def _redirect(self, scope: str, evaluated: Sequence[Seen], trained: Sequence[Seen]) -> None:
        """The other ReLUs that a module's code calls."""
        passes = [self._rest(scope, seen) for seen in (*evaluated, *trained)]
        known = {self._key(call): call for call in passes[0]}
        for calls in passes[1 : len(evaluated)]:
            if other := known.keys() ^ {self._key(call) for call in calls}:
                raise FairlineError(
                    f"{self.name} evaluates the ReLU at {line_of(next(iter(other))[1])} for some images only, so which "
                    "mask is whose is not known; make it an nn.ReLU of its own."
                )
        named: dict[Key, Call | None] = {key: call if call.reached else None for key, call in known.items()}
        while_training = passes[len(evaluated) :]
        self._require_counts(known, while_training)
        met = {self._key(call) for calls in while_training for call in calls}
        missing = [call for key, call in known.items() if call.reached and key not in met]
        for calls in while_training:
            own = {self._key(c): c for c in calls if self._key(c) not in known and c.reached}
            if own and missing:
                # Another line for each mode: the first one there is the first one here.
                if [call.shape[1:] for call in own.values()] != [call.shape[1:] for call in missing]:
                    raise FairlineError(
                        f"{self.name} evaluates {where(missing[0])} in evaluation mode only, and "
                        f"{where(next(iter(own.values())))} in training mode only; make them one nn.ReLU."
                    )
                named.update(zip(own, missing, strict=True))
            for call in calls:
                named.setdefault(self._key(call), None)
        for call in (each for calls in passes for each in calls):
            if call.checkpointed == 0 or (call.checkpointed is not None and self.turns[scope] > 1):
                self.lost = call
        self.redirected[scope] = named

    def _rest(self, scope: str, seen: Seen) -> list[Call]:
        """Calls of a module's code, without those of swapped modules, numbered anew."""
        counts: Counter[object] = Counter()
        rest = []
        for call in seen.calls:
            if call.scope == scope and call.relu not in self.swapped:
                rest.append(replace(call, nth=counts[call.turn, call.place]))
                counts[call.turn, call.place] += 1
        return rest

    def _require_counts(self, known: dict[Key, Call], trained: Sequence[Sequence[Call]]) -> None:
        """A line that runs in a loop must run as often in both modes, or which call is which is not known."""
        wanted = Counter(key[:2] for key in known)
        for calls in trained:
            for (turn, place), count in Counter((call.turn, call.place) for call in calls).items():
                before = wanted[turn % max(1, self.turns[calls[0].scope]), place]
                if before not in (0, count):
                    raise FairlineError(
                        f"{self.name} evaluates the ReLU at {line_of(place)} {before} times in evaluation and {count} "
                        "times in training mode, so which mask is whose is not known; make each an nn.ReLU of its own."
                    )

    def require_no_checkpoint(self) -> None:
        """Refuse calls whose masks the second pass of a checkpoint would not find.

        Raises:
            FairlineError: There is one.
        """
        if self.lost is not None:
            raise FairlineError(
                f"{self.name} evaluates {where(self.lost)} within a checkpoint, whose second pass would not find its "
                "mask; make it an nn.ReLU of its own."
            )

    def carry_out(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Put the masks in, on a device; the model is changed and returned."""
        for path, only in self.swapped.items():
            model.set_submodule(path, _mask_for(model.get_submodule(path), only.shape[1:], device))
        for path, calls in self.redirected.items():
            module = model.get_submodule(path)
            given: dict[Call, str] = {}
            for call in calls.values():
                if call is not None and call not in given:
                    holder = module if call.relu is None else model.get_submodule(call.relu)
                    given[call] = _free_name(holder, "relu" if call.relu is None else "")
                    holder.add_module(given[call], MaskedReLU(call.shape[1:]).to(device).train(module.training))
            names = {key: None if call is None else given[call] for key, call in calls.items()}
            redirect(module, Sites(names, max(1, self.turns[path]), self.overwrite))
        if any(self.turns[path] > 1 for path in self.redirected):
            model.register_forward_pre_hook(restart)
        return model


def _mask_for(relu: nn.Module, shape: tuple[int, ...], device: torch.device) -> MaskedReLU:
    """A mask with the hooks and attributes of the module that it replaces."""
    mask = MaskedReLU(shape).to(device)
    own = vars(mask)
    own.update({key: value for key, value in vars(relu).items() if "hook" in key or key not in own})
    own["inplace"] = False
    return mask.train(relu.training)


def _free_name(module: nn.Module, stem: str) -> str:
    if stem and not hasattr(module, stem):
        return stem
    number = 1 if stem else 0
    while hasattr(module, f"{stem}{number}"):
        number += 1
    return f"{stem}{number}"


def where(call: Call) -> str:
    """Which ReLU a call is, for people."""
    if call.relu is not None:
        return f"ReLU '{call.relu}'"
    inside = f" in '{call.scope}'" if call.scope else ""
    return f"the ReLU at {line_of(call.place)}{inside}" if call.place else f"the ReLU{inside}"


def others_of(seen: Seen) -> str:
    """What else is nonlinear, and where."""
    texts = []
    for paths in seen.others.values():
        path, label = next(iter(paths.items()))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        texts.append(f"{label} ('{path or 'forward'}'{more})")
    return f"; other nonlinear functions stay as they are: {', '.join(texts)}" if texts else ""
