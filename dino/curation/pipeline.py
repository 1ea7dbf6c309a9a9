"""A pool's way from images to a manifest: embed, de-duplicate, cluster, rebalance; each stage is kept on disk."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator

from dino.curation import rebalance
from dino.curation.clusters import Clusters, cluster
from dino.curation.duplicates import Copies, find_copies
from dino.curation.embed import Embedded, embed
from dino.curation.settings import CurateConfig, Duplicates
from dino.curation.stage import Stage
from dino.curation.thumbnails import SIDE
from dino.data import Pool, fingerprint, open_images, stamp
from dino.data.manifest import printable, printable_names
from dino.distributed import cores
from dino.errors import UserError
from dino.evaluation.neighbours import Rows, as_floats, nearest
from dino.files import replacing
from dino.models import Backbone
from dino.models.weights import weights_digest


@dataclass(frozen=True)
class Surroundings:
    """What every stage works with.

    Attributes:
        directory: RUN, in which each stage has a folder.
    """

    config: CurateConfig
    backbone: Backbone
    directory: Path
    accelerator: Accelerator


class Curated(NamedTuple):
    """What became of the N images of a pool.

    Attributes:
        columns: of the manifest, (N,) each, as arrays of Arrow or NumPy.
        copies: what the columns do not say of them is for the report.
    """

    columns: dict[str, Any]
    copies: Copies


def curate_pool(work: Surroundings, images: Pool) -> Curated:
    """All stages; every process must call this and gets all.

    Raises:
        UserError: no image is readable, left, or drawn.
    """
    config, accelerator = work.config, work.accelerator
    embedded = embed_pool(work, images, "embeddings")
    if not embedded.readable.any():
        raise UserError(f"none of {len(images.names):,} images can be read: {embedded.reasons[0]}")

    roots = config.duplicates.against
    test_sets = [embed_other(work, root, f"against-{n}", images.channels) for n, root in enumerate(roots)]
    key: list[Any] = [embedded.key, *(test_set.key for test_set in test_sets), dataclasses.asdict(config.duplicates)]
    stage = Stage(work.directory / "duplicates", key, accelerator)
    copies = _copies(stage, images, embedded, test_sets, config.duplicates)
    candidates = np.flatnonzero((copies.original == np.arange(len(images.names))) & (copies.matches == 0))
    if not len(candidates):
        raise UserError("no image is left: all match one of duplicates.against")

    key = [*key, dataclasses.asdict(config.clusters), config.run.seed]
    stage = Stage(work.directory / "clusters", key, accelerator)
    clusters = cluster(stage, embedded.tokens, candidates, config.clusters, config.run.seed, accelerator)

    if config.rebalance.method == "retrieval":
        seeds = embed_other(work, str(config.rebalance.seeds), "seeds", images.channels)
        weights = retrieved(config, seeds, embedded, candidates, clusters, accelerator.device).astype(np.float64)
    else:
        weights = sampling_weights(config, clusters, len(candidates))
    if not (weights > 0).any():
        raise UserError("no image would be drawn: raise rebalance.budget or rebalance.repeats")
    reasons = reasons_to_drop(embedded, copies, roots, weights)
    return Curated(manifest_columns(images, embedded, copies, clusters, weights, reasons), copies)


def embed_pool(work: Surroundings, images: Pool, name: str) -> Embedded:
    """Class tokens of a pool, in RUN/`name`."""
    settings, backbone, accelerator = work.config.embed, work.backbone, work.accelerator
    workers = min(16, cores() - 1) if settings.workers == "auto" else int(settings.workers)
    content = [fingerprint(images), stamp(images), repr(backbone.preprocess), f"thumbnails of {SIDE}"]
    key = [weights_digest(backbone), *content, str(accelerator.mixed_precision)]
    if images.levels.bits != "8":
        key.append(repr(images.levels))
    return embed(
        Stage(work.directory / name, key, accelerator), backbone, images, settings.batch_size, workers, accelerator
    )


def embed_other(work: Surroundings, root: str, name: str, channels: int) -> Embedded:
    """Class tokens of a test set or of seeds, of which some images must be readable."""
    embedded = embed_pool(work, open_images(root, "auto", channels, levels=work.backbone.preprocess.levels), name)
    unreadable = int((~embedded.readable).sum())
    if unreadable == len(embedded.readable):
        raise UserError(f"{root}: none of its {unreadable:,} images can be read: {embedded.reasons[0]}")
    if unreadable:
        reason = embedded.reasons[int(np.argmin(embedded.readable))]
        work.accelerator.print(f"{root}: {unreadable:,} images cannot be read, for example: {reason}")
    return embedded


def _copies(stage: Stage, images: Pool, embedded: Embedded, test_sets: list[Embedded], settings: Duplicates) -> Copies:
    """`find_copies`, or what an earlier call has written down."""
    file = stage.folder / "copies.npz"
    if stage.begin():
        copies = find_copies(embedded, images.names.packed(), test_sets, settings, stage.accelerator.device)
        if stage.accelerator.is_main_process:
            with replacing(file) as partial, partial.open("wb") as opened:
                np.savez(opened, **copies._asdict())
        stage.finish()
    arrays = stage.arrays(file.name)
    copies = Copies(*(arrays[name] for name in Copies._fields))  # type: ignore[arg-type]
    return copies._replace(candidates=int(copies.candidates))


def sampling_weights(config: CurateConfig, clusters: Clusters, candidates: int) -> np.ndarray:
    """(N,) how often each image is to be drawn, by its clusters."""
    settings, labels = config.rebalance, clusters.levels[0]
    budget = candidates if settings.budget == "auto" else int(settings.budget)
    if settings.method == "hierarchical":
        weights = rebalance.hierarchical(clusters.levels, budget, settings.repeats)
    else:
        smoothing = settings.smoothing if settings.method == "flat" else 1.0
        weights = rebalance.flat(labels, len(clusters.centroids), smoothing, budget, settings.repeats)
    if settings.output == "subset":
        return rebalance.subset(weights, labels, config.run.seed).astype(np.float64)
    return weights


def retrieved(
    config: CurateConfig,
    seeds: Embedded,
    embedded: Embedded,
    candidates: np.ndarray,
    clusters: Clusters,
    device: torch.device,
) -> np.ndarray:
    """(N,) bool: which of the candidates are near to the seed images.

    Raises:
        UserError: no cluster has enough of the seeds.
    """
    settings, tokens = config.rebalance, seeds.tokens[seeds.readable]
    if settings.retrieve == "samples":
        neighbours, _ = nearest(tokens, Rows(embedded.tokens, candidates), settings.neighbours, device=device)
        selected = np.zeros(len(embedded.tokens), dtype=bool)
        selected[candidates[rebalance.by_samples(neighbours.numpy(), len(candidates))]] = True
        return selected
    centroids = torch.from_numpy(clusters.centroids)
    if config.clusters.spherical:
        seed_labels = nearest(tokens, centroids, 1, device=device)[0][:, 0]
    else:
        blocks = np.array_split(tokens, -(-len(tokens) // 4096))
        seed_labels = torch.cat([torch.cdist(as_floats(block), centroids).argmin(dim=1) for block in blocks])
    selected = rebalance.by_clusters(
        clusters.levels[0], seed_labels.numpy(), settings.least, settings.most, config.run.seed
    )
    if not selected.any():
        raise UserError(f"no cluster has rebalance.least={settings.least} of the {len(tokens):,} seed images: lower it")
    return selected


def reasons_to_drop(
    embedded: Embedded, copies: Copies, test_sets: list[str], weights: np.ndarray
) -> pa.DictionaryArray:
    """(N,) why each image is not drawn, empty where it is; `test_sets` are their roots."""
    unreadable = [f"unreadable: {reason}" for reason in embedded.reasons.dictionary.to_pylist()]
    texts = ["", "not chosen", "duplicate", *(printable(f"matches {root}") for root in test_sets), *unreadable]
    numbers = np.zeros(len(weights), np.int32)
    numbers[weights == 0] = 1
    numbers[copies.original != np.arange(len(weights))] = 2  # each of what follows goes before what is above it
    matching, missing = copies.matches > 0, copies.original < 0
    numbers[matching] = 2 + copies.matches[matching]
    numbers[missing] = 3 + len(test_sets) + embedded.reasons.indices.to_numpy()[missing]
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(texts))


def manifest_columns(
    images: Pool,
    embedded: Embedded,
    copies: Copies,
    clusters: Clusters,
    weights: np.ndarray,
    reasons: pa.DictionaryArray,
) -> dict[str, Any]:
    """The manifest's columns: one row an image of the pool, none missing."""
    names = printable_names(images.names)
    columns: dict[str, Any] = {"path": names}
    if images.labels is not None:
        classes = pa.array([printable(name) for name in images.labels.classes])
        columns["label"] = pa.DictionaryArray.from_arrays(pa.array(images.labels.codes), classes)
    columns |= {"height": embedded.sizes[:, 0], "width": embedded.sizes[:, 1]}
    columns["hash"] = pa.array(embedded.hashes, pa.large_binary()).cast(pa.large_string())
    is_none = (copies.original < 0) | (copies.original == np.arange(len(names)))
    columns["duplicate_of"] = names.take(pa.array(copies.original, mask=is_none))
    columns["dropped"] = reasons
    for number, labels in enumerate(clusters.of_images(), 1):
        columns[f"cluster_{number}"] = labels
    columns["distance"] = pa.array(clusters.distances, mask=np.isnan(clusters.distances))
    return columns | {"kept": weights > 0, "weight": weights}
