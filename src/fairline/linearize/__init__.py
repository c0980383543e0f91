"""Methods that switch ReLUs off. One file a method; what all share is :class:`Linearizer`.

Source: none; each method's file names its own.
"""

from __future__ import annotations

from typing import Any

from fairline._registry import build_named
from fairline.linearize.autorep import AutoReP
from fairline.linearize.base import Linearized, Linearizer, resolve_budgets
from fairline.linearize.block_relu import BlockReLU
from fairline.linearize.coordinate_descent import CoordinateDescent
from fairline.linearize.cryptonas import CryptoNAS
from fairline.linearize.deepreduce import FINETUNE_PRESETS, DeepReDuce
from fairline.linearize.delphi import Delphi
from fairline.linearize.for_cost import ForCost
from fairline.linearize.layerwise import Layerwise
from fairline.linearize.magnitude import Magnitude
from fairline.linearize.random import Random
from fairline.linearize.safenet import SAFENet
from fairline.linearize.senet import SENet
from fairline.linearize.shapley import Shapley
from fairline.linearize.snl import SNL
from fairline.linearize.taylor import Taylor

#: Name on the command line → class.
REGISTRY: dict[str, type[Linearizer]] = {
    "snl": SNL,
    "deepreduce": DeepReDuce,
    "cryptonas": CryptoNAS,
    "senet": SENet,
    "autorep": AutoReP,
    "coordinate_descent": CoordinateDescent,
    "delphi": Delphi,
    "safenet": SAFENet,
    "taylor": Taylor,
    "shapley": Shapley,
    "block_relu": BlockReLU,
    "layerwise": Layerwise,
    "magnitude": Magnitude,
    "random": Random,
}


def build(name: str, /, **options: Any) -> Linearizer:
    """Build a linearizer by name.

    Args:
        name: On the command line, one of ``REGISTRY``.
        options: Settings of the method.

    Returns:
        The linearizer.

    Raises:
        FairlineError: The name or an option is unknown.
    """
    return build_named("linearizer", REGISTRY, name, options)


__all__ = [
    "FINETUNE_PRESETS",
    "REGISTRY",
    "SNL",
    "AutoReP",
    "BlockReLU",
    "CoordinateDescent",
    "CryptoNAS",
    "DeepReDuce",
    "Delphi",
    "ForCost",
    "Layerwise",
    "Linearized",
    "Linearizer",
    "Magnitude",
    "Random",
    "SAFENet",
    "SENet",
    "Shapley",
    "Taylor",
    "build",
    "resolve_budgets",
]
