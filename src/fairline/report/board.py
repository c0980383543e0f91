"""The board: one small file a result, checked field by field. No source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fairline._io import read_json
from fairline.data.grouped import OVERALL, WORST
from fairline.errors import FairlineError

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Proportion = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

#: What the linearizer of a base network is called.
NO_LINEARIZER = "none"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Share(_Strict):
    """An accuracy, with 95 % limits where there are any, and the images that it is of, a mean over seeds."""

    value: Proportion
    low: Proportion | None = None
    high: Proportion | None = None
    n: Positive | None = None

    @model_validator(mode="after")
    def _limits_fit(self) -> Share:
        if (self.low is None) != (self.high is None):
            raise ValueError("one limit stands without the other")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the lower limit {self.low} is above the upper one, {self.high}")
        return self


class Accuracy(_Strict):
    """Of all images, of each group, and of the worst group of each seed where that was measured."""

    overall: Share
    groups: dict[Text, Share] = Field(min_length=1)
    worst: Share | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> Accuracy:
        for reserved in (OVERALL, WORST):
            if reserved in self.groups:
                raise ValueError(f"a group cannot be called '{reserved}'")
        return self

    @property
    def lowest(self) -> str:
        """The group that is served worst."""
        return min(self.groups, key=lambda name: self.groups[name].value)

    @property
    def of_worst(self) -> Share:
        """The worst group's: the mean of every seed's where it is known, else that of the lowest mean."""
        return self.worst or self.groups[self.lowest]


class Data(_Strict):
    """A data set: its name and options as for :func:`fairline.data.load`, and what makes its groups."""

    name: Text
    groups: Text
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def told(self) -> str:
        """In words."""
        options = [key if value is True else f"{key} {value}" for key, value in self.options.items() if key != "groups"]
        return ", ".join([self.name, *options])


class Network(_Strict):
    """The network that was linearized; ``relus`` are those of the original."""

    architecture: Text
    relus: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def told(self) -> str:
        """In words."""
        options = [f"{name.replace('_', ' ')} {value}" for name, value in self.options.items()]
        width = [] if self.width is None else [f"width {self.width}"]
        relus = [] if self.relus is None else [f"{self.relus:,} ReLUs"]
        return ", ".join([self.architecture, *width, *options, *relus])


class Method(_Strict):
    """How the network came about.

    ``linearizer`` is ``none`` for a base network, ``masks`` what the study calls the placement, ``surrogate`` what
    stands in a ReLU's place, and ``finetune`` the objective or the study's label of it.
    """

    name: Text
    linearizer: Text
    masks: str = ""
    surrogate: str = "identity"
    finetune: str = ""


class Budget(_Strict):
    """What was kept; ``asked`` is the count that the network was made for, where that differs."""

    percent: float = Field(ge=0, le=100)
    relus: float | None = Field(default=None, ge=0)
    asked: int | None = Field(default=None, ge=0)


class Cost(_Strict):
    """What one image costs under cryptography, of the network as it is or compiled."""

    protocol: Text
    network: Text
    basis: Annotated[str, Field(pattern=r"predicted|measured")]
    compiled: bool
    seconds: Positive | None = None
    megabytes: Positive | None = None
    rounds: Positive | None = None
    seeds: list[int] = Field(default_factory=list)


class Provenance(_Strict):
    """Where measured numbers come from: enough to make them again."""

    study: Text
    spec: Text
    spec_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    commits: list[Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]] = Field(min_length=1)
    devices: list[Text] = Field(min_length=1)
    platforms: list[Text] = Field(default_factory=list)
    python: list[Text] = Field(min_length=1)
    packages: dict[Text, Text] = Field(min_length=1)
    command: Text
    date: date


class Source(_Strict):
    """Where published numbers stand, to look them up: the table, figure or section, and the page if there is one."""

    paper: Text
    where: Text
    page: int | None = Field(default=None, gt=0)
    url: Text | None = None


class _Result(_Strict):
    method: Method
    data: Data
    network: Network
    budget: Budget
    accuracy: Accuracy
    costs: list[Cost] = Field(default_factory=list)
    scale: Text

    @model_validator(mode="after")
    def _counts_fit(self) -> _Result:
        relus, total = self.budget.relus, self.network.relus
        if relus is not None and total is not None:
            if relus > total:
                raise ValueError(f"budget.relus are {relus:g}, but the network has {total}")
            if abs(100 * relus / total - self.budget.percent) > 0.01:
                raise ValueError(f"budget.percent is {self.budget.percent}, but {relus:g} of {total} ReLUs are kept")
        return self


class Measured(_Result):
    """A result of fairline, with where it comes from."""

    kind: Literal["measured"]
    seeds: list[int] = Field(min_length=1)
    provenance: Provenance

    @property
    def seeds_told(self) -> int | None:
        """How many seeds."""
        return len(self.seeds)

    @property
    def origin(self) -> str:
        """In words."""
        return self.provenance.study


class Published(_Result):
    """A number that others published, with where it stands; ``seeds`` is how many runs they say it is of."""

    kind: Literal["published"]
    seeds: int | None = Field(default=None, gt=0)
    source: Source

    @property
    def seeds_told(self) -> int | None:
        """How many seeds, if it is said."""
        return self.seeds

    @property
    def origin(self) -> str:
        """In words."""
        page = "" if self.source.page is None else f", p. {self.source.page}"
        return f"{self.source.paper}, {self.source.where}{page}"


Entry = Measured | Published
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])


def parse_entry(content: Any, where: str | Path) -> Entry:
    """Check one entry.

    Args:
        content: As JSON gives it.
        where: The file, for messages.

    Returns:
        The entry.

    Raises:
        FairlineError: A field is unknown, missing or wrong; the sentence names file and field.
    """
    try:
        return _ENTRY.validate_json(json.dumps(content))
    except ValidationError as error:
        # A misspelt field also leaves the right one missing; the misspelling is the cause.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        place = [str(part) for part in first["loc"] if part not in ("measured", "published")]
        field = ".".join(place) or ("kind" if first["type"].startswith("union_tag") else "the entry")
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise FairlineError(f"{where}: {field}: {reason}.") from None


def read_board(folder: str | Path) -> dict[str, Entry]:
    """Read every entry of a board.

    Args:
        folder: Of JSON files, in it or below.

    Returns:
        The entries by file name, relative to the folder, in its order.

    Raises:
        FairlineError: There is none, one is wrong, or two are the same result.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FairlineError(f"{folder} is no folder of entries.")
    entries: dict[str, Entry] = {}
    seen: dict[str, str] = {}
    for file in sorted(path.rglob("*.json")):
        entry, name = parse_entry(read_json(file), file), file.relative_to(path).as_posix()
        first = seen.setdefault(entry.model_dump_json(), name)
        if first != name:
            raise FairlineError(f"{file} is the same result as {path / first}.")
        entries[name] = entry
    if not entries:
        raise FairlineError(f"{folder} holds no entry (no *.json, there or below).")
    return entries


