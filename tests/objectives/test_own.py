"""Objectives of the user's own: trained under like any other, or refused in one sentence before anything is trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from fairline import objectives
from fairline._own import files as code_of
from fairline._own import is_own
from fairline.errors import FairlineError
from fairline.study.cells import cells_of
from fairline.study.run import run_study
from fairline.study.spec import StudySpec, load_spec
from tests.commands import FINETUNE, LINEARIZE, TRAIN, fairline, ok
from tests.conftest import make_data

SPEC = Path(__file__).parents[1] / "study" / "digits.yaml"

#: One with a state, a pass over all data after each epoch, an option, and a helper beside it.
WHOLE = """
import torch
from fairline.objectives import Objective
from tail import worst

class Tail(Objective):
    def __init__(self, share=0.5, **options):
        super().__init__(**options)
        self.share = share

    def start(self, train_data):
        self.seen = torch.zeros(train_data.num_groups)

    def reduce(self, losses, batch):
        return losses.mean() + worst(losses, self.share)

    def end_epoch(self, group_losses, overall):
        self.seen = self.seen + group_losses.float().cpu()

    def metrics(self):
        return {"seen": float(self.seen.sum())}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""
HELPER = "def worst(losses, share):\n    return losses.topk(max(1, int(share * len(losses)))).values.mean()\n"

#: The body of a class that extends the interface, and what is said of it.
BROKEN = {
    "a number": (
        "def reduce(self, losses, batch):\n        return 1.0",
        "'reduce' returns a float, not one finite number",
    ),
    "no gradient": ("def reduce(self, losses, batch):\n        return losses.mean().detach()", "has no gradient"),
    "not of the logits": (
        "def reduce(self, losses, batch):\n        import torch\n        return torch.ones((), requires_grad=True) * 2",
        "does not depend on the logits",
    ),
    "a vector": (
        "def reduce(self, losses, batch):\n        return losses",
        r"'reduce' returns a tensor of shape \(2,\)",
    ),
    "not finite": (
        "def reduce(self, losses, batch):\n        return losses.sum() / 0",
        "returns a value that is not finite",
    ),
    "losses summed": (
        "def losses(self, logits, teacher_logits, batch):\n        return logits.sum()",
        r"'losses' returns a tensor of shape \(\), not the finite loss of each image",
    ),
    "cannot see a teacher": (
        "def see_teacher(self, logits, data, held_out):\n        raise ValueError('no')",
        "'see_teacher' fails on two images",
    ),
    "raises": (
        "def reduce(self, losses, batch):\n        return losses / self.nothing",
        r"'reduce' fails on two images: AttributeError: .*\(mine.py, line 5\)",
    ),
    "other arguments": (
        "def reduce(self, losses):\n        return losses.mean()",
        "'reduce' takes other arguments than the 2",
    ),
    "no teacher": (
        "def losses(self, logits, teacher_logits, batch):\n        return (logits - teacher_logits).sum(1)",
        "'losses' fails on two images: TypeError",
    ),
    "looks at images": (
        "def losses(self, logits, teacher_logits, batch):\n"
        "        return (logits + batch.images.mean((1, 2, 3))[:, None]).sum(1)"
        "\n    def end_epoch(self, group_losses, overall):\n        pass",
        "'losses' fails on two images",
    ),
    "held out": (
        "def held_out(self, logits, teacher_logits, batch):\n        1 / 0",
        "'held_out' fails on an image of each group: ZeroDivisionError",
    ),
    "held out, other arguments": (
        "def held_out(self, logits):\n        pass",
        "'held_out' takes other arguments than the 3",
    ),
    "state": ("def state_dict(self):\n        return {'f': print}", "cannot be kept in a checkpoint: TypeError"),
    "metrics": ("def metrics(self):\n        return None", "'metrics' returns a NoneType, not numbers by name"),
    "no super": ("def __init__(self):\n        pass", r"has no 'subset'; .*call super\(\).__init__\(\)"),
    "constructor": ("def __init__(self):\n        1 / 0", r"cannot be built: ZeroDivisionError: .*\(mine.py, line 5\)"),
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What the files bring into Python is forgotten again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in (set(sys.modules) - before) & {"mine", "tail"}:
        del sys.modules[name]


@pytest.fixture
def mine(tmp_path) -> Path:
    (tmp_path / "tail.py").write_text(HELPER)
    (tmp_path / "mine.py").write_text(WHOLE)
    return tmp_path / "mine.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder of a train and a linearize run."""
    folder = tmp_path_factory.mktemp("made")
    ok(*TRAIN, "--out", folder / "base")
    ok("linearize", folder / "base", *LINEARIZE, "--out", folder / "cuts")
    return folder


def refused(file: Path, name: str = "Mine", **options) -> str:
    with pytest.raises(FairlineError) as error:
        objectives.try_on(f"{file}:{name}", options, lambda: make_data(30, groups=2))
    said = str(error.value)
    assert len(said.splitlines()) == 1
    assert "mine.py" in said
    assert name in said
    return said


def test_a_whole_one_passes_the_trial_and_leaves_random_numbers_alone(mine):
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    objectives.try_on(f"{mine}:Tail", {"share": 0.25}, lambda: make_data(30, groups=2))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", objectives.REGISTRY)
def test_every_objective_of_the_registry_passes_the_trial(tmp_path, name):
    kind = objectives.REGISTRY[name]
    (tmp_path / "mine.py").write_text(f"from {kind.__module__} import {kind.__name__} as Mine\n")
    objectives.try_on(f"{tmp_path / 'mine.py'}:Mine", {}, lambda: make_data(60, groups=2))


@pytest.mark.parametrize("case", BROKEN)
def test_one_that_is_not_whole_is_refused_in_a_sentence(tmp_path, case):
    import re

    body, said = BROKEN[case]
    file = tmp_path / "mine.py"
    file.write_text(f"from fairline.objectives import Objective\n\nclass Mine(Objective):\n    {body}\n")
    assert re.search(said, refused(file))


@pytest.mark.parametrize("part", ["start", "losses", "reduce", "end_epoch", "metrics", "state_dict", "load_state_dict"])
def test_a_class_of_its_own_must_have_every_part(tmp_path, part):
    file = tmp_path / "mine.py"
    file.write_text(
        "from fairline.objectives import Objective\n\n"
        "class Mine:\n    subset = None\n    needs_group_losses = False\n"
        f"for name in ('start', 'losses', 'reduce', 'end_epoch', 'metrics', 'state_dict', 'load_state_dict'):\n"
        f"    if name != '{part}':\n        setattr(Mine, name, getattr(Objective, name))\n"
    )
    assert f"has no method '{part}'" in refused(file)


def test_a_class_of_its_own_from_before_the_validation_part_was_shown_still_trains(tmp_path, parts, trained):
    from fairline.training import finetune

    file = tmp_path / "mine.py"
    file.write_text(
        "from fairline.objectives import Objective\n\n"
        "class Mine:\n    subset = None\n    needs_group_losses = True\n    cross_entropy = Objective.cross_entropy\n"
        "    def losses(self, logits, teacher_logits, batch):\n        return self.cross_entropy(logits, batch)\n"
        "for name in ('start', 'reduce', 'end_epoch', 'metrics', 'state_dict', 'load_state_dict'):\n"
        "    setattr(Mine, name, getattr(Objective, name))\n"
    )
    name = f"{file}:Mine"
    objectives.try_on(name, {}, lambda: make_data(60, groups=2))
    history = []
    finetune(trained, None, parts[0], parts[1], epochs=1, objective=objectives.build(name), history=history)
    assert history[0]["val_loss"] > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("Nobody", "has no class 'Nobody'"), ("function", "has no class 'function'"), ("Tail", "unexpected keyword")],
)
def test_what_is_not_there_is_said(mine, name, said):
    mine.write_text(WHOLE + "\ndef function():\n    pass\n")
    assert said in refused(mine, name, shrae=1)


