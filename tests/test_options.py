"""An option of another kind than its class says is refused by name, in whatever registry, in one sentence."""

from __future__ import annotations

import importlib
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fairline as fl
from fairline import linearize, objectives
from fairline._registry import build_named, fitting, kinds_of_arguments, kinds_of_options
from fairline.audit import REGISTRY as MEASURES
from fairline.compiler.mask_cost import PredictedCost
from fairline.errors import FairlineError
from fairline.linearize import ForCost

REGISTRIES: dict[str, Mapping[str, type]] = {
    "objective": objectives.REGISTRY,
    "linearizer": linearize.REGISTRY,
    "masks": {"for cost": ForCost, "cost": PredictedCost},
}
ALL = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]
#: Values of every kind that can be written down, and which of them each kind takes.
VALUES = {
    "text": "abc",
    "whole": 3,
    "half": 1.5,
    "nan": math.nan,
    "infinite": -math.inf,
    "enormous": 10**400,
    "true": True,
    "none": None,
    "list": [1],
    "mapping": {"a": 1},
}
TAKES = {
    int: {"whole"},
    float: {"whole", "half"},
    bool: {"true"},
    str: {"text"},
    type(None): {"none"},
    Any: set(VALUES),
    typing.Mapping: {"mapping", "list"},
}


def takes(kind: Any) -> set[str]:
    """Which of the values a kind takes; of what is no plain value a list or mapping may stand for one."""
    if typing.get_origin(kind) is Literal:
        return set()
    return TAKES.get(kind, {"mapping", "list"})


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_value_of_another_kind_is_refused_by_name_in_one_sentence(kind, name):
    registry = REGISTRIES[kind]
    options = kinds_of_options(registry[name])
    assert options
    seen = 0
    for option, kinds in options.items():
        assert Any not in kinds, option
        right = set().union(*map(takes, kinds))
        for what, value in VALUES.items():
            if what in right:
                continue
            with pytest.raises(FairlineError) as caught:
                build_named(kind, registry, name, {option: value})
            is_told(str(caught.value), kind, name, option)
            seen += 1
    assert seen > 4 * len(options)


def is_told(sentence: str, kind: str, name: str, option: str) -> None:
    assert sentence.startswith(f"{kind.capitalize()} '{name}': option '{option}' "), sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "instances of" not in sentence


def measures() -> dict[str, Any]:
    """The function of each measure of an audit."""
    found = {}
    for name, entry in MEASURES.items():
        module, _, function = entry.source.partition(":")
        found[name] = getattr(importlib.import_module(module), function)
    return found


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_refuses_a_value_of_another_kind_in_one_sentence(name, parts, trained):
    for option, kinds in kinds_of_arguments(measures()[name]).items():
        assert Any not in kinds, option
        right = set().union(*map(takes, kinds))
        assert right < set(VALUES)
        for what in set(VALUES) - right:
            with pytest.raises(FairlineError) as caught:
                fl.audit(trained, parts[1], trained, measures=[name], options={name: {option: VALUES[what]}})
            is_told(str(caught.value), "measure", name, option)


@pytest.mark.parametrize("name", MEASURES)
def test_the_defaults_of_a_measure_are_of_their_kinds_and_numbers_may_be_floats(name):
    call = measures()[name]
    kinds = kinds_of_arguments(call)
    defaults = {option: inspect.signature(call).parameters[option].default for option in kinds}
    assert fitting("It", kinds, defaults) == defaults
    floats = {option: float(value) for option, value in defaults.items() if type(value) is int}
    assert {option: type(value) for option, value in fitting("It", kinds, floats).items()} == dict.fromkeys(floats, int)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_option_of_a_constructor_is_known_and_its_default_is_of_its_kind(kind, name):
    registry = REGISTRIES[kind]
    options = kinds_of_options(registry[name])
    parameters = inspect.signature(registry[name]).parameters.values()
    named = {each.name: each.default for each in parameters if each.kind is not each.VAR_KEYWORD}
    assert set(named) <= set(options)
    required = {"cost": PredictedCost("cheetah")} if registry[name] is ForCost else {}
    given = {option: value for option, value in named.items() if value is not inspect.Parameter.empty}
    build_named(kind, registry, name, {**given, **required, **({"protocol": "cheetah"} if name == "cost" else {})})


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_whole_numbers_may_be_written_as_floats(kind, name):
    for option, kinds in kinds_of_options(REGISTRIES[kind][name]).items():
        if int in kinds and set(kinds) <= {int, type(None)}:
            said = ""
            try:
                made = build_named(kind, REGISTRIES[kind], name, {option: 5.0})
            except FairlineError as error:
                # A method may have no use for five.
                said = str(error)
            assert "whole number" not in said
            assert said or type(vars(made)[option]) is int


