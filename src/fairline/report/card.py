"""The model card of a network, as its audit tells it: who it serves how well, what it costs, what it is for.

A card is what Mitchell et al. (Model Cards for Model Reporting, FAT* 2019) ask for: accuracy of each group beside that
of all, with limits, and the uses that were thought of. It is written by ``huggingface_hub``'s ``ModelCard``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fairline._io import make_folder, read_json, write_json, write_text
from fairline.data.grouped import OVERALL, TOO_SMALL
from fairline.errors import FairlineError
from fairline.report.html import judged
from fairline.report.page import settings
from fairline.report.verdict import Candidate, limits_told, signed
from fairline.runs import NetworkInfo, Run, linearized_networks, load_info

#: Of a network's folder, what is published.
_NETWORK = ("model.safetensors", "masks.safetensors", "network.json")


@dataclass(frozen=True)
class About:
    """What no measurement tells.

    Attributes:
        license: Of the weights: an identifier of the Hub such as ``"apache-2.0"``.
        intended_use: Who may use it for what, in a sentence or more.
        data_license: Of the data that it was trained on.
        title: Of the card.
    """

    license: str
    intended_use: str
    data_license: str = ""
    title: str = ""

    def __post_init__(self) -> None:
        """Refuse what would leave a card without its point."""
        for name in ("license", "intended_use"):
            if not getattr(self, name).strip():
                raise FairlineError(f"A card needs its {name.replace('_', ' ')}.")


def write_card(
    audit: str | Path,
    out: str | Path,
    about: About,
    *,
    network: str | None = None,
    within: float = 5.0,
    critical: Sequence[str] = (),
) -> Path:
    """Write a folder to publish: a network, what it takes, and its card.

    Args:
        audit: Folder of a finished audit run.
        out: The folder to write: ``README.md``, ``network.json``, weights, masks and ``preprocessing.json``.
        about: What no measurement tells.
        network: Which network of the audit, such as ``students/budget-307``; not needed where there is one.
        within: Percentage points that any group or class may lose.
        critical: Classes whose recall may not fall.

    Returns:
        The folder.

    Raises:
        FairlineError: It is no audit, has no such network or several, or the folder to write holds something else.
    """
    run = Run.read(audit, "audit")
    frame, found = judged(run, within, critical)
    key, folder = _chosen(run, network)
    info = load_info(folder)
    takes = _preprocessing(run, info)
    own = next((each for each in found if each.model == key), None)
    told = _card(run, frame[frame["model"] == key], own, info, takes, about)
    target = Path(out)
    if target.exists() and (not target.is_dir() or not {file.name for file in target.iterdir()} <= _WRITTEN):
        raise FairlineError(f"{out} holds something else than a card and its network; choose another --out.")
    make_folder(target)
    for file in (folder / name for name in _NETWORK):
        if file.exists():
            shutil.copyfile(file, target / file.name)
    write_json(target / "preprocessing.json", takes)
    # Last, so that a card means a whole folder.
    write_text(target / "README.md", told)
    return target


_WRITTEN = {*_NETWORK, "README.md", "preprocessing.json"}


def _chosen(run: Run, network: str | None) -> tuple[str, Path]:
    """Name in the audit's tables, and folder, of the network that the card is of."""
    folders = linearized_networks(run.sources()) or {"base": run.base().base_network()}
    listed = ", ".join(folders)
    if network is None and len(folders) > 1:
        raise FairlineError(f"{run.folder} is of {len(folders)} networks ({listed}); choose one with --network.")
    key = next(iter(folders)) if network is None else network
    if key not in folders:
        raise FairlineError(f"{run.folder} is of no network '{key}'; it has {listed}.")
    if load_info(folders[key]).compiled:
        raise FairlineError(f"{key} is compiled; publish the network that it was compiled of.")
    return key, folders[key]


def _preprocessing(run: Run, info: NetworkInfo) -> dict[str, Any]:
    """How an image becomes what the network takes."""
    file = run.folder / "classes.json"
    return {
        "image_size": info.model.image_size,
        "in_channels": info.model.in_channels,
        "pixels": "0 to 255, then (pixel / 255 - mean) / std for each channel",
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "classes": read_json(file)["classes"] if file.exists() else [],
    }


def _card(
    run: Run,
    rows: pd.DataFrame,
    own: Candidate | None,
    info: NetworkInfo,
    takes: Mapping[str, Any],
    about: About,
) -> str:
    try:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData
    except ImportError:
        raise FairlineError("A card takes the extra: pip install 'fairline[hub]'.") from None
    accuracy = rows[rows["measure"] == "accuracy"].set_index("group")
    name = about.title or f"{info.model.name} with {info.relus:,} ReLUs, {run.data.name}"
    split = run.config["split"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=run.data.name,
            dataset_name=run.data.name,
            dataset_split=split,
            metric_type="accuracy",
            metric_name="accuracy" if group == OVERALL else f"accuracy, {group}",
            metric_value=round(float(row["value"]), 4),
        )
        for group, row in accuracy.iterrows()
    ]
    data = ModelCardData(
        model_name=name,
        library_name="fairline",
        license=about.license,
        pipeline_tag="image-classification",
        tags=["private-inference", "linearized", "fairness"],
        eval_results=results,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "card.md.j2"),
        name=name,
        info=info,
        about=about,
        takes=takes,
        split=split,
        resamples=run.config["resamples"],
        groups=_groups(rows),
        verdict=None if own is None else {"answer": own.answer, "why": own.reason(), "within": own.verdict.within},
        saved="" if own is None else own.saved_told(),
        settings=[(_cell(title), [(_cell(k), _cell(v)) for k, v in part]) for title, part in settings(run)],
    )
    return str(card)


def _groups(rows: pd.DataFrame) -> list[dict[str, str]]:
    """A row of the table for everyone: accuracy and change, with limits."""
    found = rows[rows["class"] == ""].set_index(["group", "measure"])
    told = []
    for group in dict.fromkeys(rows.loc[rows["measure"] == "accuracy", "group"]):
        row = found.loc[(group, "accuracy")]
        change = found.loc[(group, "accuracy_change")] if (group, "accuracy_change") in found.index else None
        told.append(
            {
                "who": "**all**" if group == OVERALL else _cell(group),
                "n": f"{int(row['n']):,}{'' if row['n'] >= TOO_SMALL else ' (too few to judge)'}",
                "accuracy": f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]",
                "change": "" if change is None else f"{signed(change['value'])}{limits_told(change)}",
            }
        )
    return told


def _cell(text: Any) -> str:
    """A name as one cell of a table in Markdown."""
    plain = str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    return plain.replace("<", "&lt;").replace("[", "\\[")


__all__ = ["About", "write_card"]
