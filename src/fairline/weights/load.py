"""Weights as people have them, into a network.

Checkpoints keep them under a key of their own, and wrappers put words into their names. Neither matters: of all places
in a file the one is taken below which exactly this network's tensors stand.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking import MaskedReLU, masked_relus
from fairline.weights.files import Contents, read_file
from fairline.weights.masks import assign, binary, set_masks
from fairline.weights.names import WRAPPERS, canonical, listed

logger = logging.getLogger(__name__)

#: Words in the places of averaged weights, which are taken where no others fit.
AVERAGES = frozenset({"ema", "swa", "avg", "averaged"})
#: How many batches batch normalisation has seen: nothing reads it, and older files lack it.
COUNTER = "num_batches_tracked"


def load_weights(model: nn.Module, path: str | Path, *, place: str | None = None) -> None:
    """Load all weights of a network from a file.

    The key that a checkpoint keeps them under and any prefix are found, and words of wrappers (``module``,
    ``_orig_mod``) do not matter. Batch counters and second names of shared tensors may be missing. Masks that stand
    beside the weights are set as well where the network is masked: fairline's own, or those of SNL's published code.

    Args:
        model: Changed in place, and only if everything fits.
        path: A safetensors file, what ``torch.save`` wrote (read by ``torch.load(weights_only=True)``), or ``.npz``.
        place: Where in the file the weights stand, ``"student"`` or ``"state_dict.net"``, if several places fit.

    Raises:
        FairlineError: The file is missing or broken, needs code to be read, or holds weights of another architecture.
    """
    content = read_file(path)
    target = _Target.of(model)
    found = _choose(content, target, place, path)
    if not found.whole:
        raise FairlineError(f"{path} holds weights of another architecture: {found.problems(target)}{found.hint}.")
    if found.masks:
        set_masks(target.layers, found.masks, str(path))
    model.load_state_dict(found.tensors, strict=False)
    if found.place:
        logger.info("%s: the weights under '%s' were taken", path, found.place)


@dataclass(frozen=True)
class _Target:
    """What a network needs.

    Attributes:
        own: Its tensors by name, without masks.
        names: Its names by what they are without words of wrappers.
        layers: Its masked ReLUs.
        wrappers: Words that do not count; none if the network itself has names that only they tell apart.
    """

    own: dict[str, Tensor]
    names: dict[str, str]
    layers: dict[str, MaskedReLU]
    wrappers: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> _Target:
        layers = masked_relus(model)
        masks = {f"{name}.{part}" for name in layers for part in ("kept", "degrees", "signs")}
        state = model.state_dict(keep_vars=True)
        own = {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in masks}
        wrappers = WRAPPERS
        if len({canonical(name) for name in own}) < len(own):
            wrappers = frozenset()
        return cls(own, {canonical(name, wrappers): name for name in own}, layers, wrappers)


@dataclass
class _Found:
    """What stands at one place of a file, set against what a network needs.

    Attributes:
        place: ``"state_dict.module"``; empty where names are those of the network.
        tensors: By the network's names.
        missing: Names of the network that have no tensor there.
        unexpected: Tensors there that the network does not have.
        masks: Of the layers, made of what was unexpected.
        hint: What to do about what is unexpected.
    """

    place: str
    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: dict[str, Tensor]
    misshapen: list[str]
    masks: dict[str, Tensor] = field(default_factory=dict)
    hint: str = ""

    @property
    def whole(self) -> bool:
        """Whether all is there and nothing else."""
        return not (self.missing or self.unexpected or self.misshapen)

    def problems(self, target: _Target) -> str:
        """Which names are missing, unexpected, or of another shape."""
        shapes = []
        for name in self.misshapen[:5]:
            there, here = tuple(self.tensors[name].shape), tuple(target.own[name].shape)
            shapes.append(f"'{name}' has shape {there} there and {here} in the model")
        if len(self.misshapen) > 5:
            shapes.append(f"{len(self.misshapen) - 5} more have other shapes")
        kinds = (("missing there", self.missing), ("not in the model", list(self.unexpected)))
        return "; ".join([*shapes, *(f"{kind}: {listed(names)}" for kind, names in kinds if names)])


def _choose(content: Contents, target: _Target, place: str | None, path: str | Path) -> _Found:
    """The place below which this network's tensors stand; if none fits, the one that comes closest."""
    if not content.tensors:
        raise FairlineError(f"{path} holds no tensors.")
    hits = _places(content, target)
    if place is not None:
        hits = Counter({each: n for each, n in hits.items() if f"{each}.".startswith(f"{place}.")})
    # Most hits first, and names as short as they can be.
    places = sorted(hits, key=lambda each: (-hits[each], -len(each)))
    found = [_at(each, content, target) for each in places]
    whole = _distinct([each for each in found if each.whole])
    if len(whole) > 1:
        whole = [each for each in whole if not AVERAGES & set(each.place.lower().replace(".", "_").split("_"))] or whole
    if len(whole) > 1:
        raise FairlineError(
            f"{path} holds several networks that fit, under {listed([each.place for each in whole])}; "
            f"say which: fairline.load_weights(model, {str(path)!r}, place={whole[0].place!r})."
        )
    if whole:
        return whole[0]
    if found:
        return found[0]
    raise FairlineError(
        f"{path} holds weights of another architecture{f' under {place!r}' if place else ''}: missing there: "
        f"{listed(list(target.own))}; not in the model: {listed(list(content.tensors))}."
    )


