"""Which data a run uses, loaded and split; an own part of every run's config."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairline import data as data_registry
from fairline.data.grouped import GroupedData, content_digest
from fairline.errors import FairlineError

logger = logging.getLogger(__name__)

#: The three data sets loaded last, in processes that run many jobs on the same data.
_kept: dict[str, tuple[DataSpec, dict[str, GroupedData]]] | None = None


def keep_data() -> None:
    """Keep the three data sets loaded last in memory from now on; for processes in which the files do not change."""
    global _kept
    _kept = {} if _kept is None else _kept


@dataclass(frozen=True)
class DataSpec:
    """Which data a run uses, and how they are split. Later jobs of a chain use the first one's.

    Attributes:
        name: As for :func:`fairline.data.load`.
        root: Folder of the files.
        options: Of the data set.
        split_seed: Of the split.
        fingerprint: Digest of all images, labels, groups and their order; empty until the data are loaded.
        mean: Normalisation, from the training part.
        std: Likewise.
    """

    name: str
    root: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    split_seed: int = 0
    fingerprint: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse as an option what stands beside the options.

        Raises:
            FairlineError: There is such an option.
        """
        for option in ("name", "root"):
            if option in self.options:
                raise FairlineError(f"Data '{self.name}' take no option '{option}': it stands beside the options.")

    def load(self) -> tuple[DataSpec, dict[str, GroupedData]]:
        """Load and split the data.

        Returns:
            The completed spec, and the parts ``train``, ``val`` and ``test``.

        Raises:
            FairlineError: The data are not those of the earlier job.
        """
        key = json.dumps([self.name, self.root, dict(self.options), self.split_seed], sort_keys=True)
        if _kept is not None and key in _kept:
            complete, parts = _kept[key]
            self._require(complete)
            return complete, dict(parts)
        whole = data_registry.load(self.name, self.root, **self.options)
        if whole.skipped:
            logger.warning(
                "%s: %d files were skipped, first %s: %s",
                whole.name,
                len(whole.skipped),
                whole.skipped[0].file,
                whole.skipped[0].reason,
            )
        parts = dict(zip(("train", "val", "test"), whole.split(self.split_seed), strict=True))
        mean, std = parts["train"].normalization()
        digest = content_digest(*parts.values())
        complete = DataSpec(self.name, self.root, dict(self.options), self.split_seed, digest, mean, std)
        self._require(complete)
        if _kept is not None:
            while len(_kept) > 2:
                del _kept[next(iter(_kept))]
            _kept[key] = complete, dict(parts)
        return complete, parts

    def _require(self, complete: DataSpec) -> None:
        if self.fingerprint and self.fingerprint != complete.fingerprint:
            raise FairlineError(
                f"Data '{self.name}' at {self.root} are not those that the network was trained on; "
                "their test part could hold training images."
            )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataSpec:
        """From a run's config."""
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
