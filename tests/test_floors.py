"""The order of the floors (``[tool.importlinter]`` in pyproject.toml) is kept, and the contract can fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
LINT = Path(sys.executable).with_name("lint-imports")

pytestmark = pytest.mark.skipif(not LINT.exists(), reason="import-linter is not installed")


def broken_by(folder: Path, module: str, line: str) -> str:
    """What the contracts say once ``line`` stands at the end of a copy's ``module``; empty if nothing."""
    shutil.copytree(HERE / "src" / "fairline", folder / "fairline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "pyproject.toml", folder)
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


def test_the_floors_hold(tmp_path):
    assert not broken_by(tmp_path, "errors.py", "")


def test_an_upward_import_is_found_within_a_function(tmp_path):
    said = broken_by(tmp_path, "masking/layer.py", "\n\ndef upward():\n    import fairline.report.page\n")
    assert "fairline.masking is not allowed to import fairline.report" in said


def test_a_circle_within_a_room_is_found(tmp_path):
    said = broken_by(tmp_path, "report/page.py", "\n\ndef around():\n    import fairline.report.html\n")
    assert "No circles BROKEN" in said
