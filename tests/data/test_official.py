"""CIFAR-100 and Tiny ImageNet in their official layout, in small."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fairline.cli import app
from fairline.data import found_in, load
from fairline.data.cifar100 import COARSE_OF_FINE, NAMES
from fairline.errors import FairlineError
from fairline.jobs.doctor import examine

#: As published beside the data set, by class.
PUBLISHED = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 "
    "19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 "
    "13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)


def test_cifar100_has_the_published_superclasses():
    assert list(COARSE_OF_FINE) == [int(word) for word in PUBLISHED.split()]
    assert (len(set(NAMES["fine"])), len(set(NAMES["coarse"]))) == (100, 20)
    assert (NAMES["fine"][0], NAMES["fine"][40], NAMES["fine"][99]) == ("apple", "lamp", "worm")


def binary(folder: Path, copies: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Each class ``copies`` times in training, once in test: superclass, class, red, green and blue."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    parts = {}
    for part, n in (("train", copies), ("test", 1)):
        fine = rng.permutation(np.tile(np.arange(100), n)).astype(np.uint8)
        coarse = np.array(COARSE_OF_FINE, np.uint8)[fine]
        pixels = rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        parts[part] = np.concatenate([coarse[:, None], fine[:, None], pixels], axis=1)
        (folder / f"{part}.bin").write_bytes(parts[part].tobytes())
    return parts


def archive(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:gz") as opened:
        opened.add(folder, "cifar-100-binary")


def test_cifar100_reads_the_official_binary_files(tmp_path):
    parts = binary(tmp_path / "cifar-100-binary")
    data = load("cifar100", tmp_path)
    assert data.images.shape == (300, 3, 32, 32)
    assert np.array_equal(data.images[7].numpy().ravel(), parts["train"][7, 2:])
    assert data.images[7, 2, 31, 0] == parts["train"][7, 2 + 2 * 1024 + 31 * 32]
    assert data.labels.tolist() == [*parts["train"][:, 1], *parts["test"][:, 1]]
    assert data.official_test.tolist() == [False] * 200 + [True] * 100
    assert data.groups_are_classes
    assert data.num_groups == 100
    coarse = load("cifar100:coarse", tmp_path)
    assert coarse.labels.tolist() == [*parts["train"][:, 0], *parts["test"][:, 0]]
    assert coarse.name == "cifar100:coarse"
    mixed = load("cifar100", tmp_path, groups="coarse")
    assert torch.equal(mixed.labels, data.labels)
    assert torch.equal(mixed.groups, coarse.labels)
    assert mixed.group_names == NAMES["coarse"]
    assert mixed.name == "cifar100 by coarse"
    assert torch.equal(data.regroup("coarse").groups, mixed.groups)
    # The folder itself, and the archive that it comes in, hold the same.
    archive(tmp_path / "cifar-100-binary", tmp_path / "cifar-100-binary.tar.gz")
    shutil.move(tmp_path / "cifar-100-binary", tmp_path / "c")
    for root in (tmp_path, tmp_path / "cifar-100-binary.tar.gz", tmp_path / "c"):
        again = load("cifar100", root)
        assert torch.equal(again.images, data.images)
        assert torch.equal(again.labels, data.labels)


def test_cifar100_is_unbalanced_by_halves_and_split_without_parting_equal_images(tmp_path):
    parts = binary(tmp_path, copies=10)
    raw = parts["train"].copy()
    # One image is there four times, one of the test part in training too.
    own = np.flatnonzero(raw[:, 1] == 3)
    raw[own[:4]] = raw[own[0]]
    raw[np.flatnonzero(raw[:, 1] == parts["test"][5, 1])[0]] = parts["test"][5]
    (tmp_path / "train.bin").write_bytes(raw.tobytes())
    data = load("cifar100", tmp_path)
    train, val, test = data.split(0, val=0.3)
    assert len(test) == 100
    assert len(train) + len(val) == 999
    seen = [set(part.images.numpy().reshape(len(part), -1).view("V3072").ravel().tolist()) for part in (train, val)]
    assert not seen[0] & seen[1]
    assert val.counts()["n"].tolist() == pytest.approx([3] * 100, abs=1)
    thin = load("cifar100:coarse", tmp_path, unbalanced="train")
    assert thin.counts()["n"].tolist() == [45 + 5] * 10 + [5 + 5] * 10
    assert load("cifar100:coarse", tmp_path, unbalanced=True).counts()["n"].tolist() == [45 + 4] * 10 + [5 + 0] * 10


def test_cifar100_reads_parquet_as_it_reads_binary_files(tmp_path):
    parts = binary(tmp_path / "b", copies=1)
    (tmp_path / "p").mkdir()
    for part, records in parts.items():
        images = []
        for record in records:
            raw = io.BytesIO()
            Image.fromarray(record[2:].reshape(3, 32, 32).transpose(1, 2, 0)).save(raw, "PNG")
            images.append({"bytes": raw.getvalue(), "path": None})
        columns = {"img": images, "fine_label": records[:, 1].tolist(), "coarse_label": records[:, 0].tolist()}
        pq.write_table(pa.table(columns), tmp_path / "p" / f"cifar100_{part}.parquet")
    data, raw = load("cifar100", tmp_path / "p"), load("cifar100", tmp_path / "b")
    assert torch.equal(data.images, raw.images)
    assert torch.equal(data.labels, raw.labels)
    assert data.official_test.tolist() == raw.official_test.tolist()
    assert load("cifar100", tmp_path / "p", image_size=16).images.shape == (200, 3, 16, 16)
    with pytest.raises(FairlineError, match="32×32; image_size cannot be changed"):
        load("cifar100", tmp_path / "b", image_size=16)
    columns["coarse_label"][3] = None
    pq.write_table(pa.table(columns), tmp_path / "p" / "cifar100_test.parquet")
    skipped = load("cifar100", tmp_path / "p").skipped
    assert [(item.file, item.reason) for item in skipped] == [("row 4 of cifar100_test.parquet", "its label is empty")]
    columns["coarse_label"][3] = (columns["coarse_label"][2] + 1) % 20
    columns["fine_label"][3] = columns["fine_label"][2]
    pq.write_table(pa.table(columns), tmp_path / "p" / "cifar100_test.parquet")
    with pytest.raises(FairlineError, match=r"image 104 has class .* which do not belong together"):
        load("cifar100", tmp_path / "p")
    columns["fine_label"][0] = 100
    pq.write_table(pa.table(columns), tmp_path / "p" / "cifar100_test.parquet")
    with pytest.raises(FairlineError, match=r"the fine label in row 1 of cifar100_test.parquet is 100, but there are"):
        load("cifar100", tmp_path / "p")


def test_damaged_files_of_cifar100_are_one_sentence(tmp_path):
    def refused(match: str, root: Path = tmp_path) -> None:
        with pytest.raises(FairlineError, match=match) as caught:
            load("cifar100", root)
        assert "\n" not in str(caught.value)

    refused(r"holds neither cifar-100-binary\.tar\.gz nor cifar-100-binary/test\.bin nor cifar100_train\*\.parquet")
    (tmp_path / "cifar-100-python").mkdir()
    refused(r"the Python version of CIFAR-100, which is pickled; bring cifar-100-binary\.tar\.gz")
    folder = tmp_path / "cifar-100-binary"
    whole = binary(folder)["train"]
    (folder / "train.bin").write_bytes(whole.tobytes()[:-1])
    refused(r"train\.bin has 614,799 bytes, which are no whole number of images of 3,074")
    (folder / "train.bin").write_bytes(b"")
    refused("train.bin has 0 bytes")
    shifted = np.roll(whole.ravel(), 1)
    (folder / "train.bin").write_bytes(shifted.tobytes())
    refused(r"train\.bin: image 1 has class .* which do not belong together")
    (folder / "train.bin").unlink()
    refused(r"train\.bin does not exist")
    archive(folder, tmp_path / "half.tar.gz")
    refused(r"half\.tar\.gz holds no train\.bin", tmp_path / "half.tar.gz")
    binary(folder)
    archive(folder, tmp_path / "whole.tar.gz")
    raw = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(raw[: len(raw) // 2])
    refused(r"cut\.tar\.gz is not a whole archive", tmp_path / "cut.tar.gz")
    (tmp_path / "page.tar.gz").write_bytes(b"<html>404</html>")
    refused(r"page\.tar\.gz is not a whole archive", tmp_path / "page.tar.gz")


WNIDS = ["n02124075", "n01443537", "n02437312"]
WORDS = {"n01443537": "goldfish, Carassius auratus", "n02124075": "crane", "n02437312": "crane, machine"}


def tiny(root: Path, n: int = 6, tests: int = 2) -> Path:
    """The official folder: JPEGs of 64×64, one of them grey, boxes, annotations, secret test images, all words."""
    folder = root / "tiny-imagenet-200"
    rng = np.random.default_rng(0)

    def save(file: Path, mean: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (64, 64) if file.stem.endswith("_0") else (64, 64, 3)
        pixels = np.clip(rng.normal(mean, 3, shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=95)

    lines = []
    for place, wnid in enumerate(WNIDS):
        for i in range(n):
            save(folder / "train" / wnid / "images" / f"{wnid}_{i * 5}.JPEG", 60 + 60 * place)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
        for i in range(tests):
            name = f"val_{place * tests + i}.JPEG"
            save(folder / "val" / "images" / name, 60 + 60 * place)
            lines.append(f"{name}\t{wnid}\t0\t32\t44\t62")
    save(folder / "test" / "images" / "test_1.JPEG", 9)
    (folder / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("n00001740\tentity\n" + "\n".join(f"{k}\t{v}" for k, v in WORDS.items()) + "\n")
    return folder


def zipped(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in sorted(folder.rglob("*")):
            opened.write(file, Path("tiny-imagenet-200") / file.relative_to(folder))


def test_tiny_imagenet_reads_the_official_folder_and_zip(tmp_path):
    folder = tiny(tmp_path / "d")
    data = load("tiny_imagenet", tmp_path / "d")
    assert data.images.shape == (24, 3, 64, 64)
    assert data.class_names == ("goldfish", "crane (n02124075)", "crane (n02437312)")
    assert data.groups_are_classes
    assert data.official_test.tolist() == [False] * 18 + [True] * 6
    assert data.counts()["n"].tolist() == [8, 8, 8]
    # Each class has a brightness of its own, in both parts.
    brightness = torch.tensor([120.0, 60, 180])[data.labels]
    assert (data.images.float().mean((1, 2, 3)) - brightness).abs().max() < 3
    grey = data.metadata["file_name"].tolist().index("train/n01443537/images/n01443537_0.JPEG")
    assert torch.equal(data.images[grey, 0], data.images[grey, 2])
    assert data.metadata["file_name"].tolist()[:3] == [f"train/n01443537/images/n01443537_{i}.JPEG" for i in (0, 5, 10)]
    assert data.metadata["wnid"].tolist()[-1] in WNIDS
    assert not data.skipped
    train, val, test = data.split(0)
    assert (len(train), len(val), len(test)) == (15, 3, 6)
    zipped(folder, tmp_path / "tiny-imagenet-200.zip")
    for root in (folder, tmp_path, tmp_path / "tiny-imagenet-200.zip"):
        again = load("tiny_imagenet", root)
        assert torch.equal(again.images, data.images)
        assert torch.equal(again.labels, data.labels)
        assert again.metadata.equals(data.metadata)
    assert load("tiny_imagenet", folder, image_size=32).images.shape == (24, 3, 32, 32)
    assert load("tiny_imagenet", folder, unbalanced="train").counts()["n"].tolist() == [5 + 2, 1 + 2, 1 + 2]


def test_images_of_tiny_imagenet_that_cannot_be_read_are_listed(tmp_path):
    folder = tiny(tmp_path)
    cut = folder / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_5.JPEG"
    cut.write_bytes(cut.read_bytes()[:400])
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    data = load("tiny_imagenet", tmp_path)
    assert len(data) == 22
    reasons = {item.file: item.reason for item in data.skipped}
    assert reasons.pop("val/images/val_1.JPEG") == "file does not exist"
    (name,) = reasons
    assert name.endswith("_5.JPEG")
    assert "not a readable image" in reasons[name]
    zipped(folder, tmp_path / "all.zip")
    again = load("tiny_imagenet", tmp_path / "all.zip")
    assert [item.file for item in again.skipped] == [item.file for item in data.skipped]
    assert torch.equal(again.images, data.images)
    # A byte of one image is turned over in the zip, whose checksum tells.
    whole = bytearray((tmp_path / "all.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "all.zip") as opened:
        held = opened.getinfo("tiny-imagenet-200/val/images/val_3.JPEG")
    whole[held.header_offset + 200] ^= 255
    (tmp_path / "flipped.zip").write_bytes(whole)
    assert "val/images/val_3.JPEG" in {item.file for item in load("tiny_imagenet", tmp_path / "flipped.zip").skipped}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "holds neither tiny-imagenet-200/wnids.txt nor tiny-imagenet-200.zip"),
        (lambda f: (f / "wnids.txt").unlink(), "wnids.txt does not exist"),
        (lambda f: (f / "words.txt").unlink(), "words.txt does not exist"),
        (lambda f: (f / "val" / "val_annotations.txt").unlink(), "val_annotations.txt does not exist"),
        (lambda f: (f / "wnids.txt").write_text(""), "wnids.txt names no class"),
        (lambda f: (f / "wnids.txt").write_text("n1\nn1\n"), "wnids.txt names n1 twice"),
        (lambda f: (f / "wnids.txt").write_bytes(b"\xff\xfe\xff"), "wnids.txt is no text"),
        (lambda f: (f / "words.txt").write_text("n01443537\tgoldfish\n"), "words.txt has no word for n02124075"),
        (lambda f: shutil.rmtree(f / "train" / WNIDS[1]), r"1 of 3 classes have no training image, first n01443537"),
        (lambda f: shutil.rmtree(f / "val" / "images"), "val/images holds none of the images"),
        (
            lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01443537\t0\t0\t1\t1\n"),
            r"val_annotations.txt lacks 5 images of its folder, first val/images/val_1.JPEG",
        ),
        (
            lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn9\t0\t0\t1\t1\n"),
            "line 1 of val/val_annotations.txt is no file, class and box",
        ),
        (
            lambda f: (f / "val" / "val_annotations.txt").write_text(
                "val_0.JPEG\tn01443537\t0\t0\t1\t1\nval_0.JPEG\tn02124075\t0\t0\t1\t1\n"
            ),
            "line 2 of val/val_annotations.txt names val_0.JPEG again",
        ),
    ],
)
def test_damaged_folders_of_tiny_imagenet_are_one_sentence(tmp_path, damage, message):
    damage(tiny(tmp_path))
    with pytest.raises(FairlineError, match=message) as caught:
        load("tiny_imagenet", tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_zips_of_tiny_imagenet_are_one_sentence(tmp_path):
    folder = tiny(tmp_path)
    zipped(folder, tmp_path / "whole.zip")
    raw = (tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "page.zip").write_bytes(b"<html>")
    for name in ("cut.zip", "page.zip"):
        with pytest.raises(FairlineError, match=f"{name} is not a whole zip file"):
            load("tiny_imagenet", tmp_path / name)
    for gone, message in (("wnids.txt", "holds no wnids.txt"), ("words.txt", "holds no words.txt")):
        kept = (folder / gone).read_bytes()
        (folder / gone).unlink()
        zipped(folder, tmp_path / "less.zip")
        with pytest.raises(FairlineError, match=message):
            load("tiny_imagenet", tmp_path / "less.zip")
        (folder / gone).write_bytes(kept)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar100:medium", {}, "no task 'medium'; choose fine or coarse"),
        ("cifar100", {"groups": "colour"}, "no column 'colour'"),
        ("cifar100", {"unbalanced": "test"}, "unbalanced must be"),
        ("cifar100", {"colour": 1}, "no option 'colour'"),
        ("tiny_imagenet:boxes", {}, "no option 'boxes'"),
        ("tiny_imagenet", {"unbalanced": 3}, "unbalanced must be"),
        ("tiny_imagenet", {"image_size": "wide"}, "image_size is pixels"),
    ],
)
def test_bad_requests_are_one_sentence(tmp_path, name, options, message):
    binary(tmp_path)
    with pytest.raises(FairlineError, match=message):
        load(name, tmp_path, **options)


def test_data_sets_are_known_by_their_files(tmp_path, monkeypatch):
    monkeypatch.delenv("FAIRLINE_DATA", raising=False)
    assert found_in() == ["digits"]
    binary(tmp_path / "cifar-100-binary")
    tiny(tmp_path)
    assert found_in(tmp_path) == ["digits", "cifar100", "tiny_imagenet"]


def test_the_command_lists_data_sets_and_shows_one(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FAIRLINE_DATA", raising=False)
    binary(tmp_path / "cifar-100-binary", copies=3)
    app(["data", "--root", str(tmp_path)], standalone_mode=False)
    listed = capsys.readouterr().out.splitlines()
    assert listed[:5] == ["✓ digits", "  utkface", "  cifar10", "✓ cifar100", "  tiny_imagenet"]
    app(["data", "cifar100:coarse", "--groups", "fine", "--root", str(tmp_path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "cifar100:coarse by fine: 400 images of 3×32×32, 20 classes, 100 groups" in shown
    assert "columns: fine, coarse" in shown
    (told,) = [finding.found for finding in examine(str(tmp_path)) if finding.what == "data sets"]
    assert told.startswith("here: digits, cifar100; others that can be read: utkface, cifar10, tiny_imagenet")
