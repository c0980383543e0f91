"""The cells of a study: what must be computed, each named by the hash of all that determines it.

    train (a data set and a seed) ──► linearize (one run gives all budgets) ──► finetune ──► last-layer, adjust
      └──► audit                                                                  ├──► audit   └──► audit
                                                   all values of a sweep, and plain distillation ──► choose, as finetune
                                                       all methods of a data set, over the seeds ──► compare

Cells with equal hashes are the same work, within a study and between studies that share a store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from fairline import data, jobs, objectives
from fairline._own import files, identity, is_own, located
from fairline._registry import fitting, kinds_of_arguments
from fairline.audit import EXPLAIN, measure_options
from fairline.audit import REGISTRY as MEASURES
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.ranks import launch
from fairline.runs import DataSpec, ModelSpec, Run
from fairline.study.cell import Cell
from fairline.study.naming import baseline_among, require_baseline
from fairline.study.spec import Finetune, StudySpec
from fairline.training import DEFAULTS, ProgressCallback, finetune, train


def require_known(spec: StudySpec) -> None:
    """Refuse what would fail after hours: names and options that nothing here knows.

    Raises:
        FairlineError: There is no such data set, model, measure, linearizer or objective, or it knows no such option.
    """
    for label, source in spec.data.items():
        if source.name.partition(":")[0] not in data.REGISTRY:
            raise FairlineError(
                f"Study '{spec.name}', data.{label}: there is no data set '{source.name}'; choose one of "
                f"{', '.join(data.REGISTRY)}."
            )
    for where in ("measures", "base", "options"):
        for measure in getattr(spec.audit, where):
            if measure not in MEASURES:
                raise FairlineError(
                    f"Study '{spec.name}', audit.{where}: there is no measure '{measure}'; choose among "
                    f"{', '.join(MEASURES)}."
                )
    for measure in spec.audit.options:
        if measure not in _measured(spec, base=True):
            raise FairlineError(f"Study '{spec.name}', audit.options: '{measure}' is not measured.")
    checks: list[tuple[str, Callable[[], object]]] = [
        # Ten classes of small images: the smallest network that tells whether the options are known.
        ("model", lambda: ModelSpec(located(spec.model.name, spec.folder), 10, 3, 32, spec.model.options).build())
    ]
    checks += [
        (f"audit.options.{measure}", partial(measure_options, measure, own))
        for measure, own in spec.audit.options.items()
    ]
    checks += [(f"data.{label}", partial(DataSpec, each.name, None, each.options)) for label, each in spec.data.items()]
    for name, masks in spec.masks.items():
        placed_under = masks.method, located(masks.objective, spec.folder), masks.options
        checks.append((f"masks.{name}", partial(jobs.build_linearizer, *placed_under, **masks.settings)))
    checks += [
        (f"methods.{place}", partial(objectives.build, located(method.objective, spec.folder), **options))
        for place, method in enumerate(spec.methods)
        for _, options in method.variants()
    ]
    _require_settings(spec)
    compared = [cell for name in spec.data for cell in _of_one(spec, name, spec.seeds[0])[1]]
    checks.append(("baseline", partial(require_baseline, compared, spec.baseline)))
    for where, check in checks:
        try:
            check()
        except FairlineError as error:
            raise FairlineError(f"Study '{spec.name}', {where}: {error}") from None


#: What is a study's own to give: the data, networks, seeds and devices of its cells, and where these are kept.
_GIVEN = ("seed", "device", "progress", "checkpoint", "history", "objective", "objective_options", "method")


def _require_settings(spec: StudySpec) -> None:
    """Refuse settings that nothing has, of another kind, or that a study gives itself."""
    named: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("train", train, spec.train),
        ("finetune", finetune, spec.finetune),
    ]
    named += [(f"masks.{name}.finetune", finetune, masks.finetune) for name, masks in spec.masks.items()]
    for where, call, settings in named:
        asked = {name for name, one in inspect.signature(call).parameters.items() if one.kind is one.KEYWORD_ONLY}
        for setting in settings:
            if setting not in asked | {*DEFAULTS}:
                raise FairlineError(f"Study '{spec.name}', {where}: there is no setting '{setting}'.")
    named += [(f"masks.{name}.settings", jobs.build_linearizer, masks.settings) for name, masks in spec.masks.items()]
    for where, call, settings in named:
        for setting in settings:
            if setting in _GIVEN:
                raise FairlineError(
                    f"Study '{spec.name}', {where}: '{setting}' is no setting; the study gives it itself."
                )
        fitting(f"Study '{spec.name}', {where}", kinds_of_arguments(call), settings)


def try_objectives(spec: StudySpec, root: str | None) -> None:
    """Refuse, before anything is trained, objectives of the user's own that are not whole.

    Args:
        spec: The study.
        root: Where the data are; they are loaded only where there is such an objective.

    Raises:
        FairlineError: One fails on two images of the study's data; see :func:`fairline.objectives.try_on`.
    """
    tried = [
        (f"methods.{place}", method.objective, options)
        for place, method in enumerate(spec.methods)
        if is_own(method.objective)
        for _, options in method.variants()
    ]
    tried += [
        (f"masks.{name}", masks.objective, masks.options)
        for name, masks in spec.masks.items()
        if is_own(masks.objective)
    ]
    if not tried:
        return
    for source in spec.data.values():
        train = DataSpec(source.name, root, source.options, spec.seeds[0]).load()[1]["train"]
        for where, objective, options in tried:
            try:
                objectives.try_on(located(objective, spec.folder), options, partial(_same, train))
            except FairlineError as error:
                raise FairlineError(f"Study '{spec.name}', {where}: {error}") from None


def _same(train: GroupedData) -> GroupedData:
    return train


def cells_of(spec: StudySpec, seeds: Sequence[int] | None = None) -> list[Cell]:
    """All cells of a study, parents before children, each once.

    Args:
        spec: The study.
        seeds: Only those of some of its seeds, which are compared for themselves.

    Returns:
        The cells; the work of a seed before that of the next.
    """
    cells: list[Cell] = []
    finished: dict[str, list[Cell]] = {name: [] for name in spec.data}
    curves: dict[str, list[Cell]] = {name: [] for name in spec.data}
    for seed in spec.seeds if seeds is None else seeds:
        for name in spec.data:
            own, last, tried = _of_one(spec, name, seed)
            cells += own
            finished[name] += last
            curves[name] += tried
    for what, compared in (("compare", finished), ("curves", curves)):
        for name, parents in compared.items():
            if parents:
                about = {"data_label": name, "results": name if what == "compare" else f"{name}_curves"}
                arguments = {"baseline": baseline_among(parents, spec.baseline)}
                cells.append(Cell("compare", arguments, tuple(parents), f"{what}-{name}", about))
    return list({cell.key: cell for cell in cells}.values())


def _of_one(spec: StudySpec, name: str, seed: int) -> tuple[list[Cell], list[Cell], list[Cell]]:
    """Cells of one data set and seed; those of them whose networks are compared, and those of every strength."""
    base = _base(spec, name, seed)
    # A scale may have methods that leave some masks out.
    placements = {masks: _placed(spec, masks, base) for masks in dict.fromkeys(masks for _, masks in finetunes(spec))}
    cells = [base, _audited(spec, base), *placements.values()]
    compared: list[Cell] = []
    curves: list[Cell] = []
    for method, masks in finetunes(spec):
        variants = _variants(spec, method, placements[masks])
        last = variants[0]
        if method.sweep:
            (plain,) = _variants(spec, spec.reference(masks), placements[masks])
            last = _chosen(spec, method, plain, variants)
            cells += [each for made in (plain, *variants) for each in (made, _audited(spec, made))]
            curves += [plain, *variants]
        for made in (last, *_after(method, last)):
            cells += [made, _audited(spec, made)]
            compared.append(made)
    return cells, compared, list({cell.key: cell for cell in curves}.values())


def _base(spec: StudySpec, name: str, seed: int) -> Cell:
    """The training of a base network."""
    source = spec.data[name]
    arguments = {
        "data": {"name": source.name, "options": source.options},
        "model": spec.model.model_dump(mode="json"),
        "settings": {"augment": False, **spec.train},
        "seed": seed,
    }
    if spec.model.name in spec.code:
        arguments["model_files"] = spec.code[spec.model.name]
    about = {
        "data_label": name,
        "data": source.name,
        "data_options": source.options,
        "model": spec.model.name,
        "model_options": spec.model.options,
        "own_model": located(spec.model.name, spec.folder),
        "seed": seed,
        "masks": "",
        "finetune": "",
        "objective_options": {},
    }
    return Cell("train", arguments, (), f"{name}-{seed}/base", about)


def _placed(spec: StudySpec, masks: str, base: Cell) -> Cell:
    """The linearization of a base network; ``masks`` names the placement."""
    placed = spec.masks[masks]
    arguments = {
        **placed.model_dump(mode="json"),
        **_named(spec, placed.objective),
        "seed": base.about["seed"],
    }
    about = {**base.about, "masks": masks, "own": _where(spec, placed.objective)}
    return Cell("linearize", arguments, (base,), _beside(base, f"masks-{masks}"), about)


def _variants(spec: StudySpec, method: Finetune, placed: Cell) -> list[Cell]:
    """The finetunes of linearized networks: one, or one for each value of the method's sweep."""
    cells = []
    behind = spec.masks[placed.about["masks"]].finetune
    for told, options in method.variants():
        arguments = {
            **_named(spec, method.objective),
            "options": options,
            "settings": {"augment": False, "select": "accuracy", **spec.finetune, **behind},
            "seed": placed.about["seed"],
        }
        about = {
            **placed.about,
            "finetune": f"{method.folder} {told}".strip(),
            "objective_options": options,
            "strength": told,
            "own": _where(spec, method.objective),
        }
        name = "-".join(filter(None, [placed.about["masks"], method.folder, told.replace("=", "-")]))
        cells.append(Cell("finetune", arguments, (placed,), _beside(placed, name), about))
    return cells


