"""What the documents say is true, and every block of code in them runs.

Python runs as it stands, page by page, in one namespace a page; what a page takes for granted is made by ``PREPARED``.
Shell runs in bash, with the programs that it calls replaced by ones that note their arguments, which the command line's
own parser then takes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
import yaml

import fairline as fl
from fairline import linearize
from fairline.cli import app
from fairline.masking import mask_relus, masked_relus
from fairline.objectives import REGISTRY
from fairline.study.spec import load_spec
from tests.conftest import make_data

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, *sorted((ROOT / "papers" / "results").rglob("README.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: str | Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, also those that are indented."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.S | re.M)
    return [re.sub(f"^{indent}", "", code, flags=re.M) for indent, code in found]


#: Blocks of Python, by page and place, that a test of their own runs.
ELSEWHERE = {
    ("README.md", 0): "test_the_api_in_one_screen_runs",
    ("CONTRIBUTING.md", 0): "test_the_objective_in_contributing_works",
    ("docs/linearize.md", 3): "test_the_new_method_in_the_documents_works",
}

#: Programs in blocks of shell that are not run and whose arguments nothing here can check.
NOT_CHECKED = {"git": "fetches the published code from the network"}

#: What a page prints, among other things.
SAYS = {
    "docs/explain.md": ["hessian_max"],
    "docs/mitigate.md": ["relative_drop"],
    "docs/private.md": ["cheetah"],
    "docs/linearize.md": ["criticality", "α = 0.5", "3 layers, "],
    "docs/guide.md": ["accuracy_change"],
    "docs/compile.md": ["dense"],
    "docs/ten_minutes.md": ["134 of 448 ReLUs stay", "hessian_max", "Algorithm 1", "semi2k", "dense"],
}


def _guide() -> dict[str, Any]:
    data = make_data(200, classes=2)
    many = 200
    model = fl.models.build("cnn", num_classes=2, in_channels=1, image_size=8, width=2)
    train, val, _ = data.split(0)
    return {
        "fl": fl,
        **{"images": data.images, "labels": data.labels, "groups": data.groups},
        **{"classes": data.class_names, "names": data.group_names},
        **{
            "ages": [i % 90 for i in range(many)],
            "sexes": ["f", "m"] * (many // 2),
            "files": list(map(str, range(many))),
        },
        **{"teacher": model, "train": train, "val": val},
    }


def _an_audit() -> dict[str, Any]:
    data = make_data(60)
    model = fl.models.build("cnn", num_classes=3, in_channels=1, image_size=8, width=2)
    report = fl.audit(model, data, reference=model, resamples=20)
    Path("runs/audit").mkdir(parents=True)
    report.to_frame().assign(relus=448).to_parquet("runs/audit/audit.parquet")
    return {}


def _a_study() -> dict[str, Any]:
    pytest.importorskip("duckdb")
    Path("runs/studies/race").mkdir(parents=True)
    shutil.copy(ROOT / "papers/results/methods_equal_utkface/results.parquet", "runs/studies/race")
    return {}


def _audits_of_a_study() -> dict[str, Any]:
    for seed in (0, 1):
        for name in re.findall(r'"([\w-]+)"', re.search(r"for name in \((.*?)\)", _compiled())[1]):
            folder = Path(f"runs/study/compiled_utkface_race_slower/race-{seed}/{name}-audit")
            folder.mkdir(parents=True)
            rows = {"measure": ["accuracy"], "group": ["White"], "relus": [123], "value": [0.5]}
            pd.DataFrame(rows).to_parquet(folder / "audit.parquet")
    return {}


def _compiled() -> str:
    return blocks("papers/results/compiled_utkface_race/README.md", "python")[0]


#: What the Python of a page takes for granted: names, and files in the folder that it runs in.
PREPARED: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/guide.md": _guide,
    "docs/howto_researcher.md": _an_audit,
    "docs/studies.md": _a_study,
    "papers/results/compiled_utkface_race/README.md": _audits_of_a_study,
}


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_the_python_of_a_page_runs(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    scope = PREPARED.get(name, dict)() | {"__name__": "__main__"}
    for place, code in enumerate(blocks(name, "python")):
        if (name, place) not in ELSEWHERE:
            exec(compile(code, f"{name}, block {place}", "exec", dont_inherit=True), scope)
    said = capsys.readouterr().out
    for words in SAYS.get(name, []):
        assert words in said


def test_what_is_said_of_blocks_is_said_of_blocks_that_are_there():
    for (name, place), test in ELSEWHERE.items():
        assert len(blocks(name, "python")) > place
        assert test in globals()
    assert {*SAYS, *PREPARED} <= {name for name in NAMES if blocks(name, "python")}
    languages = {word for name in NAMES for word in re.findall(r"^ *```(\S+)", (ROOT / name).read_text("utf-8"), re.M)}
    assert languages == {"python", "sh", "yaml", "math"}  # each is run here, or drawn and checked as the site is built


COMMANDS = typer.main.get_command(app)
PROGRAMS = ("fairline", ".venv/bin/fairline", "python", "pip", "make", "git", "fabric", "torchrun", "srun")


def calls(code: str, folder: Path) -> list[list[str]]:
    """The programs that a block of shell calls, with their arguments, as bash expands them; none of them is run."""
    (folder / "ls").symlink_to(shutil.which("ls"))
    noted = folder / "noted"
    noted.touch()
    notes = "".join(f'{name}() {{ printf "%s\\0" {name} "$@" >>"{noted}"; echo >>"{noted}"; }}\n' for name in PROGRAMS)
    done = subprocess.run(
        [shutil.which("bash"), "-euo", "pipefail", "-c", f"{notes}{code}"],
        cwd=ROOT,
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stderr}\n{code}"
    return [line.split("\0")[:-1] for line in noted.read_text(encoding="utf-8").splitlines()]


def parse(arguments: list[str]) -> None:
    """Take a command of fairline as the command line does, but for running it."""
    command, context = COMMANDS, None
    while hasattr(command, "commands"):
        context = command.make_context("fairline", arguments, parent=context)
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(command.name, arguments, parent=context)


def check(call: list[str]) -> str:
    """Refuse a call that could not work; else the name of its program."""
    program, *arguments = call
    if program in {"fabric", "torchrun", "srun"}:
        return check(call[call.index(".venv/bin/fairline") :])
    if program.endswith("fairline"):
        parse(arguments)
        for study in [each for each in arguments if each.startswith("papers/") and each.endswith(".yaml")]:
            assert (ROOT / study).exists(), study
        return "fairline"
    if program == "make":
        assert subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True).returncode == 0, call
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        (extra,) = re.findall(r"fairline\[(\w+)\]", " ".join(arguments))
        assert extra in project["optional-dependencies"]
    elif program == "python":
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        for option in [each for each in arguments if each.startswith("--")]:
            assert f'"{option}"' in script, call
    else:
        assert program in NOT_CHECKED, call
    return program


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "sh")])
def test_the_shell_of_a_page_runs(name, tmp_path):
    for place, code in enumerate(blocks(name, "sh")):
        folder = tmp_path / str(place)
        folder.mkdir()
        seen = [check(call) for call in calls(code, folder)]
        assert seen


def test_shell_that_is_wrong_is_seen(tmp_path):
    for place, (code, wrong) in enumerate(
        [
            ("fairline finetune runs/snl --epoch 3 --out x", "--epoch"),
            ("fairline train --data digits --epochs many --out x", "valid integer"),
            ("fairline study walk x.yaml", "walk"),
            ("fairline report", "source"),
            ("pip install 'fairline[nothing]'", "nothing"),
            ("make nothing", "nothing"),
            ("python benchmarks/private_cost.py --nothing", "nothing"),
        ]
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        with pytest.raises(Exception, match=re.escape(wrong)):
            check(*calls(code, folder))
    with pytest.raises(AssertionError, match="not found"):
        calls("unheard of", tmp_path)


def test_the_studies_in_the_documents_are_studies(tmp_path):
    """The first block as it stands; the others in its place, where they say something."""
    whole, *parts = blocks("docs/studies.md", "yaml")
    shutil.copytree(ROOT / "papers" / "shared", tmp_path / "shared")
    engineer = blocks("docs/howto_engineer.md", "python")[0]
    (tmp_path / "mine.py").write_text(engineer + blocks("docs/mitigate.md", "python")[-1], encoding="utf-8")
    (tmp_path / "whole.yaml").write_text(whole, encoding="utf-8")
    assert load_spec(tmp_path / "whole.yaml").seeds == [0, 1, 2]
    assert load_spec(tmp_path / "whole.yaml", "tiny").seeds == [0]
    for place, part in enumerate(parts):
        file = tmp_path / f"part{place}.yaml"
        file.write_text(f"extends: whole.yaml\nname: part{place}\n{part}", encoding="utf-8")
        assert len(load_spec(file).methods) == len(yaml.safe_load(part)["methods"])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        left_out = target.endswith(".png") and (ROOT / "PKG-INFO").exists()  # of the source archive
        if not target.startswith("http") and not left_out:
            assert (page.parent / target).exists(), target


def test_the_api_in_one_screen_runs(monkeypatch, tmp_path):
    """README's code as it stands, on synthetic images and with shorter schedules."""
    code = blocks("README.md", "python")[0]
    monkeypatch.chdir(tmp_path)
    data = make_data(150, classes=5, groups=4)
    data = fl.GroupedData(
        data.images.expand(-1, 3, -1, -1).contiguous(), data.labels, data.groups, data.class_names, data.group_names
    )
    monkeypatch.setattr("fairline.data.load", lambda name, root: data)
    for old, new in (
        ("epochs=160", "epochs=1"),
        ("epochs=100", "epochs=1"),
        ("width=64", "width=2, image_size=8"),
        ("fl.SNL(seed=0)", "fl.SNL(seed=0, max_epochs=1)"),
    ):
        assert old in code
        code = code.replace(old, new)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert len(list(tmp_path.glob("audit-*.parquet"))) == 3
    assert scope["report"].by_group["accuracy"].between(0, 1).all()


