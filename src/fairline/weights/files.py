"""Files of tensors as people have them: safetensors, ``torch.save`` and NumPy archives. Nothing in them is executed.

What a file is shows in its first bytes; names end in anything.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fairline._io import load_tensors
from fairline.errors import FairlineError

#: What begins the older form of torch.save, three pickles before that of the weights.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Contents:
    """The tensors of a file.

    Attributes:
        tensors: By their path in the file, ``"state_dict.conv1.weight"``.
        ordered: Whether their order is that in which they were written: safetensors files keep none.
        listed: Whether they stand in a list, so that their names say nothing but their places.
    """

    tensors: dict[str, Tensor]
    ordered: bool = True
    listed: bool = False


def read_file(path: str | Path) -> Contents:
    """Read the tensors of a file.

    Args:
        path: A safetensors file, what ``torch.save`` wrote (read by ``torch.load(weights_only=True)``), or ``.npz``.

    Returns:
        Its tensors, on the CPU.

    Raises:
        FairlineError: The file is missing, broken, of another kind, or needs code to be read.
    """
    path = Path(path)
    if path.is_dir():
        raise FairlineError(f"{path} is a folder, not a file of weights.")
    try:
        with path.open("rb") as opened:
            head = opened.read(9)
    except FileNotFoundError:
        raise FairlineError(f"{path} does not exist.") from None
    except OSError as error:
        raise FairlineError(f"{path} cannot be read ({error.strerror}).") from None
    if not head:
        raise FairlineError(f"{path} is empty.")
    if head[8:] == b"{" or path.suffix == ".safetensors":
        return Contents(load_tensors(path)[0], ordered=False)
    if head[:2] == b"PK":
        return _read_zip(path)
    if head[:1] == b"\x80":
        return contents(_read_torch(path))
    raise FairlineError(f"{path} is neither a safetensors file nor one that torch.save or numpy.savez wrote.")


def contents(value: Any) -> Contents:
    """The tensors of nested mappings and lists."""
    return Contents(dict(_flat(value)), listed=isinstance(value, list | tuple))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, np.ndarray | np.generic):
        value = _tensor(value, prefix)
    if isinstance(value, Tensor):
        yield prefix, value.detach()
        return
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    for key, child in children:
        yield from _flat(child, f"{prefix}.{key}" if prefix else str(key))


def _tensor(array: Any, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(np.shape(array)))
    except TypeError:
        raise FairlineError(f"'{name}' is an array of {np.asarray(array).dtype}, not of numbers.") from None


def _read_zip(path: Path) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise FairlineError(f"{path} is not a whole file; it was cut short or damaged.") from None
    if any(name.endswith("constants.pkl") for name in names):
        raise FairlineError(
            f"{path} is a TorchScript archive, which holds code; "
            f'python -c "import torch; torch.save(torch.jit.load({str(path)!r}).state_dict(), {_cured(path)!r})" '
            "takes its weights out once, if you trust it."
        )
    if any(name.endswith("data.pkl") for name in names):
        return contents(_read_torch(path))
    if names and all(name.endswith(".npy") for name in names):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return contents(dict(arrays))
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise FairlineError(f"{path} is not a whole archive of arrays of numbers ({_first_line(error)}).") from None
    raise FairlineError(f"{path} is a zip file, but neither torch.save nor numpy.savez wrote it.")


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # On pickle protocols that it does not know; what it cannot read is an error anyway.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {needed.group(1)}" if needed else "it is not the plain form of torch.save"
        raise FairlineError(
            f"{path} holds more than weights ({what}), and fairline unpickles nothing else; "
            f'python -c "{_conversion(path)}" takes its weights out once, if you trust it.'
        ) from None
    except Exception as error:
        # Bytes that are no pickle may end it in any way.
        raise FairlineError(f"{path} is not a whole file of torch.save ({_first_line(error)}).") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _conversion(path: Path) -> str:
    """The line that keeps the weights alone, told from the pickle's first instructions without following them."""
    loaded = f"torch.load({str(path)!r}, weights_only=False)"
    place, is_module = _place_of_weights(path)
    weights = loaded + (f"[{place!r}]" if place else "") + (".state_dict()" if is_module else "")
    return f"import torch; torch.save({weights}, {_cured(path)!r})"


def _cured(path: Path) -> str:
    return str(path.with_name(f"{path.stem}-weights.pt"))


#: Under which keys checkpoints keep weights.
PLACES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module")


def _place_of_weights(path: Path) -> tuple[str | None, bool]:
    """Under which key of a pickled dict the weights stand (None for all of it), and whether that is a whole module."""
    steps = [(name, argument) for name, argument in _instructions(path) if name not in _SILENT]
    if steps and not _begins_dict(steps[0]):
        return None, True
    for place in PLACES:
        if ("BINUNICODE", place) in steps:
            after = steps[steps.index(("BINUNICODE", place)) + 1 :]
            return place, bool(after) and not _begins_dict(after[0])
    return None, False


_SILENT = {"PROTO", "FRAME", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}


def _begins_dict(step: tuple[str, Any]) -> bool:
    return step[0] == "EMPTY_DICT" or step == ("GLOBAL", "collections OrderedDict")


def _instructions(path: Path) -> list[tuple[str, Any]]:
    """Instructions of the pickle that a file of torch.save holds; none where they cannot be read."""

    def read(opened: IO[bytes]) -> list[tuple[str, Any]]:
        # pickletools.genops parses and never executes.
        return [(code.name.replace("SHORT_BINUNICODE", "BINUNICODE"), at) for code, at, _ in pickletools.genops(opened)]

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(name) as opened:
                    return read(opened)
        with path.open("rb") as opened:
            steps = read(opened)
            if any(at == _LEGACY_MAGIC for _, at in steps):
                for _ in range(3):
                    steps = read(opened)
            return steps
    except (ValueError, IndexError, OSError, StopIteration):
        return []
