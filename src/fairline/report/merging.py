"""Results of one study from several machines, joined: a seed is the unit, and counts once."""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fairline._io import atomic_path, make_folder, read_json, read_table, reading, write_table, write_text
from fairline.audit.comparison import pareto
from fairline.audit.intervals import mean_interval
from fairline.errors import FairlineError
from fairline.objectives.post_hoc import TAUS
from fairline.report.results import FORMAT, write_comparison
from fairline.study.store import read_results

#: Where and when a network was made, which does not change its numbers.
_WHEN_AND_WHERE = ["commit", "device", "versions", "started"]

#: What names a row of a study's table, and a network in it.
_ROW = ["data_label", "seed", "stage", "masks", "finetune", "asked", "relus", "group", "class", "measure"]
_NETWORK = ["data_label", "stage", "masks", "finetune", "asked"]

#: What names a row of a comparison.
_COMPARED = ["relus", "percent", "method", "group", "class", "measure"]

_WRITE_AGAIN = "write it again with 'fairline study results'"


@dataclass(frozen=True)
class _Results:
    """What one folder holds of a study.

    Attributes:
        folder: The folder.
        about: ``provenance.json``.
        table: ``results.parquet``.
        compared: ``by_seed.parquet``.
    """

    folder: Path
    about: Mapping[str, Any]
    table: pd.DataFrame
    compared: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> _Results:
        """Read a folder.

        Returns:
            What it holds.

        Raises:
            FairlineError: A file is missing, broken or of another version, or the files do not belong together.
        """
        if not (folder / "provenance.json").is_file():
            raise FairlineError(f"{folder} holds no results of a study with provenance (no provenance.json there).")
        about = read_json(folder / "provenance.json")
        version = about.get("format", 1) if isinstance(about, dict) else None
        if version != FORMAT:
            raise FairlineError(
                f"{folder} holds results in format {version}, which is not this version's {FORMAT}; {_WRITE_AGAIN}."
            )
        file = folder / "results.parquet"
        if not file.is_file():
            raise FairlineError(f"{folder} holds no table of a study (no results.parquet there).")
        table, compared = read_results([file]), read_table(folder / "by_seed.parquet")
        held = {"study": [about["study"]], "scale": [about["scale"]], "spec_hash": [about["spec_hash"]]}
        for name, told in held.items():
            if list(table[name].unique()) != told:
                raise FairlineError(f"{file} and the provenance beside it are not of one {name.replace('_', ' ')}.")
        for what, own in (("results.parquet", table), ("by_seed.parquet", compared)):
            if sorted(own["seed"].unique()) != sorted(about["seeds"]):
                raise FairlineError(f"{folder / what} does not hold the seeds that its provenance names.")
        return cls(folder, about, table, compared)


def merge_results(folders: Sequence[str | Path], target: str | Path) -> Path:
    """Join results of one study, such as several machines' shares of its seeds.

    Args:
        folders: Each holds ``results.parquet``, ``by_seed.parquet`` and ``provenance.json``.
        target: Folder of all results; a subfolder named after the study is written, which may be one of the folders.

    Returns:
        The subfolder: the tables with every seed once, in the study's order; the CSVs, made anew; ``provenance.json``.

    Raises:
        FairlineError: A folder is of another study, spec, scale or format, lacks provenance, or holds a seed in part
            or with other numbers than another folder does.
    """
    parts = [_Results.read(Path(folder)) for folder in folders]
    first = parts[0]
    for part in parts[1:]:
        _require_same(first, part)
    seeds = [seed for seed in first.about["planned"] if any(seed in part.about["seeds"] for part in parts)]
    table = _ordered(_joined(parts, "table", _ROW), seeds)
    _require_whole(table)
    compared = _ordered(_joined(parts, "compared", ["results", "seed", *_COMPARED]), seeds)
    # Read before anything is written: the target may be among the folders.
    lines = dict(_null_fronts(parts, list(compared["results"].unique()), seeds))
    about = {**first.about, "seeds": seeds, **_together([part.about for part in parts])}
    out = make_folder(Path(target) / first.about["study"])
    whole = next((part for part in parts if part.about["seeds"] == seeds), None)
    if whole is None:
        for name, own in compared.groupby("results", sort=False):
            write_comparison(over_seeds(own.drop(columns="results")), out / f"{name}.csv")
    for name, line in lines.items():
        with atomic_path(out / name) as temporary:
            line.to_csv(temporary, index=False, float_format="%.5g")
    if whole is None or whole.folder.resolve() != out.resolve():
        results = list(compared["results"].unique())
        # Figures of fewer seeds would stand beside tables of more.
        for figure in _figures(out, results):
            figure.unlink()
        tables = [] if whole is None else [whole.folder / f"{name}.csv" for name in results]
        for file in tables + ([] if whole is None else _figures(whole.folder, results)):
            with atomic_path(out / file.name) as temporary:
                shutil.copyfile(file, temporary)
    write_table(out / "by_seed.parquet", compared)
    write_table(out / "results.parquet", table)
    write_text(out / "provenance.json", json.dumps(about, indent=2) + "\n")
    return out


