"""Backbones, and weights on disk."""

from dino.models.backbone import Backbone, Family
from dino.models.preprocess import Preprocess
from dino.models.registry import BACKBONES, build, build_backbone
from dino.models.resnet import ResNet, ResNetSpec
from dino.models.vit import VisionTransformer, ViTSpec
from dino.models.vit_family import SIZES
from dino.models.weights import copy_weights, load_backbone, random_like, save_backbone

__all__ = [
    "BACKBONES",
    "SIZES",
    "Backbone",
    "Family",
    "Preprocess",
    "ResNet",
    "ResNetSpec",
    "ViTSpec",
    "VisionTransformer",
    "build",
    "build_backbone",
    "copy_weights",
    "load_backbone",
    "random_like",
    "save_backbone",
]
