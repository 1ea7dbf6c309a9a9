"""k nearest neighbours on frozen features, as DINO evaluates: cosine, votes weighted by e^(similarity / 0.07).

    dino knn --weights dino_vits16 --data imagenet/train --test imagenet/val
    torchrun --nproc_per_node 8 eval/knn.py --weights runs/mine dinov2_vits14 --data path/to/labelled

Folders are classes, or what --labels says. Without --test, 30 % of each class are the test.
"""

import argparse

import torch

from dino.commands.judge import judge, parser
from dino.evaluation.labelled import Labelled
from dino.evaluation.probes import knn

NEIGHBOURS = (10, 20, 100, 200)


def main() -> None:
    """Print and write what nearest neighbours make of each of the weights.

    Raises:
        UserError: weights, images or labels that cannot be read, or a file that cannot be written to.
    """
    judge(parser(__doc__).parse_args(), accuracies)


def accuracies(data: Labelled, arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """By as many neighbours as DINO and iBOT report, or all where there are fewer than ten."""
    results = {}
    for k in [k for k in NEIGHBOURS if k <= len(data.train_labels)] or [len(data.train_labels)]:
        answers = knn(data.train.class_tokens, data.train_labels, data.test.class_tokens, k)
        results[f"knn/top1_k{k}"] = float((answers == data.test_labels).mean())
    return results
