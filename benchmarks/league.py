"""All methods side by side: one backbone, three sets, at equal images and at equal minutes.

    python benchmarks/league.py --data DIR --out OUT --at-once 2

DIR has omniglot_images_background.zip, caltech101_128px.zip and cifar10_jpeg.zip. Of each, 4,000 images without labels
train a small ViT with a convolutional stem, with each method's published augmentation (handwriting: small affine
changes for all) and its settings scaled to so small a run (METHODS, below). Frozen class tokens are read out on 1,000
other images: nearest neighbour and logistic regression from 2,000 labels, logistic regression from 10 labels a class;
RankMe of the features; minutes of CPU time of one core for training; memory as `--dry-run` counts it, without the
program.

A line for each finished run goes to OUT/league.jsonl; the same command goes on where it stopped. Table:
OUT/league.md, picture: OUT/league.png. With --search every method and set gets the same four trials first (TRIALS:
another seed, judged by 1-NN of the second thousand labelled images among the first, so that nothing is chosen by test
images), and then its best settings; all trials are in the ledger. --scale 10 makes runs ten times as long.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
import numpy as np
import torch
from kit import build_trainer

from dino import cli
from dino.data import Pool, open_images
from dino.evaluation.probes import few_labelled, knn, logistic
from dino.models.preprocess import Preprocess
from dino.monitor.indicators.features import rank_me
from dino.training.loader import Batches
from dino.training.memory import Memory
from dino.training.trainer import Trainer

FILES = {
    "omniglot": "omniglot_images_background.zip",
    "caltech101": "caltech101_128px.zip",
    "cifar10": "cifar10_jpeg.zip",
}
TRAIN, LABELLED, TEST, SIDE, CROP = 4000, 2000, 1000, 32, 24
BATCH, IMAGES, SECONDS = 64, 7680, 16.0  # of a run, at scale 1
LR = 0.001
HEAD = {"objective.head_hidden": 256, "objective.head_output": 64}
DINO_HEAD = {"objective.head_hidden": 256, "objective.head_bottleneck": 64, "objective.prototypes": 512}
DINO_HEAD |= {"objective.centering": "sinkhorn", "objective.teacher_temperature": 0.04}
DINOV2 = {"objective.ibot_weight": 1.0, "objective.koleo_weight": 0.02, "model.registers": 4}
METHODS: dict[str, dict[str, Any]] = {  # settings, and whether there is a teacher, whose momentum is then scaled
    "simclr": HEAD | {"objective.name": "simclr", "views.preset": "simclr"},
    "moco": HEAD | {"objective.name": "moco", "views.preset": "moco_v2", "objective.queue": 1024},
    "moco_v3": HEAD | {"objective.name": "moco_v3", "views.preset": "byol"},
    "byol": HEAD | {"objective.name": "byol", "views.preset": "byol"},
    "swav": HEAD | {"objective.name": "swav", "views.preset": "swav", "objective.prototypes": 100},
    "dino": DINO_HEAD | {"objective.name": "dino", "views.preset": "dino"},
    "dinov2": DINO_HEAD | DINOV2 | {"objective.name": "dino", "views.preset": "dinov2"},
    "simdino": HEAD | {"objective.name": "simdino", "views.preset": "dino"},
}
WITHOUT_TEACHER = ("simclr", "swav")
OWN = {  # the trial of a method's own setting; the other three are the rate as it is, doubled and halved
    "simclr": {"objective.temperature": 0.5},
    "moco": {"objective.temperature": 0.07},
    "moco_v3": {"objective.temperature": 1.0},
    "byol": {"objective.batch_norm": "false"},
    "swav": {"objective.epsilon": 0.03},
    "dino": {"objective.teacher_temperature": 0.07},
    "dinov2": {"objective.ibot_weight": 0.3},
    "simdino": {"objective.epsilon": 0.2},
}
TRIALS: dict[str, list[dict[str, Any]]] = {
    name: [{}, {"optim.lr": 2 * LR}, {"optim.lr": LR / 2}, own] for name, own in OWN.items()
}
TRIES = 4
CONDITIONS = {"images": "equal images", "minutes": "equal minutes"}
FIGURES = {"knn": "1-NN", "logistic": "logistic", "few": "10 labels a class"}


class InMemory:
    """Images (N, C, side, side) uint8 as a data set."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        prepare(name, arguments.data / FILES[name], arguments.out)
    ledger = Ledger(arguments.out / "league.jsonl")
    pairs = [(pool, method) for pool in arguments.sets for method in arguments.methods]
    if arguments.search:
        search = [task(arguments, "search", *pair, 100, trial) for pair in pairs for trial in range(TRIES)]
        run_all(search, ledger, arguments)
    plan = [
        task(arguments, "images", pool, "untrained", seed) for seed in range(arguments.seeds) for pool in arguments.sets
    ]
    for seed in range(arguments.seeds):
        for condition in CONDITIONS:
            plan += [task(arguments, condition, *pair, seed, ledger.best(*pair, arguments)) for pair in pairs]
    run_all(plan, ledger, arguments)
    lines = [line for line in ledger.lines if line["scale"] == arguments.scale]
    (arguments.out / "league.md").write_text(table(lines))
    print(table(lines))
    draw(lines, arguments.out / "league.png")


