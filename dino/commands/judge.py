"""What commands do that judge backbones by labelled images: `dino knn`, `dino linear`, and any probe like them."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from dino.commands import common
from dino.evaluation.labelled import Labelled, labelled_features
from dino.files import write_text
from dino.models import load_backbone

Probe = Callable[[Labelled, argparse.Namespace, torch.device], dict[str, Any]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of such a command, which may add its own."""
    return common.parser(
        description,
        weights={"nargs": "+", "help": "released names, run directories, files"},
        heads={},
        data={"help": "folder or zip archive, a folder for each class"},
        test={},
        kind={},
        precision={},
        seed={"help": "of splits and heads"},
        out={"help": "JSON file of the results"},
        wandb={},
    )


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
        blocks = min(most_blocks, backbone.depth)
        data = labelled_features(
            backbone,
            arguments.data,
            arguments.test,
            arguments.kind,
            arguments.seed,
            accelerator,
            blocks,
            arguments.precision,
        )
        if not accelerator.is_main_process:
            continue
        sizes = f"{len(data.train_labels):,} to learn from, {len(data.test_labels):,} to test"
        print(f"{name}: {sizes}, {len(data.classes)} classes")
        results[name] = probe(data, arguments, accelerator.device)
        common.print_table([[what, as_text(value)] for what, value in results[name].items()])
        accelerator.log({f"{name}/{what}": value for what, value in results[name].items()})
        if arguments.out:
            write_text(arguments.out, json.dumps(results, indent=1) + "\n")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def as_text(value: float | str) -> str:
    """An accuracy as per cent; text as it is."""
    return value if isinstance(value, str) else f"{100 * value:.1f} %"
