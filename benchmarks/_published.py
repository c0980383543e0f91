"""Runs the published code of SNL or AutoReP, as it is in a checkout, on images, weights and an order that are given.

    python benchmarks/_published.py snl|autorep|polynomials CHECKOUT GIVEN FOUND [options of the published script]

GIVEN is a file of tensors that ``fidelity.py`` writes, FOUND the one that it reads. The published ``main`` runs
unchanged; what stands around it:

- torchvision, tensorboardX and pytorch_warmup, of which nothing is called but a ``SummaryWriter``, are empty modules;
- ``torch.device("cuda")`` is the processor, and ``torch.cuda.set_device`` does nothing;
- ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Linear`` and ``LearnableAlpha``, in the module of the architecture alone, take
  ``width / 64`` of the channels that they are told, since 64 is written into it;
- data sets and ``DataLoader`` give the tensors, in the given order;
- functions that ``main`` calls once an epoch are wrapped, to see network and optimizer.

Imports nothing of fairline: both checkouts have modules named ``utils``, ``datasets``, ``models_util`` at the top.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Batches:
    """What stands in for a ``DataLoader``: the training part in the given order, the test part as it lies."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int | None) -> None:
        self.images, self.labels, self.size, self.seed = images, labels, size, seed
        self.restart()

    def restart(self) -> None:
        """Begin with the order of the first epoch again."""
        self.generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for index in order.split(self.size):
            yield self.images[index], self.labels[index]


class OnProcessor(types.ModuleType):
    """``torch`` for a script that knows no device but CUDA."""

    cuda = types.SimpleNamespace(set_device=lambda _: None, manual_seed_all=lambda _: None, device_count=lambda: 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(_: str) -> torch.device:
        return torch.device("cpu")


class Writer:
    """What stands in for tensorboardX's: it makes the folder, and writes nothing."""

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Trace:
    """Weights and masks after some steps of an optimizer, and the first gradient, each as one vector."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps, self.done = steps, 0
        self.weights: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.gradient: Tensor | None = None

    def watch(self, optimizer: torch.optim.Optimizer, weights: list[Tensor], masks: list[Tensor]) -> None:
        """Note them after each step from now on."""

        def note(*_: Any) -> None:
            if self.gradient is None:
                self.gradient = torch.cat([each.grad.flatten() for each in [*weights, *masks]])
            self.done += 1
            if self.done in self.steps:
                self.weights.append(torch.cat([each.detach().flatten() for each in weights]))
                self.masks.append(torch.cat([each.detach().flatten() for each in masks]))

        optimizer.register_step_post_hook(note)

    def tensors(self) -> Tensors:
        """Of weights and masks (steps, entries); the gradient is (entries of both,)."""
        assert self.gradient is not None
        steps = {"weights": self.weights, "masks": self.masks}
        return {"gradient": self.gradient, **{f"steps.{name}": torch.stack(each) for name, each in steps.items()}}


def stand_ins() -> None:
    """Empty modules for what the scripts import and need not have here."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.datasets", "tensorboardX", "pytorch_warmup"):
        module = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        sys.modules[name] = module
    sys.modules["tensorboardX"].SummaryWriter = Writer  # type: ignore[attr-defined]


