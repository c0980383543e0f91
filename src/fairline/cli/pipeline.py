"""Commands from data to report, each from run folder to run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fairline.cli.console import (
    err_console,
    list_networks,
    out_console,
    print_audit,
    print_comparison,
    print_compiled,
    print_frame,
    print_frontier,
    print_predicted,
    progress_bars,
    say_best,
    say_strengths,
    work_together,
)
from fairline.cli.options import (
    AUDIT_MEASURES,
    COST_MEASURES,
    COST_MODELS,
    LINEARIZERS,
    STRENGTHS,
    STUDENTS,
    Baseline,
    BatchSize,
    Budgets,
    Classes,
    CostProtocols,
    Critical,
    Data,
    DataOption,
    Device,
    Devices,
    Epochs,
    Groups,
    LearningRate,
    Log,
    Mean,
    Model,
    ModelOption,
    Mu,
    Normalization,
    ObjectiveName,
    ObjectiveOption,
    OtherGroups,
    Out,
    PrecisionOption,
    Root,
    Seed,
    Select,
    Std,
    Strategy,
    Students,
    Unbalanced,
    Width,
    Wire,
    Within,
    data_spec,
    drop_none,
    method_options,
    network_view,
    one_or_all,
    parse_budgets,
    parse_measure_options,
    parse_names,
    parse_numbers,
    parse_options,
    parse_value,
    with_prediction_options,
    with_table_options,
)
from fairline.errors import FairlineError

app = typer.Typer()


@app.command()
@with_table_options
def data(
    name: Annotated[
        str | None,
        typer.Argument(
            help="digits, utkface:race, cifar10, cifar100, tiny_imagenet, svhn, celeba:Smiling or folder; without a "
            "name all are listed."
        ),
    ] = None,
    root: Root = None,
    groups: Groups = None,
    unbalanced: Unbalanced = None,
    data_option: DataOption = None,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Decode the images to a file in the folder FAIRLINE_PACKED, for later commands."),
    ] = False,
    seed: Seed = 0,
    *,
    table: dict[str, Any],
) -> None:
    """Show a data set: its groups, the split, and the files that cannot be used."""
    from fairline import data as registry
    from fairline.data.grouped import too_few

    if name is None:
        here = registry.found_in(root)
        for each in registry.REGISTRY:
            out_console.print(f"{'✓' if each in here else ' '} {each}", highlight=False)
        out_console.print("✓: known by its files here, or needs none.")
        return
    spec = data_spec(name, root, groups, unbalanced, data_option, seed, table)
    with err_console.status(Text(f"reading {name}")):
        whole = registry.load(spec.name, spec.root, pack=pack, **spec.options)
    shape = "×".join(map(str, whole.images.shape[1:]))
    out_console.print(
        f"{whole.name}: {len(whole):,} images of {shape}, {whole.num_classes} classes, {whole.num_groups} groups"
    )
    out_console.print(f"columns: {', '.join(whole.metadata.columns)}", highlight=False, soft_wrap=True)
    if isinstance(whole.images, registry.PackedImages):
        out_console.print(f"The images are packed in {whole.images.file.folder}", highlight=False, soft_wrap=True)
    if whole.skipped:
        out_console.print(f"{len(whole.skipped)} files were skipped:")
        for item in whole.skipped[:20]:
            out_console.print(f"  {item.file}: {item.reason}", highlight=False)
        if len(whole.skipped) > 20:
            out_console.print(f"  … and {len(whole.skipped) - 20} more")
    # After the list: it may tell why a group is too small to be split.
    parts = dict(zip(("train", "val", "test"), whole.split(seed), strict=True))
    counts = whole.counts().assign(**{part: chosen.counts()["n"] for part, chosen in parts.items()})
    print_frame(
        counts,
        "images by group",
        {"n": ",.0f", "share_percent": ".2f", "train": ",.0f", "val": ",.0f", "test": ",.0f"},
    )
    if told := too_few(counts["test"], "test"):
        out_console.print(told, soft_wrap=True)
    if not whole.groups_are_classes:
        print_frame(whole.counts(by="class"), "images by group and class", {})


@app.command()
@with_table_options
def train(
    out: Out,
    data: Data = "digits",
    root: Root = None,
    groups: Groups = None,
    unbalanced: Unbalanced = None,
    data_option: DataOption = None,
    classes: Classes = None,
    normalization: Normalization = None,
    mean: Mean = None,
    std: Std = None,
    model: Model = "resnet18",
    width: Width = None,
    model_option: ModelOption = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            help="File to start from (safetensors, torch.save); with --epochs 0 its weights are taken as they are.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 160,
    lr: Annotated[
        float, typer.Option(help="Learning rate at the start; a tenth at 50 % and 75 % of the epochs.")
    ] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 256,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="Random crops and flips.")] = False,
    seed: Seed = 0,
    device: Device = None,
    devices: Devices = 1,
    strategy: Strategy = "auto",
    precision: PrecisionOption = None,
    log: Log = None,
    *,
    table: dict[str, Any],
) -> None:
    """Train a base network on grouped images."""
    from fairline.jobs import train_job

    spec = data_spec(data, root, groups, unbalanced, data_option, seed, table)
    spec = network_view(spec, classes, normalization, mean, std)
    options = {**parse_options(model_option), **drop_none(width=width)}
    run = work_together(
        train_job,
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
        devices=devices,
        strategy=strategy,
        log=(out, log),
        **drop_none(precision=precision),
    )
    say_best(run)


@app.command("import")
def import_network(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the base network's train run.")],
    out: Out,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="File of its weights, with masks or without; the base network's by default."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option("--masks", help="File of its masks of zeros and ones: safetensors, torch.save or .npz."),
    ] = None,
) -> None:
    """Take over a network that was linearized elsewhere, to finetune and audit it like one of fairline's own."""
    from fairline.jobs import import_job

    list_networks(import_job(source, out, weights=weights, masks=masks))


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
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Settings that reach the budgets in a few epochs, made for data and network (snl); options win "
            "over them. Quick, not as good.",
        ),
    ] = False,
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
            "the network's (snl, autorep: 0), or nats credited for it (coordinate_descent with within_layers=true: 0)."
        ),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="What stands in a ReLU's place: identity, quadratic, cubic or zero (identity; autorep, delphi: "
            "quadratic; safenet, at most: cubic)."
        ),
    ] = None,
    for_cost: Annotated[
        str | None,
        typer.Option(
            metavar="PROTOCOL",
            help=f"Empty layers first, the last ones, for what the network costs then: {', '.join(COST_MODELS)}.",
        ),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Of that cost, between the parties: loopback, lan, wan or MBITS:MS (lan).")
    ] = None,
    minimise: Annotated[
        str | None, typer.Option(help=f"What that cost is: {', '.join(COST_MEASURES)} (seconds).")
    ] = None,
    cost_option: Annotated[
        list[str] | None,
        typer.Option(
            "--cost-option", metavar="KEY=VALUE", help="Further option of that choice, e.g. may_lose=0.02 (accuracy)."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Further option of the method, e.g. growth=1.2."),
    ] = None,
    groups: OtherGroups = None,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
    devices: Devices = 1,
    strategy: Strategy = "auto",
    precision: PrecisionOption = None,
    log: Log = None,
) -> None:
    """Switch off all but a budget of ReLUs; one run gives every budget."""
    from fairline.jobs import linearize_job

    named = drop_none(
        lr=lr,
        lam=lam,
        max_epochs=max_epochs,
        batch_size=batch_size,
        granularity=granularity,
        protect=protect,
        empty_layers=empty_layers,
        surrogate=surrogate,
        precision=precision,
    )
    settings = {**method_options(option, linearize_job), **named}
    if quick:
        settings = _quick(source, parse_budgets(budgets), method, settings, root, device)
    costly = {**parse_options(cost_option), **drop_none(protocol=for_cost, network=network, minimise=minimise)}
    if costly and for_cost is None:
        raise FairlineError(f"{', '.join(costly)}: options of masks for a cost need a protocol, --for-cost.")
    run = work_together(
        linearize_job,
        source,
        out,
        parse_budgets(budgets),
        method,
        objective,
        {**parse_options(objective_option), **drop_none(mu=mu)},
        for_cost=costly or None,
        groups=one_or_all(groups),
        root=None if root is None else str(root),
        seed=seed,
        device=device,
        devices=devices,
        strategy=strategy,
        log=(out, log),
        **settings,
    )
    list_networks(run)


