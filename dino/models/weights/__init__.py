"""Weights on disk: by which names they are known, in which layouts they come, loaded strictly, exported."""

from dino.models.weights.digest import weights_digest
from dino.models.weights.facts import describe
from dino.models.weights.load import (
    BACKBONE_FILE,
    copy_weights,
    directory_of,
    load_backbone,
    load_heads,
    load_strictly,
    random_like,
    save_backbone,
)

__all__ = [
    "BACKBONE_FILE",
    "copy_weights",
    "describe",
    "directory_of",
    "load_backbone",
    "load_heads",
    "load_strictly",
    "random_like",
    "save_backbone",
    "weights_digest",
]
