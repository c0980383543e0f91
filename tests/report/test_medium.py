"""The tables that stand in the README of the medium scale."""

from __future__ import annotations

from pathlib import Path

from tests.scripts import script_at

PAPERS = Path(__file__).parents[2] / "papers"
MEDIUM = PAPERS / "results" / "medium"


def test_the_readme_has_the_table():
    script = script_at(PAPERS / "by_seed.py")
    (study,) = MEDIUM.glob("fig*_medium")
    readme = (MEDIUM / "README.md").read_text(encoding="utf-8")
    assert "\n".join(script.table(study)) in readme
    assert f"python papers/by_seed.py papers/results/medium/{study.name}" in readme
