"""Every setting of a curation: type, default, bounds and meaning, as `dino.config.schema` has those of a run."""

import dataclasses
from dataclasses import dataclass

from dino.config.bounds import out_of_bounds
from dino.config.read import refuse
from dino.config.schema import AUTO, Auto, TrackingConfig, setting
from dino.precision import PRECISIONS


@dataclass
class Data:
    root: str = setting("", "as data.root of a run: folder, archive, list, shards, manifest.parquet; several as [a, b]")
    kind: str = setting(AUTO, "how data.root is read; auto: by what it is")
    labels: str | None = setting(None, "as data.labels of a run, for the report and the manifest")
    max_pixels: int = setting(64_000_000, "images of more pixels are not decoded", low=1)
    max_bytes: int = setting(256 * 2**20, "image files of more bytes are not read, packed or not", low=1)


@dataclass
class Embed:
    batch_size: int = setting(128, "images that each process embeds at a time", low=1)
    workers: Auto[int] = setting(AUTO, "worker processes of each process that decode; auto: by CPU cores", low=0)


@dataclass
class Duplicates:
    near: float = setting(
        0.9, "cosine of features from which two images may be copies; 0: only images of equal pixels are", low=0, high=1
    )
    neighbours: int = setting(16, "nearest images of each image among which its copies are looked for", low=1)
    cells: Auto[int] = setting(
        AUTO,
        "cells into which features are sorted, so that an image is compared with those of the nearest cells only; "
        "0: each with each; auto: that up to 250,000 images, above it as many cells as cost least",
        low=0,
    )
    probes: int = setting(8, "nearest cells of each image in which its neighbours are looked for", low=1)
    similarity: float = setting(
        0.85,
        "least correlation of the thumbnails of two images that are copies; 0: features alone decide",
        low=0,
        high=1,
        was="duplicates.likeness",
    )
    details: float = setting(
        0.9,
        "least correlation of their parts once one image lies upon the other, of which a sixth may differ: "
        "different things in one frame pass as wholes; 0: not looked at",
        low=0,
        high=1,
    )
    against: list[str] = setting([], "test sets: images that match one of theirs are dropped, with all their copies")


@dataclass
class Clusters:
    counts: list[int] = setting(
        [], "clusters of each level, the finest first; empty: two levels, by number of images", low=1
    )
    spherical: bool = setting(True, "cluster the directions of features; false: the features as they are")
    iterations: int = setting(50, "iterations of each k-means, at most", low=1)
    resamplings: int = setting(
        10, "how often a level is clustered anew on the central points of its clusters, which evens clusters out", low=0
    )
    sample: int = setting(10, "central points of each cluster on which a level is clustered anew", low=1)
    parts: int = setting(
        1,
        "random parts into which the pool is cut for the first level: each gets its share of the clusters by itself, "
        "and the levels above join them; for pools whose first level takes too long, or does not fit",
        low=1,
    )
    precision: str = setting(
        "auto",
        "precision in which points are compared with centroids; auto: bf16 where the device has units for it",
        PRECISIONS,
    )


@dataclass
class Rebalance:
    method: str = setting(
        "hierarchical",
        "hierarchical: the budget split evenly from the top level down; flat: an equal part of it for each cluster of "
        "the first level; retrieval: what is near to the images of rebalance.seeds; none: all that is no duplicate",
        ("hierarchical", "flat", "retrieval", "none"),
    )
    output: str = setting(
        "weights",
        "weights: how often each image is drawn; subset: whole images, some repeatedly",
        ("weights", "subset"),
    )
    budget: Auto[int] = setting(
        AUTO, "draws of an epoch; auto: as many as there are images that are no duplicates", low=1
    )
    repeats: float = setting(10.0, "how often one image is drawn in an epoch, at most", above=0)
    smoothing: float = setting(
        0.0, "rebalance.method=flat: 0: clusters get equal parts, 1: parts in proportion to their size", low=0, high=1
    )
    seeds: str | None = setting(None, "rebalance.method=retrieval: folder or archive of images to look for")
    retrieve: str = setting(
        "samples",
        "rebalance.method=retrieval: the nearest images of each seed, or images of clusters with many seeds",
        ("samples", "clusters"),
    )
    neighbours: int = setting(4, "rebalance.retrieve=samples: nearest images of each seed that are taken", low=1)
    least: int = setting(4, "rebalance.retrieve=clusters: seeds that a cluster must have", low=1)
    most: int = setting(10_000, "rebalance.retrieve=clusters: images taken from each such cluster, at most", low=1)


@dataclass
class Run:
    dir: str = setting("runs/curated", "directory: manifest.parquet, report.html, and what a killed run goes on from")
    seed: int = setting(0, "seed of clusters and of what is drawn", low=0)
    cpu_threads: Auto[int] = setting(AUTO, "CPU threads of each process; auto: its share of the cores", low=1)


@dataclass
class CurateConfig:
    """The whole tree."""

    weights: str = setting("", "what embeds the images: a released name, a run directory or a file")
    data: Data = dataclasses.field(default_factory=Data)
    embed: Embed = dataclasses.field(default_factory=Embed)
    duplicates: Duplicates = dataclasses.field(default_factory=Duplicates)
    clusters: Clusters = dataclasses.field(default_factory=Clusters)
    rebalance: Rebalance = dataclasses.field(default_factory=Rebalance)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    run: Run = dataclasses.field(default_factory=Run)


def check(config: CurateConfig) -> None:
    """Raise a `UserError` that lists every value that cannot work, whatever the images."""
    errors = list(out_of_bounds(config))
    if not config.weights:
        errors.append("no weights to embed with: name a release, a run or a file with weights=…")
    if config.clusters.counts and config.clusters.parts > config.clusters.counts[0]:
        errors.append(
            f"clusters.parts={config.clusters.parts} of clusters.counts={config.clusters.counts}: the first level must "
            "have a cluster for each part"
        )
    if config.rebalance.method == "retrieval" and not config.rebalance.seeds:
        errors.append("rebalance.method=retrieval needs images in rebalance.seeds")
    if config.rebalance.method == "retrieval" and config.rebalance.budget != AUTO:
        errors.append(
            "rebalance.budget is not for retrieval: rebalance.neighbours, or rebalance.most, say how many are taken"
        )
    refuse(errors)