def _quick(
    source: Path, budgets: list[float], method: str, given: dict[str, Any], root: Path | None, device: str | None
) -> dict[str, Any]:
    """Settings for a short run, said and then used as if they had been given."""
    from fairline.jobs import quick_settings

    proposed = quick_settings(source, budgets, method, given, root=None if root is None else str(root), device=device)
    err_console.print(f"Quick settings: {proposed}", highlight=False, soft_wrap=True)
    return {**proposed.settings, **given}


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
    clip: Annotated[
        float | None, typer.Option(help="Norm that gradients are cut to; polynomials in ReLUs' places may need 1.")
    ] = None,
    select: Select = "accuracy",
    groups: OtherGroups = None,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
    devices: Devices = 1,
    strategy: Strategy = "auto",
    precision: PrecisionOption = None,
    log: Log = None,
) -> None:
    """Finetune every network of a linearize run under knowledge distillation."""
    from fairline.jobs import finetune_job

    run = work_together(
        finetune_job,
        source,
        out,
        objective,
        {**parse_options(objective_option), **drop_none(mu=mu)},
        distill=distill,
        preset=preset,
        groups=one_or_all(groups),
        root=None if root is None else str(root),
        **drop_none(epochs=epochs, lr=lr, batch_size=batch_size, precision=precision, clip=clip),
        augment=augment,
        select=select,
        seed=seed,
        device=device,
        devices=devices,
        strategy=strategy,
        log=(out, log),
    )
    list_networks(run)


