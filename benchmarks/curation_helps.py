"""Is curation of use where it should be: where what is wanted is lost among other material, and compute is short?

    python benchmarks/curation_helps.py photographs --omniglot images_background.zip --caltech caltech101_128px.zip \
        --out OUT --at-once 2
    python benchmarks/curation_helps.py copies --caltech caltech101_128px.zip --out OUT --at-once 2

photographs: 18,000 Omniglot drawings (drawers 1 to 19) and 2,000 Caltech-101 photographs. Read out on other photographs
(30 % of each class) and on the drawings of drawer 20 (by alphabet). copies: 2,000 photographs and 8,000 near copies
(re-encoded, resized, shifted) of 100 of them.

Network and recipe of caltech101_dinov2 without iBOT, KoLeo, registers; 600 steps of 64. Every seed draws a pool of its
own. The run on the pool as it is embeds it for the others; all others start from scratch. Retrieval looks for 100
photographs that are in neither pool nor test. The oracle draws photographs and drawings alike, or no copy.
Primary outcome, fixed before any run: logistic regression on Caltech, hierarchical (or deduplicated) less as it is,
paired by seed. Probes learn from half of the test images and are asked the other half, mean of ten splits. Results are
kept in OUT/NAME/results.jsonl; the same command goes on where it stopped.
"""

import argparse
import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from curation import command
from PIL import Image, ImageChops

from dino import cli, load_backbone
from dino.data import open_images
from dino.data.manifest import write_manifest
from dino.data.sources.omniglot import parse as drawing
from dino.evaluation.features import extract
from dino.evaluation.probes import knn, logistic
from dino.models import random_like

DRAWINGS, PHOTOGRAPHS, SEEDS, COPIED, COPIES, SPLITS, TEST = 18_000, 2_000, 100, 100, 8_000, 10, 0.3
PLAIN = ["objective.ibot_weight=0", "objective.koleo_weight=0", "model.registers=0", "data.channels=3"]
START, UNTRAINED = "as it is", "untrained"
CURATED = {
    "photographs": {
        "flat": ["rebalance.method=flat", "clusters.resamplings=0"],
        "hierarchical": ["rebalance.method=hierarchical"],
        "retrieval": ["rebalance.method=retrieval", "rebalance.neighbours=20"],
    },
    "copies": {"deduplicated": ["rebalance.method=none"]},
}
MADE = {"photographs": ["oracle 50:50", "photographs only"], "copies": ["without copies"]}


def main() -> None:
    arguments = parse()
    out = arguments.out.resolve() / arguments.name
    for seed in range(arguments.seeds):
        build(arguments, out / str(seed), seed)
    ledger = out / "results.jsonl"
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()] if ledger.exists() else []
    known = {(line["way"], line["seed"], line["steps"]) for line in lines}
    curated = CURATED[arguments.name]
    for ways in ([START], [*curated, *MADE[arguments.name], UNTRAINED]):
        if ways != [START]:
            for seed in range(arguments.seeds):
                curate(arguments, out / str(seed), seed)
        with ThreadPoolExecutor(arguments.at_once) as side_by_side:
            runs = [
                side_by_side.submit(run, arguments, out / str(seed), way, seed)
                for seed in range(arguments.seeds)
                for way in ways
                if (way, seed, arguments.steps) not in known
            ]
            for finished in as_completed(runs):
                lines.append(finished.result())
                with ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(json.dumps(lines[-1]), flush=True)
    show([line for line in lines if line["steps"] == arguments.steps])


