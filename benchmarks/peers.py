"""What peers and this project learn in the same minutes, from the same images, into the same ViT.

    python benchmarks/peers.py --omniglot images_background.zip --caltech caltech101_128px.zip --cifar CIFAR \\
        --out OUT --peers-python VENV/bin/python --lightly-train VENV/bin/lightly-train --official CLONE --minutes 5 15

Contestants: this project's defaults (`auto`) with its levers for short runs, its DINO as published, lightly's DINO
and DINOv2 (`--peers-python` has it), the official DINO (`--official`, your clone of facebookresearch/dino) and DINO
by lightly-train, as it is but for network, sizes of crops, batch and steps (a program, in an environment of its own).
Each has the given minutes of CPU time of one thread: a few steps first tell how many steps those are, and every
schedule is that long. Then 1-NN and logistic regression of class tokens by the same readouts. CIFAR is a folder with
train/ and test/, of the others 30 % of each class are the test (Omniglot: the article's split). Results are kept in
OUT/results.jsonl, and the same command goes on where it stopped; at the end a table, and OUT/peers.png. Run nothing
beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from kit import print_table
from objectives import read_omniglot, readouts
from peer_loops import keep

import dino
from dino import cli
from dino.evaluation.labelled import labelled_features
from dino.models import Backbone, random_like

HERE = Path(__file__).parent
SIZES = {  # of images and the network, for everybody
    "omniglot": {"size": 40, "local": 24, "patch": 8},
    "caltech": {"size": 64, "local": 32, "patch": 8},
    "cifar": {"size": 32, "local": 16, "patch": 4},
}
NETWORK = {"width": 192, "depth": 4, "heads": 3}
PILOTS = (5, 35)  # steps of two runs, whose times tell how many fit into the minutes
PUBLISHED = {  # DINO's, of the 100-epoch recipe
    **{"objective.centering": "center", "objective.prototypes": 4096, "objective.teacher_momentum": 0.996},
    **{"objective.teacher_momentum_end": 1.0, "objective.teacher_temperature": 0.04, "optim.lr": 0.000125},
    **{"optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "views.preset": "dino", "views.local_crops": 6},
    **{"views.global_scale": "[0.4,1.0]", "views.local_scale": "[0.05,0.4]"},
}
LEVERS = {
    **{"model.stem": "conv", "model.weight_init": "fan_in", "optim.name": "muon", "views.local_crops": 0},
    **{"views.global_scale": "[0.4,1.0]", "objective.head_hidden": 1024, "optim.weight_decay_end": 0.04},
}
OURS: dict[str, dict[str, Any]] = {"this project": LEVERS, "this project, DINO as published": PUBLISHED}
PEERS = {  # and the option that brings each
    "lightly, DINO": ("lightly-dino", "peers_python"),
    "lightly, DINOv2": ("lightly-dinov2", "peers_python"),
    "official DINO": ("official-dino", "official"),
    "lightly-train, DINO": ("lightly-train", "lightly_train"),
}


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ledger = arguments.out / "results.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    done = {(line["set"], line["contestant"], line["minutes"], line["seed"]) for line in lines}
    for key in plan(arguments):
        if key not in done:
            lines.append(run(arguments, *key))
            with ledger.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(json.dumps(lines[-1]), flush=True)
    show(lines)
    draw(lines, arguments.out / "peers.png")


def plan(arguments: argparse.Namespace) -> list[tuple[str, str, float, int]]:
    """(set, contestant, minutes, seed) of every run, short ones first."""
    contestants = [*OURS, *(name for name, (_, option) in PEERS.items() if getattr(arguments, option))]
    sets = [name for name in SIZES if getattr(arguments, name)]
    return [
        (pool, contestant, minutes, seed)
        for minutes in (0.0, *sorted(arguments.minutes))
        for seed in range(arguments.seeds)
        for pool in sets
        for contestant in (contestants if minutes else ["untrained"])
    ]


def run(arguments: argparse.Namespace, pool: str, contestant: str, minutes: float, seed: int) -> dict[str, Any]:
    """Train and read out: a line of the results."""
    data = str(getattr(arguments, pool))
    folder = arguments.out / "runs" / f"{pool}-{contestant}-{minutes:g}-{seed}".replace(" ", "-").replace(",", "")
    if contestant == "untrained":
        backbone, facts = untrained(data, pool, folder, seed), {"steps": 0}
    elif contestant in OURS:
        backbone, facts = ours(data, pool, OURS[contestant], minutes, folder, seed)
    elif PEERS[contestant][0] == "lightly-train":
        backbone, facts = lightly_train(arguments, data, pool, minutes, folder, seed)
    else:
        backbone, facts = peer(arguments, data, pool, PEERS[contestant][0], minutes, folder, seed)
    line = {"set": pool, "contestant": contestant, "minutes": minutes, "seed": seed, **facts}
    return line | READ[pool](backbone, data)


def settings(data: str, pool: str, seed: int) -> dict[str, Any]:
    """Of the network and the data, for this project's runs."""
    sizes = SIZES[pool]
    return {
        **{"data.root": training_images(data, pool), "data.workers": 0, "train.cpu_threads": 1, "train.seed": seed},
        **{"data.kind": "omniglot" if pool == "omniglot" else "auto", "tracking.backends": []},
        **{"views.global_size": sizes["size"], "views.local_size": sizes["local"], "model.patch_size": sizes["patch"]},
        **{"model.arch": "vit_tiny", "model.embed_dim": NETWORK["width"], "model.depth": NETWORK["depth"]},
        **{"model.num_heads": NETWORK["heads"], "model.drop_path": 0.0, "train.batch_size": 64},
    }


