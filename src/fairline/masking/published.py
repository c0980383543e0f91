"""Networks that SNL's published code has linearized: its layers become masked ReLUs (Cho et al. 2022, Algorithm 1).

That code (NYU-DICE-Lab/selective_network_linearization) puts a layer in each ReLU's place whose only tensor is the mask
α, (1, C, H, W), and which computes ``relu(x)·α + (1 − α)·x``. Such a layer is known here by what it computes, under any
name and in any notation: with two opposite masks in its tensor's place it must be that formula, or the one in which α
and 1 − α have changed places.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking.copying import copy_model
from fairline.masking.layer import MaskedReLU


def take_over_published(model: nn.Module, example: Tensor) -> list[str]:
    """Put a masked ReLU in the place of every layer of SNL's published code.

    Args:
        model: Changed in place.
        example: An input that it takes, (B, …).

    Returns:
        Names of the layers; none for other networks.

    Raises:
        FairlineError: A mask is still being learned, or one layer stands in the place of several ReLUs.
    """
    candidates = dict(_candidates(model))
    calls = _calls(model, candidates, example)
    taken: list[str] = []
    for name, layer in candidates.items():
        within = any(name.startswith(f"{outer}.") for outer in taken)
        mask = None if within or name not in calls else _mask(layer, calls[name][0])
        if mask is None:
            continue
        if len(calls[name]) > 1:
            raise FairlineError(f"Layer '{name}' masks {len(calls[name])} activations; give each a layer of its own.")
        between = mask[(mask != 0) & (mask != 1)]
        if len(between):
            raise FairlineError(
                f"The mask of layer '{name}' is still being learned (it holds {between[0]:.4g}); cut it to zeros and "
                "ones first: SNL's published code keeps what is above 0.01."
            )
        masked = MaskedReLU(tuple(mask.shape)).to(mask.device).train(layer.training)
        masked.set_mask(mask)
        model.set_submodule(name, masked)
        taken.append(name)
    return taken


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of the user's own that hold one tensor, the outer ones first."""
    for name, module in model.named_modules():
        own = not type(module).__module__.startswith("torch.") and not isinstance(module, MaskedReLU)
        if name and own and len([*module.parameters(), *module.buffers()]) == 1:
            yield name, module


def _calls(
    model: nn.Module, layers: dict[str, nn.Module], example: Tensor
) -> dict[str, list[tuple[tuple[int, ...], torch.dtype]]]:
    """Shape and type of what some layers take in each of their calls, where they give the same."""
    found: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            x = inputs[0] if len(inputs) == 1 else None
            same = isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape
            if same and output.is_floating_point():
                found.setdefault(name, []).append((tuple(output.shape), output.dtype))

        return hook

    if layers:
        watched = copy_model(model).eval()
        for name in layers:
            watched.get_submodule(name).register_forward_hook(note(name))
        # A forward that fails is told of by whoever needs its result.
        with torch.no_grad(), contextlib.suppress(Exception):
            watched(example.clone())
    return found


def _mask(layer: nn.Module, call: tuple[tuple[int, ...], torch.dtype]) -> Tensor | None:
    """The mask of a layer, of the activation's shape without the batch; None if the layer is another function."""
    shape, dtype = call
    state: dict[str, Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    ((name, tensor),) = state.items()
    tensor = tensor.detach()
    try:
        mask = tensor.float().expand((1, *shape[1:]))[0]
    except RuntimeError:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(tensor.device, dtype)
    ones = (torch.rand(tensor.shape, generator=generator) < 0.5).to(tensor.device)
    if all(_computes(layer, name, kept, kept, tensor.dtype, x) for kept in (ones, ~ones)):
        return mask
    if all(_computes(layer, name, kept, ~kept, tensor.dtype, x) for kept in (ones, ~ones)):
        return 1 - mask
    return None


def _computes(layer: nn.Module, name: str, alpha: Tensor, kept: Tensor, dtype: torch.dtype, x: Tensor) -> bool:
    """Whether a layer whose tensor is ``alpha`` is a ReLU where ``kept`` says so and the identity elsewhere."""
    expected = torch.where(kept, x.relu(), x)
    try:
        with torch.no_grad():
            for training in (True, False):
                tried = copy.deepcopy(layer).train(training)
                y = torch.func.functional_call(tried, {name: alpha.to(dtype)}, (x.clone(),))
                if not torch.allclose(y, expected):
                    return False
    except Exception:
        # A layer of another kind may refuse such a tensor in any way.
        return False
    return True
