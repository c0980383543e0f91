"""Atomic files: every write goes to a temporary name and is renamed, tensors are safetensors only.

Of several processes that do one work (:mod:`fairline.ranks`) the first writes, and the others write nothing, but for
files that whoever holds their lock writes (``locked``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fairline.errors import FairlineError
from fairline.ranks import here

if TYPE_CHECKING:
    import pandas as pd

_TENSOR = "__tensor__"


def make_folder(path: str | Path) -> Path:
    """Create a folder, and those that it lies in, unless it is there.

    Returns:
        The folder.

    Raises:
        FairlineError: It is a file, or it cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FairlineError(f"{path} is a file, not a folder.") from None
    except OSError as error:
        raise FairlineError(f"{path} cannot be written ({error.strerror or error}).") from None
    return folder


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Let a file be written under a temporary name beside its own, which it takes when the block succeeds.

    Args:
        path: The file; its folder is created if missing.

    Yields:
        The temporary path.

    Raises:
        FairlineError: The file cannot be written: there is no room, no permission, or no such folder.
    """
    path = Path(path)
    temporary = None
    try:
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes files private; a result is as readable as any other file here.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FairlineError(f"{path} cannot be written ({error.strerror or error}).") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Say in a sentence what the system says of a path that cannot be read.

    Args:
        path: The file or folder that the block reads.

    Yields:
        Nothing.

    Raises:
        FairlineError: It does not exist or cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise FairlineError(f"{path} does not exist.") from None
    except OSError as error:
        raise FairlineError(f"{path} cannot be read ({error.strerror or error}).") from None


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds a lock file, and keep them waiting; the kernel drops it with the process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def write_text(path: str | Path, text: str, *, locked: bool = False) -> None:
    """Write ``text`` to ``path`` atomically."""
    if not (locked or here().is_first):
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, *, locked: bool = False) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", locked=locked)


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Returns:
        What the file holds.

    Raises:
        FairlineError: The file is missing, cannot be read, or is not JSON.
    """
    with reading(path):
        content = Path(path).read_bytes()
    try:
        return json.loads(content.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FairlineError(f"{path} is not valid JSON ({error}).") from None


def json_digest(value: Any) -> str:
    """Hash a plain JSON value, whatever the order of its keys.

    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    True

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table to a parquet file atomically, without its index."""
    if not here().is_first:
        return
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a parquet table.

    Returns:
        Its rows.

    Raises:
        FairlineError: It is missing or broken.
    """
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise FairlineError(f"{path} is missing or broken ({error}).") from None


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Any = None, *, locked: bool = False
) -> None:
    """Write named tensors, with ``metadata`` as JSON in the header, atomically."""
    if not (locked or here().is_first):
        return
    # Clones: safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"fairline": json.dumps(metadata)})
        except SafetensorError as error:
            # A full disk, for one.
            raise FairlineError(f"{path} cannot be written ({error}).") from None


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote.

    Returns:
        The tensors by name, and the metadata (None where the file carries none).

    Raises:
        FairlineError: The file is missing, cut short, or not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = (opened.metadata() or {}).get("fairline", "null")
        return tensors, json.loads(header)
    except FileNotFoundError:
        raise FairlineError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FairlineError(f"{path} is not a whole safetensors file ({error}).") from None


def save_state(path: str | Path, state: Any) -> None:
    """Write a nested state (dicts, lists, tensors, JSON scalars) to one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            tensors[key] = value
            return {_TENSOR: key}
        if isinstance(value, Mapping):
            # Pairs, since optimizer state is keyed by integers, which JSON objects are not.
            return {"__items__": [[k, strip(v, f"{key}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            return [strip(v, f"{key}.{i}") for i, v in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"cannot save {type(value).__name__} at {key}")

    skeleton = strip(state, "state")
    save_tensors(path, tensors, skeleton)


def load_state(path: str | Path) -> Any:
    """Read what :func:`save_state` wrote.

    Returns:
        The state; tuples come back as lists.

    Raises:
        FairlineError: The file is missing, cut short, or not a state file.
    """
    tensors, skeleton = load_tensors(path)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                return tensors[value[_TENSOR]]
            return {k: fill(v) for k, v in value["__items__"]}
        if isinstance(value, list):
            return [fill(v) for v in value]
        return value

    return fill(skeleton)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Find the device to compute on.

    Returns:
        Of several processes each one's own; else the device asked for, or the accelerator if there is one, or the CPU.

    Raises:
        FairlineError: The device is unknown or absent.
    """
    own = here().device
    if own is not None:
        return own
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FairlineError(f"Device '{device}' cannot be used here ({reason.rstrip('.')}).") from None
    return chosen
