"""SENet: sensitivity-driven linearization in three stages (Kundu, Lu, Zhang, Liu and Beerel, ICLR 2023).

1. **How many.** A layer whose weights survive pruning has little need of its ReLUs: with the share ηₗ of its weights
   that remain when the network is pruned to a low density, its sensitivity is 1 − ηₗ, and the budget is divided among
   the layers in proportion, capped at each layer's size.
2. **Which.** While a student with these budgets learns from the teacher, each layer keeps the ReLUs at which the two
   networks' activations differ most in the mean.
3. **How well.** The student is trained on ``CE + T²·KL + β/2·Σₗ ‖ψₗ/‖ψₗ‖ − ψ′ₗ/‖ψ′ₗ‖‖``, ψ and ψ′ being the
   activations of student and teacher.

No implementation was published. What the description leaves open, and what is done here:

- *How to prune*: magnitude pruning over all layers at once, in equal steps of log density, an epoch of training after
  each; pruned weights do not grow back.
- *Whose weights a layer answers for*: those of every convolution or linear map from which its input can be reached
  without passing another ReLU, such as both branches of a residual block; a layer without any takes the mean density.
- *In proportion to what*: to the sensitivity alone, or to sensitivity times size (``weigh="size"``). The former is the
  default: it is what the description says.
- *Which activation of the student is compared*: that of the unit without its ReLU, kept or not. Read to the letter
  (``literal=True``) it is the unit's activation as it is; then a kept ReLU agrees with the teacher, scores low and is
  dropped in the next epoch, so that masks alternate between two sets and ``tolerance`` never ends the search.
- *Where masks start*: at random positions. *When they end*: after ``mask_epochs``, or when less than ``tolerance`` of
  the entries changed. *Over which images the mean is*: ``samples`` training images, after each epoch.
- *How large β is*: 0.1, with which the gap weighs about as much as the two other terms; the scale of a β depends on
  which mean is taken over units, which is not said.
- *Channels*: a channel's difference is the mean of its units'; a layer keeps as many channels as fit into its budget,
  and what is left over goes to the channels that differ most anywhere, so that as much of the budget is spent as whole
  channels can (:func:`~fairline.masking.budget.fullest`).
- *A network that is linearized already*: sensitivities are those of the network as it is, and only the ReLUs that it
  has left are divided among and within the layers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from fairline._io import load_state, save_state
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.linearize.activations import each_activation
from fairline.linearize.base import Cut, Linearization, Linearizer
from fairline.linearize.division import divided
from fairline.masking import Granularity, MaskedReLU, copy_model, mask_relus, masked_graph, masked_relus
from fairline.masking.budget import fullest
from fairline.objectives.base import Objective
from fairline.objectives.erm import ERM
from fairline.precision import Arithmetic, Precision
from fairline.training import Epoch, History, ProgressCallback, run_epochs

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SENet(Linearizer):
    """Budgets by sensitivity, positions by disagreement with the teacher, then training towards its activations.

    Stage 1 is shared by all budgets; stages 2 and 3 are run for each, from the teacher's weights.

    Attributes:
        density: Share of the weights that the network is pruned to for the sensitivities; the published proxy density.
        sensitivity_epochs: Pruning steps, and epochs after them.
        weigh: Budgets in proportion to ``"sensitivity"``, or to sensitivity times ``"size"`` of the layer.
        mask_epochs: Of the search for positions, at most.
        tolerance: The search ends when less than this share of mask entries changed.
        samples: Training images that activations are compared on, at most.
        epochs: Of the last stage; 0 leaves all training to the finetune that follows.
        beta: β, weight of the activation gap.
        lr: Of SGD with momentum 0.9 and weight decay 5e-4 in all stages; cosine in the last.
        temperature: T of the distillation.
        batch_size: Samples in a step.
        granularity: ``"pixel"`` or ``"channel"``.
        literal: Compare activations as they are, by which the search never settles; see above.
        objective: What is minimised beside the activation gap; ERM at ``temperature`` by default.
        surrogate: What stands in a ReLU's place: ``"identity"``, as published, or another.
        seed: Of the whole run.
    """

    name = "senet"

    density: float = 0.1
    sensitivity_epochs: int = 10
    weigh: str = "sensitivity"
    mask_epochs: int = 20
    tolerance: float = 0.01
    samples: int = 2000
    epochs: int = 20
    beta: float = 0.1
    lr: float = 0.01
    temperature: float = 4.0
    batch_size: int = 256
    granularity: Granularity = "pixel"
    literal: bool = False
    objective: Objective | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("pixel", "channel"):
            raise FairlineError(f"SENet's granularity is pixel or channel, not '{self.granularity}'.")
        if self.weigh not in ("sensitivity", "size"):
            raise FairlineError(f"SENet divides a budget by sensitivity or size, not '{self.weigh}'.")
        if not 0 < self.density < 1 or not 0 <= self.tolerance < 1:
            raise FairlineError(
                f"SENet needs density between 0 and 1 and tolerance in [0, 1), not {self.density} and {self.tolerance}."
            )
        for name in ("sensitivity_epochs", "mask_epochs", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise FairlineError(f"SENet needs {name} ≥ 1, not {getattr(self, name)}.")
        if self.epochs < 0 or not self.beta >= 0 or not self.lr > 0 or not self.temperature > 0:
            raise FairlineError(
                f"SENet needs epochs ≥ 0, beta ≥ 0, lr > 0 and temperature > 0, "
                f"not {self.epochs}, {self.beta}, {self.lr} and {self.temperature}."
            )

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """All three stages for each budget; the first is done once.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget; ``info["layers"]`` says how many ReLUs each layer was given.

        Raises:
            FairlineError: ``torch.fx`` cannot trace the model, so that the weights before each ReLU are not known, or
                the teacher has other ReLUs, so that activations cannot be compared.
        """
        sources = weights_before(run.student)
        training = _Runs(self, run.teacher, run.train, run.device, run.progress, precision=run.arithmetic)
        own, theirs = (
            {name: tuple(layer.shape) for name, layer in masked_relus(network).items()}
            for network in (run.student, training.masked_teacher())
        )
        if own != theirs:
            raise FairlineError("SENet compares activations with its teacher's, which must have the same ReLUs.")
        training.history.rows = run.rows
        densities = self.densities(run.student, sources, training, run.folder)
        sizes = {name: layer.num_kept for name, layer in masked_relus(run.student).items()}
        for budget in run.budgets:
            student = copy_model(run.student)
            shares = layer_budgets(densities, sizes, budget, self.weigh)
            self.search(student, shares, budget, training, run.folder)
            if self.epochs:
                self.train(student, budget, training, run.folder)
            run.rows = training.history.rows
            yield Cut(budget, student, {"layers": shares})

    def densities(
        self, model: nn.Module, sources: Mapping[str, Sequence[str]], run: _Runs, folder: Path | None
    ) -> dict[str, float]:
        """Stage 1: share of the weights before each ReLU layer that survive pruning.

        Args:
            model: Masked, all ReLUs kept; not changed.
            sources: From :func:`weights_before`.
            run: What a training run needs.
            folder: Of checkpoints.

        Returns:
            A share for each masked layer; the mean of the others for a layer without weights before it.
        """
        file = None if folder is None else folder / "densities.safetensors"
        if file is not None and file.exists():
            return dict(load_state(file)["densities"])
        pruned = copy_model(model)
        names = sorted({name for own in sources.values() for name in own})
        weights = [(pruned.get_submodule(name), "weight") for name in names]
        for module, parameter in weights:
            prune.identity(module, parameter)
        # Each step prunes this share of what is left.
        amount = 1 - self.density ** (1 / self.sensitivity_epochs)

        prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
        for epoch in run.epochs(pruned, self.sensitivity_epochs, "SENet sensitivities", None):
            if epoch.epoch < self.sensitivity_epochs:
                prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
        kept = {name: cast(Tensor, module.weight_mask) for name, (module, _) in zip(names, weights, strict=True)}
        found = {
            layer: sum(float(kept[name].sum()) for name in own) / sum(kept[name].numel() for name in own)
            for layer, own in sources.items()
            if own
        }
        mean = sum(found.values()) / len(found)
        densities = {layer: found.get(layer, mean) for layer in sources}
        logger.info("densities after pruning to %.3g: %s", self.density, densities)
        if file is not None:
            save_state(file, {"densities": densities})
        return densities

    def search(
        self, student: nn.Module, shares: Mapping[str, int], budget: int, run: _Runs, folder: Path | None
    ) -> None:
        """Stage 2: learn where each layer keeps its ReLUs.

        Args:
            student: Masked; its masks and weights are changed.
            shares: ReLUs of each layer.
            budget: Their sum.
            run: What a training run needs.
            folder: Of checkpoints.
        """
        layers = masked_relus(student)
        teacher = run.masked_teacher()
        allowed = {name: layer.kept.clone() for name, layer in layers.items()}
        generator = torch.Generator().manual_seed(self.seed)
        scores = {name: torch.rand(layer.shape, generator=generator) for name, layer in layers.items()}
        self._keep(layers, scores, shares, budget, allowed)
        file = None if folder is None else folder / f"search-{budget}.safetensors"
        stage = f"SENet positions ({budget:,} ReLUs)"
        run.objective = run.new_objective()
        for epoch in run.epochs(student, self.mask_epochs, stage, file, objective=run.objective):
            before = {name: layer.kept.clone() for name, layer in layers.items()}
            scores = differences(
                student, teacher, run.data, samples=self.samples, seed=self.seed, as_linear=not self.literal
            )
            self._keep(layers, scores, shares, budget, allowed)
            changed = sum(int((before[name] != layer.kept).sum()) for name, layer in layers.items())
            share = changed / sum(layer.kept.numel() for layer in layers.values())
            run.history.rows.append({**epoch.row(), "budget": budget, "changed": share})
            if share < self.tolerance:
                return

    def train(self, student: nn.Module, budget: int, run: _Runs, folder: Path | None) -> None:
        """Stage 3: train towards the teacher's logits and activations.

        Args:
            student: Masked, masks fixed; its weights are changed.
            budget: Names the checkpoint.
            run: What a training run needs.
            folder: Of checkpoints.
        """
        file = None if folder is None else folder / f"train-{budget}.safetensors"
        with ActivationGap(student, run.masked_teacher()) as gap:
            stage = f"SENet training ({budget:,} ReLUs)"

            def penalty() -> Tensor:
                return self.beta / 2 * gap()

            charged = penalty if self.beta else None
            goes_on = None if run.objective is None else cast(Objective, _Started(run.objective))
            for epoch in run.epochs(student, self.epochs, stage, file, cosine=True, penalty=charged, objective=goes_on):
                run.history.rows.append({**epoch.row(), "budget": budget})

    def _keep(
        self,
        layers: Mapping[str, MaskedReLU],
        scores: Mapping[str, Tensor],
        shares: Mapping[str, int],
        budget: int,
        allowed: Mapping[str, Tensor],
    ) -> None:
        """Keep the units, or channels, with the largest scores; none but allowed ones."""
        channels = self.granularity == "channel"
        values, sizes, first = [], [], []
        for name in layers:
            use, score = allowed[name].cpu(), scores[name].cpu()
            if channels:
                own = use.view(len(use), -1).sum(1)
                value = (score * use).view(len(use), -1).sum(1) / own.clamp_min(1)
            else:
                own, value = use.flatten().long(), score.flatten()
            order = torch.sort(value, descending=True, stable=True).indices
            order = order[own[order] > 0]
            in_share = torch.zeros(len(own), dtype=torch.bool)
            in_share[order[fullest(own[order].tolist(), shares[name])]] = True
            values.append(value)
            sizes.append(own)
            first.append(in_share)
        # What the layers' shares leave goes to whatever scores highest anywhere.
        order = torch.sort(torch.cat(values), descending=True, stable=True).indices
        order = order[torch.sort(torch.cat(first)[order].long(), descending=True, stable=True).indices]
        order = order[torch.cat(sizes)[order] > 0]
        chosen = torch.zeros(sum(map(len, sizes)), dtype=torch.bool)
        chosen[order[fullest(torch.cat(sizes)[order].tolist(), budget)]] = True
        for (name, layer), own in zip(layers.items(), chosen.split([len(each) for each in sizes]), strict=True):
            shape = (layer.shape[0], *[1] * (len(layer.shape) - 1)) if channels else layer.shape
            layer.set_mask(own.view(shape).to(layer.kept.device) & allowed[name])


@dataclass
class _Runs:
    """What the stages' training runs share.

    Attributes:
        objective: Of the budget that is worked on; what it has learned in stage 2 it keeps in stage 3.
    """

    method: SENet
    teacher: nn.Module
    data: GroupedData
    device: torch.device
    progress: ProgressCallback | None
    history: History = field(default_factory=History)
    precision: Precision | Arithmetic | None = None
    objective: Objective | None = None

    def new_objective(self) -> Objective:
        return copy.deepcopy(self.method.objective) or ERM(self.method.temperature)

    def masked_teacher(self) -> nn.Module:
        """The teacher with masks, as it is: its activations can be watched."""
        return mask_relus(self.teacher, self.data.normalized(slice(2))).to(self.device)

    def epochs(
        self,
        model: nn.Module,
        count: int,
        stage: str,
        file: Path | None,
        *,
        cosine: bool = False,
        penalty: Callable[[], Tensor] | None = None,
        objective: Objective | None = None,
    ) -> Iterator[Epoch]:
        optimizer = SGD(model.parameters(), lr=self.method.lr, momentum=0.9, weight_decay=5e-4)
        return run_epochs(
            model,
            self.data,
            epochs=count,
            optimizer=optimizer,
            scheduler=CosineAnnealingLR(optimizer, count) if cosine else None,
            objective=objective or self.new_objective(),
            teacher=self.teacher,
            batch_size=self.method.batch_size,
            penalty=penalty,
            seed=self.method.seed,
            device=self.device,
            precision=self.precision,
            stage=stage,
            progress=self.progress,
            checkpoint=file,
            stateful={"history": self.history},
        )


class _Started:
    """An objective that a training loop must not start anew."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def start(self, train_data: GroupedData) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)


