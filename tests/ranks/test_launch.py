"""Two processes over gloo: the same as one, resumed by one or by two, and ended with a sentence where one is lost."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fairline as fl
from fairline.cli.options import STRATEGIES as KNOWN
from fairline.ranks import STRATEGIES, launch
from fairline.runs import Run
from fairline.study import cells
from tests.commands import ENVIRONMENT, TRAIN, command, fairline, ok
from tests.ranks import checks
from tests.test_docs import ROOT, blocks

pytest.importorskip("lightning_fabric")

#: Of what two processes and one compute in float64; the masks of mask learning and the losses are float32.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    checks.begin(made / "begun-by-one.safetensors")
    return made


@pytest.fixture(scope="module")
def seen() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def two(folder: Path, seen: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that two processes do, in one launch."""
    return launch(checks.both, folder, devices=2, device="cpu", progress=seen.append)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return checks.everything()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Nested results alike, numbers within the tolerance and everything else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"seconds"}:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for position, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}/{position}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, float) and not math.isnan(expected):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), where
    else:
        assert found == expected or (found != found and expected != expected), where


@pytest.mark.parametrize("what", ["train", "audit"])
def test_two_processes_compute_what_one_does(two, one, what):
    assert_same(two[0][what], one[what])


@pytest.mark.parametrize("objective", [*fl.objectives.REGISTRY, "own"])
def test_finetunes_under_every_objective_are_those_of_one_process(two, one, objective):
    assert_same(two[0]["finetune"][objective], one["finetune"][objective])


@pytest.mark.parametrize("method", ["snl", "snl, fair", "autorep", "taylor", "shapley", "coordinate descent"])
def test_masks_are_those_of_one_process(two, one, method):
    assert_same(two[0]["linearize"][method], one["linearize"][method])


def test_a_run_goes_on_with_another_number_of_devices(two, one, folder):
    assert_same(two[1]["resumed"], one["train"])
    assert_same(checks.resume(folder / "begun-by-two.safetensors"), one["train"])


def test_the_network_draws_other_numbers_for_each_part_of_each_batch(two):
    drawn = two[1]["drawn"].flatten(0, 1)
    assert len(drawn) == 4
    assert len(drawn.flatten().unique()) == drawn.numel()


def test_only_the_first_process_writes_and_reports(two, folder, seen):
    assert {path.name for path in folder.glob("rank-*")} == {"rank-0", "rank-1"}
    assert {path.name for path in folder.glob("masks-*")} == {"masks-0.safetensors"}
    batches = 2 * math.ceil(checks.IMAGES / checks.BATCH)
    assert [update.done for update in seen if not update.metrics] == list(range(1, batches + 1))


def test_what_is_wrong_is_said_as_in_one_process(two):
    with pytest.raises(fl.FairlineError) as told:
        fl.train(checks.Net(2), checks.make_data(), epochs=1)
    assert two[1]["refused"] == [str(told.value)]


def shown(*columns: str, of: tuple[str, str]) -> list[str]:
    """Lines of ``ps``."""
    asked = ["ps", "-ww", *(word for column in columns for word in ("-o", f"{column}=")), *of]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes that a command has spawned to work."""
    lines = shown("pid", "args", of=("--ppid", str(process.pid)))
    return [int(line.split()[0]) for line in lines if "spawn_main" in line]


def alive(pid: int) -> bool:
    return any(not state.startswith("Z") for state in shown("stat", of=("-p", str(pid))))


def wait_for(condition, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.mark.parametrize("victim", [pytest.param("a rank", marks=pytest.mark.slow), "the command"])
def test_a_killed_process_ends_the_others_and_another_number_of_devices_goes_on(tmp_path, victim):
    out, arguments = tmp_path / "base", [*TRAIN, "--epochs", "60", "--device", "cpu"]
    asked = command(*arguments, "--out", out, "--devices", "2")
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        wait_for((out / "checkpoint" / "train.safetensors").exists)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        os.kill(ranks[1] if victim == "a rank" else process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    wait_for(lambda: not any(map(alive, ranks)), timeout=10)
    if victim == "a rank":
        assert process.returncode == 2
        assert "SIGKILL (out of memory?), and the others with it; repeat the command to resume." in errors
        assert "Traceback" not in errors
    ok(*arguments, "--out", out)
    run = Run.read(out, "train")
    assert len(run.table("metrics.parquet")) == 60
    assert "resumed from" in (out / "log.txt").read_text(encoding="utf-8")
    assert "devices" not in run.config


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--devices", "0"], "Work needs a device at least, not 0."),
        (["--devices", "9999"], "9999 devices were asked for, but there"),
        (["--devices", "2", "--device", "cpu:1"], "Several devices are of one kind, cpu or cuda, not 'cpu:1'."),
        (["--devices", "2", "--strategy", "fsdp"], "Every device keeps the whole network, so strategies are auto"),
        (["--devices", "2", "--strategy", "ddp"], "joins processes that torchrun, SLURM or 'fabric run' has started"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, options, sentence):
    done = fairline(*TRAIN, "--out", tmp_path / "out", "--device", "cpu", *options)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launcher", [pytest.param("fabric", marks=pytest.mark.slow), "torchrun"])
def test_processes_that_a_launcher_has_started_work_together(tmp_path, launcher):
    options = {
        "fabric": ["run", "--accelerator", "cpu", "--devices", "2", "--"],
        "torchrun": ["--standalone", "--nproc-per-node", "2", "--no-python"],
    }[launcher]
    scripts = Path(sys.executable).parent
    run = [scripts / "fairline", *TRAIN, "--out", tmp_path / "two", "--device", "cpu", "--devices", "2"]
    done = subprocess.run(
        [*map(str, [scripts / launcher, *options, *run])], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ok(*TRAIN, "--out", tmp_path / "one", "--device", "cpu")
    losses = [Run.read(tmp_path / name, "train").table("metrics.parquet")["loss"] for name in ("two", "one")]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), abs=1e-5)


def test_without_fabric_one_sentence_names_the_extra_and_one_device_needs_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(fl.FairlineError, match=r"pip install 'fairline\[multi\]'"):
        launch(max, 1, 2, devices=2, device="cpu")
    assert launch(max, 1, 2, devices=1) == 2


def test_what_cannot_be_sent_to_another_process_is_named():
    with pytest.raises(fl.FairlineError, match="a function that can be imported"):
        launch(lambda: None, devices=2)


def test_the_command_line_knows_all_strategies():
    assert KNOWN == STRATEGIES


def test_the_code_in_the_guide_runs(capsys):
    (code,) = (block for block in blocks(ROOT / "docs" / "guide.md", "python") if "fl.launch" in block)
    exec(compile(code, "guide.md", "exec"), {"__name__": "__main__"})
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["train", "linearize", "finetune", "audit", "last-layer", "compare"])
def test_a_study_lets_its_devices_work_on_what_can_be_divided(monkeypatch, tmp_path, kind):
    asked = {}
    monkeypatch.setattr(cells, "launch", lambda work, *_, devices, **__: asked.update(devices=devices))
    cells.compute(cells.Cell(kind, {}, (), "digits-0/cell", {}), tmp_path / "cell", [], devices=3)
    assert asked["devices"] == (1 if kind in ("last-layer", "compare") else 3)
