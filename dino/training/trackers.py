"""W&B, TensorBoard and the others, by way of Accelerate; what is not asked for is not imported."""

import io
import os
import secrets
from typing import Any

from accelerate import Accelerator
from PIL import Image

from dino.config.read import get, leaves
from dino.config.schema import Config
from dino.errors import UserError
from dino.run import RunDirectory


def check_trackers(names: list[str]) -> None:
    """Raise a `UserError` if one of `tracking.backends` is not known or not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"unknown tracker '{name}' in tracking.backends: choose of {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in available:
            raise UserError(f"tracking.backends asks for {name}, which is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, config: Config, directory: RunDirectory) -> None:
    """Start what `tracking.backends` asks for, with all settings of the run."""
    tracking = config.tracking
    if not tracking.backends:
        return
    settings = {}
    for key in leaves(config):
        value = get(config, key)
        settings[key] = value if isinstance(value, int | float | str) else str(value)
    options = {"wandb": _wandb_options(accelerator, config, directory)} if "wandb" in tracking.backends else {}
    accelerator.init_trackers(tracking.project, config=settings, init_kwargs=options)


def log_pictures(accelerator: Accelerator, pictures: dict[str, bytes], step: int) -> None:
    """Send pictures (PNG), by name, to W&B, if it is a tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            images = {f"pictures/{name}": [Image.open(io.BytesIO(png))] for name, png in pictures.items()}
            tracker.log_images(images, step=step)


def _wandb_options(accelerator: Accelerator, config: Config, directory: RunDirectory) -> dict[str, Any]:
    """One W&B run for one run directory, whatever the number of starts; offline where there is no key."""
    import wandb

    options = {}
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
        options["mode"] = "offline"
    identity = directory.path / "wandb_id"
    if not identity.exists() and accelerator.is_main_process:
        identity.write_text(secrets.token_hex(8), encoding="utf-8")
    accelerator.wait_for_everyone()
    return {
        "id": identity.read_text(encoding="utf-8"),
        "resume": "allow",
        "name": config.tracking.name or directory.path.name,
        "dir": str(directory.path),
        **options,
    }
