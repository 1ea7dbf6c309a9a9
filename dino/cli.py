"""What every entry point does around its work: user errors become one message and exit code 2."""

import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dino.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Call `main`; print a `UserError` as `error: …` (once, whichever process has to say it) and exit with code 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot show
    try:
        main()
    except UserError as error:
        if error.alone or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = "make room on the disk and start the same command again; what was saved before is whole"
        print(f"error: {error.filename or 'a file'} cannot be written ({error.strerror}): {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what was saved, or else from the beginning", file=sys.stderr)
        sys.exit(130)


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
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local) if threads == "auto" else int(threads))


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
