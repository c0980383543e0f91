"""What is not linearization's: the control kept all its ReLUs and was finetuned alike.

A network that is finetuned changes whether or not it loses ReLUs. What the control loses of a set of images is the
finetune's; what the network loses beyond it is linearization's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fairline.audit.intervals import mean_interval
from fairline.audit.paired import change_interval
from fairline.audit.verdict import Verdict

_KEYS = ["kind", "group", "class"]


@dataclass(frozen=True, eq=False)
class Control:
    """What the control says of the set of images that decides.

    Attributes:
        name: What the control is called.
        change: Its change of the set, in points.
        beyond: Change of the network less the control's, in points.
        low: Lower 95 % limit of that.
        high: Upper limit.
    """

    name: str
    change: float
    beyond: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, judged: Verdict, counted: Sequence[pd.DataFrame]) -> Control:
        """A network beside its control, in the set that decides its verdict.

        Args:
            name: What the control is called.
            judged: The verdict.
            counted: What it was made from: :func:`fairline.audit.cells.cells` of each base network, with the control.

        Returns:
            The control; with several base networks, over these (Student), else over the images (Tango).
        """
        decisive = tuple(judged.decisive[key] for key in _KEYS)
        own = pd.concat([each.set_index(_KEYS).loc[[decisive]] for each in counted], ignore_index=True)
        change = 100 * (own["control_after"] - own["before"]) / own["n"]
        beyond = 100 * (own["after"] - own["control_after"]) / own["n"]
        if len(own) > 1:
            low, high = mean_interval(beyond.to_numpy())
        else:
            row = own.iloc[0]
            limits = change_interval(row["control_lost"], row["control_gained"], row["n"])
            low, high = (100 * float(limit) for limit in limits)
        return cls(name, float(np.mean(change)), float(np.mean(beyond)), float(low), float(high))


def control_of(row: pd.Series[Any], about: pd.DataFrame) -> str | None:
    """The network that kept all its ReLUs and was trained on alike; of several, that of the same method.

    Within a run all networks are trained alike. Of another run a network of the same method is another recipe's; one of
    another method, with hardly anything left of how its masks were found, is taken if it is the only one.

    Args:
        row: A network: ``stage``, ``method``, ``objective``, ``relus``, ``total_relus``; named by ``model`` or as that
            row is.
        about: All networks, by name (``RUN/NETWORK``, where there are several runs), with the same columns.

    Returns:
        Its name, if there is one.
    """
    whole = about[(about["relus"] == about["total_relus"]) & (about["stage"] == row["stage"])]
    whole = whole[whole["objective"] == row["objective"]]
    if row["relus"] == row["total_relus"] or whole.empty:
        return None
    run = str(row.get("model", row.name)).rpartition("/")[0]
    mine = whole[whole.index.astype(str).str.rpartition("/").get_level_values(0) == run]
    if mine.empty:
        others = whole[whole["method"] != row["method"]]
        return str(others.index[0]) if len(others) == 1 else None
    own = mine[mine["method"] == row["method"]]
    return str((own if len(own) else mine).index[0])


def beside(predictions: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """Predictions of a network with those of its control: ``control_correct``.

    Args:
        predictions: A row an image; ``index`` says which.
        control: The control's rows of the same images, with ``correct``.

    Returns:
        The rows with that column.
    """
    return predictions.assign(control_correct=predictions["index"].map(control.set_index("index")["correct"]))


__all__ = ["Control", "beside", "control_of"]