#: What entries are chosen by, and the names that an entry has there.
_FILTERS = {
    "data": lambda entry: [entry.data.name, entry.data.told],
    "groups": lambda entry: [entry.data.groups],
    "network": lambda entry: [entry.network.architecture],
    "method": lambda entry: [entry.method.name, entry.method.linearizer],
    "finetune": lambda entry: [entry.method.finetune],
    "study": lambda entry: [entry.provenance.study if isinstance(entry, Measured) else ""],
    "kind": lambda entry: [entry.kind],
}


def choose(
    entries: Mapping[str, Entry], *, budgets: Sequence[float | int] = (), **patterns: Sequence[str]
) -> dict[str, Entry]:
    """Entries that are asked for.

    Args:
        entries: From :func:`read_board`.
        budgets: Fractions or counts of ReLUs kept; of all, if empty. A fraction is met to a hundredth of itself.
        patterns: Names of ``data``, ``groups``, ``network``, ``method``, ``finetune``, ``study`` and ``kind``, in which
            ``*`` stands for anything and capitals do not matter; an empty list is all.

    Returns:
        Those that meet one pattern of each filter, and one budget.

    Raises:
        FairlineError: A pattern is met by none of all entries, or none is left.
    """
    found = dict(entries)
    for name, wanted in patterns.items():
        held = sorted({each for entry in entries.values() for each in _FILTERS[name](entry) if each})
        for pattern in wanted:
            if not any(_meets(each, pattern) for each in held):
                raise FairlineError(f"The board has no {name} '{pattern}'; it has {', '.join(held)}.")
        if wanted:
            found = {
                file: entry
                for file, entry in found.items()
                if any(_meets(each, pattern) for each in _FILTERS[name](entry) for pattern in wanted)
            }
    if budgets:
        found = {file: entry for file, entry in found.items() if any(_is_kept(entry, each) for each in budgets)}
    if not found:
        raise FairlineError("No entry of the board meets all filters together.")
    return found


