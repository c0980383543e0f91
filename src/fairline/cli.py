"""The command line: parses, calls :mod:`fairline.jobs`, draws progress."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from fairline import __version__
from fairline.errors import FairlineError

if TYPE_CHECKING:
    import pandas as pd

    from fairline.runs import DataSpec, Run
    from fairline.training import ProgressCallback

app = typer.Typer(
    name="fairline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Cut the ReLUs that make private inference slow, and see who pays for it.\n\n"
    "Each command reads a run folder and writes one: [bold]train[/] → [bold]linearize[/] → [bold]finetune[/] → "
    "[bold]audit[/] → [bold]report[/]. Repeating an interrupted command resumes it.\n\n"
    "[bold]compare[/] puts finetunes side by side. "
    "[bold]demo[/] does all five.",
)
study_app = typer.Typer(no_args_is_help=True, help="Run a study: many seeds, budgets and methods from one file.")
app.add_typer(study_app, name="study")
private_app = typer.Typer(
    no_args_is_help=True,
    help="What private inference costs: [bold]estimate[/] it, [bold]run[/] it between two processes, "
    "[bold]serve[/] and [bold]query[/] between two hosts.",
)
app.add_typer(private_app, name="private")

#: Kept here so that help need not load torch; a test compares it with the registry.
AUDIT_MEASURES = (
    "accuracy",
    "gradient_norm",
    "curvature",
    "margin",
    "boundary_distance",
    "first_order_distance",
    "parameter_distance",
    "excess_loss_bound",
    "binary_curvature_bound",
    "correlation",
)

#: What the terminal shows beside accuracy; the report shows all.
EXPLAINED_BY = ("gradient_norm", "hessian_max", "margin", "boundary_distance", "excess_loss", "bound")

out_console = Console()
err_console = Console(stderr=True)

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Data set: digits, utkface:age|race|gender, cifar10, svhn, celeba:ATTRIBUTE or folder.",
        show_default=True,
    ),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder (or parquet file) of the data; the variable FAIRLINE_DATA by default."),
]
Groups = Annotated[
    str | None, typer.Option("--groups", help="What makes the groups, if not the label: an attribute or column.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data-option", metavar="KEY=VALUE", help="Further option of the data set, e.g. image_size=64."),
]
Unbalanced = Annotated[
    bool | None,
    typer.Option(
        "--unbalanced/--balanced",
        help="Keep 90 % of classes 0–4 and 10 % of 5–9 (digits: on by default; cifar10: off).",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="cnn, resnet18, resnet34, vgg19, wide_resnet22_8, or your own as module:function or file.py:function.",
    ),
]
Width = Annotated[int | None, typer.Option("--width", help="Channels of the first stage; the model's own by default.")]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", metavar="KEY=VALUE", help="Further option of the model, e.g. stem_relu=true."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice; for train, also of the split.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …; the accelerator by default.")]
#: Kept here so that help need not load torch; a test compares it with the registry.
LINEARIZERS = ("snl", "deepreduce", "senet", "autorep", "coordinate_descent", "layerwise", "magnitude", "random")
OBJECTIVES = ("erm", "lagrangian", "group_dro", "chi2_dro", "arl", "reweighting", "logit_adjust")
ObjectiveName = Annotated[str, typer.Option("--objective", help=f"What to minimise: {', '.join(OBJECTIVES)}.")]
ObjectiveOption = Annotated[
    list[str] | None,
    typer.Option("--objective-option", metavar="KEY=VALUE", help="Option of the objective, e.g. violation=signed."),
]
Mu = Annotated[
    float | None, typer.Option("--mu", help="Step of Algorithm 1's multipliers (lagrangian: 0.005, over 100 epochs).")
]
#: None leaves the choice to the method, or to a preset.
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training part (100).")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="At the start, then a cosine to zero (0.001).")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images in a step (256).")]
Select = Annotated[
    str,
    typer.Option("--select", help="Best validation epoch by accuracy, loss or worst_group_accuracy; or the last one."),
]
Out = Annotated[Path, typer.Option("--out", help="Run folder to write, or to resume.")]
Budgets = Annotated[
    str,
    typer.Option(
        "--budgets", help="ReLUs to keep, comma-separated: fractions (0.5), percents (50%) or counts (12900)."
    ),
]


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """``["a=1", "b=true"]`` to ``{"a": 1, "b": True}``.

    Raises:
        FairlineError: A pair has no ``=``.
    """
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise FairlineError(f"'{pair}' is not KEY=VALUE.")
        options[key.strip()] = _value(text.strip())
    return options


def parse_measure_options(pairs: list[str] | None) -> dict[str, dict[str, Any]]:
    """``["curvature.samples=500"]`` to ``{"curvature": {"samples": 500}}``.

    Raises:
        FairlineError: A pair does not name a measure and an option.
    """
    options: dict[str, dict[str, Any]] = {}
    for key, value in parse_options(pairs).items():
        measure, dot, name = key.partition(".")
        if not dot or not measure or not name:
            raise FairlineError(f"'{key}' does not name a measure and its option, such as curvature.samples.")
        options.setdefault(measure, {})[name] = value
    return options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    return text


def parse_budgets(text: str) -> list[float]:
    """``"0.5,10%,12900"`` to fractions (float) and counts (int).

    Raises:
        FairlineError: An entry is no number.
    """
    budgets: list[float] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        try:
            if entry.endswith("%"):
                budgets.append(float(entry[:-1]) / 100)
            else:
                budgets.append(float(entry) if "." in entry else int(entry))
        except ValueError:
            raise FairlineError(f"Budget '{entry}' is not a fraction (0.5), percent (50%) or count (12900).") from None
        if budgets[-1] < 0 or (isinstance(budgets[-1], float) and not budgets[-1] <= 1):
            raise FairlineError(f"Budget '{entry}' is outside of the network: fractions lie in [0, 1].")
    if not budgets:
        raise FairlineError("No ReLU budget was given.")
    return budgets


def data_spec(
    name: str,
    root: Path | None,
    groups: str | None,
    unbalanced: bool | None,
    options: list[str] | None,
    seed: int,
) -> DataSpec:
    """The data that the options describe."""
    from fairline.data import WITHOUT_ROOT
    from fairline.runs import DataSpec

    merged = parse_options(options)
    if groups is not None:
        merged["groups"] = groups
    if unbalanced is not None:
        merged["unbalanced"] = unbalanced
    folder = None if name in WITHOUT_ROOT else root or os.environ.get("FAIRLINE_DATA")
    # Absolute: a later command may run from elsewhere.
    return DataSpec(name, None if folder is None else str(Path(folder).expanduser().resolve()), merged, seed)


def _drop_none(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


@contextlib.contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """Draw progress reports, one bar a stage, with the time left."""
    from fairline.training import Progress as Report

    # In a narrow terminal the message gives way, never the time left.
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=34)),
        BarColumn(bar_width=12),
        TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=8)),
        TextColumn("{task.fields[message]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=err_console, refresh_per_second=4) as drawn:

        def report(update: Report) -> None:
            if update.stage not in bars:
                bars[update.stage] = drawn.add_task(update.stage, total=update.total, message="")
            drawn.update(bars[update.stage], completed=update.done, total=update.total, message=update.message)

        try:
            yield report
        except KeyboardInterrupt:
            drawn.stop()
            err_console.print("Interrupted; repeat the command to resume.")
            sys.exit(130)


def print_frame(frame: pd.DataFrame, title: str, formats: dict[str, str] | None = None) -> None:
    """Draw a table."""
    table = Table(title=title, title_justify="left")
    # Names stay whole, up to a point; numbers need little room.
    table.add_column(str(frame.index.name or ""), min_width=min(16, max(map(len, map(str, frame.index)), default=0)))
    for column in frame.columns:
        table.add_column(str(column), justify="right")
    for index, row in frame.iterrows():
        cells = [
            "" if value != value else format(value, (formats or {}).get(str(column), ""))
            for column, value in row.items()
        ]
        table.add_row(str(index), *cells)
    out_console.print(table)


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="digits, utkface:race, cifar10, svhn, celeba:Smiling or folder.")],
    root: Root = None,
    groups: Groups = None,
    unbalanced: Unbalanced = None,
    data_option: DataOption = None,
    seed: Seed = 0,
) -> None:
    """Show a data set: its groups, the split, and the files that cannot be used."""
    from fairline import data as registry

    spec = data_spec(name, root, groups, unbalanced, data_option, seed)
    with err_console.status(f"reading {name}"):
        whole = registry.load(spec.name, spec.root, **spec.options)
        parts = dict(zip(("train", "val", "test"), whole.split(seed), strict=True))
    shape = "×".join(map(str, whole.images.shape[1:]))
    out_console.print(
        f"{whole.name}: {len(whole):,} images of {shape}, {whole.num_classes} classes, {whole.num_groups} groups"
    )
    counts = whole.counts().assign(**{part: chosen.counts()["n"] for part, chosen in parts.items()})
    print_frame(
        counts,
        "images by group",
        {"n": ",.0f", "share_percent": ".2f", "train": ",.0f", "val": ",.0f", "test": ",.0f"},
    )
    if not whole.groups_are_classes:
        print_frame(whole.counts(by="class"), "images by group and class", {})
    if whole.skipped:
        out_console.print(f"{len(whole.skipped)} files were skipped:")
        for item in whole.skipped[:20]:
            out_console.print(f"  {item.file}: {item.reason}", markup=False, highlight=False)
        if len(whole.skipped) > 20:
            out_console.print(f"  … and {len(whole.skipped) - 20} more")


@app.command()
def train(
    out: Out,
    data: Data = "digits",
    root: Root = None,
    groups: Groups = None,
    unbalanced: Unbalanced = None,
    data_option: DataOption = None,
    model: Model = "resnet18",
    width: Width = None,
    model_option: ModelOption = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="Safetensors file to start from; with --epochs 0 it is taken as it is."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 160,
    lr: Annotated[
        float, typer.Option(help="Learning rate at the start; a tenth at 50 % and 75 % of the epochs.")
    ] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 256,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="Random crops and flips.")] = False,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train a base network on grouped images."""
    from fairline.jobs import train_job

    spec = data_spec(data, root, groups, unbalanced, data_option, seed)
    options = {**parse_options(model_option), **_drop_none(width=width)}
    with progress_bars() as progress:
        run = train_job(
            out,
            spec,
            model,
            options,
            weights=weights,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            augment=augment,
            seed=seed,
            device=device,
            progress=progress,
        )
    _say_best(run)


