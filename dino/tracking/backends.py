"""What each tracker needs so that one run directory is one run there, however often it is started."""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dino.config.schema import TrackingConfig
from dino.files import read_text, write_text

WANDB_ID, MLFLOW_ID = "wandb_id", "mlflow_id"  # files of a run directory
PATIENCE = 600  # seconds for which W&B may send what is left at the end: a server that is gone must not hold the job
logger = logging.getLogger(__name__)


def opened(
    name: str, tracking: TrackingConfig, directory: Path | None, settings: Mapping[str, Any], kind: str, start: int
) -> GeneralTracker:
    """A tracker that has begun, and knows the settings; see `Trackers`."""
    title = tracking.name or (directory.name if directory else None)
    if name == "wandb":
        return _wandb(tracking.project, title, directory, settings, kind)
    assert directory is not None, "evaluations are sent to W&B alone"
    options: dict[str, Any] = {}
    is_known = False
    if name == "tensorboard" and start:
        options["purge_step"] = start + 1  # what came after the checkpoint is written again
    if name == "trackio":
        options |= {"name": title, "resume": "allow"}
    if name == "mlflow":
        identity = directory / MLFLOW_ID
        is_known = identity.exists()
        options |= {"run_name": title, "run_id": read_text(identity, "remove it") if is_known else None}
    make = LOGGER_TYPE_TO_CLASS[name]
    tracker = make(tracking.project, **_folder(make, directory), **options)
    tracker.start()
    if not is_known:  # MLflow refuses parameters that have changed, such as a larger number of steps
        tracker.store_init_configuration(dict(settings))
    if name == "mlflow":
        write_text(directory / MLFLOW_ID, tracker.active_run.info.run_id)
    return tracker


def _folder(make: type[GeneralTracker], directory: Path) -> dict[str, str]:
    return {"logging_dir": str(directory)} if make.requires_logging_directory else {}


def _wandb(
    project: str, title: str | None, directory: Path | None, settings: Mapping[str, Any], kind: str
) -> GeneralTracker:
    """A W&B run, continued if the directory has one; offline where there is no key or W&B does not let it in."""
    import wandb

    options: dict[str, Any] = {"job_type": kind}
    if directory is not None:
        identity = directory / WANDB_ID
        if not identity.exists():
            write_text(identity, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8))
        options["dir"] = str(directory)
        if "WANDB_SWEEP_ID" not in os.environ:  # a sweep names its runs itself
            options |= {"id": read_text(identity, "remove it"), "resume": "allow", "name": title}
    patience = float(os.environ.get("WANDB_FINISH_TIMEOUT", PATIENCE))
    options["settings"] = wandb.Settings(finish_timeout=patience, finish_timeout_raises=True)
    tracker = LOGGER_TYPE_TO_CLASS["wandb"](project, **options)
    if "WANDB_MODE" in os.environ:
        tracker.start()
    else:
        _start_where_possible(tracker, directory or Path())
    if settings:
        tracker.store_init_configuration(dict(settings))
    return tracker


def _start_where_possible(tracker: GeneralTracker, directory: Path) -> None:
    """Begin online, or else offline."""
    import wandb

    try:
        if wandb.login(prompt=False):
            tracker.start()
            return
    except wandb.errors.Error as error:
        reason = str(error).strip().splitlines()[0]
        folder = directory / "wandb"
        logger.warning("W&B cannot be reached, the run is kept in %s: %s; `wandb sync` sends it later", folder, reason)
    tracker.init_kwargs["mode"] = "offline"
    tracker.start()


def summarise(run: Any, tables: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Tables and figures into a W&B run's summary."""
    import wandb

    run.summary.update(dict(figures))
    for name, table in tables.items():
        run.summary[name] = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])


def send_files(
    run: Any, kind: str, title: str, directory: Path, files: list[Path], metadata: Mapping[str, Any]
) -> None:
    """Files of a run directory as an artifact of a W&B run."""
    import wandb

    artifact = wandb.Artifact(f"{title}-{run.id}", type=kind, metadata=dict(metadata))
    for file in files:
        artifact.add_file(str(file), name=file.relative_to(directory).as_posix(), policy="immutable", skip_cache=True)
    run.log_artifact(artifact)
