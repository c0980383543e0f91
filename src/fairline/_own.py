"""What is the user's own: a function or class in a module or a Python file. Whatever goes wrong there is a sentence."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from fairline.errors import FairlineError


def is_own(name: str) -> bool:
    """Whether a name says where to import from; else it is one of a registry."""
    return ":" in name


@contextmanager
def found(name: str, kind: str = "Model", noun: str = "function") -> Iterator[Callable[..., Any]]:
    """Import what a name says.

    A file may import what lies beside it, now and while the block runs. What it imports from there hides modules of the
    same name that are neither of the standard library nor installed, and is forgotten after the block; so two files may
    have neighbours of the same name, and a changed one is read anew.

    Args:
        name: ``module:function`` or ``file.py:function``; a class where that is what is asked for.
        kind: What it is of, for the error message.
        noun: What it must be: ``"function"`` or ``"class"``.

    Yields:
        The function or class.

    Raises:
        FairlineError: It names no module or no such thing, or the module cannot be imported; the sentence says in which
            line.
    """
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise FairlineError(f"'{name}' is not module:{noun} or file.py:{noun}.")
    failed = f"{kind} '{name}' cannot be imported"
    if source.endswith(".py"):
        path = Path(source).resolve()
        if not path.exists():
            raise FairlineError(f"{source} does not exist.")
        with _beside(path.parent):
            with told(failed, source):
                module = _from_file(path)
            yield _member(module, source, function, noun)
        return
    with told(failed, source):
        module = importlib.import_module(source)
    yield _member(module, source, function, noun)


def _member(module: ModuleType, source: str, function: str, noun: str) -> Callable[..., Any]:
    made = getattr(module, function, None)
    if not (isinstance(made, type) if noun == "class" else callable(made)):
        raise FairlineError(f"{source} has no {noun} '{function}'.")
    return cast(Callable[..., Any], made)


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where a library has the name, the file's neighbours do not find it by theirs.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Let the block import from a folder, first of all, and leave no trace of it."""
    here = _names(folder)
    hidden = {
        name: module
        for name, module in sys.modules.items()
        if _top(name) in here and not _installed(name, module) and not _lies_in(module, folder)
    }
    for name in hidden:
        del sys.modules[name]
    known = {_top(name) for name in sys.modules}
    writes = sys.dont_write_bytecode
    # Python takes bytecode for that of a file of the same size and second.
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes
        with suppress(ValueError):
            sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if _top(name) not in known and not _installed(name, module) and _lies_in(module, folder):
                del sys.modules[name]
        sys.modules.update(hidden)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _names(folder: Path) -> set[str]:
    """What can be imported from a folder, by first name."""
    packages = {path.parent.name for path in folder.glob("*/*.py")}
    return packages | {path.stem for path in folder.glob("*.py")}


def _places(module: ModuleType) -> list[Path]:
    """The file of a module, or the folders of a package without one."""
    file = getattr(module, "__file__", None)
    try:
        return [Path(place).resolve() for place in ([file] if file else list(getattr(module, "__path__", ())))]
    except (TypeError, ValueError):
        return []


def _installed(name: str, module: ModuleType) -> bool:
    """Whether a module is Python's, fairline's, or came with a package."""
    if _top(name) in sys.stdlib_module_names or _top(name) in ("fairline", "__main__"):
        return True
    places = _places(module)
    return not places or any({"site-packages", "dist-packages"} & set(place.parts) for place in places)


def _lies_in(module: ModuleType, folder: Path) -> bool:
    return any(place.is_relative_to(folder) for place in _places(module))


def files(name: str) -> dict[str, str]:
    """What decides what a name stands for: the file, and those that it imports from beside it.

    Import statements are followed, also those inside functions; nothing is run but the packages that a module is in.

    Args:
        name: ``module:function`` or ``file.py:function``.

    Returns:
        A digest of each file by its path below the folder that imports start from; none of an installed package, nor of
        what a registry names.

    Raises:
        FairlineError: A file cannot be read.
    """
    if not is_own(name):
        return {}
    source = name.rpartition(":")[0]
    if source.endswith(".py"):
        file = Path(source).resolve()
        root = file.parent
    else:
        with told(f"'{name}' cannot be imported", source):
            spec = importlib.util.find_spec(source)
        if spec is None or spec.origin is None or {"site-packages", "dist-packages"} & set(Path(spec.origin).parts):
            return {}
        if _top(source) in sys.stdlib_module_names:
            return {}
        file = Path(spec.origin).resolve()
        root = file.parents[source.count(".") + (file.name == "__init__.py")]
    contents: dict[Path, bytes] = {}
    waiting = [file] if source.endswith(".py") else [file, *_on_the_way(root, source.split("."))]
    while waiting:
        each = waiting.pop()
        if each in contents:
            continue
        try:
            contents[each] = each.read_bytes()
        except OSError as error:
            raise FairlineError(f"{each} cannot be read ({error.strerror}).") from None
        waiting += _imported(contents[each], each, root)
    return {
        path.relative_to(root).as_posix(): hashlib.blake2b(content, digest_size=8).hexdigest()
        for path, content in sorted(contents.items())
    }


def _imported(content: bytes, file: Path, root: Path) -> list[Path]:
    """Files below a folder that a file imports."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return []
    targets: list[tuple[Path, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets += [(root, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [file, *file.parents]
            start = root if node.level == 0 else above[min(node.level, len(above) - 1)]
            words = node.module.split(".") if node.module else []
            targets += [(start, [*words, alias.name]) for alias in node.names]
    reached = [path for start, words in targets for path in _on_the_way(start, words)]
    return [path.resolve() for path in reached if path.resolve().is_relative_to(root)]


def _on_the_way(start: Path, words: list[str]) -> Iterator[Path]:
    """The files that are run when ``words`` is imported from a folder."""
    for count in range(1, len(words) + 1):
        place = start.joinpath(*words[:count])
        yield from (file for file in (place / "__init__.py", place.with_name(f"{place.name}.py")) if file.is_file())


def located(name: str, folder: Path | None) -> str:
    """A name whose file is looked for in a folder first, then where this process works.

    Args:
        name: ``file.py:name``; any other is left as it is.
        folder: The first place; None for none.

    Returns:
        The name, with the path of the file that is there.

    >>> located("erm", Path("/studies")), located("here.py:Mine", Path("/nowhere"))
    ('erm', 'here.py:Mine')
    """
    source, _, last = name.rpartition(":")
    if folder is not None and source.endswith(".py") and (folder / source).is_file():
        return f"{folder / source}:{last}"
    return name


def identity(name: str) -> str:
    """What a name is known by wherever its file lies.

    >>> identity("/home/me/mine.py:Mine"), identity("mine:Mine"), identity("erm")
    ('mine.py:Mine', 'mine:Mine', 'erm')

    Returns:
        The name with the file's own, without its folder.
    """
    source, _, last = name.rpartition(":")
    return f"{Path(source).name}:{last}" if source.endswith(".py") else name


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
