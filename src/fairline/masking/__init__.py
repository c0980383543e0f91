"""Masked ReLUs: the one place that knows how a ReLU is switched off."""

from fairline.masking.budget import keep_largest, layer_table, relu_count
from fairline.masking.files import MaskInfo, load_masks, save_masks
from fairline.masking.find import mask_relus
from fairline.masking.layer import (
    GRANULARITIES,
    SQUARE_SCALE,
    SURROGATES,
    Granularity,
    MaskedReLU,
    Surrogate,
    masked_relus,
    surrogate_of,
)

__all__ = [
    "GRANULARITIES",
    "SQUARE_SCALE",
    "SURROGATES",
    "Granularity",
    "MaskInfo",
    "MaskedReLU",
    "Surrogate",
    "keep_largest",
    "layer_table",
    "load_masks",
    "mask_relus",
    "masked_relus",
    "relu_count",
    "save_masks",
    "surrogate_of",
]
