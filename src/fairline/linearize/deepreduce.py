"""DeepReDuce (Jha, Ghodsi, Garg and Reagen, ICML 2021): Cull, Thin, Reshape.

- **Cull**: all ReLUs of a stage become linear, the least critical stage first. The criticality of a stage is measured:
  ``(accuracy with its ReLUs alone − the lowest such accuracy of any stage) / ReLUs^0.07``.
- **Thin**: in the stages that are kept, every second ReLU of each block becomes linear too.
- **Reshape**: a new network with α times the channels (``int(α·width)``) and ρ times the resolution (a stem of stride
  ``int(1/ρ)``), culled and thinned the same way.

Together they make a ladder of configurations; :meth:`DeepReDuce.ladder` lists it with its ReLU counts. Every student is
trained from scratch under distillation, reshaped or not.

Where this differs from the description and the published code, or they leave something open:

- *Budgets* are filled up to the last ReLU (``exact``); the ladder meets none exactly.
- *Criticality* is measured after ``criticality_epochs`` of distillation from the trained weights, not after a training
  from scratch of each network with one stage's ReLUs, which would cost as many trainings as there are stages.
- *Which ReLUs a block's second one is*: counted in the order of execution.
- *Where the training happens*: here (``reshape_epochs``), so that a short finetune may follow as behind any method.
  ``reshape_epochs=0`` leaves it to the finetune, as in the published code; then finetune with the preset
  ``deepreduce`` or ``deepreduce_fairness``.
- *A network that is linearized already*, or of which layers were emptied for its cost: a configuration keeps what is
  left of a stage; in a reshaped network the layers of the same names are emptied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from fairline._io import load_state, load_tensors, resolve_device, save_state, save_tensors
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize.base import Cut, Linearization, Linearizer, set_aside
from fairline.linearize.structure import close, execution_order, stages_of
from fairline.linearize.surrogates import fit_surrogates, start_masked
from fairline.masking import SURROGATES, MaskedReLU, copy_model, mask_relus, masked_relus, relu_count
from fairline.models import rescaled
from fairline.objectives.erm import ERM
from fairline.training import TRIAL_IMAGES, ProgressCallback, choose, finetune, named_stage

logger = logging.getLogger(__name__)

#: Distillation settings for :func:`fairline.finetune` and ``fairline finetune --preset``: as SNL
#: does; as the DeepReDuce paper says; as the code does that was published with the fairness paper.
FINETUNE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "snl": {
        "settings": {"epochs": 100, "lr": 1e-3, "batch_size": 128, "weight_decay": 5e-4},
        "objective": {"temperature": 4.0},
    },
    "deepreduce": {
        "settings": {"epochs": 200, "lr": 0.1, "batch_size": 128, "weight_decay": 4e-4},
        "objective": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    },
    "deepreduce_fairness": {
        "settings": {"epochs": 200, "lr": 1e-3, "batch_size": 512, "weight_decay": 5e-4, "nesterov": True},
        "objective": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5},
    },
}


@dataclass(frozen=True)
class Configuration:
    """A rung of the ladder.

    Attributes:
        culled: Names of the stages without ReLUs.
        thinned: Whether every second ReLU of the blocks in the other stages is linear.
        alpha: Factor of the channels.
        rho: Factor of the resolution.
        relus: ReLUs for each sample.
    """

    culled: tuple[str, ...]
    thinned: bool
    alpha: float
    rho: float
    relus: int

    @property
    def same_shape(self) -> bool:
        """Whether it has the network's own channels and resolution."""
        return self.alpha == 1 and self.rho == 1

    @property
    def label(self) -> str:
        """In words: ``"cull layer1, thin, α = 0.5"``."""
        parts = [f"cull {' '.join(self.culled)}" if self.culled else "", "thin" if self.thinned else ""]
        parts += [f"α = {self.alpha:g}" if self.alpha != 1 else "", f"ρ = {self.rho:g}" if self.rho != 1 else ""]
        return ", ".join(filter(None, parts)) or "whole"