def test_every_protocol_and_operator_is_documented():
    from fairline.private import OPERATORS, PROTOCOL_COSTS

    text = (ROOT / "docs" / "private.md").read_text(encoding="utf-8")
    for name in PROTOCOL_COSTS:
        assert f"| `{name}` |" in text
    for name in OPERATORS:
        assert f"`{name}`" in text
    assert len(OPERATORS) == 15


def test_every_objective_is_documented():
    text = (ROOT / "docs" / "mitigate.md").read_text(encoding="utf-8")
    for name in REGISTRY:
        assert f"| `{name}` |" in text


def test_the_objective_in_contributing_works(parts, trained):
    scope: dict[str, object] = {}
    exec(blocks("CONTRIBUTING.md", "python")[0], scope)
    objective = scope["WorstSample"]()
    model = fl.mask_relus(trained, parts[0].normalized(slice(2)))
    fl.finetune(model, trained, parts[0], parts[1], epochs=1, objective=objective)
    losses = torch.tensor([1.0, 3.0])
    assert objective.reduce(losses, None) == 3


def test_the_new_method_in_the_documents_works(parts, trained, monkeypatch):
    """Under 40 lines, and all that a method needs: a registry line, exact budgets, what it says that it keeps."""
    (code,) = (code for code in blocks("docs/linearize.md", "python") if "REGISTRY[" in code)
    assert len(code.splitlines()) < 40
    monkeypatch.setattr("fairline.linearize.REGISTRY", dict(linearize.REGISTRY))
    exec(compile(code, "linearize.md", "exec", dont_inherit=True), {"__name__": "sign_balance"})
    cuts = list(linearize.build("sign_balance", samples=10_000).linearize(trained, parts[0], [0.5, 30]))
    assert [cut.relus for cut in cuts] == [224, 30]
    masked = mask_relus(trained, parts[0].normalized(slice(2)))
    signs: dict[str, torch.Tensor] = {}
    for name, layer in masked_relus(masked).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: signs.update({name: x[0] > 0}))
    with torch.no_grad():
        masked.eval()(parts[0].normalized())
    shares = torch.cat([sign.float().mean(0).flatten() for sign in signs.values()])
    kept = torch.cat([layer.kept.flatten() for layer in masked_relus(cuts[1].model).values()])
    balance = shares * (1 - shares)
    assert balance[kept].min() >= balance[~kept].max() - 1e-3


def test_the_architecture_names_files_that_are_there():
    rooms = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Rules of the house")[0]
    there = {file.name for folder in ("src", "benchmarks", "tests", "docs") for file in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py\b", rooms)) <= there
