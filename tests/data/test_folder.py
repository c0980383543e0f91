from __future__ import annotations

import csv
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairline.data import load
from fairline.errors import FairlineError
from tests.data.pictures import encoded, gradient

#: Names that pandas, a spreadsheet or a terminal takes for something else.
NAMES = [
    "None",
    "NA",
    "nan",
    "NULL",
    "N/A",
    "<unknown>",
    "[x]",
    "true",
    "0",
    "01",
    "1e5",
    'a "b"',
    "a, b",
    "a;b",
    "é",
    "-",
]


def pixels_of(number: int) -> np.ndarray:
    return (gradient(4, 6) // 2 + number).astype(np.uint8)


def write(folder: Path, rows: list[dict], name: str = "metadata.csv", **options) -> Path:
    """A table, and an image for each row whose file is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        file = folder / str(row["file_name"]).replace("\\", "/")
        if row["file_name"] and file.suffix and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(pixels_of(number)))
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(folder / name)
    else:
        with (folder / name).open("w", newline="", encoding=options.pop("encoding", "utf-8")) as opened:
            writer = csv.DictWriter(opened, rows[0], **options)
            writer.writeheader()
            writer.writerows(rows)
    return folder


def rows_of(labels, groups=None) -> list[dict]:
    groups = labels if groups is None else groups
    return [
        {"file_name": f"{i}.png", "label": label, "group": group}
        for i, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def names_of(data, what: str = "group") -> list[str]:
    names, index = (data.group_names, data.groups) if what == "group" else (data.class_names, data.labels)
    return [names[i] for i in index]


CELLS = st.one_of(
    st.sampled_from([*NAMES, "", " ", "  spaced  "]),
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Nd"]), max_size=5),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(CELLS, min_size=1, max_size=8),
    broken=st.sets(st.integers(0, 7)),
    table=st.sampled_from(["metadata.csv", "metadata.parquet"]),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    order=st.randoms(use_true_random=False),
)
def test_what_was_written_is_what_is_read_or_listed(
    tmp_path_factory, groups, broken, table, delimiter, end, encoding, order
):
    rows = rows_of(["x"] * len(groups), groups)
    order.shuffle(rows)
    options = {"delimiter": delimiter, "lineterminator": end, "encoding": encoding} if table.endswith("csv") else {}
    folder = write(tmp_path_factory.mktemp("images"), rows, table, **options)
    for number in broken:
        (folder / f"{number}.png").unlink(missing_ok=True)
    expected = {}
    for number, row in enumerate(rows):
        name = unicodedata.normalize("NFC", row["group"].strip())
        if name and int(row["file_name"][:-4]) not in broken:
            expected[number] = name
    if not expected:
        with pytest.raises(FairlineError, match=f"None of the {len(rows)} images can be read"):
            load("folder", folder, groups="group", image_size=None)
        return
    data = load("folder", folder, groups="group", image_size=None)
    assert names_of(data) == list(expected.values())
    images = torch.stack([torch.from_numpy(pixels_of(number)).permute(2, 0, 1) for number in expected])
    assert torch.equal(data.images, images)
    assert {item.file for item in data.skipped} == {r["file_name"] for n, r in enumerate(rows) if n not in expected}
    assert len(data) + len(data.skipped) == len(rows)


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.parquet"])
def test_odd_names_reach_the_audit(tmp_path, table):
    import fairline as fl

    rows = rows_of([i % 2 for i in range(16 * 12)], [NAMES[i % 16] for i in range(16 * 12)])
    data = load("folder", write(tmp_path / "images", rows, table), groups="group", image_size=4)
    assert set(data.group_names) == set(NAMES)
    assert data.counts()["n"].tolist() == [12] * 16
    model = fl.models.build("cnn", 2, image_size=4, width=2).eval()
    report = fl.audit(model, data, reference=model)
    report.frame.to_parquet(tmp_path / "audit.parquet")
    kept = pd.read_parquet(tmp_path / "audit.parquet")
    sizes = kept[kept["measure"] == "accuracy"].set_index("group")["n"]
    assert {name: sizes[name] for name in NAMES} == dict.fromkeys(NAMES, 12)


def test_numbers_sort_as_numbers_and_are_written_one_way(tmp_path):
    rows = rows_of(["10", "9", "nan", "5", "inf", "0"])
    data = load("folder", write(tmp_path / "a", rows))
    assert data.class_names == ("0", "5", "9", "10", "inf", "nan")
    with pytest.raises(FairlineError, match=r"column 'label' writes one number as '1' and as '1\.0'"):
        load("folder", write(tmp_path / "b", rows_of(["1", "1.0"])))
    floats = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate([1.0, 0.0, None])]
    data = load("folder", write(tmp_path / "c", floats, "metadata.parquet"))
    assert (data.class_names, len(data.skipped)) == (("0.0", "1.0"), 1)
    truths = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate([True, False])]
    assert load("folder", write(tmp_path / "d", truths, "metadata.parquet")).class_names == ("False", "True")


def test_missing_cells_say_which(tmp_path):
    rows = rows_of(["a", "", "b"], ["g", "h", "  "])
    rows.append({"file_name": "", "label": "a", "group": "g"})
    data = load("folder", write(tmp_path, rows), groups="group")
    assert [(item.file, item.reason) for item in data.skipped] == [
        ("1.png", "its label is empty"),
        ("2.png", "its group is empty"),
        ("line 5 of metadata.csv", "there is no image"),
    ]


def test_names_of_files_in_other_spellings(tmp_path):
    folder = write(tmp_path, rows_of(["a"] * 3))
    (folder / "sub").mkdir()
    (folder / "sub" / "x.PNG").write_bytes(encoded(pixels_of(1)))
    (folder / unicodedata.normalize("NFD", "é.png")).write_bytes(encoded(pixels_of(2)))
    (folder / "metadata.csv").write_text(
        f"file_name,label\r\nsub\\x.PNG,a\r\né.png,b\r\n ./0.png ,c\r\n{folder / '1.png'},d\r\n", encoding="utf-8"
    )
    assert names_of(load("folder", folder), "class") == ["a", "b", "c", "d"]


def test_files_outside_of_the_folder_are_refused(tmp_path):
    folder = write(tmp_path / "data", rows_of(["a", "b"]))
    (tmp_path / "secret.png").write_bytes(encoded(pixels_of(3)))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"]
    lines = ["file_name,label", "0.png,a", *(f"{name},a" for name in outside), "link.png,b"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    data = load("folder", folder)
    assert names_of(data, "class") == ["a", "b"]
    assert [item.file for item in data.skipped] == outside
    assert all(item.reason.startswith("lies outside of") for item in data.skipped)


def test_a_file_listed_twice(tmp_path):
    rows = rows_of(["a", "b"], ["g", "h"])
    rows += [dict(rows[0]), {**rows[1], "group": "g"}]
    data = load("folder", write(tmp_path, rows), groups="group")
    assert names_of(data) == ["g", "h", "g"]
    assert [(item.file, item.reason) for item in data.skipped] == [("1.png", "is listed before with 'b' and 'h'")]


def test_what_is_not_listed_or_wholly_lost_is_told(tmp_path, caplog):
    rows = rows_of(["a", "b"])
    folder = write(tmp_path, rows)
    (folder / "1.png").write_bytes(b"")
    (folder / "extra.JPG").write_bytes(b"")
    (folder / "._0.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert load("folder", folder).class_names == ("a",)
    assert "no image of label 'b' can be used" in caplog.text
    assert f"1 images are not listed in {folder / 'metadata.csv'}, first {folder / 'extra.JPG'}" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a readable CSV .it is empty"),
        ("0.png,a\n1.png,b\n", "has no header; its first line must name the columns, 'file_name' among them"),
        ("name,label\n0.png,a\n", "has no column 'file_name'; its columns are name, label"),
        ("file_name,label,label\n0.png,a,b\n", "has the column 'label' twice"),
        ("file_name,label\n0.png,a,b\n", "line 2: 3 cells, but the header has 2"),
        ('file_name,label\n0.png,"a\n', "line 2: unexpected end of data"),
        ("file_name,label\n", "metadata.csv has no rows"),
        (
            "file_name,label\n7.png,a\n8.png,b\n",
            "None of the 2 images can be read; the first: 7.png, file does not exist",
        ),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(FairlineError, match=message) as caught:
        load("folder", tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "metadata.csv").write_bytes("file_name,label\n0.png,é\n".encode("latin-1"))
    with pytest.raises(FairlineError, match=r"not a readable CSV \('utf-8' codec"):
        load("folder", tmp_path)


def pictures(kind: str, folder: Path) -> list:
    """Three images and what stands for none, as cells of a parquet table."""
    pixels = [pixels_of(i) for i in range(3)]
    for i, image in enumerate(pixels):
        (folder / f"{i}.png").write_bytes(encoded(image))
    cells = {
        "struct": [{"bytes": encoded(image), "path": f"p{i}.png"} for i, image in enumerate(pixels)],
        "struct of paths": [{"bytes": None, "path": f"{i}.png"} for i in range(3)],
        "bytes": [encoded(image) for image in pixels],
        "paths": [f"{i}.png" for i in range(3)],
        "arrays": [image.tolist() for image in pixels],
        "channels first": [image.transpose(2, 0, 1).tolist() for image in pixels],
        "floats": [(image / 255).tolist() for image in pixels],
    }[kind]
    return [*cells, None]


@pytest.mark.parametrize("kind", ["struct", "struct of paths", "bytes", "paths", "arrays", "channels first", "floats"])
def test_images_inside_parquet(tmp_path, kind):
    table = pa.table({"image": pictures(kind, tmp_path), "label": ["cat", "dog", "cat", "dog"]})
    pq.write_table(table, tmp_path / "animals.parquet", row_group_size=2)
    data = load("folder", tmp_path / "animals.parquet", image_size=None)
    assert torch.equal(data.images, torch.stack([torch.from_numpy(pixels_of(i)).permute(2, 0, 1) for i in range(3)]))
    assert names_of(data, "class") == ["cat", "dog", "cat"]
    assert [(item.file, item.reason) for item in data.skipped] == [("row 4 of animals.parquet", "there is no image")]
    again = load("folder", tmp_path, metadata="animals*.parquet", image_size=None)
    assert torch.equal(again.images, data.images)


def test_images_inside_parquet_that_are_none(tmp_path):
    def refused(cells, message, labels=("a",)):
        pq.write_table(pa.table({"image": cells, "label": list(labels)}), tmp_path / "x.parquet")
        with pytest.raises(FairlineError, match=message):
            load("folder", tmp_path / "x.parquet")

    refused([5], "row 1 of x.parquet, 5 is no image")
    refused([[[1, 2], [3]]], "its rows differ in length")
    refused([[[300, 2], [3, 4]]], "is torch.int64; uint8 or float")
    refused([[1, 2, 3]], "row 1 of x.parquet, is not an image")
    refused([{"bytes": None, "path": None}], "there is no image")
    refused(
        [encoded(pixels_of(0))], r"row 1 of x.parquet: column 'label' is \[0, 1\], where one name is needed", [[0, 1]]
    )
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    with pytest.raises(FairlineError, match=r"x\.parquet is not a readable parquet file"):
        load("folder", tmp_path / "x.parquet")


def test_class_labels_of_hugging_face_are_names(tmp_path):
    features = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    table = pa.table({"image": pictures("bytes", tmp_path)[:3], "label": [1, 0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": features}), tmp_path / "metadata.parquet")
    assert names_of(load("folder", tmp_path), "class") == ["dog", "cat", "dog"]


def test_the_commonest_size_is_kept(tmp_path):
    rows = rows_of(list("abcd"))
    folder = write(tmp_path, rows)
    (folder / "0.png").write_bytes(encoded(gradient(9, 9)))
    data = load("folder", folder, image_size=None)
    assert data.images.shape == (3, 3, 4, 6)
    assert [(item.file, item.reason) for item in data.skipped] == [("0.png", "has 9×9 pixels, most others have 4×6")]


@pytest.mark.parametrize(
    ("size", "shape"),
    [(8, (8, 8)), ((4, 8), (4, 8)), ([4, 8], (4, 8)), ("4x8", (4, 8)), ("4×8", (4, 8)), ("8", (8, 8)), (None, (4, 6))],
)
def test_sizes(tmp_path, size, shape):
    assert load("folder", write(tmp_path, rows_of(["a"])), image_size=size).images.shape[2:] == shape


@pytest.mark.parametrize("size", [0, -4, True, 4.5, "4x", "x", "4x8x2", (1, 2, 3), (), "big", float("nan")])
def test_no_sizes(tmp_path, size):
    with pytest.raises(FairlineError, match=r"image_size is pixels \(32\) or HEIGHTxWIDTH"):
        load("folder", write(tmp_path, rows_of(["a"])), image_size=size)


def test_columns_that_the_command_line_reads_as_numbers(tmp_path):
    rows = [
        {"file_name": "0.png", "1": "a", "2": "g", "3": "test"},
        {"file_name": "1.png", "1": "b", "2": "h", "3": ""},
    ]
    data = load("folder", write(tmp_path, rows), label=1, groups=2, split=3)
    assert (names_of(data, "class"), names_of(data)) == (["a", "b"], ["g", "h"])
    assert data.official_test.tolist() == [True, False]


@pytest.mark.parametrize("option", ["image_size", "groups", "label", "split", "metadata", "flip", "white"])
def test_empty_options_are_one_sentence(tmp_path, option):
    with pytest.raises(FairlineError, match=f"Data 'folder': option '{option}' is empty"):
        load("folder", write(tmp_path, rows_of(["a"])), **{option: ""})


def test_white_is_asked_for(tmp_path):
    folder = write(tmp_path, rows_of(["a"]))
    values = np.full((4, 6), 2047, np.uint16)
    (folder / "0.png").write_bytes(encoded(values))
    with pytest.raises(FairlineError, match=r"the first: 0\.png, would be black: its largest value is 2047"):
        load("folder", folder)
    assert load("folder", folder, white=4095).images.unique().tolist() == [127]
    with pytest.raises(FairlineError, match="white is a number above 0, not '-1'"):
        load("folder", folder, white=-1)
