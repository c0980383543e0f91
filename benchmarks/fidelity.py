"""The published code of SNL and AutoReP beside fairline's, from the same base networks, images and order of batches.

    git clone https://github.com/NYU-DICE-Lab/selective_network_linearization snl        # eac688c
    git clone https://github.com/harveyp123/AutoReP autorep                              # ac8f662
    python benchmarks/fidelity.py --snl snl --autorep autorep --root DATA --out papers/results/fidelity

ResNet-18 of width 4 on 1,024 images of CIFAR-10, ten seeds; each seed has a base network, an order of batches and
first auxiliary weights of its own, which both codes get. ``_published.py`` says how the published scripts are run; they
are read from the checkouts alone. What is done lies in ``--work``, and is not done again.

Where the two differ as the documents say, they are also run alike: the published AutoReP with polynomials that start
from fairline's and are not set anew (*fixed*), and fairline's with learning rates that fall from the first epoch on
(*cosine*). SNL is run once more with the base network disturbed by a millionth (*twin*): how far two runs part that
rounding alone tells apart.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _published import Trace
from torch import Tensor, nn

import fairline as fl
from fairline._io import atomic_path, make_folder, read_json, write_json
from fairline.audit.intervals import student_interval
from fairline.linearize.activations import each_activation
from fairline.linearize.surrogates import start_masked
from fairline.masking import SQUARE_SCALE, copy_model, masked_relus
from fairline.runs import environment, provenance

WIDTH, BUDGET = 4, 0.2
BASE_IMAGES, IMAGES, TEST_IMAGES, SEEN_IMAGES = 2048, 256, 2000, 200
BASE = {"epochs": 12, "lr": 0.05, "batch_size": 64}
BATCH, STEPS = 16, (1, 2, 4, 8, 16, 32, 64, 128)
SNL = {"lam": 2e-3, "lr": 1e-2, "batch_size": BATCH, "max_epochs": 60, "exact": False}
AUTOREP = {"lr": 1e-2, "mask_lr": 1e-2, "batch_size": BATCH, "exact": False, "square": 0.02}
FINETUNE, EPOCHS = 2, 12
#: Forward passes in which the published AutoReP sets its polynomials anew: two epochs of these, as of its 508 there are
#: about one of 200 epochs on CIFAR.
SETTING = 48
COMMITS = {
    "snl": (
        "https://github.com/NYU-DICE-Lab/selective_network_linearization",
        "eac688cb8e50ebc0fe244e8478d3c174101cbeb5",
    ),
    "autorep": ("https://github.com/harveyp123/AutoReP", "ac8f662b75abf8806d8705261798f93037dc2d7d"),
}
Tensors = dict[str, Tensor]


@dataclass
class Watch:
    """What is seen of a run of fairline: its first steps, and the accuracy after each epoch."""

    test: fl.GroupedData
    trace: Trace = field(default_factory=lambda: Trace(STEPS))
    accuracies: list[float] = field(default_factory=list)
    student: nn.Module | None = None

    def begin(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Watch the steps of an optimizer, surrogates' coefficients aside."""
        self.student = student
        masks = [layer.weight for layer in masked_relus(student).values()]
        learned = {id(mask) for mask in masks}
        named = [(n, p) for n, p in student.named_parameters() if not n.endswith("coefficients")]
        self.trace.watch(optimizer, [p for _, p in named if id(p) not in learned], masks)

    def look(self) -> None:
        """Note the accuracy of the student as it is."""
        self.accuracies.append(accuracy(self.student, self.test))


def watched(method: Any, watch: Watch, start: Tensors | None = None) -> Any:
    """A method that is watched; its polynomials start from ``start`` if that is given."""
    optimizer, settle = method.optimizer, method.settle

    def make(student: nn.Module) -> torch.optim.Optimizer:
        made = optimizer(student)
        watch.begin(student, made)
        return made

    def settled(made: torch.optim.Optimizer, epochs: int) -> None:
        settle(made, epochs)
        watch.look()

    method.optimizer, method.settle = make, settled
    return method


