"""Packed images: the same numbers as in memory, and one sentence for what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fairline as fl
from fairline.data import _images, _packing, load
from fairline.data._packed import PackedFile, PackedImages
from fairline.data.grouped import content_digest
from fairline.errors import FairlineError
from fairline.runs import DataSpec
from tests import commands
from tests.commands import fairline, ok
from tests.data.pictures import encoded

ROWS = 150


def write(folder: Path, rows: int = ROWS, size: tuple[int, int] = (12, 9)) -> Path:
    """Pictures of two classes and two groups; one is broken, one is listed without a label, two are alike."""
    folder.mkdir()
    lines = ["file_name,label,group"]
    for i in range(rows):
        pixels = np.random.default_rng(i if i != 11 else 10).integers(0, 180, (*size, 3)) + 60 * (i % 2)
        (folder / f"{i}.png").write_bytes(encoded(pixels.astype(np.uint8)) if i != 7 else b"broken")
        lines.append(f"{i}.png,{'' if i == 5 else i % 2},{'ab'[i // 2 % 2]}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FAIRLINE_PACKED", str(tmp_path / "packed"))
    monkeypatch.setitem(commands.ENVIRONMENT, "FAIRLINE_PACKED", str(tmp_path / "packed"))
    return tmp_path / "packed"


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "images")


OPTIONS = {"groups": "group", "image_size": (6, 8)}


@pytest.fixture
def both(root, place) -> tuple[fl.GroupedData, fl.GroupedData]:
    """The same data in memory and packed."""
    return load("folder", root, **OPTIONS), load("folder", root, pack=True, **OPTIONS)


def packed_folder(place: Path) -> Path:
    (folder,) = place.iterdir()
    return folder


def test_packed_and_in_memory_are_one_data_set(both):
    memory, packed = both
    assert isinstance(packed.images, PackedImages)
    assert torch.equal(packed.images[:], memory.images)
    assert packed.images.shape == memory.images.shape
    assert packed.skipped == memory.skipped
    assert {item.file for item in packed.skipped} == {"5.png", "7.png"}
    assert torch.equal(packed.content_ids(), memory.content_ids())
    assert content_digest(packed) == content_digest(memory)
    for seed in range(2):
        for ours, theirs in zip(packed.split(seed), memory.split(seed), strict=True):
            assert isinstance(ours.images, PackedImages)
            assert ours.images.file is packed.images.file
            assert torch.equal(ours.normalized(), theirs.normalized())
            assert (ours.mean, ours.std) == (theirs.mean, theirs.std)
            assert torch.equal(ours.labels, theirs.labels)
    thin = {"0": 0.5, "1": 0.9}
    assert torch.equal(packed.unbalance(thin, 3).images[:], memory.unbalance(thin, 3).images)


def test_fingerprints_stay_those_of_earlier_runs(both):
    expected = hashlib.blake2b(digest_size=16)
    for part in both[0].split(3):
        for tensor in (part.images, part.labels, part.groups):
            expected.update(tensor.numpy().tobytes())
    for data in both:
        for _ in range(2):
            assert content_digest(*data.split(3)) == expected.hexdigest()
        assert len({content_digest(*data.split(seed)) for seed in range(3)}) == 3
    assert len({content_digest(data, start=start) for start in ("", "a") for data in both}) == 2


@settings(max_examples=60)
@given(draw=st.data())
def test_views_of_views_index_as_tensors_do(draw, packed_numbers):
    images, views = packed_numbers
    for _ in range(draw.draw(st.integers(1, 3))):
        n = len(images)
        index = draw.draw(
            st.one_of(
                st.lists(st.integers(-n, n - 1), min_size=1, max_size=2 * n).map(torch.tensor),
                st.lists(st.booleans(), min_size=n, max_size=n).map(lambda chosen: torch.tensor(chosen).bool()),
                st.slices(n).filter(lambda cut: (cut.step or 1) > 0),
            )
        )
        images, views = images[index], views.view(index)
        assert torch.equal(views[:], images)
        assert views.shape == images.shape
        assert views.numel() == images.numel()
        if not len(images):
            return
    assert all(torch.equal(a, b) for a, b in zip(views.split(3), images.split(3), strict=True))


@pytest.fixture(scope="module")
def packed_numbers(tmp_path_factory) -> tuple[torch.Tensor, PackedImages]:
    images = torch.randint(0, 256, (40, 2, 3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with _packing.packing(tmp_path_factory.mktemp("packed") / "numbers", "numbers") as packing:
        for image in images:
            packing.add(image.numpy())
        return images, packing.finish((2, 3, 5))


def test_training_and_audit_give_the_same_bits(both):
    results = []
    for data in both:
        train, val, test = data.split(0)
        torch.manual_seed(0)
        model = fl.models.build("cnn", 2, image_size=(6, 8), width=4)
        history = fl.train(model, train, val, epochs=2, batch_size=32, lr=0.05, augment=True)
        (cut,) = fl.Magnitude().linearize(model, train, [0.5])
        report = fl.audit(
            cut.model, test, reference=model, measures=["accuracy", "gradient_norm", "boundary_distance"], resamples=50
        )
        losses = [{name: value for name, value in row.items() if name != "seconds"} for row in history]
        results.append((losses, cut.model.state_dict(), report.frame, report.predictions))
    (memory, weights, frame, samples), (packed, packed_weights, packed_frame, packed_samples) = results
    assert json.dumps(packed) == json.dumps(memory)
    assert all(torch.equal(packed_weights[name], value) for name, value in weights.items())
    assert packed_frame.equals(frame)
    assert packed_samples.equals(samples)


def test_too_large_data_are_packed_on_first_use_and_decoded_once(root, place, monkeypatch):
    memory = DataSpec("folder", str(root), OPTIONS).load()[0]
    monkeypatch.setenv("FAIRLINE_MEMORY_SHARE", "0")
    first = DataSpec("folder", str(root), OPTIONS).load()
    assert isinstance(first[1]["train"].images, PackedImages)
    monkeypatch.setattr(_images, "decode_image", None)
    again = DataSpec("folder", str(root), OPTIONS).load()
    assert first[0] == again[0] == memory
    # What is packed and fits is read whole.
    monkeypatch.delenv("FAIRLINE_MEMORY_SHARE")
    data = load("folder", root, **OPTIONS)
    assert isinstance(data.images, torch.Tensor)
    assert content_digest(data) == content_digest(load("folder", root, pack=True, **OPTIONS))


def test_only_what_decides_the_images_is_a_reason_to_decode_again(root, place, monkeypatch):
    load("folder", root, pack=True, **OPTIONS)
    calls = []
    decode = _images.decode_image
    monkeypatch.setattr(_images, "decode_image", lambda *args, **options: calls.append(1) or decode(*args, **options))
    other = load("folder", root, pack=True, groups="label", image_size=(6, 8))
    assert not calls
    assert other.group_names == ("0", "1")
    load("folder", root, pack=True, groups="group", image_size=(8, 6))
    assert len(calls) == ROWS - 1
    os.utime(root / "3.png")
    load("folder", root, pack=True, **OPTIONS)
    assert len(calls) == 2 * (ROWS - 1)


def test_sizes_of_their_own_are_kept_or_told(tmp_path, place, monkeypatch):
    root = write(tmp_path / "images")
    for i in range(40):
        (root / f"{i}.png").write_bytes(encoded(np.full((5, 4 + i % 2, 3), i, np.uint8)))
    memory = load("folder", root, image_size=None)
    monkeypatch.setenv("FAIRLINE_MEMORY_SHARE", "0")
    packed = load("folder", root, image_size=None)
    assert packed.images.shape[1:] == (3, 12, 9)
    assert packed.skipped == memory.skipped
    assert torch.equal(packed.images[:], memory.images)
    assert sorted(file.name for file in packed_folder(place).iterdir()) == [
        "images.u8", "index.safetensors", "packed.json",
    ]  # fmt: skip


PACK = """
import sys
from fairline.data import _images, _packing, load
_packing.BLOCK = 1000
decode = _images.decode_image
def slowly(*args, **options):
    print("decoded", flush=True)
    return decode(*args, **options)
