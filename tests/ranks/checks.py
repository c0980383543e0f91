"""What one process does and two do, to be compared; a module of its own, since processes import it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fairline as fl
from fairline import objectives
from fairline.objectives.base import Batch, Objective
from fairline.objectives.erm import ERM
from fairline.ranks import here
from fairline.training import ProgressCallback

#: Odd, so that parts differ in size, and the last batch of 16 has fewer images than there could be ranks.
IMAGES, BATCH = 61, 16
MEASURES = [
    "accuracy",
    "gradient_norm",
    "curvature",
    "margin",
    "boundary_distance",
    "first_order_distance",
    "parameter_distance",
    "excess_loss_bound",
]


class Net(nn.Module):
    """Two convolutions, normalised over the batch, in float64."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        )
        self.head = nn.Linear(6 * 16, outputs)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images.double()).flatten(1))


class Own(Objective):
    """A user's: of the whole batch, with a random number, a state, a look at the images, and a term of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen = torch.zeros((), dtype=torch.float64)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        self.seen = self.seen + batch.images.double().mean()
        decay = sum(parameter.square().sum() for parameter in self.model.parameters())
        return losses.topk(max(1, len(losses) // 2)).values.mean() * (1 + torch.rand(())) + 1e-3 * decay

    def metrics(self) -> dict[str, float]:
        return {"seen": float(self.seen)}


class Noisy(nn.Module):
    """Keeps what it has drawn for its images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)
        self.drawn: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(torch.rand(len(images)))
        return self.head(images.flatten(1))


def make_data(classes: int = 3) -> fl.GroupedData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (IMAGES,), generator=generator)
    groups = torch.randint(0, 3, (IMAGES,), generator=generator)
    noise = torch.randint(0, 100, (IMAGES, 1, 8, 8), generator=generator)
    images = (labels[:, None, None, None] * 50 + noise).to(torch.uint8)
    return fl.GroupedData(images, labels, groups, tuple("abc"[:classes]), ("p", "q", "r"), name="checks")


def make_net(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        # Only the first rank's weights count.
        torch.manual_seed(here().rank)
        return Net(outputs)


def trained(data: fl.GroupedData, **settings: Any) -> tuple[nn.Module, list[dict[str, float]]]:
    model = make_net()
    given: dict[str, Any] = {"epochs": 2, "batch_size": BATCH, "lr": 0.02, **settings}
    return model, fl.train(model, data, data, **given)


def finetunes(teacher: nn.Module, data: fl.GroupedData) -> dict[str, Any]:
    """Under every objective, and one of a user's."""
    found = {}
    for name in [*objectives.REGISTRY, "own"]:
        student = fl.mask_relus(teacher, data.normalized(slice(2)))
        objective = Own(student) if name == "own" else objectives.build(name)
        rows: list[dict[str, float]] = []
        settings: dict[str, Any] = {"epochs": 2, "batch_size": BATCH, "lr": 0.01, "select": "last"}
        fl.finetune(student, teacher, data, data, objective=objective, history=rows, **settings)
        found[name] = rows, student.state_dict(), objective.state_dict()
    return found


def linearized(teacher: nn.Module, data: fl.GroupedData) -> dict[str, Any]:
    """Masks that are learned with the weights, and ReLUs that are removed in rounds."""
    common: dict[str, Any] = {"batch_size": BATCH}
    methods = {
        "snl": fl.SNL(lr=0.05, lam=1e-3, patience=1, growth=1.5, max_epochs=4, protect=0.5, **common),
        "snl, fair": fl.SNL(lr=0.05, max_epochs=2, objective=fl.GroupDRO(), augment=True, **common),
        "autorep": fl.AutoReP(mask_lr=0.2, hold=1, max_epochs=4, **common),
        "taylor": fl.Taylor(rate=0.4, probes=1, samples=40, **common),
        "shapley": fl.Shapley(samples=40),
        "coordinate descent": fl.CoordinateDescent(step=150, refresh_epochs=1, candidates=3, **common),
    }
    found = {}
    for name, method in methods.items():
        rows: list[dict[str, float]] = []
        cuts = list(method.linearize(teacher, data, [0.6, 0.3], history=rows))
        found[name] = rows, [(cut.relus, cut.info, cut.model.state_dict()) for cut in cuts]
    return found


def audited(teacher: nn.Module, data: fl.GroupedData) -> Any:
    """Whole measures: of rows and of a column a sample."""
    student = fl.mask_relus(teacher, data.normalized(slice(2)))
    options = {"gradient_norm": {"per_sample": True}}
    report = fl.audit(student, data, teacher, measures=MEASURES, options=options, resamples=20)
    return report.to_frame().to_dict("records"), report.predictions.to_dict("records")


class Stops(ERM):
    """Breaks off in the second epoch, on all ranks."""

    batches = 0

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        self.batches += 1
        if self.batches > 5:
            raise fl.FairlineError("Stopped.")
        return super().reduce(losses, batch)


def begin(checkpoint: Path) -> None:
    """Leave a training after its first epoch."""
    with contextlib.suppress(fl.FairlineError):
        trained(make_data(), checkpoint=checkpoint, objective=Stops())


def resume(checkpoint: Path) -> Any:
    """Go on with it."""
    assert checkpoint.exists()
    model, rows = trained(make_data(), checkpoint=checkpoint)
    return rows, model.state_dict()


def everything() -> dict[str, Any]:
    """All that is the same in one process and in several."""
    data = make_data()
    teacher, rows = trained(data)
    return {
        "train": (rows, teacher.state_dict()),
        "finetune": finetunes(teacher, data),
        "linearize": linearized(teacher, data),
        "audit": audited(teacher, data),
    }


def beyond(folder: Path) -> dict[str, Any]:
    """What only several processes can show."""
    data, ranks = make_data(), here()
    noisy = Noisy()
    fl.train(noisy, data, epochs=1, batch_size=BATCH)
    drawn = torch.zeros(ranks.size, 2, 4)
    drawn[ranks.rank] = torch.stack([noisy.drawn[0][:4], noisy.drawn[1][:4]])
    messages: list[str] = []
    try:
        fl.train(Net(2), data, epochs=1)
    except fl.FairlineError as error:
        messages.append(str(error))
    (folder / f"rank-{ranks.rank}").touch()
    masked = fl.mask_relus(make_net(), data.normalized(slice(2)))
    fl.save_masks(folder / f"masks-{ranks.rank}.safetensors", masked, method="none", budget=1, seed=0)
    resumed = resume(folder / "begun-by-one.safetensors")
    begin(folder / "begun-by-two.safetensors")
    return {"size": ranks.size, "drawn": ranks.sum(drawn, ranks.size), "refused": messages, "resumed": resumed}


def both(folder: Path, device: str, progress: ProgressCallback) -> tuple[dict[str, Any], dict[str, Any]]:
    """All checks in one launch; progress is reported of one more training."""
    common, own = everything(), beyond(folder)
    trained(make_data(), progress=progress)
    return common, own
