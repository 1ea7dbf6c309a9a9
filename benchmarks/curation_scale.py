"""How long does each stage of a curation take, and how much memory, at a million rows, three, ten?

    python benchmarks/curation_scale.py --out OUT                              # 1, 3 and 10 million: hours
    python benchmarks/curation_scale.py --out OUT --rows 100000 --stages index copies recall clusters parts draw
    python benchmarks/curation_scale.py --out OUT --draw                       # what is known so far: table and PNG

Rows are synthetic embeddings of 384 numbers (fp16, a memory map): points around 20,000 directions, the n-th with a
weight of 1/n^0.7, and every tenth row is followed by a near copy of it (cosine about 0.96). Paths are 40 letters in a
Parquet list. Each stage runs in a process of its own, one after the other:

    index      the list is opened as a pool, by `dino.data.open_images`
    copies     `dino.curation.inverted.similar_pairs` of all rows, cosine 0.9, and which stands for which
    slice      the same with queries only from a 50th of the cells: where the whole takes too long
    recall     copies of the first 20,000 rows by cells and by comparing each with each
    clusters   `dino.curation.clusters.cluster`, --counts, --iterations, --resamplings
    parts      the same cut into --parts parts
    overlap    draws of a fourth of the rows: how many are the same whole and in parts, or whole by another seed, and
               how many directions they are worth (exp of the entropy)
    iteration  one iteration of k-means at k = 10,000, as the default has it, on a 50th of the rows
    draw       weights, the manifest written, read and opened as a pool, and one epoch of the sampler's order; by
               clusters at random where there are none yet

CPU: seconds of processor time of the stage, which other work beside does not touch much; clock: seconds that went by.
Peak memory: RSS, of it the part that is not the page cache of files (RssAnon), looked at every 20 ms; before: with
all imported. A stage that is done is kept in OUT/results.jsonl and not done again; a killed one begins anew.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kit
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.lib.format import open_memmap

from dino import cli
from dino.curation import rebalance
from dino.curation.clusters import Clusters, cluster
from dino.curation.duplicates import groups, originals
from dino.curation.inverted import best_cells, similar_pairs
from dino.curation.kmeans import kmeans
from dino.curation.points import Points
from dino.curation.settings import Clusters as Settings
from dino.curation.stage import Stage
from dino.data import EpochStream, open_images, samples_per_epoch
from dino.data.manifest import write_manifest
from dino.data.sampler import effective_number
from dino.evaluation.neighbours import Rows

WIDTH, DIRECTIONS, COPIED, SHARE = 384, 20_000, 10, 50
BLOCK = 1 << 16
NEAR, NEIGHBOURS, PROBES = 0.9, 16, 8  # as settings have them
CURVES = {
    "index": "pool opened",
    "copies": "copies, in cells",
    "clusters": "clusters, whole",
    "parts": "clusters, in parts",
    "draw": "weights, manifest, order",
}
HEIGHTS = {"cpu": [0.1, 1, 10, 100, 1000, 10_000], "anonymous": [500, 1000, 2000, 4000, 8000, 16_000]}
ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, device=torch.device("cpu"))


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    ledger = arguments.out / "results.jsonl"
    known = lines_of(ledger)
    done = {(line["stage"], line["rows"]) for line in known}
    for rows in [] if arguments.draw else arguments.rows:
        for stage in arguments.stages:
            if (stage, rows) not in done:
                with ProcessPoolExecutor(1, mp_context=get_context("fork")) as process:  # importing takes seconds
                    line = json.dumps(process.submit(measure, arguments, stage, rows).result())
                with ledger.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)
    show(lines_of(ledger), arguments.out / "curation_scale.png")


def lines_of(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def measure(arguments: argparse.Namespace, stage: str, rows: int) -> dict[str, Any]:
    """Do a stage in this process: a line of what it took."""
    folder = arguments.out / str(rows)
    folder.mkdir(parents=True, exist_ok=True)
    make_list(folder / "list.parquet", rows)
    if stage not in ("index", "draw"):
        make_tokens(folder / "tokens.npy", rows)
    memory = Memory()
    clock, cpu = time.perf_counter(), time.process_time()
    facts = STAGES[stage](arguments, folder, rows)
    taken = {"cpu": time.process_time() - cpu, "clock": time.perf_counter() - clock}
    line = {"stage": stage, "rows": rows} | {name: round(value, 2) for name, value in taken.items()}
    return line | memory.peaks() | facts


class Memory:
    """MiB of this process at its greatest since this was made, and just before: all, and what no file holds."""

    def __init__(self) -> None:
        self.before = self._now()
        self.peak, self.peak_anonymous = self.before
        self.watching = threading.Thread(target=self._watch, daemon=True)
        self.watching.start()

    def _now(self) -> tuple[int, int]:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) >> 10, int(lines["RssAnon"].split()[0]) >> 10

    def _watch(self) -> None:
        while True:
            everything, anonymous = self._now()
            self.peak, self.peak_anonymous = max(self.peak, everything), max(self.peak_anonymous, anonymous)
            time.sleep(0.02)

    def peaks(self) -> dict[str, int]:
        return {"rss": self.peak, "anonymous": self.peak_anonymous, "before": self.before[1]}


def make_tokens(file: Path, rows: int) -> None:
    """The embeddings, if they are not there."""
    directions = file.with_name("directions.npy")
    if file.exists() and directions.exists():
        return
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(DIRECTIONS, WIDTH)).astype(np.float32)
    frequencies = 1 / np.arange(1, DIRECTIONS + 1) ** 0.7
    noise = generator.normal(size=(2 * BLOCK, WIDTH)).astype(np.float32)  # drawn once, taken anew from each place
    partial = file.with_suffix(".partial")
    values = open_memmap(partial, "w+", np.float16, (rows, WIDTH))
    of_row = np.empty(rows, np.int16)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        direction = generator.choice(DIRECTIONS, count, p=frequencies / frequencies.sum())
        block = centres[direction] + 1.2 * noise[generator.permutation(2 * BLOCK)[:count]]
        copied = np.arange(0, count - 1, COPIED)
        direction[copied + 1] = direction[copied]
        of_row[start : start + count] = direction
        block[copied + 1] = block[copied] + 0.45 * noise[generator.permutation(2 * BLOCK)[: len(copied)]]
        values[start : start + count] = block
    values.flush()
    np.save(directions, of_row)
    partial.rename(file)


def make_list(file: Path, rows: int) -> None:
    """The paths, if they are not there."""
    if file.exists():
        return
    numbers = pa.array(np.arange(rows)).cast(pa.string())
    padded = pc.utf8_lpad(numbers, 10, "0")
    folders = pa.array([f"photographs/collection-{number:04d}/" for number in range(1000)])
    paths = pc.binary_join_element_wise(folders.take(pa.array(np.arange(rows) % 1000)), padded, ".jpg", "")
    pq.write_table(pa.table({"path": paths}), file)


def opened(folder: Path) -> np.ndarray:
    return np.load(folder / "tokens.npy", mmap_mode="r")


def index(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    before = Memory()
    images = open_images(folder / "list.parquet")
    resting = before._now()[1] - before.before[1]
    letters = len(images.names[0])
    return {"bytes_an_image": round((resting << 20) / rows), "letters": letters, "arrow": pa.total_allocated_bytes()}


def copies(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    values = Rows(opened(folder))
    cells = best_cells(rows, PROBES)
    pairs = similar_pairs(values, values, NEAR, NEIGHBOURS, cells, PROBES)
    both = np.stack([pairs.queries, pairs.keys], axis=1)
    group = groups(rows, both)
    original = originals(group, np.ones(rows, np.int64), np.arange(rows))
    np.save(folder / "original.npy", original)
    planted = planted_copies(rows)
    found = float(np.mean(original[planted + 1] == original[planted]))
    return {"cells": cells, "pairs": len(both), "dropped": int((original != np.arange(rows)).sum()), "planted": found}


def slice_of_cells(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    """Every 50th row asks: the cells are made as for all, every row gets its cell, a 50th is compared."""
    values = Rows(opened(folder))
    cells = best_cells(rows, PROBES)
    pairs = similar_pairs(Rows(opened(folder), np.arange(0, rows, SHARE)), values, NEAR, NEIGHBOURS, cells, PROBES)
    return {"cells": cells, "pairs": len(pairs.queries)}


def planted_copies(rows: int) -> np.ndarray:
    """Rows that are followed by a copy."""
    starts = range(0, rows, BLOCK)
    return np.concatenate([start + np.arange(0, min(BLOCK, rows - start) - 1, COPIED) for start in starts])


def recall(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    """Pairs found by cells as a fraction of those of comparing each with each, for several numbers of probes."""
    values = opened(folder)
    some = Rows(values, np.arange(min(rows, 20_000)))
    answer = {}
    exact = coded(similar_pairs(some, some, NEAR, NEIGHBOURS, 1, 1))
    for probes in (1, 2, 4, 8):
        found = coded(similar_pairs(some, some, NEAR, NEIGHBOURS, best_cells(len(some), probes), probes))
        answer[f"recall_{probes}"] = round(float(np.isin(exact, found).mean()), 5)
    return answer | {"pairs": len(exact)}


def coded(pairs: Any) -> np.ndarray:
    return pairs.queries * 2**32 + pairs.keys


def clusters(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    return quality(clustered(arguments, folder, rows, 1, 0))


def in_parts(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    return quality(clustered(arguments, folder, rows, arguments.parts, 0))


def overlap(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    """Of a fourth of the rows, drawn by clusters: whole, whole by another seed, and in parts."""
    budget = len(kept_rows(folder, rows)) // 4
    weights, answer = [], {}
    direction = np.load(folder / "directions.npy")
    for name, parts, seed in (("whole", 1, 0), ("other_seed", 1, 1), ("parts", arguments.parts, 0)):
        levels = clustered(arguments, folder, rows, parts, seed).levels
        weights.append(rebalance.hierarchical(levels, budget, 1.0))
        drawn = np.bincount(direction, weights=weights[-1], minlength=DIRECTIONS)
        answer[f"directions_{name}"] = round(effective_number(drawn), 1)
        answer[f"shared_{name}"] = round(float(np.minimum(weights[0], weights[-1]).sum() / budget), 4)
    return answer | {"directions": round(effective_number(np.bincount(direction[kept_rows(folder, rows)])), 1)}


def clustered(arguments: argparse.Namespace, folder: Path, rows: int, parts: int, seed: int) -> Clusters:
    settings = Settings(
        counts=arguments.counts, iterations=arguments.iterations, resamplings=arguments.resamplings, parts=parts
    )
    stage = Stage(folder / f"clusters-{parts}-{seed}", [rows, str(settings)], ALONE)
    return cluster(stage, opened(folder), kept_rows(folder, rows), settings, seed, ALONE)


def kept_rows(folder: Path, rows: int) -> np.ndarray:
    """That are no copy, where copies have been sought."""
    if not (folder / "original.npy").exists():
        return np.arange(rows)
    original = np.load(folder / "original.npy")
    return np.flatnonzero(original == np.arange(rows))


def quality(made: Clusters) -> dict[str, Any]:
    """Mean squared distance to the centroid, and the effective number of clusters of the first level."""
    sizes = np.bincount(made.levels[0][made.levels[0] >= 0])
    return {"distance": round(float(np.nanmean(made.distances)), 5), "effective": round(effective_number(sizes), 1)}


def iteration(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    """Assigning and moving once, on every 50th row, in bf16; seeds are rows at random."""
    points = Points(Rows(opened(folder), np.arange(0, rows, SHARE)), spherical=True)
    chosen = torch.from_numpy(np.random.default_rng(0).choice(points.total, 10_000, replace=False))
    initial = points.at(chosen) + points.mean.float()
    began = time.process_time()
    kmeans(points, 10_000, 1, 0, torch.bfloat16, initial)  # one iteration in bf16, and the last word in fp32
    return {"both": round(time.process_time() - began, 2)}


def draw(arguments: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    """Weights, the manifest, and an epoch of the pool that it makes."""
    kept, stage = kept_rows(folder, rows), folder / "clusters-1-0" / "clusters.npz"
    labels = np.full(rows, -1)
    if stage.exists():
        with np.load(stage) as saved:
            labels[kept], parents = saved["labels"], [saved["level2"]]
    else:  # which are as good for time and memory
        generator, (count, above) = np.random.default_rng(0), arguments.counts[:2]
        labels[kept] = generator.zipf(1.2, len(kept)) % count
        parents = [generator.integers(above, size=count)]
    weights = rebalance.hierarchical([labels, *parents], len(kept), 10.0)
    names = pq.read_table(folder / "list.parquet")["path"].combine_chunks().cast(pa.large_string())
    columns = {"path": names, "cluster_1": labels, "kept": weights > 0, "weight": weights}
    manifest = folder / "manifest.parquet"
    write_manifest(manifest, columns, str((folder / "list.parquet").resolve()), "list")
    images = open_images(manifest)
    stream = EpochStream(len(images.names), 1024, 0, images.weights, samples_per_epoch(images))
    stream.batch(0)
    before = effective_number(np.bincount(labels[kept]))
    after = effective_number(np.bincount(labels[kept], weights=weights[kept]))
    return {"images": len(images.names), "effective_before": round(before, 1), "effective_after": round(after, 1)}


STAGES: dict[str, Callable[[argparse.Namespace, Path, int], dict[str, Any]]] = {
    "index": index,
    "copies": copies,
    "slice": slice_of_cells,
    "recall": recall,
    "clusters": clusters,
    "parts": in_parts,
    "overlap": overlap,
    "iteration": iteration,
    "draw": draw,
}


def show(lines: list[dict[str, Any]], picture: Path) -> None:
    """A table, and curves of CPU time and memory over rows."""
    order = list(STAGES)
    lines = sorted(lines, key=lambda line: (order.index(line["stage"]), line["rows"]))
    table = []
    for line in lines:
        beside = {"stage", "rows", "cpu", "clock", "rss", "anonymous", "before"}
        rest = ", ".join(f"{name} {value}" for name, value in line.items() if name not in beside)
        table.append([f"{line['rows']:,}", *(f"{line[name]:,}" for name in ("cpu", "clock", "rss", "anonymous")), rest])
    columns = ["rows", "CPU s", "clock s", "RSS MiB", "of it no file's", ""]
    kit.print_table("stage", columns, [[line["stage"], *row] for line, row in zip(lines, table, strict=True)])
    plot(lines, picture)


def plot(lines: list[dict[str, Any]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines if line["stage"] in CURVES]
    titles = {"cpu": "seconds of processor time", "anonymous": "peak memory without files' pages, MiB"}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for stage in dict.fromkeys(line["stage"] for line in lines):
            of_stage = [(line["rows"] / 1e6, line[key]) for line in lines if line["stage"] == stage]
            panel.plot(*zip(*of_stage, strict=True), marker="o", label=CURVES[stage])
        panel.set(xscale="log", yscale="log", xlabel="million rows of 384 numbers", title=title)
        ticks = sorted({line["rows"] / 1e6 for line in lines})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        largest = max(line[key] for line in lines)
        marks = [mark for mark in HEIGHTS[key] if mark < 2 * largest]
        panel.set_yticks(marks, [f"{mark:,g}" for mark in marks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the embeddings and of what is known so far")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["index", "copies", "clusters", "draw"])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 50], help="clusters of each level")
    parser.add_argument("--iterations", type=int, default=5, help="of each k-means, at most")
    parser.add_argument("--resamplings", type=int, default=1)
    parser.add_argument("--parts", type=int, default=10, help="of the stage `parts`")
    parser.add_argument("--draw", action="store_true", help="only show what is known so far")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