_images.decode_image = slowly
_images._CHUNK, _images._THREADS = 1, 1
load("folder", sys.argv[1], pack=True, groups="group", image_size=(6, 8))
"""


def test_packing_goes_on_after_kill_9(root, place, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", PACK, str(root)], stdout=subprocess.PIPE, text=True)
    for _ in range(70):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = place.iterdir()
    assert partial.suffix == ".partial"
    assert (partial / "journal.jsonl").stat().st_size
    # A block that was being written is cut off.
    for file in partial.glob("3x6x8.*"):
        with file.open("ab") as opened:
            opened.write(b"half")
    with (partial / "journal.jsonl").open("ab") as opened:
        opened.write(b"[[[3, 6")
    rest = subprocess.run([sys.executable, "-c", PACK, str(root)], capture_output=True, text=True, check=True)
    assert 10 < rest.stdout.count("decoded") < ROWS - 40
    packed = load("folder", root, pack=True, **OPTIONS)
    assert packed_folder(place).suffix != ".partial"
    monkeypatch.setenv("FAIRLINE_PACKED", str(place.with_name("nowhere")))
    memory = load("folder", root, **OPTIONS)
    assert torch.equal(packed.images[:], memory.images)
    assert packed.skipped == memory.skipped


def test_two_that_pack_at_once_share_the_work(root, place, monkeypatch):
    calls, found = [], []
    decode = _images.decode_image
    monkeypatch.setattr(_images, "decode_image", lambda *args, **options: calls.append(1) or decode(*args, **options))
    threads = [
        threading.Thread(target=lambda: found.append(load("folder", root, pack=True, **OPTIONS))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(data.images[:], found[0].images[:]) for data in found)
    # One size is given, so nothing is decoded to guess how large they are.
    assert len(calls) == ROWS - 1
    assert packed_folder(place)


def damage(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["images.u8", "index.safetensors", "packed.json"])
@pytest.mark.parametrize("how", ["cut short", "a byte flipped", "gone", "longer"])
def test_damage_is_one_sentence(root, place, name, how):
    load("folder", root, pack=True, **OPTIONS)
    file = packed_folder(place) / name
    if how == "cut short":
        os.truncate(file, file.stat().st_size - 5)
    elif how == "a byte flipped":
        damage(file, file.stat().st_size * 2 // 3)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b"xx")
    done = fairline("data", "folder", "--root", root, "--groups", "group", "--data-option", "image_size=6x8", "--pack")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(packed_folder(place)) in done.stderr.replace("\n", "")


def test_a_damaged_image_is_found_when_it_is_first_read(both, place):
    packed = both[1].images
    damage(packed_folder(place) / "images.u8", 20 * packed.file.row + 3)
    packed = PackedImages(PackedFile(packed.file.folder))
    assert torch.equal(packed[:20], both[0].images[:20])
    for _ in range(2):
        with pytest.raises(FairlineError, match=r"images.u8 is damaged: image 20 is not what was packed"):
            packed[torch.tensor([3, 20, 19])]
    os.truncate(packed.file.file, 10)
    with pytest.raises(FairlineError, match="cut short while it was read"):
        packed[30:40]


def test_numbers_kept_beside_the_images_are_found_again_if_they_are_damaged(root, place):
    expected = load("folder", root, pack=True, **OPTIONS).split(0)[0].normalization()
    file = packed_folder(place) / "derived.json"
    for text in ("", "[]", '{"a": 1}', file.read_text().replace("0.", "0.1")):
        file.write_text(text)
        assert load("folder", root, pack=True, **OPTIONS).split(0)[0].normalization() == expected
    file.unlink()
    # Nowhere to keep them.
    file.mkdir()
    assert load("folder", root, pack=True, **OPTIONS).split(0)[0].normalization() == expected


def test_images_of_other_data_are_refused(root, place):
    load("folder", root, pack=True, **OPTIONS)
    folder = packed_folder(place)
    load("folder", root, pack=True, groups="group", image_size=4)
    (other,) = set(place.iterdir()) - {folder}
    name = other.name
    other.rename(place / "aside")
    folder.rename(place / name)
    with pytest.raises(FairlineError, match=f"{name} holds packed images of other data"):
        load("folder", root, pack=True, groups="group", image_size=4)


def test_a_disk_too_small_is_told_before(root, place, monkeypatch):
    monkeypatch.setattr(_packing.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(FairlineError, match=r"takes 0.0 MB more, but .*packed has 0.0 MB left; the variable"):
        load("folder", root, pack=True, **OPTIONS)


FULL = """
import resource, sys
from fairline.data import _packing, load
from fairline.errors import FairlineError
_packing.BLOCK = 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    load("folder", sys.argv[1], pack=True, groups="group", image_size=(6, 8))
except FairlineError as error:
    print(error)
