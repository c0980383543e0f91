"""What the networks of an audit cost and save, from predictions and measurements."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline.jobs.audit import audit_job
from fairline.jobs.costs import COLUMNS, predicted_costs
from fairline.jobs.frontier import frontier_job
from fairline.private import estimate
from fairline.private.cost import CALL_PARTS, COSTS, PARTS
from fairline.report.cost_parts import advice
from fairline.report.costs import SAVINGS, panel, savings, write_frontier
from fairline.runs import ModelSpec, NetworkInfo, Run, load_network, save_network

prices = st.floats(1.0, 1e8)


def cost_row(model: str, prices: dict[str, float], basis: str = "predicted", **told) -> dict:
    """A row of costs whose parts are a tenth ReLUs, the rest linear layers."""
    row = {"model": model, "protocol": "cheetah", "network": "lan", "relus": 1, "total_relus": 9, "compiled": False}
    row |= {"replace": "", "replace_in": "", **{f"replaced_{cost}": math.nan for cost in COSTS}}
    for cost in COSTS:
        row[cost] = prices[cost]
        row |= {f"{cost}_{part}": 0.0 for part in PARTS}
        whole = told.get(cost, prices[cost])
        row |= {f"{cost}_relu": 0.1 * whole, f"{cost}_linear": 0.9 * whole, f"{cost}_setup": 5.0}
    return {**row, "basis": basis}


def run_with(folder: Path, name: str, rows: list[dict]) -> Run:
    folder.mkdir(exist_ok=True, parents=True)
    table = pd.DataFrame(rows)
    if name == "frontier.parquet" and "network" in table:
        table = table.rename(columns={"network": "wire"})
    table.to_parquet(folder / name)
    return Run(folder)


def test_an_audit_prices_its_networks(runs):
    table = Run(runs / "audit").table("costs.parquet")
    assert table.columns.tolist() == list(COLUMNS)
    # The same masks before and after the finetune cost the same.
    same = table.assign(masks=table["model"].str.partition("/")[2]).groupby(["masks", "protocol", "network"])
    assert (same["bytes"].nunique() == 1).all()
    for cost in COSTS:
        parts = table[[f"{cost}_{part}" for part in CALL_PARTS]].sum(axis=1)
        assert parts.tolist() == pytest.approx(table[cost].tolist(), rel=1e-12)


def test_an_audit_alone_tells_what_is_saved(runs):
    run = Run(runs / "audit")
    table = savings(run)
    assert table.columns.tolist() == list(SAVINGS)
    models = list(dict.fromkeys(run.table("audit.parquet")["model"]))
    assert list(dict.fromkeys(table["model"])) == models
    assert len(table) == len(models) * 4
    assert set(table["basis"]) == set(table["saved_basis"]) == {"predicted"}
    base, rest = table[table["model"] == "base"], table[table["model"] != "base"]
    assert (base[[f"{cost}_saved_percent" for cost in COSTS]] == 0).all(axis=None)
    assert (rest["bytes_saved_percent"] > 0).all()


@settings(max_examples=15)
@given(*[st.fixed_dictionaries(dict.fromkeys(COSTS, prices))] * 4, st.booleans())
def test_only_like_is_compared_with_like(tmp_path_factory, told, base_told, found, base_found, base_measured):
    folder = tmp_path_factory.mktemp("savings")
    audit = run_with(folder / "audit", "costs.parquet", [cost_row("base", base_told), cost_row("small", told)])
    basis = "measured over an emulated LAN"
    rows = [cost_row("base", base_told), cost_row("small", found, basis, **told)]
    if base_measured:
        rows[0] = cost_row("base", base_found, basis, **base_told)
    frontier = run_with(folder / "frontier", "frontier.parquet", rows)
    table = savings(audit, frontier).set_index("model")
    assert len(table) == 2
    small = table.loc["small"]
    assert (small["basis"], small["bytes"], small["seconds"]) == (basis, found["bytes"], found["seconds"])
    assert small["saved_basis"] == (basis if base_measured else "predicted")
    # Messages that were counted are no rounds.
    assert small["rounds"] == pytest.approx(told["rounds"])
    percent = 100 * (1 - told["rounds"] / base_told["rounds"])
    assert small["rounds_saved_percent"] == pytest.approx(percent, rel=1e-9, abs=1e-6)
    for cost in ("bytes", "seconds"):
        after, before = (found, base_found) if base_measured else (told, base_told)
        percent = 100 * (1 - after[cost] / before[cost])
        assert small[f"{cost}_saved_percent"] == pytest.approx(percent, rel=1e-9, abs=1e-6)


def test_other_networks_between_the_parties_stay_predicted(tmp_path):
    price = dict.fromkeys(COSTS, 8.0)
    rows = [cost_row("base", price), {**cost_row("base", price), "network": "wan"}]
    audit = run_with(tmp_path / "audit", "costs.parquet", rows)
    found = {**cost_row("base", dict.fromkeys(COSTS, 9.0), "measured over an emulated WAN"), "network": "wan"}
    frontier = run_with(tmp_path / "frontier", "frontier.parquet", [found])
    table = savings(audit, frontier).set_index("network")
    assert table["bytes"].to_dict() == {"lan": 8.0, "wan": 9.0}
    assert table["basis"].to_dict() == {"lan": "predicted", "wan": "measured over an emulated WAN"}


def test_without_costs_nothing_is_known(tmp_path):
    table = savings(Run(tmp_path))
    assert table.empty
    assert table.columns.tolist() == list(SAVINGS)


def test_without_a_base_network_savings_are_unknown(tmp_path):
    audit = run_with(tmp_path, "costs.parquet", [cost_row("small", dict.fromkeys(COSTS, 8.0))])
    assert savings(audit)["bytes_saved_percent"].isna().all()


def test_a_frontier_of_an_earlier_version_is_read(tmp_path):
    old = {"model": "base", "protocol": "cheetah", "wire": "lan", "relus": 9, "total_relus": 9}
    rows = [{**old, **dict.fromkeys(COSTS, 8.0), "source": source} for source in ("measured", "predicted")]
    rows[1]["model"] = "small"
    table = savings(Run(tmp_path), run_with(tmp_path / "frontier", "frontier.parquet", rows)).set_index("model")
    assert table.loc["base", "basis"].startswith("measured, on a wire not")
    assert table.loc["small", "basis"] == "predicted"
    # What the model says of a network that was measured then is not known.
    assert math.isnan(table.loc["small", "bytes_saved_percent"])


SINES = """
import torch
from torch import nn