class Outer:
    def __init__(self, share: float = 0.5, way: Literal["up", "down"] = "up", **rest: Any) -> None:
        self.given = {"share": share, "way": way, **rest}


class Inner(Outer):
    def __init__(self, often: int | None = None, sure: bool = True, call: Callable[[], int] | None = None, **rest: Any):
        super().__init__(**rest)
        self.given |= {"often": often, "sure": sure, "call": call}


class Closed(Outer):
    def __init__(self, often: int) -> None:
        super().__init__()


@dataclass(kw_only=True)
class Held:
    often: int = 1
    name: typing.ClassVar[str] = "held"


MINE = {"inner": Inner, "closed": Closed, "held": Held}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("inner", {"way": "left"}, "option 'way' is up or down, not 'left'."),
        ("inner", {"share": "half"}, "option 'share' is a number, not 'half'."),
        ("inner", {"often": 1.5}, "option 'often' is a whole number or none, not 1.5."),
        ("inner", {"sure": "yes"}, "option 'sure' is true or false, not 'yes'."),
        ("inner", {"sure": 2}, "option 'sure' is true or false, not 2."),
        ("inner", {"share": None}, "option 'share' is a number, not none."),
        ("inner", {"call": "print"}, "option 'call' is a Callable or none, not 'print'."),
        ("closed", {"share": "half"}, "Toy 'closed' knows no option 'share'; it takes often."),
        ("closed", {}, "missing 1 required positional argument: 'often'"),
        ("held", {"name": "mine"}, "Toy 'held' knows no option 'name'; it takes often."),
        ("held", {"kind": "mine"}, "Toy 'held' knows no option 'kind'; it takes often."),
    ],
)
def test_what_is_said(name, options, said):
    with pytest.raises(FairlineError) as caught:
        build_named("toy", MINE, name, options)
    assert said in str(caught.value)


@given(st.one_of(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_are_handed_on_as_they_are(number):
    assert build_named("toy", MINE, "inner", {"share": number}).given["share"] == number
    if number == int(number):
        assert build_named("toy", MINE, "inner", {"often": number}).given["often"] == number


@pytest.mark.parametrize("registry", [objectives, linearize])
def test_an_option_called_name_is_unknown_like_any_other(registry):
    for name in registry.REGISTRY:
        with pytest.raises(FairlineError, match=f"'{name}' knows no option 'name'"):
            registry.build(name, **{"name": "mine"})


ODD = """
from __future__ import annotations
from typing import TYPE_CHECKING
from dataclasses import dataclass

if TYPE_CHECKING:
    from nowhere import Strength, Table

{decorator}
class Own:
    {body}
"""


@pytest.mark.parametrize(
    ("decorator", "body", "name"),
    [
        ("", "def __init__(self, size: int, mu: Strength = 1, rows: Table[int] = ()): self.mu = mu", "own"),
        ("", "def __init__(self, size: int, mu: Strength | None = None): self.mu = mu", "own"),
        ("", "def __init__(self, size: int, mu: Strength | None = None): self.mu = mu", "__main__"),
        # A data class lies in a module.
        ("@dataclass", "size: int\n    mu: Strength = 1", "__main__"),
    ],
)
def test_annotations_that_cannot_be_read_judge_nothing(decorator, body, name):
    scope = {"__name__": name}
    exec(compile(ODD.format(decorator=decorator, body=body), "own.py", "exec", dont_inherit=True), scope)
    built = build_named("method", {"own": scope["Own"]}, "own", {"size": 3, "mu": "any"})
    assert built.mu == "any"
