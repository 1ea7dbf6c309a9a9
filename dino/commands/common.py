"""What several commands share: options, processes, threads, output files, tables."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from dino.config.describe import describe
from dino.distributed import cores
from dino.errors import UserError
from dino.files import without_controls
from dino.precision import PRECISIONS
from dino.tracking import check_trackers, tracked_runs


def path_of(text: str) -> Path:
    """A path of the command line; a shell leaves the ~ of `--out=~/here` as it is."""
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """One whose help shows the module's text as it is written, and whose errors are fit for a terminal."""

    def __init__(self, description: str | None, **settings: Any):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        super().error(without_controls(message))


OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {"required": True, "metavar": "W", "help": "released name, run directory or file"},
    "heads": {"type": int, "metavar": "N", "help": "attention heads, for weights that do not tell"},
    "data": {"required": True, "help": "folder, zip archive or another source of images"},
    "test": {"help": "the same of the test images"},
    "kind": {"default": "auto", "help": "as data.kind"},
    "labels": {
        "metavar": "L",
        "help": "as data.labels: folders, folders:-1, a column's name, or a table: labels.csv, labels.csv:column",
    },
    "precision": {"default": "auto", "choices": PRECISIONS, "help": "of features; auto: bf16 where the device has it"},
    "seed": {"type": int, "default": 0, "help": "of what is drawn at random"},
    "out": {"type": path_of, "help": "file or folder to write to"},
    "wandb": {
        "metavar": "PROJECT",
        "nargs": "?",
        "const": "",
        "help": "log to W&B too: to the runs that trained the weights, or as a run of its own to PROJECT",
    },
}


def parser(description: str | None, **options: dict[str, Any]) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        description: the module's text.
        options: names of OPTIONS, in the order of `--help`, with what is other than there.
    """
    made = Parser(description)
    for name, changes in options.items():
        made.add_argument(f"--{name}", **OPTIONS[name] | changes)
    return made


def settings_parser(description: str | None, blank: Any) -> argparse.ArgumentParser:
    """The parser of a command that takes a recipe and settings; it has a `--config`, and all settings in its help.

    Args:
        description: the module's text.
        blank: a config of the settings' defaults.
    """
    made = Parser(description, epilog="settings, in YAML as groups and keys or as key=value:\n" + describe(blank))
    made.add_argument("--config", metavar="FILE", help="YAML file of settings, for example one of configs/")
    made.add_argument(
        "settings",
        nargs="*",
        metavar="[RECIPE] key=value",
        help="a recipe's name, such as omniglot_cpu, then settings that take precedence over its own",
    )
    return made


def accelerator() -> Accelerator:
    """The processes that share an evaluation, on GPUs or on the CPU."""
    # Without being told so, Accelerate takes each of several CPU processes for the only one.
    return Accelerator(cpu=not torch.cuda.is_available())


def check_wandb(project: str | None, weights: Sequence[str]) -> None:
    """Make sure, before the work, that its figures can go where `--wandb` says; raises `UserError`."""
    if project is not None:
        check_trackers(["wandb"])
    if project == "":
        tracked_runs(weights)


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


def print_table(rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print rows of cells in columns, the first to the left and the others to the right; a caption stands above."""
    if caption:
        print(f"\n{caption}\n")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + row[0].ljust(widths[0]) + "".join(cells))
