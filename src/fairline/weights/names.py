"""Names of tensors, whatever wrapped the network that they were saved from."""

from __future__ import annotations

#: Words that wrappers put into names: (Distributed)DataParallel and AveragedModel, torch.compile, FSDP, checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical(name: str, wrappers: frozenset[str] = WRAPPERS) -> str:
    """A name without the words of wrappers.

    Args:
        name: Of a tensor or module.
        wrappers: Words to leave out.

    Returns:
        The other words.

    >>> canonical("module._orig_mod.features.module.0.weight")
    'features.0.weight'
    """
    return ".".join(word for word in name.split(".") if word not in wrappers)


def listed(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(f"'{name}'" for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
