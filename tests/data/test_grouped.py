from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fairline.data import GroupedData
from fairline.errors import FairlineError
from tests.conftest import make_data


def grouped(labels, groups, ids=None) -> GroupedData:
    """One-pixel images; equal ids make byte-identical images."""
    n = len(labels)
    ids = range(n) if ids is None else ids
    images = torch.zeros(n, 1, 1, 4, dtype=torch.uint8)
    for i, number in enumerate(ids):
        images[i, 0, 0] = torch.tensor([number % 256, number // 256 % 256, 7, 7], dtype=torch.uint8)
    names = [tuple(map(str, range(max(x) + 1))) for x in (labels, groups)]
    return GroupedData(images, torch.tensor(labels), torch.tensor(groups), *names)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(12, 60), min_size=1, max_size=4),
    copies=st.integers(0, 5),
    seed=st.integers(0, 3),
)
def test_split_is_a_stratified_partition_that_keeps_copies_together(sizes, copies, seed):
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    labels = [i % 2 for i in range(len(groups))]
    ids = list(range(len(groups)))
    rng = np.random.default_rng(seed)
    for _ in range(copies):
        a, b = rng.integers(len(ids), size=2)
        ids[a] = ids[b]
    data = grouped(labels, groups, ids)
    train, val, test = data.split(seed, val=0.1, test=0.2)
    where = [set(map(bytes, part.images.numpy().reshape(len(part), -1))) for part in (train, val, test)]
    assert not any(a & b for a, b in itertools.combinations(where, 2))
    assert len(train) + len(val) + len(test) == len(data)
    for group, size in enumerate(sizes):
        slack = 1 + 2 * copies
        assert abs(int((test.groups == group).sum()) - 0.2 * size) <= slack
        assert abs(int((val.groups == group).sum()) - 0.08 * size) <= slack


def test_split_is_exact_without_copies_and_depends_on_the_seed_alone():
    data = grouped([i % 5 for i in range(1000)], [0 if i < 900 else 1 for i in range(1000)])
    train, val, test = data.split(3)
    assert test.counts()["n"].tolist() == [180, 20]
    assert val.counts()["n"].tolist() == [72, 8]
    assert len(train) == 720
    # Within a group every class is dealt evenly.
    assert test.counts(by="class").loc["0"].tolist() == [36] * 5
    assert torch.equal(data.split(3)[2].images, test.images)
    assert not torch.equal(data.split(4)[2].images, test.images)


def test_every_part_uses_the_training_parts_normalisation(parts):
    train, val, test = parts
    assert train.mean == val.mean == test.mean
    pixels = train.images.double() / 255
    assert train.mean == pytest.approx([pixels.mean().item()])
    assert train.std == pytest.approx([pixels.std(correction=0).item()])
    seen = train.normalized()
    assert seen.dtype == torch.float32
    assert seen.mean().item() == pytest.approx(0, abs=1e-5)
    assert seen.std().item() == pytest.approx(1, abs=1e-3)
    index = torch.tensor([3, 1])
    torch.testing.assert_close(train.normalized(index), seen[index])


def test_official_test_split_stays_whole_and_does_not_leak():
    data = grouped([0] * 20, [0] * 20, ids=[*range(15), 3, 16, 17, 18, 19])
    official = torch.zeros(20, dtype=torch.bool)
    official[15:] = True
    data = GroupedData(data.images, data.labels, data.groups, ("0",), ("0",), official_test=official)
    train, val, test = data.split(0)
    assert torch.equal(test.images, data.images[15:])
    assert len(train) + len(val) == 14
    assert 3 not in torch.cat([train.images, val.images])[:, 0, 0, 0]


def test_unbalance_keeps_the_fractions_exactly():
    data = grouped([i % 4 for i in range(400)], [0] * 400)
    thin = data.unbalance({0: 0.9, "1": 0.1, 2: 0.0}, seed=1)
    assert torch.bincount(thin.labels, minlength=4).tolist() == [90, 10, 0, 100]
    assert torch.equal(data.unbalance({0: 0.9, "1": 0.1, 2: 0.0}, seed=1).images, thin.images)


