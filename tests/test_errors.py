"""Error sentences have one style: one sentence, from a capital or a name to a full stop."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "fairline"

#: Exceptions whose text the command line prints as it is.
TOLD = {"FairlineError", "RankLost"}

#: What stands for a value that is put in.
VALUE = "\0"

#: A sentence starts with a capital, or with what is called so: a quoted or inserted name, an option, a Greek letter.
START = re.compile(rf"[A-Z'“\[{VALUE}]|--[a-z{VALUE}]|[α-ω] ")
#: It ends with a full stop; or behind a colon with another sentence, which ends so itself.
END = re.compile(rf"[^.]\.$|: {VALUE}$|…\.$")
#: What has no place in it.
FORBIDDEN = {
    "a new line": r"\n",
    "an exclamation mark": r"!",
    "two spaces": r"  ",
    "a space before its stop": r" \.$",
    "a second sentence": rf"[^.]\. [A-Z{VALUE}]",
    "a backtick": r"`",
    "a contraction": r"n't\b",
    "politeness": r"(?i)\b(please|sorry|unfortunately|oops)\b",
    "a word that says no more than 'wrong'": r"(?i)\b(invalid|illegal|error:)",
    "a name of the exception": r"(?i)\b(exception|traceback)\b",
}


def texts(node: ast.expr, returned: dict[str, list[ast.expr]]) -> list[str] | None:
    """What a message may be, with values put in; None where it comes from elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)]
    if isinstance(node, ast.IfExp):
        both = texts(node.body, returned), texts(node.orelse, returned)
        return [text for branch in both for text in branch or [VALUE]]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (texts(side, returned) or [VALUE] for side in (node.left, node.right))
        return ["".join(pair) for pair in itertools.product(left, right)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in returned:
        found = [texts(value, returned) for value in returned[node.func.id]]
        return [text for each in found for text in each or [VALUE]]
    return None


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every message that is raised, but for those that come from elsewhere as a whole."""
    tree = ast.parse(source)
    returned = {
        function.name: [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value]
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).rpartition(".")[2] in TOLD:
            for text in texts(node.args[0], returned) or []:
                yield node.lineno, text


def faults(text: str) -> list[str]:
    """What is wrong with a sentence."""
    found = [what for what, pattern in FORBIDDEN.items() if re.search(pattern, text)]
    found += [] if START.match(text) else ["a start that is no capital and no name"]
    return found + ([] if END.search(text) else ["an end without a full stop"])


def test_error_sentences_have_one_style():
    broken, seen = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for line, text in sentences(file.read_text(encoding="utf-8")):
            seen += 1
            where = f"{file.relative_to(PACKAGE)}:{line}"
            broken += [f"{where} has {fault}: {text.replace(VALUE, '…')}" for fault in faults(text)]
    assert not broken, "\n".join(broken)
    assert seen > 500


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ('"The folder is empty."', []),
        ('f"{path} is empty."', []),
        ("f\"'{name}' is none of them.\"", []),
        ('f"--{option} needs a value."', []),
        ("f\"Study '{name}': {error}\"", []),
        ('"τ must be finite."', []),
        ('"the folder is empty."', ["a start that is no capital and no name"]),
        ('"Folder is empty"', ["an end without a full stop"]),
        ('"Folder is empty.."', ["an end without a full stop"]),
        ('f"It is {what}"', ["an end without a full stop"]),
        ('"It is empty. Fill it."', ["a second sentence"]),
        ('"Please fill it."', ["politeness"]),
        ('"It is empty!"', ["an exclamation mark", "an end without a full stop"]),
        ('"It is\\nempty."', ["a new line"]),
        ('"It is " + ("empty." if a else "full")', ["an end without a full stop"]),
        ("made(x)", ["a contraction"]),
    ],
)
def test_what_breaks_the_style_is_found(raised, expected):
    source = f'def made(x):\n    return f"{{x}} isn\'t it."\n\n\ndef f():\n    raise FairlineError({raised})\n'
    assert [fault for _, text in sentences(source) for fault in faults(text)] == expected