def narrow(architecture: types.ModuleType, width: int) -> None:
    """Let the networks of a module be ``width`` channels wide at first, where 64 is written."""

    def fewer(channels: int) -> int:
        return channels * width // 64 if channels >= 64 else channels

    class Conv2d(nn.Conv2d):
        def __init__(self, first: int, then: int, **rest: Any) -> None:
            super().__init__(fewer(first), fewer(then), **rest)

    class BatchNorm2d(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(fewer(channels))

    class Linear(nn.Linear):
        def __init__(self, first: int, classes: int) -> None:
            super().__init__(fewer(first), classes)

    layers = types.ModuleType("torch.nn")
    layers.__dict__.update(nn.__dict__)
    layers.__dict__.update({"Conv2d": Conv2d, "BatchNorm2d": BatchNorm2d, "Linear": Linear})
    architecture.nn = layers  # type: ignore[attr-defined]
    if hasattr(architecture, "LearnableAlpha"):
        made = architecture.LearnableAlpha.__init__

        def make(self: nn.Module, channels: int, size: int) -> None:
            made(self, fewer(channels), size)

        architecture.LearnableAlpha.__init__ = make


def load_script(name: str, architecture: str, given: Tensors, arguments: list[str]) -> Any:
    """Import a published script with its options, on the processor and with the given images."""
    sys.argv = [f"{name}.py", *arguments]
    script = importlib.import_module(name)
    narrow(sys.modules[architecture], int(given["width"]))
    script.torch = OnProcessor("torch")  # type: ignore[attr-defined]
    return script


def loader(given: Tensors, split: str, size: int) -> Batches:
    """The batches of a part."""
    seed = int(given["seed"]) if split == "train" else None
    return Batches(given[f"{split}.images"], given[f"{split}.labels"], size, seed)


def weights_of(given: Tensors) -> Tensors:
    """The base network."""
    return {name.removeprefix("base."): value for name, value in given.items() if name.startswith("base.")}


def snl(given: Tensors, arguments: list[str]) -> Tensors:
    """Run ``snl_finetune_unstructured.py``.

    Args:
        given: Images, labels, base network.
        arguments: Options of the script behind the data set and the architecture.

    Returns:
        Masks and weights, when masks were learned (``masked.``) and at the end (``final.``), history and first steps.
    """
    base = weights_of(given)
    for name, shape in masks_of(given).items():
        block, _, number = name.rpartition(".relu")
        base[f"{block}.alpha{number}.alphas"] = torch.ones(1, *shape)
    torch.save({"state_dict": base}, "base.pth.tar")
    options = ["cifar10", "resnet18_in", ".", "base.pth.tar", *arguments]
    script = load_script("snl_finetune_unstructured", "archs_unstructured.cifar_resnet", given, options)
    script.get_dataset = lambda _, split: split
    train = loader(given, "train", script.args.batch)
    script.DataLoader = lambda split, **_: train if split == "train" else loader(given, "test", 500)
    trace, rows, seen = Trace(tuple(given["steps"].tolist())), [], {}
    learn, finetune, say = script.mask_train_kd_unstructured, script.train_kd, script.log

    def log(file: str, text: str) -> None:
        say(file, text)
        row = re.match(r"Epochs: (\d+)\tTest Acc: (\S+)\tRelu Count: (\d+)\t", text)
        if row:
            rows.append([float(row[1]) + 1, float(row[3]), float(row[2]) / 100, script.args.alpha])

    def learning(batches: Batches, net: nn.Module, teacher: nn.Module, *rest: Any, **more: Any) -> Any:
        if not rows:
            masks = [p for name, p in net.named_parameters() if "alpha" in name]
            trace.watch(rest[1], [p for name, p in net.named_parameters() if "alpha" not in name], masks)
        seen["net"], seen["teacher"] = net, teacher
        return learn(batches, net, teacher, *rest, **more)

    def finetuning(batches: Batches, net: nn.Module, *rest: Any) -> Any:
        if "masked" not in seen:
            seen["masked"] = {name: value.clone() for name, value in net.state_dict().items()}
            batches.restart()
        return finetune(batches, net, *rest)

    script.log, script.mask_train_kd_unstructured, script.train_kd = log, learning, finetuning
    script.main()
    wasted = sum(p.grad is not None and bool(p.grad.any()) for p in seen["teacher"].parameters())
    found = {"history": torch.tensor(rows, dtype=torch.float64), "teacher_gradients": torch.tensor(wasted)}
    for when, state in (("masked", seen["masked"]), ("final", seen["net"].state_dict())):
        for name, value in state.items():
            name = re.sub(r"\.alpha(\d)\.alphas$", r".relu\1.kept", name)
            found[f"{when}.{name}"] = value[0] > script.args.threshold if name.endswith(".kept") else value.clone()
    return {**found, **trace.tensors()}


def autorep(given: Tensors, arguments: list[str]) -> Tensors:
    """Run ``train_cifar.py``.

    Args:
        given: Images, labels, base network, first auxiliary weights, passes that its counter starts from;
            ``coefficients.*`` where polynomials are to start from them.
        arguments: Options of the script beside data set, architecture and networks to load.

    Returns:
        As of :func:`snl`; of the epoch that the script keeps as the best, ``best.`` as well.
    """
    names = list(masks_of(given))
    start = {f"model.{name}": value for name, value in weights_of(given).items()}
    places = sorted({name.rstrip("12") for name in names})
    for i, name in enumerate(names):
        state = {f"alpha_aux_{i}_0": given[f"auxiliary.{name}"]}
        if f"coefficients.{name}" in given:
            state |= {f"poly_para_{i}_{k}": c.unsqueeze(0) for k, c in enumerate(given[f"coefficients.{name}"])}
        state["itr_cnt"] = given["passes"].view(1)
        # One module stands in the place of all ReLUs, under the name of each.
        start |= {f"model.{place}.{key}": value for place in places for key, value in state.items()}
    torch.save({"state_dict": start}, "base.pth.tar")
    options = ["--dataset", "cifar10", "--arch", "resnet18_in", "--teacher_arch", "resnet18_in", "--distil"]
    options += ["--pretrained_path", "base.pth.tar", "--teacher_path", "base.pth.tar"]
    options += ["--act_type", "ReLU_masked_dapa_relay", "--epochs", "0", "--workers", "0", *arguments]
    script = load_script("train_cifar", "models_snl.cifar_resnet", given, options)
    script.get_dataset = lambda _, split: split
    data = types.SimpleNamespace(DataLoader=lambda split, batch_size, **_: loader(given, split, batch_size))
    script.torch.utils = types.SimpleNamespace(data=data)
    trace, rows, seen = Trace(tuple(given["steps"].tolist())), [], {"moved": 0.0}
    learn, validate = script.train_mask_distil, script.validate

    def learning(batches: Batches, model: nn.Module, optimizer: torch.optim.Optimizer, *rest: Any) -> Any:
        if not rows:
            named = [(n, p) for n, p in model.named_parameters() if not re.search("itr_cnt|alpha_mask|poly_para", n)]
            masks = [p for name, p in named if "alpha_aux" in name]
            trace.watch(optimizer, [p for name, p in named if "alpha_aux" not in name], masks)
        seen["model"] = model
        return learn(batches, model, optimizer, *rest)

    def validating(batches: Batches, model: nn.Module, *rest: Any) -> float:
        before = {name: p.clone() for name, p in model.named_parameters() if "poly_para" in name}
        accuracy = validate(batches, model, *rest)
        moved = max(float((p - before[n]).abs().max()) for n, p in model.named_parameters() if n in before)
        seen["moved"] = max(seen["moved"], moved)
        kept = sum(float(p.sum()) for name, p in model.named_parameters() if "alpha_mask" in name)
        rows.append([len(rows) + 1.0, kept, accuracy, script.config.lamda])
        return accuracy

    script.train_mask_distil, script.validate = learning, validating
    script.main()
    found = {"history": torch.tensor(rows, dtype=torch.float64), "moved": torch.tensor(seen["moved"])}
    states = {"final": seen["model"].state_dict()}
    best = Path(script.config.path) / "best_mask_train.pth.tar"
    if best.exists():
        states["best"] = torch.load(best, weights_only=True)["state_dict"]
    for when, state in states.items():
        found |= {f"{when}.{n}": state[f"model.{n}"].clone() for n in weights_of(given)}
        where = f"model.{names[0].rpartition('.')[0]}.relu"
        for i, name in enumerate(names):
            found[f"{when}.{name}.kept"] = state[f"{where}.alpha_mask_{i}_0"] > 0
            constant, linear, square = (state[f"{where}.poly_para_{i}_{k}"][0] for k in range(3))
            found[f"{when}.{name}.coefficients"] = torch.stack(
                [constant, linear, square * (script.config.scale_x2 / float(given["square_scale"]))]
            )
    return {**found, **trace.tensors()}


def polynomials(given: Tensors, _: list[str]) -> Tensors:
    """The polynomials that AutoReP's published code sets, (3, channels): constant, slope, factor of the square.

    Args:
        given: ``mean.*`` and ``variance.*`` of the activations of each layer, a channel.

    Returns:
        ``set.*`` as the code calls its formula, with the variance; ``deviation.*`` with its root.
    """
    formula = importlib.import_module("approx.approx_torch").approx_2rd_torch
    found = {}
    for name, mean in given.items():
        if name.startswith("mean."):
            layer = name.removeprefix("mean.")
            # var_min, an option of the script, is 0.5.
            variance = given[f"variance.{layer}"]
            found[f"set.{layer}"] = torch.stack(formula(mean, variance.clip(min=0.5)))
            found[f"deviation.{layer}"] = torch.stack(formula(mean, variance.sqrt()))
    return found


def masks_of(given: Tensors) -> dict[str, tuple[int, ...]]:
    """Shape of each ReLU's activation by fairline's name, in the order in which they run."""
    return {n.removeprefix("auxiliary."): tuple(v.shape) for n, v in given.items() if n.startswith("auxiliary.")}


def main() -> None:
    method, checkout, given, found, *arguments = sys.argv[1:]
    run: Callable[[Tensors, list[str]], Tensors] = {"snl": snl, "autorep": autorep, "polynomials": polynomials}[method]
    tensors = torch.load(given, weights_only=True)
    sys.path[:0] = [str(Path(checkout).resolve())]
    stand_ins()
    torch.manual_seed(int(tensors["seed"]))
    target = Path(found).resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = run(tensors, arguments)
    torch.save(result, target.with_suffix(".part"))
    target.with_suffix(".part").replace(target)


if __name__ == "__main__":
    main()
