"""What commands do that judge backbones by labelled images: `dino knn`, `dino linear`, and any probe like them."""

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dino.commands import common
from dino.evaluation.labelled import Labelled, labelled_features
from dino.files import write_text
from dino.models import Backbone, load_backbone, random_like
from dino.tracking import Table, log_evaluations

Probe = Callable[[Labelled, argparse.Namespace, torch.device], dict[str, Any]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of such a command, which may add its own."""
    made = common.parser(
        description,
        weights={"nargs": "+", "help": "released names, run directories, files"},
        heads={},
        data={"help": "folder, archive or another source of labelled images"},
        test={},
        kind={},
        labels={},
        precision={},
        seed={"help": "of splits and heads"},
        out={"help": "JSON file of the results"},
        wandb={},
    )
    text = "do not judge the same network with random weights beside it, which takes as long"
    made.add_argument("--no-untrained", action="store_true", help=text)
    return made


def judge(arguments: argparse.Namespace, probe: Probe, most_blocks: int = 1) -> None:
    """Embed the images with each of the weights, print what the probe says, and write it to `--out`.

    Args:
        probe: labelled features, the arguments and the device to work on, to accuracies (and text) by name. Only one
            process calls it; the others have done their share of the features.
        most_blocks: of how many of the last blocks it takes the class token, where the backbone has so many.
    """
    common.output_file(arguments.out)
    common.check_wandb(arguments.wandb, arguments.weights)
    accelerator = common.accelerator()
    results: dict[str, dict[str, Any]] = {}
    rows: list[list[Any]] = []
    for name in arguments.weights:
        backbone = load_backbone(name, arguments.heads).to(accelerator.device)
        data = _features(backbone, arguments, accelerator, most_blocks)
        untrained = None
        if not arguments.no_untrained:
            logging.disable(logging.WARNING)  # what is left out has been told
            untrained = _features(random_like(backbone).to(accelerator.device), arguments, accelerator, most_blocks)
            logging.disable(logging.NOTSET)
        if not accelerator.is_main_process:
            continue
        sizes = f"{len(data.train_labels):,} to learn from, {len(data.test_labels):,} to test"
        print(f"{name}: {sizes}, {len(data.classes)} classes")
        results[name] = probe(data, arguments, accelerator.device)
        figures = dict(results[name])
        figures["chance: always the largest class"] = float(np.bincount(data.test_labels).max() / len(data.test_labels))
        if untrained is not None:
            beside = probe(untrained, arguments, accelerator.device)
            figures |= {f"untrained: {what}": value for what, value in beside.items()}
        common.print_table([[what, as_text(value)] for what, value in figures.items()])
        rows += [[name, what, value] for what, value in figures.items() if not isinstance(value, str)]
        if arguments.out:
            write_text(arguments.out, json.dumps(results, indent=1) + "\n")
    if arguments.wandb is not None and accelerator.is_main_process:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        tables = {f"evaluation/{probe.__module__.rpartition('.')[2]}": Table(["weights", "figure", "accuracy"], rows)}
        log_evaluations(accelerator, arguments.wandb, settings, tables, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _features(backbone: Backbone, arguments: argparse.Namespace, accelerator: Accelerator, blocks: int) -> Labelled:
    """Of the images to learn from and to test on, of so many of the last blocks, where there are so many."""
    return labelled_features(
        backbone,
        arguments.data,
        arguments.test,
        arguments.kind,
        arguments.seed,
        accelerator,
        min(blocks, backbone.depth),
        arguments.precision,
        arguments.labels,
    )


def as_text(value: float | str) -> str:
    """An accuracy as per cent; text as it is."""
    return value if isinstance(value, str) else f"{100 * value:.1f} %"
