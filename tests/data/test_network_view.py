"""The order of classes and the scale of pixels of a network that was trained elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairline.data import IMAGENET, load, read_classes
from fairline.data._order import ordered
from fairline.data._scale import scaled
from fairline.errors import FairlineError
from fairline.runs import DataSpec
from tests.conftest import make_data


@given(st.permutations(range(4)), st.booleans())
def test_every_image_keeps_its_names(order, groups_apart):
    data = make_data(60, classes=4, groups=2 if groups_apart else None)
    names = [data.class_names[place] for place in order]
    changed = ordered(data, names)
    assert changed.class_names == tuple(names)
    for before, after in ((data.labels, changed.labels), (data.groups, changed.groups)):
        kind = "group_names" if before is data.groups else "class_names"
        was, now = getattr(data, kind), getattr(changed, kind)
        assert [was[i] for i in before] == [now[i] for i in after]
    assert changed.groups_are_classes == data.groups_are_classes
    assert torch.equal(changed.images, data.images)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["class 0", "class 1", "class 2", "dog"], "has no class 'dog'"),
        (["class 0", "class 2"], "lacks 'class 1'"),
        (["class 0", "class 1", "class 2", "class 0"], "a name twice"),
        ("class 0", "are a list of names"),
    ],
)
def test_an_order_of_other_classes_is_refused_by_name(names, said):
    with pytest.raises(FairlineError, match=said):
        ordered(make_data(), names)


@pytest.mark.parametrize("text", ["b\n  a \n\n10\n", "\ufeffb\r\na\r\n10", '["b", "a", 10]'])
def test_files_of_classes(tmp_path, text):
    (tmp_path / "classes").write_text(text, encoding="utf-8")
    assert read_classes(tmp_path / "classes") == ["b", "a", "10"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "names no class"),
        (b"[]", "names no class"),
        (b"a\nb\na\n", "the class 'a' twice"),
        (b'{"a": 0}', "is not a list of names"),
        (b'["a", ["b"]]', "is not a list of names"),
        (b'["a"', "is neither"),
        (b"\xff\xfe\x00", "is neither"),
    ],
)
def test_bad_files_of_classes_are_one_sentence(tmp_path, content, said):
    (tmp_path / "classes").write_bytes(content)
    with pytest.raises(FairlineError, match=said) as error:
        read_classes(tmp_path / "classes")
    assert str(tmp_path / "classes") in str(error.value)
    with pytest.raises(FairlineError, match="nowhere"):
        read_classes(tmp_path / "nowhere")


def test_the_scale_is_what_the_network_sees():
    data = load("digits", normalization="none")
    assert torch.allclose(data.normalized(slice(3)), data.images[:3] / 255, atol=1e-7)
    given = load("digits", mean="0.5", std=[0.25])
    assert torch.allclose(given.normalized(slice(3)), (given.images[:3] / 255 - 0.5) / 0.25, atol=1e-6)
    three = replace(data, images=data.images.expand(-1, 3, -1, -1), mean=None, std=None)
    assert scaled(three, "imagenet").normalization() == IMAGENET


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalization": "imagenet"}, "3 channels; these images have 1"),
        ({"normalization": "best"}, "one of imagenet, data, none, not 'best'"),
        ({"mean": 0.5}, "belong together"),
        ({"mean": 0.5, "std": 0.2, "normalization": "none"}, "are both given"),
        ({"mean": [0.5, 0.5], "std": 0.2}, "has 2 numbers, but the images have 1"),
        ({"mean": 123.7, "std": 58.4}, "divide by 255"),
        ({"mean": 0.5, "std": 0}, "above 0"),
        ({"mean": "a,b", "std": 0.1}, "is no mean"),
        ({"mean": float("nan"), "std": 0.1}, "is no mean"),
    ],
)
def test_scales_that_are_none(options, said):
    with pytest.raises(FairlineError, match=said):
        load("digits", **options)


def test_a_runs_data_are_loaded_again_with_their_order_and_scale():
    names = [str(digit) for digit in range(9, -1, -1)]
    spec, parts = DataSpec("digits", options={"classes": names, "mean": [0.3], "std": [0.4]}).load()
    assert (spec.mean, spec.std) == ((0.3,), (0.4,))
    again, later = DataSpec.from_json(json.loads(json.dumps(spec.__dict__))).load()
    assert again == replace(spec, options=again.options)
    assert later["val"].normalization() == ((0.3,), (0.4,))
    assert later["val"].class_names == tuple(names)
    assert torch.equal(later["val"].labels, parts["val"].labels)
    # As ever, where nothing is said.
    plain = DataSpec("digits").load()
    assert plain[0].mean == plain[1]["train"].normalization()[0] != (0.3,)
