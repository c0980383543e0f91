"""Groups of columns, bins and intersections; images kept together; what is known of each image."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fairline as fl
from fairline.data import GroupedData, load
from fairline.data._groups import MOST, cells_of, parse_groups
from fairline.data._metadata import METADATA
from fairline.data._split import tells_whose, tied
from fairline.data.grouped import _told, content_digest, regrouped
from fairline.errors import FairlineError
from tests.data.test_folder import write


def data_of(table: dict, labels=None, groups=None, **options) -> GroupedData:
    """Images that all differ, with a table."""
    n = len(next(iter(table.values())))
    images = torch.arange(n).view(n, 1, 1, 1).repeat(1, 4, 1, 1)
    images = (images // torch.tensor([1, 256, 65536, 1]).view(1, 4, 1, 1) % 256).to(torch.uint8)
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else torch.tensor(labels)
    groups = torch.zeros(n, dtype=torch.int64) if groups is None else torch.tensor(groups)
    names = [
        tuple(f"{what} {i}" for i in range(int(index.max()) + 1)) for what, index in (("c", labels), ("g", groups))
    ]
    return GroupedData(images, labels, groups, *names, metadata=table, **options)


COLUMNS = ("race", "sex", "age", "a,b", "x:1", "2020")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("race", {"race": []}),
        (" race , sex ", {"race": [], "sex": []}),
        ("age:0-17,18-64,65+", {"age": ["0–17", "18–64", "65+"]}),
        ("sex,age:0-17,18-64,65+", {"sex": [], "age": ["0–17", "18–64", "65+"]}),
        ("age:65+,18–64,<18,race", {"age": ["<18", "18–64", "65+"], "race": []}),
        ("age:0-0.5,0.5-1", {"age": ["0–0.5", "0.5–1"]}),
        ("age:-5--1,0,1+", {"age": ["-5–-1", "0", "1+"]}),
        ("a,b", {"a,b": []}),
        (["a,b", "x:1", "age:<1,1+"], {"a,b": [], "x:1": [], "age": ["<1", "1+"]}),
        ("x:1:0-9", {"x:1": ["0–9"]}),
        ("2020,age:0+", {"2020": [], "age": ["0+"]}),
        (["age:0-5", "2020"], {"age": ["0–5"], "2020": []}),
    ],
)
def test_groups_are_read(groups, expected):
    assert {part.name: [own.name for own in part.bins] for part in parse_groups(groups, COLUMNS, "x")} == expected


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("hair", "x has no column 'hair' to make groups of; it has race, sex, age"),
        ("race,,sex", "no column ''"),
        ("race,race", "name the column 'race' twice"),
        ("age:", "bins of 'age' are 0-17, 65\\+, <18 or one number, not ''"),
        ("age:young", "not 'young'"),
        ("age:9-3", "'9-3' ends before it begins"),
        ("age:0-17,17-20", "overlap: '0–17' and '17–20'"),
        ("age:0+,3-5", "overlap"),
        ("age:0-0.5,0.4-1", "overlap"),
        ([], "nothing was named"),
    ],
)
def test_groups_that_are_none_are_one_sentence(groups, message):
    with pytest.raises(FairlineError, match=message):
        parse_groups(groups, COLUMNS, "x")


@settings(max_examples=100)
@given(
    ends=st.lists(st.integers(-20, 100), min_size=1, max_size=6, unique=True),
    ages=st.lists(st.one_of(st.none(), st.integers(-40, 120), st.floats(-40, 120, width=16)), min_size=1, max_size=40),
    texts=st.booleans(),
)
def test_a_number_is_in_the_bin_that_holds_it(ends, ages, texts):
    ends = sorted(ends)
    bins = [f"<{ends[0]}", *(f"{a}-{b - 1}" for a, b in pairwise(ends)), f"{ends[-1]}+"]
    values = [None if age is None else str(age) if texts else age for age in ages]
    cells = cells_of(pd.DataFrame({"age": pd.Series(values, dtype=object)}), f"age:{','.join(bins)}", "x")
    for age, name in zip(ages, cells.texts(), strict=True):
        expected = (
            "no age" if age is None else bins[sum(age >= end for end in ends)].replace("-", "–").replace("––", "–-")
        )
        assert name.replace("–", "-") == expected.replace("–", "-")
    assert set(cells.texts()) == set(cells.names)


def test_a_number_outside_of_all_bins_is_one_sentence():
    table = pd.DataFrame({"age": [3, 17.5, 18, 99]})
    assert cells_of(table[:2], "age:0-17", "x").texts() == ["0–17", "0–17"]
    with pytest.raises(FairlineError, match=r"column 'age' lies outside of all bins \(0–17\) for 2 images, first 18"):
        cells_of(table, "age:0-17", "x")
    with pytest.raises(FairlineError, match="'old' somewhere, which is no number"):
        cells_of(pd.DataFrame({"age": ["3", "old"]}), "age:0+", "x")
    edge = cells_of(pd.DataFrame({"p": [0.0, 0.5, 1.0]}), "p:0-0.5,0.5-1", "x")
    assert edge.texts() == ["0–0.5", "0.5–1", "0.5–1"]


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(*[st.sampled_from(["b", "a", "10", "9", None])] * 3), min_size=1, max_size=60))
def test_an_intersection_holds_what_all_its_columns_hold(rows):
    table = pd.DataFrame(rows, columns=["x", "y", "z"])
    cells = cells_of(table, "x,y,z", "data")
    order = ["9", "10", "a", "b"]
    named = [" × ".join(f"no {c}" if v is None else v for c, v in zip("xyz", row, strict=True)) for row in rows]
    assert cells.texts() == named
    levels = [[*order, f"no {column}"] for column in "xyz"]
    assert list(cells.names) == [" × ".join(names) for names in product(*levels) if " × ".join(names) in set(named)]
    some = cells_of(table, "x,y,z", "data", name_missing=False)
    assert some.texts() == [None if None in row else name for row, name in zip(rows, named, strict=True)]
    assert set(some.names) == {name for row, name in zip(rows, named, strict=True) if None not in row}


def test_more_groups_than_can_be_told_apart_are_one_sentence():
    table = pd.DataFrame({"a": np.arange(MOST + 1), "b": np.arange(MOST + 1) % 11, "c": np.arange(MOST + 1) % 10})
    assert len(cells_of(table[:MOST], "a", "x").names) == MOST
    with pytest.raises(FairlineError, match=r"a makes 101 groups, more than 100; .*a:0-17,18\+"):
        cells_of(table, "a", "x")
    with pytest.raises(FairlineError, match="b × c makes 101 groups"):
        cells_of(table, "b,c", "x")


def test_regrouping_keeps_images_and_split_and_names_the_same_groups_in_all_parts():
    table = {"file": [f"{i}.png" for i in range(60)], "sex": ["f", "m"] * 30, "age": list(range(60))}
    data = data_of(table, labels=[i % 3 for i in range(60)], groups=[i % 2 for i in range(60)])
    parts = dict(zip("abc", data.split(3), strict=True))
    other = regrouped(parts, ["sex", "age:0-57,58+"])
    for name, part in parts.items():
        assert torch.equal(part.images, other[name].images)
        assert other[name].group_names == ("f × 0–57", "f × 58+", "m × 0–57", "m × 58+")
        by = [f"{sex} × {'58+' if age > 57 else '0–57'}" for sex, age in part.metadata[["sex", "age"]].to_numpy()]
        assert [other[name].group_names[g] for g in other[name].groups] == by
        assert other[name].without_empty_groups().counts()["n"].min() > 0
    assert data.regroup("label").group_names == data.class_names
    assert data.regroup("label,sex").num_groups == 6
    # Rows follow their images wherever these go.
    order = torch.randperm(60)[:20]
    chosen = data.select(order)
    assert chosen.metadata["file"].tolist() == [f"{i}.png" for i in order.tolist()]
    assert data.select(data.groups == 1).unbalance({"c 0": 0.0}).metadata["age"].mod(3).min() == 1


def test_groups_and_metadata_change_no_digest():
    data = data_of({"sex": ["f", "m"] * 10}, labels=[0, 1] * 10)
    assert content_digest(data) == content_digest(replace(data, metadata=pd.DataFrame()))
    assert replace(data, metadata=pd.DataFrame()).metadata["row"].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": [1, 2]}, "metadata have 2 rows, but there are 3 images"),
        ({"a": [1, 2, 3], "b": [1]}, "the metadata are no table"),
        (pd.DataFrame([[1, 2]] * 3, columns=["a", "a"]), "column 'a' twice"),
    ],
)
def test_metadata_that_do_not_fit_are_one_sentence(table, message):
    images, index = torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(FairlineError, match=message):
        GroupedData(images, index, index, ("a",), ("a",), metadata=table)


def test_packed_data_keep_what_is_known_of_each_image(tmp_path):
    data = data_of({"who": ["ann", None, "bob"], "age": [3, 40, 70]}, labels=[0, 1, 0], bins={"age": "0-17,18+"})
    plain = replace(data, metadata=pd.DataFrame(), bins={})
    plain.pack(tmp_path / "old")
    assert load("packed", tmp_path / "old").metadata["row"].tolist() == [0, 1, 2]
    for folder in (tmp_path / "old", tmp_path / "new", tmp_path / "new"):
        packed = data.pack(folder)
        pd.testing.assert_frame_equal(packed.metadata, data.metadata)
    assert load("packed", tmp_path / "new", groups="age").group_names == ("0–17", "18+")
    assert packed.select(torch.tensor([2, 0])).metadata["who"].tolist() == ["bob", "ann"]
    with pytest.raises(FairlineError, match="holds these images with other metadata"):
        replace(data, metadata=data.metadata.assign(age=[1, 2, 3])).pack(tmp_path / "new")
    file = tmp_path / "new" / METADATA
    content = bytearray(file.read_bytes())
    content[content.index(b"ann")] ^= 1
    file.write_bytes(content)
    with pytest.raises(FairlineError, match="is damaged"):
        load("packed", tmp_path / "new")


def test_a_data_set_of_torch_may_come_with_a_table(tmp_path):
    items = [(torch.full((1, 2, 2), i, dtype=torch.uint8), i % 2) for i in range(4)]
    options = {"metadata": {"site": ["a", "b", "a", "c"]}}
    for more in ({}, {"pack": tmp_path / "p"}, {"pack": tmp_path / "p"}):
        data = GroupedData.from_dataset(items, **options, **more)
        assert data.regroup("site").group_names == ("a", "b", "c")
    with pytest.raises(FairlineError, match="3 rows, but there are 4"):
        GroupedData.from_dataset(items, metadata={"site": ["a", "b", "c"]})


@settings(max_examples=80)
@given(content=st.lists(st.integers(0, 6), min_size=1, max_size=30), seed=st.integers(0, 2**16))
def test_images_are_tied_through_values_and_through_equal_images(content, seed):
    values = np.random.default_rng(seed).choice(np.array([None, "a", "b", "c", "d"], object), len(content))
    found = tied(np.array(content), pd.Series(values), "x")
    # Slowly: flood from each image over all that it shares something with.
    n = len(content)
    near = [
        {j for j in range(n) if content[i] == content[j] or (values[i] is not None and values[i] == values[j])}
        for i in range(n)
    ]
    for i in range(n):
        reached, before = {i}, set()
        while reached != before:
            before = set(reached)
            reached = reached.union(*(near[j] for j in reached))
        assert {j for j in range(n) if found[j] == found[i]} == reached


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=30, max_size=120),
    groups=st.integers(1, 3),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_value_is_in_one_part_and_shares_are_near_those_asked_for(sizes, groups, own, seed):
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(len(sizes)), sizes)
    n = len(patients)
    # Patients of one group each, or with images of several.
    group = rng.integers(0, groups, len(sizes))[patients] if own else rng.integers(0, groups, n)
    data = data_of(
        {"patient": [f"p{i}" for i in patients]},
        labels=rng.integers(0, 2, n).tolist(),
        groups=np.unique(group, return_inverse=True)[1].tolist(),
        keep_together="patient",
    )
    try:
        parts = data.split(seed)
    except FairlineError as error:
        holders = [len(np.unique(patients[group == g])) for g in np.unique(group)]
        assert min(holders) < 3 or "every group" in str(error)  # noqa: PT017
        assert min(holders) < 6
        return
    seen = [set(part.metadata["patient"]) for part in parts]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    assert sum(map(len, parts)) == n
    for part, share in zip(parts, (0.72, 0.08, 0.2), strict=True):
        assert abs(len(part) - share * n) <= max(sizes) * (1 + data.num_groups)
        assert part.counts()["n"].min() > 0
    again = data.split(seed)
    assert all(torch.equal(one.images, other.images) for one, other in zip(parts, again, strict=True))


def test_patients_are_dealt_as_evenly_as_images_are():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 12, 800)
    patients = np.repeat(np.arange(800), sizes)
    group = rng.choice(4, 800, p=[0.7, 0.2, 0.07, 0.03])[patients]
    labels = (rng.random(len(patients)) < 0.2).astype(int)
    data = data_of({"patient": patients}, labels=labels.tolist(), groups=group.tolist())
    parts = data.split(0, keep_together="patient")
    for part, share in zip(parts, (0.72, 0.08, 0.2), strict=True):
        wanted = share * data.counts()["n"]
        assert (part.counts()["n"] - wanted).abs().max() <= 3
        assert (part.counts(by="class") - share * data.counts(by="class")).abs().max(axis=None) <= 5
    assert not torch.equal(parts[2].images, data.split(1, keep_together="patient")[2].images)


def test_an_official_test_part_keeps_its_patients_to_itself(caplog):
    patients = [f"p{i // 3}" for i in range(90)]
    test = torch.arange(90) >= 70
    data = data_of({"patient": patients}, official_test=test, keep_together="patient")
    train, val, chosen = data.split(0)
    assert len(chosen) == 20
    assert set(chosen.metadata["patient"]).isdisjoint([*train.metadata["patient"], *val.metadata["patient"]])
    assert "1 training images are, or share their 'patient' with images that are, also in the test part" in caplog.text


def test_too_few_values_to_keep_together_are_one_sentence():
    data = data_of({"patient": ["a"] * 20 + ["b"] * 20 + list("cdefgh"), "n": range(46)}, groups=[0] * 40 + [1] * 6)
    with pytest.raises(FairlineError, match=r"'g 0' has images of 2 different 'patient', .*too few for 3 parts"):
        data.split(keep_together="patient")
    for call in (lambda: data.split(keep_together="who"), lambda: replace(data, keep_together="who")):
        with pytest.raises(FairlineError, match="no column 'who' to keep together; it has patient, n"):
            call()


def test_a_column_of_patients_that_is_parted_is_told_once(caplog):
    table = {"age": [str(i) for i in range(60)], "lesion_id": [f"L{i // 2}" for i in range(60)]}
    data = replace(data_of(table), name="skin")
    _told.discard(("skin", "lesion_id"))
    with caplog.at_level(logging.WARNING):
        data.split(0)
        data.split(1)
    assert [record.getMessage().count("'lesion_id' looks like") for record in caplog.records] == [1]
    caplog.clear()
    _told.discard(("skin", "lesion_id"))
    data.split(0, keep_together="lesion_id")
    assert not caplog.records


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"person": [1, 1, 2]}, True),
        ({"image_id": [1, 2, 3]}, False),
        ({"width": ["a"] * 3}, False),
        ({"who": [f"w{i % 30}" for i in range(100)]}, True),
        ({"site": [f"w{i % 3}" for i in range(100)]}, False),
        ({"who": [f"w{i}" for i in range(100)]}, False),
        ({"age": [str(i % 30) for i in range(100)]}, False),
        ({"race": pd.Categorical([f"w{i % 30}" for i in range(100)])}, False),
        ({"idea": [str(i % 3) for i in range(9)]}, False),
    ],
)
def test_what_looks_like_patients(values, found):
    assert (tells_whose(pd.DataFrame(values)) is not None) == found


def rows(n: int = 60) -> list[dict]:
    return [
        {
            "file_name": f"{i}.png",
            "label": "xy"[i % 2],
            "sex": "fm"[i // 2 % 2] if i != 3 else "",
            "age": str(i % 2 * 20 + i % 13),
            "patient": f"p{i // 3}",
            "split": "test" if i >= 48 else "val",
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.parquet"])
def test_a_folder_is_grouped_by_bins_and_intersections(tmp_path, table):
    folder = write(tmp_path / "images", rows(), table)
    for groups in ("sex,age:0-17,18+", ["sex", "age:0-17,18+"]):
        data = load("folder", folder, groups=groups, image_size=None, keep_together="patient")
        assert data.group_names == ("f × 0–17", "f × 18+", "m × 0–17", "m × 18+")
        assert [(item.file, item.reason) for item in data.skipped] == [("3.png", "its sex,age:0-17,18+ is empty")]
    assert list(data.metadata) == list(rows()[0])
    assert data.metadata["file_name"].tolist() == [f"{i}.png" for i in range(60) if i != 3]
    parts = data.split(0)
    assert set(parts[2].metadata["file_name"]) == {f"{i}.png" for i in range(48, 60)}
    assert set(parts[0].metadata["split"]) == set(parts[1].metadata["split"]) == {"val"}
    assert set(parts[0].metadata["patient"]).isdisjoint(parts[1].metadata["patient"])
    # What groups are made of when data are loaded, and later, is the same.
    plain = load("folder", folder, groups="sex", image_size=None)
    assert plain.regroup("sex").group_names == plain.group_names
    assert torch.equal(plain.regroup("sex").groups, plain.groups)
    same = plain.regroup("sex,age:0-17,18+")
    assert same.group_names == data.group_names
    assert torch.equal(same.groups, data.groups)
    everyone = load("folder", folder, image_size=None)
    assert everyone.regroup("sex").group_names == ("f", "m", "no sex")
    with pytest.raises(FairlineError, match="no column 'hair' to make groups of"):
        load("folder", folder, groups="sex,hair")
    with pytest.raises(FairlineError, match="outside of all bins"):
        load("folder", folder, groups="age:0-17")


def test_parquet_columns_keep_their_kinds_and_images_their_names(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.data.pictures import encoded
    from tests.data.test_folder import pixels_of

    images = [{"bytes": encoded(pixels_of(i)), "path": f"face{i}.png"} for i in range(6)]
    table = pa.table({"image": images, "label": list("abcabc"), "age": [1, 2, None, 4, 5, 6], "box": [[1, 2]] * 6})
    pq.write_table(table, tmp_path / "metadata.parquet")
    data = load("folder", tmp_path)
    assert list(data.metadata) == ["file_name", "label", "age"]
    assert data.metadata["file_name"].tolist() == [f"face{i}.png" for i in range(6)]
    assert data.regroup("age:0-3,4+").group_names == ("0–3", "4+", "no age")
    assert data.regroup("age").group_names == ("1", "2", "4", "5", "6", "no age")
    pq.write_table(
        pa.table({"image": [own["bytes"] for own in images], "label": list("abcabc")}), tmp_path / "b.parquet"
    )
    assert load("folder", tmp_path / "b.parquet").metadata["file_name"][1] == "row 2 of b.parquet"


def test_an_audit_tells_of_each_image_what_is_known():
    table = {
        "label": ["c 0", "c 1"] * 10,
        "group": ["x"] * 20,
        "file": [f"{i}.png" for i in range(20)],
        "loss": range(20),
    }
    data = data_of(table, labels=[0, 1] * 10)
    report = fl.audit(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), data, resamples=10)
    assert list(report.predictions) == [
        *("index", "label", "group", "prediction", "correct", "loss"),
        *("metadata_group", "file", "metadata_loss"),
    ]
    assert report.predictions["metadata_loss"].tolist() == list(range(20))
