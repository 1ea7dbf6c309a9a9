"""RUN/backbone.safetensors, what a run is for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dino.config.schema import Config, ViewsConfig
from dino.errors import UserError
from dino.files import way_out
from dino.methods import METHODS
from dino.models import Backbone, save_backbone
from dino.models.weights import BACKBONE_FILE, describe
from dino.training.phases import views_at


def described(config: Config, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """What files of a checkpoint say of the backbones in them, so that they can be loaded by themselves."""
    preprocessing = _preprocessing(config, config.views)
    backbones = {name: getattr(module, "backbone", None) for name, module in modules.items()}
    return {
        name: describe(backbone, preprocessing, {}, layout="checkpoint")
        for name, backbone in backbones.items()
        if isinstance(backbone, Backbone)
    }


def training_facts(config: Config, step: int, fingerprint: str) -> dict[str, str | int]:
    """How weights came about, after so many steps, in a few words."""
    return {
        "objective": METHODS[config.objective.name].describe(config),
        "arch": config.model.arch,
        "steps": step,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "preset": config.views.preset,
        "initialisation": config.model.weight_init,
        "images": fingerprint,
    }


def write_backbone(folder: Path, config: Config, backbone: Backbone, step: int, fingerprint: str) -> None:
    """Write the result's backbone after `step` steps into a folder, with all that is needed to use it.

    Raises:
        UserError: it cannot be written.
    """
    preprocessing = _preprocessing(config, views_at(config, max(0, step - 1)))
    try:
        folder.mkdir(exist_ok=True)
        save_backbone(folder / BACKBONE_FILE, backbone, preprocessing, training_facts(config, step, fingerprint))
    except OSError as error:
        raise UserError(
            f"{folder / BACKBONE_FILE} could not be written after step {step} ({error.strerror or error}); checkpoints "
            f"are whole: {way_out(error)} and start the same command again"
        ) from error


def _preprocessing(config: Config, views: ViewsConfig) -> dict[str, Any]:
    preprocessing: dict[str, Any] = {"image_size": views.global_size, "mean": views.mean, "std": views.std}
    if config.data.bits != "8":
        preprocessing |= {"bits": config.data.bits, "range": config.data.range}
    return preprocessing
