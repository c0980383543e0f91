"""A macro-search with shared weights: which kernels and skip paths the layers of a network get.

Efficient Neural Architecture Search (ENAS; Pham, Guan, Zoph, Le and Dean, ICML 2018) as the code that was published
with CryptoNAS uses it (github.com/zghodsi/CryptoNAS, on top of github.com/melodyguan/enas). One network holds the
weights of all architectures; each training step trains those of one architecture that a controller draws. After each
epoch the controller, an LSTM, draws more, each is measured with the shared weights on a batch that is held out, and
REINFORCE raises the probability of those that did well:

    ∇ E[R] = E[(R − b)·∇ log p(architecture)],   b a moving average of R.

What differs from that code: the shared network mixes its paths by 1×1 convolutions, as the final network does, where
the code adds them up, so that an architecture computes in it what it will compute as a network of its own (but for the
channels). Of the code's six operations the convolutions are kept; their separable forms are plain ones in its final
networks anyway. Batch normalisation is by the batch, also when an architecture is measured: means over many
architectures fit none. All samples of a controller's step see one batch. Entropies and the skips' probabilities are
exact, where the code has estimates. The moving average starts at the first reward, not at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.models.cnet import crossing, halve, halvings, rows_of, same_conv, stem_sides
from fairline.ranks import here
from fairline.training import Progress, ProgressCallback


@dataclass(frozen=True)
class Architecture:
    """What a search chooses.

    Attributes:
        kernels: Side of each layer's convolution.
        skips: As for :class:`~fairline.models.cnet.CNet`, in one row.
    """

    kernels: tuple[int, ...]
    skips: tuple[bool, ...]

    @property
    def rows(self) -> list[list[bool]]:
        """Skips of each layer."""
        return rows_of(self.skips, len(self.kernels))

    @property
    def skip_rate(self) -> float:
        """Share of the possible skip paths that it has."""
        return sum(self.skips) / len(self.skips)

    def __str__(self) -> str:
        """Layer by layer: its kernel, then a 0 or 1 for each output that a skip path may bring.

        Returns:
            Text that :meth:`parse` reads.

        >>> str(Architecture((3, 5, 3), (True, False, True)))
        '3 / 5 1 / 3 0 1'
        """
        return " / ".join(
            " ".join(map(str, (kernel, *map(int, row)))) for kernel, row in zip(self.kernels, self.rows, strict=True)
        )

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Read what ``str`` writes.

        Args:
            text: Layers with slashes between them.

        Returns:
            The architecture.

        Raises:
            FairlineError: A layer is not a kernel and the bits that belong to it.

        >>> Architecture.parse("3 / 5 1 / 3 0 1")
        Architecture(kernels=(3, 5, 3), skips=(True, False, True))
        """
        rows = [layer.replace(",", " ").split() for layer in text.split("/")]
        for layer, row in enumerate(rows):
            if len(row) != layer + 1 or not row[0].isdecimal() or not set(row[1:]) <= {"0", "1"}:
                raise FairlineError(
                    f"An architecture is written '3 / 5 1 / 3 0 1': a kernel for each layer, then a 0 or 1 for each of "
                    f"the outputs before its input; layer {layer + 1} of '{text}' is '{' '.join(row)}'."
                )
        return cls(tuple(int(row[0]) for row in rows), tuple(bit == "1" for row in rows for bit in row[1:]))


@dataclass
class Decision:
    """An architecture that a controller drew, or was given.

    Attributes:
        architecture: It.
        log_prob: Of drawing it, in nats.
        entropy: Of the choices made on the way to it, in nats.
        off_target: KL divergence of each skip's probability from the target, in nats, mean over layers of their sums.
    """

    architecture: Architecture
    log_prob: Tensor
    entropy: Tensor
    off_target: Tensor


