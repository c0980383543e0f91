"""What a study runs: a YAML file under ``papers/``, checked field by field."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from fairline._io import json_digest
from fairline._own import files, is_own, located
from fairline.errors import FairlineError
from fairline.jobs import LAST_LAYERS, last_layer_told
from fairline.jobs.choose import strength
from fairline.objectives.afr import gammas_of
from fairline.objectives.choice import Rule, Strength, as_given
from fairline.objectives.last_layer import penalties_of
from fairline.objectives.post_hoc import TAUS, Method
from fairline.objectives.selective import points_of
from fairline.study._yaml import Loader, read

#: How a last layer is retrained; see :func:`fairline.jobs.last_layer_job`.
Way = Literal["dfr", "afr", "self"]

#: One strength, several to choose from, or None for those that the method tries by itself.
Strengths = Annotated[float | list[float] | None, BeforeValidator(partial(as_given, what="A strength"))]

#: What each way to a last layer makes of a strength: the values to choose from.
_STRENGTHS: dict[Way, Callable[[Strength], tuple[float, ...]]] = {
    "dfr": penalties_of,
    "afr": gammas_of,
    "self": points_of,
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSource(_Strict):
    """A data set as for :func:`fairline.data.load`; ``groups`` beside the name is the option of that name."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _groups_are_an_option(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "groups" not in content:
            return content
        content = dict(content)
        groups, options = content.pop("groups"), content.get("options") or {}
        if not isinstance(options, dict) or "groups" in options:
            raise ValueError("groups are named twice, here and among the options")
        if not isinstance(groups, str) and not (isinstance(groups, list) and all(isinstance(g, str) for g in groups)):
            raise ValueError("groups are a column, bins of a number, or a list of them")
        return {**content, "options": {**options, "groups": groups}}


class Network(_Strict):
    """An architecture as for :func:`fairline.models.build`."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Masks(_Strict):
    """One way to place the ReLUs: a linearizer, and the objective that the masks are learned under.

    ``finetune`` holds settings of the finetune behind these masks alone, such as more epochs where placing took none.
    """

    budgets: list[float | int] = Field(min_length=1)
    method: str = "snl"
    objective: str = "erm"
    options: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _known_by(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Studies that finetune all masks alike keep the hash under which their results are known."""
        content: dict[str, Any] = written(self)
        if not self.finetune:
            del content["finetune"]
        return content


class Adjust(_Strict):
    """A rebalancing of classes after the finetune; see :func:`fairline.adjust`."""

    method: Method = "logit_adjust"
    tau: Strengths = None
    rule: Rule = "worst_group"
    within: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def tries(self) -> int:
        """Values that it chooses from; 1 is no choice."""
        # 0 leaves the network as it is, which is tried in any case.
        return 1 if isinstance(self.tau, float) else sum(tau != 0 for tau in (TAUS if self.tau is None else self.tau))

    @property
    def label(self) -> str:
        """What it is called beside its finetune."""
        told = self.method.replace("_", " ")
        if isinstance(self.tau, float):
            return f"{told} tau={self.tau:g}"
        return told if self.rule == "worst_group" else f"{told} {self.rule.replace('_', ' ')}"