class Ledger:
    """Finished runs, one JSON line each."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, wanted: dict[str, Any]) -> bool:
        return any(all(line[key] == value for key, value in wanted.items()) for line in self.lines)

    def best(self, pool: str, method: str, arguments: argparse.Namespace) -> int:
        """The trial with the best nearest neighbours; the first without a search."""
        if not arguments.search:
            return 0
        wanted = task(arguments, "search", pool, method, 100)
        wanted.pop("trial")
        trials = [line for line in self.lines if all(line[key] == value for key, value in wanted.items())]
        return max(trials, key=lambda line: line["knn"])["trial"]


def task(arguments: argparse.Namespace, condition: str, pool: str, method: str, seed: int, trial: int = 0) -> dict:
    named = {"condition": condition, "set": pool, "method": method, "seed": seed, "trial": trial}
    return named | {"scale": arguments.scale}


def run_all(tasks: list[dict[str, Any]], ledger: Ledger, arguments: argparse.Namespace) -> None:
    left = [wanted for wanted in tasks if not ledger.has(wanted)]
    began, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.at_once, mp_context=context) as workers:
        runs = [workers.submit(run, wanted, str(arguments.out)) for wanted in left]
        for number, finished in enumerate(as_completed(runs), 1):
            if finished.exception() is not None:
                workers.shutdown(cancel_futures=True)  # what is wrong is told now, not after all the others
            ledger.add(finished.result())
            minutes = (time.perf_counter() - began) / 60
            rest = minutes / number * (len(left) - number)
            shown = {key: value for key, value in ledger.lines[-1].items() if key != "settings"}
            print(f"{number} of {len(left)}, {rest:.0f} min left: {json.dumps(shown)}", flush=True)


def prepare(name: str, archive: Path, out: Path) -> None:
    """Draw and decode the images of a set once: OUT/data/NAME.npz."""
    file = out / "data" / f"{name}.npz"
    if file.exists():
        return
    kind = "omniglot" if name == "omniglot" else "auto"
    pool, generator = open_images(str(archive), kind), np.random.default_rng(0)
    classes = np.array([Path(path).parts[1 if name == "omniglot" else -2] for path in pool.names])
    is_test = np.array(["/test/" in path for path in pool.names])
    order = generator.permutation(len(classes))
    test = (order[is_test[order]] if is_test.any() else order)[:TEST]
    train = np.setdiff1d(order[~is_test[order]], test)
    train = generator.permutation(train)[:TRAIN]
    file.parent.mkdir(exist_ok=True)
    np.savez(file, train=pixels(pool, train), test=pixels(pool, test), of_train=classes[train], of_test=classes[test])


def pixels(pool: Pool, indices: np.ndarray) -> np.ndarray:
    """(n, C, SIDE, SIDE) uint8, the middles of images."""
    crop = Preprocess(SIDE, (), ()).crop
    return torch.stack([crop(pool.read(int(index))) for index in indices]).numpy()


def run(wanted: dict[str, Any], out: str) -> dict[str, Any]:
    """Train and read out: a line of the ledger."""
    torch.set_num_threads(1)
    data = dict(np.load(Path(out) / "data" / f"{wanted['set']}.npz"))
    method, images = wanted["method"], InMemory(data["train"])
    name = "dino" if method == "untrained" else method
    settings = settings_of(wanted["set"], name, wanted["scale"]) | TRIALS[name][wanted["trial"]]
    settings |= {"train.seed": wanted["seed"], "run.dir": f"{out}/unused"}
    steps = round(IMAGES * wanted["scale"] / BATCH)
    if wanted["condition"] == "minutes":
        each = median(seconds_of_steps(build_trainer(settings | {"train.steps": 10}, images), 6)[2:])
        steps = max(10, int(SECONDS * wanted["scale"] / each))
    trainer = build_trainer(settings | {"train.steps": steps}, images)
    seconds = [] if method == "untrained" else seconds_of_steps(trainer, steps)
    line = wanted | {"steps": len(seconds), "minutes": round(sum(seconds) / 60, 3), "mb": megabytes(trainer)}
    return (
        line
        | {"settings": {key: str(value) for key, value in settings.items()}}
        | read_out(trainer, data, wanted["seed"], by_test=wanted["condition"] != "search")
    )


def settings_of(pool: str, method: str, scale: float) -> dict[str, Any]:
    settings = {
        "views.global_size": CROP,
        "views.global_scale": "[0.4,1.0]",
        "views.local_crops": 0,  # in runs so short they cost accuracy: configs/README.md
        "model.arch": "vit_tiny",
        "model.patch_size": 6,
        "model.stem": "conv",
        "model.embed_dim": 96,
        "model.depth": 4,
        "model.num_heads": 3,
        "model.drop_path": 0.0,
        "model.weight_init": "fan_in",
        "optim.lr": LR,
        "optim.weight_decay_end": 0.04,
        "train.batch_size": BATCH,
        "train.precision": "fp32",
        "train.cpu_threads": 1,
    } | METHODS[method]
    if method not in WITHOUT_TEACHER:  # the shorter a run, the faster a teacher (Grill et al. 2020, §3.3 and appendix)
        momentum = min(0.996, 1 - 0.05 / max(0.5, scale))
        settings |= {"objective.teacher_momentum": momentum, "objective.teacher_momentum_end": momentum}
    drawings = {"views.preset": "line_art", "views.mean": "[0.92]", "views.std": "[0.27]"}  # as omniglot_cpu
    return settings | (drawings if pool == "omniglot" else {})


def seconds_of_steps(trainer: Trainer, steps: int) -> list[float]:
    """CPU time of each step, with making its views."""
    config = trainer.config
    batches, taken = Batches(config, trainer.images, trainer.accelerator, 0, config.train.steps, None), []
    began = time.process_time()
    with closing(batches.between(0, steps)) as micro_batches_by_step:
        for step, micro_batches in enumerate(micro_batches_by_step):
            trainer.take_step(step, micro_batches)
            taken.append(time.process_time() - began)
            began = time.process_time()
    return taken


def megabytes(trainer: Trainer) -> int:
    """Of gradients, moments and activations of a batch."""
    config = trainer.config
    shape = (2 * BATCH, config.data.channels, CROP, CROP)
    estimate = Memory(trainer.take_step).estimate([[torch.zeros(shape, dtype=torch.uint8)]], 0)
    return round(estimate.needed(BATCH) / 2**20)


@torch.no_grad()
def read_out(trainer: Trainer, data: dict[str, np.ndarray], seed: int, by_test: bool) -> dict[str, float]:
    """Figures of the test images, or else of the second half of the labelled ones, told from the first."""
    views, backbone = trainer.config.views, trainer.method.result.backbone.eval()
    preprocess = Preprocess(CROP, views.mean or (), views.std or ())

    def features(images: np.ndarray) -> np.ndarray:
        parts = [backbone(preprocess(part)) for part in torch.from_numpy(images).split(500)]
        return torch.cat(parts).numpy()

    train, labels = features(data["train"][:LABELLED]), data["of_train"][:LABELLED]
    if by_test:
        test, answers = features(data["test"]), data["of_test"]
    else:
        half = LABELLED // 2
        train, test, labels, answers = train[:half], train[half:], labels[:half], labels[half:]
    few, _ = few_labelled(labels, 10, seed)
    return {
        "knn": float((knn(train, labels, test, 1) == answers).mean()),
        "logistic": float((logistic(train, labels, test, standardise_by=train).labels == answers).mean()),
        "few": float((logistic(train[few], labels[few], test, standardise_by=train).labels == answers).mean()),
        "rank_me": float(rank_me(torch.from_numpy(test))),
    }


def groups(lines: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Runs that differ by their seed only, by (set, condition, method)."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["condition"] in CONDITIONS:
            grouped.setdefault((line["set"], line["condition"], line["method"]), []).append(line)
    return dict(sorted(grouped.items()))


def table(lines: list[dict[str, Any]]) -> str:
    """Means over seeds with their standard deviations, in Markdown."""
    columns = [*FIGURES.values(), "RankMe", "minutes", "steps", "MB"]
    rows = ["| set | condition | method | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 4) + "|"]
    for (pool, condition, method), runs in groups(lines).items():
        cells = [pool, CONDITIONS[condition], method, str(len(runs))]
        for figure in FIGURES:
            values = [100 * run[figure] for run in runs]
            cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f} %" if len(values) > 1 else " %"))
        cells += [f"{mean(run[key] for run in runs):.{digits}f}" for key, digits in (("rank_me", 1), ("minutes", 2))]
        cells += [f"{mean(run[key] for run in runs):.0f}" for key in ("steps", "mb")]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Logistic accuracy of every run, a panel for each set and condition."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    grouped = groups(lines)
    pools = list(dict.fromkeys(pool for pool, _, _ in grouped))
    figure, panels = pyplot.subplots(
        len(CONDITIONS), len(pools), figsize=(4 * len(pools), 6), squeeze=False, sharex="col"
    )
    for row, (condition, title) in enumerate(CONDITIONS.items()):
        for column, pool in enumerate(pools):
            panel, methods = panels[row][column], [name for name in METHODS if (pool, condition, name) in grouped]
            for height, method in enumerate(reversed(methods)):
                values = [100 * run["logistic"] for run in grouped[pool, condition, method]]
                panel.plot(values, [height] * len(values), "o", alpha=0.5, color="tab:blue")
                panel.plot([mean(values)], [height], "|", markersize=16, color="black")
            for run in grouped.get((pool, "images", "untrained"), []):
                panel.axvline(100 * run["logistic"], color="grey", linewidth=0.8, linestyle=":")
            panel.set_yticks(range(len(methods)), list(reversed(methods)))
            panel.set_title(f"{pool}, {title}", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("logistic regression, % (dotted: untrained)")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the three archives")
    parser.add_argument("--out", type=Path, required=True, help="folder of ledger, table and picture")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, of one core each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the runs, in images and in minutes")
    parser.add_argument("--search", action="store_true", help="four trials of each method and set first")
    parser.add_argument("--sets", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
