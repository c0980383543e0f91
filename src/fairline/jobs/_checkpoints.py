"""Networks on disk, as the jobs about private inference take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairline.errors import FairlineError
from fairline.jobs._common import LINEARIZED
from fairline.private.export import to_graph
from fairline.private.graph import PlainGraph
from fairline.runs import NetworkInfo, Run, digest, load_info, load_network
from fairline.training import Progress, ProgressCallback

#: Commands whose runs hold networks.
WITH_NETWORKS = ("train", *LINEARIZED)


@dataclass(frozen=True)
class Checkpoint:
    """A network on disk.

    Attributes:
        name: ``"students/budget-500"``, as audits name it.
        folder: Of its files.
        info: What stands beside its weights.
    """

    name: str
    folder: Path
    info: NetworkInfo

    def graph(self) -> PlainGraph:
        """Its plain graph, with weights."""
        return to_graph(load_network(self.folder)[0], self.info.model.example())

    @property
    def digest(self) -> str:
        """Of its weights and masks."""
        return digest(sorted(self.folder.glob("*.safetensors")))


def find_networks(sources: Sequence[str | Path]) -> tuple[list[Checkpoint], Run]:
    """Find the networks of run folders.

    Args:
        sources: Run folders, or folders of single networks.

    Returns:
        The networks, and the run that the first of them belongs to.

    Raises:
        FairlineError: A folder is neither, or a network is named twice.
    """
    if not sources:
        raise FairlineError("No network was given.")
    found: list[Checkpoint] = []
    runs: list[Run] = []
    for source in map(Path, sources):
        single = (source / "network.json").exists()
        run = Run.read(source.absolute().parent.parent if single else source, *WITH_NETWORKS)
        runs.append(run)
        folders = {source.absolute().name: source} if single else run.networks()
        for name, folder in folders.items():
            full = "base" if run.command == "train" else f"{run.folder.absolute().name}/{name}"
            if full not in {checkpoint.name for checkpoint in found}:
                found.append(Checkpoint(full, folder, load_info(folder)))
            elif folder.resolve() not in {checkpoint.folder.resolve() for checkpoint in found}:
                raise FairlineError(f"{source} and another source both hold a network '{full}'.")
    shapes = {(c.info.model.in_channels, c.info.model.image_size) for c in found}
    if len(shapes) > 1:
        raise FairlineError("The networks take images of different shapes; measure them apart.")
    return found, runs[0]


def export_graphs(found: Sequence[Checkpoint], progress: ProgressCallback | None) -> dict[str, PlainGraph]:
    """The plain graphs of networks, by name."""
    graphs = {}
    for position, checkpoint in enumerate(found, start=1):
        graphs[checkpoint.name] = checkpoint.graph()
        if progress is not None:
            progress(Progress("exporting", position, len(found), checkpoint.name))
    return graphs


def identities(found: Sequence[Checkpoint]) -> list[dict[str, str]]:
    """What a run's config says of the networks it is about."""
    return [{"name": c.name, "folder": str(c.folder.resolve()), "digest": c.digest} for c in found]
