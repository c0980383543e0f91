"""The command line in processes of its own: the whole path, kills, and bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer

from fairline import data, linearize, objectives
from fairline._io import load_tensors, save_tensors
from fairline.audit import EXPLAIN as EXPLAINING_MEASURES
from fairline.audit import REGISTRY
from fairline.cli import app, main
from fairline.cli.options import (
    AUDIT_MEASURES,
    LINEARIZERS,
    NORMALIZATIONS,
    OBJECTIVES,
    STUDENTS,
    parse_budgets,
    parse_options,
)
from fairline.errors import FairlineError
from fairline.jobs import _common as jobs_common
from fairline.runs import Run
from fairline.runs.environment import environment
from fairline.theory import toy
from tests.commands import AUDIT, ENVIRONMENT, EXPLAIN, FINETUNE, LINEARIZE, TRAIN, Started, command, fairline, ok


def test_run_folders_hold_what_they_promise(runs):
    for name in ("base", "snl", "students", "audit"):
        for file in ("config.json", "environment.json", "status.json", "log.txt"):
            assert (runs / name / file).stat().st_size > 0
        assert json.loads((runs / name / "status.json").read_text()) == {"status": "finished"}
        assert not (runs / name / "checkpoint").exists()
        assert not list((runs / name).rglob("*.tmp"))
    environment = json.loads((runs / "base" / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert "CPU" in environment["device"]
    assert len(pd.read_parquet(runs / "base" / "metrics.parquet")) == 3
    assert len(pd.read_parquet(runs / "students" / "metrics.parquet")) == 3 * 2
    metrics = pd.read_parquet(runs / "snl" / "metrics.parquet")
    assert {"relus", "lambda", "loss"} <= set(metrics.columns)
    assert not list(runs.rglob("*.pt")) + list(runs.rglob("*.pth")) + list(runs.rglob("*.pkl"))
    _, info = load_tensors(runs / "snl" / "networks" / "budget-20" / "masks.safetensors")
    assert info["method"] == "snl"
    assert info["budget"] == 20
    assert len(info["layers"]) == 3


def test_a_copy_without_history_says_which_commit_it_is(monkeypatch):
    def no_git(*_arguments, **_options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.delenv("FAIRLINE_COMMIT", raising=False)
    assert environment(torch.device("cpu"))["commit"] is None
    monkeypatch.setenv("FAIRLINE_COMMIT", "0123abc")
    assert environment(torch.device("cpu"))["commit"] == "0123abc"


def test_audit_table_has_every_network_and_group(runs):
    table = pd.read_parquet(runs / "audit" / "audit.parquet")
    assert set(table["relus"]) == {448, 224, 45, 20}
    assert table.groupby("stage")["model"].nunique().to_dict() == {"base": 1, "finetuned": 3, "linearized": 3}
    assert not table.duplicated(["model", "split", "group", "class", "measure"]).any()
    counts = table[(table["measure"] == "accuracy") & (table["group"] != "overall")].groupby("model")["n"].sum()
    assert (counts == 719).all()
    predictions = pd.read_parquet(runs / "audit" / "predictions.parquet")
    accuracy = predictions.groupby("model")["correct"].mean()
    reported = table[(table["group"] == "overall") & (table["measure"] == "accuracy")].set_index("model")["value"]
    pd.testing.assert_series_equal(accuracy.sort_index(), reported.sort_index(), check_names=False)


def test_a_finished_command_changes_nothing(runs):
    before = {file: file.stat().st_mtime_ns for file in (runs / "base").rglob("*") if file.is_file()}
    assert "Best epoch" in ok(*TRAIN, "--out", runs / "base")
    after = {file: file.stat().st_mtime_ns for file in (runs / "base").rglob("*") if file.is_file()}
    lock = runs / "base" / ".lock"
    assert {f: t for f, t in before.items() if f != lock} == {f: t for f, t in after.items() if f != lock}


def test_runs_may_be_moved_together(runs, tmp_path):
    for name in ("base", "snl", "students"):
        shutil.copytree(runs / name, tmp_path / "moved" / name)
    config = tmp_path / "moved" / "students" / "config.json"
    config.write_text(config.read_text().replace(str(runs), "/nowhere"))
    lineage = Run(tmp_path / "moved" / "students").lineage()
    assert [run.command for run in lineage] == ["train", "linearize", "finetune"]


def contents(folder: Path) -> dict[str, object]:
    """Everything that must not depend on whether a run was interrupted."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = {k: v.tolist() for k, v in load_tensors(file)[0].items()}
        elif file.suffix == ".parquet":
            found[name] = pd.read_parquet(file).drop(columns="seconds", errors="ignore").to_csv()
        elif file.name in ("network.json", "status.json"):
            found[name] = file.read_text()
    return found


