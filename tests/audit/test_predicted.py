"""An audit of predictions alone says what an audit of the network that made them says."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fairline as fl
from fairline.errors import FairlineError
from tests.commands import ok


def softmax(network, data):
    network.eval()
    return network(data.normalized(slice(len(data)))).double().softmax(1)


@pytest.fixture
def two(parts, trained):
    """A test part, what two networks say of it, and the second network."""
    test = parts[2]
    torch.manual_seed(0)
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(test.num_classes)).eval()
    with torch.no_grad():
        return test, softmax(trained, test), softmax(other, test), other


def names_of(names, index):
    return [names[place] for place in index.tolist()]


@pytest.mark.parametrize("container", [list, np.array, pd.Series, pd.Categorical])
def test_classes_say_what_the_network_says(two, trained, container):
    test, own, before, other = two
    truth, groups = names_of(test.class_names, test.labels), names_of(test.group_names, test.groups)
    told = [container(names_of(test.class_names, each.argmax(1))) for each in (own, before)]
    report = fl.audit_predictions(container(truth), told[0], container(groups), told[1], resamples=100)
    expected = fl.audit(trained, test, other, resamples=100).frame
    expected = expected[expected["measure"] != "loss"].reset_index(drop=True)
    # The order of the groups, of which the draws of all images depend, is the alphabet's here.
    keys = ["group", "class", "measure"]
    exact, ours = (each.set_index(keys)[["value", "n"]].sort_index() for each in (expected, report.frame))
    pd.testing.assert_frame_equal(ours, exact)
    assert report.verdict().answer == fl.audit(trained, test, other, resamples=100).verdict().answer
    assert "loss" not in report.predictions


def test_probabilities_have_a_loss(two, trained):
    test, own, _, _ = two
    expected = fl.audit(trained, test, resamples=50).by_group["loss"]
    groups = names_of(test.group_names, test.groups)
    frame = pd.DataFrame(own.numpy(), columns=list(test.class_names))
    shuffled = frame[list(frame)[::-1]]
    truth = names_of(test.class_names, test.labels)
    for told, options in ((frame, {}), (shuffled, {}), (own, {"class_names": test.class_names})):
        report = fl.audit_predictions(truth, told, groups, resamples=50, **options)
        assert report.by_group["loss"][expected.index].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    by_number = fl.audit_predictions(test.labels, own, groups, resamples=50)
    assert by_number.overall["accuracy"] == pytest.approx((own.argmax(1) == test.labels).double().mean().item())


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.sampled_from("xy")), min_size=1, max_size=40)
)
def test_accuracies_by_counting(rows):
    truth, told, groups = zip(*rows, strict=True)
    by_group = fl.audit_predictions(truth, told, groups, resamples=20).by_group["accuracy"]
    for group in set(groups):
        own = [t == p for t, p, g in rows if g == group]
        assert by_group[group] == pytest.approx(sum(own) / len(own))


def test_columns_are_intersected_and_binned():
    truth = [1, 0, 1, 0, 1.0]
    table = {"sex": ["f", "m", "f", "m", None], "age": [5, 20, 30, 8, 9]}
    report = fl.audit_predictions(truth, [1, 1, 1, 0, 1], table, by="sex,age:0-17,18+", resamples=10)
    assert set(report.by_group.index) == {"f × 0–17", "m × 18+", "f × 18+", "m × 0–17", "no sex × 0–17"}
    assert report.by_group.loc["m × 18+", "accuracy"] == 0
    assert set(fl.audit_predictions(truth, truth, table, by="age:0-9,10+", resamples=10).by_group.index) == {
        "0–9",
        "10+",
    }


HALF = [[0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a", "b"], ["a"], ["x", "y"]), "predicted has 1 rows, but y_true has 2"),
        ((["a", "b"], ["a", "b"], ["x"]), "column 'group' of groups has 1 rows, but y_true has 2"),
        ((["a", "b"], ["a", None], ["x", "y"]), "predicted has no class in row 1"),
        ((["a", "b"], [[0.9, 0.2], [0.5, 0.5]], ["x", "y"]), "row 0: they must lie in .* add up to 1, not to 1.1"),
        ((["a", "b"], [[0.5, 0.5], [float("nan"), 1]], ["x", "y"]), "row 1"),
        ((["a", "b"], [["u", "v"]] * 2, ["x", "y"]), "no numbers"),
        ((["a", "b"], [[0.2, 0.3, 0.5]] * 2, ["x", "y"]), "3 columns of probabilities for 2 classes"),
        ((["a", "b"], pd.DataFrame(HALF, columns=["a", "c"]), ["x", "y"]), "class 'b' in row 1"),
        (
            (["a", "b"], ["a", "b"], ["x", "y"], pd.DataFrame(HALF, columns=["a", "c"])),
            "class 'b' in row 1|classes a, c",
        ),
        ((["a", "b"], ["a", "b"], {}), "The groups have no column"),
        (([], [], []), "one class a sample"),
        (([0, 1], [False, True], ["x", "y"]), "predicted has the classes False, True, and y_true has 0, 1, so none"),
        (([1, 2], ["1.0", "2.0"], ["x", "y"]), "write them alike"),
        (([0, 1], np.array([0.2, 0.7]), ["x", "y"]), "predicted has the classes 0.2, 0.7, and y_true has 0, 1"),
    ],
)
def test_what_is_no_prediction_is_one_sentence(arguments, words):
    with pytest.raises(FairlineError, match=words):
        fl.audit_predictions(*arguments)


@pytest.fixture
def table(two, tmp_path):
    test, own, before, _ = two
    frame = pd.DataFrame(
        {
            "label": names_of(test.class_names, test.labels),
            "group": names_of(test.group_names, test.groups),
            "half": (torch.arange(len(test)) % 2).tolist(),
            "prediction": names_of(test.class_names, own.argmax(1)),
            **{f"p_{name}": own[:, place].numpy() for place, name in enumerate(test.class_names)},
            "before": names_of(test.class_names, before.argmax(1)),
        }
    )
    frame.to_csv(tmp_path / "said.csv", index=False)
    frame.to_parquet(tmp_path / "said.parquet")
    return tmp_path


def test_a_table_becomes_a_page(table):
    printed = ok("audit", "--predictions", table / "said.csv", "--reference", "before", "--out", table / "run")
    assert "points of the reference" in printed
    ok("report", table / "run", "--figures", table / "figures")
    page = (table / "run" / "report.html").read_text(encoding="utf-8")
    assert "each group is a class" in page
    assert (table / "figures" / "groups.png").stat().st_size > 5000
    same = ok("audit", "--predictions", table / "said.parquet", "--prediction", "p_*", "--out", table / "probable")
    assert "by class" in same
    ours, other = (pd.read_parquet(table / name / "audit.parquet") for name in ("run", "probable"))
    accuracy = [each[each["measure"] == "accuracy"].set_index("group")["value"] for each in (ours, other)]
    pd.testing.assert_series_equal(*accuracy)
    assert "loss" in set(other["measure"])
    config = json.loads((table / "run" / "config.json").read_text())
    assert config["predictions"]["digest"]
    ok("audit", "--predictions", table / "said.csv", "--groups", "half,group", "--out", table / "both")
    ok("report", table / "both")
    assert "Each class in each group" in (table / "both" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--predictions", "gone.csv"], "There is no file"),
        (["--predictions", "said.csv", "--label", "truth"], "has no column 'truth'"),
        (["--predictions", "said.csv", "--prediction", "q_*"], "has no two columns 'q_*'"),
        (["--predictions", "said.csv", "--groups", "colour"], "colour"),
        (["--predictions", "said.csv", "--prediction", "p_*", "--label", "p_class 1"], "y_true has the class"),
        (["said.csv", "--predictions", "said.csv"], "no runs, --explain or --option"),
        ([], "at least one run"),
    ],
)
def test_a_table_that_will_not_do_is_one_sentence(table, refused, arguments, words):
    told = [table / each if str(each).endswith(".csv") else each for each in arguments]
    assert words in refused("audit", *told, "--out", table / "out")
    assert not (table / "out").exists()
