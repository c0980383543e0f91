"""``fairline private …`` and ``fairline frontier``."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fairline.jobs.private import find_networks
from fairline.private.graph import PlainGraph
from tests.commands import Started, ok

HAS_SPU = importlib.util.find_spec("spu") is not None
spu = pytest.mark.skipif(not HAS_SPU, reason="SPU is not installed")


@pytest.fixture(scope="module")
def networks(runs):
    return sorted((runs / "students" / "networks").iterdir())


@pytest.fixture(scope="module")
def predicted(runs):
    """A frontier whose costs are all predicted."""
    ok("frontier", runs / "audit", "--protocol", "cheetah,delphi", "--within", "20", "--out", runs / "frontier")
    return runs / "frontier"


@pytest.fixture(scope="module")
def measured(runs):
    """A private run of the students on the faster protocol."""
    ok("private", "run", runs / "students", "--protocol", "semi2k", "--repeats", "1", "--out", runs / "private")
    return runs / "private"


def test_estimate_tells_relus_bytes_rounds_and_its_sources(runs):
    said = ok("private", "estimate", runs / "students", "--protocol", "cheetah,delphi", "--layers")
    for word in (
        "budget-224",
        "linear layers",
        "setup, once a session",
        "lan s",
        "wan s",
        "SPU 0.9.5",
        "USENIX Security 2020",
        "conv2d",
    ):
        assert word in said


def test_one_network_or_all_of_a_run(runs, networks):
    everything, _ = find_networks([runs / "students"])
    single, run = find_networks([networks[0]])
    assert len(everything) == len(networks) == 3
    assert single[0].name == f"students/{networks[0].name}" in {network.name for network in everything}
    assert run.command == "finetune"
    assert [c.name for c in find_networks([runs / "base"])[0]] == ["base"]


def test_the_frontier_predicts_what_was_not_measured(predicted, runs):
    table = pd.read_parquet(predicted / "frontier.parquet")
    audit = pd.read_parquet(runs / "audit" / "audit.parquet")
    assert set(table["model"]) == set(audit["model"])
    assert set(table["protocol"]) == {"cheetah", "delphi"}
    assert (table["basis"] == "predicted").all()
    assert (table["seconds"].isna() == (table["protocol"] == "delphi")).all()
    for _, part in table.groupby("protocol"):
        ordered = part.sort_values("relus")
        assert ordered["bytes"].is_monotonic_increasing
    assert (table["lowest"] <= table["worst"]).all()
    accuracy = audit[(audit["measure"] == "accuracy") & (audit["group"] != "overall")]
    worst = accuracy.groupby("model")["value"].min()
    assert table.set_index("model")["worst"].to_dict() == worst.to_dict()
    page = (predicted / "frontier.html").read_text(encoding="utf-8")
    assert "within 20 points" in page
    # Asked anew with another tolerance, the run is judged again, and no cost reckoned.
    answers = dict(zip(table["model"], table["answer"], strict=True))
    assert answers.pop("base") == ""
    assert set(answers.values()) <= {"may ship", "may not ship", "cannot tell"}
    said = ok("frontier", runs / "audit", "--protocol", "cheetah,delphi", "--within", "99.9", "--out", predicted)
    again = pd.read_parquet(predicted / "frontier.parquet")
    assert set(again.loc[again["model"] != "base", "answer"]) == {"may ship"}
    assert "is the cheapest that may ship" in said
    assert again["bytes"].tolist() == table["bytes"].tolist()
    counted = pd.read_parquet(predicted / "cells.parquet")
    whole = counted[counted["kind"] == "overall"].set_index("model")
    assert (whole["after"] / whole["n"]).to_dict() == pytest.approx(table.set_index("model")["overall"].to_dict())
    assert (counted.loc[counted["model"] == "base", ["lost", "gained"]] == 0).all(axis=None)
    assert "cost_groups" in page


def test_the_report_has_a_cost_panel(predicted, runs, tmp_path):
    ok("report", runs / "audit", "--costs", predicted, "--within", "20", "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What private inference costs" in page
    assert "cost_frontier" in page
    assert "What private inference costs" not in (runs / "audit" / "report.html").read_text(encoding="utf-8")
    ok("report", predicted, "--out", tmp_path / "frontier.html", "--figures", tmp_path / "figures")
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"cost_frontier.png", "cost_frontier.svg", "cost_groups.png"} <= names


def test_export_writes_what_each_party_needs(networks, runs, tmp_path):
    said = ok("private", "export", networks[0], "--onnx", "--out", tmp_path / "shared")
    public = PlainGraph.load_public(tmp_path / "shared" / "public" / "graph.safetensors")
    public.load_weights(tmp_path / "shared" / "weights.safetensors")
    assert f"{public.relus:,} ReLUs" in said
    prepared = json.loads((tmp_path / "shared" / "public" / "images.json").read_text())
    assert prepared["shape"] == [1, 8, 8]
    assert prepared["class_names"] == [str(digit) for digit in range(10)]
    onnx = pytest.importorskip("onnxruntime")
    session = onnx.InferenceSession(tmp_path / "shared" / "network.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [1, 8, 8]


@spu
def test_a_run_is_told_kept_and_put_on_the_frontier(measured, runs, tmp_path):
    table = pd.read_parquet(measured / "private.parquet")
    assert table["network"].tolist() == [f"students/{name}" for name in ("budget-224", "budget-45", "budget-20")]
    assert (table["bytes"] / table["predicted_bytes"]).between(0.9, 1.1).all()
    assert (table["agreement"] == 1).all()
    assert len(pd.read_parquet(measured / "calls.parquet")) == 3
    said = ok(
        "frontier", runs / "audit", "--measured", measured, "--protocol", "semi2k", "--out", tmp_path / "frontier"
    )
    assert "Costs on semi2k predicted, not measured: base network." in said
    front = pd.read_parquet(tmp_path / "frontier" / "frontier.parquet").set_index("model")
    assert front["basis"].to_dict() == {
        "base": "predicted",
        # The same masks before the finetune cost the same.
        **{
            f"{run}/budget-{n}": "loopback measured, LAN added by the model"
            for run in ("snl", "students")
            for n in (224, 45, 20)
        },
    }
    assert (front["seconds"] > 0).all()


@spu
def test_without_a_folder_nothing_is_kept(networks, tmp_path):
    said = ok("private", "run", networks[0], "--protocol", "semi2k", "--repeats", "1", cwd=tmp_path)
    assert "trusted dealer" in said
    assert not list(tmp_path.iterdir())


@spu
def test_fixed_point_by_group(networks, tmp_path):
    arguments = ["private", "fixed-point", networks[0], "--fraction-bits", "4,14", "--samples", "5", "--out"]
    ok(*arguments, tmp_path / "bits")
    table = pd.read_parquet(tmp_path / "bits" / "fixed_point.parquet")
    assert set(table["fraction_bits"]) == {4, 14}
    assert len(table) == 2 * 11
    assert (table.loc[table["fraction_bits"] == 14, "agreement"] == 1).all()


@spu
def test_serve_and_query_between_two_commands(networks, tmp_path):
    from fairline.private.spu import free_addresses

    ok("private", "export", networks[0], "--out", tmp_path / "shared")
    model, image = free_addresses()
    (tmp_path / "parties.yaml").write_text(f"model: {model}\nimage: {image}\n")
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "one.png")
    parties = ["--parties", tmp_path / "parties.yaml", "--timeout", "20"]
    server = Started("private", "serve", tmp_path / "shared", *parties, "--sessions", "1")
    try:
        said = ok(
            "private", "query", tmp_path / "shared" / "public", tmp_path / "one.png", *parties, "--protocol", "semi2k"
        )
        assert re.search(r"one\.png: \d \(logits", said)
        assert "trusted dealer" in said
        served = server.result(60)
        assert served.returncode == 0
        assert "Session 1 is done" in served.stdout + served.stderr
    finally:
        server.kill()


def test_bad_input_is_one_sentence(refused, runs, networks, predicted, tmp_path):
    students, out = runs / "students", ["--out", tmp_path / "out"]
    for arguments, words in (
        (["private", "estimate", students, "--protocol", "magic"], "no cost model of 'magic'"),
        (["private", "estimate", students, "--network", "moon"], "Network 'moon' is not one of"),
        (["private", "estimate", students, "--batch-size", "0"], "at least one image"),
        (["private", "estimate", runs / "audit"], "holds a 'audit' run"),
        (["private", "estimate", tmp_path], "not a run folder"),
        (["private", "export", students, *out], "holds 3 networks"),
        (["private", "serve", tmp_path, "--parties", tmp_path / "none.yaml"], "cannot be read"),
        (["frontier", students, *out], "holds a 'finetune' run"),
        (["frontier", runs / "audit", "--within", "-1", *out], "in percentage points, from 0 to 100"),
        (["frontier", runs / "audit", "--protocol", "magic", *out], "no cost model of 'magic'"),
        (["frontier", runs / "audit", "--measured", students, *out], "holds a 'finetune' run"),
        (["report", predicted, "--costs", predicted], "belongs to the report of an audit"),
    ):
        assert words in refused(*arguments)
    assert not (tmp_path / "out").exists()
    (tmp_path / "parties.yaml").write_text("model: here\n")
    assert "does not name two addresses" in refused(
        "private", "serve", tmp_path, "--parties", tmp_path / "parties.yaml"
    )
    shutil.copytree(runs / "audit", tmp_path / "other")
    assert "not of" in refused("report", tmp_path / "other", "--costs", predicted)


@spu
def test_bad_input_to_a_run_is_one_sentence(refused, networks, tmp_path):
    from fairline.private.spu import free_addresses

    model, image = free_addresses()
    (tmp_path / "parties.yaml").write_text(f"model: {model}\nimage: {image}\n")
    (tmp_path / "wrong.yaml").write_text("model: here\nimage: there\n")
    (tmp_path / "no.png").write_text("no image")
    ok("private", "export", networks[0], "--out", tmp_path / "shared")
    ok("private", "export", networks[1], "--out", tmp_path / "other")
    public, parties = tmp_path / "shared" / "public", ["--parties", tmp_path / "parties.yaml"]
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "one.png")
    out = ["--out", tmp_path / "out"]
    for arguments, words in (
        (["private", "run", networks[0], "--protocol", "delphi"], "no protocol 'delphi' to run"),
        (["private", "run", networks[0], "--repeats", "0", *out], "one timed call"),
        (["private", "run", networks[0], "--batch-sizes", "one", *out], "not whole numbers"),
        (["private", "run", networks[0], "--images", "0", *out], "one image at least"),
        (["private", "run", networks[0], "--fraction-bits", "40", *out], "do not fit into a ring of 64"),
        (["private", "run", networks[0], "--ring-bits", "32", *out], "64 or 128 bits"),
        (["private", "fixed-point", networks[0], "--protocol", "magic", *out], "no protocol 'magic'"),
        (["private", "fixed-point", networks[0], "--split", "all", *out], "The split is train, val or test"),
        (["private", "run", networks[0], "--split", "all", *out], "The split is train, val or test"),
        (["private", "query", public, tmp_path / "no.png", *parties], "not a readable image"),
        (["private", "query", public, tmp_path / "gone.png", *parties], "file does not exist"),
        (["private", "query", tmp_path, tmp_path / "one.png", *parties], "graph.safetensors"),
        (["private", "query", public, tmp_path / "one.png", "--parties", tmp_path / "wrong.yaml"], "form host:port"),
        (["private", "query", public, tmp_path / "one.png", *parties, "--wait", "1"], "did not answer at"),
    ):
        assert words in refused(*arguments)
    assert not (tmp_path / "out").exists()
    shutil.copy(tmp_path / "shared" / "weights.safetensors", tmp_path / "other" / "weights.safetensors")
    (tmp_path / "other" / "weights.safetensors").write_bytes(b"cut short")
    assert "weights.safetensors" in refused("private", "serve", tmp_path / "other", *parties)