def _chosen(spec: StudySpec, method: Finetune, plain: Cell, variants: Sequence[Cell]) -> Cell:
    """The choice among the values of a sweep."""
    about = {**variants[0].about, "finetune": method.folder, "objective_options": method.options, "strength": ""}
    name = _beside(plain, f"{plain.about['masks']}-{method.folder}")
    arguments = spec.choose.model_dump(mode="json", exclude={"reference"})
    return Cell("choose", arguments, (plain, *variants), name, about)


def _after(method: Finetune, made: Cell) -> list[Cell]:
    """Last layers retrained, or classes rebalanced, if the method says so."""
    cells = []
    for way in method.last_layers:
        retrained = {**made.about, "finetune": f"{method.folder}, {way.label}"}
        arguments = {"seed": made.about["seed"], **way.arguments}
        cells.append(Cell("last-layer", arguments, (made,), f"{made.where}-{way.folder}", retrained))
    for adjusted in method.adjust:
        moved = {**made.about, "finetune": f"{method.folder}, {adjusted.label}"}
        folder = f"{made.where}-{adjusted.label.replace(' ', '-')}"
        cells.append(Cell("adjust", adjusted.model_dump(mode="json"), (made,), folder, moved))
    return cells


def _named(spec: StudySpec, objective: str) -> dict[str, Any]:
    """What a cell is known by of its objective; of the user's own its code too, wherever it lies."""
    code = spec.code.get(objective)
    return {"objective": identity(objective), **({"code": code} if code else {})}


