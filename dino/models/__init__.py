"""Backbones, and weights on disk."""

from dino.config.schema import CHOICES
from dino.models.preprocess import Preprocess
from dino.models.resnet import ResNet, ResNetSpec
from dino.models.vit import SIZES, VisionTransformer, ViTSpec
from dino.models.weights import Backbone, load_backbone, random_like, save_backbone

CHOICES["model.arch"] = (*SIZES, "resnet18", "resnet50")

__all__ = [
    "SIZES",
    "Backbone",
    "Preprocess",
    "ResNet",
    "ResNetSpec",
    "ViTSpec",
    "VisionTransformer",
    "load_backbone",
    "random_like",
    "save_backbone",
]
