"""Run folders that other processes are at work in, or were killed in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fairline._io import write_json
from fairline.errors import FairlineError
from fairline.jobs._common import do_once
from fairline.runs import Run

CPU = torch.device("cpu")


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".config.json.x1y2.tmp"], [".config.json.x1y2.tmp"]])
def test_what_a_killed_process_left_before_the_config_is_no_obstacle(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    with Run.write(tmp_path, "train", {"seed": 0}, CPU) as run:
        assert not run.finished
    assert Run.read(tmp_path, "train").config["seed"] == 0
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["table.csv", ".hidden", "status.json"])
def test_what_is_no_run_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with (
        pytest.raises(FairlineError, match="is not empty and is not a run folder"),
        Run.write(tmp_path, "train", {}, CPU),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_begins_while_the_folder_is_looked_at(tmp_path, monkeypatch, seed):
    """Another process writes config and status after this one found no config."""
    listed = Path.iterdir

    def begun(folder: Path):
        monkeypatch.undo()
        write_json(tmp_path / "config.json", {"command": "train", "seed": 0})
        write_json(tmp_path / "status.json", {"status": "running"})
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", begun)
    if seed:
        with pytest.raises(FairlineError, match="holds another run"), Run.write(tmp_path, "train", {"seed": 1}, CPU):
            pass
    else:
        with Run.write(tmp_path, "train", {"seed": 0}, CPU) as run:
            assert not run.finished
        assert run.finished


def refuse(folder: Path, seed: int, made: str = "") -> None:
    """A run that is given bad input, perhaps after it has made something."""

    def work(run: Run) -> None:
        if made:
            write_json(run.folder / made, {})
        raise FairlineError("Bad input")

    with pytest.raises(FairlineError, match="Bad input"):
        do_once(folder, "adjust", {"seed": seed}, CPU, work)


def test_what_was_refused_is_no_obstacle(tmp_path):
    refuse(tmp_path, 0)
    refuse(tmp_path, 1)
    assert not Run(tmp_path).finished
    with pytest.raises(FairlineError, match="was refused; its"):
        Run.read(tmp_path)
    with Run.write(tmp_path, "train", {"seed": 2}, CPU) as run:
        assert not run.finished
    assert Run.read(tmp_path, "train").config["seed"] == 2
    assert "adjust stopped: Bad input" in (tmp_path / "log.txt").read_text()
    with pytest.raises(FairlineError, match="holds another run"), Run.write(tmp_path, "train", {"seed": 3}, CPU):
        pass


@pytest.mark.parametrize("made", ["networks/a/network.json", "checkpoint/state.json", "table.json"])
def test_what_was_made_before_it_was_refused_is_not_lost(tmp_path, made):
    refuse(tmp_path, 0, made)
    with pytest.raises(FairlineError, match="holds another run"), Run.write(tmp_path, "adjust", {"seed": 1}, CPU):
        pass
    assert (tmp_path / made).exists()
    with Run.write(tmp_path, "adjust", {"seed": 0}, CPU) as run:
        assert not run.finished


def test_what_was_killed_may_be_resumed_and_is_not_taken_for_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run.write(tmp_path, "train", {"seed": 0}, CPU):
        raise KeyboardInterrupt
    with pytest.raises(FairlineError, match="holds another run"), Run.write(tmp_path, "train", {"seed": 1}, CPU):
        pass
