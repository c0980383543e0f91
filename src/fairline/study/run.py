"""Run a study: base network, masks and finetunes for every data set and seed, then a comparison for each data set.

OUT/
  spec.json
  DATA-SEED/base, masks-NAME, NAME-METHOD, NAME-METHOD-last-layer    run folders
  compare-DATA/                                                      the comparison over all seeds

Every run is resumable, so a study is: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline._io import atomic_path, read_json, write_json, write_text
from fairline.errors import FairlineError
from fairline.jobs import compare_job, finetune_job, last_layer_job, linearize_job, train_job
from fairline.runs import DataSpec, Run, provenance
from fairline.study.spec import Finetune, StudySpec
from fairline.training import Progress, ProgressCallback

logger = logging.getLogger(__name__)

#: File of a cell that says why its last try failed.
ERROR = "error.json"


def run_study(
    spec: StudySpec,
    out: str | Path,
    *,
    root: str | None = None,
    jobs: int = 1,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Run]:
    """Run or resume a study.

    Args:
        spec: What to run.
        out: Folder of all its runs.
        root: Where the data are.
        jobs: Cells (a data set and a seed each) at a time, in processes of their own that share the CPU's threads.
        device: Of every run; the accelerator if there is one, by default.
        progress: Told how many runs are done.

    Returns:
        The compare run of each data set.

    Raises:
        FairlineError: ``out`` holds another study, or a cell failed; the other cells are finished first.
    """
    if jobs < 1:
        raise FairlineError(f"A study needs one job at least, not {jobs}.")
    folder = Path(out)
    written = folder / "spec.json"
    content = spec.model_dump(mode="json")
    if written.exists() and read_json(written) != content:
        raise FairlineError(f"{folder} holds the results of another study, or of this one before it was changed.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(written, content)
    cells = [(name, seed) for seed in spec.seeds for name in spec.data]
    total = len(cells) * spec.runs_per_cell

    def told() -> None:
        if progress is not None:
            done = sum(1 for file in folder.glob("*-*/*/status.json") if '"finished"' in file.read_text())
            progress(Progress(f"study {spec.name}", min(done, total), total, f"{done} of {total} runs"))

    errors: dict[str, str] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Spawned: a forked process inherits the locks of torch's thread pool.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[None], str] = {
            pool.submit(run_cell, spec, folder, name, seed, root, device, threads): f"{name}-{seed}"
            for name, seed in cells
        }
        while waiting:
            finished, _ = wait(waiting, timeout=1)
            for future in finished:
                cell = waiting.pop(future)
                error = future.exception()
                if error is not None:
                    errors[cell] = str(error) or type(error).__name__
                    logger.error("cell %s: %s", cell, errors[cell])
                    write_json(folder / cell / ERROR, {"error": errors[cell]})
            told()
    if errors:
        cell, reason = next(iter(errors.items()))
        raise FairlineError(f"{len(errors)} of {len(cells)} cells failed; {cell}: {reason}")
    return {
        name: compare_job(
            [run for seed in spec.seeds for run in finetune_folders(spec, folder / f"{name}-{seed}")],
            folder / f"compare-{name}",
            baseline=spec.baseline,
            root=root,
            device=device,
            progress=progress,
        )
        for name in spec.data
    }


def status(out: str | Path) -> pd.DataFrame:
    """How far a study is.

    Args:
        out: Folder of all its runs.

    Returns:
        A row for each cell: ``cell``, ``finished`` and ``runs``, ``state`` (``waiting``, ``unfinished``, ``failed`` or
        ``finished``), and the ``error`` of the last try, if it failed.

    Raises:
        FairlineError: The folder holds no study.
    """
    folder = Path(out)
    if not (folder / "spec.json").exists():
        raise FairlineError(f"{folder} holds no study (there is no spec.json).")
    spec = StudySpec.model_validate(read_json(folder / "spec.json"))
    rows = []
    for seed in spec.seeds:
        for name in spec.data:
            cell = folder / f"{name}-{seed}"
            finished = sum(Run(file.parent).finished for file in cell.glob("*/status.json"))
            error = str(read_json(cell / ERROR)["error"]) if (cell / ERROR).exists() else ""
            state = "failed" if error else "unfinished" if cell.exists() else "waiting"
            if finished == spec.runs_per_cell:
                state = "finished"
            rows.append(
                {"cell": cell.name, "finished": finished, "runs": spec.runs_per_cell, "state": state, "error": error}
            )
    return pd.DataFrame(rows)


def run_cell(
    spec: StudySpec, folder: Path, name: str, seed: int, root: str | None, device: str | None, threads: int
) -> None:
    """All runs of one data set and seed, one after another."""
    torch.set_num_threads(threads)
    source = spec.data[name]
    cell = folder / f"{name}-{seed}"
    (cell / ERROR).unlink(missing_ok=True)
    common: dict[str, Any] = {"seed": seed, "device": device}
    train_job(
        cell / "base",
        DataSpec(source.name, root, source.options, seed),
        spec.model.name,
        spec.model.options,
        **common,
        **{"augment": False, **spec.train},
    )
    for masks, placement in spec.masks.items():
        linearize_job(
            cell / "base",
            cell / f"masks-{masks}",
            placement.budgets,
            placement.method,
            placement.objective,
            placement.options,
            **common,
            **placement.settings,
        )
    for method, source_masks, out in finetunes(spec, cell):
        finetune_job(
            cell / f"masks-{source_masks}",
            out,
            method.objective,
            method.options,
            **common,
            **{"augment": False, "select": "accuracy", **spec.finetune},
        )
        if method.last_layer:
            last_layer_job(out, _last_layer(out), seed=seed)


def finetunes(spec: StudySpec, cell: Path) -> Iterator[tuple[Finetune, str, Path]]:
    """Every finetune of a cell: its method, its masks and its folder."""
    for method in spec.methods:
        for masks in method.masks:
            yield method, masks, cell / f"{masks}-{method.folder}"


def finetune_folders(spec: StudySpec, cell: Path) -> list[Path]:
    """Folders of a cell's finetuned networks."""
    found = []
    for method, _, out in finetunes(spec, cell):
        found += [out, _last_layer(out)] if method.last_layer else [out]
    return found


def _last_layer(out: Path) -> Path:
    return out.with_name(f"{out.name}-last-layer")


def write_results(spec: StudySpec, out: str | Path, results: str | Path) -> Path:
    """Write what is worth committing: a table and the figures of each data set, and where they come from.

    Args:
        spec: The study.
        out: Folder of its finished runs.
        results: Folder of all results; a subfolder named after the study is written.

    Returns:
        The subfolder.
    """
    from fairline.report.comparison import write_comparison_figures

    folder = Path(results) / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in spec.data:
        run = Run.read(Path(out) / f"compare-{name}", "compare")
        table = pd.read_parquet(run.folder / "comparison.parquet")
        for column in ("value", "low", "high", "percent"):
            table[column] = table[column].map("{:.5g}".format)
        with atomic_path(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
        for file in write_comparison_figures(run.folder, folder):
            if file.suffix == ".png":
                file.replace(folder / f"{name}_{file.name}")
            else:
                file.unlink()
    machines = [read_json(file) for file in sorted(Path(out).glob("*-*/*/environment.json"))]
    machines += [read_json(file) for file in sorted(Path(out).glob("compare-*/environment.json"))]
    content = {
        "study": spec.name,
        "scale": spec.scale,
        "spec_hash": spec.digest,
        "seeds": spec.seeds,
        **provenance(machines),
    }
    write_text(folder / "provenance.json", json.dumps(content, indent=2) + "\n")
    return folder
