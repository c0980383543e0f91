"""The networks of CryptoNAS (Ghodsi, Veldanda, Reagen and Garg, NeurIPS 2020): layers, skip paths, balanced ReLUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError

#: Where the ReLUs of skip paths are; see :class:`CNet`.
SkipReLUs = Literal["none", "once", "each"]


class CNetLayer(nn.Module):
    """A ReLU and a k×k convolution; in all layers but the first a 1×1 convolution of it and of the skip paths."""

    def __init__(self, channels: int, kernel: int, sides: tuple[int, int], paths: int, relus_of_paths: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = same_conv(channels, kernel, sides)
        self.bn = nn.BatchNorm2d(channels)
        self.mixes = paths > 0
        if self.mixes:
            self.mix = nn.Conv2d(paths * channels, channels, 1, bias=False)
            self.mix_bn = nn.BatchNorm2d(channels)
        self.mix_relus = nn.ModuleList(nn.ReLU() for _ in range(relus_of_paths))

    def convolved(self, activated: Tensor) -> Tensor:
        """(B, channels, H, W), past the ReLU, to the same shape."""
        out: Tensor = self.bn(self.conv(activated))
        return out

    def mixed(self, paths: Sequence[Tensor]) -> Tensor:
        """Outputs of other layers and its own convolution, (B, channels, H, W) each, to the layer's output."""
        out: Tensor = self.mix_bn(self.mix(torch.cat(list(paths), 1)))
        return out


