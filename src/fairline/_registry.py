"""Building what a user names."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

from fairline.errors import FairlineError

T = TypeVar("T")

#: How a kind of value is called in a sentence.
_CALLED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "none",
    Sequence: "a list",
    Mapping: "a mapping",
}
#: Values that a command line, a file or a user may give for each other; single ones, and all.
_SINGLE: tuple[type, ...] = (str, Real, NoneType)
_PLAIN: tuple[type, ...] = (*_SINGLE, Sequence, Mapping)


def build_named(kind: str, registry: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """An instance of the class registered under ``name``.

    Args:
        kind: What the registry holds, for the error message.
        registry: Classes by name.
        name: Which one.
        options: Arguments of its constructor.

    Returns:
        The instance.

    Raises:
        FairlineError: The name or an option is unknown, or the value of an option is not of the kind that the class
            says, or a number that is not finite.
    """
    if name not in registry:
        raise FairlineError(f"There is no {kind} '{name}'; choose one of {', '.join(registry)}.")
    whose, takes = f"{kind.capitalize()} '{name}'", kinds_of_options(registry[name])
    given = fitting(whose, takes, options)
    try:
        return registry[name](**given)
    except TypeError as error:
        for option in given:
            if option not in takes:
                raise FairlineError(f"{whose} knows no option '{option}'; it takes {', '.join(takes)}.") from None
        raise FairlineError(f"{whose}: {error}.") from None


def fitting(whose: str, takes: Mapping[str, tuple[Any, ...]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are handed on.

    Args:
        whose: They are, for the message.
        takes: What each may be; of one that is not named, anything.
        options: Their values.

    Returns:
        The values; a whole number that was written as a float is whole.

    Raises:
        FairlineError: One is of no kind that it may be, or not finite.

    >>> fitting("This", {"n": (int,)}, {"n": 2e3})
    {'n': 2000}
    """
    given = {}
    for option, value in options.items():
        named = f"{whose}: option '{option}'"
        if isinstance(value, Real) and not _is_finite(value):
            raise FairlineError(f"{named} must be finite, not {value}.")
        kinds = takes.get(option, (Any,))
        if not any(_fits(value, each) for each in kinds):
            said = f"'{value}'" if isinstance(value, str) else "none" if value is None else value
            raise FairlineError(f"{named} is {_told(kinds)}, not {said}.")
        # A command line reads 2e3 as a float.
        whole = isinstance(value, float) and float not in kinds and int in kinds
        given[option] = int(value) if whole else value
    return given


def is_number(value: object) -> bool:
    """Tell what is a finite number from what is not.

    Returns:
        Whether it is one; truth values are none.

    >>> [is_number(value) for value in (1, 0.5, float("nan"), True, "1")]
    [True, True, False, False, False]
    """
    return not isinstance(value, bool) and isinstance(value, Real) and _is_finite(value)


def is_whole(value: object) -> bool:
    """Tell what is a whole number, be it a float, from what is not.

    Returns:
        Whether it is one.

    >>> [is_whole(value) for value in (1, 2.0, 1.5, float("inf"), True, "1")]
    [True, True, False, False, False, False]
    """
    return is_number(value) and value == int(value)  # type: ignore[call-overload]


def kinds_of_options(made: type) -> dict[str, tuple[Any, ...]]:
    """What each argument of a constructor may be, by its annotations.

    Args:
        made: A class; a constructor that takes any further options hands them to that of the class before it.

    Returns:
        The members of each one's union, by name.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for each in made.__mro__:
        own, names = _annotated(each)
        found = {name: _members(own.get(name, Any)) for name in names} | found
        if names and not is_dataclass(each) and "**" not in names:
            break
    return {name: kinds for name, kinds in found.items() if name != "**"}


def kinds_of_arguments(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """What each argument of a function but the first may be, by its annotations.

    Returns:
        The members of each one's union, by name; of ``**settings`` those of its typed dictionary.
    """
    own = _evaluated(function, vars(sys.modules[function.__module__]))
    found: dict[str, tuple[Any, ...]] = {}
    for name in list(inspect.signature(function).parameters)[1:]:
        annotation = own.get(name, Any)
        unpacked = get_type_hints(get_args(annotation)[0]) if get_origin(annotation) is Unpack else {name: annotation}
        found |= {each: _members(kind) for each, kind in unpacked.items()}
    return found


class _Names(dict[str, Any]):
    """Names of a module; what a module of ours imports for annotations alone is some class, another's anything."""

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        return type(name, (), {}) if self["__name__"].startswith("fairline.") else Any


def _annotated(made: type) -> tuple[dict[str, Any], list[str]]:
    """Annotations of what a class adds to its constructor, and the names, with ``**`` for any others."""
    # A class that was made by exec lies in no module.
    module = vars(sys.modules.get(made.__module__, builtins))
    if "__dataclass_fields__" in vars(made):
        own = _evaluated(made, module)
        return own, [each.name for each in fields(made) if each.init and each.name in own]
    make = vars(made).get("__init__")
    if not isinstance(make, FunctionType):
        return {}, []
    parameters = list(inspect.signature(make).parameters.values())[1:]
    told = ["**" if each.kind is each.VAR_KEYWORD else each.name for each in parameters]
    return _evaluated(make, make.__globals__), told


def _evaluated(annotated: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations as what they stand for; of those that cannot be evaluated, anything."""
    own = inspect.get_annotations(annotated)
    # A user's module may annotate with what is not there when it runs.
    with contextlib.suppress(NameError, TypeError, AttributeError, SyntaxError):
        return inspect.get_annotations(annotated, locals=_Names({"__name__": "", **names}), eval_str=True)
    return dict.fromkeys(own, Any)


def _is_finite(value: Real) -> bool:
    """Whether a number is one that a float can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _members(annotation: Any) -> tuple[Any, ...]:
    """The kinds of a union, of several literals one; of anything else itself."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for each in get_args(annotation) for kind in _members(each))
    return (annotation,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value may be of a kind; of what is no plain value the class itself judges."""
    origin = get_origin(kind)
    if kind is Any or not isinstance(value, _PLAIN):
        return True
    if origin is Literal:
        return value in get_args(kind)
    if kind is bool:
        return isinstance(value, bool | int) and value in (0, 1)
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if kind is float:
        return isinstance(value, Real)
    if kind in (str, NoneType):
        return isinstance(value, kind)
    # What is left is a list, a mapping or an object of some class, for none of which a word or a number stands.
    return not isinstance(value, _SINGLE)


def _told(kinds: Sequence[Any]) -> str:
    """The kinds in words, the last behind an "or"."""
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [str(each) for each in get_args(kind)]
        else:
            named = get_origin(kind) or kind
            called = getattr(named, "__name__", str(named))
            words.append(_CALLED.get(named, f"{'an' if called[0] in 'AEIOU' else 'a'} {called}"))
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
