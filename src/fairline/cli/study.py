"""Commands on studies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fairline.cli.console import duration, out_console, print_comparison, print_frame, progress_bars
from fairline.cli.options import Device, Devices, Root, parse_counts, parse_names
from fairline.errors import FairlineError

if TYPE_CHECKING:
    import pandas as pd


app = typer.Typer(no_args_is_help=True, help="Run a study: many seeds, budgets and methods from one file.")
Store = Annotated[
    str,
    typer.Option("--out", metavar="STORE", help="Folder of all cells, or a path such as s3://bucket/studies."),
]
Specs = Annotated[
    list[Path], typer.Argument(metavar="SPEC...", help="YAML files, such as papers/fig6_utkface_race_snl.yaml.")
]
Scale = Annotated[str | None, typer.Option(help="One of the scales that the file names, such as tiny.")]


@app.command("run")
def study_run(
    specs: Specs,
    out: Store,
    root: Root = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Only these of its seeds, comma-separated, such as one machine's share; all by default."),
    ] = None,
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
    scale: Scale = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what is left to do, and how long it takes.")
    ] = False,
    device: Device = None,
    devices: Devices = 1,
) -> None:
    """Run studies, or go on with them. Cells that studies have in common are run once."""
    from fairline.report.results import write_study_results
    from fairline.study.executors import Local, RayCluster
    from fairline.study.run import run_study
    from fairline.study.spec import load_spec

    chosen = [load_spec(spec, scale) for spec in specs]
    share = None if seeds is None else {spec.name: spec.part(parse_counts(seeds, "Seeds")) for spec in chosen}
    folder = _data_folder(root)
    if dry_run:
        _print_estimate(chosen, out, seeds=share, root=folder, jobs=jobs, device=device)
        return
    out = _store(out)
    executor = Local(jobs) if ray is None else RayCluster(ray, cpus, gpus)
    common: dict[str, Any] = {"seeds": share, "root": folder, "device": device, "devices": devices}
    with progress_bars() as progress:
        runs = run_study(chosen, out, executor=executor, progress=progress, **common)
    for compared in runs.values():
        for run in compared.values():
            print_comparison(run)
    if results is not None:
        for spec in chosen:
            written = write_study_results(spec, out, results, share[spec.name] if share else None)
            out_console.print(f"Results: {written}", soft_wrap=True)


def _data_folder(root: Path | None) -> str | None:
    given = root or os.environ.get("FAIRLINE_DATA")
    return None if given is None else str(Path(given).expanduser().resolve())


def _store(out: str) -> str:
    return out if "://" in out else str(Path(out).expanduser().resolve())


def _print_estimate(specs: list[Any], out: str, *, jobs: int, **asked: Any) -> None:
    from fairline.study.estimate import estimate
    from fairline.study.storage import Storage

    table = estimate(specs, Storage(out), jobs=jobs, **asked)
    total = table["seconds"].sum()
    print_frame(table.set_index("kind"), "cells; seconds of those left, one after another", {"seconds": ",.0f"})
    unknown = ", ".join(table.loc[table["basis"].str.contains("unknown"), "kind"])
    rest = f", beside the cells whose time is not known ({unknown})" if unknown else ""
    out_console.print(f"About {duration(total / jobs)} with {jobs} at a time, at most{rest}.", soft_wrap=True)


@app.command("results")
def study_results(
    specs: Specs,
    out: Store,
    results: Annotated[Path, typer.Option(help="Folder to write to, under the study's name.")],
    root: Root = None,
    scale: Scale = None,
    device: Device = None,
) -> None:
    """Write tables, figures and provenance of the seeds that are finished, whatever else is under way."""
    from fairline.report.results import write_study_results
    from fairline.study.run import run_study
    from fairline.study.spec import load_spec
    from fairline.study.storage import Storage
    from fairline.study.store import finished_seeds

    store = _store(out)
    for spec in [load_spec(path, scale) for path in specs]:
        seeds = finished_seeds(spec, Storage(store))
        if not seeds:
            raise FairlineError(f"{out} holds no finished seed of study '{spec.name}'.")
        # All that is left of them is to be compared.
        share = {spec.name: seeds}
        with progress_bars() as progress:
            run_study(spec, store, seeds=share, root=_data_folder(root), device=device, progress=progress)
        written = write_study_results(spec, store, results, seeds)
        told = ", ".join(map(str, seeds))
        out_console.print(f"Results of {len(seeds)} of {len(spec.seeds)} seeds ({told}): {written}", soft_wrap=True)


@app.command("merge")
def study_merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Results of one study, such as papers/results/NAME.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write to, under the study's name.")],
) -> None:
    """Join the results of one study from several machines: each finished seed once."""
    from fairline._io import read_json
    from fairline.report.merging import merge_results

    written = merge_results(folders, to)
    about = read_json(written / "provenance.json")
    told = ", ".join(map(str, about["seeds"]))
    out_console.print(
        f"Results of {len(about['seeds'])} of {len(about['planned'])} seeds ({told}): {written}", soft_wrap=True
    )


@app.command("status")
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
    patterns = parse_names(studies, "study")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in held):
            raise FairlineError(f"There is no study '{pattern}' here; there are {', '.join(held)}.")
    names = [name for name in held if any(fnmatchcase(name, pattern) for pattern in patterns)]
    chosen = table[table["study"].isin(names)]
    for name, specs in chosen.groupby("study")["spec_hash"].unique().items():
        if len(specs) > 1:
            told = " and ".join(specs)
            raise FairlineError(f"Study '{name}' is there with specs {told}, such as two scales; give one of them.")
    return chosen


@app.command("figures")
def study_figures(
    sources: Tables,
    to: Annotated[Path, typer.Option("--to", help="Folder to write figure_01.png, … to.")],
    study: Chosen = "*",
    only: Annotated[str | None, typer.Option(help="Numbers in the paper, comma-separated; all by default.")] = None,
    formats: Annotated[str, typer.Option("--format", help="Comma-separated: png, svg, pdf.")] = "png,svg,pdf",
) -> None:
    """Draw what studies measured: the paper's empirical figures (1, 3–9, 11–15), and all that those do not show."""
    from fairline.charts import save_charts
    from fairline.report.paper_figures import FIGURES, draw, draw_others, draw_shifted
    from fairline.study.store import read_by_seed

    wanted = parse_names(formats, "format")
    for name in wanted:
        if name not in ("png", "svg", "pdf"):
            raise FairlineError(f"The format is png, svg or pdf, not '{name}'.")
    table = _chosen_results(sources, study)
    drawn = draw(table, None if only is None else parse_counts(only, "Figures"))
    others = {}
    if only is None:
        others = draw_others(table) | draw_shifted(table, read_by_seed(sources, list(table["study"].unique())))
    if not drawn and not others:
        raise FairlineError("No study here has finetuned networks whose measures could be drawn.")
    files = save_charts({f"figure_{number:02d}": chart for number, chart in drawn.items()} | others, to, wanted)
    names = ", ".join([*map(str, drawn), *others])
    out_console.print(f"Figures {names}: {len(files)} files in {to}", soft_wrap=True)
    missing = [str(number) for number in FIGURES if number not in drawn]
    if missing and drawn and only is None:
        out_console.print(f"No study here holds what figures {', '.join(missing)} show.", soft_wrap=True)


