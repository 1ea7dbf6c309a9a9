"""What `tracking.backends` asks for, by way of Accelerate's trackers; one that fails never takes the work along."""

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from dino.config.schema import TrackingConfig
from dino.errors import UserError
from dino.files import read_text
from dino.tracking import backends

logger = logging.getLogger(__name__)


class Table(NamedTuple):
    """A table as W&B takes it; a column's cells are of one type."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def check_trackers(names: list[str]) -> None:
    """Raise a `UserError` if one of `tracking.backends` is not known or not installed."""
    available = [str(tracker.value) for tracker in get_available_trackers()] if names else []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"unknown tracker '{name}' in tracking.backends: choose of {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in available:
            raise UserError(f"tracking.backends asks for {name}, which is not installed: pip install {name}")


class Trackers:
    """All that a run tells trackers, each of which is given up, with a warning, once it fails.

    Args:
        accelerator: only its main process tells anything.
        directory: of the run, in which trackers that can do so continue what an earlier start began; None: it has none,
            and each is a new run there.
        settings: of the run, by their keys; what no tracker takes as it is becomes text.
        kind: of work: pre-training, curation, evaluation.
        start: step from which this start goes on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tracking: TrackingConfig,
        directory: Path | None,
        settings: Mapping[str, Any],
        kind: str,
        start: int = 0,
    ):
        self.live: dict[str, GeneralTracker] = {}
        self.directory = directory
        self.is_known = directory is not None and (directory / backends.WANDB_ID).exists()
        if not accelerator.is_main_process:
            return
        texts = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        for name in tracking.backends:
            try:
                self.live[name] = backends.opened(name, tracking, directory, texts, kind, start)
            except Exception as error:
                self._give_up(name, error)

    def catch_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Send W&B the lines of metrics.jsonl that it lacks: of a start that was killed, or that did not ask for it.

        Offline it has those of earlier starts in their own files.
        """
        if "wandb" in self.live and not (self.is_known and self.live["wandb"].run.offline):
            for line in lines:
                values = {name: value for name, value in line.items() if name != "step"}
                if "wandb" in self.live and not self._is_known(line["step"]):
                    self._try("wandb", self.live["wandb"].log, values, step=line["step"])

    def log(self, values: Mapping[str, float | str], step: int | None = None) -> None:
        """Send metrics of a step, or of none; those that W&B has already, from before a kill, are not sent again."""
        for name, tracker in list(self.live.items()):
            if name == "wandb" and self._is_known(step):
                continue
            is_number_only = name == "mlflow"
            of_tracker = {key: of for key, of in values.items() if not (is_number_only and isinstance(of, str))}
            self._try(name, tracker.log, of_tracker, step=step)

    def pictures(self, pictures: Mapping[str, bytes], step: int | None = None) -> None:
        """Send pictures (PNG), by name, to W&B."""
        if "wandb" in self.live and not self._is_known(step):
            images = {name: [Image.open(io.BytesIO(png))] for name, png in pictures.items()}
            self._try("wandb", self.live["wandb"].log_images, images, step=step)

    def tables(self, tables: Mapping[str, Table], figures: Mapping[str, Any]) -> None:
        """Put tables and figures, by name, into the summary of the W&B run, where a later call replaces them."""
        if "wandb" in self.live:
            self._try("wandb", backends.summarise, self.live["wandb"].run, tables, figures)

    def artifact(self, kind: str, title: str, files: list[Path], metadata: Mapping[str, Any]) -> None:
        """Send files to W&B as a new version of an artifact, called `title` and the run's id.

        Args:
            kind: of artifact, as W&B sorts them: model, dataset.
            files: in the run's directory, by whose paths there they are called; they are not copied.
        """
        if "wandb" in self.live and self.directory is not None:
            run = self.live["wandb"].run
            self._try("wandb", backends.send_files, run, kind, title, self.directory, files, metadata)

    def uses(self, title: str, directory: Path) -> None:
        """Name the newest artifact of another run directory as this W&B run's input; offline W&B knows of none.

        Args:
            title: of the artifact, as its own run called it.
            directory: of that run, in the same project.
        """
        identity = directory / backends.WANDB_ID
        if "wandb" not in self.live or self.live["wandb"].run.offline or not identity.is_file():
            return
        name = f"{title}-{read_text(identity, 'remove it')}:latest"
        try:
            self.live["wandb"].run.use_artifact(name)
        except Exception as error:  # it was never sent, or to another project: no reason to give the tracker up
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("W&B does not get the artifact %s as this run's input: %s", name, reason)

    def end(self) -> None:
        """Wait until all is sent, for as long as the tracker has patience; nothing can be logged afterwards."""
        for name, tracker in list(self.live.items()):
            self._try(name, tracker.finish)
        self.live = {}

    def _is_known(self, step: int | None) -> bool:
        """Whether W&B has it, or a later one, from an earlier start: it would refuse this one."""
        return step is not None and step < self.live["wandb"].run.starting_step

    def _try(self, name: str, call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """What a tracker's library raises is its own matter, and of many kinds."""
        try:
            call(*arguments, **options)
        except Exception as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self.live.pop(name, None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        later = "; `wandb sync` sends later what it lacks" if name == "wandb" else ""
        logger.warning("%s is given up, the run goes on without it: %s%s", name, reason, later)