@app.command()
def linearize(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a train run.")],
    out: Out,
    budgets: Budgets = "0.5,0.1,0.02",
    method: Annotated[str, typer.Option(help=f"Linearizer: {', '.join(LINEARIZERS)}.")] = "snl",
    lr: Annotated[float | None, typer.Option(help="Learning rate of weights and masks (snl: 0.001).")] = None,
    lam: Annotated[float | None, typer.Option(help="Weight of Σ|m| at the start (snl: 1e-05).")] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Stop here at the latest (snl: 2000).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step (snl: 256).")] = None,
    granularity: Annotated[str | None, typer.Option(help="pixel, channel or layer (snl: pixel).")] = None,
    objective: ObjectiveName = "erm",
    mu: Mu = None,
    objective_option: ObjectiveOption = None,
    protect: Annotated[
        float | None,
        typer.Option(help="Keep ReLUs of use to the group that suffers most: exponent of their price (snl: 0)."),
    ] = None,
    empty_layers: Annotated[
        float | None,
        typer.Option(
            help="Empty whole layers, which saves rounds: those whose share of open ReLUs is below this part of "
            "the network's (snl, autorep: 0), or nats credited for it (coordinate_descent: 0)."
        ),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(help="What stands in a ReLU's place: identity or quadratic (identity; autorep: quadratic)."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Further option of the method, e.g. growth=1.2."),
    ] = None,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Switch off all but a budget of ReLUs; one run gives every budget."""
    from fairline.jobs import linearize_job

    named = _drop_none(
        lr=lr,
        lam=lam,
        max_epochs=max_epochs,
        batch_size=batch_size,
        granularity=granularity,
        protect=protect,
        empty_layers=empty_layers,
        surrogate=surrogate,
    )
    settings = {**parse_options(option), **named}
    with progress_bars() as progress:
        run = linearize_job(
            source,
            out,
            parse_budgets(budgets),
            method,
            objective,
            {**parse_options(objective_option), **_drop_none(mu=mu)},
            root=None if root is None else str(root),
            seed=seed,
            device=device,
            progress=progress,
            **settings,
        )
    _list_networks(run)


@app.command()
def finetune(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a linearize run.")],
    out: Out,
    objective: ObjectiveName = "erm",
    mu: Mu = None,
    objective_option: ObjectiveOption = None,
    distill: Annotated[
        bool, typer.Option("--distill/--no-distill", help="Learn from the base network's logits.")
    ] = True,
    preset: Annotated[
        str | None,
        typer.Option(help="Published settings: snl, deepreduce or deepreduce_fairness; options win over it."),
    ] = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="Random crops and flips.")] = False,
    select: Select = "accuracy",
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Finetune every network of a linearize run under knowledge distillation."""
    from fairline.jobs import finetune_job

    with progress_bars() as progress:
        run = finetune_job(
            source,
            out,
            objective,
            {**parse_options(objective_option), **_drop_none(mu=mu)},
            distill=distill,
            preset=preset,
            root=None if root is None else str(root),
            **_drop_none(epochs=epochs, lr=lr, batch_size=batch_size),
            augment=augment,
            select=select,
            seed=seed,
            device=device,
            progress=progress,
        )
    _list_networks(run)


@app.command("last-layer")
def last_layer(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a linearize or finetune run.")],
    out: Out,
    balance: Annotated[str, typer.Option(help="As many images of each: group or group_and_class.")] = "group",
    repeats: Annotated[int, typer.Option(help="Balanced subsets to average over.")] = 10,
    root: Root = None,
    seed: Seed = 0,
) -> None:
    """Retrain the last layer of every network of a run on group-balanced validation images."""
    from fairline.jobs import last_layer_job

    with progress_bars() as progress:
        run = last_layer_job(
            source,
            out,
            balance=balance,
            repeats=repeats,
            root=None if root is None else str(root),
            seed=seed,
            progress=progress,
        )
    _list_networks(run)


@app.command()
def audit(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of train, linearize or finetune runs.")
    ],
    out: Out,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also take every measure that explains who pays; takes minutes a network.")
    ] = False,
    measures: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(AUDIT_MEASURES)}.")] = "accuracy",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="MEASURE.KEY=VALUE", help="Option of a measure: curvature.samples=500."),
    ] = None,
    split: Annotated[str, typer.Option(help="Part to measure on: train, val or test.")] = "test",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 2000,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Measure every network of some runs, group by group, against the base network."""
    from fairline.jobs import audit_job

    with progress_bars() as progress:
        run = audit_job(
            sources,
            out,
            measures=_names(measures),
            options=parse_measure_options(option),
            explain=explain,
            split=split,
            resamples=resamples,
            root=None if root is None else str(root),
            seed=seed,
            device=device,
            progress=progress,
        )
    _print_audit(run)


Baseline = Annotated[
    str | None, typer.Option("--baseline", help="Method that the others are compared with (erm, else the first).")
]


@app.command()
def compare(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of linearize, finetune or last-layer runs.")
    ],
    out: Out,
    baseline: Baseline = None,
    split: Annotated[str, typer.Option(help="Part to measure on: train, val or test.")] = "test",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples, where there is one base network.")] = 2000,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Put methods side by side at equal ReLU budgets: paired differences by group, and the Pareto front.

    Runs of several base networks (seeds) are taken as replicates.
    """
    from fairline.jobs import compare_job

    with progress_bars() as progress:
        run = compare_job(
            sources,
            out,
            baseline=baseline,
            split=split,
            resamples=resamples,
            root=None if root is None else str(root),
            seed=seed,
            device=device,
            progress=progress,
        )
    _print_comparison(run)