@app.command("last-layer")
def last_layer(
    source: Students,
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            help="dfr (balanced images), afr (those that the network errs on weigh more) or self (those that it and "
            "the base network disagree on); the last two need no groups but to choose the strength."
        ),
    ] = "dfr",
    balance: Annotated[
        str, typer.Option(help="As many images of each (dfr): group, class or group_and_class.")
    ] = "group",
    part: Annotated[str, typer.Option(help="Of val or train; by class on train is cRT (Kang et al. 2020).")] = "val",
    repeats: Annotated[int, typer.Option(help="Balanced subsets to average over (dfr).")] = 10,
    strength: Annotated[
        str | None,
        typer.Option(
            help="C (dfr), γ (afr) or number of images (self); of several, as by default, one is chosen for each "
            "network on halves: 0.1,1,10."
        ),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(help="Choose among strengths that cost no more overall accuracy, in percentage points. Any."),
    ] = None,
    groups: OtherGroups = None,
    root: Root = None,
    seed: Seed = 0,
) -> None:
    """Retrain the last layer of every network of a run on held-out images, balanced ones by default."""
    from fairline.jobs import last_layer_job

    with progress_bars() as progress:
        run = last_layer_job(
            source,
            out,
            method=method,
            balance=balance,
            part=part,
            repeats=repeats,
            strength=parse_numbers(strength, "strength", STRENGTHS),
            within=within,
            groups=one_or_all(groups),
            root=None if root is None else str(root),
            seed=seed,
            progress=progress,
        )
    list_networks(run)


@app.command()
def adjust(
    source: Students,
    out: Out,
    method: Annotated[
        str, typer.Option(help="logit_adjust (class shares), tau_norm (weights' norms) or weight_scale (learned).")
    ] = "logit_adjust",
    tau: Annotated[
        str | None,
        typer.Option(
            help="Strength; of several, as by default, one is chosen for each network on the validation part: "
            "0.5,1,1.5."
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            help="How it is chosen: worst_group (highest, within --within of the overall accuracy), or largest_loss "
            "(of any group, against the base network: least)."
        ),
    ] = "worst_group",
    within: Annotated[float, typer.Option(help="Overall accuracy that may go, in percentage points.")] = 1.0,
    groups: OtherGroups = None,
    root: Root = None,
) -> None:
    """Raise the logits of rare classes in every network of a run, in its last layer: no training, no other cost."""
    from fairline.jobs import adjust_job

    with progress_bars() as progress:
        run = adjust_job(
            source,
            out,
            method=method,  # type: ignore[arg-type]
            tau=parse_numbers(tau, "tau", STRENGTHS),
            rule=rule,  # type: ignore[arg-type]
            within=within,
            groups=one_or_all(groups),
            root=None if root is None else str(root),
            progress=progress,
        )
    list_networks(run)
    say_strengths(run)