def kill_when(arguments: list[str], moment, timeout: float = 120) -> bool:
    """Start a command and kill -9 it as soon as ``moment()`` is true; False if it ended before."""
    process = Started(*arguments)
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if moment():
                process.kill()
                return process.result().returncode == -signal.SIGKILL
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        raise AssertionError("the moment never came")
    finally:
        process.kill()
        process.result()


STAGES = {
    "train": (lambda runs: TRAIN, "base", "checkpoint/train.safetensors"),
    "linearize": (lambda runs: ["linearize", str(runs / "base"), *LINEARIZE], "snl", "checkpoint/snl.safetensors"),
    "finetune": (
        lambda runs: ["finetune", str(runs / "snl"), *FINETUNE],
        "students",
        "checkpoint/budget-224.safetensors",
    ),
    "audit": (
        lambda runs: ["audit", str(runs / "snl"), str(runs / "students"), *AUDIT],
        "audit",
        "config.json",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_and_resume_gives_the_same_result(runs, tmp_path, stage):
    arguments, finished, checkpoint = STAGES[stage]
    out = tmp_path / finished
    killed = kill_when([*arguments(runs), "--out", str(out)], (out / checkpoint).exists)
    assert killed, "the command ended before it could be killed"
    assert json.loads((out / "status.json").read_text()) == {"status": "running"} if stage != "audit" else True
    ok(*arguments(runs), "--out", out)
    assert contents(out) == contents(runs / finished)
    if stage != "audit":
        assert "resumed from" in (out / "log.txt").read_text()


@pytest.mark.slow
def test_an_explaining_audit_resumes_at_the_next_network(runs, explained, tmp_path):
    out = tmp_path / "explained"
    arguments = ["audit", str(runs / "students"), *EXPLAIN, "--out", str(out)]
    first = out / "checkpoint" / "0.predictions.parquet"
    assert kill_when(arguments, first.exists), "the command ended before it could be killed"
    written = first.stat().st_mtime_ns
    assert kill_when(arguments, (out / "checkpoint" / "1.predictions.parquet").exists)
    assert first.stat().st_mtime_ns == written
    ok(*arguments)
    assert contents(out) == contents(explained)
    assert not (out / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.2 + 0.1 * i for i in range(12)])
def test_kill_9_at_any_moment_of_mask_learning(runs, tmp_path, delay):
    arguments, finished, _ = STAGES["linearize"]
    out = tmp_path / finished
    start = time.monotonic()
    kill_when([*arguments(runs), "--out", str(out)], lambda: time.monotonic() - start > delay)
    ok(*arguments(runs), "--out", out)
    assert contents(out) == contents(runs / finished)


#: A training that takes a while.
LONG = [*TRAIN[:8], "400", *TRAIN[9:]]


def test_two_processes_do_not_share_a_folder(tmp_path):
    out = tmp_path / "base"
    first = Started(*LONG, "--out", out)
    try:
        while not (out / "status.json").exists():
            assert first.poll() is None
            time.sleep(0.01)
        assert_sentence(fairline(*LONG, "--out", out), "in use by another process")
    finally:
        first.kill()
        first.result()


def test_control_c_says_how_to_go_on(tmp_path):
    """As a shell starts it, and not as the other tests do."""
    out = tmp_path / "base"
    process = subprocess.Popen(
        command(*LONG, "--out", out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # Tests that run in the background of a script inherit an ignored interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (out / "checkpoint" / "train.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "repeat the command to resume" in err
    assert "Traceback" not in err


def assert_sentence(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr


BAD = {
    "unknown data": (["train", "--data", "mnist", "--out", "x"], "no data set 'mnist'"),
    "no folder": (["train", "--data", "cifar10", "--out", "x"], "needs a folder"),
    "missing folder": (["train", "--data", "cifar10", "--root", "nowhere", "--out", "x"], "nowhere does not exist"),
    "empty folder": (["train", "--data", "utkface:age", "--root", "empty", "--out", "x"], "neither utkface"),
    "no task": (["data", "utkface", "--root", "empty"], "needs a task"),
    "unknown groups": (["data", "utkface:age", "--groups", "hair", "--root", "empty"], "no groups 'hair'"),
    "wrong column": (["data", "folder", "--root", "table", "--data-option", "label=age"], "no column 'age'"),
    "unreadable images": (["data", "folder", "--root", "table"], "None of the 3 images can be read"),
    "own data option": (["data", "digits", "--data-option", "root=x"], "take no option 'root'"),
    "task as option": (["data", "digits", "--data-option", "task=x"], "stands behind the name: 'digits:x'"),
    "own model option": ([*TRAIN, "--model-option", "num_classes=3", "--out", "x"], "takes no option 'num_classes'"),
    "data option": (["data", "digits", "--data-option", "colour=red"], "no option 'colour'"),
    "empty option": (["data", "digits", "--data-option", "image_size="], "'image_size=' gives no value"),
    "empty value": (["train", "--data", "", "--out", "x"], "Nothing stands after '--data'"),
    "empty path": (["report", ""], "Nothing stands after 'report'"),
    "empty path to write": ([*TRAIN, "--out="], "'--out=' gives no value"),
    "no measure": (["audit", "RUNS/base", "--measures", ",", "--out", "x"], "No measure was given"),
    "no key=value": (["data", "digits", "--data-option", "colour"], "'colour' is not KEY=VALUE"),
    "unknown model": ([*TRAIN[:4], "lenet", "--out", "x"], "no model 'lenet'"),
    "model option": ([*TRAIN, "--model-option", "depth=3", "--out", "x"], "no option 'depth'"),
    "a file without a function": ([*TRAIN[:4], "own.py", "--out", "x"], "no model 'own.py'.* file.py:function"),
    "a broken file": ([*TRAIN[:4], "broken.py:net", "--out", "x"], r"SyntaxError: .* \(broken.py, line 1\)"),
    "missing module": ([*TRAIN[:4], "nowhere:net", "--out", "x"], "cannot be imported"),
    "no weights": ([*TRAIN, "--epochs", "0", "--out", "x"], "needs weights"),
    "missing weights": ([*TRAIN, "--weights", "gone.safetensors", "--out", "x"], "gone.safetensors does not exist"),
    "weights of another width": (
        [*TRAIN[:5], "--width", "8", "--weights", "RUNS/base/networks/base/model.safetensors", "--out", "x"],
        r"another architecture: '0.weight' has shape \(4, 1, 3, 3\) there and \(8, 1, 3, 3\) in the model",
    ),
    "no epochs": ([*TRAIN, "--epochs", "-1", "--out", "x"], "epochs ≥ 1"),
    "unknown device": ([*TRAIN, "--device", "abacus", "--out", "x"], "'abacus' cannot be used"),
    "exploding": ([*TRAIN, "--lr", "1e30", "--out", "x"], "loss became"),
    "too few outputs": (
        [*TRAIN[:4], "few.py:net", "--epochs", "1", "--out", "x"],
        "The model has 2 outputs, but digits has 10 classes",
    ),
    "images alone in their batches": (
        [*TRAIN[:4], "resnet18", "--width", "2", "--batch-size", "1", "--out", "x"],
        "normalises over the images of a batch and cannot train on one alone; batch_size is 1",
    ),
    "foreign folder": ([*TRAIN, "--out", "table"], "is not empty and is not a run"),
    "a file": ([*TRAIN, "--out", "table/metadata.csv"], "is a file"),
    "other settings": ([*TRAIN, "--seed", "7", "--out", "RUNS/base"], "holds another run .*seed"),
    "no run": (["linearize", "table", "--out", "x"], "is not a run folder"),
    "wrong run": (["linearize", "RUNS/snl", "--out", "x"], "holds a 'linearize' run"),
    "budget too large": (["linearize", "RUNS/base", "--budgets", "449", "--out", "x"], "the network has 448 ReLUs"),
    "fraction too large": (["linearize", "RUNS/base", "--budgets", "1.5", "--out", "x"], "'1.5' is outside"),
    "negative budget": (["linearize", "RUNS/base", "--budgets=-3", "--out", "x"], "'-3' is outside"),
    "no number": (["linearize", "RUNS/base", "--budgets", "half", "--out", "x"], "Budget 'half'"),
    "unknown method": (["linearize", "RUNS/base", "--method", "magic", "--out", "x"], "no linearizer 'magic'"),
    "method option": (["linearize", "RUNS/base", "--option", "speed=3", "--out", "x"], "speed"),
    "no number for a method": (
        ["linearize", "RUNS/base", "--option", "growth=fast", "--out", "x"],
        "'growth' is a number",
    ),
    "granularity": (["linearize", "RUNS/base", "--granularity", "row", "--out", "x"], "pixel, channel or layer"),
    "unknown objective": (["finetune", "RUNS/snl", "--objective", "luck", "--out", "x"], "no objective 'luck'"),
    "negative mu": (
        ["finetune", "RUNS/snl", "--objective", "lagrangian", "--mu=-1", "--out", "x"],
        "μ must be finite and not negative: mu=-1",
    ),
    "mu of another objective": (
        ["finetune", "RUNS/snl", "--mu", "1", "--out", "x"],
        "'erm' knows no option 'mu'",
    ),
    "exploding multipliers": (
        ["finetune", "RUNS/snl", *FINETUNE, "--objective", "lagrangian", "--mu", "1e6", "--out", "x"],
        "Epoch 1 of finetuning: The multiplier of group “.*” exploded to .*; take a smaller mu than 1e",
    ),
    "option of an objective": (
        ["finetune", "RUNS/snl", "--objective", "lagrangian", "--objective-option", "violation=odd", "--out", "x"],
        "not 'odd'",
    ),
    "no groups": (
        ["finetune", "ungrouped", "--objective", "group_dro", "--out", "x"],
        "needs groups, but all samples are in “all”",
    ),
    "masks under an unknown objective": (
        ["linearize", "RUNS/base", "--objective", "luck", "--out", "x"],
        "no objective 'luck'",
    ),
    "negative protection": (["linearize", "RUNS/base", "--protect=-1", "--out", "x"], "protect ≥ 0"),
    "few held-out images": (["last-layer", "RUNS/students", "--out", "x"], "has one held-out image; two halves need"),
    "no way to the last layer": (["last-layer", "RUNS/students", "--method", "magic", "--out", "x"], "not 'magic'"),
    "balanced and reweighted": (
        ["last-layer", "RUNS/students", "--method", "afr", "--balance", "class", "--out", "x"],
        "balanced by class under dfr only",
    ),
    "averaged and refitted": (
        ["last-layer", "RUNS/students", "--method", "afr", "--repeats", "3", "--out", "x"],
        "averaged over 3 subsets under dfr only; afr fits to all images",
    ),
    "points without end": (
        ["last-layer", "RUNS/students", "--method", "self", "--strength", "inf", "--out", "x"],
        "A strength is a finite number, .* not inf",
    ),
    "no points": (
        ["last-layer", "RUNS/students", "--method", "self", "--strength", "nan", "--out", "x"],
        "A strength is a finite number, .* not nan",
    ),
    "penalised without end": (
        ["last-layer", "RUNS/students", "--strength", "nan", "--out", "x"],
        "A strength is a finite number, .* not nan",
    ),
    "half an image": (
        ["finetune", "RUNS/snl", "--objective", "drop", "--objective-option", "samples=1.5", "--out", "x"],
        "'samples' is a whole number or none, not 1.5",
    ),
    "no cap": (
        ["finetune", "RUNS/snl", "--objective", "lagrangian", "--objective-option", "cap=abc", "--out", "x"],
        "'cap' is a number or none, not 'abc'",
    ),
    **{
        f"the command's own {key}": (
            ["linearize", "RUNS/base", "--option", f"{key}=odd", "--out", "x"],
            f"'{key}' is no option of a method but one of the command",
        )
        for key in ("source", "objective", "seed", "device", "groups", "strategy", "log", "progress")
    },
    "an option called name": (
        ["linearize", "RUNS/base", "--option", "name=odd", "--out", "x"],
        "knows no option 'name'",
    ),
    "adjusted beyond all numbers": (
        ["adjust", "RUNS/students", "--tau", "1e308", "--out", "x"],
        "beyond what float32 can hold; take a τ nearer to 0",
    ),
    "half a point": (
        ["last-layer", "RUNS/students", "--method", "self", "--strength", "0.5", "--out", "x"],
        "a number of points, not 0.5",
    ),
    "reweighted without end": (
        ["last-layer", "RUNS/students", "--method", "afr", "--strength", "nan", "--out", "x"],
        "A strength is a finite number, .* not nan",
    ),
    "no way to adjust": (["adjust", "RUNS/students", "--method", "magic", "--out", "x"], "not 'magic'"),
    "no rule to adjust by": (["adjust", "RUNS/students", "--rule", "coin", "--out", "x"], "not 'coin'"),
    "no number of strengths": (
        ["adjust", "RUNS/students", "--tau", "1,two", "--out", "x"],
        "--tau '1,two' is not a number",
    ),
    "a strength twice": (["last-layer", "RUNS/students", "--strength", "1,1", "--out", "x"], r"not \[1.0, 1.0\]"),
    "adjusted without end": (
        ["adjust", "RUNS/students", "--tau", "inf", "--out", "x"],
        "τ is a finite number, or several different ones to choose from, not inf",
    ),
    "adjust a base": (["adjust", "RUNS/base", "--out", "x"], "holds a 'train' run"),
    "last layer of a base": (["last-layer", "RUNS/base", "--out", "x"], "holds a 'train' run"),
    "no resamples": (["compare", "RUNS/snl", "--resamples", "0", "--out", "x"], "at least one resample, not 0"),
    "gone networks": (["linearize", "gone", "--out", "x"], "gone has no readable networks/base"),
    "compare a base": (["compare", "RUNS/base", "--out", "x"], "holds a 'train' run"),
    "compare one twice": (
        ["compare", "RUNS/students", "RUNS/students", "--out", "x"],
        "both hold 'erm' with 224 ReLUs",
    ),
    "unknown baseline": (
        ["compare", "RUNS/students", "--baseline", "luck", "--out", "x"],
        "no method 'luck' to compare with; choose one of erm",
    ),
    "ablate nothing": (["ablate", "RUNS/snl", "--vary", "mu=", "--out", "x"], "No value of mu"),
    "ablate an unknown option": (["ablate", "RUNS/snl", "--vary", "speed=1", "--out", "x"], "speed"),
    "missing study": (["study", "run", "gone.yaml", "--out", "x"], "gone.yaml cannot be read"),
    "misspelt field": (["study", "run", "misspelt.yaml", "--out", "x"], "misspelt.yaml: seedz: Extra inputs"),
    "undefined masks": (["study", "run", "undefined.yaml", "--out", "x"], "names masks 'odd', which are not defined"),
    "no YAML": (["study", "run", "table/metadata.csv", "--out", "x"], "table/metadata.csv: the study: Input should"),
    "select": (["finetune", "RUNS/snl", "--select", "luck", "--out", "x"], "selected by"),
    "finetune a base": (["finetune", "RUNS/base", "--out", "x"], "holds a 'train' run"),
    "split": (["audit", "RUNS/base", "--split", "exam", "--out", "x"], "train, val or test"),
    "unknown measure": (["audit", "RUNS/base", "--measures", "luck", "--out", "x"], "no measure 'luck'"),
    "no such option": (
        ["audit", "RUNS/base", "--measures", "curvature", "--option", "curvature.speed=3", "--out", "x"],
        "'curvature' knows no option 'speed'",
    ),
    "option of nothing": (["audit", "RUNS/base", "--option", "samples=3", "--out", "x"], "'samples' does not name a"),
    "option of a measure not taken": (
        ["audit", "RUNS/snl", "--option", "curvature.samples=3", "--out", "x"],
        "for the measure 'curvature', which is not taken",
    ),
    "option that is no number": (
        ["audit", "RUNS/base", "--measures", "curvature", "--option", "curvature.tolerance=low", "--out", "x"],
        "Measure 'curvature': option 'tolerance' is a number, not 'low'",
    ),
    "ten classes": (
        ["audit", "RUNS/base", "--measures", "binary_curvature_bound", "--out", "x"],
        "about binary classifiers, but base has 10 outputs",
    ),
    "one seed": (["theory", "--seeds", "1", "--out", "x"], "needs two of them at least, not 1"),
    "a page in a file": (["report", "RUNS/audit", "--out", "table/metadata.csv/x.html"], "is a file, not a folder"),
    "figures in a file": (["report", "RUNS/audit", "--figures", "table/metadata.csv"], "is a file, not a folder"),
    "report of no audit": (["report", "RUNS/base"], "holds a 'train' run"),
    "unfinished": (["linearize", "unfinished", "--out", "x"], "is not finished"),
    "broken config": (["linearize", "broken", "--out", "x"], "not valid JSON"),
    "broken weights": (["audit", "cut", "--out", "x"], "not a whole safetensors file"),
    "foreign weights": (["audit", "foreign", "--out", "x"], "weights of another architecture"),
    "moved data": (["audit", "moved", "--out", "x"], "not those that the network was trained on"),
    "broken audit": (["report", "halfaudit"], "audit.parquet is missing or broken"),
}


def _ungrouped(folder: Path) -> None:
    """A linearize run on images that are all of one group."""
    from PIL import Image

    images = folder / "one group"
    images.mkdir()
    lines = ["file_name,label,group"]
    for i in range(40):
        Image.new("L", (8, 8), 60 + 100 * (i % 2) + i).save(images / f"{i}.png")
        lines.append(f"{i}.png,{i % 2},all")
    (images / "metadata.csv").write_text("\n".join(lines))
    data = ["--data", "folder", "--root", str(images), "--groups", "group", "--data-option", "image_size=8"]
    ok("train", *data, "--model", "cnn", "--width", "2", "--epochs", "1", "--out", folder / "ungrouped base")
    ok("linearize", folder / "ungrouped base", "--budgets", "0.5", "--max-epochs", "1", "--out", folder / "ungrouped")


@pytest.fixture(scope="session")
def wrecks(runs, tmp_path_factory) -> Path:
    """A working folder with runs that are damaged, each in one way."""
    folder = tmp_path_factory.mktemp("wrecks")
    (folder / "empty").mkdir()
    (folder / "table").mkdir()
    (folder / "table" / "metadata.csv").write_text("file_name,label\na.png,1\nb.png,2\nc.png,1\n")
    (folder / "few.py").write_text(
        "from fairline.models import build\n\n\ndef net(num_classes):\n    return build('cnn', 2, 1, 8, width=2)\n"
    )
    (folder / "broken.py").write_text("def net(:\n")
    for name in ("unfinished", "broken", "cut", "foreign", "moved", "gone"):
        shutil.copytree(runs / "base", folder / name)
    (folder / "unfinished" / "status.json").write_text('{"status": "running"}')
    (folder / "broken" / "config.json").write_text("{")
    shutil.rmtree(folder / "gone" / "networks")
    weights = folder / "cut" / "networks" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    save_tensors(folder / "foreign" / "networks" / "base" / "model.safetensors", {"w": torch.ones(2)})
    config = json.loads((folder / "moved" / "config.json").read_text())
    config["data"]["options"]["seed"] = 5
    (folder / "moved" / "config.json").write_text(json.dumps(config))
    _ungrouped(folder)
    shutil.copytree(runs / "audit", folder / "halfaudit")
    spec = (Path(__file__).parent / "study" / "digits.yaml").read_text()
    (folder / "misspelt.yaml").write_text(spec.replace("seeds:", "seedz:"))
    (folder / "undefined.yaml").write_text(spec.replace("masks: [plain]", "masks: [odd]"))
    table = folder / "halfaudit" / "audit.parquet"
    table.write_bytes(table.read_bytes()[:500])
    return folder


def in_process(monkeypatch, capfd, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line without the cost of a process."""
    monkeypatch.setattr(sys, "argv", ["fairline", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    return subprocess.CompletedProcess(arguments, stopped.value.code or 0, out, err)


def test_bad_input_in_a_process_of_its_own(wrecks):
    arguments, message = BAD["missing folder"]
    assert_sentence(fairline(*arguments, cwd=wrecks), message)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(runs, wrecks, case, monkeypatch, capfd):
    arguments, message = BAD[case]
    arguments = [part.replace("RUNS", str(runs)) for part in arguments]
    monkeypatch.chdir(wrecks)
    monkeypatch.delenv("FAIRLINE_DATA", raising=False)
    assert_sentence(in_process(monkeypatch, capfd, *arguments), message)
    assert (runs / "base" / "networks" / "base" / "model.safetensors").exists()
    shutil.rmtree(wrecks / "x", ignore_errors=True)


def test_every_command_explains_itself():
    text = ok("--help")
    group = typer.main.get_command(app)
    assert {"demo", "data", "train", "linearize", "finetune", "audit", "report"} <= set(group.commands)
    for name, described in group.commands.items():
        assert name in text
        assert described.help
        for parameter in described.params:
            assert parameter.name == "help" or parameter.help, f"{name}: {parameter.name} has no help"
            # Square brackets are markup to the help's renderer, and vanish.
            assert "[" not in (parameter.help or ""), f"{name}: {parameter.name}"
    assert re.fullmatch(r"fairline \d+\.\d+\.\d+\n", ok("--version"))


def test_data_shows_groups_and_what_was_skipped(tmp_path):
    text = ok("data", "digits")
    assert "10 groups" in text
    assert "share_percent" in text


def test_a_network_of_your_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels, hidden=12):\n"
        "    layers = nn.Linear(64 * in_channels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
    )
    own = [*TRAIN[:4], f"{tmp_path}/mine.py:net", "--model-option", "hidden=20", "--epochs", "1"]
    ok(*own, "--out", tmp_path / "base")
    out = ok("linearize", tmp_path / "base", "--budgets", "5", "--max-epochs", "1", "--out", tmp_path / "cut")
    assert "5 of 20 ReLUs" in out


def test_weights_of_your_own_are_taken_as_they_are(runs, tmp_path):
    weights = runs / "base" / "networks" / "base" / "model.safetensors"
    said = ok(*TRAIN[:7], "--epochs", "0", "--weights", weights, "--out", tmp_path / "base")
    assert "taken as they are" in said
    copied = load_tensors(tmp_path / "base" / "networks" / "base" / "model.safetensors")[0]
    assert all(torch.equal(copied[name], tensor) for name, tensor in load_tensors(weights)[0].items())
    ok("linearize", tmp_path / "base", "--budgets", "5", "--max-epochs", "1", "--out", tmp_path / "cut")


def test_options_and_budgets_are_parsed():
    assert parse_options(["a=1", "b=true", "c=0.5", "d=x=y", "e=none"]) == {
        "a": 1,
        "b": True,
        "c": 0.5,
        "d": "x=y",
        "e": None,
    }
    assert parse_budgets("0.5, 10%,12900,") == [0.5, 0.1, 12900]
    for text in ("", "x", "1.5", "-1", "150%"):
        with pytest.raises(FairlineError):
            parse_budgets(text)


def test_measures_named_in_the_help_are_those_that_exist():
    assert tuple(REGISTRY) == AUDIT_MEASURES
    assert set(EXPLAINING_MEASURES) <= set(REGISTRY)
    assert tuple(objectives.REGISTRY) == OBJECTIVES
    assert tuple(linearize.REGISTRY) == LINEARIZERS
    assert jobs_common.STUDENTS == STUDENTS
    assert data.NORMALIZATIONS == NORMALIZATIONS


def test_explain_takes_every_measure_that_suits(explained):
    table = pd.read_parquet(explained / "audit.parquet")
    students = set(table[table["model"] != "base"]["measure"])
    base = set(table[table["model"] == "base"]["measure"])
    assert {"gradient_norm", "hessian_max", "ggn_max", "margin", "boundary_distance", "first_order_distance"} <= base
    assert {"parameter_distance", "excess_loss", "bound", "reference_correction_gain"} <= students - base
    assert {"affine_accuracy", "correction_gain", "units_for_half"} <= base & students
    assert "margin_correlation_samples" in students
    assert not {"z1", "proximity"} & students  # ten classes
    samples = pd.read_parquet(explained / "predictions.parquet")
    columns = {"gradient_norm", "margin", "boundary_distance", "first_order_distance", "affine_prediction"}
    assert columns <= set(samples.columns)


def test_measures_by_name_and_their_options(runs, tmp_path):
    options = ["--measures", "curvature,parameter_distance", "--option", "curvature.samples=30", "--split", "train"]
    ok("audit", runs / "students", *AUDIT, *options, "--out", tmp_path / "some")
    table = pd.read_parquet(tmp_path / "some" / "audit.parquet")
    assert "hessian_se" in set(table["measure"])
    assert set(table[table["measure"] == "parameter_distance"]["model"].str.partition("/")[0]) == {"students"}
    # The report stands on accuracy, asked for or not.
    ok("report", tmp_path / "some")


def test_what_a_run_warns_of_is_shown(runs, run_here, tmp_path):
    barely = ["--epochs", "1", "--batch-size", "64", "--lr", "1e-9", "--objective", "drop"]
    done = run_here("finetune", runs / "snl", *barely, "--out", tmp_path / "students")
    said = [line for line in done.stderr.splitlines() if line.startswith("Warning: GroupDrop: after epoch 1")]
    assert said
    assert said[0].removeprefix("Warning: ") in (tmp_path / "students" / "log.txt").read_text()


def test_theory_draws_the_figures(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(toy, "run", partial(toy.run, steps=100))
    done = in_process(monkeypatch, capfd, "theory", "--seeds", "2", "--out", str(tmp_path / "theory"))
    assert done.returncode == 0, done.stderr
    assert "minority" in done.stdout
    assert "inverse_size" in done.stdout
    for name in ("figure_2", "figure_10", "proposition_4_1"):
        assert (tmp_path / "theory" / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / "theory" / f"{name}.svg").exists()
    assert len(pd.read_parquet(tmp_path / "theory" / "figure_2.parquet")) == 4


def test_demo_from_images_to_report(tmp_path):
    text = ok("demo", "--width", "4", "--epochs", "2", "--finetune-epochs", "1", "--max-epochs", "2", "--out", tmp_path)
    assert "overall" in text
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert "What private inference costs" in (tmp_path / "report.html").read_text(encoding="utf-8")