"""


def test_a_disk_full_in_between_is_told_and_nothing_half_made_is_taken(root, place):
    done = subprocess.run([sys.executable, "-c", FULL, str(root)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Images cannot be packed in {place} (File too large); the variable FAIRLINE_PACKED")
    assert all(folder.suffix == ".partial" for folder in place.iterdir())
    packed = load("folder", root, pack=True, **OPTIONS)
    assert len(packed) == ROWS - 2
    assert torch.equal(packed.images[:], load("folder", root, **OPTIONS).images)


def test_memory_share_is_a_share(root, monkeypatch):
    for text in ("much", "1.5", "-1"):
        monkeypatch.setenv("FAIRLINE_MEMORY_SHARE", text)
        with pytest.raises(FairlineError, match=f"a share of memory from 0 to 1, not '{text}'"):
            load("folder", root, **OPTIONS)


def test_from_the_command_line(root, place, tmp_path, monkeypatch):
    data = ["folder", "--root", root, "--groups", "group", "--data-option", "image_size=6x8"]
    train = ["train", "--data", *data, "--model", "cnn", "--width", "2", "--epochs", "1", "--out"]
    ok(*train, tmp_path / "memory-run")
    said = ok("data", *data, "--pack")
    assert f"The images are packed in {packed_folder(place)}" in said
    monkeypatch.setitem(commands.ENVIRONMENT, "FAIRLINE_MEMORY_SHARE", "0")
    ok(*train, tmp_path / "packed-run")
    runs = [tmp_path / name / "networks" / "base" for name in ("packed-run", "memory-run")]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1
    assert len({(run.parents[1] / "config.json").read_text() for run in runs}) == 1
    assert "knows no option 'pack'" in fairline("data", "digits", "--pack").stderr


def same(ours: fl.GroupedData, theirs: fl.GroupedData) -> bool:
    plain = ("class_names", "group_names", "name", "mean", "std", "flip", "skipped")
    return content_digest(ours) == content_digest(theirs) and all(
        getattr(ours, name) == getattr(theirs, name) for name in plain
    )


def test_data_packed_by_hand_say_all_of_themselves(tmp_path):
    data = load("digits")
    packed = data.pack(tmp_path / "a" / "digits")
    (tmp_path / "a").rename(tmp_path / "b")
    again = load("packed", tmp_path / "b" / "digits")
    for found in (packed, again):
        assert isinstance(found.images, PackedImages)
        assert same(found, data)
        assert torch.equal(found.official_test, data.official_test)
    train = data.split(0)[0]
    assert same(again.split(0)[0].pack(tmp_path / "train"), train)
    assert same(train.pack(tmp_path / "train"), train)
    with pytest.raises(FairlineError, match="train holds packed images of other data"):
        data.pack(tmp_path / "train")
    with pytest.raises(FairlineError, match="Data 'packed' knows no option 'flip'"):
        load("packed", tmp_path / "train", flip=True)
    with pytest.raises(FairlineError, match=r"packed.json does not exist"):
        load("packed", tmp_path)


def test_packed_images_alone_are_no_data(root, place):
    load("folder", root, pack=True, **OPTIONS)
    with pytest.raises(FairlineError, match="holds images only; load the data set"):
        load("packed", packed_folder(place))


class Numbers:
    """40 images; counts those that are asked for, and fails at some."""

    def __init__(self, fails_at: int = 99) -> None:
        self.asked: list[int] = []
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 40

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.float32, str]:
        self.asked.append(position)
        if position == self.fails_at:
            raise KeyboardInterrupt
        pixels = np.random.default_rng(position).integers(0, 256, (3, 5, 3), dtype=np.uint8)
        return pixels, np.float32(position % 2), "no" if position % 3 else "yes"


def test_a_data_set_of_ones_own_is_packed_once_and_goes_on(tmp_path):
    memory = fl.GroupedData.from_dataset(Numbers())
    with pytest.raises(KeyboardInterrupt):
        fl.GroupedData.from_dataset(Numbers(fails_at=25), pack=tmp_path / "packed")
    rest = Numbers()
    packed = fl.GroupedData.from_dataset(rest, pack=tmp_path / "packed")
    assert rest.asked == [0, *range(25, 40)]
    assert same(packed, memory)
    whole = Numbers()
    assert same(fl.GroupedData.from_dataset(whole, pack=tmp_path / "packed"), memory)
    assert whole.asked == [0]
    assert same(load("packed", tmp_path / "packed"), memory)
    with pytest.raises(FairlineError, match="holds packed images of other data"):
        fl.GroupedData.from_dataset(Numbers(), name="others", pack=tmp_path / "packed")
    with pytest.raises(FairlineError, match="twice"):
        fl.GroupedData.from_dataset(Numbers(), class_names=["a", "a"], pack=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_half_packed_images_of_other_data_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fl.GroupedData.from_dataset(Numbers(fails_at=5), pack=tmp_path / "packed")
    with pytest.raises(FairlineError, match=r"packed.partial holds half-packed images of other data; delete it"):
        fl.GroupedData.from_dataset(Numbers(), name="others", pack=tmp_path / "packed")
    damage(tmp_path / "packed.partial" / "journal.jsonl", 0)
    with pytest.raises(FairlineError, match=r"journal.jsonl is damaged; delete .*packed.partial"):
        fl.GroupedData.from_dataset(Numbers(), pack=tmp_path / "packed")


def test_data_too_large_for_memory_that_are_not_packed_are_told(monkeypatch, caplog):
    monkeypatch.setenv("FAIRLINE_MEMORY_SHARE", "0")
    fl.GroupedData.from_dataset(Numbers(), name="numbers")
    assert "numbers: from_dataset(pack=FOLDER) keeps the images in a file instead of in memory" in caplog.text


def test_a_view_can_be_sent_to_another_process(packed_numbers):
    images, views = packed_numbers
    (sent,) = pickle.loads(pickle.dumps([views.view(torch.tensor([3, 1]))]))
    assert torch.equal(sent[:], images[[3, 1]])


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "larger_than_memory.py"


@pytest.mark.slow
def test_images_are_not_held():
    """Training on and auditing 1 GB of images takes less than half of that, mapped pages counted."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--gigabytes", "1", "--steps", "3", "--samples", "200", "--rounds", "0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    resident = [float(line.split()[-4]) for line in done.stdout.splitlines() if line.endswith("GB at most")]
    assert len(resident) == 5
    assert resident[-1] - resident[0] < 0.5
