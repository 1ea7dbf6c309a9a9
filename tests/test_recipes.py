"""Recipes: all load, their headers name a command of their own, and what was published is there to the letter."""

import re
from pathlib import Path

import pytest

from dino import config as configuration
from dino.training.auto import Pool, resolve

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
IMAGES = 1_281_167
IMAGENET = Pool(images=IMAGES, channels=3, kind="folder", bytes=700_000_000_000)
# reference: main_dino.py's defaults and the README's commands (meta-systems.md §2a).
VIT_100 = {
    **{"model.arch": "vit_small", "model.patch_size": 16, "model.drop_path": 0.1, "train.batch_size": 512},
    **{"optim.name": "adamw", "optim.lr": 0.0005 * 512 / 256, "optim.lr_end": 1e-6, "train.steps": 250_228},
    **{"optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "optim.clip_grad": 3.0},
    **{"optim.clip_scope": "parameter", "optim.decay_tokens": True, "optim.betas": [0.9, 0.999]},
    **{"optim.warmup_steps": 10 * IMAGES // 512, "optim.freeze_last_layer_steps": IMAGES // 512},
    **{"objective.prototypes": 65536, "objective.centering": "centre", "objective.center_momentum": 0.9},
    **{"objective.student_temperature": 0.1, "objective.teacher_temperature_start": 0.04},
    **{"objective.teacher_temperature": 0.04, "objective.momentum": 0.996, "objective.momentum_end": 1.0},
    **{"objective.norm_last_layer": True, "objective.head_layers": 3, "objective.head_hidden": 2048},
    **{"objective.head_bottleneck": 256, "views.preset": "dino", "views.global_size": 224, "views.local_size": 96},
    **{"views.local_crops": 8, "views.global_scale": [0.4, 1.0], "views.local_scale": [0.05, 0.4]},
    **{"views.mean": [0.485, 0.456, 0.406], "views.std": [0.229, 0.224, 0.225]},
}
PUBLISHED = {
    "dino_vits16_imagenet_100ep": VIT_100,
    "dino_vits16_imagenet_300ep": VIT_100
    | {"train.batch_size": 1024, "optim.lr": 0.002, "train.steps": 375_342, "objective.norm_last_layer": False}
    | {"objective.teacher_temperature": 0.07, "objective.teacher_temperature_warmup": 37_534}
    | {"optim.warmup_steps": 10 * IMAGES // 1024, "optim.freeze_last_layer_steps": IMAGES // 1024},
    "dino_resnet50_imagenet": {key: value for key, value in VIT_100.items() if not key.startswith("model.")}
    | {"model.arch": "resnet50", "optim.name": "sgd", "optim.lr": 0.03 * 512 / 256}
    | {"optim.weight_decay": 1e-4, "optim.weight_decay_end": 1e-4}
    | {"views.global_scale": [0.14, 1.0], "views.local_scale": [0.05, 0.14]},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_loads_and_says_how_it_is_run(path):
    config = configuration.load(path)
    assert config.run.dir.startswith("runs/")
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(rf"make {path.stem}\b|configs/{path.name}\b", header)


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_what_was_published(name):
    config, _ = resolve(configuration.load(Path(__file__).parents[1] / "configs" / f"{name}.yaml"), IMAGENET)
    for key, value in PUBLISHED[name].items():
        found = configuration.get(config, key)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), key
