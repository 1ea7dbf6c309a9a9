"""Backbones, and weights on disk."""

from dino.models.preprocess import Preprocess
from dino.models.resnet import ResNet, ResNetSpec
from dino.models.vit import SIZES, VisionTransformer, ViTSpec
from dino.models.weights import Backbone, load_backbone, random_like, save_backbone

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