@app.command()
def ablate(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a linearize run.")],
    out: Out,
    vary: Annotated[str, typer.Option(metavar="KEY=VALUE,...", help="Option of the objective, and its values.")] = (
        "mu=0.0005,0.005,0.01"
    ),
    objective: ObjectiveName = "lagrangian",
    objective_option: ObjectiveOption = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    select: Select = "last",
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Finetune with several values of an objective's option, by default μ (paper, Figure 15), and compare."""
    from fairline.jobs import ablate_job

    key, equals, values = vary.partition("=")
    if not equals or not key.strip():
        raise FairlineError(f"'{vary}' is not KEY=VALUE,….")
    with progress_bars() as progress:
        run = ablate_job(
            source,
            out,
            key.strip(),
            [_value(value) for value in _names(values)],
            objective,
            parse_options(objective_option),
            **_drop_none(epochs=epochs, lr=lr, batch_size=batch_size),
            select=select,
            root=None if root is None else str(root),
            seed=seed,
            device=device,
            progress=progress,
        )
    _print_comparison(run)


Store = Annotated[
    str,
    typer.Option("--out", metavar="STORE", help="Folder of all cells, or a path such as s3://bucket/studies."),
]


@study_app.command("run")
def study_run(
    specs: Annotated[
        list[Path], typer.Argument(metavar="SPEC...", help="YAML files, such as papers/fig6_utkface_race_snl.yaml.")
    ],
    out: Store,
    root: Root = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time, in processes that share the cores.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run the cells on a Ray cluster: auto, ray://HOST:PORT, or local."),
    ] = None,
    cpus: Annotated[float, typer.Option(help="CPUs of each cell on the cluster.")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs of each cell on the cluster; 0.25 lets four share one.")] = 0,
    results: Annotated[
        Path | None, typer.Option(help="Also write tables, figures and provenance there, under the study's name.")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="One of the scales that the file names, such as tiny.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what is left to do, and how long it takes.")
    ] = False,
    device: Device = None,
) -> None:
    """Run studies, or go on with them. Cells that studies have in common are run once."""
    from fairline.study.executors import Local, RayCluster
    from fairline.study.run import run_study, write_results
    from fairline.study.spec import load_spec

    chosen = [load_spec(spec, scale) for spec in specs]
    given = root or os.environ.get("FAIRLINE_DATA")
    folder = None if given is None else str(Path(given).expanduser().resolve())
    if dry_run:
        _print_estimate(chosen, out, folder, jobs, device)
        return
    if "://" not in out:
        out = str(Path(out).expanduser().resolve())
    executor = Local(jobs) if ray is None else RayCluster(ray, cpus, gpus)
    with progress_bars() as progress:
        runs = run_study(chosen, out, root=folder, executor=executor, device=device, progress=progress)
    for compared in runs.values():
        for run in compared.values():
            _print_comparison(run)
    if results is not None:
        for spec in chosen:
            out_console.print(f"Results: {write_results(spec, out, results)}", soft_wrap=True)