def _meets(name: str, pattern: str) -> bool:
    return fnmatchcase(name.lower(), pattern.lower())


def _is_kept(entry: Entry, budget: float | int) -> bool:
    if isinstance(budget, float):
        return abs(entry.budget.percent / 100 - budget) <= 0.01 * budget
    return budget in (entry.budget.asked, entry.budget.relus)


@dataclass(frozen=True)
class Panel:
    """Results that may be set side by side: the same data, groups, network and scale.

    Attributes:
        data: Which.
        network: Which.
        scale: What was reduced, in words.
        entries: By file name, the whole network first, then by method; published ones of the same data, groups and
            architecture are there whatever their scale.
        mark: What else the title says, where it would be another's: its studies.
    """

    data: Data
    network: Network
    scale: str
    entries: dict[str, Entry]
    mark: str = ""

    @property
    def title(self) -> str:
        """In words."""
        return " · ".join(filter(None, [f"{self.data.told} by {self.data.groups}", self.network.told, self.mark]))

    @property
    def studies(self) -> str:
        """The first of its studies by name, and how many others there are."""
        names = sorted({entry.origin for entry in self.entries.values() if isinstance(entry, Measured)})
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return names[0] + more if names else ""


def panels(entries: Mapping[str, Entry]) -> list[Panel]:
    """Entries in the panels that they belong to; one network that several studies share is there once.

    Args:
        entries: From :func:`read_board` or :func:`choose`.

    Returns:
        The panels, the fullest of each data set first, each with a title of its own. A published entry is in each panel
        of its data, groups and architecture, or in one of its own.
    """
    by_key: dict[str, dict[str, Entry]] = {}
    for file, entry in entries.items():
        if isinstance(entry, Measured):
            by_key.setdefault(_key(entry), {})[file] = entry
    published = {file: entry for file, entry in entries.items() if isinstance(entry, Published)}
    placed: set[str] = set()
    for own in by_key.values():
        first = next(iter(own.values()))
        beside = {file: entry for file, entry in published.items() if _kin(entry) == _kin(first)}
        placed |= set(beside)
        own |= beside
    for file, entry in published.items():
        if file not in placed:
            by_key.setdefault(_key(entry), {})[file] = entry
    found = []
    for own in by_key.values():
        first = next(iter(own.values()))
        found.append(Panel(first.data, first.network, first.scale, dict(_ordered(own))))
    titles = [panel.title for panel in found]
    found = [replace(panel, mark=panel.studies if titles.count(panel.title) > 1 else "") for panel in found]
    return sorted(found, key=lambda panel: (panel.data.told, panel.data.groups, -len(panel.entries)))


def _key(entry: Entry) -> str:
    return json.dumps([entry.data.model_dump(), entry.network.model_dump(), entry.scale], sort_keys=True, default=str)


