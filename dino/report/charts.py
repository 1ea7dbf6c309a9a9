"""Charts of a curation or an evaluation: bars, maps. Each function gives a PNG."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, ACCENT = "#1f3a5f", "#c8553d"


def scatter(points: np.ndarray, labels: Sequence[str] | None) -> bytes:
    """Points (N, 2), coloured by label; the 20 most frequent labels are named.

    Args:
        labels: (N,), or None.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.add_subplot()
    names, counts = np.unique(labels if labels is not None else [""] * len(points), return_counts=True)
    order = names[np.argsort(-counts, kind="stable")]
    colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(order)))
    for rank, name in enumerate(order):
        members = points if labels is None else points[np.asarray(labels) == name]
        title = name if labels is not None and rank < 20 else None
        colour = colours[(rank * 7) % len(order)]  # so that those of like frequency differ
        axes.scatter(members[:, 0], members[:, 1], s=9, color=colour, label=title, linewidths=0)
    if labels is not None:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, markerscale=2, frameon=False)
    axes.set_axis_off()
    return png(figure)


def shares(before: np.ndarray, after: np.ndarray, title: str) -> bytes:
    """Fractions of all clusters (k,) before and after, the largest before first."""
    figure = Figure(figsize=(6.5, 2.6), layout="constrained")  # of a width that a telephone can show
    axes = figure.add_subplot()
    order = np.argsort(-before, kind="stable")
    edges = np.arange(len(order) + 1) + 0.5
    axes.stairs(before[order], edges, fill=True, color=INK, alpha=0.25, linewidth=0, label="before")
    axes.stairs(after[order], edges, color=ACCENT, linewidth=1.2, label="after")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("clusters, the largest first")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("share of the images")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0)
    return png(figure)


def bars(charts: Mapping[str, Sequence[tuple[str, float, float]]], title: str, levels: Mapping[str, float]) -> bytes:
    """Horizontal bars with spread, a panel for each chart; published or chance levels as dashed lines.

    Args:
        charts: title of the panel to rows of (name, accuracy, spread), in per cent.
        levels: name to level, in per cent.
    """
    heights = [0.5 + 0.36 * len(rows) for rows in charts.values()]
    figure = Figure(figsize=(9.5, 1.1 + 0.17 * len(levels) + sum(heights)), layout="constrained")
    panels = figure.subplots(len(charts), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, charts.items(), strict=True):
        values = [value for _, value, _ in rows]
        spreads = [spread or float("nan") for _, _, spread in rows]
        axes.barh(range(len(rows)), values, xerr=spreads, color=INK, height=0.62, capsize=3)
        for position, (_, value, spread) in enumerate(rows):
            axes.text(value + spread + 0.8, position, f"{value:.1f}", va="center", fontsize=9)
        for level in levels.values():
            axes.axvline(level, color=ACCENT, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(rows)), [title for title, _, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_ylabel(name, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    above = panels[0].get_xaxis_transform()
    for height, (name, level) in enumerate(levels.items()):
        offset = 1 + 0.15 * (height + 0.3) / heights[0]
        panels[0].text(level, offset, f" {name} {level:g}", color=ACCENT, fontsize=8, transform=above, clip_on=False)
    panels[0].set_title(title, fontsize=11, loc="left", pad=8 + 13 * len(levels))
    return png(figure)


def confusion_matrix(counts: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """Fractions of each true class (rows) that were taken for each class (columns); names carry the row's own share.

    Args:
        counts: (classes, classes).
    """
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = 2.5 + 0.26 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(fractions, cmap="magma_r", vmin=0, vmax=max(1e-9, fractions.max()))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    labels = [f"{name}  {100 * own:.0f} %" for name, own in zip(names, fractions.diagonal(), strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set_xlabel("taken for")
    axes.set_title(f"{title}: true alphabet and its accuracy", fontsize=10, loc="left")
    figure.colorbar(picture, shrink=0.6)
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