@app.command("report")
def study_report(
    sources: Tables,
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
    study: Chosen = "*",
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            help="Also write the findings there, as CSV, and what panels say together in a file beside it.",
        ),
    ] = None,
    audits: Annotated[
        Path | None,
        typer.Option(
            "--audits",
            help="Also write the fairness report of every audit there, under its name in its study (stores).",
        ),
    ] = None,
) -> None:
    """Write the page that puts each claim of the paper beside what was measured and says whether it holds."""
    from fairline._io import write_text
    from fairline.report.claims import CLAIMS, findings, over_panels, summary
    from fairline.report.claims_page import write_claims
    from fairline.report.results import write_audits
    from fairline.study.store import read_by_seed

    rows = _chosen_results(sources, study)
    compared = read_by_seed(sources, list(rows["study"].unique()))
    found = findings(rows, compared)
    for number, verdict in summary(found).items():
        line = Text.assemble(f"{number}. {CLAIMS[number].text} ", (verdict, "bold"))
        out_console.print(line, soft_wrap=True, highlight=False)
    if table is not None:
        write_text(table, found.to_csv(index=False, float_format="%.5g"))
        beside = table.with_name(f"{table.stem}_panels{table.suffix}")
        write_text(beside, over_panels(found).to_csv(index=False, float_format="%.5g"))
        out_console.print(f"Findings: {table.resolve()}", soft_wrap=True)
    out_console.print(f"Page: {write_claims(rows, found, out, compared).resolve()}", soft_wrap=True)
    if audits is not None:
        pages = write_audits(sources, list(rows["study"].unique()), audits)
        out_console.print(f"Reports: {len(pages)} pages in {audits.resolve()}", soft_wrap=True)
