"""What does it do to accuracy that large JPEGs are decoded at half their sides? Runs with and without, seed by seed.

    python benchmarks/reduced_decoding.py --caltech caltech101_128px.zip --out OUT

caltech101_dinov2 with DINO's objective and half its width, at two crops of 32 pixels, for which half the sides of
these photographs are enough. All images are embedded from whole files; 30 % of each class are the test.
"""

import argparse
import math
from pathlib import Path

import kit
import numpy as np
import torch
from accelerate import Accelerator
from objectives import DINO, SHORT, readouts

import dino
from dino import cli
from dino.evaluation.labelled import labelled_features
from dino.views import MultiCrop

WAYS = {"reduced": MultiCrop.enough, "whole": property(lambda views: math.inf)}
CROPS = {"views.preset": "dino", "views.global_size": 32, "views.global_scale": [0.4, 1.0]}
NETWORK = {"model.patch_size": 8, "model.embed_dim": 96, "model.num_heads": 3}


def main() -> None:
    arguments = parse()
    kit.begin(arguments)
    scores: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(arguments.seeds):
        for way, enough in WAYS.items():
            MultiCrop.enough = enough
            scores[way].append(score(arguments, arguments.out / f"{way}_{seed}", seed))
            print(way, seed, scores[way][-1], flush=True)
    rows = []
    for way, of_seeds in scores.items():
        row: list[object] = [way]
        for readout in ("knn", "logistic"):
            values, reduced = ([100 * each[readout] for each in some] for some in (of_seeds, scores["reduced"]))
            row += [spread(values), spread(np.subtract(values, reduced))]
        rows.append(row)
    kit.print_table("decoded", ["1-NN, %", "− reduced", "logistic, %", "− reduced"], rows)


def score(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Train, in this process, and read out."""
    settings = DINO | SHORT | CROPS | NETWORK
    settings |= {"train.seed": seed, "train.steps": arguments.steps, "data.workers": 0}
    settings |= {"train.cpu_threads": arguments.threads, "monitor.health_every": arguments.steps}
    settings |= {"train.checkpoint_every": arguments.steps, "tracking.backends": [], "data.cache": "none"}
    run = dino.train(arguments.caltech, folder, "caltech101_dinov2", **settings)
    cpu = Accelerator(cpu=not torch.cuda.is_available())
    found = labelled_features(run.backbone, arguments.caltech, None, "auto", 0, cpu)
    return readouts(found.train.class_tokens, found.train_labels, found.test.class_tokens, found.test_labels)


def spread(values: list[float] | np.ndarray) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def parse() -> argparse.Namespace:
    parser = kit.parser(__doc__ or "", official=False)
    parser.add_argument("--caltech", required=True, help="Caltech-101, folder or zip archive")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
