"""What a run tells of its constraints speaks of the weights that it kept."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from fairline.data.grouped import GroupedData
from fairline.inference import predict
from fairline.jobs import constraints, finetune_job
from fairline.jobs._common import load_parts
from fairline.runs import Run, load_network


def gaps(logits: torch.Tensor, data: GroupedData) -> dict[str, float]:
    """|Lₐ − L| of each group, written out."""
    losses = F.cross_entropy(logits.cpu().double(), data.labels.cpu(), reduction="none")
    groups = data.groups.cpu()
    return {
        name: float((losses[groups == place].mean() - losses.mean()).abs())
        for place, name in enumerate(data.group_names)
    }


@pytest.mark.parametrize("select", ["last", "loss"])
def test_violations_are_those_of_the_weights_that_are_kept(runs, tmp_path, select):
    # So large a step does harm: the best epoch is not the last.
    settings = {"epochs": 4, "lr": 0.1, "batch_size": 64, "select": select, "distill": False}
    run = finetune_job(runs / "snl", tmp_path / "run", "lagrangian", {"mu": 0.5}, device="cpu", **settings)
    epochs = run.table("metrics.parquet").groupby("network")["val_loss"].apply(lambda losses: losses.argmin())
    assert epochs.min() < 3
    found = constraints(run)
    told = found.set_index(["network", "measure", "group"])["value"].sort_index()
    parts = load_parts(run, None)
    assert set(found["network"]) == set(run.networks())
    for name, folder in run.networks().items():
        model, _ = load_network(folder)
        for part in ("train", "val"):
            expected = gaps(predict(model, parts[part]), parts[part])
            assert told[name, f"{part}_violation"].to_dict() == pytest.approx(expected, abs=2e-5)


def test_a_run_without_constraints_has_none(runs):
    for name in ("snl", "students", "base"):
        found = constraints(Run.read(runs / name))
        assert list(found) == ["network", "group", "measure", "value"]
        assert found.empty


def test_a_comparison_tells_what_is_lacking(runs, compared):
    table = pd.read_parquet(compared / "constraints.parquet")
    assert set(table["method"]) == {"lagrangian mu=0.5"}
    assert set(table["taken"]) == {True}
    own = constraints(Run.read(runs / "repaired"))
    assert table["value"].tolist() == own["value"].tolist()
    page = (compared / "comparison.html").read_text(encoding="utf-8")
    section = page.partition("Are the constraints met?")[2].partition("</section>")[0]
    for value in own["value"]:
        assert f'<td class="number">{value:.3f}</td>' in section
