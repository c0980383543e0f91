"""Whether two networks are the same function: in both modes, with the same randomness, gradients and buffers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fairline.masking.copying import copy_model, unwrap

#: Of the largest number; what another order of the same sums may differ by.
_TOLERANCE = 1e-4
_SEED = 0


@contextmanager
def same_random(seed: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python from a seed; afterwards as if nothing had been drawn."""
    # What a forward draws from NumPy comes from its global generator.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with warnings.catch_warnings(), torch.random.fork_rng():
        # What a forward warns of is said when the user runs it.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def tensors_of(output: object) -> Iterator[Tensor]:
    """All tensors of an output, in order, however it holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_of(list(output.values()))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for each in output:
            yield from tensors_of(each)
    elif is_dataclass(output):
        yield from tensors_of([getattr(output, each.name) for each in fields(output)])


def difference(model: nn.Module, masked: nn.Module, batches: Sequence[Tensor]) -> str | None:
    """What two networks do not do alike, in words; None if they are the same.

    Both are run on copies, in evaluation and in training mode. A mode in which the first one fails is left out.

    Args:
        model: The original.
        masked: What should equal it; it may have more buffers and parameters.
        batches: Inputs, each (B, …).

    Returns:
        E.g. ``"gives other gradients of 'fc.weight' in training mode once it is masked"``.
    """
    pair = copy_model(model), copy_model(masked)
    original = _untouched(model, batches[0])
    if original is not None and original.differs(_Run.of(pair[0].eval(), batches[0], False)):
        return "cannot be copied: the copy gives other outputs, because something outside of it holds its parts"
    for training, grad, images in (
        (False, False, batches[0]),
        *((True, True, images) for images in batches),
    ):
        mode = f"in {'training' if training else 'evaluation'} mode once it is masked"
        first, second = (_Run.of(each.train(training), images, grad) for each in pair)
        if first.error is not None:
            continue
        if second.error is not None:
            return f"fails {mode} ({second.error})"
        if found := first.differs(second):
            return f"{found} {mode}"
    return None


@dataclass
class _Run:
    """What one forward and backward pass leaves."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    error: str | None = None

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, grad: bool) -> _Run:
        model.zero_grad(set_to_none=True)
        try:
            with same_random(_SEED), torch.set_grad_enabled(grad):
                outputs = list(tensors_of(model(images.clone())))
                losses = [each.square().mean() for each in outputs if each.requires_grad and each.is_floating_point()]
                if losses:
                    torch.stack([loss.double() for loss in losses]).sum().backward()
        except Exception as error:
            # The user's own forward may raise anything.
            return cls([], {}, {}, str(error).splitlines()[0] if str(error) else type(error).__name__)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return cls([each.detach() for each in outputs], gradients, buffers)

    def differs(self, other: _Run) -> str | None:
        """Of what this run had, the first thing that the other has not."""
        if len(self.outputs) != len(other.outputs):
            return f"returns {len(other.outputs)} tensors and not {len(self.outputs)}"
        if not all(_close(*each) for each in zip(self.outputs, other.outputs, strict=True)):
            return "returns something else"
        for name, gradient in self.gradients.items():
            if not _close(gradient, other.gradients.get(name)):
                return f"gives other gradients of '{name}'"
        for name, buffer in self.buffers.items():
            if not _close(buffer, other.buffers.get(name)):
                return f"leaves another '{name}'"
        return None


def _untouched(model: nn.Module, images: Tensor) -> _Run | None:
    """A pass of the original in evaluation mode, after which it is as it was; None where it cannot be had so."""
    modules = list(model.modules())
    if any(map(is_lazy, model.parameters())) or any(unwrap(module) is not module for module in modules):
        return None
    before = [(vars(module), dict(vars(module))) for module in modules]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for attributes, _ in before:
            if attributes.get("_compiled_call_impl") is not None:
                attributes["_compiled_call_impl"] = None
        run = _Run.of(model.eval(), images, False)
        return run if run.error is None else None
    finally:
        for attributes, old in before:
            for name in attributes.keys() - old.keys():
                del attributes[name]
            attributes.update(old)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not a.is_floating_point():
        return torch.equal(a, b)
    scale = a.abs().nan_to_num(0, 0, 0).amax() if a.numel() else 0
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(scale), equal_nan=True)