def _print_estimate(specs: list[Any], out: str, root: str | None, jobs: int, device: str | None) -> None:
    from fairline.study.estimate import estimate
    from fairline.study.storage import Storage

    table = estimate(specs, Storage(out), root=root, jobs=jobs, device=device)
    total = table["seconds"].sum()
    print_frame(table.set_index("kind"), "cells; seconds of those left, one after another", {"seconds": ",.0f"})
    unknown = ", ".join(table.loc[table["basis"].str.contains("unknown"), "kind"])
    rest = f", beside the cells whose time is not known ({unknown})" if unknown else ""
    out_console.print(f"About {_duration(total / jobs)} with {jobs} at a time, at most{rest}.", soft_wrap=True)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


CheckpointSources = Annotated[
    list[Path],
    typer.Argument(metavar="CHECKPOINT...", help="Run folders, or folders of single networks (RUN/networks/NAME)."),
]
RunProtocols = Annotated[str, typer.Option("--protocol", help="Comma-separated: cheetah, semi2k.")]
#: Kept here so that help need not load torch; a test compares it with the registry.
COST_MODELS = ("cheetah", "semi2k", "delphi", "cryptflow2")
CostProtocols = Annotated[str, typer.Option("--protocol", help=f"Comma-separated: {', '.join(COST_MODELS)}.")]
Wire = Annotated[
    str,
    typer.Option(
        "--network", help="Between the parties: loopback, lan (1 Gb/s, 0.3 ms), wan (100 Mb/s, 40 ms) or MBITS:MS."
    ),
]
RingBits = Annotated[int, typer.Option("--ring-bits", help="Of the ring that values are shared in: 64 or 128.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds without a word from the other party.")]
Parties = Annotated[
    Path, typer.Option("--parties", help="YAML file with the two addresses: 'model: HOST:PORT', 'image: HOST:PORT'.")
]


def _counts(text: str, what: str) -> list[int]:
    try:
        return [int(entry) for entry in _names(text)]
    except ValueError:
        raise FairlineError(f"{what} '{text}' are not whole numbers, separated by commas.") from None


@private_app.command("run")
def private_run(
    sources: CheckpointSources,
    protocol: RunProtocols = "cheetah",
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder to write, or to resume; without it nothing is kept.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images, at random from the split.")] = 1,
    batch_sizes: Annotated[str, typer.Option(help="Images in a call, comma-separated.")] = "1",
    repeats: Annotated[int, typer.Option(help="Timed calls of each batch; their median is told.")] = 3,
    network: Wire = "loopback",
    ring_bits: RingBits = 64,
    fraction_bits: Annotated[int, typer.Option(help="Of the fixed-point form.")] = 18,
    split: Annotated[str, typer.Option(help="Part that the images come from.")] = "test",
    timeout: Timeout = 120,
    root: Root = None,
    seed: Seed = 0,
) -> None:
    """Run networks between two processes: one holds the weights, the other the images. Seconds, bytes, rounds, error.

    A demonstration around SPU 0.9.5 (extra mpc), not a hardened service: semi-honest parties, public architecture and
    masks. See docs/private.md.
    """
    import tempfile

    import pandas as pd

    from fairline.private.jobs import private_job
    from fairline.private.plan import CAVEATS

    protocols = _names(protocol)
    with contextlib.ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fairline-"))) / "run"
        with progress_bars() as progress:
            run = private_job(
                sources,
                folder,
                protocols=protocols,
                images=images,
                batch_sizes=_counts(batch_sizes, "Batch sizes"),
                repeats=repeats,
                network=network,
                ring_bits=ring_bits,
                fraction_bits=fraction_bits,
                split=split,
                timeout=timeout,
                root=None if root is None else str(root),
                seed=seed,
                progress=progress,
            )
        table = pd.read_parquet(run.folder / "private.parquet")
    for (name, size), part in table.groupby(["protocol", "batch_size"], sort=False):
        shown = pd.DataFrame(
            {
                "ReLUs": part["relus"],
                "seconds": part["seconds"],
                "MB (predicted)": [
                    f"{found / 1e6:.2f} ({told / 1e6:.2f})"
                    for found, told in part[["bytes", "predicted_bytes"]].to_numpy()
                ],
                "rounds": part["rounds"],
                "error": part["max_abs_error"],
            }
        ).set_axis(part["network"])
        shown.index.name = "network"
        formats = {"ReLUs": ",.0f", "seconds": ".2f", "rounds": ".0f", "error": ".1e"}
        print_frame(shown, f"{name}, batch of {size}: one call", formats)
    out_console.print(f"Same class as in floating point: {table['agreement'].min():.1%} of the images, at least.")
    for name in protocols:
        first = table[table["protocol"] == name].iloc[0]
        out_console.print(
            f"{CAVEATS[name]} Setup once a session: {first['setup_seconds']:.1f} s, "
            f"{first['setup_bytes'] / 1e6:.1f} MB. Inside SPU: "
            f"{table.loc[table['protocol'] == name, 'engine_share'].min():.1%} of the time, at least.",
            soft_wrap=True,
            highlight=False,
        )
    if out is not None:
        out_console.print(f"Tables: {run.folder.resolve()}", soft_wrap=True)