def _where(spec: StudySpec, objective: str) -> str:
    """Where an objective of the user's own is found; empty for others."""
    return located(objective, spec.folder) if is_own(objective) else ""


def _audited(spec: StudySpec, cell: Cell) -> Cell:
    """The audit of a cell's networks; base networks may be measured in more ways."""
    base = cell.kind == "train"
    asked = spec.audit.model_dump(mode="json", exclude={"base"})
    arguments = {
        **asked,
        "measures": [*spec.audit.measures, *(spec.audit.base if base else [])],
        "options": {name: own for name, own in asked["options"].items() if name in _measured(spec, base=base)},
        "seed": cell.about["seed"],
    }
    return Cell("audit", arguments, (cell,), f"{cell.where}-audit", cell.about)


def _measured(spec: StudySpec, *, base: bool) -> set[str]:
    """Measures that may be taken of a base network, or of another."""
    asked = {"accuracy", "recall", *spec.audit.measures, *(spec.audit.base if base else [])}
    return asked | set(EXPLAIN if spec.audit.explain else ())


def _beside(cell: Cell, name: str) -> str:
    """The name for people of a cell of the same data and seed."""
    return f"{cell.where.partition('/')[0]}/{name}"


def finetunes(spec: StudySpec) -> Iterable[tuple[Finetune, str]]:
    """Every finetune of a seed: its method, and the name of its masks."""
    return ((method, masks) for method in spec.methods for masks in method.masks)