def _places(content: Contents, target: _Target) -> Counter[str]:
    """How many of the network's names stand below each place of a file."""
    hits: Counter[str] = Counter()
    for key in content.tensors:
        words = key.split(".")
        for cut in range(len(words)):
            if canonical(".".join(words[cut:]), target.wrappers) in target.names:
                hits[".".join(words[:cut])] += 1
    return hits


def _at(place: str, content: Contents, target: _Target) -> _Found:
    start = f"{place}." if place else ""
    tensors: dict[str, Tensor] = {}
    unexpected: dict[str, Tensor] = {}
    for key, tensor in content.tensors.items():
        if key.startswith(start):
            name = target.names.get(canonical(key.removeprefix(start), target.wrappers))
            if name is not None and name not in tensors:
                tensors[name] = tensor
            elif not key.endswith(COUNTER):
                unexpected[key.removeprefix(start)] = tensor
    misshapen = [name for name, tensor in tensors.items() if tensor.shape != target.own[name].shape]
    found = _Found(place, tensors, _missing(tensors, target.own), unexpected, misshapen)
    if unexpected:
        _take_masks(found, content, target)
    return found


def _missing(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names that need a tensor; safetensors files hold shared ones under one name."""
    shared = {id(own[name]) for name in tensors}
    return [
        name
        for name, tensor in own.items()
        if name not in tensors and id(tensor) not in shared and not name.endswith(COUNTER)
    ]


def _take_masks(found: _Found, content: Contents, target: _Target) -> None:
    """Read what is unexpected as masks, if it is."""
    like_masks = all(binary(tensor) for tensor in found.unexpected.values())
    if not target.layers:
        if all(name.endswith(".alphas") and bool((each == 1).all()) for name, each in found.unexpected.items()):
            # A teacher of SNL's published code: its masks keep every ReLU.
            found.unexpected = {}
        elif like_masks:
            found.hint = (
                "; what is not in the model looks like masks: mask the model first (fairline.mask_relus), or take the "
                "network over beside its base network (fairline import)"
            )
        return
    rest = Contents(found.unexpected, content.ordered, content.listed)
    try:
        chosen = assign(rest, target.layers, "what is not in the model")
    except FairlineError as error:
        found.hint = f"; {str(error).removesuffix('.')}" if like_masks else ""
        return
    if len(chosen) == len(found.unexpected):
        found.masks = {name: found.unexpected[key] for name, key in chosen.items()}
        found.unexpected = {}


def _distinct(found: Sequence[_Found]) -> list[_Found]:
    """Places that give other values than those before them."""
    kept: list[_Found] = []
    for each in found:
        if not any(_same(each.tensors, other.tensors) for other in kept):
            kept.append(each)
    return kept


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    both = one.keys() & other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in both)