def weights_before(model: nn.Module) -> dict[str, list[str]]:
    """For each masked ReLU, the modules with weights that its input reaches without passing another ReLU.

    BatchNorm has no matrix of weights, and is passed.

    Args:
        model: From :func:`~fairline.masking.mask_relus`.

    Returns:
        Names of modules, for each masked layer.

    Raises:
        FairlineError: The model could not be traced, or no ReLU has any weights before it.
    """
    traced = masked_graph(model)
    if traced is None:
        raise FairlineError(
            f"SENet cannot act on {type(model).__name__}: torch.fx cannot trace it, so which weights stand before a "
            "ReLU is not known."
        )
    nodes = {node.target: node for node in traced.graph.nodes if node.op == "call_module"}
    found = {}
    for name in masked_relus(model):
        own: list[str] = []
        seen: set[fx.Node] = set()
        waiting = list(nodes[name].all_input_nodes)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, MaskedReLU):
                continue
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1:
                own.append(str(node.target))
                continue
            waiting += node.all_input_nodes
        found[name] = sorted(own)
    if not any(found.values()):
        raise FairlineError(f"SENet cannot act on {type(model).__name__}: no ReLU has a layer with weights before it.")
    return found


def layer_budgets(
    densities: Mapping[str, float], sizes: Mapping[str, int], budget: int, weigh: str = "sensitivity"
) -> dict[str, int]:
    """Divide a budget among layers in proportion to 1 − density, no layer getting more than it has.

    What a full layer cannot take is divided among the others again. Fractions go to the largest remainders.

    Args:
        densities: Share of each layer's weights that survived pruning.
        sizes: ReLUs of each layer.
        budget: ReLUs to give, at most the sum of the sizes.
        weigh: ``"sensitivity"``, or ``"size"`` for sensitivity times size.

    Returns:
        ReLUs of each layer; their sum is the budget.

    Examples:
        Of 150 ReLUs each layer takes its share of the sensitivities 0.9, 0.5 and 0.1.

        >>> layer_budgets({"a": 0.1, "b": 0.5, "c": 0.9}, {"a": 100, "b": 100, "c": 100}, budget=150)
        {'a': 90, 'b': 50, 'c': 10}
    """
    # A layer that was not pruned at all still takes what the others cannot hold.
    need = {name: max(1 - densities[name], 1e-9) * (size if weigh == "size" else 1) for name, size in sizes.items()}
    return divided(need, sizes, budget)


