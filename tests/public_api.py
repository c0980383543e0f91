"""The public face as text: every name that ``import fairline`` offers, with signatures and the members of classes.

``python -m tests.public_api`` writes it anew, after a change that is meant.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).with_suffix(".txt")


def described() -> str:
    """One line a name, and one a member of a class."""
    import fairline

    lines = []
    for name in sorted(fairline.__all__):
        thing = getattr(fairline, name)
        if isinstance(thing, ModuleType):
            public = getattr(thing, "__all__", [])
            lines.append(f"{name}: {', '.join(sorted(public))}" if public else name)
        elif inspect.isclass(thing):
            lines.append(f"{name}{_signature(thing)}")
            lines += [f"    {member}" for member in _members(thing)]
        elif callable(thing):
            lines.append(f"{name}{_signature(thing)}")
        else:
            lines.append(name)
    return "\n".join(lines) + "\n"


def _members(cls: type) -> list[str]:
    """Methods with signatures, and properties, but for those of a base class that is public itself."""
    import fairline

    bases = [each for each in cls.__mro__ if each.__module__.startswith("fairline")]
    own = [each for each in bases if each is cls or each.__name__ not in fairline.__all__]
    names = sorted({name for each in own for name in vars(each) if not name.startswith("_")})
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    found = []
    for name in names:
        member = inspect.getattr_static(cls, name)
        bare = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(bare):
            found.append(f"{name}{_signature(bare)}")
        elif name not in fields:
            found.append(name)
    return found


def _signature(thing: object) -> str:
    try:
        return str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(…)"


if __name__ == "__main__":
    FILE.write_text(described(), encoding="utf-8")
