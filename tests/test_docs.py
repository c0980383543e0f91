"""What the documents say is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fairline as fl
from fairline import linearize
from fairline.cli import app
from fairline.masking import mask_relus, masked_relus
from fairline.objectives import REGISTRY
from tests.conftest import make_data

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        left_out = target.endswith(".png") and (ROOT / "PKG-INFO").exists()  # of the source archive
        if not target.startswith("http") and not left_out:
            assert (page.parent / target).exists(), target


def test_commands_and_options_in_the_documents_exist():
    import typer

    group = typer.main.get_command(app)
    seen = 0
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                match = re.match(r"\s*(?:\.venv/bin/)?fairline ([\w-]+)(?: ([\w-]+)(?= ))?(.*)", line.partition("#")[0])
                if match:
                    described = group.commands[match[1]]
                    if hasattr(described, "commands"):
                        described = described.commands[match[2]]
                    known = {option for parameter in described.params for option in parameter.opts}
                    known |= {option for parameter in described.params for option in parameter.secondary_opts}
                    assert set(re.findall(r"--[a-z-]+", match[3])) <= known, line
                    seen += 1
    assert seen >= 10


def test_the_api_in_one_screen_runs(monkeypatch, tmp_path):
    """README's code as it stands, on synthetic images and with shorter schedules."""
    code = blocks(ROOT / "README.md", "python")[0]
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


def test_the_code_about_explaining_runs(capsys):
    exec(compile(blocks(ROOT / "docs" / "explain.md", "python")[0], "explain.md", "exec"), {})
    assert "hessian_max" in capsys.readouterr().out


def test_the_code_about_repairing_runs(capsys):
    exec(compile(blocks(ROOT / "docs" / "mitigate.md", "python")[0], "mitigate.md", "exec"), {})
    assert "relative_drop" in capsys.readouterr().out


def test_the_code_about_private_inference_runs(capsys):
    exec(compile(blocks(ROOT / "docs" / "private.md", "python")[0], "private.md", "exec"), {})
    assert "cheetah" in capsys.readouterr().out


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
    exec(blocks(ROOT / "CONTRIBUTING.md", "python")[0], scope)
    objective = scope["WorstSample"]()
    model = fl.mask_relus(trained, parts[0].normalized(slice(2)))
    fl.finetune(model, trained, parts[0], parts[1], epochs=1, objective=objective)
    losses = torch.tensor([1.0, 3.0])
    assert objective.reduce(losses, None) == 3


def test_the_code_about_deepreduce_runs(capsys):
    code = blocks(ROOT / "docs" / "linearize.md", "python")[0]
    exec(compile(code, "linearize.md", "exec"), {})
    said = capsys.readouterr().out
    assert "criticality" in said
    assert "α = 0.5" in said


def test_the_code_about_cryptonas_runs(capsys):
    (code,) = (code for code in blocks(ROOT / "docs" / "linearize.md", "python") if "CryptoNAS" in code)
    exec(compile(code, "linearize.md", "exec"), {})
    assert "3 layers, " in capsys.readouterr().out


def test_the_new_method_in_the_documents_works(parts, trained, monkeypatch):
    """Under 40 lines, and all that a method needs: a registry line, exact budgets, what it says that it keeps."""
    (code,) = (code for code in blocks(ROOT / "docs" / "linearize.md", "python") if "REGISTRY[" in code)
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
    there = {file.name for folder in ("src", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py\b", rooms)) <= there
