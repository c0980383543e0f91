"""No objective takes a number that is not finite, whatever the option, nor half of what comes in wholes."""

from __future__ import annotations

import inspect
import math

import pytest

from fairline.errors import FairlineError
from fairline.objectives import REGISTRY, build


def numbers(*kinds: str) -> list[tuple[str, str]]:
    """Every objective with each of its options whose default, or only other kind, is a number of one of these kinds."""
    found = []
    for name, kind in REGISTRY.items():
        seen = {}
        for each in kind.__mro__[:-1]:
            if "__init__" in vars(each):
                seen = dict(inspect.signature(each.__init__, eval_str=True).parameters) | seen
        for option, parameter in seen.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                annotation = str(parameter.annotation)
                if any(kind in annotation for kind in kinds):
                    found.append((name, option))
    return found


@pytest.mark.parametrize(("name", "option"), numbers("float", "int"))
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused(name, option, number):
    with pytest.raises(FairlineError):
        build(name, **{option: number})


@pytest.mark.parametrize(("name", "option"), numbers("int"))
@pytest.mark.parametrize("number", [2.5, math.nan, math.inf])
def test_a_class_itself_takes_whole_numbers_where_it_counts(name, option, number):
    with pytest.raises(FairlineError, match=f"whole.*{number}"):
        REGISTRY[name](**{option: number})
