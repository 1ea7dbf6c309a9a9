"""RUN/report.html of a curation: how clusters change, what is in them, which copies were found, what was dropped."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dino.config import read as configuration
from dino.curation.rebalance import effective_number
from dino.data import UnreadableImage
from dino.report import charts, pictures
from dino.report import page as report

if TYPE_CHECKING:
    from dino.curation.pipeline import Curation

SHOWN = 4  # clusters of a kind
IMAGES = 12  # of a cluster
PAIRS = 8  # of near copies, at each end
EXAMPLES = 3  # of a reason


def write(curation: "Curation", columns: dict[str, Any]) -> None:
    """Write the page into the curation's directory."""
    sections: list[report.Picture | report.Table] = [_dropped(columns), _balance(curation, columns)]
    for level in range(1, len(curation.clusters.levels) + 1):
        labels = np.asarray(columns[f"cluster_{level}"])
        before, after = _sizes(labels, np.ones(len(labels))), _sizes(labels, curation.drawn)
        title = f"Shares of the {len(before):,} clusters of level {level}"
        caption = "Grey: of the images that are no duplicates. Red: of the draws."
        picture = charts.shares(before / before.sum(), after / max(after.sum(), 1e-300), "")
        sections.append(report.Picture(title, caption, picture))
    sections += _clusters(curation)
    sections += _pairs(curation)
    config = curation.config
    facts = {
        "images": f"{len(curation.images.names):,} from {config.data.root or config.data.kind}",
        "weights": config.weights,
        "drawn": f"{int((curation.drawn > 0).sum()):,} images, {curation.drawn.sum():,.0f} draws",
        "method": f"{config.rebalance.method}, {config.rebalance.output}",
    }
    title = f"{curation.directory.name}: curation"
    report.write(curation.directory / "report.html", title, facts, sections, configuration.dump(config))


def _sizes(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    inside = labels >= 0
    return np.bincount(labels[inside], weights=weights[inside], minlength=labels.max(initial=0) + 1)


def _dropped(columns: dict[str, Any]) -> report.Table:
    """What became of the images, and why."""
    found: dict[str, list[str]] = {}
    for name, reason, other in zip(columns["path"], columns["dropped"], columns["duplicate_of"], strict=True):
        kind = reason.split(":")[0] or "kept"
        shown = {"duplicate": f"{name} (of {other})", "unreadable": f"{name} ({reason.partition(': ')[2]})"}
        found.setdefault(kind, []).append(shown.get(kind, name))
    rows = [
        [kind, f"{len(names):,}", "" if kind == "kept" else "; ".join(names[:EXAMPLES])]
        for kind, names in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return report.Table("What became of the images", "", ["", "images", "for example"], rows)


def _balance(curation: "Curation", columns: dict[str, Any]) -> report.Table:
    """Effective numbers of clusters, and of labels where there are any."""
    rows = []
    for level in range(1, len(curation.clusters.levels) + 1):
        labels = np.asarray(columns[f"cluster_{level}"])
        sizes = [_sizes(labels, weights) for weights in (np.ones(len(labels)), curation.drawn)]
        rows.append([f"clusters of level {level} ({len(sizes[0]):,})", *(f"{effective_number(x):.1f}" for x in sizes)])
    if "label" in columns:
        names, numbers = np.unique(np.asarray(columns["label"]), return_inverse=True)
        sizes = [_sizes(numbers, weights) for weights in (np.ones(len(numbers)), curation.drawn)]
        rows.append(
            [f"labels ({len(names):,}), which curation did not see", *(f"{effective_number(x):.1f}" for x in sizes)]
        )
    caption = "exp of the entropy of their shares: as diverse as so many equal ones. Clusters: of what is no duplicate."
    return report.Table("Effective numbers", caption, ["", "before", "after"], rows)


def _clusters(curation: "Curation") -> list[report.Picture]:
    """The largest, the smallest and some random clusters, each a row of its most central images."""
    labels, distances = curation.clusters.levels[0], curation.clusters.distances
    sizes = np.bincount(labels[labels >= 0])
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    some = np.random.default_rng(0).permutation(order)[:SHOWN]
    sections = []
    kinds = {
        "The largest clusters": order[:SHOWN],
        "The smallest clusters": order[-SHOWN:],
        "Clusters drawn at random": some,
    }
    for title, chosen in kinds.items():
        rows = []
        for cluster in chosen:
            members = np.flatnonzero(labels == cluster)
            rows.append(_read(curation, members[np.argsort(distances[members], kind="stable")][:IMAGES]))
        rows = [row for row in rows if row]
        if rows:
            listed = ", ".join(f"{sizes[cluster]:,}" for cluster in chosen)
            caption = f"A row each, the images nearest to its centroid; {listed} images."
            sections.append(report.Picture(title, caption, pictures.mosaic(rows)))
    return sections


def _pairs(curation: "Curation") -> list[report.Picture]:
    """Near copies side by side: the most and the least alike."""
    near, cosines = curation.copies.near, curation.copies.cosines
    if not len(near):
        return []
    order = np.argsort(-cosines, kind="stable")
    chosen = order if len(order) <= 2 * PAIRS else np.concatenate([order[:PAIRS], order[-PAIRS:]])
    pairs = [pair for index in chosen if len(pair := _read(curation, near[index])) == 2]
    rows = [[image for pair in pairs[place : place + 4] for image in pair] for place in range(0, len(pairs), 4)]
    caption = (
        f"{len(near):,} pairs, confirmed at image level of {curation.copies.candidates:,} candidates by features "
        "(each counted from both sides); of each the larger is kept, or else the first by path. Two by two, from the "
        f"most alike (cosine {cosines.max():.4f}) to the least ({cosines.min():.4f})."
    )
    return [report.Picture("Near copies", caption, pictures.mosaic(rows))]


def _read(curation: "Curation", rows: np.ndarray) -> list[Tensor]:
    found = []
    for row in rows:
        try:
            found.append(curation.images.read(int(row)))
        except UnreadableImage:  # since it was embedded
            continue
    return found
