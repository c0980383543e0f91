"""Masked ReLUs: the one place that knows how a ReLU is switched off."""

from fairline.masking.budget import keep_largest, layer_table, relu_count
from fairline.masking.copying import copy_model, unwrap
from fairline.masking.files import MaskInfo, load_masks, save_masks
from fairline.masking.find import mask_relus
from fairline.masking.graph import masked_graph
from fairline.masking.layer import (
    GRANULARITIES,
    Granularity,
    MaskedReLU,
    masked_relus,
    surrogate_of,
)
from fairline.masking.sharing import patches, prototypes
from fairline.masking.surrogates import (
    MIXED,
    OF_DEGREE,
    POWER_SCALES,
    SQUARE_SCALE,
    SURROGATES,
    Polynomial,
    Surrogate,
    require_surrogate,
)

__all__ = [
    "GRANULARITIES",
    "MIXED",
    "OF_DEGREE",
    "POWER_SCALES",
    "SQUARE_SCALE",
    "SURROGATES",
    "Granularity",
    "MaskInfo",
    "MaskedReLU",
    "Polynomial",
    "Surrogate",
    "copy_model",
    "keep_largest",
    "layer_table",
    "load_masks",
    "mask_relus",
    "masked_graph",
    "masked_relus",
    "patches",
    "prototypes",
    "relu_count",
    "require_surrogate",
    "save_masks",
    "surrogate_of",
    "unwrap",
]
