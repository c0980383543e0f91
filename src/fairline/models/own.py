"""Architectures of the user's own: a function in a module or a Python file. Whatever goes wrong there is a sentence."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from fairline.errors import FairlineError


def find(name: str) -> Callable[..., Any]:
    """Import what a name says.

    Args:
        name: ``module:function`` or ``file.py:function``.

    Returns:
        The function.

    Raises:
        FairlineError: It names no module or no function, or the module cannot be imported; the sentence says in which
            line.
    """
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise FairlineError(f"'{name}' is not module:function or file.py:function.")
    with told(f"Model '{name}' cannot be imported", source):
        module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    made = getattr(module, function, None)
    if not callable(made):
        raise FairlineError(f"{source} has no function '{function}'.")
    return cast(Callable[..., Any], made)


def _from_file(file: Path) -> ModuleType:
    path = file.resolve()
    if not path.exists():
        raise FairlineError(f"{file} does not exist.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        # Last, so that it hides nothing: the file may import others that lie beside it.
        sys.path.append(str(path.parent))
    ours = sys.modules.setdefault(path.stem, module) is module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if ours:
            del sys.modules[path.stem]
        raise
    return module


@contextmanager
def told(what: str, source: str = "") -> Iterator[None]:
    """Say in a sentence whatever the user's code raises.

    Args:
        what: What fails then, for the sentence.
        source: File whose lines are the user's, if it is known.

    Yields:
        Nothing.

    Raises:
        FairlineError: The block raised something, or stopped Python.
    """
    try:
        yield
    except FairlineError:
        raise
    except (Exception, SystemExit) as error:
        raise FairlineError(f"{what}: {_reason(error, source)}.") from error


def _reason(error: BaseException, source: str) -> str:
    """The kind of an error, its first line, and the last line of the user's file on the way to it."""
    text = str(error.msg if isinstance(error, SyntaxError) else error).strip()
    reason = type(error).__name__ + (f": {text.splitlines()[0].rstrip('.')}" if text else "")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{reason} ({Path(error.filename).name}, line {error.lineno})"
    file = Path(source).resolve()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f"{reason} ({file.name}, line {lines[-1]})" if lines else reason
