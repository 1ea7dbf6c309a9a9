"""Does curation help? A pool of known imbalance, with planted copies, trained on as it is and curated in several ways.

    python benchmarks/curation.py --omniglot images_background.zip --out OUT
    python benchmarks/curation.py --caltech caltech101_128px.zip --out OUT --seeds 1

Omniglot: three alphabets with all their characters' drawings by drawers 1 to 14, of the other 27 two drawings a
character, and a near copy (shifted by a pixel or two, re-encoded) of every tenth. Caltech-101: its own long tail, 70 %
of each class. A backbone is trained on the pool as it is, embeds it, and what its curation gives is trained on from
scratch for as many steps: deduplicated, flat, hierarchical, and balanced by the labels (an oracle). All are read out on
images that no pre-training saw, as many of each class, by the mean of ten splits of them into halves. Results are kept
in OUT/results.jsonl; the same command goes on where it stopped. --at-once 2: see objectives.py.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageChops

from dino import cli, load_backbone
from dino.data.images import FolderImages
from dino.data.manifest import write_manifest
from dino.data.omniglot import parse as drawing
from dino.evaluation.features import extract
from dino.evaluation.readout import knn, logistic

REPOSITORY = Path(__file__).parents[1]
LARGE, FEW, SEEN, COPIED, SPLITS = 3, 2, 14, 10, 10
WAYS = {
    "deduplicated": ["rebalance.method=none"],
    "flat": ["rebalance.method=flat"],
    "hierarchical": ["rebalance.method=hierarchical"],
}
RECIPES = {"omniglot": "omniglot_cpu", "caltech": "caltech101_dinov2"}
SHORT = ["objective.momentum=0.99", "objective.momentum_end=0.99"]  # best in short runs: configs/README.md


def main() -> None:
    arguments = parse()
    name = "omniglot" if arguments.omniglot else "caltech"
    out = arguments.out.resolve() / name
    if not (out / "built").exists():
        entries = omniglot(arguments.omniglot) if arguments.omniglot else caltech(arguments.caltech)
        for path, content in entries:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(content)
        (out / "built").touch()
    ledger = out / "results.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    known = {(line["way"], line["seed"]) for line in done}
    by_labels(FolderImages(out / "pool"), out / "by_labels.parquet")
    for ways in (["as it is"], [*WAYS, "by labels"]):  # the first embeds the pool for the others
        with ThreadPoolExecutor(arguments.at_once) as side_by_side:
            runs = [
                side_by_side.submit(run, arguments, name, out, way, seed)
                for seed in range(arguments.seeds)
                for way in ways
                if (way, seed) not in known
            ]
            for finished in as_completed(runs):
                done.append(finished.result())
                with ledger.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), flush=True)
    for way in dict.fromkeys(line["way"] for line in done):
        of = [line for line in done if line["way"] == way]
        values = [np.array([100 * line[key] for line in of]) for key in ("knn", "logistic")]
        cells = [f"{one.mean():.1f}" + (f" ± {one.std(ddof=1):.1f} %" if len(of) > 1 else " %") for one in values]
        print(f"| {way} | {len(of)} | {' | '.join(cells)} |")


def run(arguments: argparse.Namespace, name: str, out: Path, way: str, seed: int) -> dict[str, Any]:
    """Curate as `way` says, train, read out."""
    first = out / f"as_it_is_{seed}"
    root, facts, threads = out / "pool", {}, max(1, torch.get_num_threads() // arguments.at_once)
    if way in WAYS:
        curated = out / f"{way}_curated_{seed}"
        settings = [f"data.root={root}", f"weights={first}", f"run.dir={curated}", f"run.seed={seed}", *WAYS[way]]
        command(threads, "train/curate.py", *settings)
        root, facts = curated / "manifest.parquet", judge_copies(curated / "manifest.parquet")
    elif way == "by labels":
        root = out / "by_labels.parquet"
    target = out / f"{way.replace(' ', '_')}_{seed}"
    kind = ["data.channels=1"] if name == "omniglot" else []
    began = time.perf_counter()
    command(
        threads,
        "train/pretrain.py",
        "--config",
        f"configs/{RECIPES[name]}.yaml",
        "data.kind=auto",
        f"data.root={root}",
        f"run.dir={target}",
        f"train.steps={arguments.steps}",
        f"train.seed={seed}",
        f"train.checkpoint_every={arguments.steps}",
        f"train.cpu_threads={threads}",
        *SHORT,
        *kind,
    )
    minutes = (time.perf_counter() - began) / 60
    return {"way": way, "seed": seed, "minutes": round(minutes, 2), **facts, **read_out(target, out / "test")}


def command(threads: int, script: str, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [sys.executable, script, *arguments], check=True, cwd=REPOSITORY, capture_output=True, env=environment
    )


def read_out(run: Path, test: Path) -> dict[str, float]:
    """Half of each class of the test images learned from, the other half asked; the mean over splits."""
    backbone = load_backbone(run)
    images = FolderImages(test, backbone.spec.in_chans)
    tokens = extract(backbone, images, range(len(images.names)), backbone.preprocess).class_tokens
    labels, found = np.array(images.labels), []
    for split in range(SPLITS):
        generator, learned = np.random.default_rng(split), np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            learned[members[: len(members) // 2]] = True
        four = (tokens[learned], labels[learned], tokens[~learned], labels[~learned])
        found.append(((knn(*four[:3], 1) == four[3]).mean(), logistic(*four).accuracy))
    return dict(zip(("knn", "logistic"), np.mean(found, axis=0).tolist(), strict=True))


def judge_copies(manifest: Path) -> dict[str, float]:
    """Recall and precision of planted copies, which are called like their originals."""
    table = pq.read_table(manifest, columns=["path", "duplicate_of"]).to_pydict()
    stem = {path: path.rsplit(".", 1)[0].removesuffix("_copy") for path in table["path"]}
    stands = {path: other or path for path, other in zip(table["path"], table["duplicate_of"], strict=True)}
    planted = [path for path in table["path"] if "_copy" in path]
    originals = {stem[path]: path for path in table["path"] if "_copy" not in path}
    found = [stands[path] == stands[originals[stem[path]]] for path in planted]
    called = [stem[path] == stem[other] for path, other in stands.items() if other != path]
    return {"recall": float(np.mean(found)) if found else 1.0, "precision": float(np.mean(called)) if called else 1.0}


def by_labels(images: FolderImages, path: Path) -> None:
    """A manifest in which every class is drawn as often as any other; planted copies are not drawn."""
    labels, copies = np.array(images.labels), np.array(["_copy" in name for name in images.names])
    names, numbers = np.unique(labels, return_inverse=True)
    sizes = np.bincount(numbers[~copies], minlength=len(names))
    weights = np.where(copies, 0.0, len(labels) / len(names) / sizes[numbers])
    columns = {"path": images.names, "kept": weights > 0, "weight": weights}
    write_manifest(path, columns, str(images.root), "folder")


def omniglot(archive: str) -> Iterable[tuple[str, bytes]]:
    """Files of pool/ and test/: alphabets are the classes, drawers 15 to 20 the test, 60 drawings of each alphabet."""
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        alphabets = generator.permutation(sorted({drawing(name).alphabet for name in names}))
        large, tested = set(alphabets[:LARGE]), dict.fromkeys(alphabets, 0)
        drawn: dict[str, int] = {}
        for number in generator.permutation(len(names)):
            facts, content = drawing(names[number]), file.read(names[number])
            path = f"{facts.alphabet}/{facts.character}_{facts.drawer:02d}"
            if facts.drawer > SEEN:
                tested[facts.alphabet] += 1
                if tested[facts.alphabet] <= 60:
                    yield f"test/{path}.png", content
                continue
            character = f"{facts.alphabet}/{facts.character}"
            drawn[character] = drawn.get(character, 0) + 1
            if drawn[character] > FEW and facts.alphabet not in large:
                continue
            yield f"pool/{path}.png", content
            if generator.integers(COPIED) == 0:
                yield f"pool/{path}_copy.jpg", copy(content, generator)


def caltech(archive: str) -> Iterable[tuple[str, bytes]]:
    """Files of pool/ and test/: 70 % of each class, and of the rest at most 9."""
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".jpg"))
        classes: dict[str, list[str]] = {}
        for name in names:
            classes.setdefault(name.split("/")[-2], []).append(name)
        for label, members in classes.items():
            order = [members[index] for index in generator.permutation(len(members))]
            split = round(0.7 * len(order))
            for part, some in (("pool", order[:split]), ("test", order[split:][:9])):
                yield from ((f"{part}/{label}/{Path(name).name}", file.read(name)) for name in some)


def copy(content: bytes, generator: np.random.Generator) -> bytes:
    """Shifted by one or two pixels each way, and re-encoded."""
    with Image.open(io.BytesIO(content)) as opened:
        down, right = generator.choice([-2, -1, 1, 2], 2)
        moved = ImageChops.offset(opened.convert("L"), int(right), int(down))
    buffer = io.BytesIO()
    moved.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--omniglot", help="Omniglot's background set, a zip archive")
    which.add_argument("--caltech", help="Caltech-101, a zip archive")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool and the runs")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, which share the cores")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
