"""fairline: cut the ReLUs that make private inference slow, and see, explain and repair who pays for it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fairline import data as data
    from fairline import models as models
    from fairline.audit import AuditReport as AuditReport
    from fairline.audit import audit as audit
    from fairline.audit.predicted import audit_predictions as audit_predictions
    from fairline.compiler import CompiledNetwork as CompiledNetwork
    from fairline.compiler import compile as compile
    from fairline.data import GroupedData as GroupedData
    from fairline.errors import FairlineError as FairlineError
    from fairline.inference import predict as predict
    from fairline.linearize import SNL as SNL
    from fairline.linearize import AutoReP as AutoReP
    from fairline.linearize import BlockReLU as BlockReLU
    from fairline.linearize import CoordinateDescent as CoordinateDescent
    from fairline.linearize import CryptoNAS as CryptoNAS
    from fairline.linearize import DeepReDuce as DeepReDuce
    from fairline.linearize import Delphi as Delphi
    from fairline.linearize import Layerwise as Layerwise
    from fairline.linearize import Linearized as Linearized
    from fairline.linearize import Magnitude as Magnitude
    from fairline.linearize import Random as Random
    from fairline.linearize import SAFENet as SAFENet
    from fairline.linearize import SENet as SENet
    from fairline.linearize import Shapley as Shapley
    from fairline.linearize import Taylor as Taylor
    from fairline.masking import MaskedReLU as MaskedReLU
    from fairline.masking import load_masks as load_masks
    from fairline.masking import mask_relus as mask_relus
    from fairline.masking import relu_count as relu_count
    from fairline.masking import save_masks as save_masks
    from fairline.objectives import ARL as ARL
    from fairline.objectives import ERM as ERM
    from fairline.objectives import LDAM as LDAM
    from fairline.objectives import AdaAlpha as AdaAlpha
    from fairline.objectives import AdaMargin as AdaMargin
    from fairline.objectives import BalancedKD as BalancedKD
    from fairline.objectives import Chi2DRO as Chi2DRO
    from fairline.objectives import GroupDRO as GroupDRO
    from fairline.objectives import GroupDrop as GroupDrop
    from fairline.objectives import Lagrangian as Lagrangian
    from fairline.objectives import LogitAdjust as LogitAdjust
    from fairline.objectives import LongTailKD as LongTailKD
    from fairline.objectives import Objective as Objective
    from fairline.objectives import Reweighting as Reweighting
    from fairline.objectives import adjust as adjust
    from fairline.objectives import finetune_last_layer as finetune_last_layer
    from fairline.objectives import retrain_last_layer as retrain_last_layer
    from fairline.objectives import reweight_last_layer as reweight_last_layer
    from fairline.ranks import launch as launch
    from fairline.report.html import write_report as write_report
    from fairline.runs.hub import load as load
    from fairline.runs.hub import push as push
    from fairline.training import finetune as finetune
    from fairline.training import log_to as log_to
    from fairline.training import train as train
    from fairline.weights import import_masks as import_masks
    from fairline.weights import load_weights as load_weights

# Resolved on first use, so that ``import fairline`` does not wait for torch.
_LAZY = {
    "ARL": "fairline.objectives",
    "AdaAlpha": "fairline.objectives",
    "AdaMargin": "fairline.objectives",
    "AutoReP": "fairline.linearize",
    "BlockReLU": "fairline.linearize",
    "AuditReport": "fairline.audit",
    "BalancedKD": "fairline.objectives",
    "Chi2DRO": "fairline.objectives",
    "CompiledNetwork": "fairline.compiler",
    "CoordinateDescent": "fairline.linearize",
    "CryptoNAS": "fairline.linearize",
    "DeepReDuce": "fairline.linearize",
    "Delphi": "fairline.linearize",
    "SAFENet": "fairline.linearize",
    "ERM": "fairline.objectives",
    "FairlineError": "fairline.errors",
    "GroupDRO": "fairline.objectives",
    "GroupDrop": "fairline.objectives",
    "GroupedData": "fairline.data",
    "LDAM": "fairline.objectives",
    "Lagrangian": "fairline.objectives",
    "Layerwise": "fairline.linearize",
    "Linearized": "fairline.linearize",
    "LogitAdjust": "fairline.objectives",
    "LongTailKD": "fairline.objectives",
    "MaskedReLU": "fairline.masking",
    "Magnitude": "fairline.linearize",
    "Objective": "fairline.objectives",
    "Random": "fairline.linearize",
    "Reweighting": "fairline.objectives",
    "SENet": "fairline.linearize",
    "SNL": "fairline.linearize",
    "Shapley": "fairline.linearize",
    "Taylor": "fairline.linearize",
    "adjust": "fairline.objectives",
    "audit": "fairline.audit",
    "audit_predictions": "fairline.audit.predicted",
    "compile": "fairline.compiler",
    "data": "",
    "finetune": "fairline.training",
    "finetune_last_layer": "fairline.objectives",
    "import_masks": "fairline.weights",
    "launch": "fairline.ranks",
    "load": "fairline.runs.hub",
    "load_masks": "fairline.masking",
    "load_weights": "fairline.weights",
    "log_to": "fairline.training",
    "mask_relus": "fairline.masking",
    "models": "",
    "private": "",
    "predict": "fairline.inference",
    "push": "fairline.runs.hub",
    "relu_count": "fairline.masking",
    "retrain_last_layer": "fairline.objectives",
    "reweight_last_layer": "fairline.objectives",
    "save_masks": "fairline.masking",
    "train": "fairline.training",
    "write_report": "fairline.report.html",
}

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fairline' has no attribute '{name}'")
    if not _LAZY[name]:
        return importlib.import_module(f"fairline.{name}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    # Importing fairline.audit or fairline.inference puts the module under the function's name.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """``fairline.audit`` is a function here, though a package of that name holds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule to its parent when it is first imported.
        if not (name == "audit" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
