"""Recall of each class, and of each class in each group; balanced accuracy; changes in points.

Recall of a class is the share of its images that the network puts into it (Kent et al. 1955, of retrieval): the
accuracy of a group that is a class. Balanced accuracy is the mean of the classes' recalls (Brodersen et al., ICPR
2010). Limits of shares are those of :mod:`fairline.audit.intervals`, limits of changes those of
:mod:`fairline.audit.paired`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairline.audit.base import Row, Subject, class_name
from fairline.audit.intervals import draw, percentile_interval
from fairline.audit.paired import change_interval
from fairline.data.grouped import OVERALL


def measure(subject: Subject) -> list[Row]:
    """Rows for recall, balanced accuracy and, with a reference, changes.

    Measures: ``recall`` in [0, 1], of a class under the group ``overall`` and of a class in a group under that group;
    ``balanced_accuracy`` in [0, 1]; with a reference, in percentage points, ``accuracy_change`` of each group and of
    all, and ``recall_change`` wherever there is a recall.

    Args:
        subject: The model.

    Returns:
        The rows. A class without an image has none.
    """
    own = subject.predictions.correct
    before = None if subject.reference is None else subject.reference.predictions.correct
    labels = subject.data.labels.cpu().numpy()
    rng = np.random.default_rng(subject.seed)
    classes = [(class_name(subject.data, int(label)), labels == label) for label in np.unique(labels)]
    groups = [(name, _mask(index, len(labels))) for name, index in subject.group_index()]
    rows, recalls = [], []
    for group, inside in [(OVERALL, np.ones(len(labels), bool)), *groups]:
        if before is not None:
            rows.append(_change(group, "", own[inside], before[inside]))
        for name, of_class in classes:
            chosen = inside & of_class
            if not chosen.any():
                continue
            drawn = draw(own[chosen][:, None], subject.resamples, rng).shares([0], [1])[0]
            if group == OVERALL:
                recalls.append(drawn)
            share, n = float(own[chosen].mean()), int(chosen.sum())
            rows.append(Row(group, "recall", share, *percentile_interval(drawn), n, name))
            if before is not None:
                rows.append(_change(group, name, own[chosen], before[chosen]))
    balanced = float(np.mean([own[of_class].mean() for _, of_class in classes]))
    limits = percentile_interval(np.mean(recalls, axis=0))
    return [*rows, Row(OVERALL, "balanced_accuracy", balanced, *limits, len(labels))]


def _mask(index: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
    mask = np.zeros(n, bool)
    mask[index] = True
    return mask


def _change(group: str, label: str, own: NDArray[np.bool_], before: NDArray[np.bool_]) -> Row:
    lost, gained, n = int((before & ~own).sum()), int((own & ~before).sum()), len(own)
    low, high = (100 * float(limit) for limit in change_interval(lost, gained, n))
    name = "recall_change" if label else "accuracy_change"
    return Row(group, name, 100 * (gained - lost) / n, low, high, n, label)
