"""Levels of clusters of a pool as a whole, or of random parts of it one after the other, which the levels above join.

The first level costs images × clusters. Cut into P parts, each of which gets a P-th of the clusters, it costs a P-th,
and only a part's images are needed at a time; published pipelines cut hundreds of millions of images into 100 parts.
A concept then has clusters in every part: that they belong together is for the second level to find.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from dino.curation.hierarchy import hierarchical_kmeans
from dino.curation.points import Points, own_rows
from dino.curation.settings import Clusters as Settings
from dino.curation.stage import Stage
from dino.distributed import gathered_rows
from dino.errors import UserError
from dino.evaluation.neighbours import Rows
from dino.files import replacing
from dino.precision import inference_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Arrays = dict[str, np.ndarray]  # labels, distances and centroids of the first level; level2 … of those above


class How(NamedTuple):
    """What is the same for all parts."""

    settings: Settings
    seed: int
    accelerator: Accelerator


def whole(own: Rows | np.ndarray, counts: Sequence[int], how: How, folder: Path, title: str = "") -> Arrays:
    """Levels of clusters of embeddings, of which this process has (n, D), all at once; every process must call this
    and gets the clusters of all."""
    settings, device = how.settings, how.accelerator.device
    levels = hierarchical_kmeans(
        Points(own, device, settings.spherical),
        counts,
        resamplings=settings.resamplings,
        sample=settings.sample,
        iterations=settings.iterations,
        seed=how.seed,
        precision=DTYPES[inference_precision(device, settings.precision)],
        progress=folder,
        title=title,
    )
    arrays = {
        "labels": gathered_rows(levels[0].labels).cpu().numpy(),
        "distances": gathered_rows(levels[0].distances).cpu().numpy(),
        "centroids": levels[0].centroids.cpu().numpy(),
    }
    for number, level in enumerate(levels[1:], 2):
        arrays[f"level{number}"] = level.labels.cpu().numpy()
    return arrays


def in_parts(tokens: np.ndarray, indices: np.ndarray, counts: Sequence[int], how: How, stage: Stage) -> Arrays:
    """The same of some (n,) of all embeddings, the first level part by part; parts that are done are kept on disk.

    A process holds its share of a part in memory, so that the disk is read once.

    Raises:
        UserError: a part has more clusters than images.
    """
    count, parts, main = counts[0], how.settings.parts, how.accelerator.is_main_process
    if parts > min(count, len(indices)):
        raise UserError(
            f"clusters.parts={parts} of {len(indices):,} images and {count:,} clusters: there must be as many of both"
        )
    part_of = np.random.default_rng(how.seed).permutation(len(indices)) % parts
    labels, distances = np.empty(len(indices), np.int64), np.empty(len(indices), np.float32)
    centroids = np.empty((count, tokens.shape[1]), np.float32)
    for part in tqdm(range(parts), desc="parts", unit="part", disable=not main):
        first, last = count * part // parts, count * (part + 1) // parts
        members = np.flatnonzero(part_of == part)
        file = stage.folder / f"part{part:04d}.npz"
        if not file.exists():
            own = tokens[indices[members[own_rows(len(members))]]]
            progress = _folder(file.with_suffix(""), how)
            save(file, whole(own, [last - first], how, progress, f"part {part + 1} of {parts}, "), how)
        arrays = stage.arrays(file.name)
        labels[members], distances[members] = arrays["labels"] + first, arrays["distances"]
        centroids[first:last] = arrays["centroids"]
    levels: Arrays = {"labels": labels, "distances": distances, "centroids": centroids}
    if len(counts) > 1:
        progress = _folder(stage.folder / "joined", how)
        above = whole(centroids[own_rows(count)], counts[1:], how, progress, "joining parts, ")
        levels["level2"] = above["labels"]
        for number in range(2, len(counts)):
            levels[f"level{number + 1}"] = above[f"level{number}"]
    return levels


def _folder(folder: Path, how: How) -> Path:
    if how.accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
    how.accelerator.wait_for_everyone()
    return folder


def save(file: Path, arrays: Arrays, how: How) -> None:
    """By the first process, at once or not at all; every process must call this."""
    if how.accelerator.is_main_process:
        with replacing(file) as partial, partial.open("wb") as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type]
    how.accelerator.wait_for_everyone()