@dataclass
class Given:
    """What both codes get."""

    base: nn.Module
    train: fl.GroupedData
    seen: fl.GroupedData
    test: fl.GroupedData
    tensors: Tensors


def base_network(data: fl.GroupedData, kept: Path) -> tuple[nn.Module, fl.GroupedData]:
    """The base network, trained unless it is kept in a file, and the images that it learned from."""
    official = data.official_test
    assert official is not None
    train = data.select(draw((~official).nonzero().flatten(), BASE_IMAGES, seed=0))
    mean, std = train.normalization()
    train = replace(train, mean=mean, std=std)
    torch.manual_seed(0)
    base = fl.models.build("resnet18", data.num_classes, width=WIDTH)
    if not kept.exists():
        fl.train(base, train, seed=0, device="cpu", **BASE)
        keep(kept, base.state_dict())
    base.load_state_dict(torch.load(kept, weights_only=True))
    return base, train


def draw(among: Tensor, count: int, seed: int) -> Tensor:
    """Some of a vector's entries."""
    return among[torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))[:count]]


def given_to_both(seed: int, data: fl.GroupedData, work: Path) -> Given:
    """A seed's images, first auxiliary weights and fitted polynomials, with the base network of all.

    Args:
        seed: Of all of them.
        data: CIFAR-10.
        work: Folder of what is done.
    """
    base, known = base_network(data, work / "base.pt")
    train = known.select(draw(torch.arange(len(known)), IMAGES, seed))
    held_out = data.select(data.official_test.nonzero().flatten()[:TEST_IMAGES])
    test = replace(held_out, mean=known.mean, std=known.std)
    seen = test.select(torch.arange(SEEN_IMAGES))
    file = work / f"seed-{seed}" / "given.pt"
    if not file.exists():
        keep(file, tensors_of(seed, base, train, seen))
    return Given(base, train, seen, test, torch.load(file, weights_only=True))


def tensors_of(seed: int, base: nn.Module, train: fl.GroupedData, seen: fl.GroupedData) -> Tensors:
    """What the published code gets of all this."""
    student = start_masked(base, train, "quadratic", torch.device("cpu"), seed=seed, square=AUTOREP["square"])
    fl.AutoReP(seed=seed, **AUTOREP).prepare(student)
    tensors = {f"base.{name}": value for name, value in base.state_dict().items()}
    for name, layer in masked_relus(student).items():
        tensors |= {f"auxiliary.{name}": layer.weight.detach(), f"coefficients.{name}": layer.coefficients.detach()}
    for name, part in (("train", train), ("test", seen)):
        tensors |= {f"{name}.images": part.normalized(), f"{name}.labels": part.labels}
    numbers = {"seed": seed, "width": WIDTH, "steps": STEPS, "square_scale": SQUARE_SCALE, "passes": 508.0 - SETTING}
    return tensors | {name: torch.tensor(number) for name, number in numbers.items()}


class PublishedFailed(SystemExit):
    """The published code ended with an error, which is in its log."""


def published(method: str, checkout: Path, given: Tensors, found: Path, options: dict[str, float | int]) -> None:
    """Run the published script in a process of its own."""
    file = found.with_suffix(".given")
    torch.save(given, file)
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    script = str(Path(__file__).with_name("_published.py"))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with found.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [sys.executable, script, method, str(checkout), str(file), str(found), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=clean,
            check=False,
        )
    file.unlink()
    if done.returncode:
        raise PublishedFailed(f"The published code of {method} failed; see {found.with_suffix('.log')}.")


