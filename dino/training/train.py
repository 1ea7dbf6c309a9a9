"""Pre-training, from Python and from the command line: from settings to a finished run."""

import contextlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dino.config.auto import keep_resolved, resolve
from dino.config.read import follow
from dino.config.schema import Config
from dino.data import pool_of
from dino.data.sources.several import as_root
from dino.methods import METHODS
from dino.models import Backbone, load_backbone
from dino.run import RunDirectory
from dino.run_lock import held, require_free
from dino.training import launch, resume
from dino.training.initial import follow_weights
from dino.training.pool_facts import measured
from dino.training.settings import load
from dino.training.summary import summary
from dino.training.trainer import Trainer


class Run:
    """A run to look at, as `dino.train` returns it; `dino.Run("runs/mine")` opens one that is there.

    Attributes:
        path: of its directory.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()

    @property
    def config(self) -> Config:
        """Every setting as resolved."""
        return RunDirectory(self.path).read_config()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dictionary for each logged step, by the names of metrics.jsonl."""
        return RunDirectory(self.path).read_metrics()

    @property
    def backbone(self) -> Backbone:
        """What the run is for, loaded and in evaluation mode; see `dino.load_backbone`."""
        return load_backbone(self.path)

    @property
    def report(self) -> Path:
        """The page with pictures and curves."""
        return RunDirectory(self.path).report

    @property
    def verdict(self) -> str:
        """The newest word on the run's health; empty before the first."""
        verdicts = [line["health/verdict"] for line in self.metrics if "health/verdict" in line]
        return verdicts[-1] if verdicts else ""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def train(
    data: Any = None,
    run: str | Path | None = None,
    recipe: str | Path | None = None,
    *,
    transform: Any = None,
    dry_run: bool = False,
    **settings: Any,
) -> Run:
    """Pre-train a vision backbone; called again with the same run, it goes on where that stopped.

    Args:
        data: folder, archive or manifest, as `data.root`, or a list of such; or a map-style data set of your own,
            whose entries are images (PIL, uint8 arrays or tensors), or tuples that begin with one.
        run: directory of the run, as `run.dir`.
        recipe: a recipe's name (`omniglot_cpu`) or a YAML file of settings.
        transform: what is done to each decoded image, uint8 (C, H, W) to uint8 (C, H, W), before it is cropped: for
            example a torchvision v2 transform.
        dry_run: check everything, say how much memory and time the run will take, and write nothing.
        settings: any other setting by its key: `train("images", "runs/mine", **{"train.epochs": 20})`.

    Raises:
        UserError: something only you can put right; the message says how.
    """
    values = dict(settings)
    if isinstance(data, list | tuple) and data and all(isinstance(part, str | Path) for part in data):
        data = as_root([str(part) for part in data])
    is_path = isinstance(data, str | Path)
    if is_path:
        values["data.root"] = str(data)
    if run is not None:
        values["run.dir"] = str(run)
    return run_training(load(recipe, values), None if is_path else data, transform, dry_run)


@launch.process_state_kept()
def run_training(config: Config, data_set: Any = None, transform: Any = None, dry_run: bool = False) -> Run:
    """The run that a config describes.

    Args:
        config: as `dino.training.settings.load` gives it; what is `auto` in it is resolved here.
        data_set: to be used instead of `data.root`; see `train`.
        transform, dry_run: see `train`.
    """
    accelerator = launch.start(config)
    config.train.precision = launch.precision_of(accelerator)
    directory = RunDirectory(config.run.dir)
    resume.refuse_what_is_in_the_way(directory)
    if dry_run:
        require_free(directory.path)
    # From the first look on: what another process changes in the directory meanwhile would be taken back.
    writes = accelerator.is_main_process and not dry_run
    with held(directory.path) if writes else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        return _run_in(directory, config, accelerator, data_set, transform, dry_run)


def _run_in(
    directory: RunDirectory, config: Config, accelerator: Accelerator, data_set: Any, transform: Any, dry_run: bool
) -> Run:
    """The run of `run_training`, in a directory that no other process writes to."""
    earlier = resume.earlier_config(directory, config.train.resume)
    checkpoint = resume.starting_point(directory, config.train.resume)

    # Weights to start from and to learn from, data, and the settings that depend on them.
    config, initial, reasons = follow_weights(config, earlier if checkpoint else None)
    outside = METHODS[config.objective.name].outside(config)
    if outside is not None:
        config, outside_reasons = follow(config, outside.settings, outside.source)
        reasons |= outside_reasons
    source = config.data.root if data_set is None else data_set
    config = keep_resolved(config, earlier) if earlier else config
    images = pool_of(config.data, source, transform)
    config, pool = measured(config, images, accelerator.is_main_process)
    config, auto_reasons = resolve(config, pool)
    if earlier:
        resume.refuse_other_config(directory, config, earlier, checkpoint is not None)

    # Networks, optimizer, the state of a checkpoint; then the steps.
    launch.set_process_state(config.train)
    trainer = Trainer(config, accelerator, directory, images, initial, outside)
    start = trainer.restore(checkpoint)
    if start > config.train.steps:
        accelerator.print(
            f"{directory.path} has taken {start:,} steps, more than train.steps={config.train.steps:,}: nothing is "
            "left to do, and nothing was changed"
        )
        return Run(directory.path)
    text = summary(config, pool, trainer.method, accelerator, directory, start, reasons | auto_reasons)
    accelerator.print(text)
    if dry_run:
        trainer.rehearse(start)
    else:
        stop = trainer.run(start, is_continued=initial is not None)
        accelerator.print(stop.farewell(directory.path))
    return Run(directory.path)
