"""Every setting of a curation: type, default and meaning, as `dino.config.schema` has those of a pre-training run."""

import dataclasses
from dataclasses import dataclass

from dino.config.read import out_of_bounds, refuse
from dino.config.schema import AUTO, setting


@dataclass
class Pool:
    root: str = setting("", "folder of images (searched recursively), a .zip of one, or a manifest.parquet")
    kind: str = setting(AUTO, "how root is read; auto: by what it is")


@dataclass
class Embed:
    batch_size: int = setting(128, "images at a time, of each process")
    workers: int | str = setting(AUTO, "processes per process that decode; auto: by CPU cores")


@dataclass
class Duplicates:
    near: float = setting(0.9, "cosine from which two images may be copies; 0: only images of equal pixels are")
    neighbours: int = setting(16, "nearest images of each that are looked at")
    likeness: float = setting(0.95, "least correlation of their thumbnails; 0: features alone decide")
    against: list[str] = setting([], "test sets: images that match one of theirs are dropped, with all their copies")


@dataclass
class Clusters:
    counts: list[int] = setting([], "clusters of each level, finest first; empty: two levels, by number of images")
    spherical: bool = setting(True, "cluster directions; false: points")
    iterations: int = setting(50, "of k-means, at most")
    resamplings: int = setting(10, "how often a level is clustered anew on a few points of each cluster")
    sample: int = setting(10, "how many")
    precision: str = setting("bf16", "of the comparison with centroids", ("fp32", "bf16"))


@dataclass
class Rebalance:
    method: str = setting(
        "hierarchical",
        "hierarchical: the budget split evenly from the top level down; flat: a share for each cluster of the first "
        "level; retrieval: what is near to the images of rebalance.seeds; none: all that is no duplicate",
        ("hierarchical", "flat", "retrieval", "none"),
    )
    output: str = setting(
        "weights", "weights: how often images are drawn; subset: images, some repeatedly", ("weights", "subset")
    )
    budget: int | str = setting(AUTO, "draws of an epoch; auto: as many as there are images that are no duplicates")
    repeats: float = setting(10.0, "the most that one image is drawn in an epoch")
    smoothing: float = setting(0.0, "of flat: 0: equal shares, 1: shares as they are")
    seeds: str | None = setting(None, "of retrieval: folder or archive of images")
    retrieve: str = setting(
        "samples", "the nearest images of each seed, or images of clusters with many seeds", ("samples", "clusters")
    )
    neighbours: int = setting(4, "of retrieval by samples: nearest images of each seed")
    least: int = setting(4, "of retrieval by clusters: seeds that a cluster must have")
    most: int = setting(10_000, "of retrieval by clusters: images taken from each")


@dataclass
class Run:
    dir: str = setting("runs/curated", "directory: manifest.parquet, report.html, and what a killed run goes on from")
    seed: int = setting(0, "of clusters and draws")
    cpu_threads: int | str = setting(AUTO, "CPU threads of a process; auto: cores / local processes")


@dataclass
class CurateConfig:
    """The whole tree."""

    weights: str = setting("", "what embeds the images: a released name, a run directory or a file")
    data: Pool = dataclasses.field(default_factory=Pool)
    embed: Embed = dataclasses.field(default_factory=Embed)
    duplicates: Duplicates = dataclasses.field(default_factory=Duplicates)
    clusters: Clusters = dataclasses.field(default_factory=Clusters)
    rebalance: Rebalance = dataclasses.field(default_factory=Rebalance)
    run: Run = dataclasses.field(default_factory=Run)


def check(config: CurateConfig) -> None:
    """Raise a `UserError` that lists every value that cannot work, whatever the images."""
    errors = list(out_of_bounds(config))

    def require(holds: bool, message: str) -> None:
        if not holds:
            errors.append(message)

    duplicates, clusters, rebalance = config.duplicates, config.clusters, config.rebalance
    require(bool(config.weights), "no weights to embed with: name a release, a run or a file with weights=…")
    for key, value in (("near", duplicates.near), ("likeness", duplicates.likeness)):
        require(0 <= value <= 1, f"duplicates.{key} must lie between 0 and 1, got {value}")
    for key, value in {
        "embed.batch_size": config.embed.batch_size,
        "duplicates.neighbours": duplicates.neighbours,
        "clusters.iterations": clusters.iterations,
        "clusters.sample": clusters.sample,
        "rebalance.neighbours": rebalance.neighbours,
        "rebalance.least": rebalance.least,
        "rebalance.most": rebalance.most,
    }.items():
        require(value >= 1, f"{key} must be at least 1, got {value}")
    for key, value in (("clusters.resamplings", clusters.resamplings), ("run.seed", config.run.seed)):
        require(value >= 0, f"{key} must not be negative, got {value}")
    workers = config.embed.workers
    require(isinstance(workers, str) or workers >= 0, f"embed.workers must not be negative, got {workers}")
    require(all(count >= 1 for count in clusters.counts), f"clusters.counts must be above 0, got {clusters.counts}")
    require(rebalance.repeats > 0, f"rebalance.repeats must be above 0, got {rebalance.repeats}")
    require(0 <= rebalance.smoothing <= 1, f"rebalance.smoothing must lie in [0, 1], got {rebalance.smoothing}")
    budget = rebalance.budget
    require(isinstance(budget, str) or budget >= 1, f"rebalance.budget must be at least 1, got {budget}")
    needs_seeds = rebalance.method == "retrieval"
    require(not needs_seeds or bool(rebalance.seeds), "rebalance.method=retrieval needs images in rebalance.seeds")
    require(
        not needs_seeds or budget == AUTO,
        "rebalance.budget is not for retrieval: rebalance.neighbours, or rebalance.most, say how many are taken",
    )
    threads = config.run.cpu_threads
    require(isinstance(threads, str) or threads >= 1, f"run.cpu_threads must be at least 1, got {threads}")
    refuse(errors)