def ours(method: str, base: nn.Module, given: Given, seed: int, *, cosine: bool = False) -> Tensors:
    """Run fairline; what ``_published.py`` writes of the published code, of this one.

    Args:
        method: ``"snl"`` or ``"autorep"``.
        base: The base network.
        given: All else that both codes get.
        seed: Of the run.
        cosine: Whether AutoReP's learning rates fall over the whole run, as published.
    """
    watch, rows, train = Watch(given.seen), [], given.train
    length = {"hold": EPOCHS, "max_epochs": EPOCHS} if cosine else {"hold": hold()}
    linearizer: Any = fl.SNL(seed=seed, **SNL) if method == "snl" else fl.AutoReP(seed=seed, **length, **AUTOREP)
    lam = linearizer.lam
    if cosine:
        linearizer.settle = falling(linearizer)
    (cut,) = watched(linearizer, watch).linearize(base, train, [BUDGET], device="cpu", history=rows)
    found = {}
    if method == "snl":
        found = states("masked", cut.model)
        fl.finetune(cut.model, base, train, epochs=FINETUNE, batch_size=BATCH, seed=seed, device="cpu")
    used = [lam, *(row["lambda"] for row in rows)]
    history = [[row["epoch"], row["relus"], a, u] for row, a, u in zip(rows, watch.accuracies, used, strict=False)]
    return {
        **found,
        **states("final", cut.model),
        "history": torch.tensor(history, dtype=torch.float64),
        **watch.trace.tensors(),
    }


def falling(method: fl.AutoReP) -> Callable[[torch.optim.Optimizer, int], None]:
    """A schedule that counts the epochs of the run in the place of those at the budget."""
    epochs = iter(range(1, EPOCHS + 1))

    def settle(optimizer: torch.optim.Optimizer, _: int) -> None:
        share = next(epochs) / EPOCHS
        for group in optimizer.param_groups:
            start = group.setdefault("initial_lr", group["lr"])
            group["lr"] = method.lr_min + (start - method.lr_min) * (1 + math.cos(math.pi * share)) / 2

    return settle


def hold() -> int:
    """Epochs that AutoReP stays at the budget, so that it takes as many as the published code."""
    return EPOCHS - round((1 - BUDGET) / AUTOREP["mask_lr"] / (IMAGES / BATCH) + 0.5)


def states(when: str, network: nn.Module) -> Tensors:
    """Weights, masks and coefficients by name."""
    return {f"{when}.{n}": v.clone() for n, v in network.state_dict().items()}


def network_of(found: Tensors, when: str, base: nn.Module) -> nn.Module:
    """The network that a run of either code ended with, as fairline's.

    Args:
        found: What the run wrote.
        when: ``"masked"``, ``"final"`` or ``"best"``.
        base: The base network.

    Returns:
        A masked network.
    """
    state = {n.removeprefix(f"{when}."): v for n, v in found.items() if n.startswith(f"{when}.")}
    surrogate = "quadratic" if any(name.endswith("coefficients") for name in state) else "identity"
    network = fl.mask_relus(base, torch.zeros(1, 3, 32, 32), surrogate)
    network.load_state_dict(network.state_dict() | state)
    return network


def accuracy(network: nn.Module, data: fl.GroupedData) -> float:
    """Share of the images that are told."""
    return float((fl.predict(network, data).argmax(1) == data.labels).double().mean())