def make(num_classes, in_channels=1, image_size=8):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), Sine(), nn.Flatten(), nn.Linear(72, num_classes))

class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)
"""


def test_masks_change_counts_alone(runs):
    """One export of an architecture gives what exporting each network gives."""
    networks = {"base": runs / "base" / "networks" / "base"} if (runs / "base" / "networks").exists() else {}
    networks |= {path.name: path for path in (runs / "students" / "networks").iterdir()}
    table = predicted_costs(networks)
    assert set(table["model"]) == set(networks)
    for row in table.to_dict("records"):
        model, info = load_network(networks[row["model"]])
        told = estimate(model, info.model.example(), protocol=row["protocol"], network=row["network"])
        assert told.relus == row["relus"]
        for name, value in told.row().items():
            assert row[name] == pytest.approx(value, rel=1e-9), name


def test_what_cannot_be_exported_has_no_costs_and_a_sentence(tmp_path, runs, caplog):
    (tmp_path / "sines.py").write_text(SINES)
    spec = ModelSpec(f"{tmp_path / 'sines.py'}:make", 3, 1, 8)
    save_network(tmp_path / "odd", spec.build(), NetworkInfo(spec, "base", 72, 72, 72))
    (known,) = [path for path in (runs / "students" / "networks").iterdir() if path.name == "budget-20"]
    table = predicted_costs({"odd": tmp_path / "odd", "known": known})
    assert set(table["model"]) == {"known"}
    (said,) = [record.getMessage() for record in caplog.records if "No costs are predicted" in record.getMessage()]
    assert "odd" in said
    assert "'sin'" in said


def test_an_audit_need_not_price(runs, tmp_path):
    run = audit_job([runs / "students"], tmp_path / "audit", resamples=10, costs=False, device="cpu")
    assert not (run.folder / "costs.parquet").exists()
    assert savings(run).empty


def priced_rows(**changed) -> pd.DataFrame:
    row = cost_row("base", dict.fromkeys(COSTS, 10.0)) | {"wire": "lan"}
    row |= {f"{cost}_max_pool": 3.0 for cost in COSTS} | {f"{cost}_linear": 6.0 for cost in COSTS}
    row |= {"replace": "max_pool", "replace_in": "bytes, rounds", **{f"replaced_{cost}": 7.5 for cost in COSTS}}
    return pd.DataFrame([row | changed])


def test_pooling_that_outweighs_relus_is_said_with_the_saving():
    (said,) = advice(priced_rows())
    assert said.startswith("Replace this first: on cheetah max pooling outweighs the ReLUs of base: ")
    assert "3 rounds for 1 round" in said
    assert "8 rounds in place of 10 rounds (-25 %)" in said
    assert "7.50 s in place of 10.00 s (-25 %) over LAN" in said
    assert not advice(priced_rows(replace="", replace_in=""))
    (said,) = advice(priced_rows(replace="linear"))
    assert "fairline compile" in said
    assert not advice(priced_rows(replace="linear", compiled=True))


def test_what_would_be_saved_is_the_models_also_where_a_call_was_measured():
    (said,) = advice(priced_rows(rounds=999.0, basis="measured over an emulated LAN"))
    assert "999" not in said
    assert "in place of 10 rounds" in said


def test_figures_stack_from_zero_in_the_same_colours_and_fit_their_card(runs, tmp_path):
    run = frontier_job(runs / "audit", tmp_path / "frontier", protocols=["cheetah", "delphi"])
    charts, content = panel(run.folder, 5.0)
    specs = {name: chart.to_dict() for name, chart in charts.items()}
    assert all(spec["width"] == "container" for spec in specs.values())
    stacked = {name: spec["layer"][0]["encoding"] for name, spec in specs.items() if name.startswith("cost_parts")}
    # What Delphi computes no source tells.
    assert len(stacked) == 2 * 3 - 1
    for encoding in stacked.values():
        assert encoding["x"]["stack"] == "zero"
        assert encoding["x"]["scale"]["zero"]
        scale = encoding["color"]["scale"]
        assert list(zip(scale["domain"], scale["range"], strict=True)) == content["legends"]["parts"]
    assert content["part_names"] == [name for name, _ in content["legends"]["parts"]]
    assert all(len(row["cells"]) == len(content["part_names"]) for row in content["parts"])
    written = write_frontier(run.folder).read_text(encoding="utf-8")
    assert "What a call consists of" in written