@app.command()
@with_prediction_options
def audit(
    out: Out,
    told: dict[str, Any],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help=f"Folders of train, {', '.join(STUDENTS)} or compile runs."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also take every measure that explains who pays; takes minutes a network.")
    ] = False,
    measures: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(AUDIT_MEASURES)}.")] = "accuracy",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="MEASURE.KEY=VALUE", help="Option of a measure: curvature.samples=500."),
    ] = None,
    groups: OtherGroups = None,
    split: Annotated[str, typer.Option(help="Part to measure on: train, val or test.")] = "test",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 2000,
    costs: Annotated[
        bool, typer.Option("--costs/--no-costs", help="Also predict what private inference of each network costs.")
    ] = True,
    within: Within = 5.0,
    critical: Critical = None,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
    devices: Devices = 1,
    strategy: Strategy = "auto",
) -> None:
    """Measure every network of some runs, or predictions in a file, group by group, and say which may ship."""
    from fairline.audit.verdict import require_within
    from fairline.jobs import audit_job

    require_within(within)
    if told:
        if sources or explain or option:
            raise FairlineError("An audit of --predictions has no networks: no runs, --explain or --option.")
        _audit_predictions(told, out, one_or_all(groups), resamples, seed, within, critical or ())
        return
    run = work_together(
        audit_job,
        sources or (),
        out,
        measures=parse_names(measures, "measure"),
        options=parse_measure_options(option),
        explain=explain,
        split=split,
        groups=one_or_all(groups),
        resamples=resamples,
        costs=costs,
        root=None if root is None else str(root),
        seed=seed,
        device=device,
        devices=devices,
        strategy=strategy,
    )
    print_audit(run, within, critical or ())


def _audit_predictions(
    told: dict[str, Any],
    out: Path,
    groups: str | list[str] | None,
    resamples: int,
    seed: int,
    within: float,
    critical: Sequence[str],
) -> None:
    from fairline.jobs import audit_predictions_job

    run = audit_predictions_job(out=out, groups=groups or "group", resamples=resamples, seed=seed, **told)
    print_predicted(run, within, critical)