def disturbed(base: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights differ by a millionth."""
    twin = copy_model(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    return twin


def runs_of(seed: int, asked: argparse.Namespace, given: Given) -> dict[str, Callable[[Path], None]]:
    """What is run of a seed, by name; each writes the file that it is given."""
    budget = budget_of(given)
    free = {name: value for name, value in given.tensors.items() if not name.startswith("coefficients.")}
    fixed = {**given.tensors, "passes": torch.tensor(508.0)}
    snl = {"alpha": SNL["lam"], "lr": SNL["lr"], "batch": BATCH, "relu_budget": budget}
    snl |= {"epochs": SNL["max_epochs"], "finetune_epochs": FINETUNE}
    autorep = {"ReLU_count": budget / 1000, "lamda": 140, "threshold": 0.003, "degree": 2, "seed": seed}
    autorep |= {"w_mask_lr": AUTOREP["lr"], "batch_size": BATCH, "scale_x2": SQUARE_SCALE, "mask_epochs": EPOCHS}
    base = given.base
    return {
        "snl-published": lambda file: published("snl", asked.snl, free, file, snl),
        "snl-fairline": lambda file: keep(file, ours("snl", base, given, seed)),
        "autorep-published": lambda file: published("autorep", asked.autorep, free, file, autorep),
        "autorep-fairline": lambda file: keep(file, ours("autorep", base, given, seed)),
        "autorep-fixed": lambda file: published("autorep", asked.autorep, fixed, file, autorep),
        "autorep-cosine": lambda file: keep(file, ours("autorep", base, given, seed, cosine=True)),
        "snl-twin": lambda file: keep(file, ours("snl", disturbed(base, seed), given, seed)),
    }


def keep(file: Path, tensors: Tensors) -> None:
    """Write tensors as a whole or not at all."""
    with atomic_path(file) as temporary:
        torch.save(tensors, temporary)


CODES = ("published", "fairline", "twin", "fixed", "cosine")
METHODS = ("snl", "autorep")
PAIRS = (
    ("snl", "published", "fairline"),
    ("snl", "twin", "fairline"),
    ("autorep", "published", "fairline"),
    ("autorep", "fixed", "cosine"),
)


@dataclass
class Results:
    """What is in the folder of runs.

    Attributes:
        work: The folder.
        given: What both codes got, by seed.
        found: What they gave, by seed, method and code.
    """

    work: Path
    given: dict[int, Given]
    found: dict[tuple[int, str, str], Tensors]

    @classmethod
    def read(cls, work: Path, given: dict[int, Given]) -> Results:
        """All runs that are done."""
        found = {}
        for seed in given:
            for method in METHODS:
                for code in CODES:
                    file = work / f"seed-{seed}" / f"{method}-{code}.pt"
                    if file.exists():
                        found[seed, method, code] = torch.load(file, weights_only=True)
        return cls(work, given, found)

    def of(self, method: str, code: str) -> dict[int, Tensors]:
        """The runs of a method and a code, by seed."""
        return {seed: each for (seed, *what), each in self.found.items() if what == [method, code]}


def epochs_table(results: Results) -> pd.DataFrame:
    """ReLUs and test accuracy after each epoch of mask learning."""
    rows = []
    for (seed, method, code), found in results.found.items():
        for epoch, relus, told, lam in found["history"].tolist():
            rows.append(
                {"method": method, "seed": seed, "code": code, "epoch": int(epoch), "relus": int(relus)}
                | {"accuracy": told, "lambda": lam}
            )
    return pd.DataFrame(rows)


def runs_table(results: Results) -> pd.DataFrame:
    """How each run ended: epochs, ReLUs, test accuracy in % after masks and after the finetune."""
    rows = []
    for (seed, method, code), found in results.found.items():
        file = results.work / f"seed-{seed}" / f"{method}-{code}.json"
        if not file.exists():
            write_json(file, {"method": method, "seed": seed, "code": code, **end_of(found, results.given[seed])})
        rows.append(read_json(file))
    return pd.DataFrame(rows)


def end_of(found: Tensors, given: Given) -> dict[str, float | None]:
    """A row of :func:`runs_table`."""
    within = found["history"][:, 1] <= budget_of(given)
    row: dict[str, float | None] = {"crossed": int(within.long().argmax()) + 1 if bool(within.any()) else None}
    for when in ("masked", "final", "best"):
        if any(name.startswith(f"{when}.") for name in found):
            row[f"relus_{when}"] = int(mask_of(found, when).sum())
            row[f"accuracy_{when}"] = 100 * accuracy(network_of(found, when, given.base), given.test)
    return row


def steps_table(results: Results) -> pd.DataFrame:
    """How far weights and masks of two runs are apart after some steps, and their first gradients."""
    rows = []
    for method, one, other in PAIRS:
        theirs, own = results.of(method, one), results.of(method, other)
        for seed in sorted(theirs.keys() & own.keys()):
            a, b = theirs[seed], own[seed]
            row = {"method": method, "pair": f"{one}, {other}", "seed": seed}
            gradient = float((a["gradient"] - b["gradient"]).norm() / b["gradient"].norm())
            for i in range(min(len(a["steps.masks"]), len(b["steps.masks"]))):
                apart = {n: (a[f"steps.{n}"][i] - b[f"steps.{n}"][i]).abs() for n in ("weights", "masks")}
                # The median says whether the two compute the same, the largest whether rounding has turned a sign.
                values = {f"{n}_{of}": float(getattr(v, of)()) for n, v in apart.items() for of in ("median", "max")}
                rows.append({**row, "step": STEPS[i], "gradient": gradient, **values})
    return pd.DataFrame(rows)


def overlap_table(results: Results) -> pd.DataFrame:
    """Jaccard indices of the masks of two runs, and of others that say what to hold them against."""
    rows = []

    def add(method: str, pair: str, seed: int, one: Tensor, other: Tensor) -> None:
        index = float((one & other).sum() / (one | other).sum())
        rows.append({"method": method, "pair": pair, "seed": seed, "jaccard": index})

    masks = {
        (method, code): {seed: mask_of(found, "final") for seed, found in results.of(method, code).items()}
        for method in METHODS
        for code in CODES
    }
    for method, one, other in PAIRS:
        for seed in sorted(masks[method, one].keys() & masks[method, other].keys()):
            add(method, f"{one}, {other}", seed, masks[method, one][seed], masks[method, other][seed])
    for method in METHODS:
        for code in ("published", "fairline"):
            seeds = sorted(masks[method, code])
            for seed, following in zip(seeds, [*seeds[1:], *seeds[:1]], strict=True):
                if seed != following:
                    add(method, f"{code}, two seeds", seed, masks[method, code][seed], masks[method, code][following])
        for seed, own in masks[method, "fairline"].items():
            count = int(own.sum())
            random = torch.rand(2, len(own), generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
            add(method, "two random masks", seed, *(random < count))
            if method == "autorep":
                tensors = results.given[seed].tensors
                start = torch.cat([value.flatten() for name, value in tensors.items() if name.startswith("auxiliary.")])
                add(method, "fairline, its random start", seed, own, start.argsort().argsort() >= len(own) - count)
    return pd.DataFrame(rows)


def paired_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of both runs of a pair, and of the second less the first with Student's 95 % limits."""
    rows = []
    by = runs.set_index(["method", "code", "seed"]).sort_index()
    for method, one, other in PAIRS:
        for measure in ("crossed", "relus_final", "accuracy_masked", "accuracy_final"):
            both = [by.loc[(method, code), measure] for code in (one, other) if (method, code) in by.index]
            together = pd.concat(both, axis=1, join="inner").dropna() if len(both) == 2 else pd.DataFrame()
            if len(together) < 2:
                continue
            difference = (together.iloc[:, 1] - together.iloc[:, 0]).to_numpy(float)
            low, high = student_interval(difference)
            first, second = together.mean()
            rows.append(
                {"method": method, "pair": f"{one}, {other}", "measure": measure, "seeds": len(together)}
                | {"first": first, "second": second, "difference": difference.mean(), "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def polynomials_table(given: Given, checkout: Path, file: Path) -> pd.DataFrame:
    """How far what stands in a ReLU's place is from it on real activations, E[(relu(x) − g(x))²] / E[relu(x)²].

    Args:
        given: Images and base network.
        checkout: Of AutoReP.
        file: Where the published code writes its polynomials.

    Returns:
        A row a layer: the polynomials that the published code sets, the same formula with the standard deviation and
        without the divisors 5 and 10, fairline's with two factors of the square, and the identity.
    """
    student = fl.mask_relus(given.base, given.train.normalized(slice(2)))
    values: dict[str, list[Tensor]] = {name: [] for name in masked_relus(student)}
    each_activation(student, given.train, lambda name, x, _: values[name].append(x.transpose(0, 1).flatten(1)))
    layers = {name: torch.cat(each, 1) for name, each in values.items()}
    tensors = {"seed": torch.tensor(0)}
    tensors |= {f"mean.{name}": x.mean(1) for name, x in layers.items()}
    tensors |= {f"variance.{name}": x.var(1) for name, x in layers.items()}
    published("polynomials", checkout, tensors, file, {})
    found = torch.load(file, weights_only=True)
    own = {}
    for square in (AUTOREP["square"], SQUARE_SCALE):
        fitted = start_masked(given.base, given.train, "quadratic", torch.device("cpu"), square=square)
        own[square] = {n: layer.coefficients.detach().flatten(1) for n, layer in masked_relus(fitted).items()}
    rows = []
    for name, x in layers.items():
        whole = found[f"deviation.{name}"] * torch.tensor([5.0, 1.0, 10.0 / SQUARE_SCALE]).view(3, 1)
        candidates = {"published": found[f"set.{name}"], "published formula of the deviation": whole}
        candidates |= {f"fairline, square {square:g}": each[name] for square, each in own.items()}
        candidates["identity"] = torch.tensor([0.0, 1.0, 0.0]).view(3, 1).expand(3, len(x))
        row = {"layer": name, "variance": float(x.var(1).mean())}
        for title, (constant, linear, square) in candidates.items():
            g = constant[:, None] + linear[:, None] * x + SQUARE_SCALE * square[:, None] * x * x
            row[title] = float((x.relu() - g).square().mean() / x.relu().square().mean())
        rows.append(row)
    return pd.DataFrame(rows)


def said_of(options: dict[str, Any], given: Given, checkout: Path, file: Path) -> str:
    """What comes of SNL's published script under some options."""
    try:
        published("snl", checkout, given.tensors, file, options)
    except PublishedFailed:
        return file.with_suffix(".log").read_text().strip().splitlines()[-1]
    relus = int(mask_of(torch.load(file, weights_only=True), "final").sum())
    return f"{relus} ReLUs finetuned and saved as those of a budget of {budget_of(given)}"


def defects_table(results: Results, polynomials: pd.DataFrame, asked: argparse.Namespace) -> pd.DataFrame:
    """What is seen on these images of what is odd in the published code."""
    given = next(iter(results.given.values()))
    budget = budget_of(given)
    rows = []

    def add(method: str, what: str, seen: str) -> None:
        rows.append({"method": method, "what": what, "seen": seen})

    short = {"lr": 0.01, "batch": BATCH, "epochs": 1, "finetune_epochs": 1}
    for number, (what, options) in enumerate(
        (
            ("--budegt_type relative with a fraction", {"budegt_type": "relative", "relu_budget": BUDGET}),
            ("--stride 2", {"relu_budget": budget, "stride": 2, **short}),
            ("epochs run out above the budget", {"relu_budget": budget, **short}),
        )
    ):
        seen = asked.work / f"odd-{number}.json"
        if not seen.exists():
            write_json(seen, said_of(options, given, asked.snl, asked.work / f"odd-{number}.pt"))
        add("snl", what, read_json(seen))
    snl = results.of("snl", "published").values()
    counts = {int(each["teacher_gradients"]) for each in snl}
    add("snl", "parameters of the teacher with a gradient", ", ".join(map(str, sorted(counts))))
    autorep = results.of("autorep", "published").values()
    moved = [float(each["moved"]) for each in autorep]
    add("autorep", "largest move of a coefficient in a validation pass", f"{min(moved):.3f} to {max(moved):.3f}")
    best = [int(mask_of(each, "best").sum()) for each in autorep if any(name.startswith("best.") for name in each)]
    add("autorep", f"ReLUs of the network kept as the best, budget {budget}", f"{min(best)} to {max(best)}")
    errors = polynomials.mean(numeric_only=True).drop("variance")
    add("autorep", "squared error of polynomials", "; ".join(f"{name} {error:.3f}" for name, error in errors.items()))
    return pd.DataFrame(rows)


def mask_of(found: Tensors, when: str) -> Tensor:
    """All masks of a network as one vector, bool."""
    ends = sorted(name for name in found if name.startswith(f"{when}.") and name.endswith(".kept"))
    return torch.cat([found[name].flatten() for name in ends])


def budget_of(given: Given) -> int:
    """ReLUs that are asked for."""
    return round(BUDGET * sum(v.numel() for name, v in given.tensors.items() if name.startswith("auxiliary.")))


def write(results: Results, asked: argparse.Namespace) -> None:
    """Print the tables, and keep them with where they come from."""
    runs = runs_table(results)
    steps, overlap = steps_table(results), overlap_table(results)
    tables = {"runs": runs, "epochs": epochs_table(results), "steps": steps, "overlap": overlap}
    tables["paired"] = paired_table(runs)
    first = next(iter(results.given.values()))
    tables["polynomials"] = polynomials_table(first, asked.autorep, asked.work / "polynomials.pt")
    tables["defects"] = defects_table(results, tables["polynomials"], asked)
    for name in ("polynomials", "defects"):
        print(tables[name].round(3).to_string(index=False))
    print(tables["paired"].round(2).to_string(index=False))
    print(overlap.groupby(["method", "pair"])["jaccard"].agg(["mean", "min", "max", "count"]).round(3).to_string())
    print(steps.groupby(["method", "pair", "step"])[list(steps.columns[4:])].median().map("{:.0e}".format).to_string())
    if asked.out is None:
        return
    for name, table in tables.items():
        with atomic_path(asked.out / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.5g")
    machines = [read_json(asked.work / f"seed-{seed}" / "environment.json") for seed in results.given]
    settings = {name: globals()[name] for name in ("WIDTH", "BUDGET", "BASE", "SNL", "AUTOREP", "FINETUNE", "EPOCHS")}
    images = {"base": BASE_IMAGES, "masks": IMAGES, "test": TEST_IMAGES, "test, each epoch": SEEN_IMAGES}
    write_json(
        asked.out / "provenance.json",
        {
            "command": "python benchmarks/fidelity.py",
            "published": {method: {"repository": url, "commit": commit} for method, (url, commit) in COMMITS.items()},
            "seeds": list(results.given),
            "images of CIFAR-10": images,
            "settings": settings,
            **provenance(machines),
        },
    )


def checked(method: str, checkout: Path) -> None:
    """Refuse a checkout of another commit, or one that was changed."""
    _, commit = COMMITS[method]
    for query, expected in ((["rev-parse", "HEAD"], commit), (["status", "--porcelain", "-uno"], "")):
        answer = subprocess.run(["git", "-C", str(checkout), *query], capture_output=True, text=True, check=False)
        if answer.returncode or answer.stdout.strip() != expected:
            raise SystemExit(f"{checkout} is not an unchanged checkout of {COMMITS[method][0]} at {commit}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--snl", type=Path, required=True, help="checkout of the published code of SNL")
    parser.add_argument("--autorep", type=Path, required=True, help="checkout of the published code of AutoReP")
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--work", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", action="store_true", help="run nothing; only write tables of what is done")
    asked = parser.parse_args()
    for method in METHODS:
        checked(method, getattr(asked, method))
    data = fl.data.load("cifar10", root=asked.root)
    given = {seed: given_to_both(seed, data, asked.work) for seed in asked.seeds}
    # As they are first, then alike.
    for first in (True, False) if not asked.tables else ():
        for seed, each in given.items():
            folder = make_folder(asked.work / f"seed-{seed}")
            if not (folder / "environment.json").exists():
                write_json(folder / "environment.json", environment(torch.device("cpu")))
            for name, run in runs_of(seed, asked, each).items():
                if name.endswith(("published", "fairline")) == first and not (folder / f"{name}.pt").exists():
                    print(f"seed {seed}: {name}", flush=True)
                    run(folder / f"{name}.pt")
    write(Results.read(asked.work, given), asked)


if __name__ == "__main__":
    main()
