"""The files of studies are YAML 1.2, of which JSON is a part."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairline.errors import FairlineError
from fairline.study._yaml import read
from fairline.study.spec import load_spec

#: JSON escapes others as pairs of surrogates, which PyYAML does not join.
TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(VALUES)
def test_what_json_writes_is_read_as_it_was(value):
    """PyYAML by itself reads 1e-05 as text."""
    content, _ = read(json.dumps(value))
    assert content == value
    assert json.dumps(content) == json.dumps(value)


@pytest.mark.parametrize("word", ["on", "off", "yes", "NO", "y", "true", "1e", "e5", "word"])
def test_a_key_is_a_word(word):
    assert read(f"{{{word}: 1, other: {{{word}: 2}}}}")[0] == {word: 1, "other": {word: 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, text) for text in ("1:30", "12:30:45", "2026-01-01", "e5", "1e", "1.2.3", "0x", "y", "n")],
        *[("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("1_000.5", 1000.5), (".inf", float("inf"))],
        *[("+3", 3), ("010", 10), ("0x1F", 31), ("0o17", 15), ("0b11", 3), ("1_000", 1000)],
        *[("yes", True), ("on", True), ("no", False), ("Off", False), ("true", True), ("~", None), ("null", None)],
    ],
)
def test_plain_scalars(text, value):
    (content,), _ = read(f"[{text}]")
    assert (content, type(content)) == (value, type(value))


def test_an_option_called_on_needs_no_quotes(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: one\ndata: {d: {name: digits}}\nseeds: [0]\nmodel: {name: cnn}\nmasks: {m: {budgets: [1]}}\n"
        "train: {lr: 5e-2}\nmethods: [{objective: lagrangian, options: {on: val}, masks: [m]}]\n"
    )
    read = load_spec(spec)
    assert (read.name, read.train["lr"], read.methods[0].options) == ("one", 0.05, {"on": "val"})


@pytest.mark.parametrize(
    "text",
    [
        "seeds: !!int x",
        "seeds: !!float x",
        "seeds: !!float ''",
        "seeds: !!bool x",
        "seeds: !!timestamp x",
        "a: [",
        "a: &a [*a]",
        "[" * 5000,
        "name: !!python/object:os.system x",
        "{[1]: 2}",
    ],
    ids=range(10),
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, text):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(FairlineError, match=r"spec\.yaml is not valid YAML"):
        load_spec(tmp_path / "spec.yaml")