def test_the_code_is_that_of_the_file_and_of_what_it_imports_beside_it(mine):
    name = f"{mine}:Tail"
    before = code_of(name)
    assert list(before) == ["mine.py", "tail.py"]
    (mine.parent / "other.py").write_text("x = 1\n")
    assert code_of(name) == before
    (mine.parent / "tail.py").write_text(HELPER + "\n")
    changed = code_of(name)
    assert changed != before
    mine.write_text(WHOLE + "\n")
    assert code_of(name) not in (before, changed)
    assert code_of("erm") == {}
    assert not is_own("erm")
    with pytest.raises(FairlineError, match=r"gone\.py cannot be read"):
        code_of("gone.py:X")


def test_commands_train_under_it_and_refuse_it_once_changed(made, mine, tmp_path):
    own = ["--objective", f"{mine}:Tail", "--objective-option", "share=0.25"]
    ok("linearize", made / "base", *LINEARIZE, *own, "--out", tmp_path / "fair")
    ok("finetune", tmp_path / "fair", *FINETUNE, *own, "--out", tmp_path / "students")
    config = json.loads((tmp_path / "students" / "config.json").read_text())
    assert config["objective"] == "mine.py:Tail"
    assert config["objective_options"] == {"share": 0.25}
    assert set(config["code"]) == {"mine.py", "tail.py"}
    assert (pd.read_parquet(tmp_path / "students" / "metrics.parquet")["seen"] > 0).all()
    # From another place the same code is the same run; with another line it is not.
    moved = shutil.copytree(mine.parent, tmp_path / "moved", ignore=shutil.ignore_patterns("[!mt]*"))
    again = ["--objective", "mine.py:Tail", "--objective-option", "share=0.25"]
    ok("finetune", tmp_path / "fair", *FINETUNE, *again, "--out", tmp_path / "students", cwd=moved)
    (moved / "mine.py").write_text(WHOLE.replace("losses.mean()", "losses.sum()"))
    done = fairline("finetune", tmp_path / "fair", *FINETUNE, *again, "--out", tmp_path / "students", cwd=moved)
    assert done.returncode == 2
    assert "mine.py has changed since" in done.stderr
    (moved / "mine.py").write_text(WHOLE.replace("return losses.mean()", "return 3 #"))
    done = fairline("finetune", tmp_path / "fair", *FINETUNE, *again, "--out", tmp_path / "new", cwd=moved)
    assert done.returncode == 2
    assert "Objective 'mine.py:Tail'" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_several_processes_train_under_it(made, mine, tmp_path):
    pytest.importorskip("lightning_fabric")
    own = ["--objective", f"{mine}:Tail", "--objective-option", "share=0.25", "--device", "cpu"]
    ok("finetune", made / "cuts", *FINETUNE, *own, "--out", tmp_path / "one")
    ok("finetune", made / "cuts", *FINETUNE, *own, "--devices", "2", "--out", tmp_path / "two")
    one, two = (pd.read_parquet(tmp_path / name / "metrics.parquet") for name in ("one", "two"))
    assert two["loss"].to_numpy() == pytest.approx(one["loss"].to_numpy(), rel=1e-3)


