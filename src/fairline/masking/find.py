"""Finding a model's ReLUs and putting masks in their place.

An ``nn.ReLU`` that a forward pass calls once is swapped for its mask. Functions, and modules that are called several
times, are redirected from the lines of code that call them (:mod:`fairline.masking.redirect`). Either way the masked
model is a copy of the user's own object, whose code runs as it did.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking.copying import copy_model, unwrap
from fairline.masking.equal import difference, same_random, tensors_of
from fairline.masking.layer import (
    MaskedReLU,
    Surrogate,
    masked_relus,
)
from fairline.masking.published import take_over_published
from fairline.masking.redirect import Key, Sites, redirect, restart
from fairline.masking.watch import ACTIVATIONS, Call, Place, Seen, count_calls, is_plain_relu, line_of, watch

logger = logging.getLogger(__name__)


def mask_relus(model: nn.Module, example: Tensor, surrogate: Surrogate | None = None) -> nn.Module:
    """Replace every ReLU of a model by a :class:`MaskedReLU` that keeps all of its units.

    A ReLU is whatever computes max(x, 0): ``nn.ReLU``, ``F.relu``, ``.relu()``, ``clamp`` with a minimum of 0 alone, or
    ``threshold`` with 0 and 0. A module that is called twice gets two masks. What runs only while training, and
    what no image reaches, stays as it is. Optional arguments of the forward keep their defaults.

    Args:
        model: Any module that maps a batch to a batch. It is not changed. Of a wrapper (``DataParallel``,
            ``DistributedDataParallel``, ``AveragedModel``, ``torch.compile``) the network inside is taken.
        example: Input, (B, …), B ≥ 1, of the shape that the model will see; its values do not matter.
        surrogate: What will stand in a ReLU's place; the identity by default, and what a masked model has already. See
            :meth:`MaskedReLU.use_surrogate`.

    Returns:
        A copy with masks, of the model's own class. It equals the model in evaluation and in training mode: outputs,
        gradients, randomness and buffers. The names of its weights are the same; a quadratic surrogate adds its
        coefficients.

    Raises:
        FairlineError: The model has no ReLU, cannot be copied, has ReLUs that a mask cannot reach, or would not
            stay what it is.

    Example:
        >>> model = mask_relus(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4))
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): MaskedReLU(shape=(3,), kept=3)
        )
        >>> masked_relus(model)["1"].set_mask(torch.tensor([True, False, False]))
        >>> masked_relus(model)["1"](torch.tensor([[-1.0, -1.0, 2.0]]))
        tensor([[ 0., -1.,  2.]])
    """
    model = unwrap(model)
    masked = copy_model(model) if masked_relus(model) else _mask_relus(model, example)
    if surrogate is not None:
        for layer in masked_relus(masked).values():
            layer.use_surrogate(surrogate)
    return masked


def _mask_relus(model: nn.Module, example: Tensor) -> nn.Module:
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 1:
        what = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise FairlineError(f"An example input is a batch of images, (B, …), not {what}.")
    device = next((p.device for p in model.parameters()), example.device)
    batches = [_batch(example, seed).to(device) for seed in range(2)]
    plain = copy_model(model)
    if take_over_published(plain, batches[0]):
        model = copy_model(plain)
        if _missed(plain, batches[0]) is None:
            return plain
    _separate(plain)
    passes = _observe(plain, batches)
    plan = _Plan.of(type(model).__name__, *passes)
    masked = plan.carry_out(copy_model(plain), device)
    if plan.in_place:
        strict = _Plan.of(type(model).__name__, *passes, overwrite=True)
        overwriting = strict.carry_out(copy_model(plain), device)
        if _reads_again(masked, overwriting, batches[0]):
            plan, masked = strict, overwriting
    plan.require_no_checkpoint()
    found = difference(model, masked, batches) or _missed(masked, batches[0])
    if found is not None:
        raise FairlineError(f"{type(model).__name__} {found} once it is masked.")
    others = passes[0][0]
    if ACTIVATIONS & others.others.keys():
        logger.warning("%s: masks act on its ReLUs alone%s", type(model).__name__, _others(others))
    return masked


def _reads_again(masked: nn.Module, overwriting: nn.Module, images: Tensor) -> bool:
    """Whether anything reads the input of an in-place ReLU after it, and meets its output; seen under mixed masks."""
    outputs = []
    for each in (copy_model(masked).eval(), copy_model(overwriting).eval()):
        generator = torch.Generator().manual_seed(0)
        # Named differently, but in the same order.
        for layer in masked_relus(each).values():
            layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.5)
        with torch.no_grad(), same_random(0):
            outputs.append(list(tensors_of(each(images.clone()))))
    return not all(torch.equal(*each) for each in zip(*outputs, strict=True))


def _batch(example: Tensor, seed: int, size: int = 2) -> Tensor:
    """Random images of the example's shape; whole numbers may be indices, and are the example's own."""
    if example.is_floating_point():
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((size, *example.shape[1:]), generator=generator).to(example)
    return example[torch.arange(size) % len(example)]


def _separate(model: nn.Module) -> None:
    """One ReLU module in several places becomes one for each, and none is passed over."""
    seen: set[int] = set()
    for module in list(model.modules()):
        if hasattr(module, "activation_relu_or_gelu"):
            # Transformer layers would evaluate their own ReLU in one operator, whatever module stands there.
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]
        for name, child in module._modules.items():
            if child is None or not is_plain_relu(child):
                continue
            if id(child) in seen:
                module._modules[name] = twin = copy.copy(child)
                vars(twin).update({key: copy.copy(value) for key, value in vars(child).items()})
            seen.add(id(child))


def _observe(model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Seen], list[Seen]]:
    """What a model evaluates in evaluation mode, for each batch, and while training."""
    evaluated, trained = [], []
    observed = copy_model(model).eval()
    try:
        for images in (batches[0], torch.cat([batches[1], batches[1][:1]])):
            with same_random(0), torch.no_grad():
                evaluated.append(watch(observed, images.clone()))
    except FairlineError:
        raise
    except Exception as error:
        # The user's own forward may raise anything.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        shape = tuple(batches[0].shape)
        raise FairlineError(f"{type(model).__name__} fails on an example of shape {shape} ({reason}).") from None
    observed = copy_model(model).train()
    for seed, images in enumerate(batches):
        try:
            with same_random(seed), torch.enable_grad():
                trained.append(watch(observed, images.clone()))
        except Exception:
            # A model that does not train can be masked all the same.
            logger.info("%s fails in training mode", type(model).__name__, exc_info=True)
    return evaluated, trained


def _missed(masked: nn.Module, images: Tensor) -> str | None:
    """Whether each mask acts once in a forward pass, and no ReLU that an image reaches goes without."""
    masked = copy_model(masked).eval()
    layers = masked_relus(masked)
    with torch.no_grad(), same_random(0):
        # Unwatched: some layers of torch take another way while they are watched.
        calls = count_calls(masked, images.clone())
        seen = watch(masked, images.clone())
    for call in seen.calls:
        if call.reached:
            return f"evaluates a ReLU of '{call.scope}' without a mask"
    return next((f"calls the mask '{name}' {calls[name]} times" for name in layers if calls[name] != 1), None)


@dataclass
class _Plan:
    """Which ReLUs are swapped and which are redirected.

    Attributes:
        name: Of the model, for messages.
        overwrite: Whether in-place ReLUs overwrite their input, as they did, because it is read again.
        in_place: Whether a ReLU that is masked overwrites its input.
        swapped: The call of each ``nn.ReLU`` that a mask replaces, by its path.
        redirected: For each module whose code calls other ReLUs, the calls that get a mask, and None for others.
        turns: How often a forward pass runs each of these modules.
        lost: A call whose mask the second pass of a checkpoint would not find.
    """

    name: str
    overwrite: bool
    in_place: bool
    swapped: dict[str, Call] = field(default_factory=dict)
    redirected: dict[str, dict[Key, Call | None]] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    lost: Call | None = None

    @classmethod
    def of(cls, name: str, evaluated: Sequence[Seen], trained: Sequence[Seen], *, overwrite: bool = False) -> _Plan:
        """Decide from what was seen.

        Args:
            name: Of the model, for messages.
            evaluated: Passes over two batches of different sizes, in evaluation mode.
            trained: Passes in training mode.
            overwrite: Whether in-place ReLUs overwrite their input.

        Returns:
            What to do.

        Raises:
            FairlineError: There is no ReLU, or one that cannot be masked.
        """
        first, second = evaluated
        for path, kind in first.hidden.items():
            raise FairlineError(
                f"{name} has ReLUs inside '{path}' ({kind}), which runs as one operator of torch that no mask enters; "
                "write that layer with nn.ReLU modules."
            )
        if [(c.scope, c.key) for c in first.calls] != [(c.scope, c.key) for c in second.calls]:
            raise FairlineError(f"{name} evaluates other ReLUs for other images; which to mask is not known.")
        reached = [call for call in first.calls if call.reached]
        if not reached:
            raise FairlineError(f"{name} has no ReLU to mask{_others(first)}.")
        for call, again in zip(first.calls, second.calls, strict=True):
            _require_batch_axis(name, call, again)
        plan = cls(name, overwrite, any(call.in_place for call in reached))
        plan._swap(first, trained)
        plan._redirect(first, trained)
        return plan

    def _swap(self, evaluated: Seen, trained: Sequence[Seen]) -> None:
        """ReLU modules that each pass calls once, for one shape of activation."""
        calls: dict[str, list[Call]] = {}
        for call in evaluated.calls:
            if call.relu is not None:
                calls.setdefault(call.relu, []).append(call)
        for path, own in calls.items():
            while_training = [[c for c in seen.calls if c.relu == path] for seen in trained]
            once = len(own) == 1 and all(len(each) <= 1 for each in while_training)
            shapes = {call.shape[1:] for each in [own, *while_training] for call in each}
            if once and own[0].reached and len(shapes) == 1 and not (self.overwrite and own[0].in_place):
                self.swapped[path] = own[0]

    def _redirect(self, evaluated: Seen, trained: Sequence[Seen]) -> None:
        def rest(seen: Seen, scope: str) -> list[Call]:
            return [c for c in seen.calls if c.scope == scope and c.relu not in self.swapped]

        scopes = {call.scope for call in evaluated.calls if call.reached and call.relu not in self.swapped}
        for scope in scopes:
            passes = [rest(seen, scope) for seen in (evaluated, *trained)]
            self.turns[scope] = max(seen.turns[scope] for seen in (evaluated, *trained))
            _require_lines(self.name, scope, passes[0], passes[1:])
            for call in (c for each in passes for c in each):
                if call.checkpointed == 0 or (call.checkpointed is not None and self.turns[scope] > 1):
                    self.lost = call
            named: dict[Key, Call | None] = {call.key: call if call.reached else None for call in passes[0]}
            for call in (c for each in passes[1:] for c in each):
                named.setdefault(call.key, None)
            self.redirected[scope] = named

    def require_no_checkpoint(self) -> None:
        """Refuse calls whose masks the second pass of a checkpoint would not find.

        Raises:
            FairlineError: There is one.
        """
        if self.lost is not None:
            raise FairlineError(
                f"{self.name} evaluates a ReLU at {line_of(self.lost.place)} of '{self.lost.scope}' within a "
                "checkpoint, whose second pass would not find its mask; make it an nn.ReLU of its own."
            )

    def carry_out(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Put the masks in, on a device; the model is changed and returned."""
        for path, only in self.swapped.items():
            model.set_submodule(path, _mask_for(model.get_submodule(path), only.shape[1:], device))
        for path, calls in self.redirected.items():
            module = model.get_submodule(path)
            names: dict[Key, str | None] = dict.fromkeys(calls)
            for key, call in calls.items():
                if call is not None:
                    holder = module if call.relu is None else model.get_submodule(call.relu)
                    names[key] = name = _free_name(holder, "relu" if call.relu is None else "")
                    holder.add_module(name, MaskedReLU(call.shape[1:]).to(device).train(module.training))
            redirect(module, Sites(names, self.turns[path], self.overwrite))
        if any(turns > 1 for turns in self.turns.values()):
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