def differences(
    student: nn.Module, teacher: nn.Module, data: GroupedData, *, samples: int, seed: int = 0, as_linear: bool = False
) -> dict[str, Tensor]:
    """Mean |student's activation − teacher's| of each unit, after the (masked) ReLU.

    Args:
        student: Masked.
        teacher: The same network, masked, all ReLUs kept.
        data: On their device.
        samples: Images, at most.
        seed: Of their choice.
        as_linear: Take of each unit of the student what it would be without its ReLU, kept or not.

    Returns:
        For each masked layer a tensor of its mask's shape.
    """
    layers, theirs = masked_relus(student), masked_relus(teacher)
    totals = {name: torch.zeros(layer.shape, device=data.device) for name, layer in layers.items()}
    outputs: dict[str, Tensor] = {}
    was_training = teacher.training
    teacher.eval()
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name, layer in theirs.items()
    ]
    current: list[Tensor] = []

    def compare(name: str, x: Tensor, index: Tensor) -> None:
        if not current or current[-1] is not index:
            current[:] = [index]
            teacher(data.normalized(index))
        # forward(), not a call: this is a hook of the layer itself.
        own = layers[name].substitute(x) if as_linear else layers[name].forward(x)
        totals[name] += (own - outputs[name]).abs().sum(0)

    try:
        seen = each_activation(student, data, compare, samples=samples, seed=seed)
    finally:
        for handle in handles:
            handle.remove()
        teacher.train(was_training)
    return {name: total / seen for name, total in totals.items()}


