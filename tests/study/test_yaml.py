"""The files of studies are YAML 1.2, of which JSON is a part."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fairline.errors import FairlineError
from fairline.study.spec import _Yaml, load_spec

#: JSON escapes others as pairs of surrogates, which PyYAML does not join.
TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(VALUES)
def test_what_json_writes_is_read_as_it_was(value):
    """PyYAML by itself reads 1e-05 as text."""
    read = yaml.load(json.dumps(value), Loader=_Yaml)
    assert read == value
    assert json.dumps(read) == json.dumps(value)


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "NO", "1:30", "12:30:45", "2026-01-01", "1_000", "e5"])
def test_a_word_is_a_word(word):
    read = yaml.load(f"{{{word}: {word}}}" if ":" not in word else f"{{key: {word}}}", Loader=_Yaml)
    assert set(read.values()) == {word}
    assert set(read) <= {word, "key"}


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("+3", 3), ("010", 10)])
def test_a_number_is_a_number(text, value):
    read = yaml.load(text, Loader=_Yaml)
    assert (read, type(read)) == (value, type(value))


def test_an_option_called_on_needs_no_quotes(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: on\ndata: {d: {name: digits}}\nseeds: [0]\nmodel: {name: cnn}\nmasks: {m: {budgets: [1]}}\n"
        "train: {lr: 5e-2}\nmethods: [{objective: lagrangian, options: {on: val}, masks: [m]}]\n"
    )
    read = load_spec(spec)
    assert (read.name, read.train["lr"], read.methods[0].options) == ("on", 0.05, {"on": "val"})


@pytest.mark.parametrize("text", ["seeds: !!int x", "seeds: !!float x", "a: [", "name: !!python/object:os.system x"])
def test_what_cannot_be_read_is_one_sentence(tmp_path, text):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(FairlineError, match=r"spec\.yaml is not valid YAML"):
        load_spec(tmp_path / "spec.yaml")
