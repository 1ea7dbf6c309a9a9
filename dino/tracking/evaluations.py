"""Evaluations to W&B: as a run of their own, or with the run whose weights they judge."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dino.config.schema import TrackingConfig
from dino.errors import UserError
from dino.run import RunDirectory
from dino.run_lock import is_held
from dino.tracking.backends import WANDB_ID
from dino.tracking.trackers import Table, Trackers

KIND = "evaluation"


def tracked_runs(weights: Sequence[str]) -> list[RunDirectory]:
    """The run directories that weights lie in, each of which W&B knows.

    Raises:
        UserError: one it does not, or one that is still trained: W&B would mix up what the two processes send.
    """
    runs = [RunDirectory(name) for name in weights]
    for name, run in zip(weights, runs, strict=True):
        if not ((run.path / WANDB_ID).is_file() and run.config.is_file()):
            raise UserError(
                f"{name} is no run with tracking.backends=[wandb]: say where its figures are to go, --wandb PROJECT"
            )
        if is_held(run.path):
            raise UserError(
                f"{name} is still trained: evaluate it later, or send its figures elsewhere, --wandb PROJECT"
            )
    return runs


def log_evaluations(
    accelerator: Accelerator,
    project: str,
    settings: Mapping[str, Any],
    tables: Mapping[str, Table],
    figures: Mapping[str, Mapping[str, Any]],
) -> None:
    """Tables and figures into the summary of a new run in `project`, or, if that is empty, of the weights' own runs.

    Args:
        settings: of the evaluation.
        figures: by the weights as they were named, then by name; of their own runs each gets its own, and all tables.
    """
    if project:
        tracking = TrackingConfig(["wandb"], project, None)
        named = {f"{Path(name).name}/{key}": value for name, of_one in figures.items() for key, value in of_one.items()}
        _send(Trackers(accelerator, tracking, None, settings, KIND), tables, named)
        return
    for name, run in zip(figures, tracked_runs(list(figures)), strict=True):
        tracking = replace(run.read_config().tracking, backends=["wandb"])
        _send(Trackers(accelerator, tracking, run.path, {}, KIND), tables, figures[name])


def _send(trackers: Trackers, tables: Mapping[str, Table], figures: Mapping[str, Any]) -> None:
    trackers.tables(tables, figures)
    trackers.end()
