"""Recall of classes, and of classes in groups, against counting image by image."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

import fairline as fl
from fairline.audit.paired import change_interval
from fairline.errors import FairlineError


@pytest.fixture
def crossed(parts):
    """Groups that are no classes."""
    test = parts[2]
    return replace(test, groups=torch.arange(len(test)) % 2, group_names=("even", "odd"))


def test_recalls_and_changes_by_counting(crossed, trained):
    test = crossed
    torch.manual_seed(0)
    before = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(test.num_classes)).eval()
    before(test.normalized(slice(1)))
    report = fl.audit(trained, test, before, name="m", resamples=200)
    right = {}
    for network, name in ((trained, "own"), (before, "before")):
        network.eval()
        right[name] = (network(test.normalized(slice(len(test)))).argmax(1) == test.labels).tolist()
    sets = defaultdict(list)
    for image, (group, label) in enumerate(zip(test.groups.tolist(), test.labels.tolist(), strict=True)):
        group, label = test.group_names[group], test.class_names[label]
        for key in (("overall", ""), (group, ""), ("overall", label), (group, label)):
            sets[key].append(image)
    rows = report.frame.set_index(["group", "class", "measure"])
    for (group, label), images in sets.items():
        own = sum(right["own"][image] for image in images)
        lost = sum(right["before"][image] and not right["own"][image] for image in images)
        gained = sum(right["own"][image] and not right["before"][image] for image in images)
        share = rows.loc[(group, label, "recall" if label else "accuracy")]
        assert share["value"] == pytest.approx(own / len(images))
        assert share["n"] == len(images)
        assert share["low"] < share["high"]
        change = rows.loc[(group, label, "recall_change" if label else "accuracy_change")]
        assert change["value"] == pytest.approx(100 * (gained - lost) / len(images))
        assert [change["low"], change["high"]] == pytest.approx(
            [100 * float(limit) for limit in change_interval(lost, gained, len(images))]
        )
    recalls = [rows.loc[("overall", name, "recall"), "value"] for name in test.class_names]
    assert report.overall["balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
    assert report.by_class["recall"].tolist() == pytest.approx(recalls)
    assert set(report.by_group_and_class.index) == {key for key in sets if key[0] != "overall" and key[1]}
    assert "recall" not in report.by_group
    judged = report.verdict(within=1, critical=[test.class_names[0]])
    assert judged.overall["after"] == pytest.approx(report.overall["accuracy"])
    with pytest.raises(FairlineError, match="reference"):
        fl.audit(trained, test).verdict()


def test_a_class_without_images_has_no_row(crossed, trained):
    only = crossed.select((crossed.labels != 0).nonzero().flatten())
    report = fl.audit(trained, only)
    assert crossed.class_names[0] not in report.by_class.index
    assert report.overall["balanced_accuracy"] == pytest.approx(report.by_class["recall"].mean())
    assert set(report.by_group_and_class.index.get_level_values("group")) == {"even", "odd"}
