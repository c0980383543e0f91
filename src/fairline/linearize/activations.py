"""The pre-activations of every masked ReLU, batch by batch.

Source: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.masking import masked_relus

#: Called with a masked layer's name, its input (B, *shape), and the batch's positions in the data (B,).
Visit = Callable[[str, Tensor, Tensor], None]


@contextmanager
def watched(model: nn.Module, visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``visit(name, x)`` with the input of each masked ReLU in every forward pass."""
    handles = [
        layer.register_forward_pre_hook(lambda _, arguments, name=name: visit(name, arguments[0]))
        for name, layer in masked_relus(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def each_activation(
    model: nn.Module,
    data: GroupedData,
    visit: Visit,
    *,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
) -> int:
    """Run a network over images, in evaluation mode, and show what enters each masked ReLU.

    Args:
        model: Masked. Its mode is restored.
        data: On the model's device.
        visit: Sees each layer of each batch.
        samples: Images, at most; drawn by ``seed``. All in order by default.
        seed: Of the choice.
        batch_size: Images at a time.

    Returns:
        How many images were seen.
    """
    order = torch.arange(len(data))
    if samples is not None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples]
    index = torch.empty(0)

    def see(name: str, x: Tensor) -> None:
        visit(name, x, index)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), watched(model, see):
            for index in order.to(data.device).split(batch_size):
                model(data.normalized(index))
    finally:
        model.train(was_training)
    return len(order)
