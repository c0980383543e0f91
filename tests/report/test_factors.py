"""What varies claims 8 and 9: the tables are those of the README, and say what the claims' own tests say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from fairline.report.claims import CLAIMS
from tests.scripts import script_at

PAPERS = Path(__file__).parents[2] / "papers"
RESULTS = PAPERS / "results"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_at(PAPERS / "factors.py")


def test_the_readme_has_the_tables(script):
    readme = (RESULTS / "factors_utkface_race" / "README.md").read_text(encoding="utf-8")
    for control in (False, True):
        assert "\n".join(script.table(RESULTS, control=control)) in readme
    assert "\n".join(script.violations(RESULTS)) in readme
    assert "python papers/factors.py papers/results" in readme


@pytest.mark.parametrize("place", range(5))
def test_the_numbers_are_those_of_the_claims(script, place):
    study = list(script.STUDIES)[place]
    rows = pd.read_parquet(RESULTS / study / "results.parquet")
    own = script.numbers(rows, control=False).mean(axis=1)
    largest, smallest = script.extremes(rows)
    (helped,), (span,) = (list(CLAIMS[claim].test(rows)) for claim in (11, 9))
    assert own[script.GAINS, smallest] == pytest.approx(helped.effect)
    assert own[script.SPAN, smallest] == pytest.approx(span.effect)
    (least,) = CLAIMS[8].test(rows)
    drawn = script.gains(rows)
    paper = drawn[drawn["μ·E"] == script.STEPS["lagrangian"]].set_index("group")["gain"].drop("overall")
    assert paper.min() == pytest.approx(least.effect)
    assert paper[largest] == pytest.approx(own[script.GAINS, largest])