class CNet(nn.Module):
    """A stem, then layers in three stages; each layer may read the outputs of all before it through skip paths.

    A layer applies a ReLU to the output of the one before, convolves it, puts the outputs that skip paths bring beside
    that, and mixes all by a 1×1 convolution. After each third of the layers the image is halved and the channels grow
    by ``balance``: by 4 each layer has as many ReLUs as any other (*ReLU balancing*), by 2 as much work, as networks
    for inference in the clear have it. Balanced, where all halvings are even, there are ``layers·width·H·W`` ReLUs,
    whatever the skips: the published networks of 6, 12 and 24 layers of width 14, 28 and 56 have 86,016, 344,064 and
    1,376,256 at 32×32 pixels.

    The published search space has a ReLU before each 1×1 convolution as well. ``skip_relus`` says what became of it:

    - ``"each"``: as it was, one for each unit that a path brings;
    - ``"once"`` (*ReLU shuffling*): the same function; an output's ReLU is computed once and read by all paths from it;
    - ``"none"`` (*ReLU pruning*): there is none.

    Source: the description, and the code that was published with it (github.com/zghodsi/CryptoNAS). Ours: an output
    that crosses a halving is read by a 2×2 convolution of stride 2, where the code has two of 1×1, on two of the four
    pixels, for half of the channels each; ReLUs are free of it either way. Nothing is dropped out.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of the image in pixels, or height and width.
        width: Channels of the first stage.
        layers: How many, 3 at least.
        skips: For each layer from the second on, for each output from the stem's on up to the one but last: whether a
            skip path leads from it, as 0 or 1; a list of ``layers·(layers − 1)/2``, or text (``"0, 1 1, 0 0 1"``).
            Nothing: no skips.
        kernels: Side of each layer's convolution, odd: a number for all, a list, or text.
        balance: Factor of the channels at a halving.
        skip_relus: As above.
        stem_stride: Stride of the stem; 2 halves every resolution.

    Raises:
        FairlineError: Skips or kernels do not fit the layers.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        width: int = 14,
        layers: int = 6,
        skips: Sequence[bool] | str = (),
        kernels: Sequence[int] | int | str = 3,
        balance: int = 4,
        skip_relus: SkipReLUs = "none",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        bits = _bits(skips, layers)
        own, sides = _kernels(kernels, layers), stem_sides(image_size, stem_stride)
        self.skips = rows_of(bits, layers)
        if skip_relus not in get_args(SkipReLUs) or balance < 1:
            raise FairlineError(
                f"A CNet has skip_relus {', '.join(get_args(SkipReLUs))} and balance ≥ 1, not '{skip_relus}' and "
                f"{balance}."
            )
        self.arguments = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "width": width,
            "layers": layers,
            "skips": bits,
            "kernels": own,
            "balance": balance,
            "skip_relus": skip_relus,
            "stem_stride": stem_stride,
        }
        self.image_size, self.layers, self.skip_relus = image_size, layers, skip_relus
        self.halvings = halvings(layers)
        self.conv = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self._add_stages(width, balance, own, sides)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(width * balance**2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def _add_stages(self, width: int, balance: int, kernels: Sequence[int], sides: tuple[int, int]) -> None:
        """Modules ``stage1`` to ``stage3``, and ``halve2`` and ``halve3`` for the outputs that are read beyond."""
        stage, channels = 1, width
        for index in range(self.layers):
            if index - 1 in self.halvings:
                stage += 1
                outputs = crossing(self.skips, index - 1)
                reads = {str(each): halve(channels, channels * balance, sides) for each in outputs}
                self.add_module(f"halve{stage}", nn.ModuleDict(reads))
                channels *= balance
                sides = (-(-sides[0] // 2), -(-sides[1] // 2))
            paths = 0 if index == 0 else 1 + sum(self.skips[index])
            relus = {"none": 0, "once": 1, "each": paths}[self.skip_relus] if index else 0
            layer = CNetLayer(channels, kernels[index], sides, paths, relus)
            self._stage(stage).append(layer)
        if self.skip_relus == "once":
            for each, outputs in self._read_twice().items():
                self.add_module(f"relus{each}", nn.ModuleDict({str(output): nn.ReLU() for output in outputs}))

    def _stage(self, stage: int) -> nn.ModuleList:
        if not hasattr(self, f"stage{stage}"):
            self.add_module(f"stage{stage}", nn.ModuleList())
        found = self.get_submodule(f"stage{stage}")
        assert isinstance(found, nn.ModuleList)
        return found

    def _read_twice(self) -> dict[int, list[int]]:
        """By stage: outputs that its skip paths read and that no layer of it applies its own ReLU to."""
        bounds = [0, *(last + 1 for last in self.halvings), self.layers]
        found = {}
        for stage, (first, behind) in enumerate(pairwise(bounds), start=1):
            read = {output for row in self.skips[first:behind] for output, bit in enumerate(row) if bit}
            found[stage] = sorted(read - set(range(first, behind)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes)."""
        outputs: dict[int, Tensor] = {0: self.bn(self.conv(x))}
        first, stage = 0, 1
        activated: dict[int, Tensor] = {}
        for index in range(self.layers):
            if index - 1 in self.halvings:
                stage, first, activated = stage + 1, index, {}
                outputs = {
                    each: self.get_submodule(f"halve{stage}.{each}")(outputs[each])
                    for each in crossing(self.skips, index - 1)
                }
            layer = self.get_submodule(f"stage{stage}.{index - first}")
            assert isinstance(layer, CNetLayer)
            activated[index] = layer.relu(outputs[index])
            out = layer.convolved(activated[index])
            outputs[index + 1] = (
                layer.mixed(self._paths(stage, index, layer, outputs, activated, out)) if index else out
            )
        logits: Tensor = self.linear(self.flatten(self.pool(outputs[self.layers])))
        return logits

    def _paths(
        self,
        stage: int,
        index: int,
        layer: CNetLayer,
        outputs: dict[int, Tensor],
        activated: dict[int, Tensor],
        out: Tensor,
    ) -> list[Tensor]:
        """What a layer mixes: the outputs that skip paths bring, then its own convolution; past ReLUs, if any."""
        read = [output for output, bit in enumerate(self.skips[index]) if bit]
        if self.skip_relus == "none":
            return [*(outputs[output] for output in read), out]
        if self.skip_relus == "each":
            paths = [*(outputs[output] for output in read), out]
            return [relu(path) for relu, path in zip(layer.mix_relus, paths, strict=True)]
        for output in read:
            if output not in activated:
                activated[output] = self.get_submodule(f"relus{stage}.{output}")(outputs[output])
        return [*(activated[output] for output in read), layer.mix_relus[0](out)]


def halvings(layers: int) -> tuple[int, int]:
    """Layers, from 0, behind which the image is halved: after each third of them, rounded down.

    Args:
        layers: How many there are.

    Returns:
        Both.

    >>> halvings(6), halvings(12), halvings(7)
    ((1, 3), (3, 7), (1, 3))
    """
    return layers // 3 - 1, 2 * (layers // 3) - 1


