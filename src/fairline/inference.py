"""Forward passes over whole data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.data.memory import images_at_once
from fairline.errors import FairlineError
from fairline.precision import FLOAT32, Arithmetic
from fairline.ranks import Ranks


def predict(
    model: nn.Module,
    data: GroupedData,
    *,
    batch_size: int | None = None,
    device: torch.device | None = None,
    arithmetic: Arithmetic = FLOAT32,
    ranks: Ranks | None = None,
) -> Tensor:
    """Logits of every sample, in evaluation mode and without augmentation.

    Args:
        model: Maps (B, C, H, W) to (B, K). Its mode is restored.
        data: The samples.
        batch_size: Samples at a time; 1000 by default, and 64 on a CPU, whose caches then hold the activations;
            fewer where images have more than 64×64 pixels.
        device: Where to compute; where the model is by default.
        arithmetic: What to compute in: passes within a training take what the training takes, audits float32.
        ranks: Who shares the work; this process does all of it by default.

    Returns:
        float32, (N, K), on ``device``.

    Raises:
        FairlineError: The output is not (B, K), or has too few classes.
    """
    device = device or next((p.device for p in model.parameters()), data.device)
    batch_size = batch_size or images_at_once(64 if device.type == "cpu" else 1000, data.images.shape)
    ranks = ranks or Ranks()
    part = ranks.part(len(data), batch_size)
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.inference_mode(), arithmetic.autocast(device):
            chunks = []
            for _, batch in data.batches(torch.arange(len(data))[part], batch_size):
                images = arithmetic.order(batch.to(device))
                chunks.append(logits_of(model(images), model, images).float())
    finally:
        model.train(was_training)
    return require_classes(ranks.gather(torch.cat(chunks).clone(), len(data), batch_size), data)


def require_classes(logits: Tensor, data: GroupedData) -> Tensor:
    """Refuse logits (B, K) of fewer classes than the data have. More are not chosen, and do no harm.

    Args:
        logits: Of a network.
        data: Its classes are counted.

    Returns:
        The logits.

    Raises:
        FairlineError: There are too few.
    """
    if logits.shape[1] < data.num_classes:
        raise FairlineError(f"The model has {logits.shape[1]} outputs, but {data.name} has {data.num_classes} classes.")
    return logits


def logits_of(output: object, model: nn.Module, images: Tensor) -> Tensor:
    """The logits in what a network returned.

    ``logits`` (else ``out``) of a dict, a dataclass or a named tuple, such as a ``ModelOutput`` of Hugging Face; else
    the first tensor of a dict, tuple or list; or the tensor itself.

    Args:
        output: What the network returned.
        model: The network, for messages.
        images: Its input, (B, …).

    Returns:
        (B, K).

    Raises:
        FairlineError: There are no such logits.
    """
    found = _find_logits(output)
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != images.shape[0]:
        what = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise FairlineError(
            f"{type(model).__name__} returned {what} for {len(images)} images; logits of shape (batch, classes) are "
            "needed: a tensor, the first one of a tuple or list, or 'logits' in a dict."
        )
    return found


def _find_logits(output: object) -> object:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if value is not None:
            return value
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return next((each for each in values if isinstance(each, Tensor)), None)


def group_mean(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Mean of ``values`` (N,) in each group, (num_groups,); NaN for a group without samples."""
    totals = torch.zeros(num_groups, dtype=torch.float64, device=values.device)
    totals.index_add_(0, groups, values.double())
    return totals / torch.bincount(groups, minlength=num_groups)
