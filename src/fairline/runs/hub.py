"""Networks by one line: from a run, from a published folder, or from the Hugging Face Hub; and their way there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from fairline import models
from fairline.data.decoding import first_line
from fairline.errors import FairlineError
from fairline.runs.folder import Run
from fairline.runs.network import load_info, load_network

#: What a published folder holds; nothing else is fetched.
FILES = ("*.safetensors", "*.json", "README.md")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    source: str | Path, name: str | None = None, *, revision: str | None = None, own_code: bool = False
) -> nn.Module:
    """The network in a folder or on the Hugging Face Hub, with its masks.

    Args:
        source: A published folder (``fairline card``), a run's folder or a network's in it; or, where there is no such
            folder, the id of a repository, ``"user/network"``, which takes the extra ``hub``.
        name: Which network of a run, such as ``"budget-307"``; not needed where there is one.
        revision: Branch, tag or commit of a repository.
        own_code: Whether a network that Python code outside fairline builds may be loaded, which runs that code. Never
            from a repository.

    Returns:
        The network, in evaluation mode. It takes images as ``preprocessing.json`` of a published folder says.

    Raises:
        FairlineError: There is no network, there are several, or it is built by code that was not allowed.
    """
    folder = Path(source)
    if not folder.exists():
        folder, own_code = _fetched(str(source), revision), False
    if not (folder / "network.json").exists():
        folder = _of_run(folder, name)
    info = load_info(folder)
    if not (own_code or info.compiled or info.model.name in models.REGISTRY):
        raise FairlineError(
            f"The network in {folder} is built by code outside fairline ('{info.model.name}'), which loading it would "
            "run; own_code=True allows that for a folder of your own."
        )
    return load_network(folder)[0]


def push(folder: str | Path, repository: str, *, private: bool = False, token: str | None = None) -> str:
    """Put a published folder on the Hugging Face Hub.

    Args:
        folder: From ``fairline card``.
        repository: Its id there, ``"user/network"``; made if there is none.
        private: Whether a new one is private.
        token: With the right to write; the one that ``hf auth login`` kept, or ``HF_TOKEN``, by default.

    Returns:
        The address of the repository.

    Raises:
        FairlineError: The folder has no card, or the Hub refuses or cannot be reached.
    """
    path = Path(folder)
    for file in ("README.md", "network.json"):
        if not (path / file).is_file():
            raise FairlineError(f"{folder} holds no {file}; make it by fairline card first.")
    if not _REPOSITORY.fullmatch(repository):
        raise FairlineError(f"'{repository}' is no repository of the form user/network.")
    hub = _hub()
    api = hub.HfApi(token=token)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=path, allow_patterns=list(FILES))
    except Exception as error:  # of the network and of the Hub, in many classes
        raise FairlineError(f"{repository} was not written ({first_line(error)}).") from None
    return str(address)


def _fetched(repository: str, revision: str | None) -> Path:
    if not _REPOSITORY.fullmatch(repository):
        raise FairlineError(f"{repository} is no folder, and no repository of the form user/network.")
    hub = _hub()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # of the network and of the Hub, in many classes
        raise FairlineError(
            f"{repository} is no folder, and cannot be had from the Hub ({first_line(error)})."
        ) from None


def _of_run(folder: Path, name: str | None) -> Path:
    networks = Run.read(folder).networks()
    if name is None and len(networks) == 1:
        return next(iter(networks.values()))
    listed = ", ".join(networks) or "none"
    if name is None:
        raise FairlineError(f"{folder} holds {len(networks)} networks ({listed}); name one.")
    if name not in networks:
        raise FairlineError(f"{folder} holds no network '{name}'; it has {listed}.")
    return networks[name]


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise FairlineError("The Hub takes the extra: pip install 'fairline[hub]'.") from None
    return huggingface_hub
