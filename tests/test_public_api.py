"""A change of the public face is meant, and is told in the changelog."""

import subprocess
from pathlib import Path

import pytest

import fairline
from tests import public_api

ROOT = Path(__file__).parents[1]
HERE = public_api.FILE.relative_to(ROOT).as_posix()


def git(*words):
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no history here")
    return done.stdout.split()


def test_the_public_face_is_what_it_was():
    told = public_api.FILE.read_text(encoding="utf-8")
    assert public_api.described() == told, "if it is meant: python -m tests.public_api, and a line in CHANGELOG.md"


def test_every_public_name_is_in_the_text():
    names = {line.split("(")[0].split(":")[0] for line in public_api.described().splitlines() if line[0] != " "}
    assert names == set(fairline.__all__)


def test_a_change_of_it_comes_with_a_line_in_the_changelog():
    changed = git("diff", "--name-only", "HEAD", "--", HERE)
    together = git("diff", "--name-only", "HEAD") if changed else []
    if not changed:
        (last,) = git("log", "-1", "--format=%H", "--", HERE) or [""]
        if not last:
            pytest.skip("not committed yet")
        together = git("show", "--name-only", "--format=", last)
    assert "CHANGELOG.md" in together, f"{HERE} has changed and CHANGELOG.md has not"
