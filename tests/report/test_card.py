"""A network on its way to others: its card, and one line to have it back."""

import json
import re

import huggingface_hub
import pandas as pd
import pytest
import torch

import fairline as fl
from fairline._io import write_json
from fairline.errors import FairlineError
from fairline.runs import load_network
from tests.commands import ok

SAID = ["--license", "apache-2.0", "--intended-use", "To be tried."]


@pytest.fixture(scope="module")
def audited(runs):
    return runs / "audit"


def published(audited, target, network="students/budget-20"):
    ok("card", audited, "--network", network, "--out", target, *SAID, "--data-license", "CC BY 4.0")
    return target


@pytest.fixture
def folder(audited, tmp_path):
    return published(audited, tmp_path / "published")


def test_a_card_says_what_the_audit_says(audited, folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "fairline"
    rows = pd.read_parquet(audited / "audit.parquet")
    rows = rows[(rows["model"] == "students/budget-20") & (rows["measure"] == "accuracy")].set_index("group")
    told = {result.metric_name: result.metric_value for result in card.data.eval_results}
    for group, value in rows["value"].items():
        assert told["accuracy" if group == "overall" else f"accuracy, {group}"] == pytest.approx(value, abs=1e-4)
        who = "\\*\\*all\\*\\*" if group == "overall" else re.escape(group)
        assert re.search(rf"^\| {who} \| {int(rows.loc[group, 'n'])}\b.*\| {value:.1%} \[", card.content, flags=re.M)
    # A table of Markdown has no empty line in it.
    table = card.content[card.content.index("| group |") :].split("\n\n")[0]
    assert table.count("\n") == len(rows) + 1
    for words in ("in place of the network before linearization", "To be tried.", "CC BY 4.0", "20 of"):
        assert words in card.content


def test_one_line_gives_the_network_back(runs, folder, tmp_path, monkeypatch):
    expected, info = load_network(runs / "students" / "networks" / "budget-20")
    images = torch.rand(3, 1, *[8] * 2)
    for source, name in ((folder, None), (runs / "students", "budget-20"), (runs / "base", None)):
        network = fl.load(source, name)
        assert not network.training
        if source != runs / "base":
            assert torch.equal(network(images), expected(images))
            assert fl.relu_count(network, images) == info.relus == 20
    # From the Hub, as it would be fetched.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(folder))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(fl.load("someone/faces")(images), expected(images))
    takes = json.loads((folder / "preprocessing.json").read_text())
    assert takes["classes"] == [str(digit) for digit in range(10)]
    assert len(takes["mean"]) == len(takes["std"]) == takes["in_channels"] == 1


def test_code_from_elsewhere_is_not_run(folder, tmp_path, monkeypatch):
    described = json.loads((folder / "network.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    described["model"]["name"] = f"{tmp_path / 'evil.py'}:net"
    write_json(folder / "network.json", described)
    with pytest.raises(FairlineError, match="own_code=True allows"):
        fl.load(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FairlineError, match="built by code outside fairline"):
        fl.load("someone/faces", own_code=True)


def test_what_is_pushed_is_the_folder(folder, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repository, **options):
            seen["made"] = (repository, options)
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, **options):
            seen["sent"] = options

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert fl.push(folder, "someone/faces", private=True).endswith("someone/faces")
    assert seen["made"] == ("someone/faces", {"private": True, "exist_ok": True})
    assert seen["sent"]["folder_path"] == folder
    monkeypatch.setattr(Api, "upload_folder", lambda *_, **__: 1 / 0)
    with pytest.raises(FairlineError, match="was not written"):
        fl.push(folder, "someone/faces")


def test_what_cannot_be_loaded_or_pushed_is_one_sentence(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FairlineError, match=r"holds 3 networks .*; name one"):
        fl.load(runs / "students")
    with pytest.raises(FairlineError, match="holds no network 'budget-7'"):
        fl.load(runs / "students", "budget-7")
    with pytest.raises(FairlineError, match="no folder, and no repository"):
        fl.load("nowhere")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(FairlineError, match="cannot be had from the Hub"):
        fl.load("someone/nothing")
    with pytest.raises(FairlineError, match=r"holds no README\.md"):
        fl.push(tmp_path, "someone/faces")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (SAID, "choose one with --network"),
        ([*SAID, "--network", "students/budget-7"], "is of no network 'students/budget-7'"),
        (["--license", " x", "--intended-use", "\t"], "Nothing stands after"),
    ],
)
def test_what_has_no_card_is_one_sentence(audited, refused, tmp_path, arguments, words):
    assert words in refused("card", audited, "--out", tmp_path / "card", *arguments)
    assert not (tmp_path / "card").exists()


def test_another_folder_is_not_written_over(audited, refused, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    said = refused("card", audited, "--network", "students/budget-20", "--out", tmp_path, *SAID)
    assert "holds something else" in said
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
