"""A name of the registry is all that a backbone needs: settings, network and file lead to each other."""

from dataclasses import replace

import pytest
import torch

from dino.config.read import assign
from dino.config.schema import CHOICES, Config
from dino.models import BACKBONES, ViTSpec, build_backbone
from dino.models.registry import family_named, family_of


def config_of(**settings) -> Config:
    """A resolved config with changes, `group__key=value`."""
    config = Config()
    for key, value in {"data__channels": 3, "model__ffn": "mlp", **settings}.items():
        assign(config, key.replace("__", "."), value)
    return config


def test_names_are_the_choices_of_the_setting():
    assert set(CHOICES["model.arch"]) == set(BACKBONES)


@pytest.mark.parametrize("arch", BACKBONES)
def test_settings_to_network_and_back(arch):
    """The spec's settings describe the same spec, by the same name."""
    family, config = BACKBONES[arch], config_of(model__arch=arch)
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert family_of(backbone.spec) is family_named(family.name) is family
    assert backbone.has_patches == family.has_patches
    assert bool(backbone.transformer_blocks) == family.has_blocks
    again = config_of()
    for key, value in family.settings(backbone.spec, again.model).items():
        assign(again, key, value)
    assert again.model.arch == arch
    assert family.spec(again, mask_token=False) == backbone.spec
    assert list(family.problems(config)) == []


def test_a_file_of_an_unknown_family():
    with pytest.raises(ValueError, match="'swin' is no family of backbones; those known are vit, resnet"):
        family_named("swin")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model__embed_dim": 30, "model__num_heads": 4}, "model.embed_dim=30 is not divisible by model.num_heads=4"),
        ({"views__global_size": 100}, "views.global_size=100 is not divisible by model.patch_size=16: use 96 or 112"),
        ({"views__local_size": 8}, "views.local_size=8 is smaller than one patch (model.patch_size=16)"),
        ({"model__position_size": 40}, "model.position_size=40 is not divisible by model.patch_size=16: use 32 or 48"),
        (
            {"model__positions": "rotary", "model__embed_dim": 36, "model__num_heads": 6},
            "model.positions=rotary needs heads whose width is a multiple of 4, not 6",
        ),
        (
            {"model__stem": "conv", "model__patch_size": 7, "views__local_size": 98},
            "model.stem=conv needs an even model.patch_size, not 7: its convolutions halve",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_cannot_work_are_told(settings, problem):
    assert list(BACKBONES["vit_small"].problems(config_of(**settings))) == [problem]


def test_a_size_in_other_words_keeps_them():
    """Weights of ViT-Ti's width, depth and heads, asked for as a small one with other numbers."""
    config = config_of(model__arch="vit_small", model__embed_dim=192, model__num_heads=3)
    spec = replace(ViTSpec(), embed_dim=192, depth=12, num_heads=3)
    assert BACKBONES["vit_small"].settings(spec, config.model)["model.arch"] == "vit_small"
    assert BACKBONES["vit_small"].settings(spec, config_of().model)["model.arch"] == "vit_tiny"
