"""A network as an affine part and one correction for each kept ReLU, which can be taken out.

With s the input of a kept ReLU and g the surrogate that stands where ReLUs were cut, its output is g(s) + c with the
correction c = relu(s) − g(s). Under identity surrogates c = max(−s, 0), and if nothing else bends, all but the
corrections is affine in the image x:

    logits = A·x + b + Σ_l B_l·c_l,    s_l = M_l·x + m_l + Σ_{j<l} N_{lj}·c_j.

To take a correction out is what cutting its ReLU too would do, before any finetune. Source: the split is algebra; zero
and mean ablation as in Li and Janson (2024), the first-order estimate as in Molchanov et al. (2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.data.memory import images_at_once
from fairline.errors import FairlineError
from fairline.inference import logits_of, predict
from fairline.masking import MaskedReLU, copy_model, mask_relus, masked_relus
from fairline.masking.equal import same_random
from fairline.masking.watch import Seen, watch
from fairline.ranks import here
from fairline.training import choose

#: Given a layer's name, the layer, its input and its output; returns another output, or None to leave it.
Hook = Callable[[str, MaskedReLU, Tensor, Tensor], Tensor | None]


class Ablation:
    """A copy of a network, in evaluation mode, whose kept ReLUs can be taken out.

    Args:
        model: With masks or without; without, it keeps all of its ReLUs. It is not changed.
        data: Whose images it takes.
        device: Where to compute.

    Attributes:
        layers: Masks that keep a ReLU, by module name, in the order of modules.
        count: r, how many units are corrected for each image: as many as ReLUs are kept, unless they share signs.
        bends: What is not affine even without corrections and stays: functions, as torch names them, and how many
            modules call each; ``quadratic_surrogate`` and other polynomials, and how many layers have them.

    Raises:
        FairlineError: Masks are still being learned, or masks cannot reach the ReLUs.
    """

    def __init__(self, model: nn.Module, data: GroupedData, device: torch.device) -> None:
        if any(layer.weight is not None for layer in masked_relus(model).values()):
            raise FairlineError("The masks are still being learned; fix them (keep_largest) before an audit.")
        network = copy_model(model).to(device).eval()
        example = data.normalized(slice(2)).to(device)
        if not masked_relus(network) and _has_relus(_seen(network, example)):
            network = mask_relus(network, example).eval()
        self.arithmetic = choose("fp32", network, example, device)
        self.network = network.requires_grad_(False)
        self.device = device
        masks = masked_relus(network)
        self.layers = {name: layer for name, layer in masks.items() if layer.num_kept}
        self.kept = {name: layer.kept.clone() for name, layer in self.layers.items()}
        self.count = sum(int(kept.sum()) for kept in self.kept.values())
        self.bends = {
            name: len(paths.keys() - masks.keys())
            for name, paths in _seen(network, example).others.items()
            if paths.keys() - masks.keys()
        }
        for layer in masks.values():
            if layer.coefficients is not None:
                kind = f"{layer.surrogate}_surrogate"
                self.bends[kind] = self.bends.get(kind, 0) + 1

    def logits(self, data: GroupedData) -> Tensor:
        """Logits of what is left at the moment.

        Args:
            data: The images.

        Returns:
            float32, (N, K), on the CPU.

        Raises:
            FairlineError: One of them is not finite.
        """
        logits = predict(self.network, data, device=self.device, arithmetic=self.arithmetic, ranks=here()).cpu()
        broken = int((~logits.isfinite()).any(1).sum())
        if broken:
            raise FairlineError(
                f"Without some of its ReLUs the logits of {type(self.network).__name__} are not finite on {broken} of "
                f"{len(data)} images of {data.name}."
            )
        return logits

    @contextmanager
    def without(self, taken: Mapping[str, Tensor]) -> Iterator[None]:
        """Take units out: their corrections are 0, and what lies behind them is computed anew.

        Args:
            taken: By layer, which of its units; bool, of the layer's shape.

        Yields:
            Once they are out.
        """
        try:
            for name, units in taken.items():
                self.layers[name].set_mask(self.kept[name] & ~units)
            yield
        finally:
            for name in taken:
                self.layers[name].set_mask(self.kept[name])

    @contextmanager
    def centred(self, data: GroupedData) -> Iterator[None]:
        """Put each correction's mean in its place, a constant, so that what is left is affine as well.

        Args:
            data: Whose mean: of the groups' means, so that no group counts for more than another.

        Yields:
            Once they are replaced.
        """
        means = self._means(data)

        def put(name: str, layer: MaskedReLU, x: Tensor, y: Tensor) -> Tensor:
            return layer.substitute(x) + means[name].to(y.dtype)

        with self._hooked(put):
            yield

    def _means(self, data: GroupedData) -> dict[str, Tensor]:
        sums = {name: torch.zeros(layer.shape, device=self.device) for name, layer in self.layers.items()}
        groups = [index for index in data.sample_by_group(len(data)) if len(index)]
        share = 0.0

        def add(name: str, layer: MaskedReLU, x: Tensor, y: Tensor) -> None:
            sums[name] += share * (y - layer.substitute(x)).sum(0)

        with self._hooked(add):
            for index in groups:
                share = 1 / (len(index) * len(groups))
                predict(self.network, part_of(data, index), device=self.device, arithmetic=self.arithmetic)
        return sums

    @contextmanager
    def _hooked(self, hook: Hook) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():

                def call(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> Tensor | None:
                    return hook(name, cast(MaskedReLU, module), inputs[0], output)

                stack.callback(layer.register_forward_hook(call).remove)
            yield

    def units(self) -> list[tuple[str, int]]:
        """Layer and position in the flattened activation of each kept ReLU: the order of :class:`Services`."""
        return [(name, int(i)) for name, kept in self.kept.items() for i in torch.nonzero(kept.flatten()).flatten()]

    def first_order(self, images: Tensor, labels: Tensor) -> Tensor:
        """What each unit does for each image's margin, to first order: ∂m/∂u·c, by one backward pass.

        The margin m is the true class's logit less the largest of the others; u is the unit's output and c its
        correction, so that m falls by about ∂m/∂u·c where it is taken out. Exact where nothing bends behind it.

        Args:
            images: (B, C, H, W), as the network sees them.
            labels: int64, (B,).

        Returns:
            (B, r), in logits; see :meth:`units` for the order.
        """
        steps: dict[str, Tensor] = {}
        corrections: dict[str, Tensor] = {}

        def step(name: str, layer: MaskedReLU, x: Tensor, y: Tensor) -> Tensor:
            corrections[name] = (y - layer.substitute(x)).detach()
            steps[name] = torch.zeros_like(y, requires_grad=True)
            return y + steps[name]

        with torch.enable_grad(), self._hooked(step):
            logits = logits_of(self.network(images), self.network, images)
            margin = (logits.gather(1, labels[:, None]) - logits.gather(1, rivals(logits, labels))).sum()
            leaves = list(steps.values())
            slopes = torch.autograd.grad(margin, leaves, materialize_grads=True, allow_unused=True)
        slope = dict(zip(steps, slopes, strict=True))
        columns = []
        for name, kept in self.kept.items():
            if name in slope:
                columns.append((slope[name] * corrections[name]).flatten(1)[:, kept.flatten()])
            else:
                # These images do not come by.
                columns.append(images.new_zeros(len(images), int(kept.sum())))
        return torch.cat(columns, 1)

    def services(self, data: GroupedData, orders: Sequence[Tensor] = (), *, batch_size: int = 50) -> Services:
        """:meth:`first_order` of every image, averaged by group; memory grows with groups and r, not with images.

        Args:
            data: The images.
            orders: Other orders of the groups, int64, (N,) each: what chance alone would make of them.
            batch_size: Images at a time; fewer where they have more than 64×64 pixels.

        Returns:
            The means.
        """

        def found() -> Iterator[tuple[Tensor, Tensor]]:
            for index, images in data.batches(torch.arange(len(data)), images_at_once(batch_size, data.images.shape)):
                yield index.cpu(), self.first_order(images.to(self.device), data.labels[index].to(self.device))

        return averaged(found(), data, orders)

    def exact(self, data: GroupedData, units: Sequence[int], seen: Callable[[int], None] | None = None) -> Tensor:
        """How far each image's margin falls where one unit is taken out; a forward pass a unit.

        The rival is the one that the whole network has, as in :meth:`first_order`.

        Args:
            data: The images.
            units: Which, positions in :meth:`units`.
            seen: Told after each unit how many there have been.

        Returns:
            float64, (N, len(units)), in logits.
        """
        labels = data.labels.cpu()
        whole = self.logits(data).double()
        rival = rivals(whole, labels)
        before = whole.gather(1, labels[:, None]) - whole.gather(1, rival)
        names, falls = self.units(), []
        for done, unit in enumerate(units, start=1):
            name, position = names[unit]
            alone = torch.zeros_like(self.kept[name])
            alone.view(-1)[position] = True
            with self.without({name: alone}):
                left = self.logits(data).double()
            falls.append(before - (left.gather(1, labels[:, None]) - left.gather(1, rival)))
            if seen is not None:
                seen(done)
        return torch.cat(falls, 1)


@dataclass(frozen=True, eq=False)
class Services:
    """What r units do for the margins of n images; see :meth:`Ablation.services`.

    Attributes:
        by_group: float64, (A, r): mean over each group's images, in logits; positive where the correction helps.
        by_chance: float64, (P, A, r): the same with the images' groups in P other orders.
        total: float64, (n,): of all units together, for each image.
    """

    by_group: Tensor
    by_chance: Tensor
    total: Tensor


def part_of(data: GroupedData, index: Tensor) -> GroupedData:
    """Some of the images, as a network sees them among all: normalised alike.

    Args:
        data: All.
        index: Which, int64, (n,).

    Returns:
        Those.
    """
    mean, std = data.normalization()
    return replace(data.select(index), mean=mean, std=std)


def averaged(found: Iterable[tuple[Tensor, Tensor]], data: GroupedData, orders: Sequence[Tensor] = ()) -> Services:
    """What units do for images, averaged by group.

    Args:
        found: Positions of images, int64, (B,), and what each unit does for them, (B, r); together all of ``data``.
        data: The images.
        orders: As in :meth:`Ablation.services`.

    Returns:
        The means.
    """
    groups = data.groups.cpu()
    arranged = torch.stack([groups, *(groups[order] for order in orders)])
    weights = F.one_hot(arranged, data.num_groups).float()
    weights /= weights.sum(1, keepdim=True)
    total = torch.zeros(len(data), dtype=torch.float64)
    means: Tensor | int = 0
    for index, values in found:
        # Products in float32, a float64 matrix of all units would be the largest thing in memory.
        means = means + weights[:, index].transpose(1, 2).to(values) @ values
        total[index] = values.double().sum(1).cpu()
    by_group = cast(Tensor, means).double().cpu()
    return Services(by_group[0], by_group[1:], total)


def rivals(logits: Tensor, labels: Tensor) -> Tensor:
    """The most probable class beside the true one, int64, (B, 1)."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1, keepdim=True)


def _has_relus(seen: Seen) -> bool:
    return bool(seen.hidden) or any(call.reached for call in seen.calls)


def _seen(network: nn.Module, example: Tensor) -> Seen:
    with torch.no_grad(), same_random(0):
        return watch(copy_model(network), example.clone())