def _require_batch_axis(name: str, call: Call, again: Call) -> None:
    if call.reached and ((call.shape[:1], again.shape[:1]) != ((2,), (3,)) or call.shape[1:] != again.shape[1:]):
        what = f"ReLU '{call.relu}'" if call.relu else f"the ReLU at {line_of(call.place)} of '{call.scope}'"
        raise FairlineError(
            f"The activation of {what} in {name} has no batch axis in front: {call.shape} for 2 images, "
            f"{again.shape} for 3."
        )


def _require_lines(name: str, scope: str, evaluated: Iterable[Call], trained: Sequence[Iterable[Call]]) -> None:
    """A call while training must be known to be one of the calls in evaluation, or to be none of them."""
    known = Counter((call.turn, call.place) for call in evaluated if call.reached)
    met: set[tuple[int, Place]] = set()
    unknown: set[tuple[int, Place]] = set()
    for each in trained:
        counts = Counter((call.turn, call.place) for call in each if call.reached)
        met |= counts.keys()
        unknown |= counts.keys() - known.keys()
        for where, count in counts.items():
            if known[where] not in (0, count):
                raise FairlineError(
                    f"{name} evaluates the ReLU at {line_of(where[1])} of '{scope}' {known[where]} times in "
                    f"evaluation and {count} times in training mode, so which mask is whose is not known; make each an "
                    "nn.ReLU of its own."
                )
    lost = known.keys() - met
    if trained and lost and unknown:
        raise FairlineError(
            f"{name} evaluates the ReLU at {line_of(next(iter(lost))[1])} of '{scope}' in evaluation mode only, and "
            f"another one at {line_of(next(iter(unknown))[1])} in training mode; make them one nn.ReLU."
        )


def _others(seen: Seen) -> str:
    """What else is nonlinear, and where."""
    texts = []
    for paths in seen.others.values():
        path, label = next(iter(paths.items()))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        texts.append(f"{label} ('{path or 'forward'}'{more})")
    return f"; other nonlinear functions stay as they are: {', '.join(texts)}" if texts else ""
