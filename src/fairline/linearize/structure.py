"""The masked ReLUs of a network in the order of execution, by stage and by block.

Source: none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from fairline.errors import FairlineError
from fairline.masking import masked_graph, masked_relus

#: Names of the stages in this package's networks, and in torchvision's and timm's.
_STAGE = re.compile(r"(layer|stage)s?[._]?\d+")


def execution_order(masked: nn.Module) -> list[str]:
    """Names of the masked ReLUs as a forward pass meets them; of an untraced model, as its modules come."""
    names = masked_relus(masked)
    traced = masked_graph(masked)
    if traced is None:
        return list(names)
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module" and node.target in names]


def named_stages(masked: nn.Module) -> list[str]:
    """Modules that are named like a stage and hold masked ReLUs, in the order of execution."""
    modules = dict(masked.named_modules())
    heads = [match[0] for match in map(_STAGE.match, execution_order(masked)) if match and match[0] in modules]
    return list(dict.fromkeys(heads))


def blocks_of(layers: Sequence[str]) -> list[list[str]]:
    """Layers by block: those that follow each other in one module, other than the network itself.

    >>> blocks_of(["stem", "head", "layer1.0.relu1", "layer1.0.relu2", "layer1.1.relu1"])
    [['stem'], ['head'], ['layer1.0.relu1', 'layer1.0.relu2'], ['layer1.1.relu1']]

    Args:
        layers: Names of masked ReLUs, in the order of execution.

    Returns:
        Their names, block by block.
    """
    blocks: list[list[str]] = []
    before = ""
    for name in layers:
        block = name.rpartition(".")[0]
        if not block or block != before:
            blocks.append([])
        blocks[-1].append(name)
        before = block
    return blocks


def stages_of(
    masked: nn.Module, stages: Mapping[str, Sequence[str]] | Sequence[str] | str | None = None
) -> dict[str, list[str]]:
    """Masked ReLUs of each stage, in the order of execution.

    Args:
        masked: From :func:`~fairline.masking.mask_relus`.
        stages: Modules of each stage by the stage's name, or a list of modules that are a stage each; by default those
            named ``layer1``, ``stage2``, ….

    Returns:
        Names of its masked ReLUs, for each stage.

    Raises:
        FairlineError: A stage does not exist or holds no ReLU, two share one, or none are named and none are found.
    """
    layers = execution_order(masked)
    if stages is None:
        named: dict[str, list[str]] = {head: [head] for head in named_stages(masked)}
        if not named:
            raise FairlineError(
                f"None of the modules of {type(masked).__name__} is named like a stage (layer1, stage2, …); name them "
                f"with stages (its ReLUs are {', '.join(layers[:8])}{', …' * (len(layers) > 8)})."
            )
    elif isinstance(stages, Mapping):
        named = {name: [own] if isinstance(own, str) else list(own) for name, own in stages.items()}
    else:
        named = {name: [name] for name in ([stages] if isinstance(stages, str) else stages)}
    found: dict[str, list[str]] = {name: [] for name in named}
    belongs: dict[str, str] = {}
    for name, prefixes in named.items():
        for prefix in prefixes:
            own = [layer for layer in layers if layer == prefix or layer.startswith(f"{prefix}.")]
            if not own:
                raise FairlineError(
                    f"There is no stage '{prefix}' with ReLUs in {type(masked).__name__}; its ReLUs are "
                    f"{', '.join(layers[:8])}{', …' * (len(layers) > 8)}."
                )
            for layer in own:
                if belongs.setdefault(layer, name) != name:
                    raise FairlineError(f"ReLU '{layer}' is in the stages '{belongs[layer]}' and '{name}'.")
    following = None
    for layer in reversed(layers):
        following = belongs.get(layer, following)
        if following is not None:
            belongs.setdefault(layer, following)
    last = next(belongs[layer] for layer in reversed(layers) if layer in belongs)
    for layer in layers:
        found[belongs.setdefault(layer, last)].append(layer)
    return found


def close(masked: nn.Module, names: Collection[str]) -> None:
    """Empty layers of a masked network."""
    for name, layer in masked_relus(masked).items():
        if name in names:
            layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