@private_app.command("estimate")
def private_estimate(
    sources: CheckpointSources,
    protocol: CostProtocols = "cheetah",
    network: Annotated[
        str, typer.Option(help="Between the parties, comma-separated: loopback, lan, wan, MBITS:MS.")
    ] = ("lan,wan"),
    batch_size: Annotated[int, typer.Option(help="Images in a call.")] = 1,
    layers: Annotated[bool, typer.Option("--layers", help="Also show every layer.")] = False,
) -> None:
    """Predict what networks cost, without running them."""
    from fairline.private.cost import PROTOCOL_COSTS
    from fairline.private.jobs import estimate_networks

    protocols = _names(protocol)
    with progress_bars() as progress:
        totals, by_layer = estimate_networks(sources, protocols, _names(network), batch_size, progress)
    for name, part in totals.groupby("protocol", sort=False):
        shown = part.drop_duplicates("network").set_index("network")
        shown = shown[["relus", "relu_bytes", "linear_bytes", "offline_bytes", "rounds"]]
        for column in ("relu_bytes", "linear_bytes", "offline_bytes"):
            shown[column] /= 1e6
        shown.columns = ["ReLUs", "MB of ReLUs", "MB linear", "MB offline", "rounds"]
        # A protocol whose computing no source tells has no seconds.
        for wire, own in part.dropna(subset="seconds").groupby("wire", sort=False):
            shown[f"s over {wire}"] = own.set_index("network")["seconds"]
        formats = {str(column): ".2f" for column in shown} | {"ReLUs": ",.0f", "rounds": ".0f"}
        print_frame(shown, f"{name}, batch of {batch_size}: one call", formats)
    if layers:
        for (name, kind), part in by_layer.groupby(["network", "protocol"], sort=False):
            shown = part.set_index("layer")[["op", "relus", "bytes", "offline_bytes", "rounds"]]
            formats = {"relus": ",.0f", "bytes": ",.0f", "offline_bytes": ",.0f", "rounds": ".0f"}
            print_frame(shown, f"{name} on {kind}", formats)
    for name in protocols:
        out_console.print(f"{name}: {PROTOCOL_COSTS[name].source}.", soft_wrap=True, highlight=False)


@private_app.command("fixed-point")
def private_fixed_point(
    sources: CheckpointSources,
    out: Out,
    fraction_bits: Annotated[str, typer.Option(help="Of the fixed-point form, comma-separated.")] = "8,12,18",
    ring_bits: RingBits = 64,
    protocol: Annotated[
        str, typer.Option(help="ref2k (the same arithmetic in the clear), or cheetah or semi2k between two processes.")
    ] = "ref2k",
    samples: Annotated[int, typer.Option(help="Images of each group, at random; 0 for all.")] = 200,
    split: Annotated[str, typer.Option(help="Part that the images come from.")] = "test",
    root: Root = None,
    seed: Seed = 0,
) -> None:
    """Show whom fixed-point arithmetic hurts: agreement of private with plain predictions, by group."""
    import pandas as pd

    from fairline.private.jobs import fixed_point_job

    with progress_bars() as progress:
        run = fixed_point_job(
            sources,
            out,
            fraction_bits=_counts(fraction_bits, "Fraction bits"),
            ring_bits=ring_bits,
            protocol=protocol,
            samples=samples or None,
            split=split,
            root=None if root is None else str(root),
            seed=seed,
            progress=progress,
        )
    table = pd.read_parquet(run.folder / "fixed_point.parquet")
    table["cell"] = [
        f"{a:.1%} [{low:.0%}, {high:.0%}]" for a, low, high in table[["agreement", "low", "high"]].to_numpy()
    ]
    for name, part in table.groupby("network", sort=False):
        wide = part.pivot_table(index="group", columns="fraction_bits", values="cell", aggfunc="first", sort=False)
        print_frame(wide, f"{name}: same class as in floating point [95 % interval], by fraction bits")
    out_console.print(f"Table: {run.folder.resolve()}", soft_wrap=True)


@private_app.command("export")
def private_export(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of one network, or of a run with one.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write network.onnx (extra onnx).")] = False,
    root: Root = None,
) -> None:
    """Write a network for private inference: a public folder for both parties, weights for its owner."""
    from fairline.jobs import data_of
    from fairline.private.jobs import find_networks
    from fairline.private.serve import export_network

    found, run = find_networks([source])
    if len(found) != 1:
        names = ", ".join(checkpoint.folder.name for checkpoint in found)
        raise FairlineError(f"{source} holds {len(found)} networks ({names}); name the folder of one.")
    spec = data_of(run, None if root is None else str(root))
    graph = export_network(found[0], spec, out, onnx=onnx)
    out_console.print(
        f"{graph.relus:,} ReLUs are evaluated. For both parties: {out / 'public'}; "
        f"for the model's owner alone: {out / 'weights.safetensors'}",
        soft_wrap=True,
        highlight=False,
    )


