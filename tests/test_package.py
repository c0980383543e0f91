"""What importing costs, and what it needs."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import fairline as fl


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_does_not_wait_for_torch():
    assert (
        python("import fairline, sys; print('torch' in sys.modules, 'pandas' in sys.modules)").split() == ["False"] * 2
    )


def test_the_public_names_resolve_and_audit_stays_a_function():
    code = (
        "import fairline as fl, fairline.audit, fairline.audit.accuracy\n"
        "from fairline.audit import AuditReport\n"
        "for name in fl.__all__: getattr(fl, name)\n"
        "assert callable(fl.audit) and fl.AuditReport is AuditReport and callable(fl.data.load)\n"
    )
    python(code)
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = fl.magic


def test_from_arrays_to_audit_numbers_on_a_bare_machine():
    """Only torch, numpy, pandas and safetensors may be there."""
    code = """
import sys
BARRED = {"fairlearn", "datasets", "altair", "vl_convert", "sklearn", "scipy",
    "pyarrow", "typer", "rich", "PIL", "jinja2", "curvlinops", "backpack", "torchvision"}
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in BARRED
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hide, sys.meta_path)
import torch, fairline as fl
from fairline.audit import EXPLAIN
g = torch.Generator().manual_seed(0)
labels = torch.randint(0, 2, (200,), generator=g)
images = (labels[:, None, None, None] * 100 + torch.randint(0, 100, (200, 1, 8, 8), generator=g)).to(torch.uint8)
data = fl.GroupedData(images, labels, labels.clone(), ("a", "b"), ("a", "b"))
train, val, test = data.split(0)
model = fl.models.build("cnn", 2, 1, 8, width=2)
fl.train(model, train, val, epochs=1)
for cut in fl.SNL(lr=0.05, max_epochs=2).linearize(model, train, [0.5]):
    fl.finetune(cut.model, model, train, val, epochs=1)
    report = fl.audit(cut.model, test, model, resamples=10, measures=list(EXPLAIN), options={
        "correlation": {"resamples": 10}, "binary_curvature_bound": {"samples": 2}})
    print(report.by_group["accuracy"].sum())
assert not BARRED & set(sys.modules), BARRED & set(sys.modules)
"""
    assert float(python(code)) > 0


def test_library_code_never_prints():
    source = Path(fl.__file__).parent
    for file in source.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not any(isinstance(node.func, ast.Name) and node.func.id == "print" for node in calls), file


def test_the_version_stands_in_one_place():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/fairline/__init__.py"
    assert yaml.safe_load((root / "CITATION.cff").read_text())["version"] == fl.__version__
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (root / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == fl.__version__


def test_the_lowest_versions_are_those_of_the_package():
    """``make test-lowest`` tries the bounds that users are told; of torch, which it cannot, the pinned version."""
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs", "mpc")]
    lowest = {}
    for requirement in map(Requirement, [*project["dependencies"], *itertools.chain(*extras)]):
        (bound,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
        lowest[requirement.name] = bound
    tried, pinned = (
        {name: Version(version) for name, version in re.findall(r"^([\w-]+)==(.+)$", (root / file).read_text(), re.M)}
        for file in ("constraints-lowest.txt", "constraints.txt")
    )
    assert tried.pop("torch") == pinned["torch"] >= lowest.pop("torch")
    assert tried.pop("torchvision") == pinned["torchvision"]
    assert tried == lowest


def test_a_commit_is_checked_as_make_test_checks():
    root = Path(__file__).parents[1]
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    before = {hook["entry"].replace(" --fix", "") for hook in hooks}
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", (root / "Makefile").read_text(), re.M)[1]
    checks = {
        line.strip().replace("$(BIN)", ".venv/bin").replace("ruff format --check", "ruff format")
        for line in recipe.splitlines()
    }
    (tests,) = (each for each in checks if "pytest" in each)
    assert checks - {tests} <= before


def test_the_image_is_built_of_what_is_there():
    root = Path(__file__).parents[1]
    lines = (root / "Dockerfile").read_text().splitlines()
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    sent = {
        line.removeprefix("!") for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert copied == sent
    assert all((root / word).exists() for word in copied)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    told = re.search(r"^ARG EXTRAS=(\S+)$", "\n".join(lines), re.M)[1].split(",")
    assert set(told) <= set(project["optional-dependencies"])
    (spu,) = map(Requirement, project["optional-dependencies"]["mpc"])
    for version in re.findall(r"^FROM python:(\d+\.\d+)-", "\n".join(lines), re.M):
        assert spu.marker.evaluate({"python_version": version})
