"""Backbones, the DINO head, and weights on disk."""

from dino.models.head import DINOHead
from dino.models.resnet import ResNet, ResNetSpec
from dino.models.vit import SIZES, VisionTransformer, ViTSpec

__all__ = ["SIZES", "DINOHead", "ResNet", "ResNetSpec", "ViTSpec", "VisionTransformer"]
