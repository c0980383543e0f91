"""One run of a study, known by the hash of all that determines it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fairline._io import json_digest


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        kind: The job: ``train``, ``linearize``, ``finetune``, ``choose``, ``last-layer``, ``adjust``, ``audit``
            or ``compare``.
        arguments: What determines the result beside the parents; plain JSON.
        parents: The cells that it is built on.
        where: Its name for people, ``DATA-SEED/NAME``; not part of the hash.
        about: What a table says of its networks: data, model, seed, masks, finetune; not part of the hash.
    """

    kind: str
    arguments: Mapping[str, Any]
    parents: tuple[Cell, ...] = ()
    where: str = field(default="", compare=False)
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def key(self) -> str:
        """Kind and hash: the name of its folder."""
        return f"{self.kind}-{json_digest(self.content)}"

    @property
    def content(self) -> dict[str, Any]:
        """What the hash is of."""
        return {"kind": self.kind, "arguments": self.arguments, "parents": [parent.key for parent in self.parents]}

    def ancestors(self) -> list[Cell]:
        """Every cell that this one is built on, directly or not, each before its children."""
        found: dict[str, Cell] = {}
        for parent in self.parents:
            for cell in (*parent.ancestors(), parent):
                found.setdefault(cell.key, cell)
        return list(found.values())
