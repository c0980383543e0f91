"""What is worth committing of a study or a frontier: tables, figures, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fairline import jobs
from fairline._io import atomic_path, make_folder, read_json, write_table, write_text
from fairline.audit.comparison import BASE
from fairline.charts import save_charts
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.report import costs
from fairline.report.comparison import write_comparison_figures
from fairline.report.html import write_report
from fairline.report.paper_figures import draw_shifted
from fairline.runs import Run, provenance
from fairline.study.cells import cells_of
from fairline.study.spec import StudySpec
from fairline.study.storage import Storage
from fairline.study.store import collect, keep

#: Of the files of a study's results: 2 since its comparisons are told by seed, so that results can be merged.
FORMAT = 2


def write_study_results(
    spec: StudySpec, out: str | Path, results: str | Path, seeds: Sequence[int] | None = None
) -> Path:
    """Write what is worth committing: a table and the figures of each data set, and where they come from.

    Args:
        spec: The study.
        out: The store of its finished cells.
        results: Folder of all results; a subfolder named after the study is written.
        seeds: Those whose cells are finished and compared; all by default.

    Returns:
        The subfolder.
    """
    storage = Storage(str(out))
    cells = cells_of(spec, seeds)
    folder = make_folder(Path(results) / spec.name)
    table = keep(spec, storage) if seeds is None else collect(spec, storage, seeds)
    told = []
    for cell in cells:
        if cell.kind != "compare":
            continue
        name = cell.about["results"]
        run = Run.read(storage.fetch(cell), "compare")
        comparison = run.table("comparison.parquet")
        write_comparison(comparison, folder / f"{name}.csv")
        sizes = table[(table["data_label"] == cell.about["data_label"]) & (table["group"] != OVERALL)]
        sizes = sizes.drop_duplicates(["seed", "group"])[["seed", "group", "train_n"]]
        told.append(jobs.by_seed(run).merge(sizes, "left", ["seed", "group"]).assign(results=name))
        _write_line(run, str(comparison["baseline"].iloc[0]), folder / f"{name}_null_front.csv")
        for file in write_comparison_figures(run.folder, folder):
            if file.suffix == ".png":
                file.replace(folder / f"{name}_{file.name}")
            else:
                file.unlink()
    compared = pd.concat(told, ignore_index=True)
    save_charts(draw_shifted(table, compared.assign(study=spec.name)), folder, ["png"])
    write_table(folder / "by_seed.parquet", compared)
    write_table(folder / "results.parquet", table)
    machines: list[dict[str, Any]] = [read_json(storage.fetch(cell) / "environment.json") for cell in cells]
    content = {
        "format": FORMAT,
        "study": spec.name,
        "scale": spec.said,
        "spec_hash": spec.digest,
        "seeds": spec.seeds if seeds is None else list(seeds),
        "planned": spec.seeds,
        **provenance(machines),
    }
    write_text(folder / "provenance.json", json.dumps(content, indent=2) + "\n")
    return folder


def write_comparison(table: pd.DataFrame, target: Path) -> None:
    """Write the rows of a comparison as CSV."""
    shown = table.assign(**{name: table[name].map("{:.5g}".format) for name in ("value", "low", "high", "percent")})
    with atomic_path(target) as temporary:
        shown.to_csv(temporary, index=False)


def _write_line(run: Run, baseline: str, target: Path) -> None:
    """Write what shifts reach for nothing: accuracies of the baseline and the base network under every strength."""
    # Made before the line was drawn.
    if not (run.folder / "null_front.parquet").exists():
        return
    shifts = run.table("null_front.parquet")
    rows = shifts[shifts["method"].isin([BASE, baseline]) & (shifts["part"] == run.config["split"])]
    seeds = {base: int(run.config["lineage"][base]["seed"]) for base in rows["base"].unique()}
    rows = rows.assign(seed=rows["base"].map(seeds))
    with atomic_path(target) as temporary:
        columns = ["method", "relus", "seed", "tau", "group", "accuracy"]
        rows[columns].to_csv(temporary, index=False, float_format="%.5g")


def write_audits(sources: Sequence[str | Path], studies: Sequence[str], target: str | Path) -> list[Path]:
    """Write the fairness report of every finished audit of some studies.

    Args:
        sources: Their stores.
        studies: Names of the studies.
        target: Folder of the pages, ``STUDY/DATA-SEED/NAME.html``.

    Returns:
        The pages.

    Raises:
        FairlineError: No source is a store, which alone holds audits.
    """
    pages = []
    for source in sources:
        storage = Storage(str(source))
        for name in storage.studies() if storage.remote or (Path(source) / "cells").is_dir() else []:
            if name not in studies:
                continue
            spec = StudySpec.model_validate(storage.read_json(f"{name}/spec.json"))
            for cell in cells_of(spec):
                if cell.kind == "audit" and storage.finished(cell):
                    page = Path(target) / name / f"{cell.where}.html"
                    make_folder(page.parent)
                    pages.append(write_report(storage.fetch(cell), page))
    if not pages:
        raise FairlineError("No store with finished audits was given; tables of results hold none.")
    return pages


def write_frontier_results(folder: str | Path, target: str | Path) -> Path:
    """Write what is worth committing of a frontier run: tables, figures, and where they come from.

    Args:
        folder: Of the frontier run.
        target: Folder to write: ``frontier.csv``, ``measured.csv`` and ``fixed_point.csv`` where there are such, PNG
            figures and ``provenance.json``.

    Returns:
        The folder.
    """
    run = Run.read(folder, "frontier")
    out = make_folder(target)
    table, _ = costs.prepare(run)
    measured = [Run.read(entry["folder"], "private-run") for entry in run.config["measured"]]
    tables = {"frontier.csv": table}
    if measured:
        tables["measured.csv"] = pd.concat([each.table("private.parquet") for each in measured])
    if (run.folder / "fixed_point.parquet").exists():
        tables["fixed_point.csv"] = run.table("fixed_point.parquet")
    for name, rows in tables.items():
        with atomic_path(out / name) as temporary:
            rows.to_csv(temporary, index=False, float_format="%.6g")
    for file in save_charts(costs.cost_figures(run), out):
        if file.suffix != ".png":
            file.unlink()
    lineage = [Path(name) for name in run.config["lineage"]]
    machines = [read_json(each / "environment.json") for each in [*lineage, *(r.folder for r in measured), run.folder]]
    studies = _studies(lineage)
    content = {
        "studies": [{"name": s.name, "spec_hash": s.digest, "scale": s.said, "seeds": s.seeds} for s in studies],
        "seeds": sorted({int(each["seed"]) for each in run.config["lineage"].values() if "seed" in each}),
        "measured": [{**each.config, "networks": len(each.config["networks"])} for each in measured],
        **provenance(machines),
    }
    write_text(out / "provenance.json", json.dumps(content, indent=2) + "\n")
    return out


def _studies(lineage: Sequence[Path]) -> list[StudySpec]:
    """The studies that some of these runs are cells of."""
    found = []
    for store in sorted({each.parent.parent for each in lineage if (each / "cell.json").exists()}):
        storage = Storage(str(store))
        for name in storage.studies():
            spec = StudySpec.model_validate(storage.read_json(f"{name}/spec.json"))
            if {cell.key for cell in cells_of(spec)} & {each.name for each in lineage}:
                found.append(spec)
    return found
