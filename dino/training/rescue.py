"""A run whose directory is taken from under it: noticed where it would be written to, and the state saved elsewhere."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dino.config.read import dump
from dino.config.schema import Config
from dino.errors import UserError
from dino.files import in_the_way, write_text
from dino.run import RunDirectory


def is_gone(directory: RunDirectory) -> bool:
    """Whether the directory was removed or renamed, or must not be written any more."""
    folders = (directory.path, directory.checkpoints)
    is_whole = directory.config.is_file() and all(folder.is_dir() for folder in folders)
    return not is_whole or any(in_the_way(folder, is_folder=True) for folder in folders)


def save_elsewhere(
    directory: RunDirectory,
    config: Config,
    steps: int,
    save: Callable[[int, RunDirectory], object],
    is_main_process: bool,
) -> UserError:
    """Save the state beside the run directory, or else where temporary files lie; every process must call this.

    Args:
        steps: taken so far.
        save: writes the state after so many steps into another run directory; raises `UserError` in all processes
            where it cannot.

    Returns:
        What to tell.
    """
    what = f"run.dir={directory.path} was removed or renamed, or cannot be written any more"
    name = f"{directory.path.name}-rescued-{steps}"
    places = (directory.path.absolute().with_name(name), Path(tempfile.gettempdir()) / name)
    for place in places:
        elsewhere = RunDirectory(place)
        with suppress(UserError, OSError):
            save(steps, elsewhere)
            if is_main_process:
                write_text(elsewhere.config, dump(config))
                with suppress(OSError):
                    shutil.copyfile(directory.metrics, elsewhere.metrics)
            return UserError(
                f"{what}: the state after step {steps:,} is saved in {place}; the same command with run.dir={place} "
                "goes on from there"
            )
    return UserError(
        f"{what}, and the state after step {steps:,} could be saved neither as {places[0]} nor as {places[1]}"
    )
