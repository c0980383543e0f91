"""The reference: a page a package, made of the names that it offers, so that a new one is there by itself."""

from __future__ import annotations

import importlib
import inspect
import sys
from abc import ABC
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, get_args, get_origin

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

import fairline

#: Page: its title, and the packages whose names stand on it.
PAGES = {
    "data": ("Data", ["data"]),
    "models": ("Networks", ["models", "inference", "weights"]),
    "masking": ("Masks", ["masking"]),
    "training": ("Training and finetuning", ["training"]),
    "linearize": ("Linearizing", ["linearize"]),
    "objectives": ("Objectives and repair", ["objectives"]),
    "audit": ("Audit", ["audit"]),
    "private": ("Private inference", ["private"]),
    "compiler": ("Compiling", ["compiler"]),
    "runs": ("Reports, runs and the Hub", ["report", "runs"]),
    "ranks": ("Several devices, and errors", ["ranks", "errors"]),
}

#: What signatures and those who write a method of their own speak of, though no package offers it by name.
_BESIDES = {
    "training": ["fairline.precision.Arithmetic"],
    "linearize": [
        "fairline.linearize.base.Cut",
        "fairline.linearize.base.Linearization",
        "fairline.linearize.ranked.Ranked",
        "fairline.linearize.learned.MaskLearning",
        "fairline.linearize.activations.each_activation",
    ],
    "audit": [
        "fairline.audit.verdict.Verdict",
        "fairline.audit.base.Predictions",
        "fairline.audit.functional.Functional",
    ],
}

#: Packages of which the reference has what ``fairline`` itself offers, and no more.
_FACE_ONLY = {"runs", "report", "inference", "errors"}


def offered() -> dict[str, list[str]]:
    """Which names stand on which page: those of ``fairline`` first, then the rest of each package.

    Returns:
        Dotted names of each page.

    Raises:
        RuntimeError: If a public name has no page.
    """
    origins = {name: package.split(".")[1] for name, package in fairline._LAZY.items() if package}
    pages: dict[str, list[str]] = {}
    for page, (_, packages) in PAGES.items():
        face = sorted(name for name, package in origins.items() if package in packages)
        pages[page] = [f"fairline.{name}" for name in face]
        for package in packages:
            names = [] if package in _FACE_ONLY else importlib.import_module(f"fairline.{package}").__all__
            pages[page] += [f"fairline.{package}.{name}" for name in names if origins.get(name) != package]
        pages[page] += _BESIDES.get(page, [])
    without = [name for name in origins if not any(f"fairline.{name}" in names for names in pages.values())]
    if without:
        raise RuntimeError(f"docs/site/reference.py has no page for {', '.join(without)}")
    return pages


def write(folder: Path) -> None:
    """Write the pages.

    Args:
        folder: Where they go.
    """
    folder.mkdir(parents=True)
    for page, names in offered().items():
        title, packages = PAGES[page]
        modules = [importlib.import_module(f"fairline.{each}") for each in packages if each not in _FACE_ONLY]
        about = "\n\n".join(inspect.getdoc(module) or "" for module in modules)
        entries = "\n".join(_entry(name) for name in names)
        (folder / f"{page}.md").write_text(
            f"# {title}\n\n```{{eval-rst}}\n{about}\n\n{entries}\n```\n", encoding="utf-8"
        )


def _entry(dotted: str) -> str:
    module, _, name = dotted.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        bases = "   :show-inheritance:\n" if _above(thing.__bases__) else ""
        return f".. autoclass:: {dotted}\n   :members:\n{bases}"
    if inspect.isroutine(thing):
        return f".. autofunction:: {dotted}\n"
    return f".. py:data:: {dotted}\n\n   {_about_constant(module, name, thing)}\n"


def _about_constant(package: str, name: str, thing: Any) -> str:
    """The comment above it, and what it holds."""
    said = []
    for module in [each for each in sys.modules if each == package or each.startswith(f"{package}.")]:
        said = said or ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name), [])
    held = [str(key) for key in thing] if isinstance(thing, Mapping | list | tuple) else [str(thing)]
    if get_origin(thing) is Literal:
        held = [str(each) for each in get_args(thing)]
    return " ".join([*filter(None, said), ", ".join(f"``{each.removeprefix('typing.')}``" for each in held)])


@cache
def _shown() -> dict[int, str]:
    """The dotted name in the reference of each object."""
    return {id(_imported(dotted)): dotted for names in offered().values() for dotted in names}


def _imported(dotted: str) -> Any:
    """What a dotted name stands for, wherever the module ends; None of what is not there."""
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            thing = getattr(thing, part, None)
        if thing is not None:
            return thing
    return None


def _public_bases(_app: Sphinx, _name: str, _thing: type, _options: Any, bases: list[type]) -> None:
    """In place of a base class that is an inner matter, the nearest one that the reference has."""
    bases[:] = _above(bases)


def _above(bases: Iterable[type]) -> list[type]:
    found = []
    for base in bases:
        above = [each for each in getattr(base, "__mro__", ()) if each not in {object, Generic, ABC, Protocol}]
        found += [each for each in above if id(each) in _shown() or not each.__module__.startswith("fairline")][:1]
    return found


def _whole_sentence(_app: Sphinx, what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """A property's docstring is a sentence, of which napoleon takes what comes before a colon for a type."""
    if what in {"attribute", "property", "data"} and lines:
        lines[0] = f": {lines[0]}"


def _no_factory(_app: Sphinx, _what: str, _name: str, _thing: Any, _options: Any, given: str, returned: str) -> Any:
    """The default that a dataclass makes by a call has a repr that is no Python, and so the signature no references."""
    return (given.replace("<factory>", "..."), returned) if given else None


def _resolve(app: Sphinx, env: BuildEnvironment, node: Any, text: Any) -> Any:
    """A name, dotted or bare, leads to where the reference has it. An inner one stays text, one of nothing fails."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    first, _, rest = target.partition(".")
    known = env.domains.python_domain.objects
    thing = _imported(target) if first == "fairline" else None
    names = [_shown().get(id(thing), "")] if thing is not None else []
    if first != "fairline":
        names = [
            f"{dotted}.{rest}" if rest else dotted for dotted in _shown().values() if dotted.rpartition(".")[2] == first
        ]
    for name in names:
        if name in known:
            return make_refnode(app.builder, node["refdoc"], known[name].docname, known[name].node_id, text)
    return text if thing is not None or _is_inner(first) else None


def _is_inner(name: str) -> bool:
    modules = [module for key, module in sys.modules.items() if key.startswith("fairline.")]
    return name.isidentifier() and any(hasattr(module, name) for module in modules)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx.

    Args:
        app: Sphinx.

    Returns:
        What Sphinx asks of an extension.
    """
    app.connect("autodoc-process-bases", _public_bases)
    app.connect("autodoc-process-docstring", _whole_sentence, priority=1)  # before napoleon
    app.connect("autodoc-process-signature", _no_factory)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