@dataclass(kw_only=True)
class DeepReDuce(Linearizer):
    """Walk down the ladder: whole stages, then every second ReLU, then a smaller network.

    For each budget the largest configuration that fits is taken, one that keeps the network's shape if there is one.
    The ladder has few rungs. With ``exact`` (the default, so that methods compare at equal budgets) what the
    configuration leaves of the budget goes to ReLUs that the next larger rung of the same shape would keep, drawn at
    random; without it, as published, a network keeps what its configuration keeps. ``info`` names the configuration.

    Attributes:
        stages: Modules of each stage by the stage's name, or a list (or comma-separated text) of modules that are a
            stage each; by default those named ``layer1``, ``stage2``, …. ReLUs outside of all stages, such as a stem's,
            go with the stage that follows, or the last one.
        order: Stages from the least critical on, if it is known; measured by default.
        criticality_epochs: Epochs of distillation for each stage before its accuracy is measured.
        held_out: Share of the training part that accuracy is measured on.
        power: Exponent of the ReLU count in the criticality.
        alphas: Channel factors to try, such as ``(1, 0.5)``.
        rhos: Resolution factors to try.
        reshape: Builds an untrained network for (α, ρ); :func:`fairline.models.rescaled` by default.
        fresh: Students start untrained and learn everything from the teacher, as published; False starts those of the
            network's own shape from its weights, which a short finetune then suffices for.
        reshape_epochs: Epochs of training of a student that starts untrained, reshaped or not. 0 leaves all training to
            the finetune that follows, as in the published code.
        reshape_lr: Learning rate of that training.
        exact: Fill each budget.
        lr: Of the distillation before criticalities are measured.
        batch_size: Samples in a step.
        surrogate: What stands in a ReLU's place: ``"identity"``, as published, or another.
        seed: Of the whole run.
    """

    name = "deepreduce"
    # Of another shape than the student where reshaped, and made again in no time from what was measured and trained.
    keeps_snapshots: ClassVar[bool] = False

    stages: Mapping[str, Sequence[str]] | Sequence[str] | str | None = None
    order: Sequence[str] | str | None = None
    criticality_epochs: int = 20
    held_out: float = 0.1
    power: float = 0.07
    alphas: Sequence[float] | str | float = (1.0,)
    rhos: Sequence[float] | str | float = (1.0,)
    reshape: Callable[[float, float], nn.Module] | None = None
    fresh: bool = True
    reshape_epochs: int = 200
    reshape_lr: float = 0.1
    exact: bool = True
    lr: float = 0.01
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alphas, self.rhos = _factors("alphas", self.alphas), _factors("rhos", self.rhos)
        if isinstance(self.stages, str):
            self.stages = _words(self.stages)
        if isinstance(self.order, str):
            self.order = _words(self.order)
        if self.criticality_epochs < 1 or self.reshape_epochs < 0 or self.batch_size < 1:
            raise FairlineError(
                f"DeepReDuce needs criticality_epochs ≥ 1, reshape_epochs ≥ 0 and batch_size ≥ 1, not "
                f"{self.criticality_epochs}, {self.reshape_epochs} and {self.batch_size}."
            )
        if not 0 < self.held_out < 1 or not self.lr > 0 or not self.reshape_lr > 0:
            raise FairlineError(
                f"DeepReDuce needs held_out between 0 and 1, lr > 0 and reshape_lr > 0, not {self.held_out}, "
                f"{self.lr} and {self.reshape_lr}."
            )

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Measure how critical stages are, and take the configuration that fits for each budget.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget; ``info["configuration"]`` describes it, and ``info["model_options"]`` says how to
            build it where it was reshaped.

        Raises:
            FairlineError: A stage does not exist, or a network that should start anew or be reshaped cannot.
        """
        order = self._order(run)
        rungs = self._rungs(run.student, run.teacher, order, run.train.normalized(slice(2)), run.emptied)
        for budget in run.budgets:
            rung = next(rung for rung in rungs if rung.relus <= budget)
            student, options = self._start_of(rung, run)
            there = {name: layer.kept for name, layer in masked_relus(student).items()}
            self._switch_off(student, rung)
            if self.exact:
                self._fill(student, rung, rungs, budget, there)
            if self.reshape_epochs and (self.fresh or not rung.same_shape):
                self._train(student, rung, run)
            info: dict[str, Any] = {"configuration": rung.label}
            yield Cut(budget, student, info if rung.same_shape else {**info, "model_options": options})

    def ladder(
        self,
        model: nn.Module,
        train: GroupedData,
        *,
        device: str | torch.device | None = None,
        progress: ProgressCallback | None = None,
    ) -> pd.DataFrame:
        """All configurations, from the one with most ReLUs down.

        Args:
            model: The trained network.
            train: Training part, that criticality is measured on.
            device: The accelerator if there is one, by default.
            progress: Called after every batch.

        Returns:
            One row a configuration: ``configuration`` in words, ``culled``, ``thinned``, ``alpha``, ``rho``, ``relus``
            and ``share`` of the network's ReLUs.
        """
        if self.order is not None:
            order = self._given_order(model, train)
        else:
            table = self.criticality(model, train, device=device, progress=progress)
            order = _least_critical_first(table.reset_index().to_dict("records"))
        rungs = self._rungs(model, model, order, train.normalized(slice(2)))
        table = pd.DataFrame([{"configuration": rung.label, **asdict(rung)} for rung in rungs])
        table = table.sort_values("relus", ascending=False, kind="stable", ignore_index=True)
        return table.assign(share=table["relus"] / table["relus"].max())

    def criticality(
        self,
        model: nn.Module,
        train: GroupedData,
        *,
        teacher: nn.Module | None = None,
        device: str | torch.device | None = None,
        progress: ProgressCallback | None = None,
    ) -> pd.DataFrame:
        """Measure how critical each stage is (Jha et al. 2021).

        Each stage in turn keeps its ReLUs alone, is distilled from the whole network, and is measured on images held
        out from the training part.

        Args:
            model: The trained network.
            train: Training part.
            teacher: Source of distillation; the network by default.
            device: The accelerator if there is one, by default.
            progress: Called after every batch.

        Returns:
            Indexed by stage, in the order of the network: ``relus``, ``accuracy`` and ``criticality``.
        """
        where = resolve_device(device)
        measuring, training = set_aside(train, self.held_out, self.seed)
        start = start_masked(model, training, self.surrogate, where, seed=self.seed)
        stages = stages_of(start, self.stages)
        teacher = copy_model(teacher or model)
        arithmetic = choose(self.precision, start, training.normalized(slice(TRIAL_IMAGES)), where)
        rows = []
        for name, own in stages.items():
            student = copy_model(start)
            close(student, set(masked_relus(student)) - set(own))
            finetune(
                student,
                teacher,
                training,
                epochs=self.criticality_epochs,
                lr=self.lr,
                batch_size=self.batch_size,
                seed=self.seed,
                device=where,
                precision=arithmetic,
                progress=named_stage(progress, f"criticality of {name}"),
            )
            right = predict(student, measuring, device=where).argmax(1).cpu() == measuring.labels.cpu()
            rows.append({"stage": name, "relus": relu_count(student), "accuracy": float(right.double().mean())})
        table = pd.DataFrame(rows).set_index("stage")
        gained = table["accuracy"] - table["accuracy"].min()
        # A stage that has been linearized before has nothing to gain.
        return table.assign(criticality=gained / table["relus"].clip(lower=1) ** self.power)

    def _order(self, run: Linearization) -> list[str]:
        """Stages from the least critical on, as given, or as measured now or by an interrupted run."""
        if self.order is not None:
            return self._given_order(run.teacher, run.train)
        file = run.file("criticality")
        if file is not None and file.exists():
            run.rows = load_state(file)["rows"]
        else:
            settled = replace(self, precision=run.arithmetic)
            watched: dict[str, Any] = {"device": run.device, "progress": run.progress}
            table = settled.criticality(run.student, run.train, teacher=run.teacher, **watched)
            run.rows = table.reset_index().to_dict("records")
            if file is not None:
                save_state(file, {"rows": run.rows})
        return _least_critical_first(run.rows)

    def _given_order(self, model: nn.Module, train: GroupedData) -> list[str]:
        assert self.order is not None
        names = list(stages_of(mask_relus(model, train.normalized(slice(2))), self.stages))
        if sorted(self.order) != sorted(names):
            raise FairlineError(
                f"The order of stages names {', '.join(self.order)}; the network's stages are {', '.join(names)}."
            )
        return list(self.order)

    def _rungs(
        self,
        student: nn.Module,
        model: nn.Module,
        order: Sequence[str],
        example: Tensor,
        emptied: Sequence[str] = (),
    ) -> list[Configuration]:
        """All configurations: those of the network's own shape first, then from the largest count to the smallest."""
        found = []
        assert not isinstance(self.alphas, str | float)
        assert not isinstance(self.rhos, str | float)
        for alpha in self.alphas:
            for rho in self.rhos:
                network = student if alpha == rho == 1 else self._reshaped(model, alpha, rho)[0]
                masked = mask_relus(network, example)
                close(masked, emptied)
                for count in range(len(order) + 1):
                    for thinned in (False, True) if count < len(order) else (False,):
                        rung = Configuration(tuple(order[:count]), thinned, alpha, rho, 0)
                        kept = self._kept(masked, rung)
                        relus = sum(layer.num_kept for name, layer in masked_relus(masked).items() if name in kept)
                        found.append(Configuration(rung.culled, thinned, alpha, rho, relus))
        # Reshaping costs a training from scratch, so it is for what culling and thinning cannot reach with ReLUs left.
        return sorted(found, key=lambda r: (r.relus == 0, not r.same_shape, -r.relus, r.thinned))

    def _kept(self, masked: nn.Module, rung: Configuration) -> set[str]:
        """Layers whose ReLUs a configuration keeps."""
        kept: set[str] = set()
        for name, own in stages_of(masked, self.stages).items():
            if name in rung.culled:
                continue
            seen: dict[str, int] = {}
            for layer in own:
                block = layer.rpartition(".")[0]
                seen[block] = seen.get(block, 0) + 1
                if not rung.thinned or seen[block] % 2 == 1:
                    kept.add(layer)
        return kept

    def _switch_off(self, masked: nn.Module, rung: Configuration) -> None:
        close(masked, set(masked_relus(masked)) - self._kept(masked, rung))

    def _fill(
        self,
        student: nn.Module,
        rung: Configuration,
        rungs: Sequence[Configuration],
        budget: int,
        there: Mapping[str, Tensor],
    ) -> None:
        """Give what is left of the budget to ReLUs that the next larger configurations of the same shape have."""
        generator = torch.Generator().manual_seed(self.seed)
        layers = masked_relus(student)
        same = [other for other in rungs if (other.alpha, other.rho) == (rung.alpha, rung.rho)]
        for larger in sorted((r for r in same if r.relus > rung.relus), key=lambda r: r.relus):
            left = budget - relu_count(student)
            if left <= 0:
                return
            more = [name for name in execution_order(student) if name in self._kept(student, larger)]
            more = [name for name in more if layers[name].num_kept == 0]
            closed = torch.cat([there[name].flatten().cpu() for name in more]).nonzero().flatten()
            chosen = torch.zeros(sum(there[name].numel() for name in more), dtype=torch.bool)
            chosen[closed[torch.randperm(len(closed), generator=generator)[:left]]] = True
            for name, own in zip(more, chosen.split([there[name].numel() for name in more]), strict=True):
                layers[name].set_mask(own.view(layers[name].shape))

    def _start_of(self, rung: Configuration, run: Linearization) -> tuple[nn.Module, dict[str, int]]:
        """A student of a configuration's shape before anything is culled, and the options that shape it."""
        if rung.same_shape and not self.fresh:
            return copy_model(run.student), {}
        options: dict[str, int] = {}
        if rung.same_shape:
            student = untrained(run.student, run.teacher, self.seed)
        else:
            network, options = self._reshaped(run.teacher, rung.alpha, rung.rho)
            student = mask_relus(network, run.train.normalized(slice(2)), self.surrogate).to(run.device)
            close(student, run.emptied)
        if SURROGATES[self.surrogate].learned:
            fit_surrogates(student, run.train, seed=self.seed)
        return student, options

    def _reshaped(self, model: nn.Module, alpha: float, rho: float) -> tuple[nn.Module, dict[str, int]]:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return rescaled(model, alpha, rho) if self.reshape is None else (self.reshape(alpha, rho), {})

    def _train(self, student: nn.Module, rung: Configuration, run: Linearization) -> None:
        """Train a student from scratch under distillation, its ReLUs culled and thinned from the start."""
        shape = f"{len(rung.culled)}-{rung.thinned:d}-{rung.alpha:g}-{rung.rho:g}-{relu_count(student)}"
        file = run.file(f"reshaped-{shape}-trained")
        if file is not None and file.exists():
            student.load_state_dict(load_tensors(file)[0])
            return
        finetune(
            student,
            run.teacher,
            run.train,
            epochs=self.reshape_epochs,
            lr=self.reshape_lr,
            batch_size=self.batch_size,
            objective=ERM(),
            seed=self.seed,
            device=run.device,
            precision=run.arithmetic,
            progress=named_stage(run.progress, f"training {rung.label}"),
            checkpoint=run.file(f"reshaped-{shape}"),
        )
        if file is not None:
            save_tensors(file, student.state_dict())