class LastLayer(_Strict):
    """A retrained last layer; see :func:`fairline.jobs.last_layer_job`."""

    method: Way = "dfr"
    balance: Literal["group", "class", "group_and_class"] = "group"
    part: Literal["val", "train"] = "val"
    strength: Strengths = None
    within: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _known_by(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Studies that name no strength keep the hash under which their results are known."""
        content: dict[str, Any] = written(self)
        if self.strength is None:
            content.pop("strength", None)
        return content

    @model_validator(mode="after")
    def _fits(self) -> LastLayer:
        if isinstance(self.strength, float) and self.within is not None:
            raise ValueError("a strength is given, or chosen within some points of overall accuracy, not both")
        _STRENGTHS[self.method](self.strength)
        if self.method != "dfr" and self.balance != "group":
            raise ValueError(f"images are balanced by {self.balance} under dfr only")
        return self

    @property
    def tries(self) -> int:
        """Values that it chooses from; 1 is no choice."""
        return len(_STRENGTHS[self.method](self.strength))

    @property
    def arguments(self) -> dict[str, Any]:
        """What is said of it, beyond deep feature reweighting by group."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def label(self) -> str:
        """What it is called beside its finetune; as comparisons have it."""
        return last_layer_told(self.arguments)

    @property
    def folder(self) -> str:
        """The end of its cells' names."""
        # Deep feature reweighting is what was done before there were others, so it is not named.
        first = "last-layer" if self.method == "dfr" else self.method
        rest = self.label.removeprefix(LAST_LAYERS[self.method]).replace("=", "-").split()
        return "-".join([first, *rest])


def _said(value: object) -> str:
    """As what a last layer is given, so that a mistake is told of that alone."""
    if isinstance(value, (bool, list)):
        return type(value).__name__
    return "mapping" if isinstance(value, (dict, LastLayer)) else "name"


OneWay = Annotated[Annotated[Way, Tag("name")] | Annotated[LastLayer, Tag("mapping")], Discriminator(_said)]
LastLayers = Annotated[
    Annotated[bool, Tag("bool")]
    | Annotated[Way, Tag("name")]
    | Annotated[LastLayer, Tag("mapping")]
    | Annotated[list[OneWay], Field(min_length=1), Tag("list")],
    Discriminator(_said),
]


class Finetune(_Strict):
    """One finetune of the networks of some masks; with ``sweep`` one a value, of which validation data choose."""

    objective: str
    label: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    masks: list[str] = Field(min_length=1)
    last_layer: LastLayers = False
    adjust: list[Adjust] = Field(default_factory=list)

    @model_serializer(mode="wrap")
    def _known_by(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Studies that adjust and sweep nothing keep the hash under which their results are known."""
        content: dict[str, Any] = written(self)
        for name in ("adjust", "sweep"):
            if not getattr(self, name):
                del content[name]
        return content

    @model_validator(mode="after")
    def _one_strength(self) -> Finetune:
        if not self.sweep:
            return self
        if len(self.sweep) > 1:
            raise ValueError(f"a sweep is of one option, not of {' and '.join(self.sweep)}")
        ((option, values),) = self.sweep.items()
        if option in self.options:
            raise ValueError(f"'{option}' is swept and stands among the options too")
        if len(values) < 2:
            raise ValueError(f"the sweep of '{option}' needs two values at least")
        if any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError(f"the sweep of '{option}' has a value twice")
        return self

    @model_validator(mode="after")
    def _ways_differ(self) -> Finetune:
        ways: list[LastLayer | Adjust] = [*self.last_layers, *self.adjust]
        labels = [way.label for way in ways]
        for place, label in enumerate(labels):
            if label in labels[:place]:
                raise ValueError(f"'{label}' is there twice")
        return self

    def variants(self) -> list[tuple[str, dict[str, Any]]]:
        """Each strength, such as ``mu=0.5``, and the objective's options under it; without a sweep those alone."""
        if not self.sweep:
            return [("", self.options)]
        ((option, values),) = self.sweep.items()
        return [(strength(option, value), {**self.options, option: value}) for value in values]

    @property
    def last_layers(self) -> list[LastLayer]:
        """The ways in which the last layer is retrained, each for itself."""
        said = self.last_layer if isinstance(self.last_layer, list) else [self.last_layer]
        # Deep feature reweighting is what was done before there were others.
        named = ["dfr" if way is True else way for way in said if way is not False]
        found = [way if isinstance(way, LastLayer) else LastLayer(method=way) for way in named]
        return list({json_digest(way.arguments): way for way in found}.values())

    @property
    def folder(self) -> str:
        """Its part of the run folder's name."""
        return self.label or self.objective.rpartition(":")[2]


class Choose(_Strict):
    """How one value of a sweep is chosen, for each seed, masks and budget; see :func:`fairline.jobs.choose_job`.

    Attributes:
        rule: On the validation part.
        within: Overall accuracy that may be lost against plain distillation, in percentage points.
        reference: Plain distillation, as the study calls it; the method under ``erm`` that is named nothing else, else
            the first one.
    """

    rule: Rule = "worst_group"
    within: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    reference: str = ""


class Audit(_Strict):
    """What is measured of every network, and what of the base networks besides; see :func:`fairline.audit`."""

    measures: list[str] = Field(default_factory=lambda: ["accuracy"])
    base: list[str] = Field(default_factory=list)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    explain: bool = False
    resamples: int = 2000


class StudySpec(_Strict):
    """A study.

    Attributes:
        name: Of its results.
        scale: In words, for every table and figure: what was reduced; see :attr:`said`.
        data: Data sets by short name.
        seeds: A base network each; also the seeds of the splits.
        model: The architecture.
        train: Settings of :func:`fairline.train`.
        masks: Placements by name.
        finetune: Settings of :func:`fairline.finetune`, the same for all masks that name none of their own.
        methods: The finetunes.
        choose: How one value of a method's sweep is chosen.
        baseline: Method that the others are compared with, as the comparison names it. A comparison without it, as one
            without plain distillation under the default, is against the first method.
        audit: What is measured of every network.
        code: Digests of the code of the user's own model and objectives, by the name that the study gives them; noted
            as the file is read, so that a study is known, and its table found, wherever those files are now.
        folder: Of the file, where the user's own files are looked for; no part of what the study is.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    scale: str = ""
    data: dict[str, DataSource] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    model: Network
    train: dict[str, Any] = Field(default_factory=dict)
    masks: dict[str, Masks] = Field(min_length=1)
    finetune: dict[str, Any] = Field(default_factory=dict)
    methods: list[Finetune] = Field(min_length=1)
    choose: Choose = Field(default_factory=Choose)
    baseline: str = "erm"
    audit: Audit = Field(default_factory=Audit)
    code: dict[str, dict[str, str]] = Field(default_factory=dict)
    folder: Path | None = Field(default=None, exclude=True)

    @model_serializer(mode="wrap")
    def _known_by(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Studies without sweeps or code of the user's own are written as ever, and keep the hash they are known by."""
        content: dict[str, Any] = handler(self)
        if not self.code:
            content.pop("code", None)
        if not any(method.sweep for method in self.methods):
            content.pop("choose", None)
        return content

    @property
    def said(self) -> str:
        """The scale in words: as the file says it, else what the study is made of."""
        if self.scale:
            return self.scale
        options = ", ".join(f"{name} {value}" for name, value in self.model.options.items())
        epochs = ", ".join(
            f"{settings['epochs']} {what} epochs"
            for what, settings in (("training", self.train), ("finetuning", self.finetune))
            if "epochs" in settings
        )
        network = self.model.name.rpartition("/")[2] + (f" ({options})" if options else "")
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return ", ".join(filter(None, [network, epochs, seeds])) + "."

    def own_names(self) -> list[str]:
        """The model and objectives that are the user's own, by the names that the study gives them."""
        named = [self.model.name, *(method.objective for method in self.methods)]
        named += [masks.objective for masks in self.masks.values()]
        return [name for name in dict.fromkeys(named) if is_own(name)]

    @model_validator(mode="after")
    def _names_fit(self) -> StudySpec:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed is named twice")
        folders = set()
        for method in self.methods:
            for masks in method.masks:
                if masks not in self.masks:
                    raise ValueError(f"method '{method.folder}' names masks '{masks}', which are not defined")
                if (masks, method.folder) in folders:
                    raise ValueError(f"method '{method.folder}' is there twice for masks '{masks}'; give one a label")
                folders.add((masks, method.folder))
        return self

    @model_validator(mode="after")
    def _sweeps_are_fair(self) -> StudySpec:
        swept = [method for method in self.methods if method.sweep]
        if not swept:
            return self
        counts = [(method.folder, len(method.variants())) for method in swept]
        for method in self.methods:
            ways: list[LastLayer | Adjust] = [*method.last_layers, *method.adjust]
            # A strength that is given is not chosen.
            counts += [(f"{method.folder}, {way.label}", way.tries) for way in ways if way.tries > 1]
        if len({count for _, count in counts}) > 1:
            told = "; ".join(f"{name}: {count}" for name, count in counts)
            raise ValueError(
                f"sweeps, 'tau' of adjust and 'strength' of last_layer try different numbers of values ({told}); "
                "methods compare at equal effort only, so name as many everywhere"
            )
        for masks in dict.fromkeys(masks for method in swept for masks in method.masks):
            self.reference(masks)
        return self

    def reference(self, masks: str) -> Finetune:
        """Plain distillation on some masks, against which what a sweep may lose is counted.

        Returns:
            The method.

        Raises:
            ValueError: There is none.
        """
        plain = [method for method in self.methods if not method.sweep and masks in method.masks]
        if self.choose.reference:
            plain = [method for method in plain if method.folder == self.choose.reference]
        else:
            plain = [method for method in plain if method.objective == "erm"]
        if not plain:
            wanted = f"'{self.choose.reference}'" if self.choose.reference else "plain distillation (objective erm)"
            raise ValueError(f"what a sweep may lose is counted against {wanted}, which masks '{masks}' do not have")
        return next((method for method in plain if method.folder == "erm"), plain[0])

    def part(self, seeds: Sequence[int]) -> list[int]:
        """Some of the seeds, in the study's order.

        Args:
            seeds: Which; each counts once.

        Returns:
            The seeds.

        Raises:
            FairlineError: The study has no such seed.
        """
        for seed in seeds:
            if seed not in self.seeds:
                known = ", ".join(map(str, self.seeds))
                raise FairlineError(f"Study '{self.name}' has no seed {seed}; it has {known}.")
        return [seed for seed in self.seeds if seed in seeds]

    @property
    def digest(self) -> str:
        """Hash of the content, whatever the layout of the file."""
        content = self.model_dump(mode="json")
        if self.audit == Audit():
            # Studies of accuracy alone keep the hash under which their results are known.
            del content["audit"]
        return json_digest(content)


def load_spec(path: str | Path, scale: str | None = None) -> StudySpec:
    """Read a study.

    Two keys are for the file alone and are gone once it is read: ``extends``, another file, relative to this one, whose
    fields hold where this one says nothing; and ``scales``, which names sets of fields that replace others, such as a
    run of seconds to see that all works. Another scale is another study: unless it has a ``name``, it is called
    ``NAME_SCALE``.

    Args:
        path: The file.
        scale: One of its ``scales``.

    Returns:
        The study.

    Raises:
        FairlineError: A file is missing or no YAML, there is no such scale, or a field is unknown, missing or of the
            wrong type; the sentence names file, line and field.
    """
    source = _read(Path(path), ())
    content = source.content
    _forbid_noted(source, path)
    scales = (content.pop("scales", None) if isinstance(content, dict) else None) or {}
    if not isinstance(scales, dict) or not all(isinstance(own, dict | None) for own in scales.values()):
        raise FairlineError(f"{path}: scales are names with fields under each, such as tiny: {{seeds: [0]}}.")
    if scale is not None:
        if scale not in scales:
            known = ", ".join(map(str, scales)) or "none"
            raise FairlineError(f"{path} has no scale '{scale}'; it has {known}.")
        inside = {where[2:]: line for where, line in source.lines.items() if where[:2] == ("scales", scale)}
        own = {"name": re.sub(r"[^a-z0-9_]", "_", f"{content['name']}_{scale}".lower())} if "name" in content else {}
        source = source.replaced_by(_Source(_merged(own, scales[scale] or {}), inside))
        content = source.content
    try:
        spec = StudySpec.model_validate(content)
        folder = Path(path).resolve().parent
        code = {name: files(located(name, folder)) for name in spec.own_names()}
        return spec.model_copy(update={"code": code, "folder": folder})
    except ValidationError as error:
        # A misspelt field also leaves the right one missing; the misspelling is the cause.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"])) or "the study"
        file, line = source.place_of(first["loc"]) or (str(path), None)
        behind = "" if line is None else f" (line {line})"
        raise FairlineError(f"{file}: {where}: {first['msg']}{behind}.") from None


@dataclass(frozen=True)
class _Source:
    """What a file says, and the file and line of each field.

    Attributes:
        content: As YAML gives it.
        lines: File and line by path of keys.
    """

    content: Any
    lines: dict[tuple[Any, ...], tuple[str, int]]

    def replaced_by(self, other: _Source) -> _Source:
        """The fields of another source where it has them, these elsewhere; mappings are joined key by key."""
        lines = {
            where: line
            for where, line in self.lines.items()
            if not any(
                where[:n] in other.lines and not _is_mapping(other.content, where[:n]) for n in range(len(where))
            )
        }
        return _Source(_merged(self.content, other.content), {**lines, **other.lines})

    def place_of(self, location: Sequence[Any]) -> tuple[str, int] | None:
        """File and line of a field, or of the nearest one that holds it."""
        for length in range(len(location), 0, -1):
            if tuple(location[:length]) in self.lines:
                return self.lines[tuple(location[:length])]
        return None


def _forbid_noted(source: _Source, path: str | Path) -> None:
    """Refuse fields that are noted as the file is read, not said in it."""
    if not isinstance(source.content, dict):
        return
    for name in ("code", "folder"):
        if name in source.content:
            file, line = source.place_of((name,)) or (str(path), None)
            raise FairlineError(f"{file}: {name}: Extra inputs are not permitted (line {line}).")


def _merged(below: Any, above: Any) -> Any:
    """Lay one content on top of another.

    >>> _merged({"seeds": [0], "train": {"epochs": 9, "lr": 0.1}}, {"seeds": [1, 2], "train": {"epochs": 1}})
    {'seeds': [1, 2], 'train': {'epochs': 1, 'lr': 0.1}}

    Returns:
        The upper one where it says something, the lower one elsewhere; mappings are joined key by key.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}
    return above


def _is_mapping(content: Any, where: tuple[Any, ...]) -> bool:
    for key in where:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return False
    return isinstance(content, dict)


def _read(path: Path, readers: tuple[Path, ...]) -> _Source:
    """A file on top of the one that it extends."""
    if path.resolve() in readers:
        raise FairlineError(f"{path} extends itself.")
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = read(text)
        lines: dict[tuple[Any, ...], tuple[str, int]] = {}
        _note_lines(tree, (), str(path), lines)
    except OSError as error:
        raise FairlineError(f"{path} cannot be read ({error.strerror}).") from None
    except RecursionError:
        raise FairlineError(f"{path} is not valid YAML (it holds itself).") from None
    except ValueError as error:
        raise FairlineError(f"{path} is not valid YAML ({error}).") from None
    source = _Source(content, lines)
    if not isinstance(content, dict) or "extends" not in content:
        return source
    extended = content.pop("extends")
    if not isinstance(extended, str):
        line = lines[("extends",)][1]
        raise FairlineError(f"{path}: extends names one file, not {extended!r} (line {line}).")
    return _read(path.parent / extended, (*readers, path.resolve())).replaced_by(source)


def _note_lines(node: Any, where: tuple[Any, ...], path: str, lines: dict[tuple[Any, ...], tuple[str, int]]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != "tag:yaml.org,2002:merge"):
            if key.tag == "tag:yaml.org,2002:merge":
                # What is merged in gives way to the mapping's own keys.
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _note_lines(merged, where, path, lines)
                continue
            name = Loader("").construct_object(key)
            lines[(*where, name)] = (path, key.start_mark.line + 1)
            _note_lines(value, (*where, name), path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            lines[(*where, place)] = (path, item.start_mark.line + 1)
            _note_lines(item, (*where, place), path, lines)
