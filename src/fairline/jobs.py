"""The jobs of the command line, each from run folder to run folder, each resumable after a kill."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fairline import linearize as linearizers
from fairline import objectives
from fairline._io import resolve_device, write_table
from fairline.audit import REGISTRY, Subject, audit_subject, explaining
from fairline.audit.comparison import BASE, Scored, compare
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.masking import masked_relus, surrogate_of
from fairline.runs import (
    DataSpec,
    ModelSpec,
    NetworkInfo,
    Run,
    count_relus,
    digest,
    load_info,
    load_network,
    load_weights,
    save_network,
)
from fairline.training import Progress, ProgressCallback, finetune, named_stage, train

logger = logging.getLogger(__name__)

#: Commands whose runs hold linearized networks.
STUDENTS = ("linearize", "finetune", "last-layer")


def train_job(
    out: str | Path,
    data: DataSpec,
    model: str,
    model_options: Mapping[str, Any] | None = None,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Train a base network into ``out``; ``settings`` go to :func:`fairline.train`.

    Args:
        out: Run folder.
        data: What to train on.
        model: Architecture; see :func:`fairline.models.build`.
        model_options: Its options.
        weights: A safetensors file to start from; with ``epochs=0`` they are taken as they are.
        seed: Of initialisation and training.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.
        settings: Of the training.

    Returns:
        The finished run.

    Raises:
        FairlineError: The input is wrong; the sentence says where.
    """
    where = resolve_device(device)
    spec, parts = data.load()
    _, channels, height, width = parts["train"].images.shape
    if height != width:
        raise FairlineError(f"{spec.name}: images are {height}×{width}; square ones are needed.")
    model_spec = ModelSpec(model, parts["train"].num_classes, channels, height, dict(model_options or {}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = model_spec.build()
    if weights is not None:
        load_weights(network, Path(weights))
    elif settings.get("epochs") == 0:
        raise FairlineError("A network that is not trained (epochs 0) needs weights.")
    total = count_relus(network, model_spec)
    config: dict[str, Any] = {"data": asdict(spec), "model": asdict(model_spec), "settings": settings, "seed": seed}
    if weights is not None:
        config["weights"] = {"file": str(Path(weights).resolve()), "digest": digest([Path(weights)])}
    with Run.write(out, "train", config, where) as run:
        if not run.finished:
            rows: list[dict[str, float]] = []
            if settings.get("epochs") != 0:
                rows = train(
                    network,
                    parts["train"],
                    parts["val"],
                    seed=seed,
                    device=where,
                    progress=progress,
                    checkpoint=run.checkpoint / "train.safetensors",
                    **settings,
                )
            run.write_metrics(rows)
            save_network(
                run.network_folder("base"),
                network,
                NetworkInfo(model_spec, "base", total, total, total, seed=seed),
            )
    return run


def linearize_job(
    source: str | Path,
    out: str | Path,
    budgets: Sequence[float],
    method: str = "snl",
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Linearize a base network to several budgets into ``out``; ``settings`` go to the method.

    With another ``objective`` than ``"erm"`` the masks are learned under it: fair placement.
    """
    where = resolve_device(device)
    parent = Run.read(source, "train")
    fair: dict[str, Any] = {}
    if objective != "erm" or objective_options:
        fair = {"objective": objective, "objective_options": dict(objective_options or {})}
        linearizer = linearizers.build(
            method, seed=seed, objective=objectives.build(objective, **fair["objective_options"]), **settings
        )
    else:
        linearizer = linearizers.build(method, seed=seed, **settings)
    marks = {"protect": "protect", "empty_layers": "layers emptied"}
    placement = " ".join(
        filter(None, [objective if fair else "", *(mark for key, mark in marks.items() if settings.get(key))])
    )
    teacher, info = load_network(parent.networks()["base"])
    linearizers.resolve_budgets(budgets, info.total)
    config = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "budgets": list(budgets),
        "method": method,
        **fair,
        "settings": settings,
        "seed": seed,
    }
    with Run.write(out, "linearize", config, where) as run:
        if not run.finished:
            _, parts = data_of(parent, root).load()
            rows: list[dict[str, float]] = []
            for cut in linearizer.linearize(
                teacher,
                parts["train"],
                budgets,
                device=where,
                progress=progress,
                checkpoint=run.checkpoint,
                history=rows,
            ):
                save_network(
                    run.network_folder(f"budget-{cut.budget}"),
                    cut.model,
                    NetworkInfo(
                        replace(info.model, options={**info.model.options, **cut.info.get("model_options", {})}),
                        "linearized",
                        cut.relus,
                        cut.total,
                        cut.budget,
                        method,
                        seed=seed,
                        reached=bool(cut.info.get("reached", True)),
                        placement=placement,
                        surrogate=surrogate_of(cut.model),
                    ),
                )
                logger.info("budget %d: kept %d of %d ReLUs; %s", cut.budget, cut.relus, cut.total, cut.info)
            run.write_metrics(rows)
    return run


def finetune_job(
    source: str | Path,
    out: str | Path,
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    distill: bool = True,
    preset: str | None = None,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Finetune every network of a linearize run into ``out``; ``settings`` go to :func:`fairline.finetune`.

    ``preset`` names one of ``fairline.linearize.FINETUNE_PRESETS``; settings and options that are given win over it.
    """
    where = resolve_device(device)
    parent = Run.read(source, "linearize")
    if preset is not None:
        if preset not in linearizers.FINETUNE_PRESETS:
            raise FairlineError(
                f"There is no preset '{preset}'; choose one of {', '.join(linearizers.FINETUNE_PRESETS)}."
            )
        chosen = linearizers.FINETUNE_PRESETS[preset]
        settings = {**chosen["settings"], **settings}
        objective_options = {**chosen["objective"], **(objective_options or {})}
    objectives.build(objective, **(objective_options or {}))
    config = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "objective": objective,
        "objective_options": dict(objective_options or {}),
        "distill": distill,
        "settings": settings,
        "seed": seed,
    }
    with Run.write(out, "finetune", config, where) as run:
        if not run.finished:
            _, parts = data_of(parent, root).load()
            teacher, _ = load_network(parent.base().networks()["base"])
            rows: list[dict[str, Any]] = []
            for position, (name, folder) in enumerate(parent.networks().items(), start=1):
                network, info = load_network(folder)
                stage = f"finetuning {position}/{len(parent.networks())} ({info.percent:.3g} % of ReLUs)"
                history: list[dict[str, float]] = []
                finetune(
                    network,
                    teacher if distill else None,
                    parts["train"],
                    parts["val"],
                    objective=objectives.build(objective, **(objective_options or {})),
                    seed=seed,
                    device=where,
                    progress=named_stage(progress, stage),
                    checkpoint=run.checkpoint / f"{name}.safetensors",
                    history=history,
                    **settings,
                )
                rows += [{"network": name, **row} for row in history]
                save_network(
                    run.network_folder(name),
                    network,
                    replace(info, stage="finetuned", objective=objective, seed=seed),
                )
            run.write_metrics(rows)
    return run


def last_layer_job(
    source: str | Path,
    out: str | Path,
    *,
    balance: str = "group",
    repeats: int = 10,
    root: str | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Run:
    """Retrain the last layer of every network of a linearize or finetune run on balanced validation data, into ``out``.

    See :func:`fairline.retrain_last_layer`.
    """
    parent = Run.read(source, *STUDENTS)
    config = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "balance": balance,
        "repeats": repeats,
        "seed": seed,
    }
    with Run.write(out, "last-layer", config, torch.device("cpu")) as run:
        if not run.finished:
            _, parts = data_of(parent, root).load()
            rows = []
            networks = parent.networks()
            for position, (name, folder) in enumerate(networks.items(), start=1):
                network, info = load_network(folder)
                said = objectives.retrain_last_layer(network, parts["val"], balance=balance, repeats=repeats, seed=seed)
                for strength, worst in said["worst_group_accuracy"].items():
                    rows.append(
                        {
                            "network": name,
                            "strength": strength,
                            "worst_group_accuracy": worst,
                            "chosen": strength == said["strength"],
                            "per_cell": said["per_cell"],
                        }
                    )
                objective = f"{info.objective} + last layer" if info.objective else "last layer"
                save_network(
                    run.network_folder(name), network, replace(info, stage="finetuned", objective=objective, seed=seed)
                )
                if progress is not None:
                    progress(Progress("retraining last layers", position, len(networks), name))
            run.write_metrics(rows)
    return run


def audit_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    measures: Sequence[str] = ("accuracy",),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    explain: bool = False,
    split: str = "test",
    resamples: int = 2000,
    with_base: bool = True,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Audit every network of some runs, and the base network that they come from, into ``out``.

    Each network's numbers are kept as soon as they are known, so an interrupted audit resumes at the next network.

    Args:
        sources: Folders of train, linearize or finetune runs with one base network.
        out: The run folder.
        measures: Which; see ``fairline.audit.REGISTRY``. The base network is left out where a reference is needed.
        options: Settings of measures, by name.
        explain: Also take every measure with which the paper explains the disparity.
        split: Part to measure on.
        resamples: Bootstrap resamples.
        with_base: Whether the base network has rows of its own; it is what the others are compared with anyway.
        root: Where the data are now, if they have moved.
        seed: Of the bootstrap and of every other random choice.
        device: The accelerator if there is one, by default.
        progress: Told how far it is.

    Returns:
        The run.

    Raises:
        FairlineError: The runs do not belong together, or a measure does not suit them.
    """
    where = resolve_device(device)
    if not sources:
        raise FairlineError("An audit needs at least one run.")
    require_split(split)
    runs = [Run.read(source, "train", *STUDENTS) for source in sources]
    base = runs[0].base()
    for run in runs[1:]:
        if run.base().folder.resolve() != base.folder.resolve():
            raise FairlineError(f"{run.folder} and {runs[0].folder} come from different base networks.")
    config = {
        "parent": base.parent_entry(),
        "sources": [run.parent_entry() for run in runs],
        "data": base.config["data"],
        "measures": list(measures),
        **({"options": {name: dict(own) for name, own in options.items()}} if options else {}),
        **({"explain": True} if explain else {}),
        **({} if with_base else {"with_base": False}),
        "split": split,
        "resamples": resamples,
        "seed": seed,
        "lineage": {str(run.folder.resolve()): run.config for source in runs for run in source.lineage()},
    }
    with Run.write(out, "audit", config, where) as run:
        if not run.finished:
            _, parts = data_of(base, root).load()
            network, _ = load_network(base.networks()["base"])
            reference = Subject(network, parts[split], None, where, seed, resamples, "base", progress)
            folders = {"base": base.networks()["base"]} if with_base else {}
            for source in runs:
                if source.command != "train":
                    folders |= {f"{source.folder.name}/{name}": path for name, path in source.networks().items()}
            tables, predictions = [], []
            for position, (name, folder) in enumerate(folders.items()):
                kept = [run.checkpoint / f"{position}.{part}.parquet" for part in ("audit", "predictions")]
                if not all(path.exists() for path in kept):
                    subject = reference
                    if name != "base":
                        subject = replace(
                            reference,
                            model=load_network(folder)[0],
                            reference=reference,
                            name=name,
                            samples={},
                            rows=[],
                            _kept={},
                        )
                    chosen = _measures(subject, measures, options, explain)
                    report = audit_subject(subject, list(chosen), split=split, options=chosen)
                    write_table(kept[0], report.to_frame())
                    write_table(kept[1], report.predictions.assign(model=name))
                info = load_info(folder)
                described = {
                    "stage": info.stage,
                    "method": info.method,
                    "objective": info.objective,
                    "placement": info.placement,
                    "surrogate": info.surrogate,
                    "relus": info.relus,
                    "total_relus": info.total,
                    "seed": info.seed,
                    "reached": info.reached,
                }
                tables.append(pd.read_parquet(kept[0]).assign(**described))
                predictions.append(pd.read_parquet(kept[1]))
                if progress is not None:
                    progress(Progress("auditing", position + 1, len(folders), name))
            counts = pd.concat([part.counts().assign(part=name) for name, part in parts.items()]).reset_index()
            write_table(run.folder / "counts.parquet", counts)
            write_table(run.folder / "predictions.parquet", pd.concat(predictions))
            write_table(run.folder / "audit.parquet", pd.concat(tables))
    return run


def method_label(run: Run, info: NetworkInfo) -> str:
    """What was done to a network after its base training: ``"masks lagrangian, lagrangian mu=0.005"``."""
    if info.stage == "base":
        return BASE
    parts = [] if not info.placement else [f"masks {info.placement}"]
    if info.surrogate != "identity":
        parts.append(info.surrogate)
    if run.command == "linearize":
        parts.append("not finetuned")
    own = run
    while own.command == "last-layer":
        own = own.lineage()[-2]
    if own.command == "finetune":
        options = " ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in own.config["objective_options"].items()
        )
        text = f"{own.config['objective']} {options}".strip()
        parts.append(text if own.config.get("distill", True) else f"{text}, labels only")
    if run.command == "last-layer":
        parts.append("last layer")
    label = ", ".join(parts)
    # The linearizer is named only where it is not the usual one.
    return label if info.method == "snl" else f"{info.method}: {label}"


def compare_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    baseline: str | None = None,
    split: str = "test",
    resamples: int = 2000,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Compare runs at equal budgets into ``out``; runs from several base networks (seeds) are replicates.

    Predictions are kept as soon as all of a base network's are known, so an interrupted comparison resumes there.

    Args:
        sources: Folders of linearize, finetune or last-layer runs.
        out: The run folder.
        baseline: Method to compare with, as the table names it; ``erm`` (plain distillation) by default, else the
            first.
        split: Part to measure on.
        resamples: Bootstrap resamples, where there is one base network.
        root: Where the data are now, if they have moved.
        seed: Of the bootstrap.
        device: The accelerator if there is one, by default.
        progress: Told how far it is.

    Returns:
        The run: ``comparison.parquet``, ``predictions.parquet``, ``layers.parquet``.

    Raises:
        FairlineError: The runs are of different data, or not the same for every base network.
    """
    where = resolve_device(device)
    if not sources:
        raise FairlineError("A comparison needs at least one run.")
    require_split(split)
    runs = [Run.read(source, *STUDENTS) for source in sources]
    families: dict[Path, list[Run]] = {}
    for run in runs:
        families.setdefault(run.base().folder.resolve(), []).append(run)
    bases = [Run.read(folder, "train") for folder in families]
    for base in bases[1:]:
        for key in ("name", "options"):
            if base.config["data"][key] != bases[0].config["data"][key]:
                raise FairlineError(f"{base.folder} and {bases[0].folder} were trained on different data.")
    config = {
        "sources": [run.parent_entry() for run in runs],
        "data": bases[0].config["data"],
        "baseline": baseline,
        "split": split,
        "resamples": resamples,
        "seed": seed,
        "lineage": {str(run.folder.resolve()): run.config for source in runs for run in source.lineage()},
    }
    with Run.write(out, "compare", config, where) as run:
        if not run.finished:
            tables, layers, counts = [], [], []
            count = sum(len(source.networks()) for source in runs) + len(bases)
            done = 0
            for position, (base, family) in enumerate(zip(bases, families.values(), strict=True)):
                kept = [run.checkpoint / f"{position}.{part}.parquet" for part in ("predictions", "layers", "counts")]
                networks = _labelled(base, family)
                if not all(path.exists() for path in kept):
                    _, parts = data_of(base, root).load()
                    data = parts[split]
                    found, masks = [], []
                    for (label, info), folder in networks:
                        model, _ = load_network(folder)
                        right = predict(model, data, device=where).argmax(1).cpu() == data.labels.cpu()
                        what = {"base": str(base.folder), "method": label, "relus": info.relus, "total": info.total}
                        found.append(
                            pd.DataFrame(
                                {
                                    **what,
                                    "sample": range(len(data)),
                                    "group": np.asarray(data.group_names)[data.groups.cpu().numpy()],
                                    "correct": right.numpy(),
                                }
                            )
                        )
                        masks += [
                            {
                                **what,
                                "placement": info.placement,
                                "linearizer": info.method,
                                "layer": name,
                                "kept": layer.num_kept,
                                "units": layer.kept.numel(),
                                "position": place,
                            }
                            for place, (name, layer) in enumerate(masked_relus(model).items())
                        ]
                        done += 1
                        if progress is not None:
                            progress(Progress("comparing", done, count, label))
                    write_table(kept[0], pd.concat(found))
                    write_table(kept[1], pd.DataFrame(masks))
                    write_table(kept[2], parts["train"].counts().reset_index())
                tables.append(pd.read_parquet(kept[0]))
                layers.append(pd.read_parquet(kept[1]))
                counts.append(pd.read_parquet(kept[2]))
            predictions = pd.concat(tables)
            groups = list(dict.fromkeys(predictions["group"]))
            replicates = [_scored(table, groups) for table in tables]
            if len({replicate.total for replicate in replicates}) > 1:
                raise FairlineError("The base networks have different numbers of ReLUs and cannot be replicates.")
            methods = list(dict.fromkeys(method for method, _ in replicates[0].correct if method != BASE))
            chosen = baseline or ("erm" if "erm" in methods else methods[0])
            table = compare(replicates, groups, chosen, resamples=resamples, seed=seed).assign(baseline=chosen)
            table["train_n"] = table["group"].map(pd.concat(counts).groupby("group")["n"].mean())
            write_table(run.folder / "predictions.parquet", predictions)
            write_table(run.folder / "layers.parquet", pd.concat(layers))
            write_table(run.folder / "comparison.parquet", table)
    return run


def _labelled(base: Run, family: Sequence[Run]) -> list[tuple[tuple[str, NetworkInfo], Path]]:
    """Every network of one base network, and the name of its method."""
    folder = base.networks()["base"]
    found = [((BASE, load_info(folder)), folder)]
    taken: dict[tuple[str, int], Path] = {}
    for run in family:
        for path in run.networks().values():
            info = load_info(path)
            label = method_label(run, info)
            other = taken.get((label, info.relus))
            if other is not None:
                raise FairlineError(
                    f"{run.folder} and {other} both hold '{label}' with {info.relus:,} ReLUs; compare one of them."
                )
            taken[label, info.relus] = run.folder
            found.append(((label, info), path))
    return found


def _scored(table: pd.DataFrame, group_names: Sequence[str]) -> Scored:
    parts = list(table.groupby(["method", "relus"], sort=False))
    index = {name: position for position, name in enumerate(group_names)}
    return Scored(
        parts[0][1]["group"].map(index).to_numpy(np.int64),
        {(str(method), int(relus)): part["correct"].to_numpy(bool) for (method, relus), part in parts},
        int(table["total"].iloc[0]),
    )


def ablate_job(
    source: str | Path,
    out: str | Path,
    vary: str,
    values: Sequence[Any],
    objective: str = "lagrangian",
    objective_options: Mapping[str, Any] | None = None,
    *,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Finetune a linearize run plainly and once for each value of an objective's option, and compare (Figure 15).

    Args:
        source: A linearize run.
        out: Folder of the finetune runs and of the comparison, ``compare``.
        vary: The option, such as ``"mu"``.
        values: What it takes.
        objective: The objective.
        objective_options: Its other options.
        root: Where the data are now, if they have moved.
        seed: Of every random choice.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.
        settings: Of the finetune.

    Returns:
        The compare run.

    Raises:
        FairlineError: There is no value, or the objective does not know the option.
    """
    if not values:
        raise FairlineError(f"No value of {vary} was given.")
    variants: list[tuple[str, str, dict[str, Any]]] = [("erm", "erm", {})]
    for value in values:
        options = {**(objective_options or {}), vary: value}
        objectives.build(objective, **options)
        variants.append((f"{vary}-{value:g}" if isinstance(value, float) else f"{vary}-{value}", objective, options))
    runs = []
    for name, chosen, options in variants:
        runs.append(
            finetune_job(
                source,
                Path(out) / name,
                chosen,
                options,
                root=root,
                seed=seed,
                device=device,
                progress=progress if progress is None else _prefixed(progress, name),
                **settings,
            ).folder
        )
    return compare_job(
        runs, Path(out) / "compare", baseline="erm", root=root, seed=seed, device=device, progress=progress
    )


def theory_job(out: str | Path, *, seeds: int = 100, progress: ProgressCallback | None = None) -> Run:
    """Run Figures 2 and 10, Proposition 4.1's rate and Appendix A.1 into ``out``: parquet tables, SVG and PNG figures.

    Args:
        out: The run folder.
        seeds: Networks of each kind in Figure 2.
        progress: Told how far it is.

    Returns:
        The run.

    Raises:
        FairlineError: Fewer than two seeds.
    """
    from fairline.data import load
    from fairline.report.figures import save_charts
    from fairline.theory import balance, figures, toy

    if seeds < 2:
        raise FairlineError(f"An interval over seeds needs two of them at least, not {seeds}.")
    with Run.write(out, "theory", {"seeds": seeds}, torch.device("cpu")) as run:
        if not run.finished:

            def seen(done: int, total: int) -> None:
                if progress is not None:
                    progress(Progress("Figure 2", done, total))

            result = toy.run(seeds, seen=seen)
            tables = {
                "figure_2": result.accuracy,
                "figure_2_summary": result.summary(),
                "proposition_4_1": figures.rates()[0],
                "appendix_a1": balance.check(load("digits").split(seed=0)[0]),
            }
            for name, table in tables.items():
                write_table(run.folder / f"{name}.parquet", table)
            charts = {
                "figure_2": figures.figure_2(result),
                "figure_10": figures.figure_10(),
                "proposition_4_1": figures.rate(),
            }
            save_charts(charts, run.folder)
    return run


def _measures(
    subject: Subject,
    measures: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None,
    explain: bool,
) -> dict[str, dict[str, Any]]:
    """Measures to take of one network, with their options."""
    has_reference = subject.reference is not None
    chosen: dict[str, dict[str, Any]] = {
        name: {}
        for name in ("accuracy", *measures)  # the report stands on accuracy
        # An unknown name is refused by the audit.
        if has_reference or name not in REGISTRY or not REGISTRY[name].needs_reference
    }
    if explain:
        chosen |= explaining(subject)
    for name, own in (options or {}).items():
        if name in chosen or name not in REGISTRY:
            chosen[name] = {**chosen.get(name, {}), **own}
        elif not REGISTRY[name].needs_reference or has_reference:
            raise FairlineError(f"Options are given for the measure '{name}', which is not taken.")
    return chosen


def require_split(split: str) -> None:
    """Refuse a part that data do not have.

    Raises:
        FairlineError: It is none of the three.
    """
    if split not in ("train", "val", "test"):
        raise FairlineError(f"The split is train, val or test, not '{split}'.")


def data_of(run: Run, root: str | None) -> DataSpec:
    """The run's data, from another folder if they have moved."""
    return run.data if root is None else replace(run.data, root=root)


def _prefixed(progress: ProgressCallback, name: str) -> ProgressCallback:
    return lambda update: progress(replace(update, stage=f"{name}: {update.stage}"))
