"""Run studies: every cell once, as soon as the cells that it is built on are finished.

Cells are resumable and named by what determines them, so a study is resumed by its own command, however it was ended;
studies in one store share what they have in common, and so do several processes at work on the same study.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path

import pandas as pd

from fairline._io import read_json, write_json
from fairline.errors import FairlineError
from fairline.ranks import RankLost
from fairline.runs import FolderInUse, Run, difference
from fairline.study.cell import Cell
from fairline.study.cells import cells_of, compute, require_known, try_objectives
from fairline.study.executors import Executor, Local, WorkerLost
from fairline.study.spec import StudySpec
from fairline.study.storage import Storage
from fairline.study.store import keep
from fairline.training import Progress, ProgressCallback

logger = logging.getLogger(__name__)

#: Tries of a cell whose process is lost before it counts as failed.
TRIES = 3

#: What :func:`run_cell` answers.
DONE, BUSY = "done", "busy"


def run_study(
    spec: StudySpec | Sequence[StudySpec],
    out: str | Path,
    *,
    seeds: Mapping[str, Sequence[int]] | None = None,
    root: str | None = None,
    executor: Executor | None = None,
    device: str | None = None,
    devices: int = 1,
    progress: ProgressCallback | None = None,
) -> dict[str, dict[str, Run]]:
    """Run studies, or go on with them.

    Args:
        spec: What to run; several studies share their common cells, and the first seed of all comes before the second
            of any.
        out: The store; see :mod:`fairline.study.storage`.
        seeds: By a study's name, those of its seeds that are run and compared here; all of a study that it lacks.
        root: Where the data are.
        executor: Who runs the cells; one process of this machine by default. Closed at the end.
        device: Of every run; the accelerator if there is one, by default.
        devices: That work together at each training, linearization, finetune and audit.
        progress: Told how many cells are done, and how far those at work are.

    Returns:
        The compare run of each data set, by study.

    Raises:
        FairlineError: The store holds the study with another content, or a cell failed; all cells that do not need
            the failed one are finished first.
    """
    specs = [spec] if isinstance(spec, StudySpec) else list(spec)
    storage = Storage(str(out))
    for one in specs:
        require_known(one)
    by_study = {one.name: cells_of(one, (seeds or {}).get(one.name)) for one in specs}
    for one in specs:
        if not all(storage.finished(cell) for cell in by_study[one.name]):
            try_objectives(one, root)
        _claim(one, storage)
    cells = _in_order(specs, by_study)
    runner = executor or Local()
    try:
        work = partial(run_cell, storage=storage, root=root, device=device, devices=devices)
        link = partial(_link, by_study, storage)
        errors = _run_cells(cells, storage, runner, work, link, progress, "study " + ", ".join(by_study))
    finally:
        runner.close()
    if errors:
        failed, reason = next(iter(errors.items()))
        raise FairlineError(f"{len(errors)} of {len(cells)} cells failed; {failed}: {reason}")
    for one in specs:
        keep(one, storage)
    return {name: _compared(own, storage) for name, own in by_study.items()}


def _compared(cells: Sequence[Cell], storage: Storage) -> dict[str, Run]:
    """The compare run of each data set; that of every strength of its sweeps stands beside it in the store."""
    compares = [cell for cell in cells if cell.kind == "compare" and cell.about["results"] == cell.about["data_label"]]
    return {str(cell.about["data_label"]): Run.read(storage.fetch(cell), "compare") for cell in compares}


def _link(by_study: Mapping[str, Sequence[Cell]], storage: Storage, cell: Cell) -> None:
    """Give a finished cell its name in every study that has it, so that it can be looked at before all are done."""
    for name, own in by_study.items():
        for each in own:
            if each.key == cell.key:
                storage.link(name, each)


def _claim(spec: StudySpec, storage: Storage) -> None:
    """Write what the study runs, or see that it is the same as before."""
    content = spec.model_dump(mode="json")
    name = f"{spec.name}/spec.json"
    written = storage.read_json(name)
    if written is None:
        try:
            storage.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise FairlineError(f"{storage.path} cannot be written ({error.strerror or error}).") from None
    elif written != content:
        raise FairlineError(
            f"{storage.path} holds study '{spec.name}' before it was changed ({difference(written, content)}): give it "
            f"another name, or remove {spec.name}/spec.json there; cells that are the same are used again either way."
        )


def _in_order(specs: Sequence[StudySpec], by_study: Mapping[str, Sequence[Cell]]) -> list[Cell]:
    """All cells, each once: the first seed of every study, then the second, so that what is interrupted tells most."""
    ranked = []
    for spec in specs:
        for cell in by_study[spec.name]:
            rank = spec.seeds.index(cell.about["seed"]) if "seed" in cell.about else len(spec.seeds)
            ranked.append((rank, cell))
    ranked.sort(key=lambda pair: pair[0])
    return list({cell.key: cell for _, cell in ranked}.values())


def _run_cells(
    cells: Sequence[Cell],
    storage: Storage,
    executor: Executor,
    work: Callable[[Cell], str],
    link: Callable[[Cell], None],
    progress: ProgressCallback | None,
    title: str,
) -> dict[str, str]:
    """Run all cells; returns what failed, by name."""
    waiting = {cell.key: cell for cell in cells if not storage.finished(cell)}
    finished = {cell.key for cell in cells} - set(waiting)
    for cell in cells:
        if cell.key in finished:
            link(cell)
    working: dict[Future[str], Cell] = {}
    later: dict[str, float] = {}
    lost: dict[str, int] = {}
    errors: dict[str, str] = {}
    failed: set[str] = set()
    while waiting or working:
        for key, cell in list(waiting.items()):
            blockers = [parent for parent in cell.parents if parent.key in failed]
            if blockers:
                # Told once, for the cell that failed.
                failed.add(key)
                del waiting[key]
            elif executor.slots is not None and len(working) >= executor.slots:
                continue
            elif all(parent.key in finished for parent in cell.parents) and time.monotonic() >= later.get(key, 0):
                working[executor.submit(work, cell)] = cell
                del waiting[key]
        done, _ = wait(working, timeout=1, return_when=FIRST_COMPLETED)
        if not working:
            time.sleep(0.2)
        for future in done:
            cell = working.pop(future)
            error = future.exception()
            if isinstance(error, WorkerLost | RankLost) and lost.get(cell.key, 0) + 1 < TRIES:
                lost[cell.key] = lost.get(cell.key, 0) + 1
                logger.warning("the process of cell %s was lost; it is tried again", cell.where)
                waiting[cell.key] = cell
            elif error is not None:
                reason = _one_line(error)
                logger.error("cell %s: %s", cell.where, reason)
                storage.record_error(cell, reason)
                errors[cell.where] = reason
                failed.add(cell.key)
            elif future.result() == BUSY:
                waiting[cell.key] = cell
                later[cell.key] = time.monotonic() + 1
            else:
                finished.add(cell.key)
                link(cell)
        if progress is not None:
            count = len(finished)
            at_work = ", ".join(_told(storage, cell) for cell in working.values())
            progress(Progress(title, count, len(cells), f"{count} of {len(cells)} cells; {at_work}"))
    return errors


def run_cell(cell: Cell, storage: Storage, root: str | None, device: str | None, devices: int = 1) -> str:
    """Run a cell where it is called.

    Returns:
        ``DONE``, or ``BUSY`` if another process is at work on the cell.

    Raises:
        FairlineError: The input is wrong.
    """
    if storage.finished(cell):
        return DONE
    folder = storage.folder(cell)
    parents = [storage.fetch(parent) for parent in cell.parents]
    resumed = folder.exists()
    begun = last = time.monotonic()
    note = folder / "checkpoint" / "progress.json"

    def told(update: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            last = time.monotonic()
            write_json(note, {"stage": update.stage, "done": update.done, "total": update.total})

    try:
        compute(cell, folder, parents, root=root, device=device, devices=devices, progress=told)
    except FolderInUse:
        return BUSY
    storage.publish(cell, time.monotonic() - begun, resumed)
    return DONE


def status(out: str | Path) -> pd.DataFrame:
    """How far studies are.

    Args:
        out: The store.

    Returns:
        A row for each cell: ``study``, ``cell`` (its name), ``kind``, ``state`` (``waiting``, ``running``,
        ``interrupted``, ``failed`` or ``finished``), ``note`` (how far it is, or the error) and ``key``.

    Raises:
        FairlineError: The store holds no study.
    """
    storage = Storage(str(out))
    names = storage.studies()
    if not names:
        raise FairlineError(f"{out} holds no study (there is no */spec.json).")
    rows = []
    for name in names:
        for cell in cells_of(StudySpec.model_validate(storage.read_json(f"{name}/spec.json"))):
            if storage.finished(cell):
                state, note = "finished", ""
            elif storage.busy(cell):
                state, note = "running", _told(storage, cell)
            elif error := storage.error(cell):
                state, note = "failed", error
            else:
                state, note = "interrupted" if storage.folder(cell).exists() else "waiting", ""
            rows.append(
                {"study": name, "cell": cell.where, "kind": cell.kind, "state": state, "note": note, "key": cell.key}
            )
    return pd.DataFrame(rows)


def _told(storage: Storage, cell: Cell) -> str:
    """How far a cell is, as it says itself."""
    file = storage.folder(cell) / "checkpoint" / "progress.json"
    try:
        note = read_json(file)
    except FairlineError:
        return cell.where
    if note["total"] is None:
        return f"{cell.where}: {note['stage']}"
    return f"{cell.where}: {note['stage']} {100 * note['done'] / max(note['total'], 1):.0f} %"


def _one_line(error: BaseException) -> str:
    if isinstance(error, WorkerLost | RankLost):
        return f"its process was killed {TRIES} times (out of memory?)"
    if isinstance(error, FairlineError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'} cannot be written or read ({error.strerror})"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