def build(arguments: argparse.Namespace, folder: Path, seed: int) -> None:
    """FOLDER/pool, FOLDER/seeds, FOLDER/test and FOLDER/drawings, and manifests of what is made by hand."""
    if (folder / "made").exists():
        return
    for path, content in files(arguments, seed):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    names = list(open_images(folder / "pool").names)
    is_photograph = np.array([name.startswith("photographs/") for name in names])
    weights = {
        "oracle 50:50": np.where(
            is_photograph, 0.5 / max(1, is_photograph.sum()), 0.5 / max(1, (~is_photograph).sum())
        ),
        "photographs only": is_photograph / max(1, is_photograph.sum()),
        "without copies": np.array(["_copy" not in name for name in names]) / 1.0,
    }
    for way in MADE[arguments.name]:
        drawn = weights[way] * (len(names) / weights[way].sum())
        columns = {"path": names, "kept": drawn > 0, "weight": drawn}
        write_manifest(folder / f"{way.replace(' ', '_')}.parquet", columns, str(folder / "pool"), "folder")
    (folder / "made").touch()


def files(arguments: argparse.Namespace, seed: int) -> Iterator[tuple[str, bytes]]:
    generator = np.random.default_rng(seed)
    with zipfile.ZipFile(arguments.caltech) as file:
        classes: dict[str, list[str]] = {}
        for name in sorted(name for name in file.namelist() if name.endswith(".jpg")):
            classes.setdefault(name.split("/")[-2], []).append(name)
        left: list[str] = []
        for label, members in classes.items():
            order = [members[index] for index in generator.permutation(len(members))]
            tested = round(TEST * len(order))
            yield from ((f"test/{label}/{Path(name).name}", file.read(name)) for name in order[:tested])
            left += order[tested:]
        photographs = [left[index] for index in generator.permutation(len(left))]
        for number, name in enumerate(photographs[: arguments.photographs]):
            content, path = file.read(name), f"pool/photographs/{name.split('/')[-2]}_{Path(name).stem}"
            yield f"{path}.jpg", content
            if arguments.name == "copies" and number < COPIED:
                for index in range(COPIES * arguments.photographs // PHOTOGRAPHS // COPIED):
                    yield f"{path}_copy{index}.jpg", near_copy(content, generator)
        for name in photographs[-SEEDS:]:
            yield f"seeds/{name.split('/')[-2]}_{Path(name).name}", file.read(name)
    if arguments.name == "photographs":
        yield from drawings(arguments, generator)


def drawings(arguments: argparse.Namespace, generator: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(arguments.omniglot) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        facts = {name: drawing(name) for name in names}
        for name in (name for name in names if facts[name].drawer == 20):
            yield f"drawings/{facts[name].alphabet}/{facts[name].character}.png", file.read(name)
        seen = [name for name in names if facts[name].drawer < 20]
        for index in generator.permutation(len(seen))[: arguments.drawings]:
            of = facts[seen[index]]
            yield f"pool/drawings/{of.alphabet}_{of.character}_{of.drawer:02d}.png", file.read(seen[index])


def near_copy(content: bytes, generator: np.random.Generator) -> bytes:
    """Resized, shifted by up to 2 % of the sides, and re-encoded."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    size = [max(16, round(side * generator.uniform(0.7, 1.2))) for side in picture.size]
    picture = picture.resize(size)
    down, right = (generator.uniform(-0.02, 0.02, 2) * size).round().astype(int)
    buffer = io.BytesIO()
    ImageChops.offset(picture, int(down), int(right)).save(buffer, "JPEG", quality=int(generator.integers(40, 95)))
    return buffer.getvalue()


def curate(arguments: argparse.Namespace, folder: Path, seed: int) -> None:
    """FOLDER/WAY.parquet of every way; they share the embeddings, and so run one after the other."""
    for way, settings in CURATED[arguments.name].items():
        target = folder / f"{way}.parquet"
        if target.exists():
            continue
        own = [f"data.root={folder / 'pool'}", f"weights={folder / 'as_it_is'}", f"run.dir={folder / 'curated'}"]
        command(
            torch.get_num_threads(),
            "train/curate.py",
            *own,
            f"run.seed={seed}",
            f"rebalance.seeds={folder / 'seeds'}",
            *settings,
        )
        shutil.copy(folder / "curated" / "manifest.parquet", target)


def run(arguments: argparse.Namespace, folder: Path, way: str, seed: int) -> dict[str, Any]:
    """Train by a way and read out: a line of the results."""
    first, target = folder / "as_it_is", folder / way.replace(" ", "_").replace(":", "_")
    line: dict[str, Any] = {"way": way, "seed": seed, "steps": arguments.steps}
    if way == UNTRAINED:
        return line | read_out(random_like(load_backbone(first)), folder)
    root = folder / "pool" if way == START else folder / f"{way.replace(' ', '_')}.parquet"
    threads, began = max(1, torch.get_num_threads() // arguments.at_once), time.perf_counter()
    settings = [f"data.root={root}", f"run.dir={target}", f"train.steps={arguments.steps}", f"train.seed={seed}"]
    own = [f"train.checkpoint_every={arguments.steps}", f"train.cpu_threads={threads}", *PLAIN]
    command(threads, "train/pretrain.py", "--config", "configs/caltech101_dinov2.yaml", *settings, *own)
    line["minutes"] = round((time.perf_counter() - began) / 60, 2)
    return line | shares(root) | read_out(load_backbone(target), folder)


def shares(root: Path) -> dict[str, float]:
    """How much of what is drawn are photographs, and copies."""
    if root.is_dir():
        names, weights = list(open_images(root).names), None
    else:
        table = pq.read_table(root, columns=["path", "weight"]).to_pydict()
        names, weights = table["path"], np.array(table["weight"])
    kinds = {"photographs": "photographs/", "copies": "_copy"}
    return {kind: float(np.average([text in name for name in names], weights=weights)) for kind, text in kinds.items()}


def read_out(backbone: torch.nn.Module, folder: Path) -> dict[str, float]:
    """Of photographs, and of drawings where there are any."""
    results = {}
    for name in ("test", "drawings"):
        if not (folder / name).exists():
            continue
        images = open_images(folder / name, "folder", backbone.spec.in_chans)
        tokens = extract(backbone, images, range(len(images.names)), backbone.preprocess.of_levels).class_tokens
        labels, scores = np.array(images.labels), []
        for split in range(SPLITS):
            generator, learned = np.random.default_rng(split), np.zeros(len(labels), dtype=bool)
            for label in np.unique(labels):
                members = generator.permutation(np.flatnonzero(labels == label))
                learned[members[: len(members) // 2]] = True
            three = (tokens[learned], labels[learned], tokens[~learned])
            asked = labels[~learned]
            scores.append(((knn(*three, 1) == asked).mean(), (logistic(*three).labels == asked).mean()))
        results |= dict(zip((f"{name}/knn", f"{name}/logistic"), np.mean(scores, axis=0).tolist(), strict=True))
    return results


def show(lines: list[dict[str, Any]]) -> None:
    """Means, and mean differences to the pool as it is with their standard deviation over seeds."""
    start = {line["seed"]: line for line in lines if line["way"] == START}
    keys = [key for key in lines[0] if "/" in key]
    print(f"| pool | seeds | {' | '.join(keys)} |\n|---|---|{'---|' * len(keys)}")
    for way in dict.fromkeys(line["way"] for line in lines):
        of, cells = [line for line in lines if line["way"] == way], []
        for key in keys:
            gains = np.array([100 * (line[key] - start[line["seed"]][key]) for line in of])
            spread = f" ± {gains.std(ddof=1):.1f}" if len(of) > 1 else ""
            change = "" if way == START else f" ({gains.mean():+.1f}{spread})"
            cells.append(f"{100 * np.mean([line[key] for line in of]):.1f} %{change}")
        print(f"| {way} | {len(of)} | {' | '.join(cells)} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CURATED))
    parser.add_argument("--caltech", required=True, help="Caltech-101, a zip archive")
    parser.add_argument("--omniglot", help="Omniglot's background set, a zip archive")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pools and the runs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--drawings", type=int, default=DRAWINGS, help="of the pool; fewer for a first look")
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS, help="of the pool; fewer for a first look")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, which share the cores")
    arguments = parser.parse_args()
    if arguments.name == "photographs" and not arguments.omniglot:
        parser.error("photographs among drawings need --omniglot")
    return arguments


if __name__ == "__main__":
    cli.run(main)
