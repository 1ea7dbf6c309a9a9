"""Linear probes of frozen features: DINOv2's sweep of heads, logistic regression, and few labels.

    dino linear --weights dinov2_vits14 --data imagenet/train --test imagenet/val
    torchrun --nproc_per_node 8 eval/linear.py --weights runs/mine --data path/to/labelled --probes logistic few

Folders are classes, or what --labels says. Without --test, 30 % of each class are the test.
"""

import argparse
from typing import Any

import numpy as np
import torch

from dino.commands.judge import judge, parser
from dino.evaluation.labelled import Labelled
from dino.evaluation.probes import few_shot, logistic
from dino.evaluation.sweep import BLOCKS, sweep

FEW = (1, 2, 5, 10)


def main() -> None:
    """Print and write what linear probes make of each of the weights.

    Raises:
        UserError: weights, images or labels that cannot be read, or a file that cannot be written to.
    """
    options = parser(__doc__)
    options.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    options.add_argument("--epochs", type=int, default=10, help="of the sweep")
    judge(options.parse_args(), accuracies, max(BLOCKS))


def accuracies(data: Labelled, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Of all probes asked for."""
    results: dict[str, Any] = {}
    for name in arguments.probes:
        results |= PROBES[name](data, arguments, device)
    return results


def by_sweep(data: Labelled, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The head that is best on a part of the training images, and which that is."""
    best = sweep(
        data.train,
        data.train_labels,
        data.test,
        data.test_labels,
        len(data.classes),
        device,
        arguments.epochs,
        seed=arguments.seed,
    )[0]
    features = f"{best.blocks} block(s), mean patch" if best.with_patches else f"{best.blocks} block(s)"
    return {"linear/sweep": best.test, "linear/sweep_chosen": f"{features}, rate {best.rate:g}"}


def by_logistic(data: Labelled, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Class token and mean patch token, standardised, C chosen on a part of the training images."""
    train, test = data.train.both, data.test.both
    answers = logistic(train, data.train_labels, test, iterations=200, standardise_by=train, tuning_seed=arguments.seed)
    return {"linear/logistic": float((answers.labels == data.test_labels).mean())}


def by_few(data: Labelled, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Few labels of the training part, tested on all others of it; five times."""
    fewest = int(np.bincount(data.train_labels).min())
    results: dict[str, Any] = {}
    for count in FEW:
        if count < fewest:
            for probe, accuracy in few_shot(data.train.class_tokens, data.train_labels, count, seeds=5).items():
                results[f"few/{count}_{probe}"] = accuracy.mean
    return results


PROBES = {"sweep": by_sweep, "logistic": by_logistic, "few": by_few}
