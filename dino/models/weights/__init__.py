"""Weights on disk: by which names they are known, in which layouts they come, loaded strictly, exported."""

from dino.models.weights.load import Backbone, load_backbone, load_strictly, random_like, save_backbone

__all__ = ["Backbone", "load_backbone", "load_strictly", "random_like", "save_backbone"]
