from __future__ import annotations

import io
import os
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fairline.data import load
from fairline.data.utkface import parse_name
from fairline.errors import FairlineError


def face(path: Path, colour: int, size: int = 40) -> None:
    Image.fromarray(np.full((size, size, 3), colour, np.uint8)).save(path)


def test_digits_are_unbalanced_in_training_only():
    data = load("digits")
    train, val, test = data.split(0)
    learned = train.counts()["n"] + val.counts()["n"]
    assert learned[:5].min() > 90
    assert learned[5:].max() <= 12
    assert test.counts()["n"].min() >= 69
    assert data.images.shape[1:] == (1, 8, 8)
    assert not data.flip
    whole = load("digits", unbalanced=False)
    assert len(whole) == 1797
    # The test part does not depend on the seed of the thinning.
    assert torch.equal(load("digits", seed=5).split(0)[2].images, test.images)


def test_utkface_reads_a_folder_of_jpegs(tmp_path):
    (tmp_path / "part1").mkdir()
    names = [
        f"{age}_{i % 2}_{i % 5}_2017010917{i:07d}.jpg" for i, age in enumerate([1, 2, 12, 13, 17, 18, 64, 65, 116] * 4)
    ]
    for i, name in enumerate(names):
        face(tmp_path / "part1" / name, 40 + i)
    face(tmp_path / "39_1_20170116174525125.jpg", 9)
    face(tmp_path / "39_1_7_20170116174525125.jpg", 9)
    (tmp_path / "20_0_0_20170116174525126.jpg").write_bytes(b"not a picture")
    data = load("utkface:age", tmp_path, groups="race", image_size=16)
    assert data.images.shape == (32, 3, 16, 16)
    assert data.counts(by="class").sum().tolist() == [8, 8, 8, 8]
    assert data.group_names == ("White", "Black", "Asian", "Indian", "Others")
    assert {item.file for item in data.skipped} == {
        "39_1_20170116174525125.jpg",
        "39_1_7_20170116174525125.jpg",
        "20_0_0_20170116174525126.jpg",
    }
    whole = load("utkface:race", tmp_path, image_size=16)
    assert len(whole) == 36
    assert list(whole.metadata) == ["file_name", "age", "gender", "race"]
    assert whole.metadata["age"].tolist() == [int(name.split("_")[0]) for name in whole.metadata["file_name"]]
    by_age = whole.regroup("age")
    assert by_age.group_names == ("0–1", "2–12", "13–17", "18–64", "65+")
    assert by_age.counts()["n"].tolist() == [4, 8, 8, 8, 8]
    assert torch.equal(whole.regroup("race").groups, whole.groups)
    # Ages 0–1 are left out where the paper's bands are meant, and are there in bins of one's own.
    crossed = load("utkface:gender", tmp_path, groups="age,race", image_size=16)
    assert len(crossed) == 32
    assert crossed.group_names[0] == "2–12 × White"
    assert crossed.name == "utkface:gender by age × race"
    own = load("utkface:gender", tmp_path, groups=["race", "age:0-17,18+"], image_size=16)
    assert len(own) == 36
    assert torch.equal(own.groups, whole.regroup(["race", "age:0-17,18+"]).groups)
    with pytest.raises(FairlineError, match="column 'age' lies outside of all bins"):
        load("utkface:gender", tmp_path, groups="age:18+", image_size=16)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("26_1_2_20170104023102422.jpg.chip.jpg", {"gender": 1, "race": 2, "age": 2}),
        ("1_0_4_2017.jpg", {"gender": 0, "race": 4}),
        ("61_1_20170109142408075.jpg.chip.jpg", str),
        ("26_3_2_2017.jpg", str),
        ("26_1_9_2017.jpg", str),
        ("portrait.jpg", str),
    ],
)
def test_utkface_names(name, expected):
    parsed = parse_name(name)
    assert isinstance(parsed, str) if expected is str else parsed == expected


