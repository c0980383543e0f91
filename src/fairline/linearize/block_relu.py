"""Block ReLU: one sign for the units of a patch, patches of a size for each channel (Gorski, Jevnisek and Avidan 2023).

``y = x·[mean of the patch > 0]`` for all units of a patch. What a size does to the network is measured for each channel
alone; a multiple-choice knapsack then takes one size for each channel, so that all signs fit into the budget and the
sum of what they do is least. A channel may also be left without signs, linear. Read in the published code
(yg320/secure_inference) and the paper's abstract:

- the gate has no gradient, and a mean of 0 lets nothing through;
- a channel's distortion is the mean squared difference of the network's outputs when it alone has these patches;
- the sizes, linear channels among them, and a knapsack over channels, solved exactly;
- afterwards the network is finetuned; here that is the next step, as behind any method.

What is chosen here:

- *Distortion* is by default its first-order part, ``E (vᵀJδ)²`` over random signs v of the outputs, with δ what the
  patches change in the channel and J the outputs' derivative by it: a backward pass shows all channels at once, where
  the published measure, ``distortion="measured"``, takes a forward pass for each channel and size.
- *Sizes* are powers of two, no more than twice as long as wide; the published lists, one for each resolution, have
  others besides (``blocks="1x1,2x2,3x3,4x6"``).
- *Where the table of the exact knapsack would be too large*, its linear relaxation is rounded, which ``info`` says.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fairline._io import load_tensors, save_tensors
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import logits_of, predict
from fairline.linearize.base import Cut, Linearization, Linearizer
from fairline.linearize.knapsack import choose_options
from fairline.masking import MaskedReLU, copy_model, masked_relus, patches
from fairline.masking.sharing import Block
from fairline.training import Progress, ProgressCallback

logger = logging.getLogger(__name__)

Distortion = Literal["first_order", "measured"]
DISTORTIONS: tuple[Distortion, ...] = ("first_order", "measured")

#: Of :meth:`BlockReLU.options`: no sign, the channel is linear.
LINEAR: Block = (0, 0)


@dataclass
class BlockReLU(Linearizer):
    """Choose the patches of each channel, or layer, by what they do to the outputs, under a budget of signs.

    Budgets count signs. Weights stay as they are: finetune next. ``info["blocks"]`` says how many channels got which
    size, ``info["units"]`` how many units the signs decide, ``info["exact"]`` whether the knapsack was solved exactly.

    Attributes:
        blocks: Sizes to choose from, such as ``[(1, 1), (2, 2)]`` or ``"1x1,2x2"``, where they fit into a layer;
            powers of two by default. ``1x1`` and linear channels are always among them.
        granularity: One choice for each ``"channel"``, as published, or ``"layer"``.
        distortion: ``"first_order"``, or ``"measured"``, as published.
        samples: Training images to measure on, at most.
        probes: Backward passes of the first-order distortion.
        batch_size: Images at a time.
        surrogate: Only the identity.
        seed: Of samples and probes.
    """

    name = "block_relu"
    # Made again in no time from what was measured.
    keeps_snapshots: ClassVar[bool] = False

    blocks: Sequence[Block] | str | None = None
    granularity: Literal["channel", "layer"] = "channel"
    distortion: Distortion = "first_order"
    samples: int = 512
    probes: int = 4
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.surrogate != "identity":
            raise FairlineError(f"Beside shared signs the identity stands, no {self.surrogate} surrogate.")
        if self.granularity not in ("channel", "layer"):
            raise FairlineError(f"Patches are chosen by channel or layer, not '{self.granularity}'.")
        if self.distortion not in DISTORTIONS:
            raise FairlineError(f"A distortion is {' or '.join(DISTORTIONS)}, not '{self.distortion}'.")
        if min(self.samples, self.probes, self.batch_size) < 1:
            raise FairlineError(
                f"Block ReLU needs samples, probes and batch_size of at least 1, not {self.samples}, {self.probes} and "
                f"{self.batch_size}."
            )
        if self.blocks is not None:
            self.blocks = _blocks(self.blocks)

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Measure every size in every channel once, and solve a knapsack for each budget.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget.
        """
        layers = masked_relus(run.student)
        options = {name: self.options(layer.shape) for name, layer in layers.items()}
        found = self._measured(run, options)
        signs = {name: self._by_choice(_signs(layer, options[name])) for name, layer in layers.items()}
        losses = {name: self._by_choice(found[name]) for name in layers}
        costs, lost = ([row for name in layers for row in table[name].numpy()] for table in (signs, losses))
        for budget in run.budgets:
            chosen, exact = choose_options(costs, lost, budget)
            network = copy_model(run.student)
            rows = iter(chosen.tolist())
            blocks: Counter[str] = Counter()
            for name, layer in masked_relus(network).items():
                places = [next(rows) for _ in range(len(signs[name]))]
                each = [options[name][place] for place in places] * (layer.shape[0] // len(places))
                blocks.update(f"{block[0]}x{block[1]}" if block != LINEAR else "linear" for block in each)
                set_patches(layer, each)
            units = sum(int(layer.kept.sum()) for layer in masked_relus(network).values())
            ordered = dict(sorted(blocks.items(), key=lambda each: -each[1]))
            yield Cut(budget, network, {"blocks": ordered, "units": units, "exact": exact})

    def options(self, shape: Sequence[int]) -> list[Block]:
        """The sizes that a layer chooses from, with :data:`LINEAR` last.

        Args:
            shape: Of its activation, without the batch axis.

        Returns:
            Heights and widths.
        """
        if len(shape) != 3:
            return [(1, 1), LINEAR]
        height, width = shape[1:]
        if self.blocks is None:
            sides = [2**power for power in range(max(height, width).bit_length())]
            tried: Sequence[Block] = [(h, w) for h in sides for w in sides if max(h, w) <= 2 * min(h, w)]
            tried = [*tried, (height, width)]
        else:
            tried = [block for block in self.blocks if not isinstance(block, str)]
        fitting = [block for block in tried if block[0] <= height and block[1] <= width]
        return [*dict.fromkeys([(1, 1), *fitting]), LINEAR]

    def _by_choice(self, table: Tensor) -> Tensor:
        """Rows of channels, (C, options), as rows of choices."""
        return table if self.granularity == "channel" else table.sum(0, keepdim=True)

    def _measured(self, run: Linearization, options: Mapping[str, Sequence[Block]]) -> dict[str, Tensor]:
        """Distortions of all channels, (C, options) a layer, as measured now or by an interrupted run."""
        file = run.file("distortions")
        if file is not None and file.exists():
            return load_tensors(file)[0]
        order = torch.randperm(len(run.train), generator=torch.Generator().manual_seed(self.seed))[: self.samples]
        data = run.train.select(order)
        if self.distortion == "measured":
            found = measured(run.student, data, options, self.batch_size, run.progress)
        else:
            settings = {"probes": self.probes, "batch_size": self.batch_size, "seed": self.seed}
            found = first_order(run.student, data, options, progress=run.progress, **settings)
        if file is not None:
            save_tensors(file, found)
        return found


def set_patches(layer: MaskedReLU, blocks: Sequence[Block]) -> None:
    """Let each channel of a layer have patches of a size, or none.

    Args:
        layer: Its mask is fixed; what it has cut stays cut.
        blocks: Of each channel; :data:`LINEAR` where it has no signs.
    """
    linear = torch.tensor([block == LINEAR for block in blocks], device=layer.kept.device)
    layer.set_mask(layer.kept & ~linear.view(-1, *[1] * (len(layer.shape) - 1)))
    whole = [(1, 1) if block == LINEAR else block for block in blocks]
    layer.share(None if set(whole) == {(1, 1)} else patches(layer.shape, whole))


def _signs(layer: MaskedReLU, options: Sequence[Block]) -> Tensor:
    """Signs that each channel takes with each size, int64, (C, options); patches of cut units alone take none."""
    kept = layer.kept.cpu()
    columns = []
    for block in options:
        if block == LINEAR:
            columns.append(torch.zeros(len(kept), dtype=torch.int64))
        elif block == (1, 1):
            columns.append(kept.flatten(1).sum(1) if kept.ndim > 1 else kept.long())
        else:
            own = patches(layer.shape, block)[0]
            there = torch.zeros(int(own.max()) + 1, dtype=torch.int64)
            there[own[kept].long()] = 1
            columns.append(there.view(len(kept), -1).sum(1))
    return torch.stack(columns, 1)


def first_order(
    model: nn.Module,
    data: GroupedData,
    options: Mapping[str, Sequence[Block]],
    *,
    probes: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> dict[str, Tensor]:
    """What each size in each channel alone does to the outputs, to first order.

    Args:
        model: Masked, its masks fixed; its mode is restored.
        data: The images, on the model's device.
        options: Sizes to measure, of each layer.
        probes: Random directions of the outputs for each image.
        batch_size: Images at a time.
        seed: Of the directions.
        progress: Told after every batch.

    Returns:
        ``E (vᵀJδ)²``, float64, (C, options), by layer.
    """
    layers = masked_relus(model)
    sizes = {name: (layer.shape[0], len(options[name])) for name, layer in layers.items()}
    found = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(data), batch_size):
            images = data.normalized(slice(start, start + batch_size))
            for name, x, slopes in _slopes(model, images, probes, generator):
                found[name] += _shifted(layers[name], x, slopes, options[name])
            if progress is not None:
                done = min(start + batch_size, len(data))
                progress(Progress("block_relu distortions", done, len(data), f"{done:,} of {len(data):,} images"))
    finally:
        model.train(was_training)
    return {name: table / (len(data) * probes) for name, table in found.items()}


def _slopes(
    model: nn.Module, images: Tensor, probes: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Of each layer what it takes, and derivatives of the outputs by what it gives in random directions."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, inputs, y, name=name: seen.__setitem__(name, (inputs[0], y)))
        for name, layer in masked_relus(model).items()
    ]
    try:
        with torch.enable_grad():
            logits = logits_of(model(images.requires_grad_()), model, images)
    finally:
        for handle in handles:
            handle.remove()
    slopes: dict[str, list[Tensor]] = {name: [] for name in seen}
    for probe in range(probes):
        directions = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
        outputs = [y for _, y in seen.values()]
        again = probe + 1 < probes
        found = torch.autograd.grad(logits, outputs, directions, retain_graph=again, allow_unused=True)
        for name, y, slope in zip(seen, outputs, found, strict=True):
            slopes[name].append(torch.zeros_like(y) if slope is None else slope)
    for name, (x, _) in seen.items():
        yield name, x.detach(), slopes[name]


def _shifted(layer: MaskedReLU, x: Tensor, slopes: Sequence[Tensor], options: Sequence[Block]) -> Tensor:
    """Sum over images and directions of how far outputs shift, squared, float64, (C, options)."""
    other = MaskedReLU(layer.shape).to(x.device)
    # Anew: what comes behind a layer may have overwritten what it gave.
    y = layer(x)
    columns = []
    for block in options:
        other.set_mask(layer.kept)
        set_patches(other, [block] * layer.shape[0])
        change = other(x) - y
        shifts = [(slope * change).flatten(2).sum(2) if x.ndim > 2 else slope * change for slope in slopes]
        columns.append(torch.stack([shift.double().square().sum(0) for shift in shifts]).sum(0))
    return torch.stack(columns, 1).cpu()


def measured(
    model: nn.Module,
    data: GroupedData,
    options: Mapping[str, Sequence[Block]],
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
) -> dict[str, Tensor]:
    """What each size in each channel alone does to the outputs: mean squared difference, a forward pass each.

    Args:
        model: As for :func:`first_order`; not changed.
        data: The images, on the model's device.
        options: Sizes to measure, of each layer.
        batch_size: Images at a time.
        progress: Told after every channel.

    Returns:
        float64, (C, options), by layer; sums over the outputs, so that it is what the first-order distortion is of.
    """
    network = copy_model(model).eval()
    before = predict(network, data, batch_size=batch_size).double()
    layers = masked_relus(network)
    found: dict[str, Tensor] = {}
    total, done = sum(layer.shape[0] for layer in layers.values()), 0
    for name, layer in layers.items():
        kept, plain = layer.kept, [(1, 1)] * layer.shape[0]
        found[name] = torch.zeros(layer.shape[0], len(options[name]), dtype=torch.float64)
        for channel in range(layer.shape[0]):
            for place, block in enumerate(options[name]):
                set_patches(layer, [*plain[:channel], block, *plain[channel + 1 :]])
                shift = predict(network, data, batch_size=batch_size).double() - before
                found[name][channel, place] = float(shift.square().sum(1).mean())
                layer.share(None)
                layer.set_mask(kept)
            done += 1
            if progress is not None:
                progress(Progress("block_relu distortions", done, total, f"{done:,} of {total:,} channels"))
    return found


def _blocks(value: Sequence[Block] | str) -> list[Block]:
    """Sizes from pairs or from text, ``"1x1,2x4"``."""
    try:
        if isinstance(value, str):
            pairs = [word.strip().split("x") for word in value.split(",") if word.strip()]
            found = [(int(height), int(width)) for height, width in pairs]
        else:
            found = [(int(height), int(width)) for height, width in value]
    except (TypeError, ValueError):
        found = []
    if not found or min(map(min, found)) < 1:
        raise FairlineError(f"Block ReLU needs blocks such as 1x1,2x2,4x4, not {value}.")
    return found


__all__ = ["DISTORTIONS", "LINEAR", "BlockReLU", "first_order", "measured", "set_patches"]
