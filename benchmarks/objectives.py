"""DINO against DINOv2 at equal steps on small sets, and what each of DINOv2's parts does.

    python benchmarks/objectives.py --omniglot images_background.zip --caltech caltech101_128px.zip --out OUT
    python benchmarks/objectives.py --omniglot images_background.zip --out OUT --ablation

Trains the backbones of omniglot_cpu and caltech101_dinov2 from scratch, seed after seed and the objectives in turn, and
reads out frozen class tokens: 1-NN, and plain logistic regression (Omniglot: the article's protocol; Caltech-101: 30 %
of each class are the test). DINOv2's KoLeo has a weight of 0.02, and the published 0.1; the ablation starts from the
published one. Results are kept in OUT/results.jsonl; the same command goes on where it stopped.
On a CPU two runs side by side, a core each, are done sooner than one after the other on both: --at-once 2.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dino import cli, load_backbone
from dino.data import open_images
from dino.evaluation import omniglot
from dino.evaluation.features import extract
from dino.evaluation.labelled import labelled_features
from dino.evaluation.probes import knn, logistic
from dino.models import Backbone, random_like

REPOSITORY = Path(__file__).parents[1]
DINO = {"objective.ibot_weight": 0, "objective.koleo_weight": 0, "model.registers": 0}
DINOV2: dict[str, Any] = {"objective.ibot_weight": 1, "objective.koleo_weight": 0.1, "model.registers": 4}
OBJECTIVES = {"DINO": DINO, "DINOv2": DINOV2 | {"objective.koleo_weight": 0.02}, "DINOv2, KoLeo of 0.1": DINOV2}
ABLATION = {
    "without iBOT": DINOV2 | {"objective.ibot_weight": 0},
    "without KoLeo": DINOV2 | {"objective.koleo_weight": 0},
    "centre instead of Sinkhorn": DINOV2 | {"objective.centering": "center"},
    "without registers": DINOV2 | {"model.registers": 0},
    "all global crops masked": DINOV2 | {"objective.mask_fraction": 1.0},
    "masks of 30 to 70 %": DINOV2 | {"objective.mask_ratio": "[0.3,0.7]"},
    "separate heads": DINOV2 | {"objective.ibot_head": "separate"},
}
RECIPES = {"omniglot": "omniglot_cpu", "caltech": "caltech101_dinov2"}
SHORT = {
    "objective.teacher_momentum": 0.99,
    "objective.teacher_momentum_end": 0.99,
}  # best in short runs: configs/README.md


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    ledger = arguments.out / "results.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    pools = {name: getattr(arguments, name) for name in RECIPES if getattr(arguments, name)}
    rounds = [[(pool, name, seed) for seed in range(arguments.seeds) for pool in pools for name in arguments.only]]
    rounds += [[(pool, "untrained", seed) for seed in range(arguments.seeds) for pool in pools]]
    if arguments.ablation:
        rounds = [[("omniglot", name, 0) for name in ABLATION]]
    known = {(line["set"], line["objective"], line["seed"]) for line in done}
    for todo in rounds:
        with ThreadPoolExecutor(arguments.at_once) as side_by_side:
            runs = [
                side_by_side.submit(run, arguments, pool, pools[pool], name, seed)
                for pool, name, seed in todo
                if (pool, name, seed) not in known
            ]
            for finished in as_completed(runs):
                line = finished.result()
                done.append(line)
                with ledger.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    show(done)


def run(arguments: argparse.Namespace, pool: str, data: str, name: str, seed: int) -> dict[str, Any]:
    """Train and read out: a line of the results. The untrained network is shaped like that of the first objective."""
    line = {"set": pool, "objective": name, "seed": seed, "steps": arguments.steps}
    if name == "untrained":
        untrained = random_like(load_backbone(folder_of(arguments, pool, arguments.only[0], seed)))
        return {**line, **READ[pool](untrained, data), "minutes": 0.0}
    folder = folder_of(arguments, pool, name, seed)
    changes = SHORT | (OBJECTIVES | ABLATION)[name]
    changes |= {"data.root": data, "train.seed": seed, "train.steps": arguments.steps, "run.dir": folder}
    threads = max(1, torch.get_num_threads() // arguments.at_once)
    changes |= {"train.checkpoint_every": arguments.steps, "train.cpu_threads": threads}
    script, recipe = REPOSITORY / "train/pretrain.py", REPOSITORY / f"configs/{RECIPES[pool]}.yaml"
    settings = [f"{key}={value}" for key, value in changes.items()]
    began = time.perf_counter()
    command = [sys.executable, str(script), "--config", str(recipe), *settings]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    minutes = (time.perf_counter() - began) / 60
    return {**line, **READ[pool](load_backbone(folder), data), "minutes": round(minutes, 2)}


def folder_of(arguments: argparse.Namespace, pool: str, name: str, seed: int) -> Path:
    return arguments.out / f"{pool}_{re.sub('[^A-Za-z0-9.]+', '_', name)}_{seed}"


def read_omniglot(backbone: Backbone, data: str) -> dict[str, float]:
    drawings = omniglot.drawings(open_images(data, "omniglot"))
    tokens = extract(
        backbone, drawings.images, drawings.indices, lambda image: omniglot.article_input(image, backbone)
    ).class_tokens
    train, test, labels = drawings.train, drawings.test, drawings.labels
    return readouts(tokens[train], labels[train], tokens[test], labels[test])


def read_caltech(backbone: Backbone, data: str) -> dict[str, float]:
    found = labelled_features(backbone, data, None, "auto", 0, Accelerator(cpu=not torch.cuda.is_available()))
    return readouts(found.train.class_tokens, found.train_labels, found.test.class_tokens, found.test_labels)


READ = {"omniglot": read_omniglot, "caltech": read_caltech}


def readouts(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "knn": float((knn(train, train_labels, test, 1) == labels).mean()),
        "logistic": float((logistic(train, train_labels, test).labels == labels).mean()),
    }


def show(lines: list[dict[str, Any]]) -> None:
    """A table of means with their spread over seeds."""
    print("| set | objective | seeds | 1-NN | logistic | minutes |\n|---|---|---|---|---|---|")
    for pool, name in dict.fromkeys((line["set"], line["objective"]) for line in lines):
        of = [line for line in lines if (line["set"], line["objective"]) == (pool, name)]
        cells = [
            f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f} %"
            if len(of) > 1
            else f"{100 * values[0]:.1f} %"
            for values in ([line[key] for line in of] for key in ("knn", "logistic"))
        ]
        print(
            f"| {pool} | {name} | {len(of)} | {' | '.join(cells)} | {np.mean([line['minutes'] for line in of]):.1f} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", help="Omniglot's background set, folder or zip archive")
    parser.add_argument("--caltech", help="Caltech-101, folder or zip archive")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, which share the cores")
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument(
        "--ablation", action="store_true", help="instead: DINOv2 on Omniglot with one part changed, seed 0"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
