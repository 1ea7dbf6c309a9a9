"""What several commands share: the processes, the threads, the output file."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dino.distributed import cores
from dino.errors import UserError


def accelerator(wandb: str | None = None, settings: dict[str, Any] | None = None) -> Accelerator:
    """The processes that share an evaluation, on GPUs or on the CPU.

    Args:
        wandb: project to log to, or None.
        settings: what W&B notes of the call.
    """
    # Without being told so, Accelerate takes each of several CPU processes for the only one.
    found = Accelerator(cpu=not torch.cuda.is_available(), log_with="wandb" if wandb else None)
    if wandb:
        found.init_trackers(wandb, config=settings)
    return found


def set_cpu_threads(threads: int | str) -> None:
    """CPU threads of this process; `auto`: its share of the cores, where launchers would leave it with one."""

    torch.set_num_threads(cores() if threads == "auto" else int(threads))


def output_file(path: Path | None) -> None:
    """Make sure, before the work, that a file can be put there.

    Raises:
        UserError: it is a folder, or its folder cannot be made.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