def untrained(student: nn.Module, model: nn.Module, seed: int) -> nn.Module:
    """A copy of a masked network with weights as before any training.

    Args:
        student: Masked; its masks stay.
        model: The network without masks, which may say how it was built, as this package's do.
        seed: Of the weights.

    Returns:
        The copy, on the student's device.

    Raises:
        FairlineError: A module draws its weights in no known way.
    """
    fresh = copy_model(student).cpu()
    arguments = getattr(model, "arguments", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(arguments, dict) and "width" in arguments:
            fresh.load_state_dict(type(model)(**arguments).state_dict(), strict=False)
        else:
            for name, module in fresh.named_modules():
                if isinstance(module, MaskedReLU) or not any(True for _ in module.parameters(recurse=False)):
                    continue
                draw = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
                if draw is None:
                    kind = type(module).__name__ if name else type(model).__name__
                    raise FairlineError(
                        f"DeepReDuce cannot train {type(model).__name__} from scratch: its module '{name}' "
                        f"({kind}) has no reset_parameters(); start from the trained weights, with "
                        "fresh=False."
                    )
                draw()
    return fresh.to(next(iter(masked_relus(student).values())).kept.device)


def _least_critical_first(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of stages; equally critical ones go by size, the one with most ReLUs first."""
    return [str(row["stage"]) for row in sorted(rows, key=lambda row: (row["criticality"], -row["relus"]))]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _factors(name: str, value: Sequence[float] | str | float) -> tuple[float, ...]:
    """Factors from a sequence, a number or comma-separated text."""
    try:
        if isinstance(value, str):
            found = tuple(float(word) for word in _words(value))
        else:
            found = (float(value),) if isinstance(value, int | float) else tuple(float(each) for each in value)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 < each <= 1 for each in found):
        raise FairlineError(f"DeepReDuce needs {name} in (0, 1], such as 1,0.5, not {value}.")
    return found
