"""The first run on a machine without GPU: the largest settings that fit into an hour there, by measurement."""

import time
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch

from dino.config.auto import PoolFacts, resolve
from dino.config.schema import Config
from dino.data import Pool, pool_of, read_or_reason, samples_per_epoch
from dino.errors import UserError
from dino.report.facts import duration
from dino.run import RunDirectory
from dino.training import launch
from dino.training.loader import Batches
from dino.training.settings import load
from dino.training.summary import views_text
from dino.training.trainer import Trainer

MINUTES = 60  # that a first run may take
FEWEST_STEPS, FEWEST_EPOCHS = 500, 5  # below which a run from random weights learns next to nothing
MOST_EPOCHS = 100
BATCH, MEASURED = 64, 16  # images of a step, and of one that is timed
LEAST, LONGEST = 3, 10.0  # steps that are timed, and seconds after which no more are
FREE = ("data.", "run.", "tracking.", "monitor.")  # settings that say nothing of what is to be trained
KEYS = ("model.arch", "model.patch_size", "views.global_size", "views.local_size", "views.local_crops")
CHOICES: tuple[tuple[Any, ...], ...] = (  # values of KEYS, from small to large
    ("vit_tiny", 4, 32, 16, 4),
    ("vit_tiny", 8, 64, 32, 4),
    ("vit_tiny", 8, 96, 48, 4),
    ("vit_small", 8, 96, 48, 4),
    ("vit_small", 16, 224, 96, 8),
)
SIZE = KEYS.index("views.global_size")


class Measured(NamedTuple):
    """What a choice comes to on this machine."""

    settings: dict[str, Any]
    views: str
    images_per_second: float
    epochs: int
    seconds: float


def is_first_run(config: Config, keys: list[str]) -> bool:
    """Whether someone named images and nothing of what is to be trained, where the defaults would take days."""
    has_device = torch.cuda.is_available() or torch.backends.mps.is_available()
    named = [key for key in keys if not key.startswith(FREE)]
    return not has_device and not named and not RunDirectory(config.run.dir).config.exists()


def propose(config: Config) -> UserError:
    """What to run instead, with the words to start it by.

    Raises:
        UserError: the images are too few, or cannot be read.
    """
    images = pool_of(config.data)
    side, count = typical_side(images), samples_per_epoch(images)
    batch = min(BATCH, count)
    choices = [CHOICES[0], *(choice for choice in CHOICES[1:] if choice[SIZE] <= 1.5 * side)]
    fitting: list[Measured] = []
    for choice in choices:
        measured = measure(config, images, dict(zip(KEYS, choice, strict=True)), batch)
        if fitting and measured.seconds > 60 * MINUTES:
            break
        fitting.append(measured)
    best = fitting[-1]
    words = " ".join(f"{key}={value}" for key, value in best.settings.items())
    data = f"data.root={config.data.root} run.dir={config.run.dir}"
    lines = [
        "this machine has no GPU, and the defaults (vit_small, 224², 100 epochs) are meant for one. Measured here:",
        *(f"  {_line(each)}" for each in fitting),
        f"To begin with the last of these, which takes {duration(best.seconds)}:",
        f"  dino train {data} {words}",
        "To run the defaults all the same, name one of them, for example train.epochs=100.",
    ]
    return UserError("\n".join(lines))


def typical_side(images: Pool) -> float:
    """The median of the shorter sides of some images, in pixels."""
    sides = []
    for index in np.linspace(0, len(images.names) - 1, min(20, len(images.names))).astype(int).tolist():
        image, _ = read_or_reason(images, index)
        if image is not None:
            sides.append(min(image.shape[1:]))
    if not sides:
        raise UserError("none of the images looked at can be read")
    return float(np.median(sides))


def measure(config: Config, images: Pool, choice: dict[str, Any], batch: int) -> Measured:
    """Time some steps of a choice, images read and cropped anew in each; nothing is written."""
    of_data = {"data.root": config.data.root, "data.kind": config.data.kind, "run.dir": config.run.dir}
    few = {"train.batch_size": min(MEASURED, batch), "train.steps": 1000, "data.cache": "none", "data.workers": 0}
    trial = load(None, choice | of_data | few)
    trial, _ = resolve(trial, PoolFacts(len(images.names), images.channels, images.kind))
    accelerator = launch.start(trial)
    trial.train.precision = launch.precision_of(accelerator)
    launch.set_process_state(trial.train)
    trainer = Trainer(trial, accelerator, RunDirectory(trial.run.dir), images)
    batches = Batches(trial, images, accelerator, 0, trial.train.steps, directory=None)
    began, ends = time.perf_counter(), []
    with closing(batches.between(0, 1000)) as micro_batches_by_step:
        for step, micro_batches in enumerate(micro_batches_by_step):
            trainer.take_step(step, micro_batches)
            ends.append(time.perf_counter())
            if len(ends) > LEAST or ends[-1] - began > LONGEST:
                break
    each = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0] - began
    speed, count = trial.train.batch_size / each, samples_per_epoch(images)
    fewest = max(FEWEST_EPOCHS, -(-FEWEST_STEPS * batch // count))
    epochs = max(fewest, min(MOST_EPOCHS, int(60 * MINUTES * speed / count)))
    settings = choice | {"train.batch_size": batch, "train.epochs": epochs}
    return Measured(settings, views_text(trial), speed, epochs, epochs * count / speed)


def _line(measured: Measured) -> str:
    network = f"{measured.settings['model.arch']}, patch {measured.settings['model.patch_size']}"
    return (
        f"{network}, {measured.views}: {measured.images_per_second:.1f} images/s, "
        f"{measured.epochs} epochs in {duration(measured.seconds)}"
    )
