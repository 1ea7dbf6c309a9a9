"""The backbones there are: one line a family makes its backbones usable everywhere."""

from typing import Any

from dino.config.schema import CHOICES, Config, ModelConfig
from dino.models.backbone import Backbone, Family
from dino.models.resnet import ResNetFamily
from dino.models.vit_family import ViTFamily

FAMILIES: tuple[Family, ...] = (
    ViTFamily(),
    ResNetFamily(),
)
BACKBONES: dict[str, Family] = {arch: family for family in FAMILIES for arch in family.archs}
CHOICES["model.arch"] = BACKBONES


def family_of(spec: Any) -> Family:
    """The family whose spec this is."""
    return next(family for family in FAMILIES if isinstance(spec, family.spec_type))


def family_named(name: str) -> Family:
    """The family that is called so in files.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"'{name}' is no family of backbones; those known are {', '.join(f.name for f in FAMILIES)}")


def build(spec: Any, model: ModelConfig | None = None, drop_path: float = 0.0) -> Backbone:
    """The backbone of a spec, with random weights from torch's random state; see `Family.build`."""
    return family_of(spec).build(spec, model, drop_path)


def build_backbone(config: Config, drop_path: float = 0.0, mask_token: bool = False) -> Backbone:
    """The backbone that a run's resolved settings describe, with random weights from torch's random state."""
    family = BACKBONES[config.model.arch]
    return family.build(family.spec(config, mask_token), config.model, drop_path)
