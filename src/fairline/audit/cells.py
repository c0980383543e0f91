"""Who there is to lose: all images, the groups, the classes, and the images of a class in a group.

A network that is as right as before overall and in each group may still have given up a class, or a class in one group.
So every set of images that a loss could hide in is counted, each set once: a class that is a group (as in the paper's
data), and a class in a group that is all of either, are named by the group or the class alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from fairline.data.grouped import OVERALL

#: What a set of images is.
KINDS = ("overall", "group", "class", "cell")

#: Counted of each set where there is a control.
CONTROL = ["control_after", "control_lost", "control_gained"]


def cells(predictions: pd.DataFrame) -> pd.DataFrame:
    """Count what two networks get right in each set of images.

    Args:
        predictions: A row an image: ``label``, ``group``, ``correct`` of the network and ``reference_correct`` of the
            one that it is compared with; ``control_correct`` of the one that kept all its ReLUs and was finetuned
            alike, where there is one.

    Returns:
        A row a set of images: ``kind`` (:data:`KINDS`), ``group`` (``overall`` for all), ``class`` (empty for all; of a
        group that is a class, its name), ``n`` images, right ``before`` (of the reference) and ``after``, ``lost``
        (right before alone) and ``gained`` (after alone). With a control, what that gets right (``control_after``), and
        ``control_lost`` and ``control_gained``, where the network differs from it.

    >>> images = pd.DataFrame(
    ...     {"label": ["cat", "cat", "dog"], "group": ["old", "young", "young"], "correct": [True, False, True],
    ...      "reference_correct": [True, True, False]})
    >>> cells(images).query("lost > 0")[["kind", "group", "class"]].to_numpy().tolist()
    [['overall', 'overall', ''], ['group', 'young', ''], ['class', 'overall', 'cat'], ['cell', 'young', 'cat']]
    """
    before, after = (predictions[name].astype(bool) for name in ("reference_correct", "correct"))
    told = {"n": True, "before": before, "after": after, "lost": before & ~after, "gained": after & ~before}
    if "control_correct" in predictions:
        control = predictions["control_correct"].astype(bool)
        told |= dict(zip(CONTROL, (control, control & ~after, after & ~control), strict=True))
    counts = list(told)
    counted = pd.DataFrame(
        {"group": predictions["group"].astype(str), "class": predictions["label"].astype(str), **told}
    ).astype(dict.fromkeys(counts, int))
    both = counted.groupby(["group", "class"], sort=False, as_index=False)[counts].sum()
    groups = both.groupby("group", sort=False)[counts].sum()
    classes = both.groupby("class", sort=False)[counts].sum()
    whole_group = both["n"].to_numpy() == groups.loc[both["group"], "n"].to_numpy()
    whole_class = both["n"].to_numpy() == classes.loc[both["class"], "n"].to_numpy()
    same = both[whole_group & whole_class].set_index("group")["class"]
    parts = [
        pd.DataFrame([{"kind": "overall", "group": OVERALL, "class": "", **both[counts].sum()}]),
        groups.reset_index().assign(kind="group", **{"class": [same.get(name, "") for name in groups.index]}),
        classes.drop(index=list(same)).reset_index().assign(kind="class", group=OVERALL),
        both[~whole_group & ~whole_class].assign(kind="cell"),
    ]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return table[["kind", "group", "class", *counts]].astype(dict.fromkeys(counts, int))


def named(cell: Mapping[str, Any]) -> str:
    """A set of images in words.

    >>> named({"kind": "cell", "group": "old", "class": "melanoma"})
    'class “melanoma” in group “old”'

    Returns:
        The words.
    """
    if cell["kind"] == "overall":
        return "overall accuracy"
    if cell["kind"] == "class":
        return f"class “{cell['class']}”"
    if cell["kind"] == "cell":
        return f"class “{cell['class']}” in group “{cell['group']}”"
    return f"group “{cell['group']}”"
