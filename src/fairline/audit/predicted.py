"""An audit of predictions alone, for networks that live elsewhere: in an ONNX file, another framework, an MPC engine.

Accuracy, recall and, with a reference, drops and changes are functions of what was predicted for each sample. So they
are taken by the same measures as those of a network, with the same limits; what needs weights or inputs is not.

Source: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fairline.audit import AuditReport, audit_subject
from fairline.audit.base import Predictions, Subject
from fairline.data import Groups
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError

#: How far the probabilities of a sample may be from adding up to 1.
_TOLERANCE = 1e-3

#: Lowest probability whose logarithm is taken, as scikit-learn's ``log_loss`` has it for float64.
_LEAST = float(np.finfo(np.float64).eps)


def audit_predictions(
    y_true: Any,
    predicted: Any,
    groups: Any,
    reference: Any = None,
    *,
    by: Groups | None = None,
    class_names: Sequence[Any] | None = None,
    name: str = "model",
    split: str = "test",
    seed: int = 0,
    resamples: int = 2000,
) -> AuditReport:
    """Measure predictions group by group: accuracy and recall with limits, and what changed against a reference.

    Lists, NumPy arrays, pandas Series and frames and tensors are taken; names are kept as they are written.

    Args:
        y_true: Class of each sample, (N,).
        predicted: Class of each sample, (N,), or probabilities, (N, K). Columns are the classes by their names in a
            frame, else in the order of ``class_names``, else of 0, 1, …, K − 1 or of the sorted classes.
        groups: Group of each sample, (N,); or a frame or mapping of several columns, which are intersected.
        reference: Classes or probabilities before linearization, of the same samples.
        by: Which columns of ``groups`` make the groups, and how, such as ``"sex,age:0-17,18+"``; all by default.
        class_names: Names of the classes.
        name: What to call the predictions in the table.
        split: What to call the data in the table.
        seed: Of the bootstrap.
        resamples: Bootstrap resamples.

    Returns:
        The report. ``loss`` (cross-entropy in nats; of probabilities below 2.2e-16, of those) is there for
        probabilities alone.

    Raises:
        FairlineError: Lengths differ, a class is missing or unknown, or probabilities are none.

    >>> report = audit_predictions(["cat", "dog", "dog"], ["cat", "dog", "cat"], ["old", "old", "young"])
    >>> report.by_group["accuracy"].to_dict()
    {'old': 1.0, 'young': 0.0}
    """
    truth = _texts(y_true, "y_true")
    given = [_Given(predicted, "predicted", len(truth))]
    given += [] if reference is None else [_Given(reference, "reference", len(truth))]
    names = _names(truth, given, class_names)
    labels = torch.tensor([_position(names, text, "y_true", row) for row, text in enumerate(truth)])
    data = _grouped(labels, names, groups, by)
    nowhere = torch.device("cpu")
    subjects = [_Predicted(nn.Identity(), data, None, nowhere, seed, resamples, name, told=each) for each in given]
    own = subjects[0]
    own.reference = subjects[1] if len(subjects) > 1 else None
    report = audit_subject(own, split=split)
    if own.told.is_probable:
        return report
    frame = report.frame[report.frame["measure"] != "loss"].reset_index(drop=True)
    return AuditReport(frame, report.predictions.drop(columns="loss"))


class _Given:
    """Predictions as they were given: classes, or probabilities."""

    def __init__(self, values: Any, what: str, n: int) -> None:
        array = _array(values)
        self.what, self.is_probable = what, array.ndim == 2
        self.names = [str(column) for column in values.columns] if isinstance(values, pd.DataFrame) else []
        if len(array) != n:
            raise FairlineError(f"{what} has {len(array)} rows, but y_true has {n}.")
        if self.is_probable:
            self.texts: list[str] = []
            self.probabilities = _probabilities(array, what)
        else:
            self.texts = _texts(values, what)

    def predictions(self, labels: Tensor, names: Sequence[str]) -> Predictions:
        """What is right, and how sure it was; of classes alone logits are one-hot, and there is no loss."""
        if self.is_probable:
            columns = [self.names.index(each) for each in names] if self.names else range(len(names))
            scores = torch.from_numpy(self.probabilities[:, list(columns)])
            of_label = scores.gather(1, labels[:, None]).squeeze(1).numpy()
            loss = -np.log(np.clip(of_label, _LEAST, None))
        else:
            chosen = torch.tensor([_position(names, text, self.what, row) for row, text in enumerate(self.texts)])
            scores = torch.nn.functional.one_hot(chosen, len(names))
            loss = np.zeros(len(labels))
        return Predictions(scores, loss, (scores.argmax(1) == labels).numpy())


@dataclass(eq=False, kw_only=True)
class _Predicted(Subject):
    """A network of which only predictions are known."""

    told: _Given

    @cached_property
    def predictions(self) -> Predictions:
        return self.told.predictions(self.data.labels, self.data.class_names)


def _array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values, dtype=object) if isinstance(values, list | tuple) else np.asarray(values)


def _texts(values: Any, what: str) -> list[str]:
    """Each class as it is written; whole numbers without a point."""
    array = _array(values)
    if array.ndim != 1 or not len(array):
        raise FairlineError(f"{what} must have one class a sample, (N,), not the shape {array.shape}.")
    texts = []
    for row, value in enumerate(array.tolist()):
        if pd.isna(value):
            raise FairlineError(f"{what} has no class in row {row}.")
        texts.append(str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip())
    return texts


def _probabilities(array: NDArray[Any], what: str) -> NDArray[np.float64]:
    """(N, K) as float64; refuses what are no probabilities."""
    try:
        values = array.astype(np.float64)
    except (TypeError, ValueError):
        raise FairlineError(f"{what} has probabilities that are no numbers.") from None
    # A NaN is in no interval.
    wrong = ~((values >= 0) & (values <= 1 + _TOLERANCE)).all(1) | ~(np.abs(values.sum(1) - 1) <= _TOLERANCE)
    if wrong.any():
        row = int(wrong.nonzero()[0][0])
        raise FairlineError(
            f"{what} has no probabilities in row {row}: they must lie in [0, 1] and add up to 1, not to "
            f"{values[row].sum():.4g}; take the softmax of logits first."
        )
    return values


def _names(truth: Sequence[str], given: Sequence[_Given], class_names: Sequence[Any] | None) -> list[str]:
    """Names of the classes, in order."""
    seen = sorted({*truth, *(text for each in given for text in each.texts)}, key=_natural)
    for each in given:
        if each.names and class_names is None:
            class_names = each.names
    for each in given:
        if class_names is None and _written_otherwise(set(each.texts), set(truth)):
            told, known = (_listed(sorted(set(texts), key=_natural)) for texts in (each.texts, truth))
            raise FairlineError(
                f"{each.what} has the classes {told}, and y_true has {known}, so none would be right; write them alike."
            )
    widths = {each.what: each.probabilities.shape[1] for each in given if each.is_probable}
    if class_names is not None:
        names = [str(name) for name in class_names]
    else:
        width = next(iter(widths.values()), len(seen))
        numbered = [str(number) for number in range(width)]
        names = numbered if widths and set(seen) <= set(numbered) else seen
    for each in given:
        if each.names and sorted(each.names) != sorted(names):
            raise FairlineError(f"{each.what} has the classes {_listed(each.names)}, not {_listed(names)}.")
    for what, width in widths.items():
        if width != len(names):
            raise FairlineError(
                f"{what} has {width} columns of probabilities for {len(names)} classes ({_listed(names)}); name them "
                "with class_names, or in a frame."
            )
    return names


def _written_otherwise(texts: set[str], truth: set[str]) -> bool:
    """Whether classes are the truth's in another form: truth values beside 0 and 1, 1.0 beside 1, or probabilities."""
    if not texts or texts & truth:
        return False
    own, others = ({_value(text) for text in each} for each in (texts, truth))
    return bool(own & others) or all(isinstance(value, float) and 0 < value < 1 for value in own)


