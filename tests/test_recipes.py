"""Recipes: all load, their headers name a command of their own, and what was published is there to the letter."""

import re
from pathlib import Path

import pytest
import yaml

from dino.config.auto import PoolFacts, resolve
from dino.config.read import get
from dino.methods import METHODS
from dino.training.schedules import optimizer_schedules
from dino.training.settings import load

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "curate.yaml"})
IMAGES = 1_281_167
IMAGENET = PoolFacts(images=IMAGES, channels=3, kind="folder", bytes=700_000_000_000)
# reference: main_dino.py's defaults and the README's commands (meta-systems.md §2a).
VIT_100 = {
    **{"model.arch": "vit_small", "model.patch_size": 16, "model.drop_path": 0.1, "train.batch_size": 512},
    **{"model.position_interpolation": "offset"},
    **{"optim.name": "adamw", "optim.lr": 0.0005 * 512 / 256, "optim.lr_end": 1e-6, "train.steps": 250_228},
    **{"optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "optim.clip_grad": 3.0},
    **{"optim.clip_scope": "parameter", "optim.decay_tokens": True, "optim.betas": [0.9, 0.999]},
    **{"optim.warmup_steps": 10 * IMAGES // 512, "objective.freeze_last_layer_steps": IMAGES // 512},
    **{"objective.prototypes": 65536, "objective.centering": "center", "objective.center_momentum": 0.9},
    **{"objective.student_temperature": 0.1, "objective.teacher_temperature_start": 0.04},
    **{"objective.teacher_temperature_warmup": 0, "train.accumulation": 1},
    **{"objective.teacher_temperature": 0.04, "objective.teacher_momentum": 0.996},
    **{"objective.teacher_momentum_end": 1.0},
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
    | {"optim.warmup_steps": 10 * IMAGES // 1024, "objective.freeze_last_layer_steps": IMAGES // 1024},
    "dino_resnet50_imagenet": {key: value for key, value in VIT_100.items() if not key.startswith("model.")}
    | {"model.arch": "resnet50", "optim.name": "sgd", "optim.lr": 0.03 * 512 / 256}
    | {"optim.weight_decay": 1e-4, "optim.weight_decay_end": 1e-4}
    | {"views.global_scale": [0.14, 1.0], "views.local_scale": [0.05, 0.14]},
}
# reference: dinov2/configs (meta-systems.md §2c).
VITL16_SHORT = {
    **{"model.arch": "vit_large", "model.patch_size": 16, "model.ffn": "mlp", "model.layer_scale": 1e-5},
    **{"model.drop_path": 0.3, "model.drop_path_kind": "subset", "model.registers": 0},
    **{
        "model.position_interpolation": "offset",
        "model.weight_init": "dinov2",
        "train.batch_size": 2048,
        "train.steps": 100 * 1250,
    },
    **{"optim.name": "adamw", "optim.lr": 4e-3 * 2**0.5, "optim.lr_end": 1e-6, "optim.betas": [0.9, 0.999]},
    **{"optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "optim.decay_tokens": True},
    **{"optim.layer_decay": 0.9, "optim.patch_embed_lr": 0.2, "optim.warmup_steps": 10 * 1250},
    **{"optim.clip_grad": 3.0, "optim.clip_scope": "module", "objective.freeze_last_layer_steps": 1250},
    **{"objective.ibot_weight": 1.0, "objective.koleo_weight": 0.1, "objective.koleo_scope": "process"},
    **{"objective.mask_fraction": 0.5, "objective.mask_ratio": [0.1, 0.5], "objective.ibot_head": "shared"},
    **{"objective.prototypes": 65536, "objective.head_layers": 3, "objective.head_hidden": 2048},
    **{"objective.head_bottleneck": 256, "objective.norm_last_layer": False, "objective.student_temperature": 0.1},
    **{"objective.centering": "center", "objective.center_momentum": 0.9, "objective.teacher_momentum": 0.992},
    **{"objective.teacher_momentum_end": 1.0, "objective.teacher_temperature_start": 0.04},
    **{"objective.teacher_temperature": 0.07, "objective.teacher_temperature_warmup": 30 * 1250},
    **{"views.preset": "dinov2", "views.inverted_blur": True, "views.global_size": 224, "views.local_size": 96},
    **{"views.local_crops": 8, "views.global_scale": [0.32, 1.0], "views.local_scale": [0.05, 0.32]},
}
PUBLISHED |= {
    "dinov2_vitl16_imagenet_short": VITL16_SHORT,
    "dinov2_vitl14_imagenet22k": VITL16_SHORT
    | {"model.patch_size": 14, "model.ffn": "swiglu", "model.drop_path": 0.4, "views.local_size": 98}
    | {"train.batch_size": 3072, "train.steps": 500 * 1250, "optim.lr": 2e-4 * 3**0.5, "optim.warmup_steps": 80 * 1250}
    | {"optim.weight_decay_end": 0.2, "optim.layer_decay": 1.0, "objective.teacher_momentum": 0.994}
    | {"objective.prototypes": 131072, "objective.head_bottleneck": 384, "objective.centering": "sinkhorn"}
    | {"objective.ibot_head": "separate", "objective.ibot_prototypes": 131072, "objective.ibot_head_bottleneck": 256},
}
# Chen et al. 2020, §2.2 and B.6; Chen, Fan et al. 2020, §3; Chen, Xie & He 2021, §4, §5; Grill et al. 2020, §3.3 and
# B; Caron et al. 2020, §4 and A.1; Wu et al. 2025.
RESNET50 = {"model.arch": "resnet50", "views.global_size": 224, "views.local_crops": 0, "optim.clip_grad": 0}
LARS = {"optim.name": "lars", "optim.lr_end": 0.0, "optim.warmup_steps": 10 * IMAGES // 4096, "train.batch_size": 4096}
PUBLISHED |= {
    "simclr_imagenet": RESNET50
    | LARS
    | {"objective.name": "simclr", "views.preset": "simclr", "views.global_scale": [0.08, 1.0]}
    | {"objective.temperature": 0.1, "objective.head_hidden": 2048, "objective.head_output": 128}
    | {"optim.lr": 0.3 * 4096 / 256, "optim.weight_decay": 1e-6, "optim.weight_decay_end": 1e-6}
    | {"train.steps": round(100 * IMAGES / 4096)},
    "moco_imagenet": RESNET50
    | {"objective.name": "moco", "views.preset": "moco_v2", "views.global_scale": [0.2, 1.0]}
    | {"objective.temperature": 0.2, "objective.queue": 65536, "objective.head_hidden": 2048}
    | {"objective.head_output": 128, "objective.teacher_momentum": 0.999, "objective.teacher_momentum_end": 0.999}
    | {"optim.name": "sgd", "optim.lr": 0.03, "optim.lr_end": 0.0, "optim.warmup_steps": 0}
    | {"optim.weight_decay": 1e-4, "optim.weight_decay_end": 1e-4, "train.batch_size": 256}
    | {"train.steps": round(200 * IMAGES / 256)},
    "moco_v3_imagenet": RESNET50
    | {"model.arch": "vit_base", "model.patch_size": 16, "model.drop_path": 0.0}
    | {"objective.name": "moco_v3", "views.preset": "byol", "views.global_scale": [0.08, 1.0]}
    | {"objective.temperature": 0.2, "objective.teacher_momentum": 0.99, "objective.teacher_momentum_end": 1.0}
    | {"objective.head_hidden": 4096, "objective.head_output": 256, "objective.batch_norm": True}
    | {"objective.freeze_patch_projection": True, "optim.name": "adamw", "optim.lr": 1.5e-4 * 4096 / 256}
    | {"optim.lr_end": 0.0, "optim.warmup_steps": 40 * IMAGES // 4096, "train.batch_size": 4096}
    | {"optim.weight_decay": 0.1, "optim.weight_decay_end": 0.1, "train.steps": round(300 * IMAGES / 4096)},
    "byol_imagenet": RESNET50
    | LARS
    | {"objective.name": "byol", "views.preset": "byol", "views.global_scale": [0.08, 1.0]}
    | {"objective.predictor": True, "objective.teacher_momentum": 0.996, "objective.teacher_momentum_end": 1.0}
    | {"objective.head_hidden": 4096, "objective.head_output": 256, "objective.batch_norm": True}
    | {"optim.lr": 0.2 * 4096 / 256, "optim.weight_decay": 1.5e-6, "optim.weight_decay_end": 1.5e-6}
    | {"train.steps": round(1000 * IMAGES / 4096)},
    "swav_imagenet": RESNET50
    | LARS
    | {"objective.name": "swav", "views.preset": "swav", "views.global_scale": [0.14, 1.0], "views.local_crops": 6}
    | {"views.local_size": 96, "views.local_scale": [0.05, 0.14], "objective.prototypes": 3000, "objective.queue": 0}
    | {"objective.temperature": 0.1, "objective.epsilon": 0.05, "objective.sinkhorn_iterations": 3}
    | {"objective.freeze_prototypes_steps": IMAGES // 4096, "objective.batch_norm": True}
    | {"objective.head_hidden": 2048, "objective.head_output": 128, "optim.lr": 4.8, "optim.lr_end": 0.0048}
    | {"optim.weight_decay": 1e-6, "optim.weight_decay_end": 1e-6, "train.steps": round(800 * IMAGES / 4096)},
    "simdino_imagenet": {key: value for key, value in VIT_100.items() if not key.startswith("objective.")}
    | {"model.arch": "vit_base", "views.local_crops": 10, "train.batch_size": 1024, "optim.lr": 5e-4 * 1024 / 256}
    | {"objective.name": "simdino", "objective.epsilon": 0.5, "objective.teacher_momentum": 0.996}
    | {"objective.teacher_momentum_end": 1.0, "objective.head_layers": 3, "objective.head_hidden": 2048}
    | {"objective.head_output": 256, "train.steps": round(100 * IMAGES / 1024)}
    | {"optim.warmup_steps": 10 * IMAGES // 1024},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_loads_and_says_how_it_is_run(path):
    """By a command in the comment at its head, which names the file, or by `make`, whose rule does."""
    config = load(path)
    assert config.run.dir.startswith("runs/")
    header = re.match(r"(?:#.*\n)+", path.read_text())
    assert header, "no comment at the head"
    commands = re.sub(r"\\\n#", "", header[0])
    script = rf"^#   (?:python|accelerate launch .*)\s?train/pretrain\.py .*--config configs/{path.name}\b"
    launched = re.search(script, commands, re.M)
    made = re.search(rf"^#   make {path.stem}$", commands, re.M)
    assert launched or made
    if made:
        rule = (path.parents[1] / "Makefile").read_text().split(f"\n{path.stem}:")[1].split("\n\n")[0]
        assert f"--config configs/{path.name}" in rule


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_what_was_published(name):
    config, _ = resolve(load(CONFIGS / f"{name}.yaml"), IMAGENET)
    for key, value in PUBLISHED[name].items():
        assert get(config, key) == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_sets_nothing_that_was_not_published(name):
    """Whatever else it might set would be a change of the recipe that no figure above is compared with."""
    groups = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    given = {f"{group}.{key}" for group, values in groups.items() for key in values}
    assert given - PUBLISHED[name].keys() <= {"train.epochs", "run.dir"}


@pytest.mark.parametrize(
    ("name", "batches"), [("dino_vits16_imagenet_100ep", 250_228), ("dino_vits16_imagenet_300ep", 375_342)]
)
def test_schedules_run_as_published(name, batches):
    """Epoch by epoch, as main_dino.py has them (which leaves out the rest of a batch at the end of each epoch)."""
    config, _ = resolve(load(CONFIGS / f"{name}.yaml"), IMAGENET)
    schedules, epoch = optimizer_schedules(config), batches / config.train.epochs
    schedules |= METHODS["dino"].make_schedules(config)
    final = config.objective.teacher_temperature
    for name, step, value in (
        ("optim/lr", 5 * epoch, pytest.approx(config.optim.lr / 2, rel=1e-3)),
        ("optim/lr", 10 * epoch, pytest.approx(config.optim.lr, rel=1e-4)),
        ("optim/lr", batches - 1, pytest.approx(1e-6)),
        ("optim/weight_decay", batches / 2, pytest.approx(0.22, abs=1e-4)),
        ("teacher/momentum", batches / 2, pytest.approx(0.998, abs=1e-5)),
        ("teacher/temperature", 15 * epoch, pytest.approx((0.04 + final) / 2, abs=1e-5)),
        ("teacher/temperature", 30 * epoch, pytest.approx(final, abs=1e-5)),
    ):
        assert schedules[name](round(step)) == value, name