class Controller(nn.Module):
    """ENAS' controller: an LSTM that goes from layer to layer, choosing a kernel, then skips by attention.

    Args:
        layers: Of the architectures.
        kernels: To choose from.
        skip_target: Share of the skip paths that the KL term draws to.
        size: Of the LSTM's state.
        bound: Logits lie between −bound and bound.
        seed: Of its weights.
    """

    def __init__(
        self,
        layers: int,
        kernels: Sequence[int],
        skip_target: float = 0.4,
        size: int = 64,
        bound: float = 1.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers, self.kernels, self.skip_target, self.bound = layers, tuple(kernels), skip_target, bound
        self.first = nn.Parameter(torch.empty(1, size))
        self.cell = nn.LSTMCell(size, size, bias=False)
        self.chosen = nn.Embedding(len(kernels), size)
        self.choose = nn.Linear(size, len(kernels), bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.query = nn.Linear(size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        # Draws are compared with probabilities, so that what a resumed run draws hangs on the last bits.
        self.double()
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)

    def forward(self, generator: torch.Generator | None = None, given: Architecture | None = None) -> Decision:
        """Draw an architecture, or follow one.

        Args:
            generator: Of the draws.
            given: Its probability is wanted.

        Returns:
            It, and how likely it was; differentiable.
        """
        log_probs, entropies, off_target = [], [], []
        kernels: list[int] = []
        skips: list[bool] = []
        anchors: list[Tensor] = []
        state = (torch.zeros_like(self.first), torch.zeros_like(self.first))
        inputs: Tensor = self.first
        for layer in range(self.layers):
            state = self.cell(inputs, state)
            logits = self.bound * torch.tanh(self.choose(state[0]))[0]
            choice = self._kernel(logits, generator, None if given is None else given.kernels[layer])
            kernels.append(self.kernels[choice])
            log_probs.append(F.log_softmax(logits, 0)[choice])
            entropies.append(-(F.softmax(logits, 0) * F.log_softmax(logits, 0)).sum())
            state = self.cell(self.chosen.weight[choice : choice + 1], state)
            inputs = self.first
            if layer:
                before = torch.cat(anchors)
                attention = self.score(torch.tanh(self.key(before) + self.query(state[0])))[:, 0]
                # The code softmaxes each score against its negative.
                logits = 2 * self.bound * torch.tanh(attention)
                row = self._skips(logits, generator, None if given is None else given.rows[layer])
                skips += [bool(bit) for bit in row]
                log_probs.append(-F.binary_cross_entropy_with_logits(logits, row, reduction="sum"))
                entropies.append(F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="sum"))
                off_target.append(self._kl(logits))
                inputs = (row[:, None] * before).sum(0, keepdim=True) / (1 + row.sum())
            anchors.append(state[0])
        return Decision(
            Architecture(tuple(kernels), tuple(skips)),
            torch.stack(log_probs).sum(),
            torch.stack(entropies).sum(),
            torch.stack(off_target).mean(),
        )

    def _kernel(self, logits: Tensor, generator: torch.Generator | None, given: int | None) -> int:
        if given is not None:
            return self.kernels.index(given)
        drawn = torch.rand((), dtype=torch.float64, generator=generator)
        return min(int((drawn > F.softmax(logits, 0).cumsum(0)).sum()), len(self.kernels) - 1)

    def _skips(self, logits: Tensor, generator: torch.Generator | None, given: Sequence[bool] | None) -> Tensor:
        if given is not None:
            return torch.tensor([float(bit) for bit in given], dtype=torch.float64)
        return (torch.rand(len(logits), dtype=torch.float64, generator=generator) < logits.sigmoid()).double()

    def _kl(self, logits: Tensor) -> Tensor:
        """KL divergence of Bernoulli distributions from the target's, summed."""
        skip, target = logits.sigmoid(), self.skip_target
        cross = -(skip * math.log(target) + (1 - skip) * math.log1p(-target))
        return (cross - F.binary_cross_entropy_with_logits(logits, skip, reduction="none")).sum()


def reinforce(decisions: Sequence[Decision], advantages: Sequence[float], skip_weight: float) -> Tensor:
    """A loss whose gradient is REINFORCE's estimate of −∇E[R], plus that of the skips' distance from their target.

    Args:
        decisions: Drawn.
        advantages: R − b of each.
        skip_weight: Of the KL term.

    Returns:
        The mean over them.
    """
    terms = [
        skip_weight * each.off_target - advantage * each.log_prob
        for each, advantage in zip(decisions, advantages, strict=True)
    ]
    return torch.stack(terms).mean()


class SharedNetwork(nn.Module):
    """All architectures in one network: a convolution for each kernel, a 1×1 convolution for each path.

    Its channels stay the same at the halvings, as in the published search; what is found is scaled to a budget after.

    Args:
        draw: Says which architecture the next forward pass computes.
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Height and width.
        layers: As for :class:`~fairline.models.cnet.CNet`.
        kernels: To choose from.
        width: Channels.
        stem_stride: Stride of the stem.
    """

    def __init__(
        self,
        draw: Callable[[], Architecture],
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        layers: int,
        kernels: Sequence[int],
        width: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.draw = draw
        self.fixed: Architecture | None = None
        self.conv = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.convs, self.paths, self.mix_bn = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.halves, sides = nn.ModuleList(), stem_sides(image_size, stem_stride)
        for layer in range(layers):
            if layer - 1 in halvings(layers):
                self.halves.append(nn.ModuleList(halve(width, width, sides) for _ in range(layer + 1)))
                sides = (-(-sides[0] // 2), -(-sides[1] // 2))
            choices = {str(k): nn.Sequential(same_conv(width, k, sides), nn.BatchNorm2d(width)) for k in kernels}
            self.convs.append(nn.ModuleDict(choices))
            paths = layer + 1 if layer else 0
            self.paths.append(nn.ModuleList(nn.Conv2d(width, width, 1, bias=False) for _ in range(paths)))
            self.mix_bn.append(nn.BatchNorm2d(width) if layer else nn.Identity())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes) of one architecture."""
        architecture = self.fixed or self.draw()
        rows, places = architecture.rows, halvings(len(architecture.kernels))
        outputs: dict[int, Tensor] = {0: self.bn(self.conv(x))}
        for layer, kernel in enumerate(architecture.kernels):
            if layer - 1 in places:
                halves = self._of(self.halves, places.index(layer - 1))
                outputs = {each: self._of(halves, each)(outputs[each]) for each in crossing(rows, layer - 1)}
            out = self.convs[layer].get_submodule(str(kernel))(torch.relu(outputs[layer]))
            if layer:
                paths = self.paths[layer]
                read = [self._of(paths, each)(outputs[each]) for each, bit in enumerate(rows[layer]) if bit]
                out = self.mix_bn[layer](sum(read, self._of(paths, layer)(out)))
            outputs[layer + 1] = out
        logits: Tensor = self.linear(self.pool(outputs[len(rows)]).flatten(1))
        return logits

    @staticmethod
    def _of(modules: nn.Module, position: int) -> nn.Module:
        return modules.get_submodule(str(position))

    @torch.no_grad()
    def accuracy(self, architecture: Architecture, data: GroupedData, index: Tensor, batch_size: int) -> float:
        """Share of images that an architecture gets right with the shared weights.

        Args:
            architecture: It.
            data: Held out, on the network's device.
            index: Which of them.
            batch_size: Images at a time, at most; batches are as equal as can be.

        Returns:
            From 0 to 1, the same on all ranks.
        """

        def measured() -> float:
            right = 0
            sizes = [len(part) for part in index.tensor_split(-(-len(index) // batch_size))]
            for which, images in data.batches(index, sizes):
                right += int((self(images).argmax(1) == data.labels[which]).sum())
            return right / len(index)

        self.fixed = architecture
        try:
            return here().first(measured)
        finally:
            self.fixed = None


class Search:
    """A search in progress: the controller and all that a checkpoint must hold beside the shared weights.

    Attributes:
        controller: It.
        generator: Of all draws.
        baseline: Moving average of rewards; None before the first.
        scores: (epoch, architecture, accuracy on a batch held out) of each that was measured.
        rows: One an epoch.
    """

    def __init__(self, controller: Controller, lr: float, seed: int) -> None:
        self.controller = controller
        self.optimizer = torch.optim.Adam(controller.parameters(), lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.baseline: float | None = None
        self.scores: list[tuple[int, str, float]] = []
        self.rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def draw(self) -> Architecture:
        """An architecture from the controller."""
        decision: Decision = self.controller(self.generator)
        return decision.architecture

    def train_controller(
        self,
        shared: SharedNetwork,
        held_out: GroupedData,
        epoch: int,
        *,
        steps: int,
        samples: int,
        batch_size: int,
        entropy_weight: float,
        skip_weight: float,
        decay: float = 0.99,
        progress: ProgressCallback | None = None,
    ) -> dict[str, float]:
        """Train the controller on what the shared weights make of its architectures.

        Args:
            shared: The network.
            held_out: What they are measured on.
            epoch: Of the shared weights, for the record.
            steps: Of Adam.
            samples: Architectures in each.
            batch_size: Images that those are measured on.
            entropy_weight: Of the entropy in the reward.
            skip_weight: Of the KL term.
            decay: Of the moving average.
            progress: Called after every step.

        Returns:
            Means over all samples: ``reward``, ``entropy``, ``skip_rate``.
        """
        totals = {"reward": 0.0, "entropy": 0.0, "skip_rate": 0.0}
        for step in range(1, steps + 1):
            index = torch.randperm(len(held_out), generator=self.generator)[:batch_size]
            decisions: list[Decision] = [self.controller(self.generator) for _ in range(samples)]
            advantages = []
            for each in decisions:
                score = shared.accuracy(each.architecture, held_out, index, batch_size)
                entropy = float(each.entropy.detach())
                reward = score + entropy_weight * entropy
                before = reward if self.baseline is None else self.baseline
                self.baseline = before + (1 - decay) * (reward - before)
                advantages.append(reward - self.baseline)
                self.scores.append((epoch, str(each.architecture), score))
                seen = {"reward": reward, "entropy": entropy, "skip_rate": each.architecture.skip_rate}
                totals = {key: total + seen[key] / (steps * samples) for key, total in totals.items()}
            self.optimizer.zero_grad(set_to_none=True)
            reinforce(decisions, advantages, skip_weight).backward()
            self.optimizer.step()
            if progress is not None:
                progress(Progress("controller", step, steps, f"epoch {epoch}, reward {self.baseline:.3f}"))
        return totals

    def best(
        self, shared: SharedNetwork, held_out: GroupedData, candidates: int, batch_size: int
    ) -> tuple[Architecture, list[tuple[str, float]]]:
        """The best of some draws, measured on all that is held out; the first of equally good ones.

        Args:
            shared: The network.
            held_out: What they are measured on.
            candidates: How many are drawn.
            batch_size: Images at a time.

        Returns:
            It, and the accuracy of each.
        """
        drawn = list(dict.fromkeys(self.draw() for _ in range(candidates)))
        index = torch.arange(len(held_out))
        measured = [shared.accuracy(each, held_out, index, batch_size) for each in drawn]
        best = max(range(len(drawn)), key=lambda position: (measured[position], -position))
        return drawn[best], [(str(each), score) for each, score in zip(drawn, measured, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "baseline": self.baseline,
            "scores": self.scores,
            "rows": self.rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.baseline = state["baseline"]
        self.scores = [(epoch, text, score) for epoch, text, score in state["scores"]]
        self.rows = state["rows"]
