"""Linear readouts of frozen features: DINOv2's sweep of heads, logistic regression, and few labels.

    python eval/linear.py --weights dinov2_vits14 --data imagenet/train --test imagenet/val
    accelerate launch eval/linear.py --weights runs/mine dino_vits16 --data path/to/labelled --readouts logistic few

Folders are classes. Without --test, 30 % of each class are the test.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from dino.commands import common
from dino.evaluation.labelled import Labelled, labelled_features
from dino.evaluation.probes import few_shot, logistic
from dino.evaluation.sweep import BLOCKS, sweep
from dino.models import load_backbone

READOUTS = ("sweep", "logistic", "few")
FEW = (1, 2, 5, 10)


def main() -> None:
    arguments = parse()
    common.output_file(arguments.out)
    accelerator = common.accelerator(arguments.wandb, {"data": arguments.data, "weights": arguments.weights})
    results: dict[str, Any] = {}
    for name in arguments.weights:
        backbone = load_backbone(name).to(accelerator.device)
        blocks = min(max(BLOCKS), backbone.depth)
        data = labelled_features(
            backbone, arguments.data, arguments.test, arguments.kind, arguments.seed, accelerator, blocks
        )
        if not accelerator.is_main_process:
            continue  # they have done their share of the features
        print(
            f"{name}: {len(data.train_labels):,} to learn from, {len(data.test_labels):,} to test, "
            f"{len(data.classes)} classes"
        )
        results[name] = {}
        for readout in arguments.readouts:
            results[name] |= {"sweep": by_sweep, "logistic": by_logistic, "few": by_few}[readout](
                data, arguments, accelerator
            )
        for what, value in results[name].items():
            print(f"  {what:<28}{value if isinstance(value, str) else f'{100 * value:.1f} %'}")
        accelerator.log({f"{name}/{what}": value for what, value in results[name].items()})
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def by_sweep(data: Labelled, arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    heads = sweep(
        data.train,
        data.train_labels,
        data.test,
        data.test_labels,
        len(data.classes),
        accelerator.device,
        arguments.epochs,
        seed=arguments.seed,
    )
    best = heads[0]
    chosen = f"{best.blocks} block(s){', mean patch' * best.with_patches}, rate {best.rate:g}"
    return {"linear/sweep": best.test, "linear/sweep_chosen": chosen}


def by_logistic(data: Labelled, arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    train = data.train.both
    answers = logistic(
        train, data.train_labels, data.test.both, iterations=200, standardise_by=train, tuning_seed=arguments.seed
    ).labels
    return {"linear/logistic": float((answers == data.test_labels).mean())}


def by_few(data: Labelled, arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Few labels of the training part, tested on all others of it; 5 draws."""
    fewest = int(np.bincount(data.train_labels).min())
    found: dict[str, Any] = {}
    for count in (count for count in FEW if count < fewest):
        for readout, accuracy in few_shot(data.train.class_tokens, data.train_labels, count, seeds=5).items():
            found[f"few/{count}_{readout}"] = accuracy.mean
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="W", help="released names, run directories, files"
    )
    parser.add_argument("--data", required=True, help="folder or zip archive, a folder for each class")
    parser.add_argument("--test", help="the same of the test images")
    parser.add_argument("--kind", default="auto", help="as data.kind")
    parser.add_argument("--readouts", nargs="+", choices=READOUTS, default=READOUTS)
    parser.add_argument("--epochs", type=int, default=10, help="of the sweep")
    parser.add_argument("--seed", type=int, default=0, help="of splits and heads")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to this W&B project too")
    return parser.parse_args()
