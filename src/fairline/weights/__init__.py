"""Weights and masks that people bring: read as they are, into the network that they belong to."""

from fairline.weights.load import load_weights
from fairline.weights.masks import import_masks

__all__ = ["import_masks", "load_weights"]
