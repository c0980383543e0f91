"""One tidy table of all that a study measured: a row a network, group and measure, with where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fairline._io import read_json, write_table
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.jobs import by_seed, choices, constraints, told_by_seed
from fairline.runs import Run
from fairline.study.cell import Cell
from fairline.study.cells import cells_of
from fairline.study.spec import StudySpec
from fairline.study.storage import Storage

#: Columns of the table, in their order.
COLUMNS = (
    "study",
    "scale",
    "data",
    "data_label",
    "data_options",
    "model",
    "model_options",
    "seed",
    "stage",
    "method",
    "masks",
    "placement",
    "surrogate",
    "objective",
    "objective_options",
    "finetune",
    "strength",
    "tried",
    "relus",
    "total_relus",
    "asked",
    "percent",
    "reached",
    "split",
    "group",
    "class",
    "measure",
    "value",
    "low",
    "high",
    "n",
    "train_n",
    "spec_hash",
    "cell",
    "commit",
    "device",
    "versions",
    "started",
)


def finished_seeds(spec: StudySpec, storage: Storage) -> list[int]:
    """The seeds of a study of which every network is made and measured."""
    return [
        seed
        for seed in spec.seeds
        if all(storage.finished(cell) for cell in cells_of(spec, [seed]) if cell.kind != "compare")
    ]


def collect(spec: StudySpec, storage: Storage, seeds: Sequence[int] | None = None) -> pd.DataFrame:
    """Gather the audits of a study.

    Args:
        spec: The study.
        storage: Where its cells are; those that are not finished are left out.
        seeds: Only those of some seeds.

    Returns:
        The table, empty if no audit is finished, with the columns :data:`COLUMNS`. ``value``, ``low`` and ``high``
        (95 % limits, missing where a measure has none) have the unit of the measure; of constraints on groups
        (``train_violation``, ``val_violation``, ``lambda``) ``split`` is the part that they were taken on; ``class``
        is empty but for rows of one class (its recall, in all images or in a group); ``strength`` is what was chosen
        on validation images, or the one value of a sweep that a network stands for, and ``tried`` how many were tried;
        ``n`` counts images measured, ``train_n`` training images; ``asked`` is the ReLU count that the network was
        made for, ``relus`` what it has; options and ``versions`` are JSON; ``cell`` names the audit in the store,
        ``commit``, ``device``, ``versions`` and ``started`` are those of the run that made the network.

    Raises:
        FairlineError: A file is broken.
    """
    measured = [cell for cell in cells_of(spec, seeds) if cell.kind == "audit" and storage.finished(cell)]
    if not measured:
        return pd.DataFrame(columns=list(COLUMNS))
    return pd.concat([_of_audit(spec, storage, cell) for cell in measured], ignore_index=True)[list(COLUMNS)]


def _of_audit(spec: StudySpec, storage: Storage, cell: Cell) -> pd.DataFrame:
    """What one audit measured, and where its networks come from."""
    folder, parent = storage.fetch(cell), storage.fetch(cell.parents[0])
    table, counts = _with_class(_read(folder / "audit.parquet")), _read(folder / "counts.parquet")
    lacking = _constrained(table, counts, Run(parent))
    table = pd.concat([table, lacking], ignore_index=True) if len(lacking) else table
    made = read_json(parent / "environment.json")
    sizes = counts[counts["part"] == "train"].set_index("group")["n"]
    known = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in cell.about.items()}
    known |= _chosen(table, parent, str(cell.about.get("strength", "")))
    return table.drop(columns=["model", "seed"]).assign(
        study=spec.name,
        scale=spec.said,
        spec_hash=spec.digest,
        cell=cell.key,
        asked=_asked(table),
        percent=100 * table["relus"] / table["total_relus"],
        train_n=table["group"].map(sizes).fillna(sizes.sum()).astype(int),
        commit=made["commit"],
        device=made["device"],
        versions=json.dumps(made["packages"]),
        started=made["started"],
        **known,
    )


def _constrained(table: pd.DataFrame, counts: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Rows of what each network's constraints still lack, on which part; λ is moved after training epochs."""
    found = constraints(run).rename(columns={"network": "name"})
    found["split"] = found["measure"].str.extract(r"^(\w+)_violation$")[0].fillna("train")
    found = found.merge(counts.rename(columns={"part": "split"})[["split", "group", "n"]], on=["split", "group"])
    own = table[(table["measure"] == "accuracy") & (table["class"] == "") & (table["group"] != OVERALL)]
    own = own.assign(name=own["model"].str.rpartition("/")[2])
    return own.drop(columns=["measure", "value", "low", "high", "split", "n"]).merge(found, on=["name", "group"])


def _chosen(table: pd.DataFrame, folder: Path, strength: str) -> dict[str, Any]:
    """Columns of what was tried on validation data for each network, and what was taken; ``strength`` of one value."""
    found = choices(Run(folder))
    names = table["model"].str.rpartition("/")[2]
    tried = names.map(lambda name: found.get(name, (1, ""))[0])
    told = names.map(lambda name: found.get(name, (1, ""))[1])
    return {"tried": tried, "strength": told.where(told != "", strength)}


