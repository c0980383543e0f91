"""No objective takes a number that is not finite, whatever the option."""

from __future__ import annotations

import inspect
import math

import pytest

from fairline.errors import FairlineError
from fairline.objectives import REGISTRY, build


def numbers() -> list[tuple[str, str]]:
    """Every objective with each of its options whose default, or only other kind, is a number."""
    found = []
    for name, kind in REGISTRY.items():
        seen = {}
        for each in kind.__mro__[:-1]:
            if "__init__" in vars(each):
                seen = dict(inspect.signature(each.__init__, eval_str=True).parameters) | seen
        for option, parameter in seen.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                annotation = str(parameter.annotation)
                if "float" in annotation or "int" in annotation:
                    found.append((name, option))
    return found


@pytest.mark.parametrize(("name", "option"), numbers())
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused(name, option, number):
    with pytest.raises(FairlineError):
        build(name, **{option: number})