def compute(
    cell: Cell,
    folder: Path,
    parents: Sequence[Path],
    *,
    root: str | None = None,
    device: str | None = None,
    devices: int = 1,
    progress: ProgressCallback | None = None,
) -> Run:
    """Run a cell, or go on with it.

    Args:
        cell: Which.
        folder: Its run folder.
        parents: The finished run folders of its parents.
        root: Where the data are.
        device: The accelerator if there is one, by default.
        devices: That work on it together, where it is of a kind that several can work on.
        progress: Told how far it is.

    Returns:
        The finished run.
    """
    if Run(folder).finished:
        return Run(folder)
    count = devices if cell.kind in _DIVIDED else 1
    return cast(Run, launch(_run, cell, folder, parents, root=root, device=device, progress=progress, devices=count))


def _run(cell: Cell, folder: Path, parents: Sequence[Path], **common: Any) -> Run:
    return _JOBS[cell.kind](cell, folder, parents, common)


def _agreed(folder: Path) -> Path:
    """Through which all seeds of a store compute in the same arithmetic."""
    return folder.parents[1] / "precision.json"


def _train(cell: Cell, folder: Path, _parents: Sequence[Path], common: dict[str, Any]) -> Run:
    given = cell.arguments
    source, model = given["data"], given["model"]
    spec = DataSpec(source["name"], common.pop("root"), source["options"], given["seed"])
    settings = {"seed": given["seed"], "agreed": _agreed(folder), **common, **given["settings"]}
    name = _unchanged(str(cell.about.get("own_model") or model["name"]), given.get("model_files", {}))
    return jobs.train_job(folder, spec, name, model["options"], **settings)


def _objective(cell: Cell) -> str:
    """The objective that a cell is computed under.

    Returns:
        Its name, with the path of the user's own.

    Raises:
        FairlineError: Its code is no longer what the cell is known by.
    """
    return _unchanged(str(cell.about.get("own") or cell.arguments["objective"]), cell.arguments.get("code", {}))


def _unchanged(name: str, code: Mapping[str, str]) -> str:
    """A name, if its code is still what a cell is known by."""
    now = files(name) if code else {}
    for file in {**code, **now}:
        if code.get(file) != now.get(file):
            raise FairlineError(f"{file} has changed since the study began; start the study again.")
    return name


def _linearize(cell: Cell, folder: Path, parents: Sequence[Path], common: dict[str, Any]) -> Run:
    given = cell.arguments
    settings = {"seed": given["seed"], "agreed": _agreed(folder), **common, **given["settings"]}
    placed_under = given["method"], _objective(cell), given["options"]
    return jobs.linearize_job(parents[0], folder, given["budgets"], *placed_under, **settings)


def _finetune(cell: Cell, folder: Path, parents: Sequence[Path], common: dict[str, Any]) -> Run:
    given = cell.arguments
    settings = {"seed": given["seed"], "agreed": _agreed(folder), **common, **given["settings"]}
    return jobs.finetune_job(parents[0], folder, _objective(cell), given["options"], **settings)


def _choose(cell: Cell, folder: Path, parents: Sequence[Path], common: dict[str, Any]) -> Run:
    known = {name: common[name] for name in ("root", "device", "progress")}
    return jobs.choose_job(parents[1:], folder, reference=parents[0], **cell.arguments, **known)


def _last_layer(cell: Cell, folder: Path, parents: Sequence[Path], common: dict[str, Any]) -> Run:
    return jobs.last_layer_job(parents[0], folder, root=common["root"], progress=common["progress"], **cell.arguments)


def _adjust(cell: Cell, folder: Path, parents: Sequence[Path], common: dict[str, Any]) -> Run:
    given = cell.arguments
    return jobs.adjust_job(parents[0], folder, root=common["root"], progress=common["progress"], **given)


def _audit(cell: Cell, folder: Path, parents: Sequence[Path], common: dict[str, Any]) -> Run:
    names = ("measures", "options", "explain", "resamples", "seed")
    given = {name: cell.arguments[name] for name in names}
    return jobs.audit_job(parents, folder, with_base=cell.parents[0].kind == "train", **given, **common)


def _compare(cell: Cell, folder: Path, parents: Sequence[Path], common: dict[str, Any]) -> Run:
    return jobs.compare_job(parents, folder, baseline=cell.arguments["baseline"], **common)


#: Kinds of cells that several devices can work on together.
_DIVIDED = ("train", "linearize", "finetune", "audit")

#: How each kind of cell is run.
_JOBS: dict[str, Callable[[Cell, Path, Sequence[Path], dict[str, Any]], Run]] = {
    "train": _train,
    "linearize": _linearize,
    "finetune": _finetune,
    "choose": _choose,
    "last-layer": _last_layer,
    "adjust": _adjust,
    "audit": _audit,
    "compare": _compare,
}