class ActivationGap:
    """``Σₗ ‖ψₗ/‖ψₗ‖ − ψ′ₗ/‖ψ′ₗ‖‖`` of the student's last forward pass, in the mean over its images.

    Used as a context: hooks are there only while it is open.

    Args:
        student: Masked.
        teacher: The same network, masked, all ReLUs kept; run on the student's images, without gradient.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student = student
        self.teacher = teacher.eval()
        self.images: Tensor | None = None
        self.own: dict[str, Tensor] = {}
        self.theirs: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> ActivationGap:
        for network, outputs in ((self.student, self.own), (self.teacher, self.theirs)):
            for name, layer in masked_relus(network).items():
                self.handles.append(
                    layer.register_forward_hook(
                        lambda _, __, output, name=name, outputs=outputs: outputs.update({name: output})
                    )
                )
        self.handles.append(
            self.student.register_forward_pre_hook(lambda _, arguments: setattr(self, "images", arguments[0]))
        )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.own.clear()
        self.theirs.clear()

    def __call__(self) -> Tensor:
        """The gap, scalar; differentiable in the student's weights."""
        assert self.images is not None  # the student has run
        with torch.no_grad():
            self.teacher(self.images)
        gaps = [
            (F.normalize(own.float().flatten(1)) - F.normalize(self.theirs[name].flatten(1))).norm(dim=1).mean()
            for name, own in self.own.items()
        ]
        return torch.stack(gaps).sum()
