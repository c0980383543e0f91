"""The one writer of pages: a template and its charts in one self-contained HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fairline._io import read_json, write_text
from fairline.data.grouped import OVERALL, WORST, too_few
from fairline.runs import Run

_PERCENT = re.compile(r"(?<=\d) %")


def write_page(target: Path, template: str, drawn: Mapping[str, Any], **content: Any) -> Path:
    """Render a template with its charts into one self-contained file.

    Args:
        target: The HTML file.
        template: Its name in ``report/templates``.
        drawn: Altair charts by name.
        content: What else the template shows.

    Returns:
        The file.
    """
    from jinja2 import Environment, PackageLoader

    from fairline.charts import DARK

    # Every template is HTML, whatever its name ends in.
    environment = Environment(
        loader=PackageLoader("fairline.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_unbroken,
    )
    environment.policies["json.dumps_kwargs"] = {"default": str}
    specs = {name: chart.to_dict() for name, chart in drawn.items()}
    page = environment.get_template(template).render(specs=specs, javascript=javascript(), dark_colours=DARK, **content)
    write_text(target, page)
    return target


def _unbroken(value: Any) -> Any:
    """A number and its per cent sign stay on one line; data of charts, which are no plain text, are left alone."""
    return _PERCENT.sub("\u00a0%", value) if type(value) is str else value


def javascript() -> str:
    """Vega, Vega-Lite and vega-embed in one script, so that the page needs no network."""
    import altair as alt
    import vl_convert

    # The stub claims a required first argument.
    bundle: str = vl_convert.javascript_bundle(vl_version=alt.SCHEMA_VERSION.lstrip("v").rpartition(".")[0])  # type: ignore[call-arg]
    return bundle.replace("</script", "<\\/script")


def settings(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What every run that led here was told, the data, and the machine."""
    sections = []
    lineage = run.config.get("lineage") or {str(each.folder): each.config for each in run.lineage()}
    for folder, config in lineage.items():
        rows = [
            (key, _plain(value))
            for key, value in config.items()
            if key not in ("command", "data", "parent") and value not in ({}, [], None)
        ]
        sections.append((f"{config['command']}: {Path(folder).name}", rows))
    # Predictions that come in a file have no images here.
    data = run.config.get("data")
    if data is not None:
        rows = [
            ("name", data["name"]),
            ("split seed", str(data["split_seed"])),
            ("fingerprint", data["fingerprint"]),
        ]
        rows += [(key, _plain(value)) for key, value in data["options"].items()]
        rows += [(f"groups of this {run.command}", _plain(run.config["groups"]))] if "groups" in run.config else []
        sections.insert(0, ("data", rows))
    machine = read_json(run.folder / "environment.json")
    rows = [(key, _plain(value)) for key, value in machine.items() if value]
    return [*sections, (f"environment of the {run.command} run", rows)]


def by_groups(run: Run) -> str:
    """By which groups a run measures, for its title; empty where they are those of its data."""
    return f" by {_plain(run.config['groups'])}" if "groups" in run.config else ""


def too_small(frame: pd.DataFrame, split: str, quotes: str = "''") -> str:
    """Which groups of an audit or a comparison have too few images; see :func:`fairline.data.grouped.too_few`."""
    rows = frame[(frame["measure"] == "accuracy") & ~frame["group"].isin([OVERALL, WORST])]
    return too_few(rows.groupby("group", sort=False)["n"].max(), split, quotes)


def _plain(value: Any) -> str:
    """Put a setting in words.

    >>> _plain({"lr": 0.001, "options": {}, "seeds": [1, 2]})
    'lr 0.001, seeds 1, 2'

    Returns:
        The words; parts that are empty are left out.
    """
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items() if item not in ({}, None))
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