def _kin(entry: Entry) -> tuple[str, str, str]:
    return entry.data.told, entry.data.groups, entry.network.architecture


def _ordered(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    """The base network, what kept all ReLUs, then method by method, each from its most ReLUs on; each network once."""
    shared: list[tuple[Any, ...]] = []
    order = list(dict.fromkeys(entry.method.name for entry in entries.values()))
    for file, entry in sorted(
        entries.items(),
        key=lambda item: (
            item[1].method.linearizer != NO_LINEARIZER,
            item[1].kind,
            item[1].budget.percent < 100,
            order.index(item[1].method.name),
            item[1].origin,
            -item[1].budget.percent,
        ),
    ):
        if isinstance(entry, Measured):
            if (network := (entry.method, entry.budget, entry.accuracy)) in shared:
                continue
            shared.append(network)
        yield file, entry


def table(entries: Mapping[str, Entry]) -> pd.DataFrame:
    """A row an entry.

    Args:
        entries: By file name.

    Returns:
        What it is of, accuracies with limits, the first of its costs, and where it comes from.
    """
    rows = []
    for file, entry in entries.items():
        cost = next(iter(entry.costs), None)
        worst = entry.accuracy.of_worst
        rows.append(
            {
                "entry": file,
                "kind": entry.kind,
                "data": entry.data.told,
                "groups": entry.data.groups,
                "network": entry.network.architecture,
                "width": entry.network.width,
                "network_relus": entry.network.relus,
                "method": entry.method.name,
                "linearizer": entry.method.linearizer,
                "finetune": entry.method.finetune,
                "percent": entry.budget.percent,
                "relus": entry.budget.relus,
                "overall": entry.accuracy.overall.value,
                "overall_low": entry.accuracy.overall.low,
                "overall_high": entry.accuracy.overall.high,
                "worst": worst.value,
                "worst_low": worst.low,
                "worst_high": worst.high,
                "worst_group": entry.accuracy.lowest,
                "seeds": entry.seeds_told,
                **{name: None if cost is None else getattr(cost, name) for name in ("seconds", "megabytes", "rounds")},
                "cost_of": "" if cost is None else cost_told(cost),
                "scale": entry.scale,
                "origin": entry.origin,
            }
        )
    return pd.DataFrame(rows)


def cost_told(cost: Cost) -> str:
    """Of what a cost is, in words."""
    return ", ".join([cost.protocol, cost.network, cost.basis, *(["compiled"] if cost.compiled else [])])


def groups_table(entries: Mapping[str, Entry]) -> pd.DataFrame:
    """A row an entry and group, ``overall`` and ``worst group`` among them: value, limits and images."""
    rows = [
        {"entry": file, "group": name, **share.model_dump()}
        for file, entry in entries.items()
        for name, share in [
            (OVERALL, entry.accuracy.overall),
            *entry.accuracy.groups.items(),
            (WORST, entry.accuracy.of_worst),
        ]
    ]
    return pd.DataFrame(rows, columns=["entry", "group", "value", "low", "high", "n"])


def costs_table(entries: Mapping[str, Entry]) -> pd.DataFrame:
    """A row an entry and protocol."""
    rows = [
        {"entry": file, **cost.model_dump(exclude={"seeds"})} for file, entry in entries.items() for cost in entry.costs
    ]
    columns = [name for name in Cost.model_fields if name != "seeds"]
    return pd.DataFrame(rows, columns=["entry", *columns])


__all__ = [
    "NO_LINEARIZER",
    "Accuracy",
    "Budget",
    "Cost",
    "Data",
    "Entry",
    "Measured",
    "Method",
    "Network",
    "Panel",
    "Provenance",
    "Published",
    "Share",
    "Source",
    "choose",
    "cost_told",
    "costs_table",
    "groups_table",
    "panels",
    "parse_entry",
    "read_board",
    "table",
]
