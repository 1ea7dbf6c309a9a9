"""Does curation help? A pool of known imbalance, with planted copies, trained on as it is and curated in several ways.

    python benchmarks/curation.py --omniglot images_background.zip --out OUT
    python benchmarks/curation.py --caltech caltech101_128px.zip --out OUT --seeds 1

Omniglot: three alphabets with all their characters' drawings by drawers 1 to 14, of the other 27 two drawings a
character, and near copies (shifted by a pixel or two, re-encoded) of every tenth: of most one, of some many. Caltech:
its own long tail, 70 % of each class. Every seed draws a pool of its own. A backbone is trained on it as it is, embeds
it, and what its curation gives is trained on from scratch for as many steps: deduplicated, flat, hierarchical, and
balanced by the labels (an oracle). All are read out on images that no pre-training saw, as many of each class, by the
mean of ten splits of them into halves; `rare`: 1-NN on all but the tenth of the classes that the pool has most of;
`labels`: effective number of classes among the draws. The table gives differences to the pool as it is, seed by seed.
Results are kept in OUT/results.jsonl; the same command goes on where it stopped. --at-once 2: see objectives.py.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageChops

from dino import cli, load_backbone
from dino.data import Pool, open_images
from dino.data.manifest import write_manifest
from dino.data.sampler import effective_number
from dino.data.sources.omniglot import parse as drawing
from dino.evaluation.features import extract
from dino.evaluation.probes import knn, logistic
from dino.models import random_like

REPOSITORY = Path(__file__).parents[1]
LARGE, FEW, SEEN, COPIED, MOST_COPIES, SPLITS = 3, 2, 14, 10, 30, 10
CURATED = {
    "deduplicated": ["rebalance.method=none"],
    "flat": ["rebalance.method=flat", "clusters.resamplings=0"],
    "hierarchical": ["rebalance.method=hierarchical"],
}
RECIPES = {"omniglot": "omniglot_cpu", "caltech": "caltech101_dinov2"}
SHORT = [
    "objective.teacher_momentum=0.99",
    "objective.teacher_momentum_end=0.99",
]  # best in short runs: configs/README.md
AS_IT_IS = "as it is"


def main() -> None:
    arguments = parse()
    name = "omniglot" if arguments.omniglot else "caltech"
    out = arguments.out.resolve() / name
    for seed in range(arguments.seeds):
        build(arguments, name, out / str(seed), seed)
    ledger = out / "results.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    known = {(line["way"], line["seed"], line["steps"]) for line in done}
    for ways in ([AS_IT_IS], [*CURATED, "by labels", "untrained"]):  # the first embeds the pool for the others
        with ThreadPoolExecutor(arguments.at_once) as side_by_side:
            runs = [
                side_by_side.submit(run, arguments, name, out / str(seed), way, seed)
                for seed in range(arguments.seeds)
                for way in ways
                if (way, seed, arguments.steps) not in known
            ]
            for finished in as_completed(runs):
                done.append(finished.result())
                with ledger.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), flush=True)
    show([line for line in done if line["steps"] == arguments.steps])


def build(arguments: argparse.Namespace, name: str, folder: Path, seed: int) -> None:
    """FOLDER/pool and FOLDER/test, and a manifest of the pool balanced by its labels."""
    if (folder / "by_labels.parquet").exists():
        return
    files = omniglot(arguments.omniglot, seed) if name == "omniglot" else caltech(arguments.caltech, seed)
    for path, content in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    by_labels(open_images(folder / "pool"), folder / "by_labels.parquet")


def run(arguments: argparse.Namespace, name: str, folder: Path, way: str, seed: int) -> dict[str, Any]:
    """Curate as `way` says, train, read out: a line of the results."""
    first, target, root = folder / "as_it_is", folder / way.replace(" ", "_"), folder / "pool"
    line: dict[str, Any] = {"way": way, "seed": seed, "steps": arguments.steps}
    if way == "untrained":
        return line | read_out(random_like(load_backbone(first)), folder)
    threads = max(1, torch.get_num_threads() // arguments.at_once)
    if way in CURATED:
        curated = folder / f"{way}_curated"
        settings = [f"data.root={root}", f"weights={first}", f"run.dir={curated}", f"run.seed={seed}", *CURATED[way]]
        settings += [f"run.cpu_threads={threads}"]
        command(threads, "train/curate.py", *settings)
        root = curated / "manifest.parquet"
        line |= judge_copies(root) if name == "omniglot" else {}
    elif way == "by labels":
        root = folder / "by_labels.parquet"
    line["labels"] = effective_labels(root)
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
        *(["data.channels=1"] if name == "omniglot" else []),
    )
    line["minutes"] = round((time.perf_counter() - began) / 60, 2)
    return line | read_out(load_backbone(target), folder)


def command(threads: int, script: str, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, script, *arguments]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr}")


def read_out(backbone: torch.nn.Module, folder: Path) -> dict[str, float]:
    """Half of each class of the test images learned from, the other half asked; the mean over splits."""
    images = open_images(folder / "test", "folder", backbone.spec.in_chans)
    tokens = extract(backbone, images, range(len(images.names)), backbone.preprocess.of_levels).class_tokens
    sizes = Counter(open_images(folder / "pool").labels)
    common = {label for label, _ in sizes.most_common(len(sizes) // 10)}
    labels, found = np.array(images.labels), []
    for split in range(SPLITS):
        generator, learned = np.random.default_rng(split), np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            learned[members[: len(members) // 2]] = True
        asked = labels[~learned]
        three = (tokens[learned], labels[learned], tokens[~learned])
        hits = knn(*three, 1) == asked
        rare = np.array([label not in common for label in asked])
        found.append((hits.mean(), hits[rare].mean(), (logistic(*three).labels == asked).mean()))
    return dict(zip(("knn", "rare", "logistic"), np.mean(found, axis=0).tolist(), strict=True))


def show(lines: list[dict[str, Any]]) -> None:
    """Means, and mean differences to the pool as it is with their standard deviation over seeds."""
    start = {line["seed"]: line for line in lines if line["way"] == AS_IT_IS}
    print("| pool | seeds | labels | 1-NN | rare | logistic |\n|---|---|---|---|---|---|")
    for way in dict.fromkeys(line["way"] for line in lines):
        of = [line for line in lines if line["way"] == way]
        cells = []
        for key in ("knn", "rare", "logistic"):
            gains = np.array([100 * (line[key] - start[line["seed"]][key]) for line in of])
            spread = f" ± {gains.std(ddof=1):.1f}" if len(of) > 1 else ""
            change = "" if way == AS_IT_IS else f" ({gains.mean():+.1f}{spread})"
            cells.append(f"{100 * np.mean([line[key] for line in of]):.1f} %{change}")
        labels = np.mean([line.get("labels", np.nan) for line in of])
        print(f"| {way} | {len(of)} | {labels:.1f} | {' | '.join(cells)} |")


def judge_copies(manifest: Path) -> dict[str, float]:
    """Recall and precision of planted copies, which are called like their originals."""
    table = pq.read_table(manifest, columns=["path", "duplicate_of"]).to_pydict()
    stem = {path: path.rsplit(".", 1)[0].split("_copy")[0] for path in table["path"]}
    stands = {path: other or path for path, other in zip(table["path"], table["duplicate_of"], strict=True)}
    planted = [path for path in table["path"] if "_copy" in path]
    originals = {stem[path]: path for path in table["path"] if "_copy" not in path}
    found = [stands[path] == stands[originals[stem[path]]] for path in planted]
    called = [stem[path] == stem[other] for path, other in stands.items() if other != path]
    return {"planted": len(planted), "recall": float(np.mean(found)), "precision": float(np.mean(called))}


def effective_labels(root: Path) -> float:
    """exp of the entropy of the classes' shares of the draws; a class is the folder."""
    if root.is_dir():
        names, weights = open_images(root).names, None
    else:
        table = pq.read_table(root, columns=["path", "weight"]).to_pydict()
        names, weights = table["path"], np.array(table["weight"])
    numbers = np.unique([name.split("/")[0] for name in names], return_inverse=True)[1]
    return effective_number(np.bincount(numbers, weights=weights))


def by_labels(images: Pool, path: Path) -> None:
    """A manifest in which every class is drawn as often as any other; planted copies are not drawn."""
    labels, copies = np.array(images.labels), np.array(["_copy" in name for name in images.names])
    names, numbers = np.unique(labels, return_inverse=True)
    sizes = np.bincount(numbers[~copies], minlength=len(names))
    weights = np.where(copies, 0.0, (~copies).sum() / len(names) / sizes[numbers])
    columns = {"path": list(images.names), "kept": weights > 0, "weight": weights}
    write_manifest(path, columns, str(images.root), "folder")


def omniglot(archive: str, seed: int) -> Iterable[tuple[str, bytes]]:
    """Files of pool/ and test/: alphabets are the classes, drawers 15 to 20 the test, 60 drawings of each alphabet."""
    generator = np.random.default_rng(seed)
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
                for index in range(min(MOST_COPIES, generator.zipf(1.6))):
                    yield f"pool/{path}_copy{index}.jpg", copy(content, generator)


def caltech(archive: str, seed: int) -> Iterable[tuple[str, bytes]]:
    """Files of pool/ and test/: 70 % of each class, and of the rest at most 9."""
    generator = np.random.default_rng(seed)
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