def test_counts_name_every_group():
    data = make_data(100, classes=2, groups=3)
    table = data.counts()
    assert table["n"].sum() == 100
    assert table["share_percent"].sum() == pytest.approx(100)
    assert data.counts(by="class").sum().sum() == 100
    assert not data.groups_are_classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 1, 2, 2)}, "uint8"),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8)}, "no usable image"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "run from 0 to 2, but there are 2 names"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "run from -1"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, "shape"),
        ({"groups": torch.zeros(4)}, "int64"),
        ({"group_names": ("a", "a")}, "twice"),
        ({"group_names": ("a", "overall")}, "overall"),
        ({"official_test": torch.zeros(3, dtype=torch.bool)}, "official_test"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    fields = {
        "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 1, 0]),
        "groups": torch.tensor([0, 1, 1, 0]),
        "class_names": ("x", "y"),
        "group_names": ("a", "b"),
    }
    with pytest.raises(FairlineError, match=message):
        GroupedData(**{**fields, **change})


def test_bad_requests_are_one_sentence():
    data = grouped([0, 1] * 20, [0] * 40)
    with pytest.raises(FairlineError, match="there is no class 'z'; the classes are 0, 1"):
        data.unbalance({"z": 0.5})
    with pytest.raises(FairlineError, match="not in"):
        data.unbalance({0: 1.5})
    with pytest.raises(FairlineError, match="between 0 and 1"):
        data.split(0, val=0)
    with pytest.raises(FairlineError, match="too few for 3 parts"):
        grouped([0] * 12, [0] * 10 + [1] * 2).split(0)
    empty = GroupedData(data.images, data.labels, data.groups, ("0", "1"), ("there", "gone"))
    with pytest.raises(FairlineError, match="'gone' has no image"):
        empty.split(0)


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_from_dataset_reads_pil_arrays_and_tensors_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    forms = {
        "pil": [Image.fromarray(p) for p in pixels],
        "array": list(pixels),
        "uint8": [torch.from_numpy(p).permute(2, 0, 1) for p in pixels],
        "float": [torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pixels],
    }
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for images in forms.values():
        data = GroupedData.from_dataset(Items([(image, i % 2, i % 3) for i, image in enumerate(images)]))
        assert torch.equal(data.images, expected)
        assert data.images.is_contiguous()
        assert data.labels.tolist() == [0, 1] * 3
        assert data.groups.tolist() == [0, 1, 2] * 2
    by_label = GroupedData.from_dataset(Items([(pixels[0], 0), (pixels[1], 1)]), class_names=["x", "y"])
    assert by_label.groups_are_classes


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "empty"),
        ([torch.zeros(3)], "not .image, label."),
        ([(torch.full((1, 2, 2), 7.0), 0)], "must lie in"),
        ([(torch.zeros(1, 2, 2, dtype=torch.int32), 0)], "uint8 or float"),
        ([(torch.zeros(1, 2, 2), "cat"), (torch.zeros(1, 2, 2), 0)], "label of item 0 is 'cat', which is not a number"),
        ([(torch.zeros(1, 2, 2), -1)], "negative"),
        ([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 3), 0)], "image 1 has shape"),
    ],
)
def test_from_dataset_refuses(items, message):
    with pytest.raises(FairlineError, match=message):
        GroupedData.from_dataset(Items(items))


@pytest.mark.parametrize("official", [True, False])
def test_a_class_or_group_that_a_part_lacks_is_told(official):
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1)
    labels, groups = torch.zeros(60, dtype=torch.int64), torch.arange(60) % 2
    labels[59] = 1
    test = torch.arange(60) >= 40
    names = (("a", "rare"), ("g", "h"))
    data = GroupedData(images, labels, groups, *names, official_test=test if official else None)
    refused = 0
    for seed in range(30):
        try:
            train, _, _ = data.split(seed)
        except FairlineError as error:
            assert "class 'rare' has 1 images, but none in the training part" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert (train.labels == 1).any()
    assert refused == 30 if official else 0 < refused < 30
    for chosen, message in [
        (groups * ~test, "the test part needs every group, but 'h' has no image"),
        (test.long(), "group 'h' has 0 distinct images outside of the official test part, too few for 2 parts"),
    ]:
        with pytest.raises(FairlineError, match=message):
            GroupedData(images, labels * 0, chosen, *names, official_test=test).split(0)


def test_names_are_cleaned_and_told_apart():
    images, index = torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.arange(2)
    data = GroupedData(images, index, index, (None, float("nan")), (" NA ", "e\u0301"))
    assert data.class_names == ("None", "nan")
    assert data.group_names == ("NA", "é")
    for names, message in [
        (("é", "e\u0301"), "twice"),
        (("a", "a "), "twice"),
        (("a", " "), "the name of number 1 of the groups is empty"),
        (("worst group", "a"), "cannot be called 'worst group'"),
    ]:
        with pytest.raises(FairlineError, match=message):
            GroupedData(images, index, index, ("x", "y"), names)


PIXEL = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("labels", "class_names", "expected", "names"),
    [
        (["cat", "ant", "cat"], None, [1, 0, 1], ("ant", "cat")),
        (["cat", "ant", "cat"], ["cat", "ant"], [0, 1, 0], ("cat", "ant")),
        ([2.0, np.float32(0), np.int64(5)], None, [2, 0, 5], ("0", "1", "2", "3", "4", "5")),
        ([torch.tensor(1), torch.tensor([0]), True], None, [1, 0, 1], ("0", "1")),
        ([[0, 1, 0], torch.tensor([1.0, 0, 0]), np.array([0, 0, 1])], None, [1, 0, 2], ("0", "1", "2")),
        (["NA", "nan", "None"], None, [0, 2, 1], ("NA", "None", "nan")),
        (["10", "9", "9"], None, [1, 0, 0], ("9", "10")),
    ],
)
def test_from_dataset_takes_labels_in_other_forms(labels, class_names, expected, names):
    data = GroupedData.from_dataset([(PIXEL, label) for label in labels], class_names=class_names)
    assert data.labels.tolist() == data.groups.tolist() == expected
    assert data.class_names == data.group_names == names
    apart = GroupedData.from_dataset([(PIXEL, 0, label) for label in labels], group_names=class_names)
    assert (apart.groups.tolist(), apart.group_names) == (expected, names)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (1.5, "the label of item 1 is 1.5, which is not a whole number"),
        (float("nan"), "the label of item 1 is missing"),
        (None, "the label of item 1 is missing"),
        ("cat", "the label of item 1 is 'cat', which is not a number"),
        ([1, 1], "neither one value nor a one-hot vector"),
        (-1, "negative"),
        ({"a": 1}, "not a whole number"),
    ],
)
def test_from_dataset_refuses_labels_that_mean_none(label, message):
    with pytest.raises(FairlineError, match=message):
        GroupedData.from_dataset([(PIXEL, 0), (PIXEL, label)])
    with pytest.raises(FairlineError, match="only 1 of the 2 items have a group"):
        GroupedData.from_dataset([(PIXEL, 0), (PIXEL, 0, 1)])
    with pytest.raises(FairlineError, match="is 2, but there are 2 names"):
        GroupedData.from_dataset([(PIXEL, 2)], class_names=["a", "b"])