@pytest.mark.data
def test_utkface_has_the_papers_shares(data_root):
    race = load("utkface:race", data_root)
    assert race.counts()["share_percent"].tolist() == pytest.approx([42.51, 19.09, 14.49, 16.77, 7.14], abs=0.0101)
    assert len(race.skipped) == 3
    age = load("utkface:age", data_root, groups="race")
    by_age = age.counts(by="class").sum()
    assert (100 * by_age / by_age.sum()).round(2).tolist() == [10.14, 3.63, 77.56, 8.67]
    # 375 sets of byte-identical files are known in the original.
    content = race.content_ids()
    copies = torch.bincount(content)
    assert (copies > 1).sum() >= 370
    train, val, test = race.split(0)
    seen = [
        set(part.images.numpy().reshape(len(part), -1).view("V3072").ravel().tolist()) for part in (train, val, test)
    ]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert test.counts()["n"].tolist() == pytest.approx((race.counts()["n"] * 0.2).tolist(), abs=3)


class Python2Pickler(pickle._Pickler):
    """Writes byte strings with the opcode that Python 2 used, as the official files have them."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        raw = value if isinstance(value, bytes) else value.encode("latin-1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def dumps(value) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write_batches(folder: Path, rows: int = 20) -> np.ndarray:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, rows, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {b"batch_label": b"x", b"labels": [j % 10 for j in range(rows)], b"data": pixels[i], b"filenames": []}
        (folder / name).write_bytes(dumps(content))
    return pixels


def test_cifar10_reads_the_official_batches(tmp_path):
    pixels = write_batches(tmp_path / "cifar-10-batches-py")
    data = load("cifar10", tmp_path)
    assert data.images.shape == (120, 3, 32, 32)
    assert np.array_equal(data.images.numpy().reshape(120, -1), pixels.reshape(120, -1))
    assert data.official_test.sum() == 20
    assert data.class_names[3] == "cat"
    # A batch folder itself is a root as well.
    assert len(load("cifar10", tmp_path / "cifar-10-batches-py")) == 120
    thin = load("cifar10", tmp_path, unbalanced=True)
    assert thin.counts()["n"].tolist() == [9 + 2] * 5 + [1 + 0] * 5
    assert load("cifar10", tmp_path, unbalanced="train").counts()["n"].tolist() == [9 + 2] * 5 + [1 + 2] * 5


class Evil:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_cifar10_refuses_a_pickle_that_wants_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_batches(tmp_path / "c")
    (tmp_path / "c" / "data_batch_3").write_bytes(dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(FairlineError, match=r"data_batch_3 is not a CIFAR-10 batch \(it asks for posix.system\)"):
        load("cifar10", tmp_path / "c")
    assert not (tmp_path / "hacked").exists()
    (tmp_path / "c" / "data_batch_3").unlink()
    with pytest.raises(FairlineError, match="data_batch_3 does not exist"):
        load("cifar10", tmp_path / "c")


@pytest.mark.data
def test_cifar10_reads_parquet_and_unbalances_as_the_paper(data_root):
    data = load("cifar10", data_root, unbalanced=True)
    assert data.counts()["n"].tolist() == [5400] * 5 + [600] * 5
    _, _, test = data.split(0)
    assert test.counts()["n"].tolist() == [900] * 5 + [100] * 5
    assert not data.skipped


def test_svhn_reads_the_official_layout(tmp_path):
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("test", 10)):
        pixels = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": labels})
        if part == "train":
            first = pixels[..., 0].transpose(2, 0, 1)
    data = load("svhn", tmp_path)
    assert data.images.shape == (40, 3, 32, 32)
    assert np.array_equal(data.images[0].numpy(), first)
    assert data.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert data.official_test.sum() == 10
    assert data.flip is False
    thinned = load("svhn", tmp_path, unbalanced=True)
    counts = thinned.counts()["n"]
    assert counts[:5].tolist() == [4] * 5
    assert (counts[5:] < 4).all()
    assert 0 < thinned.official_test.sum() < 10
    savemat(tmp_path / "test_32x32.mat", {"X": pixels})
    with pytest.raises(FairlineError, match="lacks the variable X or y"):
        load("svhn", tmp_path)
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB")
    with pytest.raises(FairlineError, match="not a readable"):
        load("svhn", tmp_path)


def test_folder_reads_label_and_group_columns(tmp_path):
    rows = []
    for i in range(12):
        face(tmp_path / f"{i}.png", 10 * i)
        rows.append(
            {"file_name": f"{i}.png", "kind": i % 3, "site": "ab"[i % 2], "split": "test" if i > 8 else "train"}
        )
    rows.append({"file_name": "gone.png", "kind": 1, "site": "a", "split": "train"})
    rows.append({"file_name": "0.png", "kind": 1, "site": None, "split": "train"})
    pd.DataFrame(rows).to_csv(tmp_path / "metadata.csv", index=False)
    data = load("folder", tmp_path, label="kind", groups="site", image_size=8)
    assert data.images.shape == (12, 3, 8, 8)
    assert data.class_names == ("0", "1", "2")
    assert data.group_names == ("a", "b")
    assert data.labels.tolist() == [i % 3 for i in range(12)]
    assert data.official_test.sum() == 3
    assert {item.file: item.reason for item in data.skipped}["gone.png"] == "file does not exist"
    with pytest.raises(FairlineError, match="no column 'age'; its columns are file_name, kind, site, split"):
        load("folder", tmp_path, label="kind", groups="age")


def test_folder_reads_fairface(tmp_path):
    """Two CSVs as FairFace publishes them; the second is the test split."""
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for part, n in (("train", 9), ("val", 4)):
        rows = []
        for i in range(1, n + 1):
            face(tmp_path / part / f"{i}.jpg", 20 * i)
            race = ["East Asian", "Black", "White"][i % 3]
            rows.append(
                {"file": f"{part}/{i}.jpg", "age": "20-29", "gender": "Male", "race": race, "service_test": True}
            )
        pd.DataFrame(rows).to_csv(tmp_path / f"fairface_label_{part}.csv", index=False)
    csvs = {"metadata": "fairface_label_train.csv", "test_metadata": "fairface_label_val.csv"}
    data = load("folder", tmp_path, label="race", image_size=8, **csvs)
    assert data.class_names == ("Black", "East Asian", "White")
    assert data.official_test.tolist() == [False] * 9 + [True] * 4
    with pytest.raises(FairlineError, match=r"holds no gone\.csv"):
        load("folder", tmp_path, label="race", metadata="fairface_label_train.csv", test_metadata="gone.csv")


def celeba(folder, n=12):
    """The official files: the list of attributes with its count, the partition, JPEGs of 178×218."""
    from PIL import Image

    (folder / "img_align_celeba").mkdir(parents=True)
    lines, partition = [str(n), "Smiling Male Young "], []
    for i in range(1, n + 1):
        name = f"{i:06d}.jpg"
        picture = Image.new("RGB", (178, 218), (255, 255, 255))
        # The centre is grey, and all that a crop leaves.
        picture.paste((15 * i, 15 * i, 15 * i), (0, 20, 178, 198))
        picture.save(folder / "img_align_celeba" / name, quality=95)
        lines.append(f"{name} {1 if i % 2 else -1:2d} {1 if i % 3 else -1:2d} -1")
        partition.append(f"{name} {0 if i <= 8 else 1 if i <= 10 else 2}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")


def test_celeba_reads_the_official_layout(tmp_path):
    celeba(tmp_path / "celeba")
    data = load("celeba", tmp_path, image_size=16)
    assert data.images.shape == (12, 3, 16, 16)
    assert (data.images.float().mean((1, 2, 3)) - 15 * torch.arange(1, 13)).abs().max() < 3
    assert data.class_names == ("not Smiling", "Smiling")
    assert data.labels.tolist() == [i % 2 for i in range(1, 13)]
    assert data.groups.tolist() == [int(i % 3 > 0) for i in range(1, 13)]
    assert data.group_names == ("not Male", "Male")
    assert data.official_test.tolist() == [False] * 10 + [True] * 2
    other = load("celeba:Young", tmp_path / "celeba", groups="Smiling", image_size=8)
    assert other.labels.sum() == 0
    assert other.group_names == ("not Smiling", "Smiling")
    crossed = load("celeba", tmp_path, groups="Male,Young", image_size=8)
    assert torch.equal(crossed.groups, data.regroup("Male,Young").groups)
    assert set(crossed.group_names) <= {f"{a}Male × {b}Young" for a in ("", "not ") for b in ("", "not ")}
    assert data.metadata["file_name"].tolist()[0] == "000001.jpg"
    with pytest.raises(FairlineError, match="no attribute 'Hat'; choose one of Smiling, Male, Young"):
        load("celeba:Hat", tmp_path)
    with pytest.raises(FairlineError, match="no attribute 'Hat'"):
        load("celeba", tmp_path, groups="Male,Hat")
    attributes = tmp_path / "celeba" / "list_attr_celeba.txt"
    attributes.write_text(attributes.read_text().replace(" -1", " 7"))
    with pytest.raises(FairlineError, match="values other than 1 and -1"):
        load("celeba", tmp_path)
    (tmp_path / "celeba" / "list_eval_partition.txt").unlink()
    celeba(tmp_path / "again")
    (tmp_path / "again" / "list_eval_partition.txt").write_text("000001.jpg 0\n")
    with pytest.raises(FairlineError, match=r"lacks 000002\.jpg and 10 more"):
        load("celeba", tmp_path / "again")


def test_parquet_without_an_image_column(tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "utkface.parquet")
    with pytest.raises(FairlineError, match="no column 'image'"):
        load("utkface:race", tmp_path)
    (tmp_path / "utkface.parquet").write_bytes(b"PAR1")
    with pytest.raises(FairlineError, match="not a readable parquet"):
        load("utkface:race", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, "no data set 'mnist'; choose one of digits"),
        ("utkface", {}, "needs a task"),
        ("utkface:height", {}, "no task 'height'"),
        ("utkface:age", {"groups": "hair"}, "no groups 'hair'"),
        ("digits", {"colour": 1}, "no option 'colour'"),
        ("cifar10", {"unbalanced": "test"}, "unbalanced must be"),
        ("cifar10", {}, "holds neither"),
        ("utkface:age", {}, "holds neither"),
        ("svhn", {}, "does not exist"),
        ("svhn", {"colour": 1}, "no option 'colour'"),
        ("celeba", {}, "list_attr_celeba.txt does not exist"),
        ("celeba", {"colour": 1}, "no option 'colour'"),
        ("folder", {}, "holds no metadata.csv"),
    ],
)
def test_bad_requests_are_one_sentence(tmp_path, name, options, message):
    with pytest.raises(FairlineError, match=message) as caught:
        load(name, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_missing_root(monkeypatch, tmp_path):
    monkeypatch.delenv("FAIRLINE_DATA", raising=False)
    with pytest.raises(FairlineError, match="needs a folder"):
        load("cifar10")
    with pytest.raises(FairlineError, match="does not exist"):
        load("cifar10", tmp_path / "nowhere")


def write_cifar(folder: Path, labels: list, images: list | None = None) -> None:
    raw = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(raw, "PNG")
    images = images or [{"bytes": raw.getvalue(), "path": None}] * len(labels)
    for part in ("train", "test"):
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"cifar10_{part}.parquet")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["cat", "dog", " truck "], [3, 5, 9]),
        ([3.0, 5.0, 9.0], [3, 5, 9]),
        (["3", "5", "9"], [3, 5, 9]),
        ([[0, 1, *[0] * 8], [1.0, *[0.0] * 9], [*[0] * 9, 1]], [1, 0, 9]),
        ([[4], [2], [0]], [4, 2, 0]),
    ],
)
def test_cifar10_takes_labels_in_other_forms(tmp_path, labels, expected):
    write_cifar(tmp_path, labels)
    data = load("cifar10", tmp_path)
    assert data.labels.tolist() == 2 * expected
    assert not data.skipped


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["cat", "lion"],
            "the label in row 2 of cifar10_train.parquet is 'lion', which is none of airplane, automobile",
        ),
        ([1.0, 1.5], "is 1.5, which is not a whole number"),
        ([1, -1], "is -1, which is negative"),
        ([1, 10], "is 10, but there are 10 names"),
        ([1.0, float("inf")], "not a whole number"),
        ([[1], [0, 1]], "a one-hot vector of 2 values, but there are 10 names"),
        ([[1.0], [0.5, 0.5]], "neither one value nor a one-hot vector"),
        ([[[1]]], "not a whole number"),
    ],
)
def test_cifar10_refuses_labels_that_mean_no_class(tmp_path, labels, message):
    write_cifar(tmp_path, labels)
    with pytest.raises(FairlineError, match=message):
        load("cifar10", tmp_path)


def test_cifar10_lists_null_images_and_labels(tmp_path):
    write_cifar(tmp_path, [1, None, 2])
    raw = pq.read_table(tmp_path / "cifar10_train.parquet").column("image").to_pylist()
    write_cifar(tmp_path, [1, None, 2], [raw[0], raw[1], None])
    data = load("cifar10", tmp_path)
    assert data.labels.tolist() == [1, 1]
    assert [(item.file, item.reason) for item in data.skipped[:2]] == [
        ("row 2 of cifar10_train.parquet", "its label is empty"),
        ("row 3 of cifar10_train.parquet", "there is no image"),
    ]


def test_utkface_reads_parquet_as_it_reads_files(tmp_path):
    rows = []
    for i, name in enumerate(["1_0_0_1.jpg", "20_1_1_2.jpg", "30_0_2_3.jpg", "odd.jpg", "40_1_0_4.jpg"]):
        face(tmp_path / name, 20 * i)
        rows.append({"bytes": (tmp_path / name).read_bytes() if i < 4 else b"", "path": f"part/{name}"})
    pq.write_table(pa.table({"image": rows}), tmp_path / "faces.parquet")
    (tmp_path / "40_1_0_4.jpg").write_bytes(b"")
    data, files = (load("utkface:age", root, groups="race") for root in (tmp_path / "faces.parquet", tmp_path))
    assert torch.equal(data.images, files.images)
    assert data.groups.tolist() == files.groups.tolist() == [1, 2]
    assert [item.reason for item in data.skipped] == ["name is not age_gender_race_datetime", "file is empty"]
    assert {item.reason for item in files.skipped} == {item.reason for item in data.skipped}


@pytest.mark.parametrize("name", ["digits", "svhn", "cifar10", "utkface:age", "celeba"])
@pytest.mark.parametrize("option", ["image_size", "seed", "unbalanced", "crop", "groups"])
def test_empty_options_are_one_sentence(tmp_path, name, option):
    with pytest.raises(FairlineError, match=f"Data '{name}': option '{option}' is empty"):
        load(name, tmp_path, **{option: ""})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"seed": "x"}, "seed is a whole number of at least 0, not 'x'"),
        ("digits", {"unbalanced": 1}, "unbalanced is true or false, not '1'"),
        ("svhn", {"seed": -1}, "seed is a whole number"),
        ("celeba", {"crop": 0}, "crop is a whole number of at least 1, not '0'"),
        ("celeba", {"image_size": "wide"}, "image_size is pixels"),
        ("utkface:age", {"image_size": 0}, "image_size is pixels"),
        ("cifar10", {"image_size": (1, 2, 3)}, "image_size is pixels"),
        ("folder", {"flip": "maybe"}, "flip is true or false, not 'maybe'"),
    ],
)
def test_options_of_another_kind_are_one_sentence(tmp_path, name, options, message):
    with pytest.raises(FairlineError, match=message):
        load(name, tmp_path, **options)
