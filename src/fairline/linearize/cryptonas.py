"""CryptoNAS (Ghodsi, Veldanda, Reagen and Garg, NeurIPS 2020): networks made for a ReLU budget.

Not the trained network loses ReLUs; another one, of few ReLUs, is searched for and learns from it:

- **ReLU shuffling and pruning.** Skip paths cost no ReLUs; see :class:`~fairline.models.cnet.CNet`.
- **ReLU balancing.** Channels grow fourfold where the image is halved, so that all layers have equally many ReLUs, and
  the network as many weights as the budget allows.
- **Macro-search.** Which layer reads which skip paths, and its kernel: found once, at few channels, with shared weights
  and a controller trained by REINFORCE; see :mod:`fairline.linearize.macro_search`.
- **Scaling.** Skips cost nothing, so whatever was found fits all budgets: the first stage gets as many channels as the
  budget allows. Each such network is trained from scratch. The ReLUs it has are counted against the budget, that is
  against those of the network given.

Source: the paper's abstract and figures as others describe them, and the code that was published with it
(github.com/zghodsi/CryptoNAS), from which layers, halvings, balancing, the controller and all settings that default to
310 epochs, 12 channels and the like were taken. What they leave open, or what differs here:

- *Budgets* are met to the last ReLU (``exact``): a network one channel wider than fits, of whose ReLUs, drawn at random
  in each layer in proportion, as many are linear as it has too many.
- *Small budgets.* The published networks leave the image whole, which at 32×32 pixels and 6 layers costs 6,144 ReLUs
  a channel. Where fewer than ``narrowest`` channels fit, the stem strides by 2, 4, …, as in DeepReDuce's Reshape.
- *Depth* is a setting: 6 layers published for 86,016 ReLUs, 12 for 344,064, 24 for 1,376,256.
- *The best of ten draws* of the trained controller, measured on all held-out images, is taken; the code prints ten
  after each epoch and leaves the choice to the reader.
- *Learning rates* fall by a cosine over all epochs, without the code's restarts.
- *Gradients* are clipped to a norm of 5, all together; the code means to clip each of them so, and keeps the unclipped.
- *Distillation*: the code trains on labels; here shared weights and final networks learn from the teacher as well, as
  behind all methods.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fairline._io import load_state, load_tensors, save_state, save_tensors
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import logits_of
from fairline.linearize.base import Cut, Linearization, Linearizer, set_aside
from fairline.linearize.macro_search import Architecture, Controller, Search, SharedNetwork
from fairline.linearize.surrogates import fit_surrogates
from fairline.masking import SURROGATES, mask_relus, masked_relus, relu_count
from fairline.models.cnet import CNet, SkipReLUs
from fairline.objectives.erm import ERM
from fairline.training import Epoch, run_epochs

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CryptoNAS(Linearizer):
    """Search for an architecture once, scale it to each budget, train it from scratch.

    Any network may be given: it is the teacher, and its ReLUs are what budgets count against. ``info["configuration"]``
    describes each network, ``info["model"]`` says how to build it, and the history has a row for each epoch of the
    search and for each architecture that was measured.

    Attributes:
        layers: Of the networks; 3 at least.
        kernels: Sides of convolutions to choose from, such as ``(3, 5)`` or ``"3,5"``.
        architecture: Taken instead of a search, as ``info["architecture"]`` writes it: ``"3 / 5 1 / 3 0 1"``.
        balance: Factor of the channels at a halving; 4 balances ReLUs, 2 the work in the clear.
        skip_relus: What became of the ReLUs on skip paths; see :class:`~fairline.models.cnet.CNet`.
        narrowest: Channels for which the stem's stride makes room.
        stem_stride: Of all networks, instead.
        search_epochs: Of the shared weights.
        search_width: Channels of the shared network.
        held_out: Share of the training part that architectures are measured on.
        controller_steps: Of the controller, after each epoch.
        samples: Architectures that each of them sees.
        controller_lr: Of Adam.
        entropy_weight: Of the entropy in the reward, which is an accuracy from 0 to 1.
        skip_target: Share of the skip paths that the controller is drawn to.
        skip_weight: Of that pull.
        candidates: Draws of which the best is taken.
        train_epochs: Of a network found. 0 leaves all training to the finetune that follows.
        lr: At the start, of the shared weights and of the networks.
        exact: Fill each budget.
        batch_size: Samples in a step, and in a measurement.
        surrogate: What stands in the place of the ReLUs that an exact budget makes linear.
        seed: Of the whole run.
    """

    name = "cryptonas"
    # Of another shape than the student, and made again in no time from what was searched and trained.
    keeps_snapshots: ClassVar[bool] = False

    layers: int = 6
    kernels: Sequence[int] | str | int = (3, 5)
    architecture: str | None = None
    balance: int = 4
    skip_relus: SkipReLUs = "none"
    narrowest: int = 4
    stem_stride: int | None = None
    search_epochs: int = 310
    search_width: int = 12
    held_out: float = 0.1
    controller_steps: int = 50
    samples: int = 20
    controller_lr: float = 1e-3
    entropy_weight: float = 1e-4
    skip_target: float = 0.4
    skip_weight: float = 0.8
    candidates: int = 10
    train_epochs: int = 310
    lr: float = 0.05
    exact: bool = True
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.for_cost is not None:
            raise FairlineError(
                "CryptoNAS builds networks of its own, so emptying layers of the network given (for_cost) says "
                "nothing of them."
            )
        self.kernels = _numbers(self.kernels)
        if self.architecture is not None:
            given = Architecture.parse(self.architecture).kernels
            self.layers, _ = len(given), _numbers(tuple(dict.fromkeys(given)))
        counts = {
            **dict.fromkeys(("balance", "narrowest", "search_epochs", "search_width", "controller_steps"), 1),
            **{"layers": 3, "samples": 1, "candidates": 1, "train_epochs": 0, "batch_size": 2},
            **({} if self.stem_stride is None else {"stem_stride": 1}),
        }
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise FairlineError(f"CryptoNAS needs {name} ≥ {least}, not {getattr(self, name)}.")
        if self.skip_relus not in get_args(SkipReLUs):
            raise FairlineError(
                f"CryptoNAS needs skip_relus {', '.join(get_args(SkipReLUs))}, not '{self.skip_relus}'."
            )
        for name in ("held_out", "skip_target"):
            if not 0 < getattr(self, name) < 1:
                raise FairlineError(f"CryptoNAS needs {name} between 0 and 1, not {getattr(self, name)}.")
        if not self.lr > 0 or not self.controller_lr > 0:
            raise FairlineError(
                f"CryptoNAS needs lr > 0 and controller_lr > 0, not {self.lr} and {self.controller_lr}."
            )

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Search, then scale and train a network for each budget.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget; ``info["model"]`` says how to build it.
        """
        found = self._architecture(run)
        for budget in run.budgets:
            options = self._scaled(run, found, budget)
            student = mask_relus(self._built(run, options), run.train.normalized(slice(2)), self.surrogate)
            student = student.to(run.device)
            self._meet(student, budget)
            if SURROGATES[self.surrogate].learned:
                fit_surrogates(student, run.train, seed=self.seed)
            configuration = (
                f"{self.layers} layers, {options['width']} channels, stem of stride {options['stem_stride']}"
            )
            if self.train_epochs:
                self._train(student, budget, configuration, run)
            model = {"name": "cnet", "num_classes": student.get_submodule("linear").out_features, "options": options}
            yield Cut(budget, student, {"configuration": configuration, "architecture": str(found), "model": model})

    def _architecture(self, run: Linearization) -> Architecture:
        """As given, or as found now or by an interrupted run."""
        if self.architecture is not None:
            return Architecture.parse(self.architecture)
        file = run.file("architecture")
        if file is not None and file.exists():
            kept = load_state(file)
            run.rows = kept["rows"]
            return Architecture.parse(kept["architecture"])
        found = self._searched(run)
        logger.info("%s: architecture %s", self.name, found)
        if file is not None:
            save_state(file, {"architecture": str(found), "rows": run.rows})
        return found

    def _searched(self, run: Linearization) -> Architecture:
        """Train shared weights and controller in turn; ``run.rows`` tells how it went."""
        measuring, training = set_aside(run.train, self.held_out, self.seed)
        assert not isinstance(self.kernels, str | int)
        controller = Controller(self.layers, self.kernels, self.skip_target, seed=self.seed)
        search = Search(controller, self.controller_lr, self.seed)
        shared = self._shared(run, search).to(run.device)
        common: dict[str, Any] = {"epochs": self.search_epochs, "weight_decay": 5e-4, "stateful": {"search": search}}
        # It decides anew at each batch what it computes.
        common |= {"stage": "searching", "checkpoint": run.file("search"), "cuda_graphs": False}
        for epoch in self._epochs(shared, training, run, **common):
            seen = search.train_controller(
                shared,
                measuring,
                epoch.epoch,
                steps=self.controller_steps,
                samples=self.samples,
                batch_size=self.batch_size,
                entropy_weight=self.entropy_weight,
                skip_weight=self.skip_weight,
                progress=run.progress,
            )
            search.rows.append({**epoch.row(), **seen})
        found, measured = search.best(shared, measuring, self.candidates, self.batch_size)
        sampled: list[dict[str, Any]] = [
            {"epoch": at, "architecture": text, "score": score} for at, text, score in search.scores
        ]
        candidates: list[dict[str, Any]] = [
            {"architecture": text, "held_out_accuracy": score} for text, score in measured
        ]
        run.rows = [*search.rows, *sampled, *candidates]
        return found

    def _shared(self, run: Linearization, search: Search) -> SharedNetwork:
        """The shared network, untrained, at the resolution of the largest budget's."""
        _, channels, *sides = run.train.images.shape
        assert not isinstance(self.kernels, str | int)
        stride = self._stride(run, Architecture((3,) * self.layers, (False,) * _skips(self.layers)), run.budgets[0])
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return SharedNetwork(
                search.draw,
                _outputs(run),
                channels,
                (sides[0], sides[1]),
                self.layers,
                self.kernels,
                self.search_width,
                stride,
            )

    def _scaled(self, run: Linearization, found: Architecture, budget: int) -> dict[str, Any]:
        """Options of the network for a budget: one channel wider than fits, where the rest is to be made linear."""
        stride = self._stride(run, found, budget)
        each = self._relus_of_a_channel(run, found, stride)
        width = -(-budget // each) if self.exact else budget // each
        if not width and not self.exact:
            logger.warning(
                "%s: a network of %d layers and one channel has more than %d ReLUs; those above are made linear.",
                self.name,
                self.layers,
                budget,
            )
        return {
            "width": max(1, width),
            "layers": self.layers,
            "skips": list(found.skips),
            "kernels": list(found.kernels),
            "balance": self.balance,
            "skip_relus": self.skip_relus,
            "stem_stride": stride,
        }

    def _stride(self, run: Linearization, found: Architecture, budget: int) -> int:
        """The least stride of the stem, a power of 2, for which enough channels fit; the last stage keeps a pixel."""
        if self.stem_stride is not None:
            return self.stem_stride
        stride, side = 1, min(run.train.images.shape[2:])
        while side >= 8 * stride and budget < self.narrowest * self._relus_of_a_channel(run, found, stride):
            stride *= 2
        return stride

    def _relus_of_a_channel(self, run: Linearization, found: Architecture, stride: int) -> int:
        """ReLUs for each channel of the first stage."""
        options = {"width": 1, "layers": self.layers, "skips": found.skips, "kernels": 1, "stem_stride": stride}
        more = {"balance": self.balance, "skip_relus": self.skip_relus}
        network, counts = self._built(run, {**options, **more}).eval(), []
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda _, __, output: counts.append(output[0].numel()))
        with torch.no_grad():
            network(run.train.normalized(slice(1)).cpu())
        return sum(counts)

    def _built(self, run: Linearization, options: dict[str, Any]) -> CNet:
        """An untrained network."""
        _, channels, height, width = run.train.images.shape
        size = height if height == width else (height, width)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return CNet(_outputs(run), channels, size, **options)

    def _meet(self, student: nn.Module, budget: int) -> None:
        """Make linear what a network has too much, in each layer in proportion, drawn at random."""
        generator = torch.Generator().manual_seed(self.seed)
        total = relu_count(student)
        surplus = max(0, total - budget)
        passed = 0
        for layer in masked_relus(student).values():
            size = layer.kept.numel()
            cut = surplus * (passed + size) // total - surplus * passed // total
            mask = torch.ones(size, dtype=torch.bool)
            mask[torch.randperm(size, generator=generator)[:cut]] = False
            layer.set_mask(mask.view(layer.shape))
            passed += size

    def _train(self, student: nn.Module, budget: int, configuration: str, run: Linearization) -> None:
        """Train a network from scratch under distillation, its masks fixed."""
        file = run.file(f"network-{budget}-trained")
        if file is not None and file.exists():
            student.load_state_dict(load_tensors(file)[0])
            return
        about: dict[str, Any] = {"stage": f"training {configuration}", "checkpoint": run.file(f"network-{budget}")}
        for _ in self._epochs(student, run.train, run, epochs=self.train_epochs, weight_decay=4e-4, **about):
            pass
        if file is not None:
            save_tensors(file, student.state_dict())

    def _epochs(
        self,
        network: nn.Module,
        train: GroupedData,
        run: Linearization,
        *,
        epochs: int,
        weight_decay: float,
        **more: Any,
    ) -> Iterator[Epoch]:
        """Train shared weights, or a network, under distillation, with the published optimizer."""
        optimizer = SGD(network.parameters(), lr=self.lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
        optimizer.register_step_pre_hook(_clip)
        return run_epochs(
            network,
            train,
            epochs=epochs,
            optimizer=optimizer,
            objective=ERM(),
            scheduler=CosineAnnealingLR(optimizer, epochs),
            teacher=run.teacher,
            batch_size=self.batch_size,
            seed=self.seed,
            device=run.device,
            precision=run.arithmetic,
            progress=run.progress,
            **more,
        )


def _clip(optimizer: Optimizer, *_: Any) -> None:
    """Before a step."""
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 5.0)


def _outputs(run: Linearization) -> int:
    """Outputs of the network given."""
    images = run.train.normalized(slice(2)).to(run.device)
    with torch.no_grad():
        return logits_of(run.teacher(images), run.teacher, images).shape[1]


def _skips(layers: int) -> int:
    return layers * (layers - 1) // 2


def _numbers(kernels: Sequence[int] | str | int) -> tuple[int, ...]:
    """Kernels from a sequence, a number or comma-separated text."""
    try:
        words = kernels.replace(",", " ").split() if isinstance(kernels, str) else kernels
        found = (int(words),) if isinstance(words, int) else tuple(int(each) for each in words)
    except (TypeError, ValueError):
        found = ()
    if not found or len(set(found)) < len(found) or not all(each > 0 and each % 2 for each in found):
        raise FairlineError(f"CryptoNAS needs kernels that are odd, each once, such as 3,5, not {kernels}.")
    return found
