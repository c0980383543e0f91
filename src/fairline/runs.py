"""Run folders: what a job leaves on disk, and how the next job reads it.

RUN/
  config.json         the job, its arguments, the data and what it was built on
  environment.json    versions, device, commit, time
  status.json         running or finished
  log.txt
  metrics.parquet     one row an epoch
  networks/NAME/      network.json, model.safetensors, masks.safetensors
  checkpoint/         what an interrupted job resumes from; removed at the end
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from fairline import data as data_registry
from fairline import models
from fairline._io import load_tensors, read_json, save_tensors, write_json, write_table
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.masking import Surrogate, load_masks, mask_relus, masked_relus, relu_count, save_masks

logger = logging.getLogger(__name__)

_PACKAGES = (
    "fairline",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "fairlearn",
    "pillow",
    "pyarrow",
    "safetensors",
    "altair",
    "spu",
    "jax",
)


#: The three data sets loaded last, in processes that run many jobs on the same data.
_kept: dict[str, tuple[DataSpec, dict[str, GroupedData]]] | None = None


def keep_data() -> None:
    """Keep the three data sets loaded last in memory from now on; for processes in which the files do not change."""
    global _kept
    _kept = {} if _kept is None else _kept


class FolderInUse(FairlineError):
    """Another process is at work in the run folder."""


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
        content = hashlib.blake2b(digest_size=16)
        for part in parts.values():
            for tensor in (part.images, part.labels, part.groups):
                content.update(tensor.numpy().tobytes())
        mean, std = parts["train"].normalization()
        complete = DataSpec(self.name, self.root, dict(self.options), self.split_seed, content.hexdigest(), mean, std)
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


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network before its weights are loaded; see :func:`fairline.models.build`.

    Attributes:
        name: Architecture.
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of a square image, or height and width.
        options: Of the architecture.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size: int | tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """One form for each size, also when it comes from JSON: an int for a square image."""
        height, width = models.image_sides(self.image_size)
        object.__setattr__(self, "image_size", height if height == width else (height, width))

    def build(self) -> nn.Module:
        """The untrained network."""
        return models.build(self.name, self.num_classes, self.in_channels, self.image_size, **self.options)

    def example(self) -> torch.Tensor:
        """An input of the right shape."""
        return torch.zeros(2, self.in_channels, *models.image_sides(self.image_size))


@dataclass(frozen=True)
class NetworkInfo:
    """What stands beside a network's weights.

    Attributes:
        model: How to build it.
        stage: ``"base"``, ``"linearized"`` or ``"finetuned"``.
        relus: ReLUs kept for each sample.
        total: ReLUs of the unmasked network.
        budget: ReLU count asked for.
        method: Linearizer, empty for a base network.
        objective: Of the finetune, empty before it.
        seed: Of the job that made it.
        reached: Whether the method reached the budget by its own rule.
        placement: Under what the masks were learned, where that is not plain distillation: ``"lagrangian"``.
        surrogate: What stands in the place of the other ReLUs: ``"identity"`` or ``"quadratic"``.
    """

    model: ModelSpec
    stage: str
    relus: int
    total: int
    budget: int
    method: str = ""
    objective: str = ""
    seed: int = 0
    reached: bool = True
    placement: str = ""
    surrogate: Surrogate = "identity"

    @property
    def percent(self) -> float:
        """ReLUs kept, in percent."""
        return 100 * self.relus / self.total


def save_network(folder: Path, model: nn.Module, info: NetworkInfo) -> None:
    """Write weights, masks and ``network.json`` (last, so that its presence means a whole network)."""
    masks = _mask_keys(model)
    save_tensors(folder / "model.safetensors", {k: v for k, v in model.state_dict().items() if k not in masks})
    if masks:
        save_masks(folder / "masks.safetensors", model, method=info.method, budget=info.budget, seed=info.seed)
    write_json(folder / "network.json", asdict(info))


def _mask_keys(model: nn.Module) -> set[str]:
    """What the state of a model holds that belongs to the mask file."""
    return {f"{name}.kept" for name in masked_relus(model)}


def load_info(folder: Path) -> NetworkInfo:
    """What a folder says of its network.

    Raises:
        FairlineError: The file is missing or broken.
    """
    content = read_json(folder / "network.json")
    try:
        return NetworkInfo(**{**content, "model": ModelSpec(**content["model"])})
    except (KeyError, TypeError, ValueError):
        raise FairlineError(f"{folder / 'network.json'} does not describe a network.") from None


def load_network(folder: Path) -> tuple[nn.Module, NetworkInfo]:
    """Read what :func:`save_network` wrote.

    Raises:
        FairlineError: A file is missing, broken, or does not belong to this architecture.
    """
    info = load_info(folder)
    model = info.model.build()
    has_masks = info.stage != "base" or (folder / "masks.safetensors").exists()
    if has_masks:
        model = mask_relus(model, info.model.example(), info.surrogate)
    load_weights(model, folder / "model.safetensors")
    if has_masks:
        load_masks(folder / "masks.safetensors", model)
    return model.eval(), info


def load_weights(model: nn.Module, path: Path) -> None:
    """Load all weights of a model but its masks from a safetensors file.

    Raises:
        FairlineError: The file is missing, broken, or holds weights of another architecture.
    """
    weights, _ = load_tensors(path)
    masks = _mask_keys(model)
    own = {name: value for name, value in model.state_dict().items() if name not in masks}
    for name in [*own, *weights]:
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (own, weights)]
        if shapes[0] != shapes[1]:
            raise FairlineError(
                f"{path} holds weights of another architecture: '{name}' has shape {shapes[1] or 'none'} there "
                f"and {shapes[0] or 'none'} in the model."
            )
    model.load_state_dict(weights, strict=False)


def digest(files: Sequence[Path]) -> str:
    """Digest of the content of some files."""
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


class Run:
    """A run folder that is being written, or that is read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    @contextlib.contextmanager
    def write(cls, folder: str | Path, command: str, config: Mapping[str, Any], device: torch.device) -> Iterator[Run]:
        """Start or resume the job in a folder; the status becomes ``finished`` when the block succeeds.

        Args:
            folder: Created if missing. If it holds the same job, that is resumed.
            command: Name of the job.
            config: What determines the result.
            device: Where the job computes.

        Yields:
            The run; ``finished`` is true where nothing is left to do.

        Raises:
            FairlineError: The folder holds something else, or another process is at work in it.
        """
        run = cls(folder)
        wanted = json.loads(json.dumps({"command": command, **config}))
        config_file = run.folder / "config.json"
        if run.folder.exists() and not run.folder.is_dir():
            raise FairlineError(f"{folder} is a file, not a folder.")
        if config_file.exists():
            different = difference(read_json(config_file), wanted)
            if different:
                raise FairlineError(
                    f"{folder} holds another run ({different}); choose another --out or delete the folder."
                )
        elif run.folder.exists() and any(p.name != ".lock" for p in run.folder.iterdir()):
            raise FairlineError(f"{folder} is not empty and is not a run folder; choose another --out.")
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = (run.folder / ".lock").open("w")
        except OSError as error:
            raise FairlineError(f"{folder} cannot be written ({error.strerror}).") from None
        with lock:
            try:
                # The kernel drops the lock with the process, however it dies.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderInUse(f"{folder} is in use by another process.") from None
            if run.finished:
                yield run
                return
            for leftover in run.folder.rglob(".*.tmp"):
                leftover.unlink()
            write_json(config_file, wanted)
            write_json(run.folder / "environment.json", environment(device))
            write_json(run.folder / "status.json", {"status": "running"})
            handler = logging.FileHandler(run.folder / "log.txt", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            package = logging.getLogger("fairline")
            package.addHandler(handler)
            level = package.level
            package.setLevel(logging.INFO)
            logger.info("%s in %s on %s", command, run.folder, device)
            try:
                yield run
                write_json(run.folder / "status.json", {"status": "finished"})
                shutil.rmtree(run.checkpoint, ignore_errors=True)
            except BaseException as error:
                logger.error("%s stopped: %s", command, error or type(error).__name__)
                raise
            finally:
                package.setLevel(level)
                package.removeHandler(handler)
                handler.close()

    @classmethod
    def read(cls, folder: str | Path, *commands: str) -> Run:
        """Open a finished run.

        Raises:
            FairlineError: The folder is no run, not of one of these commands, or not finished.
        """
        run = cls(folder)
        if not (run.folder / "config.json").exists():
            raise FairlineError(f"{folder} is not a run folder (it holds no config.json).")
        if commands and run.command not in commands:
            raise FairlineError(f"{folder} holds a '{run.command}' run; one of '{' or '.join(commands)}' is needed.")
        if not run.finished:
            raise FairlineError(f"The {run.command} run in {folder} is not finished; repeat its command to resume it.")
        return run

    @property
    def checkpoint(self) -> Path:
        """Where the job keeps what it resumes from."""
        return self.folder / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether the job is done."""
        status = self.folder / "status.json"
        return status.exists() and read_json(status).get("status") == "finished"

    @cached_property
    def config(self) -> dict[str, Any]:
        """What determines the result."""
        content = read_json(self.folder / "config.json")
        if not isinstance(content, dict) or "command" not in content:
            raise FairlineError(f"{self.folder / 'config.json'} is not a run's config.")
        return content

    @property
    def command(self) -> str:
        """The job."""
        return str(self.config["command"])

    @property
    def data(self) -> DataSpec:
        """The data that the run used."""
        return DataSpec.from_json(self.config["data"])

    def networks(self) -> dict[str, Path]:
        """Folders of the networks, by name, most ReLUs first."""
        folders = [file.parent for file in (self.folder / "networks").glob("*/network.json")]
        order = {folder: -read_json(folder / "network.json").get("relus", 0) for folder in folders}
        return {folder.name: folder for folder in sorted(folders, key=lambda folder: (order[folder], folder.name))}

    def network_folder(self, name: str) -> Path:
        """Where a network of this run goes."""
        return self.folder / "networks" / name

    def lineage(self) -> list[Run]:
        """The runs that this one was built on, the training run first, and this one last."""
        if self.command == "train":
            return [self]
        parent = Path(self.config["parent"]["folder"])
        if not parent.exists():
            # The runs may have been moved together.
            parent = self.folder.resolve().parent / parent.name
        return [*Run.read(parent).lineage(), self]

    def base(self) -> Run:
        """The training run at the start of the lineage."""
        return self.lineage()[0]

    def parent_entry(self) -> dict[str, str]:
        """How a following job names this one: its folder, as it was given, and a digest of its networks."""
        files = [file for folder in self.networks().values() for file in sorted(folder.iterdir())]
        # Links stay: a study's networks are known by them.
        return {"folder": str(self.folder.absolute()), "digest": digest(files)}

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one row an epoch."""
        write_table(self.folder / "metrics.parquet", pd.DataFrame(list(rows)))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The first entry in which two configs differ, in words."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            return difference(before, after, f"{prefix}{key}.")
        return f"{prefix}{key} is {before!r} there and {after!r} here"
    return ""


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and time, for a run's record."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "packages": versions,
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def provenance(machines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where results came from.

    Args:
        machines: The environments (:func:`environment`) of all runs behind them.

    Returns:
        ``commits``, ``devices``, ``platforms`` and ``python``, each sorted; ``packages``; and ``written``, the date.
    """
    packages: dict[str, str] = {}
    for machine in machines:
        packages |= machine["packages"]
    return {
        "commits": sorted({str(machine["commit"]) for machine in machines}),
        "devices": sorted({machine["device"] for machine in machines}),
        "platforms": sorted({machine["platform"] for machine in machines}),
        "python": sorted({machine["python"] for machine in machines}),
        "packages": packages,
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _commit() -> str | None:
    """Commit of the source tree that this package runs from, if it is one."""
    here = Path(__file__).resolve().parent
    try:
        answers = [
            subprocess.run(["git", "-C", str(here), *query], capture_output=True, text=True, check=True).stdout.strip()
            for query in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(here)])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0] + ("-dirty" if answers[1] else "")


def count_relus(model: nn.Module, spec: ModelSpec) -> int:
    """ReLUs of a network that may have no masks."""
    return relu_count(model, spec.example())