@private_app.command("serve")
def private_serve(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="From 'fairline private export'.")],
    parties: Parties,
    sessions: Annotated[int, typer.Option(help="How many before it stops; 0 for no end.")] = 0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the image's owner.")] = 86_400,
    timeout: Timeout = 120,
) -> None:
    """Be the model's owner: answer queries with a network, one session after another."""
    from itertools import count

    from fairline.private.serve import load_addresses, serve
    from fairline.private.spu import SessionError

    addresses = load_addresses(parties)
    for session in count(1):
        err_console.print(f"Waiting at {addresses.model} for the image's owner ({addresses.image}).", highlight=False)
        try:
            serve(folder, addresses, wait=wait, timeout=timeout)
            out_console.print(f"Session {session} is done.", highlight=False)
        except SessionError as error:
            # One that broke off must not end the service, unless nothing is left to serve.
            if session == sessions:
                raise
            err_console.print(f"Session {session} failed: {error}", highlight=False, markup=False)
        if session == sessions:
            return


@private_app.command("query")
def private_query(
    public: Annotated[Path, typer.Argument(metavar="PUBLIC", help="Folder 'public' of 'fairline private export'.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    parties: Parties,
    protocol: Annotated[str, typer.Option(help="cheetah or semi2k.")] = "cheetah",
    wait: Annotated[float, typer.Option(help="Seconds to wait for the model's owner.")] = 60,
    timeout: Timeout = 120,
) -> None:
    """Be the image's owner: ask a network that another host holds for the classes of images it never sees."""
    from fairline.private.plan import CAVEATS
    from fairline.private.serve import load_addresses, query

    with progress_bars() as progress:
        answer = query(
            public, load_addresses(parties), images, protocol=protocol, wait=wait, timeout=timeout, progress=progress
        )
    for path, prediction, logits in zip(images, answer.predictions, answer.logits.tolist(), strict=True):
        values = ", ".join(f"{value:.3f}" for value in logits)
        out_console.print(f"{path}: {prediction} (logits {values})", soft_wrap=True, highlight=False, markup=False)
    out_console.print(
        f"{answer.seconds:.2f} s and {answer.bytes / 1e6:.2f} MB, after {answer.setup_seconds:.1f} s of setup. "
        f"{CAVEATS[protocol]}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def frontier(
    source: Annotated[Path, typer.Argument(metavar="AUDIT", help="Folder of an audit run.")],
    out: Out,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            "--measured", metavar="RUN", help="Folder of a 'private run'; other networks' costs are predicted."
        ),
    ] = None,
    fixed_point: Annotated[
        Path | None,
        typer.Option("--fixed-point", metavar="RUN", help="Folder of a 'private fixed-point' run, shown beside."),
    ] = None,
    protocol: CostProtocols = "cheetah",
    network: Wire = "lan",
    within: Annotated[float, typer.Option(help="Relative accuracy drop, in percent, that any group may suffer.")] = 5.0,
    results: Annotated[
        Path | None, typer.Option(help="Also write tables, figures and provenance to this folder.")
    ] = None,
) -> None:
    """Accuracy against cost: Pareto front, and the cheapest network that keeps every group's accuracy."""
    import pandas as pd

    from fairline.private.frontier import require_within
    from fairline.private.jobs import frontier_job
    from fairline.report.costs import answers, write_frontier, write_results

    require_within(within)
    with progress_bars() as progress:
        run = frontier_job(
            source,
            out,
            measured=measured or [],
            fixed_point=fixed_point,
            protocols=_names(protocol),
            network=network,
            progress=progress,
        )
    table = pd.read_parquet(run.folder / "frontier.parquet")
    for name, part in table.groupby("protocol", sort=False):
        shown = pd.DataFrame(
            {
                "ReLUs": part["relus"],
                "MB": part["bytes"] / 1e6,
                "rounds": part["rounds"],
                "seconds": part["seconds"],
                "overall": part["overall"],
                "worst group": part["worst"],
                "drop, %": part["largest_drop"],
                "front": part["on_bytes_front"].map({True: "◆", False: ""}),
            }
        ).set_axis(part["model"])
        shown.index.name = "network"
        formats = {"ReLUs": ",.0f", "MB": ".2f", "rounds": ".0f", "seconds": ".2f", "overall": ".1%"}
        print_frame(shown, f"{name} over {network}", formats | {"worst group": ".1%", "drop, %": "+.1f"})
    predicted = list(dict.fromkeys(table.loc[table["source"] == "predicted", "model"]))
    if predicted:
        out_console.print(f"Costs predicted, not measured: {', '.join(predicted)}.", soft_wrap=True, highlight=False)
    for sentence in answers(table, within):
        out_console.print(sentence, soft_wrap=True, highlight=False)
    path = write_frontier(run.folder, within=within)
    out_console.print(f"Page: {path.resolve()}", soft_wrap=True)
    if results is not None:
        out_console.print(f"Results: {write_results(run.folder, results)}", soft_wrap=True)


@study_app.command("status")
def study_status(
    store: Annotated[str, typer.Argument(metavar="STORE", help="What 'study run' writes.")],
) -> None:
    """Show how far studies are, and why cells failed."""
    from fairline.study.run import status

    table = status(store)
    for name, own in table.groupby("study", sort=False):
        shown = own.set_index("cell")[["kind", "state", "note"]]
        print_frame(shown, f"{name}: {(own['state'] == 'finished').sum()} of {len(own)} cells are finished")


Tables = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="Stores, folders of results (papers/results), or results.parquet files."),
]
Chosen = Annotated[
    str, typer.Option("--study", help="Names of studies, comma-separated; * stands for anything. All by default.")
]