def crossing(skips: Sequence[Sequence[bool]], last: int) -> list[int]:
    """Outputs that layers behind a halving read, the next one's input among them.

    Args:
        skips: Of each layer, from :func:`rows_of`.
        last: The layer before the halving.

    Returns:
        Positions: 0 is the stem's output, i + 1 that of layer i.

    >>> crossing([[], [0], [1, 0], [0, 0, 0]], last=1)
    [0, 2]
    """
    return [
        output
        for output in range(last + 2)
        if output == last + 1 or any(output < len(row) and row[output] for row in skips[last + 1 :])
    ]


def halve(channels: int, out: int, sides: tuple[int, int]) -> nn.Sequential:
    """Reads an output at half its resolution, rounded up, without ReLUs.

    Args:
        channels: Of the output.
        out: Channels after it.
        sides: Height and width before it.

    Returns:
        A convolution and its normalisation.
    """
    padding = (sides[0] % 2, sides[1] % 2)
    return nn.Sequential(nn.Conv2d(channels, out, 2, 2, padding, bias=False), nn.BatchNorm2d(out))


def same_conv(channels: int, kernel: int, sides: tuple[int, int]) -> nn.Conv2d:
    """A convolution that keeps its input's shape, without the taps that would see nothing but padding.

    Of those torch 2.13 returns uninitialised memory as the gradient in bfloat16 on a CPU.

    Args:
        channels: Of input and output.
        kernel: Its side, odd.
        sides: Height and width of the input.

    Returns:
        The convolution, without bias.

    >>> same_conv(2, 5, (1, 8)).kernel_size
    (1, 5)
    """
    height, width = (min(kernel, 2 * side - 1) for side in sides)
    return nn.Conv2d(channels, channels, (height, width), padding=(height // 2, width // 2), bias=False)


def rows_of(bits: Iterable[bool], layers: int) -> list[list[bool]]:
    """Skips by layer: none of the first, of layer i those from outputs 0 to i − 1.

    Args:
        bits: In one row.
        layers: How many there are.

    Returns:
        A row for each layer.

    >>> rows_of([1, 0, 1], 3)
    [[], [True], [False, True]]
    """
    left = iter(bits)
    return [[bool(next(left)) for _ in range(layer)] for layer in range(layers)]


def stem_sides(image_size: int | tuple[int, int], stem_stride: int) -> tuple[int, int]:
    """Height and width of what the stem gives.

    Args:
        image_size: Side of the image in pixels, or height and width.
        stem_stride: Of the stem.

    Returns:
        Both in pixels.

    >>> stem_sides(32, 2), stem_sides((9, 16), 2)
    ((16, 16), (5, 8))
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return -(-height // stem_stride), -(-width // stem_stride)


def _bits(skips: Sequence[bool] | str, layers: int) -> list[bool]:
    if not isinstance(layers, int) or layers < 3:
        raise FairlineError(f"A CNet halves its image twice, so it needs 3 layers at least, not {layers}.")
    bits = [each for each in skips if each not in ", "] if isinstance(skips, str) else list(skips)
    known = {"0": False, "1": True, 0: False, 1: True}
    count = layers * (layers - 1) // 2
    if bits and (len(bits) != count or not all(isinstance(each, str | int) and each in known for each in bits)):
        raise FairlineError(
            f"A CNet of {layers} layers takes {count} skips, each 0 or 1, none of its first layer, one of its second, "
            f"…; not {len(bits)}: {skips}."
        )
    return [known[each] for each in bits] or [False] * count


def _kernels(kernels: Sequence[int] | int | str, layers: int) -> list[int]:
    try:
        text = kernels.replace(",", " ").split() if isinstance(kernels, str) else kernels
        own = [int(text)] * layers if isinstance(text, int) else [int(each) for each in text]
    except (TypeError, ValueError):
        own = []
    if len(own) != layers or not all(kernel > 0 and kernel % 2 for kernel in own):
        raise FairlineError(f"A CNet of {layers} layers takes one odd kernel, or {layers} of them, not {kernels}.")
    return own


def cnet(
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int = 14,
    layers: int = 6,
    skips: Sequence[bool] | str = (),
    kernels: Sequence[int] | int | str = 3,
    balance: int = 4,
    skip_relus: SkipReLUs = "none",
    stem_stride: int = 1,
) -> CNet:
    """A network of CryptoNAS' search space; see :class:`CNet`."""
    return CNet(num_classes, in_channels, image_size, width, layers, skips, kernels, balance, skip_relus, stem_stride)