def _value(text: str) -> float | str:
    """The number that a text stands for, if it does."""
    told = {"true": "1", "false": "0"}.get(text.lower(), text)
    try:
        return float(told)
    except ValueError:
        return text


def _natural(text: str) -> tuple[int, float, str]:
    number = text.lstrip("-").isdecimal()
    return (0, float(text), text) if number else (1, 0.0, text)


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _position(names: Sequence[str], text: str, what: str, row: int) -> int:
    try:
        return names.index(text)
    except ValueError:
        raise FairlineError(
            f"{what} has the class '{text}' in row {row}, but the classes are {_listed(names)}."
        ) from None


def _grouped(labels: Tensor, names: Sequence[str], groups: Any, by: Groups | None) -> GroupedData:
    """Samples without images, in their groups."""
    table = groups if isinstance(groups, pd.DataFrame | Mapping) else {"group": _array(groups)}
    columns = {str(column): pd.Series(_array(table[column])) for column in table}
    if not columns:
        raise FairlineError("The groups have no column.")
    for column, values in columns.items():
        if len(values) != len(labels):
            raise FairlineError(
                f"The column '{column}' of groups has {len(values)} rows, but y_true has {len(labels)}."
            )
    blank = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    data = GroupedData(
        blank,
        labels,
        torch.zeros_like(labels),
        tuple(names),
        ("all",),
        name="predictions",
        metadata=pd.DataFrame(columns),
    )
    return data.regroup(list(columns) if by is None else by)


__all__ = ["audit_predictions"]
