"""A pool's way from images to a manifest: embed, de-duplicate, cluster, rebalance; each stage is kept on disk."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from dino.curation import rebalance
from dino.curation.duplicates import confirmed, distinct, groups, originals, same_pixels
from dino.curation.embed import Embedded, embed
from dino.curation.hierarchy import hierarchical_kmeans
from dino.curation.points import Points, share
from dino.curation.settings import CurateConfig
from dino.curation.stage import Stage
from dino.data import Images, fingerprint, open_images, stamp
from dino.data.manifest import printable
from dino.distributed import cores, gathered_rows
from dino.errors import UserError
from dino.evaluation.features import weights_digest
from dino.evaluation.neighbours import as_floats, nearest
from dino.models import Backbone

MOST_CLUSTERS = 10_000  # that `auto` chooses


class Copies(NamedTuple):
    """What is a copy of what.

    Attributes:
        original: (N,) the image that stands for each: itself, or the one kept of its copies; −1: unreadable.
        near: (m, 2) pairs of near copies, confirmed; and their cosines (m,).
        cosines: of these.
        candidates: how many pairs the features brought forward.
        matches: (N,) the test set that an image, or one of its copies, matches; empty: none.
    """

    original: np.ndarray
    near: np.ndarray
    cosines: np.ndarray
    candidates: int
    matches: np.ndarray


class Clusters(NamedTuple):
    """Clusters of the images that are left.

    Attributes:
        levels: (N,) cluster of each image at the first level (−1: none), then (k,) of each cluster one level up.
        distances: (N,) squared, to the first level's centroid; NaN: none.
        centroids: (k, D) of the first level.
    """

    levels: list[np.ndarray]
    distances: np.ndarray
    centroids: np.ndarray


class Curation:
    """One curation: its pool, weights, stages and what they give.

    Args:
        directory: RUN.
    """

    def __init__(
        self, config: CurateConfig, images: Images, backbone: Backbone, directory: Path, accelerator: Accelerator
    ):
        self.config, self.images, self.backbone = config, images, backbone
        self.directory, self.accelerator = directory, accelerator
        self.weights = weights_digest(backbone)
        self.key: list[Any] = []  # of all stages so far, on which the next depends

    def run(self) -> dict[str, Any]:
        """All stages; the manifest's columns. Every process must call this."""
        self.embedded = self.embed(self.images, "embeddings")
        if not self.embedded.readable.any():
            raise UserError(f"none of {len(self.images.names):,} images can be read: {self.embedded.reasons[0]}")
        self.copies = self.find_copies()
        self.left = np.flatnonzero(
            (self.copies.original == np.arange(len(self.images.names))) & (self.copies.matches == "")
        )
        if not len(self.left):
            raise UserError("no image is left: all match one of duplicates.against")
        self.clusters = self.cluster()
        self.drawn = self.draw()
        if not (self.drawn > 0).any():
            raise UserError("no image would be drawn: raise rebalance.budget or rebalance.repeats")
        return self.columns()

    def embed(self, images: Images, name: str) -> Embedded:
        """Class tokens of a pool, in RUN/`name`."""
        settings = self.config.embed
        workers = min(16, cores() - 1) if settings.workers == "auto" else int(settings.workers)
        content = [fingerprint(images), stamp(images), repr(self.backbone.preprocess)]
        key = [self.weights, *content, str(self.accelerator.mixed_precision)]
        self.key.append(key)
        stage = Stage(self.directory / name, key, self.accelerator)
        return embed(stage, self.backbone, images, settings.batch_size, workers, self.accelerator)

    def find_copies(self) -> Copies:
        """Equal pixels, near copies, and matches with test sets."""
        settings, embedded = self.config.duplicates, self.embedded
        others = [(root, self._other(root, f"against-{number}")) for number, root in enumerate(settings.against)]
        stage = self._stage("duplicates", settings)
        if stage.begin():
            near, cosines, candidates = self._near(embedded, None)
            group = groups(len(embedded.hashes), np.concatenate([same_pixels(embedded.hashes), near]))
            pixels = embedded.sizes.prod(axis=1)
            original = originals(group, pixels, np.array(self.images.names))
            original[~embedded.readable] = -1
            matches = np.zeros(len(group), dtype=np.int64)
            for number, (_, other) in enumerate(others, 1):
                found, _, _ = self._near(embedded, other)
                equal = np.isin(embedded.hashes, other.hashes[other.readable])
                hit = np.unique(np.concatenate([group[found[:, 0]], group[equal & embedded.readable]]))
                matches[np.isin(group, hit) & (matches == 0)] = number
            if self.accelerator.is_main_process:
                facts: dict[str, Any] = {"original": original, "near": near, "cosines": cosines, "matches": matches}
                np.savez(stage.folder / "copies.npz", candidates=candidates, **facts)
            stage.finish()
        found = np.load(stage.folder / "copies.npz", allow_pickle=False)
        names = np.array(["", *settings.against])
        return Copies(
            found["original"], found["near"], found["cosines"], int(found["candidates"]), names[found["matches"]]
        )

    def cluster(self) -> Clusters:
        """k-means of what is left, level upon level."""
        settings, left = self.config.clusters, self.left
        counts = settings.counts or default_counts(len(left))
        stage = self._stage("clusters", settings, self.config.run.seed)
        if stage.begin():
            mine = share(len(left), self.accelerator.process_index, self.accelerator.num_processes)
            points = Points(
                self.embedded.tokens[left[mine.start : mine.stop]], self.accelerator.device, settings.spherical
            )
            levels = hierarchical_kmeans(
                points,
                counts,
                settings.resamplings,
                settings.sample,
                settings.iterations,
                self.config.run.seed,
                {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.precision],
                stage.folder,
            )
            labels, distances = (gathered_rows(part).cpu().numpy() for part in (levels[0].labels, levels[0].distances))
            if self.accelerator.is_main_process:
                above: dict[str, Any] = {
                    f"level{number}": level.labels.cpu().numpy() for number, level in enumerate(levels[1:], 2)
                }
                centroids = levels[0].centroids.cpu().numpy()
                np.savez(
                    stage.folder / "clusters.npz", labels=labels, distances=distances, centroids=centroids, **above
                )
            stage.finish()
        found = np.load(stage.folder / "clusters.npz", allow_pickle=False)
        labels, distances = np.full(len(self.images.names), -1), np.full(len(self.images.names), np.nan, np.float32)
        labels[left], distances[left] = found["labels"], found["distances"]
        return Clusters(
            [labels, *(found[f"level{n}"] for n in range(2, len(counts) + 1))], distances, found["centroids"]
        )

    def draw(self) -> np.ndarray:
        """(N,) how often each image is to be drawn."""
        settings, labels = self.config.rebalance, self.clusters.levels[0]
        budget = len(self.left) if settings.budget == "auto" else int(settings.budget)
        if settings.method == "retrieval":
            return self._retrieved().astype(np.float64)
        if settings.method == "hierarchical":
            weights = rebalance.hierarchical(self.clusters.levels, budget, settings.repeats)
        else:
            smoothing = settings.smoothing if settings.method == "flat" else 1.0
            clusters = len(self.clusters.centroids)
            weights = rebalance.flat(labels, clusters, smoothing, budget, settings.repeats)
        if settings.output == "subset":
            return rebalance.subset(weights, labels, self.config.run.seed).astype(np.float64)
        return weights

    def columns(self) -> dict[str, Any]:
        """The manifest's: one row an image of the pool, none missing."""
        names = [printable(name) for name in self.images.names]
        original, embedded = self.copies.original, self.embedded
        of_level = self.clusters.levels[:1]
        for parents in self.clusters.levels[1:]:
            of_level.append(np.where(of_level[-1] >= 0, parents[of_level[-1]], -1))
        return {
            "path": names,
            **({"label": list(map(printable, self.images.labels))} if self.images.labels is not None else {}),
            "height": embedded.sizes[:, 0],
            "width": embedded.sizes[:, 1],
            "hash": embedded.hashes.tolist(),
            "duplicate_of": [
                names[other] if other not in (-1, index) else None for index, other in enumerate(original.tolist())
            ],
            "dropped": self.reasons(),
            **{f"cluster_{number}": labels for number, labels in enumerate(of_level, 1)},
            "distance": [None if math.isnan(value) else value for value in self.clusters.distances.tolist()],
            "kept": self.drawn > 0,
            "weight": self.drawn,
        }

    def reasons(self) -> list[str]:
        """Why an image is not drawn, empty where it is."""
        reasons = []
        for index, (other, match, drawn) in enumerate(
            zip(self.copies.original, self.copies.matches, self.drawn, strict=True)
        ):
            if other < 0:
                reasons.append(f"unreadable: {self.embedded.reasons[index]}")
            elif match:
                reasons.append(f"matches {match}")
            elif other != index:
                reasons.append("duplicate")
            else:
                reasons.append("" if drawn > 0 else "not chosen")
        return reasons

    def _near(self, asking: Embedded, other: Embedded | None) -> tuple[np.ndarray, np.ndarray, int]:
        """Confirmed pairs (m, 2), by place in each, their cosines, and how many candidates there were.

        One of each set of equal images asks and is asked: many would be each other's neighbours, and no one else's.

        Args:
            other: the images that are asked, if they are not the same.
        """
        settings, asked = self.config.duplicates, other or asking
        if not settings.near:
            return np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32), 0
        ones, others = (distinct(embedded.hashes) for embedded in (asking, asked))
        rows = share(len(ones), self.accelerator.process_index, self.accelerator.num_processes)
        found = nearest(
            asking.tokens[ones[rows.start : rows.stop]],
            asked.tokens if len(others) == len(asked.tokens) else asked.tokens[others],
            settings.neighbours,
            rows.start if other is None else None,
            self.accelerator.device,
            queries_of_all=len(ones),
        )
        places, cosines = (part.numpy() for part in found)
        where = np.nonzero((cosines >= settings.near) & (places >= 0))
        pairs = np.stack([ones[where[0] + rows.start], others[places[where]]], axis=1)
        values = cosines[where]
        if settings.likeness:
            kept = confirmed(pairs, asking.thumbnails, asked.thumbnails, settings.likeness)
        else:
            kept = np.ones(len(pairs), dtype=bool)
        device = self.accelerator.device
        of_all = (
            gathered_rows(torch.from_numpy(np.column_stack([pairs, values, kept]).astype(np.float64)).to(device))
            .cpu()
            .numpy()
        )
        candidates, of_all = len(of_all), of_all[of_all[:, 3] > 0]
        pairs = of_all[:, :2].astype(np.int64)
        if other is None:
            pairs.sort(axis=1)
            pairs, first = np.unique(pairs, axis=0, return_index=True)
            return pairs, of_all[first, 2].astype(np.float32), candidates
        return pairs, of_all[:, 2].astype(np.float32), candidates

    def _retrieved(self) -> np.ndarray:
        """(N,) bool: what is near to the seed images, of what is left."""
        settings = self.config.rebalance
        seeds = self._other(str(settings.seeds), "seeds")
        tokens = seeds.tokens[seeds.readable]
        if settings.retrieve == "samples":
            pool = self.embedded.tokens[self.left]
            places, _ = nearest(tokens, pool, settings.neighbours, None, self.accelerator.device)
            chosen = np.zeros(len(self.images.names), dtype=bool)
            chosen[self.left[rebalance.by_samples(places.numpy(), len(self.left))]] = True
            return chosen
        centroids = torch.from_numpy(self.clusters.centroids)
        if self.config.clusters.spherical:
            closest = nearest(tokens, centroids, 1, None, self.accelerator.device)[0][:, 0]
        else:
            closest = torch.cat([torch.cdist(as_floats(block), centroids).argmin(dim=1)
                                 for block in np.array_split(tokens, -(-len(tokens) // 4096))])  # fmt: skip
        chosen = rebalance.by_clusters(
            self.clusters.levels[0], closest.numpy(), settings.least, settings.most, self.config.run.seed
        )
        if not chosen.any():
            raise UserError(
                f"no cluster has rebalance.least={settings.least} of the {len(tokens):,} seed images: lower it"
            )
        return chosen

    def _other(self, root: str, name: str) -> Embedded:
        """Another pool than the one that is curated."""
        found = self.embed(open_images(root, "auto", self.images.channels), name)
        unreadable = int((~found.readable).sum())
        if unreadable == len(found.readable):
            raise UserError(f"{root}: none of its {unreadable:,} images can be read: {found.reasons[0]}")
        if unreadable:
            self.accelerator.print(
                f"{root}: {unreadable:,} images cannot be read, for example: {found.reasons[~found.readable][0]}"
            )
        return found

    def _stage(self, name: str, *settings: Any) -> Stage:
        """A stage that depends on settings, and on all stages before."""
        self.key += [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in settings]  # type: ignore[arg-type]
        return Stage(self.directory / name, list(self.key), self.accelerator)


def default_counts(images: int) -> Sequence[int]:
    """20 images a cluster, and above them twice the root of as many; at most 10,000."""
    first = min(MOST_CLUSTERS, max(1, images // 20))
    second = round(2 * math.sqrt(first))
    return [first, second] if 1 < second < first else [first]
