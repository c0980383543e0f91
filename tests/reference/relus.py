"""ReLUs counted where torch computes them, and networks compared number by number."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class CountReLUs(TorchDispatchMode):
    """Counts units of every max(x, 0) that torch's operators evaluate inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.units = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        zero = [each for each in [*args[1:], *(kwargs or {}).values()] if each is not None]
        if name == "relu" or (name in ("clamp", "clamp_min", "threshold") and zero in ([0], [0, 0], [0.0])):
            self.units += args[0].numel()
        return func(*args, **(kwargs or {}))


def count_relus(model: nn.Module, images: Tensor) -> int:
    """ReLUs of all images together in evaluation mode, those that no image reaches among them."""
    counter = CountReLUs()
    with torch.no_grad(), counter:
        copy.deepcopy(model).eval()(images.clone())
    return counter.units


def everything(model: nn.Module, images: Tensor, *, training: bool, seed: int) -> dict[str, Tensor | None]:
    """Outputs, gradients of all weights and buffers of one pass, from a seed."""
    model.train(training).zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = list(tensors_in(model(images.clone())))
    sum(each.square().sum() for each in outputs if each.requires_grad).backward()
    found: dict[str, Tensor | None] = {f"output {i}": each.detach().clone() for i, each in enumerate(outputs)}
    found |= {f"gradient of {name}": each.grad for name, each in model.named_parameters()}
    return found | {f"buffer {name}": each.clone() for name, each in model.named_buffers()}


def tensors_in(output: object) -> list[Tensor]:
    """All tensors of a tensor, a dict or a sequence."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [each for value in values if value is not None for each in tensors_in(value)]
