"""The house: the order of the floors (``[tool.importlinter]`` in pyproject.toml), and the length of functions."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
LINT = Path(sys.executable).with_name("lint-imports")

needs_linter = pytest.mark.skipif(not LINT.exists(), reason="import-linter is not installed")

#: The longest that a function may be, in lines with its signature and docstring.
LONGEST = 60

#: Functions that splitting would hide, and why.
LONG = {
    "cli/pipeline.py linearize": "a command that is its options: 54 lines say what they are, 33 call the job",
    "cli/pipeline.py train": "likewise: 39 lines of options, 22 call the job",
}


def lengths(source: str) -> dict[str, int]:
    """Lines of each function, by name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {node.name: node.end_lineno - node.lineno + 1 for node in functions}


def test_long_functions_are_those_that_say_why():
    package = HERE / "src" / "fairline"
    found = {
        f"{file.relative_to(package)} {name}"
        for file in package.rglob("*.py")
        for name, lines in lengths(file.read_text(encoding="utf-8")).items()
        if lines > LONGEST
    }
    assert found == set(LONG)


def test_lines_of_a_function_are_counted_from_its_name_to_its_end():
    assert lengths("@d\ndef f(\n    a,\n):\n    def g():\n        pass\n\n    return g\n") == {"f": 7, "g": 2}


def said_of(folder: Path, lines: dict[str, str]) -> str:
    """What the contracts say once these lines stand at the end of a copy's modules; empty if nothing."""
    shutil.copytree(HERE / "src" / "fairline", folder / "fairline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "pyproject.toml", folder)
    for module, line in lines.items():
        with (folder / "fairline" / module).open("a") as file:
            file.write(line)
    done = subprocess.run(
        [LINT, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout if done.returncode else ""


@needs_linter
def test_the_floors_hold(tmp_path):
    assert not said_of(tmp_path, {})


@needs_linter
def test_an_upward_import_within_a_function_and_a_circle_within_a_room_are_found(tmp_path):
    broken = {
        "masking/layer.py": "\n\ndef upward():\n    import fairline.report.page\n",
        "report/page.py": "\n\ndef around():\n    import fairline.report.html\n",
    }
    said = said_of(tmp_path, broken)
    assert "fairline.masking is not allowed to import fairline.report" in said
    assert "No circles BROKEN" in said
