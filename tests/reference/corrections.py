"""A network's corrections taken out one image and one unit at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fairline.masking import masked_relus


def affine_map(model: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A (K, inputs) and b (K,) of a masked network with identities in place of all ReLUs, an input at a time."""
    bare = copy.deepcopy(model)
    for name in masked_relus(model):
        bare.set_submodule(name, nn.Identity())
    size = torch.zeros(shape).numel()
    with torch.no_grad():
        offset = bare(torch.zeros(1, *shape))[0]
        columns = [bare(torch.eye(size)[i].view(1, *shape))[0] - offset for i in range(size)]
    return torch.stack(columns, 1), offset


def logits_without(model: nn.Module, image: Tensor, taken: list[tuple[str, int]]) -> Tensor:
    """Logits (K,) of one image with the surrogate's value in place of the output of some units."""
    changed = copy.deepcopy(model)

    def put(position: int):
        def hook(layer, inputs, output):
            output = output.clone()
            output.view(-1)[position] = layer.substitute(inputs[0]).reshape(-1)[position]
            return output

        return hook

    layers = masked_relus(changed)
    for name, position in taken:
        layers[name].register_forward_hook(put(position))
    with torch.no_grad():
        return changed(image[None])[0]


def margin(logits: Tensor, label: int, rival: int) -> float:
    return float(logits[label] - logits[rival])


def fall(model: nn.Module, image: Tensor, label: int, taken: list[tuple[str, int]]) -> float:
    """How far the margin over the whole network's rival falls without some units."""
    whole = logits_without(model, image, [])
    rival = max((k for k in range(len(whole)) if k != label), key=lambda k: float(whole[k]))
    return margin(whole, label, rival) - margin(logits_without(model, image, taken), label, rival)