def _chosen_results(sources: list[str], studies: str) -> pd.DataFrame:
    from fnmatch import fnmatchcase

    from fairline.study.store import read_results

    table = read_results(sources)
    held = list(table["study"].unique())
    patterns = _names(studies)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in held):
            raise FairlineError(f"There is no study '{pattern}' here; there are {', '.join(held)}.")
    names = [name for name in held if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return table[table["study"].isin(names)]


@study_app.command("figures")
def study_figures(
    sources: Tables,
    to: Annotated[Path, typer.Option("--to", help="Folder to write figure_01.png, … to.")],
    study: Chosen = "*",
    only: Annotated[str | None, typer.Option(help="Numbers in the paper, comma-separated; all by default.")] = None,
    formats: Annotated[str, typer.Option("--format", help="Comma-separated: png, svg, pdf.")] = "png,svg,pdf",
) -> None:
    """Draw the empirical figures of the paper (1, 3–9, 11–15) from what studies measured."""
    from fairline.report.figures import save_charts
    from fairline.report.paper_figures import FIGURES, draw

    wanted = _names(formats)
    for name in wanted:
        if name not in ("png", "svg", "pdf"):
            raise FairlineError(f"The format is png, svg or pdf, not '{name}'.")
    drawn = draw(_chosen_results(sources, study), None if only is None else _counts(only, "Figures"))
    files = save_charts({f"figure_{number:02d}": chart for number, chart in drawn.items()}, to, wanted)
    out_console.print(f"Figures {', '.join(map(str, drawn))}: {len(files)} files in {to}", soft_wrap=True)
    missing = [str(number) for number in FIGURES if number not in drawn]
    if missing and only is None:
        out_console.print(f"No study here holds what figures {', '.join(missing)} show.", soft_wrap=True)


@study_app.command("report")
def study_report(
    sources: Tables,
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
    study: Chosen = "*",
    table: Annotated[Path | None, typer.Option("--table", help="Also write the findings there, as CSV.")] = None,
) -> None:
    """Write the page that puts each claim of the paper beside what was measured and says whether it holds."""
    from fairline._io import write_text
    from fairline.report.claims import CLAIMS, findings, summary, write_claims

    rows = _chosen_results(sources, study)
    found = findings(rows)
    for number, verdict in summary(found).items():
        out_console.print(f"{number}. {CLAIMS[number].text} [b]{verdict}[/b]", soft_wrap=True, highlight=False)
    if table is not None:
        write_text(table, found.to_csv(index=False, float_format="%.5g"))
        out_console.print(f"Findings: {table.resolve()}", soft_wrap=True)
    out_console.print(f"Page: {write_claims(rows, found, out).resolve()}", soft_wrap=True)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of an audit, compare or frontier run.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="HTML file; report, comparison or frontier.html in that folder by default."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Also write each figure there, as SVG and PNG.")
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option("--costs", metavar="RUN", help="Folder of a frontier run of this audit: adds the cost panel."),
    ] = None,
    within: Annotated[float, typer.Option(help="Drop in percent that any group may suffer, for the cost panel.")] = 5.0,
) -> None:
    """Write the fairness report, the comparison page or the cost page: one HTML file that opens offline."""
    from fairline.report.comparison import write_comparison, write_comparison_figures
    from fairline.report.costs import write_cost_figures, write_frontier
    from fairline.report.html import write_figures, write_report
    from fairline.runs import Run

    command = Run.read(source, "audit", "compare", "frontier").command
    if costs is not None and command != "audit":
        raise FairlineError(f"The cost panel belongs to the report of an audit; {source} holds a {command} run.")
    if command == "audit":
        path = write_report(source, out, costs=costs, within=within)
    elif command == "frontier":
        path = write_frontier(source, out, within=within)
    else:
        path = write_comparison(source, out)
    out_console.print(f"Report: {path.resolve()}", soft_wrap=True)
    if figures is not None:
        writers = {"audit": write_figures, "compare": write_comparison_figures, "frontier": write_cost_figures}
        for file in writers[command](source, figures):
            out_console.print(f"Figure: {file}", soft_wrap=True)


@app.command()
def theory(
    out: Out = Path("theory"),
    seeds: Annotated[int, typer.Option(help="Networks of each kind in Figure 2; from 2 on.")] = 100,
) -> None:
    """Run the paper's theory: Figures 2 and 10, Proposition 4.1's rate, Appendix A.1, as pictures and tables."""
    from fairline.jobs import theory_job

    with progress_bars() as progress:
        run = theory_job(out, seeds=seeds, progress=progress)
    import pandas as pd

    table = pd.read_parquet(run.folder / "figure_2_summary.parquet")
    table["cell"] = [
        f"{100 * m:.1f} [{100 * a:.1f}, {100 * b:.1f}]" for m, a, b in table[["mean", "low", "high"]].to_numpy()
    ]
    wide = table.pivot_table(index="variant", columns="measure", values="cell", aggfunc="first", sort=False)
    print_frame(wide, f"accuracy in percent [95 % interval over {seeds} seeds]")
    balance = pd.read_parquet(run.folder / "appendix_a1.parquet")
    for count, part in balance.groupby("groups"):
        print_frame(
            part.set_index("group")[["n", "gradient_norm", "ratio", "inverse_size"]],
            f"Appendix A.1, {count} groups of digits at a minimum of the loss",
            {"n": ".0f", "gradient_norm": ".4g", "ratio": ".4g", "inverse_size": ".4g"},
        )
    out_console.print(f"Figures and tables: {run.folder.resolve()}", soft_wrap=True)