@app.command()
def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help=f"Folders of {', '.join(STUDENTS[:-1])} or {STUDENTS[-1]} runs."),
    ],
    out: Out,
    baseline: Baseline = None,
    groups: OtherGroups = None,
    split: Annotated[str, typer.Option(help="Part to measure on: train, val or test.")] = "test",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples, where there is one base network.")] = 2000,
    within: Within = 5.0,
    critical: Critical = None,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Put methods side by side at equal ReLU budgets: which may ship, paired differences by group and class, the front.

    Runs of several base networks (seeds) are taken as replicates.
    """
    from fairline.audit.verdict import require_within
    from fairline.jobs import compare_job

    require_within(within)

    with progress_bars() as progress:
        run = compare_job(
            sources,
            out,
            baseline=baseline,
            split=split,
            groups=one_or_all(groups),
            resamples=resamples,
            root=None if root is None else str(root),
            seed=seed,
            device=device,
            progress=progress,
        )
    print_comparison(run, within, critical or [])


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
    groups: OtherGroups = None,
    root: Root = None,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionOption = None,
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
            [parse_value(value) for value in parse_names(values, f"value of {key.strip()}")],
            objective,
            parse_options(objective_option),
            **drop_none(epochs=epochs, lr=lr, batch_size=batch_size, precision=precision),
            select=select,
            groups=one_or_all(groups),
            root=None if root is None else str(root),
            seed=seed,
            device=device,
            progress=progress,
        )
    print_comparison(run)


@app.command()
def choose(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of finetune, last-layer or adjust runs that differ in one option."
        ),
    ],
    out: Out,
    reference: Annotated[
        Path,
        typer.Option(
            metavar="RUN", help="Plain distillation of the same masks and budgets, such as runs/ablation/erm."
        ),
    ],
    rule: Annotated[
        str,
        typer.Option(
            help="On validation images: worst_group (highest, within --within of the reference's overall accuracy), or "
            "largest_loss (of any group, against the base network: least)."
        ),
    ] = "worst_group",
    within: Annotated[float, typer.Option(help="Overall accuracy that may go, in percentage points.")] = 1.0,
    groups: OtherGroups = None,
    root: Root = None,
    device: Device = None,
) -> None:
    """Take the best strength of a method for each budget, on validation images; where none will do, the reference."""
    from fairline.jobs import choose_job

    with progress_bars() as progress:
        run = choose_job(
            sources,
            out,
            reference=reference,
            rule=rule,  # type: ignore[arg-type]
            within=within,
            groups=one_or_all(groups),
            root=None if root is None else str(root),
            device=device,
            progress=progress,
        )
    list_networks(run)
    say_strengths(run)


@app.command("compile")
def compile_networks(
    source: Students,
    out: Out,
    networks: Annotated[
        str, typer.Option(help="Which of its networks, comma-separated, such as budget-500; all by default.")
    ] = "",
    protocol: Annotated[
        str, typer.Option(help="Of the private inference: cheetah, semi2k, delphi or cryptflow2.")
    ] = "cheetah",
    network: Wire = "lan",
    batch_size: Annotated[int, typer.Option(help="Images in a call.")] = 1,
    minimise: Annotated[
        str, typer.Option(help="seconds, bytes or rounds, as the cost model predicts them.")
    ] = "seconds",
    max_weights: Annotated[int, typer.Option(help="Numbers that a compiled network's weights may be.")] = 100_000_000,
    split: Annotated[str, typer.Option(help="Part on whose images both networks are compared.")] = "test",
    root: Root = None,
) -> None:
    """Turn linearized networks into equal ones that cost what their ReLUs cost: what is affine becomes one matrix."""
    from fairline.jobs import compile_job
    from fairline.report.compiled import write_compiled

    with progress_bars() as progress:
        run = compile_job(
            source,
            out,
            networks=parse_names(networks, "network") if networks else (),
            protocol=protocol,
            network=network,
            batch_size=batch_size,
            minimise=minimise,
            max_weights=max_weights,
            split=split,
            root=None if root is None else str(root),
            progress=progress,
        )
    print_compiled(run.table("compiled.parquet"), run.table("plan.parquet"))
    out_console.print(f"Page: {write_compiled(run.folder).resolve()}", soft_wrap=True)


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
    within: Within = 5.0,
    critical: Critical = None,
    results: Annotated[
        Path | None, typer.Option(help="Also write tables, figures and provenance to this folder.")
    ] = None,
) -> None:
    """Accuracy against cost: Pareto front, and the cheapest network that may ship."""
    from fairline.audit.verdict import require_within
    from fairline.jobs.frontier import frontier_job
    from fairline.private.basis import PREDICTED
    from fairline.report.cost_parts import advice
    from fairline.report.costs import answers, by_name, prepare, write_frontier
    from fairline.report.results import write_frontier_results

    require_within(within)
    with progress_bars() as progress:
        run = frontier_job(
            source,
            out,
            measured=measured or [],
            fixed_point=fixed_point,
            protocols=parse_names(protocol, "protocol"),
            network=network,
            within=within,
            critical=critical or [],
            progress=progress,
        )
    table = by_name(prepare(run)[0])
    print_frontier(table, network)
    for (name, basis), part in table.groupby(["protocol", "basis"], sort=False):
        told = "predicted, not measured" if basis == PREDICTED else basis
        who = "; ".join(part["model"]) if len(part) < 4 else f"{len(part)} networks (the page tells which)"
        out_console.print(f"Costs on {name} {told}: {who}.", soft_wrap=True, highlight=False, markup=False)
    for sentence in [*advice(table), *answers(run, within, critical or [])]:
        out_console.print(sentence, soft_wrap=True, highlight=False)
    path = write_frontier(run.folder, within=within, critical=critical or [])
    out_console.print(f"Page: {path.resolve()}", soft_wrap=True)
    if results is not None:
        out_console.print(f"Results: {write_frontier_results(run.folder, results)}", soft_wrap=True)


@app.command()
def report(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of an audit, compare, frontier or compile run.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="HTML file; report, comparison, frontier or compiled.html there by default."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Also write each figure there, as SVG and PNG.")
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option("--costs", metavar="RUN", help="Folder of a frontier run of this audit: adds the cost panel."),
    ] = None,
    within: Within = 5.0,
    critical: Critical = None,
) -> None:
    """Write the fairness report, or the page of a comparison, frontier or compilation: one HTML file, for offline."""
    from fairline.report.comparison import write_comparison, write_comparison_figures
    from fairline.report.compiled import write_compiled, write_compiled_figures
    from fairline.report.costs import write_cost_figures, write_frontier
    from fairline.report.html import write_figures, write_report
    from fairline.report.predicted import write_predicted, write_predicted_figures
    from fairline.runs import Run

    command = Run.read(source, "audit", "audit-predictions", "compare", "frontier", "compile").command
    if costs is not None and command != "audit":
        raise FairlineError(f"The cost panel belongs to the report of an audit; {source} holds a {command} run.")
    if critical and command == "compile":
        raise FairlineError(f"A critical class is of a page that judges networks; {source} holds a compile run.")
    if command == "audit":
        path = write_report(source, out, costs=costs, within=within, critical=critical or ())
    elif command == "frontier":
        path = write_frontier(source, out, within=within, critical=critical or [])
    elif command == "compile":
        path = write_compiled(source, out)
    elif command == "audit-predictions":
        path = write_predicted(source, out, within=within, critical=critical or ())
    else:
        path = write_comparison(source, out, within=within, critical=critical or [])
    out_console.print(f"Report: {path.resolve()}", soft_wrap=True)
    if figures is not None:
        writers = {
            "audit": write_figures,
            "compare": write_comparison_figures,
            "frontier": write_cost_figures,
            "compile": write_compiled_figures,
            "audit-predictions": write_predicted_figures,
        }
        for file in writers[command](source, figures):
            out_console.print(f"Figure: {file}", soft_wrap=True)


@app.command()
def theory(
    out: Out = Path("theory"),
    seeds: Annotated[int, typer.Option(help="Networks of each kind in Figure 2; from 2 on.")] = 100,
) -> None:
    """Run the paper's theory: Figures 2 and 10, Proposition 4.1's rate, Appendix A.1, as pictures and tables."""
    from fairline.jobs import theory_job
    from fairline.report.theory import write_theory_figures

    with progress_bars() as progress:
        run = theory_job(out, seeds=seeds, progress=progress)
    write_theory_figures(run.folder)

    table = run.table("figure_2_summary.parquet")
    table["cell"] = [
        f"{100 * m:.1f} [{100 * a:.1f}, {100 * b:.1f}]" for m, a, b in table[["mean", "low", "high"]].to_numpy()
    ]
    wide = table.pivot_table(index="variant", columns="measure", values="cell", aggfunc="first", sort=False)
    print_frame(wide, f"accuracy in percent [95 % interval over {seeds} seeds]")
    balance = run.table("appendix_a1.parquet")
    for count, part in balance.groupby("groups"):
        print_frame(
            part.set_index("group")[["n", "gradient_norm", "ratio", "inverse_size"]],
            f"Appendix A.1, {count} groups of digits at a minimum of the loss",
            {"n": ".0f", "gradient_norm": ".4g", "ratio": ".4g", "inverse_size": ".4g"},
        )
    out_console.print(f"Figures and tables: {run.folder.resolve()}", soft_wrap=True)


@app.command()
@with_table_options
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
    *,
    table: dict[str, Any],
) -> None:
    """Train, linearize, finetune, audit, predict costs and report in one go, with settings for a short run on a CPU.

    On digits it needs no files. On faces: fairline demo --data utkface:race --root FOLDER --width 8 --out faces
    """
    from fairline.jobs import run_demo
    from fairline.jobs.frontier import frontier_job
    from fairline.report.html import write_report

    spec = data_spec(data, root, groups, unbalanced, data_option, seed, table)
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
    print_audit(run)
    if costs is None:
        err_console.print(f"No costs in the report: {reason}", highlight=False, soft_wrap=True)
    path = write_report(run.folder, out / "report.html", costs=costs)
    out_console.print(f"Report: {path.resolve()}", soft_wrap=True)
