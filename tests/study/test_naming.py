"""What a study says beforehand of the names that its comparison will give."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from fairline.errors import FairlineError
from fairline.study.cells import cells_of, require_known
from fairline.study.naming import may_be_called
from fairline.study.spec import StudySpec, load_spec
from tests.commands import ok

SPEC = Path(__file__).parent / "digits.yaml"
PAPERS = Path(__file__).parents[2] / "papers"
COMMITTED = sorted(
    (spec, label, f"{label}{curves}.csv")
    for spec in PAPERS.glob("*.yaml")
    for label in load_spec(spec).data
    for curves in ("", "_curves")
    if (PAPERS / "results" / spec.stem / f"{label}{curves}.csv").exists()
)


def changed(**fields: object) -> StudySpec:
    return StudySpec.model_validate({**load_spec(SPEC).model_dump(), **fields})


def baselines(spec: StudySpec) -> set[str | None]:
    return {cell.arguments["baseline"] for cell in cells_of(spec) if cell.kind == "compare"}


@pytest.mark.parametrize(("spec", "label", "table"), COMMITTED, ids=[f"{spec.stem}-{t}" for spec, _, t in COMMITTED])
def test_names_are_those_that_committed_comparisons_have(spec, label, table):
    """A name for each cell and a cell for each name."""
    names = set(pd.read_csv(PAPERS / "results" / spec.stem / table)["method"]) - {"base network"}
    # A method over all its strengths is no cell.
    names = {name for name in names if "=*" not in name}
    what = "curves" if table.endswith("_curves.csv") else "compare"
    (cell,) = (cell for cell in cells_of(load_spec(spec)) if cell.where == f"{what}-{label}")
    for parent in cell.parents:
        assert any(may_be_called(parent, name) for name in names), parent.where
    for name in names:
        assert any(may_be_called(parent, name) for parent in cell.parents), name


@pytest.mark.parametrize(
    ("wanted", "masks"),
    [
        ("lagrangian mu=0.5", {}),
        ("deepreduce: lagrangian mu=0.5", {"method": "deepreduce", "settings": {}}),
        ("masks lagrangian protect, erm", {"settings": {"protect": 1.0}, "objective": "lagrangian"}),
        ("autorep: quadratic, erm", {"method": "autorep", "settings": {}}),
    ],
)
def test_a_baseline_that_is_there_is_taken(wanted, masks):
    spec = changed(baseline=wanted, masks={"plain": {"budgets": [0.1], **masks}})
    require_known(spec)
    assert baselines(spec) == {wanted}


def test_a_baseline_may_be_told_by_its_settings_where_there_are_several():
    masks = {"slow": {"budgets": [0.1]}, "fast": {"budgets": [0.1], "settings": {"lam": 0.01}}}
    methods = [{"objective": "erm", "masks": ["slow", "fast"]}]
    for wanted in ("erm", "masks lam=0.01, erm", "masks lam=0.01, erm, epochs=3"):
        require_known(changed(baseline=wanted, masks=masks, methods=methods))
    for wanted in ("masks, erm", "lam=0.01, erm", "masks lam=0.01, lagrangian", "erm, logit adjust tau=1"):
        with pytest.raises(FairlineError, match="No method will be called"):
            require_known(changed(baseline=wanted, masks=masks, methods=methods))


@pytest.mark.parametrize(
    "wanted",
    ["masks lam=0.01, erm", "erm, epochs=3", "lagrangian", "lagrangian mu=0.05", "deepreduce: erm", "x, erm", "erm "],
)
def test_a_baseline_that_no_method_is_called_is_refused_before_anything_runs(wanted):
    with pytest.raises(FairlineError) as refused:
        require_known(changed(baseline=wanted))
    sentence = (
        f"Study 'digits_tiny', baseline: No method will be called '{wanted}'; choose among erm, lagrangian mu=0.5."
    )
    assert str(refused.value) == sentence


def test_without_plain_distillation_the_first_method_is_the_baseline(tmp_path):
    text = SPEC.read_text().replace("seeds: [0, 1]", "seeds: [0]").replace("objective: erm", "objective: group_dro")
    (tmp_path / "study.yaml").write_text(text)
    assert baselines(load_spec(tmp_path / "study.yaml")) == {None}
    ok("study", "run", tmp_path / "study.yaml", "--out", tmp_path / "out", "--results", tmp_path / "results")
    table = pd.read_csv(tmp_path / "results" / "digits_tiny" / "digits.csv")
    assert set(table["baseline"]) == {"group_dro"}
    assert set(table["method"]) == {"group_dro", "lagrangian mu=0.5"}