@app.command()
def demo(
    out: Out = Path("demo"),
    data: Data = "digits",
    root: Root = None,
    groups: Groups = None,
    unbalanced: Unbalanced = None,
    data_option: DataOption = None,
    model: Annotated[str | None, typer.Option("--model", help="Network (digits: cnn, else resnet18).")] = None,
    width: Width = None,
    budgets: Annotated[str | None, typer.Option("--budgets", help="ReLUs to keep (0.5,0.1,0.02).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of base training (digits: 40, else 20).")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Of each finetune (digits: 40, else 10).")] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Of mask learning, at most (digits: 200, else 40).")] = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train, linearize, finetune, audit, predict costs and report in one go, with settings for a short run on a CPU.

    On digits it needs no files. On faces: fairline demo --data utkface:race --root FOLDER --width 8 --out faces
    """
    from fairline.demo import run_demo
    from fairline.private.jobs import frontier_job
    from fairline.report.html import write_report

    spec = data_spec(data, root, groups, unbalanced, data_option, seed)
    with progress_bars() as progress:
        run = run_demo(
            out,
            spec,
            model=model,
            width=width,
            budgets=None if budgets is None else parse_budgets(budgets),
            epochs=epochs,
            finetune_epochs=finetune_epochs,
            max_epochs=max_epochs,
            seed=seed,
            device=device,
            progress=progress,
        )
        try:
            costs = frontier_job(
                run.folder, out / "frontier", protocols=["cheetah", "semi2k"], progress=progress
            ).folder
        except FairlineError as error:
            # A network of the user's own may use what private inference does not know.
            costs, reason = None, str(error)
    _print_audit(run)
    if costs is None:
        err_console.print(f"No costs in the report: {reason}", markup=False, highlight=False, soft_wrap=True)
    path = write_report(run.folder, out / "report.html", costs=costs)
    out_console.print(f"Report: {path.resolve()}", soft_wrap=True)


def _say_best(run: Run) -> None:
    import pandas as pd

    rows = pd.read_parquet(run.folder / "metrics.parquet")
    if rows.empty:
        out_console.print(f"The weights are taken as they are. Written to {run.folder}", soft_wrap=True)
        return
    best = rows.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    out_console.print(
        f"Best epoch {best['epoch']:.0f} of {len(rows)}: validation accuracy {best['val_accuracy']:.1%}, "
        f"worst group {best['val_worst_group_accuracy']:.1%}. Written to {run.folder}",
        soft_wrap=True,
    )


def _list_networks(run: Run) -> None:
    from fairline._io import read_json

    for folder in run.networks().values():
        info = read_json(folder / "network.json")
        out_console.print(
            f"{info['relus']:>9,} of {info['total']:,} ReLUs ({100 * info['relus'] / info['total']:.3g} %): {folder}",
            soft_wrap=True,
            highlight=False,
        )


def _print_comparison(run: Run) -> None:
    from fairline.audit.comparison import WORST
    from fairline.data.grouped import OVERALL
    from fairline.report.comparison import prepare, write_comparison
    from fairline.report.html import read_table

    frame = prepare(read_table(run, "comparison.parquet"))
    baseline = frame["baseline"].iloc[0]
    for budget, part in frame.groupby("budget", sort=False):
        accuracy = part[part["measure"] == "accuracy"].pivot_table(
            index="method", columns="group", values="value", sort=False
        )
        gains = part[part["measure"] == "gain"]
        by_group = gains[~gains["group"].isin([OVERALL, WORST])]
        worst = gains[gains["group"] == WORST].set_index("method")
        front = part[part["measure"] == "pareto"].set_index("method")["value"]
        table = accuracy[[OVERALL, WORST]].map("{:.1%}".format)
        table["gain of worst [95 %]"] = [
            f"{worst.loc[m, 'value']:+.1f} [{worst.loc[m, 'low']:+.1f}, {worst.loc[m, 'high']:+.1f}]"
            if m in worst.index
            else ""
            for m in table.index
        ]
        table["groups better"] = by_group[by_group["low"] > 0].groupby("method").size().reindex(table.index).fillna(0)
        table["worse"] = by_group[by_group["high"] < 0].groupby("method").size().reindex(table.index).fillna(0)
        table["front"] = ["◆" if front[m] else "" for m in table.index]
        table.index.name = "method"
        print_frame(table, f"{budget} of ReLUs, against {baseline}", {"groups better": ".0f", "worse": ".0f"})
    path = write_comparison(run.folder)
    out_console.print(f"Comparison: {path.resolve()}", soft_wrap=True)


def _print_audit(run: Run) -> None:
    from fairline.report.figures import prepare
    from fairline.report.html import read_table

    everything = prepare(read_table(run, "audit.parquet"), read_table(run, "counts.parquet"))
    frame = everything[everything["measure"] == "accuracy"].copy()
    frame["cell"] = [f"{v:.1%} [{low:.0%}, {high:.0%}]" for v, low, high in frame[["value", "low", "high"]].to_numpy()]
    for variant, part in frame.groupby("variant", sort=False):
        table = part.pivot_table(index="group", columns="budget", values="cell", aggfunc="first", sort=False)
        print_frame(table, f"accuracy [95 % interval] by ReLUs kept: {variant}")
        own = everything[everything["variant"] == variant]
        smallest = own[own["percent"] == own["percent"].min()]
        table = smallest.pivot_table(index="group", columns="measure", values="value", aggfunc="first", sort=False)
        shown = [name for name in EXPLAINED_BY if name in table]
        if shown:
            title = f"{smallest['budget'].iloc[0]} of ReLUs: {variant}"
            # Words wrap in a narrow terminal; names with underscores would be cut.
            words = table[shown].rename(columns=lambda name: name.replace("_", " "))
            print_frame(words, title, dict.fromkeys(words, ".4g"))


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        out_console.print(f"fairline {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads for torch.")] = None,
) -> None:
    """Options before the command."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Run the command line; bad input is one sentence and exit code 2."""
    try:
        app()
    except FairlineError as error:
        err_console.print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        err_console.print(
            f"Error: {error.strerror or error}{where}.", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
