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
    accelerator = common.accelerator(arguments.wandb, {"data": arguments.data, "weights": arguments.weights})
    results = {}
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
        rows = [[what, as_text(value)] for what, value in results[name].items()]
        largest = float(np.bincount(data.test_labels).max() / len(data.test_labels))
        rows.append(["chance: always the largest class", as_text(largest)])
        if untrained is not None:
            figures = probe(untrained, arguments, accelerator.device)
            rows += [[f"untrained: {what}", as_text(value)] for what, value in figures.items()]
        common.print_table(rows)
        accelerator.log({f"{name}/{what}": value for what, value in results[name].items()})
        if arguments.out:
            write_text(arguments.out, json.dumps(results, indent=1) + "\n")
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
