"""What ``fairline doctor`` tells: versions, processor, devices, extras and data, as this machine has them."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.markers import default_environment
from packaging.requirements import Requirement

from fairline import data
from fairline._cores import cores
from fairline.precision import has_bf16
from fairline.runs.environment import environment

#: Extras that are for working on fairline itself.
_INNER = ("dev",)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: It.
        found: In words.
        good: Whether it is as it should be; None where neither is wrong.
    """

    what: str
    found: str
    good: bool | None = None


def examine(root: str | None = None) -> Iterator[Finding]:
    """Look at what fairline works with here.

    Args:
        root: Folder of the data; the variable ``FAIRLINE_DATA`` by default.

    Yields:
        What was found, one after another; nothing is changed, and nothing is refused.
    """
    cpu = torch.device("cpu")
    about = environment(cpu)
    yield Finding("fairline", f"{about['packages'].get('fairline', 'not installed')} on Python {about['python']}")
    for requirement in _requirements(None):
        yield _package(requirement)
    yield Finding("cores", f"{cores()}, of which torch takes {torch.get_num_threads()}")
    native = has_bf16(cpu)
    yield Finding("bfloat16", "the processor multiplies it" if native else "not in this processor: float32 is used")
    yield from _accelerators()
    for extra in _extras():
        yield _extra(extra)
    yield _data(root)
    yield _data_sets(root)
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", f"{free / 1e9:.0f} GB free here", free > 1e9)


def _accelerators() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that this torch can use")
    for number in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(number).total_memory
        yield Finding("GPU", f"{torch.cuda.get_device_name(number)}, {memory / 1e9:.0f} GB", good=True)


def _requirements(extra: str | None) -> list[Requirement]:
    """What fairline, or an extra of it, needs on this machine."""
    found = []
    try:
        lines = importlib.metadata.requires("fairline") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement = Requirement(line)
        of_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if of_extra != (extra is not None):
            continue
        environment_here = {**{key: str(value) for key, value in default_environment().items()}, "extra": extra or ""}
        if requirement.marker is None or requirement.marker.evaluate(environment_here):
            found.append(requirement)
    return found


def _extras() -> list[str]:
    try:
        named = importlib.metadata.metadata("fairline").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        named = []
    return sorted(set(named) - set(_INNER))


def _installed(requirement: Requirement) -> str | None:
    try:
        return importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(requirement: Requirement) -> Finding:
    version = _installed(requirement)
    if version is None:
        return Finding(requirement.name, f"not installed; {requirement.specifier or 'any'} is needed", good=False)
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(requirement.name, version if fits else f"{version}, but {requirement.specifier} is needed", fits)


def _extra(extra: str) -> Finding:
    needed = _requirements(extra)
    what = f"extra {extra}"
    if not needed:
        return Finding(what, f"not for Python {sys.version_info[0]}.{sys.version_info[1]}")
    lacking = [each.name for each in needed if _installed(each) is None]
    if lacking:
        return Finding(what, f"not installed: pip install 'fairline[{extra}]'")
    wrong = [finding for finding in map(_package, needed) if not finding.good]
    if wrong:
        return Finding(what, f"{wrong[0].what} {wrong[0].found}", good=False)
    told = ", ".join(f"{each.name} {_installed(each)}" for each in needed)
    return Finding(what, told, good=True)


def _data(root: str | None) -> Finding:
    where = root or os.environ.get("FAIRLINE_DATA")
    if where is None:
        without = ", ".join(sorted(data.WITHOUT_ROOT))
        return Finding("data", f"no --root and no FAIRLINE_DATA; without them there is {without}")
    path = Path(where).expanduser()
    if not path.exists():
        return Finding("data", f"{where} does not exist", good=False)
    inside = sorted(file.name for file in path.iterdir())[:6] if path.is_dir() else [path.name]
    return Finding("data", f"{path}: {', '.join(inside) or 'empty'}", bool(inside))


def _data_sets(root: str | None) -> Finding:
    here = data.found_in(root)
    others = [name for name in data.REGISTRY if name not in here]
    return Finding("data sets", f"here: {', '.join(here)}; others that can be read: {', '.join(others)}")


__all__ = ["Finding", "examine"]