def training_images(data: str, pool: str) -> str:
    return f"{data}/train" if pool == "cifar" else data


def ours(
    data: str, pool: str, changes: dict[str, Any], minutes: float, folder: Path, seed: int
) -> tuple[Backbone, dict[str, float]]:
    given = settings(data, pool, seed) | changes
    if pool == "omniglot" and "views.preset" not in changes:
        given |= {"views.preset": "line_art", "views.mean": "[0.92]", "views.std": "[0.27]"}
    few, more = (timed(folder / f"pilot-{count}", given | {"train.steps": count}) for count in PILOTS)
    seconds = (more - few) / (PILOTS[1] - PILOTS[0])
    steps = int(60 * minutes / seconds)
    took = timed(folder / "run", given | {"train.steps": steps}) / 60
    return dino.load_backbone(folder / "run"), {"steps": steps, "took": round(took, 2)}


def timed(folder: Path, given: dict[str, Any]) -> float:
    """Seconds of CPU time that a run takes."""
    began = time.process_time()
    dino.train(run=folder, **given)
    return time.process_time() - began


def untrained(data: str, pool: str, folder: Path, seed: int) -> Backbone:
    """The backbone of this project's recipe before its first step."""
    given = settings(data, pool, seed) | LEVERS | {"train.steps": 1}
    return random_like(dino.load_backbone(dino.train(run=folder, **given).path))