def own_study(folder: Path, **more: str) -> Path:
    """The small study of digits, with an objective of the user's own beside the plain one, and no scale."""
    text = SPEC.read_text().replace("scale: a test\n", "").replace("seeds: [0, 1]", "seeds: [0]")
    own = f"  - {{objective: {more.get('name', 'mine.py:Tail')}, options: {{share: 0.25}}, masks: [plain]}}\n"
    file = folder / "own.yaml"
    file.write_text(text.replace("digits_tiny", "own") + own)
    return file


def test_a_study_runs_it_knows_it_by_its_code_and_is_read_without_it(mine, tmp_path, monkeypatch):
    spec = own_study(mine.parent)
    ok("study", "run", spec, "--out", tmp_path / "store", "--jobs", "2", cwd=Path("/"))
    table = pd.read_parquet(tmp_path / "store" / "own" / "results.parquet")
    assert set(table["finetune"]) == {"", "erm", "lagrangian", "Tail"}
    assert set(table["objective"]) == {"", "erm", "lagrangian", "mine.py:Tail"}
    assert set(table["scale"]) == {"cnn (width 4), 3 training epochs, 2 finetuning epochs, 1 seed."}
    assert (tmp_path / "store" / "own" / "digits-0" / "plain-Tail" / "config.json").exists()
    mine.write_text(WHOLE + "\n")
    done = fairline("study", "run", spec, "--out", tmp_path / "store")
    assert done.returncode == 2
    assert "holds study 'own' before it was changed (mine.py has changed since)" in done.stderr
    mine.unlink()
    said = ok("study", "status", tmp_path / "store")
    assert "own: 10 of 10 cells are finished" in said


def test_a_study_refuses_what_is_not_whole_before_anything_runs(mine, tmp_path):
    mine.write_text(WHOLE.replace("return losses.mean()", "return 3 #"))
    spec = load_spec(own_study(mine.parent))
    with pytest.raises(
        FairlineError, match=r"Study 'own', methods.2: Objective '.*mine.py:Tail': 'reduce' returns a int"
    ):
        run_study(spec, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(FairlineError, match=r"nowhere\.py cannot be read"):
        load_spec(own_study(mine.parent, name="nowhere.py:Tail"))


def test_code_that_changes_while_a_study_runs_stops_its_cell(mine):
    spec = load_spec(own_study(mine.parent))
    (cell,) = (cell for cell in cells_of(spec) if cell.kind == "finetune" and cell.about["finetune"] == "Tail")
    from fairline.study.cells import compute

    mine.write_text(WHOLE + "\n")
    with pytest.raises(FairlineError, match=r"mine.py has changed since the study began"):
        compute(cell, mine.parent / "never", [mine.parent])


def test_studies_without_code_are_written_as_ever():
    spec = load_spec(SPEC)
    assert "code" not in spec.model_dump(mode="json")
    assert "folder" not in spec.model_dump(mode="json")
    assert StudySpec.model_validate(spec.model_dump(mode="json")).digest == spec.digest


@pytest.mark.parametrize("name", ["code", "folder"])
def test_what_is_noted_cannot_be_said(tmp_path, name):
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC.read_text() + f"{name}: {{}}\n")
    with pytest.raises(FairlineError, match=rf"spec.yaml: {name}: Extra inputs are not permitted \(line 16\)"):
        load_spec(file)
