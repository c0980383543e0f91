"""``fairline compile``, and what follows on a compiled run."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
import torch

from fairline.compiler import CompiledNetwork
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.jobs import audit_job, compile_job, compiled
from fairline.jobs.private import estimate_networks, find_networks
from fairline.private.export import to_graph
from fairline.report import compiled as page
from fairline.runs import Run, load_info, load_network
from tests.commands import fairline, ok


@pytest.fixture(scope="module")
def folder(runs):
    """A compile run of the students, from the command line, and what it said."""
    said = ok("compile", runs / "students", "--minimise", "bytes", "--protocol", "semi2k", "--out", runs / "compiled")
    return runs / "compiled", said


def test_every_network_is_there_and_says_what_its_original_says(runs, folder):
    run = Run.read(folder[0], "compile")
    test = run.data.load()[1]["test"]
    table = run.table("compiled.parquet").set_index("network")
    assert list(run.networks()) == list(table.index) == list(Run.read(runs / "students").networks())
    for name, place in run.networks().items():
        network, info = load_network(place)
        original, before = load_network(runs / "students" / "networks" / name)
        assert isinstance(network, CompiledNetwork)
        assert info.compiled
        assert (info.stage, info.method, info.objective, info.total) == (
            before.stage,
            before.method,
            before.objective,
            before.total,
        )
        found, expected = predict(network, test), predict(original, test)
        row = table.loc[name]
        assert row["images"] == row["same"] == len(test)
        assert torch.equal(found.argmax(1), expected.argmax(1))
        assert row["difference"] == pytest.approx(float((found - expected).abs().max()), rel=0.5, abs=1e-6)
        assert row["relus"] == info.relus <= row["relus_before"] == before.relus
        graph = to_graph(network, info.model.example())
        assert row["weights"] == sum(value.numel() for value in graph.weights.values())


def test_it_is_never_dearer_by_what_was_minimised(folder):
    table = pd.read_parquet(folder[0] / "compiled.parquet")
    total = table["bytes"] + table["offline_bytes"]
    assert (total <= table["bytes_before"] + table["offline_bytes_before"]).all()
    plan = pd.read_parquet(folder[0] / "plan.parquet")
    by_network = plan.groupby("network", sort=False)[["bytes", "rounds", "seconds", "relus"]].sum()
    for column in by_network:
        assert by_network[column].tolist() == pytest.approx(table[column].tolist())


def test_the_terminal_and_the_page_show_the_plan(runs, folder):
    run, said = folder
    table = pd.read_parquet(run / "compiled.parquet")
    for row in table.to_dict("records"):
        assert page.told(row) in said
    assert "original → compiled" in said
    text = (run / "compiled.html").read_text(encoding="utf-8")
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    for words in ("semi2k over lan, 1 image a call, bytes minimised", "The plan of budget-20", "fingerprint"):
        assert words in body
    assert re.findall(r'id="(plan_[a-z]+)"', body) == ["plan_bytes", "plan_seconds", "plan_rounds"]
    ok("report", run, "--out", runs / "again.html", "--figures", runs / "compiled_figures")
    assert {file.stem for file in (runs / "compiled_figures").glob("*.svg")} == {
        "plan_bytes",
        "plan_seconds",
        "plan_rounds",
    }


def test_a_compiled_run_is_audited_estimated_and_exported(runs, folder, tmp_path):
    sources = [runs / "students", folder[0]]
    audit = audit_job(sources, tmp_path / "audit", measures=["accuracy", "corrections"], resamples=50, device="cpu")
    rows = audit.table("audit.parquet")
    wide = rows[rows["measure"].isin(["accuracy", "affine_accuracy"])].pivot_table(
        index=["group", "measure"], columns="model", values="value"
    )
    for name in Run.read(folder[0]).networks():
        assert wide[f"students/{name}"].tolist() == pytest.approx(wide[f"compiled/{name}"].tolist(), abs=1 / 300)
    ok("report", audit.folder)
    assert "finetune (erm), compiled" in (audit.folder / "report.html").read_text(encoding="utf-8")
    totals, _ = estimate_networks([folder[0]], ["semi2k"])
    told = pd.read_parquet(folder[0] / "compiled.parquet")
    assert sorted(totals["relus"]) == sorted(told["relus"])
    place = folder[0] / "networks" / "budget-20"
    ok("private", "export", place, "--out", tmp_path / "shared")
    assert (tmp_path / "shared" / "public" / "graph.safetensors").exists()
    assert [checkpoint.name for checkpoint in find_networks([place])[0]] == ["compiled/budget-20"]


def test_a_frontier_of_compiled_networks_is_written_with_its_provenance(runs, folder, tmp_path):
    ok("audit", runs / "students", folder[0], "--out", tmp_path / "audit")
    ok(
        "frontier",
        tmp_path / "audit",
        "--protocol",
        "semi2k",
        "--out",
        tmp_path / "f",
        "--results",
        tmp_path / "results",
    )
    table = pd.read_csv(tmp_path / "results" / "frontier.csv")
    assert set(table["model"]) >= {f"compiled/{name}" for name in Run.read(folder[0]).networks()}
    origin = json.loads((tmp_path / "results" / "provenance.json").read_text(encoding="utf-8"))
    assert origin["seeds"] == [0]


def test_an_interrupted_job_goes_on_at_the_next_network(runs, tmp_path, monkeypatch):
    done: list[str] = []
    original = compiled.compile

    def counted(*given, **options):
        if len(done) == 1 and "stop" in when:
            raise KeyboardInterrupt
        done.append("")
        return original(*given, **options)

    when = {"stop"}
    monkeypatch.setattr(compiled, "compile", counted)
    options = {"networks": ["budget-45", "budget-20"], "minimise": "rounds"}
    with pytest.raises(KeyboardInterrupt):
        compile_job(runs / "students", tmp_path / "run", **options)
    when.clear()
    run = compile_job(runs / "students", tmp_path / "run", **options)
    assert len(done) == 2
    assert set(run.networks()) == {"budget-45", "budget-20"}
    assert run.table("compiled.parquet")["network"].tolist() == ["budget-45", "budget-20"]
    # It is finished, so nothing is done again.
    compile_job(runs / "students", tmp_path / "run", **options)
    assert len(done) == 2


def test_a_network_that_computes_something_else_is_refused(runs, tmp_path, monkeypatch):
    original = compiled.compile

    def wrong(*given, **options):
        network = original(*given, **options)
        with torch.no_grad():
            next(network.parameters()).add_(0.5)
        return network

    monkeypatch.setattr(compiled, "compile", wrong)
    with pytest.raises(FairlineError, match="computes something else on digits"):
        compile_job(runs / "students", tmp_path / "run", networks=["budget-20"])
    assert not (tmp_path / "run" / "networks").exists()


def test_bad_input(runs, folder, tmp_path):
    def refused(*arguments):
        result = fairline("compile", *arguments, "--out", tmp_path / "refused")
        assert (result.returncode, "Traceback" in result.stderr) == (2, False)
        return " ".join(result.stderr.split())

    assert "holds no network 'budget-7'; it holds budget-224" in refused(runs / "students", "--networks", "budget-7")
    assert "holds a 'train' run" in refused(runs / "base")
    assert "holds a 'compile' run" in refused(folder[0])
    for options, message in (
        ({"minimise": "money"}, "minimised is one of seconds, bytes, rounds, not 'money'"),
        ({"protocol": "morse"}, "morse"),
        ({"network": "pigeon"}, "pigeon"),
        ({"batch_size": 0}, "at least one image"),
        ({"max_weights": 0}, "at least one weight"),
        ({"split": "all"}, "train, val or test, not 'all'"),
    ):
        with pytest.raises(FairlineError, match=message):
            compile_job(runs / "students", tmp_path / "refused", **options)


def test_files_that_do_not_belong_together(folder, tmp_path):
    one, other = tmp_path / "one", folder[0] / "networks" / "budget-45"
    shutil.copytree(folder[0] / "networks" / "budget-20", one)
    assert load_info(one).compiled
    shutil.copy(other / "weights.safetensors", one)
    with pytest.raises(FairlineError):
        load_network(one)
    described = json.loads((other / "compiled.json").read_text())
    (one / "compiled.json").write_text(json.dumps({**described, "format": "another"}))
    with pytest.raises(FairlineError, match="does not describe a compiled network"):
        load_network(one)
