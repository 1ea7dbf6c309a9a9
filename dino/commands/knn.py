"""k nearest neighbours on frozen features, as DINO evaluates: cosine, votes weighted by e^(similarity / 0.07).

    python eval/knn.py --weights dino_vits16 --data imagenet/train --test imagenet/val
    accelerate launch eval/knn.py --weights runs/mine dinov2_vits14 --data path/to/labelled

Folders are classes. Without --test, 30 % of each class are the test.
"""

import argparse
import json
from pathlib import Path

from dino.commands import common
from dino.evaluation.labelled import labelled_features
from dino.evaluation.probes import knn
from dino.models import load_backbone

NEIGHBOURS = (10, 20, 100, 200)


def main() -> None:
    arguments = parse()
    common.output_file(arguments.out)
    accelerator = common.accelerator(arguments.wandb, {"data": arguments.data, "weights": arguments.weights})
    results = {}
    for name in arguments.weights:
        backbone = load_backbone(name).to(accelerator.device)
        data = labelled_features(backbone, arguments.data, arguments.test, arguments.kind, arguments.seed, accelerator)
        counts = [k for k in NEIGHBOURS if k <= len(data.train_labels)] or [len(data.train_labels)]
        results[name] = {
            f"knn/top1_k{k}": float(
                (knn(data.train.class_tokens, data.train_labels, data.test.class_tokens, k) == data.test_labels).mean()
            )
            for k in counts
        }
        accelerator.log({f"{name}/{key}": value for key, value in results[name].items()})
        accelerator.print(
            f"{name}: {len(data.train_labels):,} to learn from, {len(data.test_labels):,} to test, "
            f"{len(data.classes)} classes\n  "
            + "  ".join(f"k={key.rsplit('k', 1)[1]}: {100 * value:.1f} %" for key, value in results[name].items())
        )
    if arguments.out and accelerator.is_main_process:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    accelerator.end_training()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="W", help="released names, run directories, files"
    )
    parser.add_argument("--data", required=True, help="folder or zip archive, a folder for each class")
    parser.add_argument("--test", help="the same of the test images")
    parser.add_argument("--kind", default="auto", help="as data.kind")
    parser.add_argument("--seed", type=int, default=0, help="of the split, where there is no --test")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to this W&B project too")
    return parser.parse_args()