def keep(spec: StudySpec, storage: Storage) -> pd.DataFrame:
    """:func:`collect` a study and write the table to ``STUDY/results.parquet`` in its store."""
    table = collect(spec, storage)
    target = storage.local / spec.name / "results.parquet"
    write_table(target, table)
    storage.upload(target, f"{spec.name}/results.parquet")
    return table


def _asked(table: pd.DataFrame) -> pd.Series[Any]:
    """The budget that each network was made for, by the name of its folder."""
    budget = table["model"].str.extract(r"budget-(\d+)$")[0].astype(float)
    return budget.fillna(table["total_relus"]).astype(int)


def read_results(sources: Sequence[str | Path]) -> pd.DataFrame:
    """Read the tables of studies.

    Args:
        sources: Stores, folders of results (such as ``papers/results``), or ``results.parquet`` files.

    Returns:
        All rows.

    Raises:
        FairlineError: There is nothing, or a file is broken or of something else.
    """
    tables = []
    for source in sources:
        tables += _tables(str(source))
    return pd.concat(tables, ignore_index=True)


def read_by_seed(sources: Sequence[str | Path], studies: Sequence[str]) -> pd.DataFrame:
    """Read what the comparisons of studies say of each seed.

    Args:
        sources: As of :func:`read_results`.
        studies: Names of those that are asked for.

    Returns:
        Rows as of :func:`fairline.jobs.by_seed` with ``study`` and ``results``, the name of the data in it; each once,
        whatever sources hold it. Empty where no study was compared, or by an earlier version alone.

    Raises:
        FairlineError: There is nothing, or a file is broken or of something else.
    """
    tables = [table for source in sources for table in _compared(str(source), studies)]
    if not tables:
        return pd.DataFrame()
    names = ["study", "results", "seed", "relus", "method", "group", "class", "measure"]
    return pd.concat(tables, ignore_index=True).drop_duplicates(names, ignore_index=True)


def _compared(source: str, studies: Sequence[str]) -> Iterator[pd.DataFrame]:
    if _is_store(source):
        storage, specs = _studies(source)
        for spec in specs:
            if spec.name in studies:
                yield from _comparisons(spec, storage)
        return
    for file in _files(source):
        beside, study = file.with_name("by_seed.parquet"), _checked(file)["study"].iloc[0]
        if study in studies and beside.exists():
            yield _read(beside).assign(study=study)


def _comparisons(spec: StudySpec, storage: Storage) -> Iterator[pd.DataFrame]:
    """Of all seeds, else of those that are finished, as ``study results`` compares them."""
    for seeds in filter(None, (spec.seeds, finished_seeds(spec, storage))):
        # Beside each stands one of all strengths, which says nothing else of plain distillation.
        cells = [each for each in cells_of(spec, seeds) if each.kind == "compare"]
        own = [each for each in cells if each.about["results"] == each.about["data_label"] and storage.finished(each)]
        runs = [Run.read(storage.fetch(cell), "compare") for cell in own]
        if told := [(cell, run) for cell, run in zip(own, runs, strict=True) if told_by_seed(run)]:
            for cell, run in told:
                yield by_seed(run).assign(study=spec.name, results=cell.about["results"])
            return


def _is_store(source: str) -> bool:
    return "://" in source or (Path(source) / "cells").is_dir()


def _studies(source: str) -> tuple[Storage, list[StudySpec]]:
    storage = Storage(source)
    specs = [StudySpec.model_validate(storage.read_json(f"{name}/spec.json")) for name in storage.studies()]
    if not specs:
        raise FairlineError(f"{source} holds no study (there is no */spec.json).")
    return storage, specs


def _files(source: str) -> list[Path]:
    path = Path(source)
    files = (
        [path] if path.is_file() else [*sorted(path.glob("results.parquet")), *sorted(path.glob("*/results.parquet"))]
    )
    if not files:
        raise FairlineError(f"{source} holds no results of a study (no results.parquet, there or one folder down).")
    return files


def _tables(source: str) -> list[pd.DataFrame]:
    if _is_store(source):
        storage, specs = _studies(source)
        tables = [table for spec in specs if len(table := collect(spec, storage))]
        if not tables:
            raise FairlineError(f"{source}: no network of a study is measured yet.")
        return tables
    return [_checked(file) for file in _files(source)]


def _checked(file: Path) -> pd.DataFrame:
    table = _with_choices(_with_class(_read(file)))
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise FairlineError(f"{file} is not the table of a study: it has no column '{missing[0]}'.")
    return table


def _with_class(table: pd.DataFrame) -> pd.DataFrame:
    """Audits of earlier versions told of no class."""
    return table if "class" in table else table.assign(**{"class": ""})


def _with_choices(table: pd.DataFrame) -> pd.DataFrame:
    """Tables of earlier versions do not say what was tried for a network."""
    return table if "tried" in table else table.assign(strength="", tried=float("nan"))


def _read(file: Path) -> pd.DataFrame:
    """Read a table.

    Returns:
        Its rows.

    Raises:
        FairlineError: It is missing or cut short; says what to do.
    """
    import pyarrow

    try:
        return pd.read_parquet(file)
    except FileNotFoundError:
        raise FairlineError(f"{file} does not exist; remove the folder {file.parent} to compute it again.") from None
    except (OSError, pyarrow.ArrowException):
        raise FairlineError(
            f"{file} is cut short or broken; remove the folder {file.parent} to compute it again."
        ) from None