def _figures(folder: Path, results: Iterable[str]) -> list[Path]:
    """The pictures that ``study results`` writes; others are no business of a merge."""
    of_comparisons = [picture for name in results for picture in folder.glob(f"{glob.escape(name)}_*.png")]
    return sorted({*of_comparisons, *folder.glob("moved_prior.png")})


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """A comparison's table from its numbers for each seed (:func:`fairline.jobs.by_seed`).

    Args:
        rows: Of one comparison, with ``seed`` and ``train_n``.

    Returns:
        Rows as of ``comparison.parquet``: means over seeds and Student's limits. Rows of a class are of seeds that all
        have it; what some seeds do not have otherwise is the mean over those that do.
    """
    count = rows["seed"].nunique()
    told = []
    for key, own in rows.groupby(_COMPARED, sort=False, dropna=False):
        row = dict(zip(_COMPARED, key, strict=True))
        if row["class"] and len(own) < count:
            continue
        values = own["value"].to_numpy(float)
        bounds = (TAUS[0], TAUS[-1]) if row["measure"] == "tau" else (-np.inf, np.inf)
        low, high = mean_interval(values, *bounds)
        more = {"value": values.mean(), "low": low, "high": high, "n": own["n"].mean(), "replicates": len(own)}
        chosen = {"kept": own["kept"].mean(), "tried": own["tried"].max()}
        chosen["strength"] = " · ".join(filter(None, own["strength"]))
        told.append({**row, **more, "baseline": own["baseline"].iloc[0], **chosen, "train_n": own["train_n"].mean()})
    frame = pd.DataFrame(told)
    # The order of a comparison: what it compares, the Pareto front, what shifts have to do with.
    front = pareto(frame)
    free = frame["measure"].isin(set(frame["measure"]) - _OF_METHODS)
    return pd.concat([frame[~free], front, frame[free]], ignore_index=True)


#: Measures of :func:`fairline.audit.comparison.compare`.
_OF_METHODS = {
    *("accuracy", "recall", "gain", "relative_drop", "mitigation_drop", "beyond_control", "balanced_accuracy"),
}


def _require_same(first: _Results, other: _Results) -> None:
    """Refuse the results of another study."""
    for name, said in (
        ("study", "of study '{}'"),
        ("scale", "at the scale “{}”"),
        ("spec_hash", "of the spec with hash {}"),
    ):
        if first.about[name] != other.about[name]:
            raise FairlineError(
                f"{first.folder} holds results {said.format(first.about[name])}, {other.folder} "
                f"{said.format(other.about[name])}; only results of one study at one scale are merged."
            )


def _joined(parts: Sequence[_Results], what: str, keys: Sequence[str]) -> pd.DataFrame:
    """The rows of all folders, each seed from the first that has it; others must have the same."""
    taken: dict[int, tuple[Path, pd.DataFrame]] = {}
    for part in parts:
        for seed, rows in getattr(part, what).groupby("seed", sort=False):
            if seed not in taken:
                taken[seed] = (part.folder, rows)
            elif not _plain(rows, keys).equals(_plain(taken[seed][1], keys)):
                raise FairlineError(
                    f"{taken[seed][0]} and {part.folder} hold different numbers for seed {seed}; keep one of them."
                )
    return pd.concat([rows for _, rows in taken.values()], ignore_index=True)


def _plain(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows without when and where, in an order of their own."""
    kept = rows.drop(columns=_WHEN_AND_WHERE, errors="ignore")
    return kept[sorted(kept)].sort_values(list(keys), kind="stable").reset_index(drop=True)


def _ordered(rows: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    """Rows in the order of the study's seeds."""
    place = rows["seed"].map({seed: at for at, seed in enumerate(seeds)})
    return rows.iloc[np.argsort(place.to_numpy(), kind="stable")].reset_index(drop=True)


def _require_whole(table: pd.DataFrame) -> None:
    """Refuse a seed that lacks networks which another has."""
    held = {seed: set(own[_NETWORK].itertuples(index=False, name=None)) for seed, own in table.groupby("seed")}
    every = set().union(*held.values())
    for seed, own in held.items():
        if own != every:
            lacking = min(every - own)
            where = " ".join(str(part) for part in lacking if part != "")
            raise FairlineError(f"Seed {seed} is not finished: it lacks the network {where}, which other seeds have.")


def _null_fronts(
    parts: Sequence[_Results], names: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """What shifts reach for nothing, by seed, of each comparison."""
    for name in names:
        tables: dict[int, pd.DataFrame] = {}
        for part in parts:
            file = part.folder / f"{name}_null_front.csv"
            with reading(file):
                line = pd.read_csv(file, keep_default_na=False)
            for seed, own in line.groupby("seed", sort=False):
                tables.setdefault(seed, own)
        yield f"{name}_null_front.csv", pd.concat([tables[seed] for seed in seeds])


def _together(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the parts come from, and the day of the last."""
    lists = ("commits", "devices", "platforms", "python")
    packages: dict[str, str] = {}
    for about in abouts:
        packages |= about["packages"]
    found: dict[str, Any] = {name: sorted({each for about in abouts for each in about[name]}) for name in lists}
    return {**found, "packages": packages, "written": max(about["written"] for about in abouts)}


__all__ = ["merge_results", "over_seeds"]
