"""RUN/report.html of a curation: how clusters change, what is in them, which copies were found, what was dropped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from dino.data import Pool, read_or_reason
from dino.data.sampler import effective_number
from dino.report import charts, pictures
from dino.report import page as report

SHOWN = 4  # clusters of a kind
IMAGES = 12  # of a cluster
PAIRS = 8  # of near copies, at each end
EXAMPLES = 3  # of a reason


def write(
    path: Path,
    images: Pool,
    columns: dict[str, Any],
    *,
    pairs: np.ndarray,
    cosines: np.ndarray,
    candidates: int,
    facts: dict[str, str],
    settings: str,
) -> list[report.Picture | report.Table]:
    """Write the page; gives its sections, for whoever shows them elsewhere.

    Args:
        columns: of the manifest, (N,) each, as arrays of Arrow or NumPy.
        pairs: (m, 2) indices of near copies.
        cosines: (m,) of their features.
        candidates: pairs that were proposed.
        facts: shown at the top of the page.
        settings: shown at its end.
    """
    sections: list[report.Picture | report.Table] = [_dropped(columns), _balance(columns), *_shares(columns)]
    sections += [*_clusters(images, columns), *_near_copies(images, pairs, cosines, candidates)]
    report.write(path, f"{path.parent.name}: curation", facts, sections, settings)
    return sections


def _sizes(labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(k,) images, or weights, of each label from 0 on."""
    inside = labels >= 0
    weights = None if weights is None else weights[inside]
    return np.bincount(labels[inside], weights=weights, minlength=labels.max(initial=0) + 1)


def _levels(columns: dict[str, Any]) -> Iterator[np.ndarray]:
    """(N,) cluster of each image, level by level."""
    level = 1
    while f"cluster_{level}" in columns:
        yield columns[f"cluster_{level}"]
        level += 1


def _dropped(columns: dict[str, Any]) -> report.Table:
    """What became of the images, and why."""
    kinds, numbers = reasons(columns["dropped"])
    counts = np.bincount(numbers, minlength=len(kinds))
    rows = []
    for kind in np.argsort(-counts, kind="stable"):
        images = np.flatnonzero(numbers == kind)[: EXAMPLES if kinds[kind] else 0].tolist()
        if counts[kind]:
            examples = "; ".join(_example(columns, image) for image in images)
            rows.append([kinds[kind] or "kept", f"{counts[kind]:,}", examples])
    return report.Table("What became of the images", "", ["", "images", "for example"], rows)


def _example(columns: dict[str, Any], image: int) -> str:
    """An image that was dropped, by name, with what is known of why."""
    name, original = (columns[column][image].as_py() for column in ("path", "duplicate_of"))
    reason, _, details = columns["dropped"][image].as_py().partition(":")
    if reason == "duplicate":
        return f"{name} (of {original})"
    return f"{name} ({details.strip()})" if reason == "unreadable" else name


def reasons(dropped: pa.DictionaryArray) -> tuple[list[str], np.ndarray]:
    """Kinds of reasons, without their details, and (N,) the number of each image's among them; "" where it is kept."""
    kinds = [text.partition(":")[0] for text in dropped.dictionary.to_pylist()]
    names = list(dict.fromkeys(kinds))
    return names, np.array([names.index(kind) for kind in kinds])[dropped.indices.to_numpy()]


def _balance(columns: dict[str, Any]) -> report.Table:
    """Effective numbers of clusters, and of labels where there are any."""
    groups = {}
    for level, labels in enumerate(_levels(columns), 1):
        groups[f"clusters of level {level} ({labels.max(initial=0) + 1:,})"] = labels
    if "label" in columns:
        numbers = columns["label"].indices.to_numpy()
        groups[f"labels ({len(np.unique(numbers)):,}), which curation did not see"] = numbers
    rows = []
    for title, labels in groups.items():
        before, after = effective_number(_sizes(labels)), effective_number(_sizes(labels, columns["weight"]))
        rows.append([title, f"{before:.1f}", f"{after:.1f}"])
    caption = "exp of the entropy of their shares: as diverse as so many equal ones. Clusters: of what is no duplicate."
    return report.Table("Effective numbers", caption, ["", "before", "after"], rows)


def _shares(columns: dict[str, Any]) -> Iterator[report.Picture]:
    """How large the clusters of each level are, and how often they are drawn."""
    for level, labels in enumerate(_levels(columns), 1):
        before, after = _sizes(labels), _sizes(labels, columns["weight"])
        picture = charts.shares(before / before.sum(), after / max(after.sum(), 1e-300), "")
        title = f"Shares of the {len(before):,} clusters of level {level}"
        caption = "Grey: of the images that are no duplicates. Red: of the draws."
        yield report.Picture(title, caption, picture)


def _clusters(images: Pool, columns: dict[str, Any]) -> Iterator[report.Picture]:
    """The largest, the smallest and some random clusters, or all of a few, each a row of its most central images."""
    labels, distances = columns["cluster_1"], columns["distance"].to_numpy(zero_copy_only=False)
    sizes = _sizes(labels)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    kinds = {
        "The largest clusters": order[:SHOWN],
        "The smallest clusters": order[-SHOWN:],
        "Clusters drawn at random": np.random.default_rng(0).permutation(order)[:SHOWN],
    }
    if len(order) <= SHOWN:
        kinds = {"The clusters": order}
    for title, clusters in kinds.items():
        rows = []
        for cluster in clusters:
            members = np.flatnonzero(labels == cluster)
            central = members[np.argsort(distances[members], kind="stable")][:IMAGES]
            rows.append(_readable(images, central))
        if any(rows):
            counts = ", ".join(f"{sizes[cluster]:,}" for cluster in clusters)
            caption = f"A row each, the images nearest to its centroid; {counts} images."
            yield report.Picture(title, caption, pictures.mosaic([row for row in rows if row]))


def _near_copies(images: Pool, pairs: np.ndarray, cosines: np.ndarray, candidates: int) -> Iterator[report.Picture]:
    """Near copies side by side: the most and the least similar."""
    order = np.argsort(-cosines, kind="stable")
    if len(order) > 2 * PAIRS:
        order = np.concatenate([order[:PAIRS], order[-PAIRS:]])
    shown: list[Tensor] = []
    for pair in pairs[order]:
        both = _readable(images, pair)
        shown += both if len(both) == 2 else []
    if shown:
        rows = [shown[first : first + 8] for first in range(0, len(shown), 8)]
        caption = (
            f"{len(pairs):,} pairs, confirmed at image level of {candidates:,} candidates, by features or 8×8 pixels "
            "(each counted from both sides); of each the larger is kept, or else the first by path. Two by two, from "
            f"the most similar (cosine {cosines.max():.4f}) to the least ({cosines.min():.4f})."
        )
        yield report.Picture("Near copies", caption, pictures.mosaic(rows))


def _readable(images: Pool, indices: np.ndarray) -> list[Tensor]:
    """The images that can still be read."""
    read = [read_or_reason(images, int(index)) for index in indices]
    return [image for image, _ in read if image is not None]
