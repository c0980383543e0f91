"""The tables in the READMEs of the studies of repairs are those of their numbers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import script_at

PAPERS = Path(__file__).parents[2] / "papers"
STUDIES = sorted((PAPERS / "results").glob("repairs_*"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_at(PAPERS / "repairs_table.py")


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_readme_has_the_table_of_its_study(study, script):
    lines = script.table(study)
    assert len(lines) > 3
    readme = (study / "README.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in readme
    assert f"python papers/repairs_table.py papers/results/{study.name}" in readme


def test_numbers_are_written_as_in_print(script):
    assert [script.number(each) for each in (-0.04, 3.25, -1.0)] == ["0.0", "3.2", "−1.0"]
    assert [script.number(each, plus=True) for each in (0.04, 3.26, -1.0)] == ["0.0", "+3.3", "−1.0"]