def peer(
    arguments: argparse.Namespace, data: str, pool: str, name: str, minutes: float, folder: Path, seed: int
) -> tuple[Backbone, dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    python = arguments.peers_python if name.startswith("lightly") else sys.executable
    words = [
        python,
        HERE / "peer_loops.py",
        name,
        "--images",
        training_images(data, pool),
        "--out",
        folder / "backbone",
    ]
    words += ["--minutes", minutes, "--seed", seed]
    for option, value in (SIZES[pool] | NETWORK).items():
        words += [f"--{option}", value]
    if arguments.official:
        words += ["--official", arguments.official]
    subprocess.run([str(word) for word in words], check=True)
    backbone = dino.load_backbone(folder / "backbone")
    facts = backbone.description["training"]
    return backbone, {"steps": facts["steps"], "took": round(facts["minutes"], 2)}


def lightly_train(
    arguments: argparse.Namespace, data: str, pool: str, minutes: float, folder: Path, seed: int
) -> tuple[Backbone, dict[str, float]]:
    """The program by its command line, which wants files in a folder and gives timm's weights."""
    images = Path(training_images(data, pool))
    if images.suffix == ".zip":
        images = arguments.out / "images" / images.stem
        if not images.exists():
            zipfile.ZipFile(training_images(data, pool)).extractall(images)
    sizes = SIZES[pool]
    network = {"img_size": sizes["size"], "patch_size": sizes["patch"], "embed_dim": NETWORK["width"]}
    network |= {"depth": NETWORK["depth"], "num_heads": NETWORK["heads"]}
    network |= {"num_classes": 0, "dynamic_img_size": "true"}
    words = [arguments.lightly_train, "pretrain", f"data={images}", "model=timm/vit_tiny_patch16_224", "method=dino"]
    words += [f"model_args.{name}={value}" for name, value in network.items()]
    words += [f"transform_args.image_size=[{sizes['size']},{sizes['size']}]", "transform_args.local_view.num_views=6"]
    words += [f"transform_args.local_view.view_size=[{sizes['local']},{sizes['local']}]", f"seed={seed}"]
    words += ["batch_size=64", "num_workers=0", "accelerator=cpu", "devices=1", "epochs=1000000", "overwrite=true"]

    def timed_program(steps: int) -> float:
        before = os.times()
        words_of_run = [*words, f"out={folder}", f"trainer_args.max_steps={steps}"]
        subprocess.run(words_of_run, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    few, more = (timed_program(count) for count in PILOTS)
    steps = int(60 * minutes / ((more - few) / (PILOTS[1] - PILOTS[0])))
    took = timed_program(steps) / 60
    weights = torch.load(folder / "exported_models" / "exported_last.pt", weights_only=True)
    keep(folder / "backbone", weights, sizes | NETWORK, {"steps": steps, "minutes": took})
    return dino.load_backbone(folder / "backbone"), {"steps": steps, "took": round(took, 2)}


def read_folder(backbone: Backbone, data: str, test: str | None = None) -> dict[str, float]:
    found = labelled_features(backbone, data, test, "auto", 0, Accelerator(cpu=True))
    return readouts(found.train.class_tokens, found.train_labels, found.test.class_tokens, found.test_labels)


def read_cifar(backbone: Backbone, data: str) -> dict[str, float]:
    return read_folder(backbone, f"{data}/train", f"{data}/test")


READ: dict[str, Callable[[Backbone, str], dict[str, float]]] = {
    "omniglot": read_omniglot,
    "caltech": read_folder,
    "cifar": read_cifar,
}


def show(lines: list[dict[str, Any]]) -> None:
    """A table of means, and their spread over seeds."""
    rows = []
    for key in sorted({(line["set"], line["minutes"], line["contestant"]) for line in lines}):
        of = [line for line in lines if (line["set"], line["minutes"], line["contestant"]) == key]
        steps = f"{np.mean([line['steps'] for line in of]):,.0f}"
        rows.append([*key[1:], steps, len(of), *(spread([line[name] for line in of]) for name in ("knn", "logistic"))])
        rows[-1].insert(0, key[0])
    print_table("set", ["minutes", "contestant", "steps", "seeds", "1-NN", "logistic"], rows)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, per cent."""
    mean = f"{100 * np.mean(values):.1f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.1f} %" if len(values) > 1 else f"{mean} %"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by minutes: a panel for each set and readout, a line for each contestant."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    sets = [name for name in SIZES if any(line["set"] == name for line in lines)]
    figure, panels = pyplot.subplots(2, len(sets), figsize=(4 * len(sets), 6), squeeze=False, layout="constrained")
    for column, pool in enumerate(sets):
        for row, (name, title) in enumerate((("knn", "1-NN"), ("logistic", "logistic regression"))):
            panel = panels[row][column]
            of_set = [line for line in lines if line["set"] == pool]
            for contestant in [*OURS, *PEERS]:
                points = [line for line in of_set if line["contestant"] == contestant]
                minutes = sorted({line["minutes"] for line in points})
                values = [[100 * line[name] for line in points if line["minutes"] == at] for at in minutes]
                if minutes:
                    means, spreads = [np.mean(of) for of in values], [np.std(of) for of in values]
                    panel.errorbar(minutes, means, spreads, marker="o", capsize=3, label=contestant)
            blank = [100 * line[name] for line in of_set if line["contestant"] == "untrained"]
            panel.axhline(np.mean(blank), color="grey", linestyle=":", label="untrained")
            panel.set(title=f"{pool}, {title}", xlabel="minutes of one core", ylabel="accuracy, %")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", help="Omniglot's background set, folder or zip archive")
    parser.add_argument("--caltech", help="Caltech-101, folder or zip archive")
    parser.add_argument("--cifar", help="folder with train/ and test/, a folder for each class in them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 15, 45, 180])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peers-python", help="a Python that has lightly, and this project")
    parser.add_argument("--lightly-train", metavar="PROGRAM", help="the command of lightly-train, in its environment")
    parser.add_argument("--official", metavar="DIR", help="your clone of facebookresearch/dino")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
