"""Pictures people would rather look at than read: curves, crops, attention, bars. Each function gives a PNG."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from dino.models import Backbone

INK, TEACHER, HEALTHY = "#1f3a5f", "#c8553d", "#2e8b57"


def curves(
    metrics: Sequence[dict], names: dict[str, str], ranges: dict[str, tuple[float, float]] | None = None
) -> bytes:
    """Metrics over steps, a panel each.

    Args:
        metrics: lines of metrics.jsonl.
        names: metric to the title of its panel; those that no line has are left out.
        ranges: metric to where it lies in healthy runs; shaded as far as the curve's panel reaches.
    """
    shown = {name: title for name, title in names.items() if any(name in line for line in metrics)}
    columns = 4 if len(shown) == 4 else 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(11, 2.4 * rows), layout="constrained")
    for position, (name, title) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(rows, columns, position)
        points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        axes.plot(*zip(*points, strict=True), color=INK, linewidth=1.4, marker="" if len(points) > 1 else ".")
        if name in (ranges or {}):
            low, high = (ranges or {})[name]
            bottom, top = axes.get_ylim()
            # All of the curve, and at least the near edge of the range.
            bottom = min(bottom, low)
            top = max(top, min(high, max(top, low) + 0.3 * (max(top, low) - bottom)))
            axes.axhspan(low, high, color=HEALTHY, alpha=0.12, linewidth=0)
            axes.set_ylim(bottom, top)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return png(figure)


def crop_sheet(views: Sequence[Sequence[Tensor]]) -> bytes:
    """One row an image, its views side by side as the network sees them.

    Args:
        views: for each image its views, (C, size, size) uint8; other than 1 or 3 channels are shown by their mean.
    """
    side = max(view.shape[-1] for row in views for view in row)
    tiles = [_tile(view, max(side, 80)) for row in views for view in row]
    return _grid_png(tiles, columns=len(views[0]))


def attention_sheet(backbone: Backbone, images: Tensor, shown: Tensor) -> bytes:
    """One row an image: the image, where the class token looks on average over heads, and each of up to 6 heads.

    Args:
        images: (B, C, H, W), preprocessed.
        shown: the same images as uint8.
    """
    attention = backbone.class_attention(images)  # (B, heads, h, w)
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :6]], dim=1)
    side = max(96, shown.shape[-1])
    heat = matplotlib.colormaps["inferno"]
    tiles = []
    for image, rows in zip(shown, maps, strict=True):
        tiles.append(_tile(image, side))
        for values in rows:
            relative = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
            colours = torch.from_numpy(heat(relative.cpu().numpy())[..., :3]).permute(2, 0, 1).float()
            tiles.append(F.interpolate(colours[None], size=(side, side), mode="nearest")[0])
    return _grid_png(tiles, columns=1 + maps.shape[1])


def pca_sheet(backbone: Backbone, images: Tensor, shown: Tensor, separate: bool = False) -> bytes:
    """Pairs of an image and its patches' features, whose first three principal components are red, green and blue.

    The components are those of all patches together, so the same colour says the same in every image.

    Args:
        images: (B, C, H, W), preprocessed.
        shown: the same images as uint8.
        separate: leave the background black, and take the components of the rest. What is background shows in the
            first component of all patches: of its two sides the one that more of the images' borders lie on.
    """
    patches = backbone.forward_features(images)["x_norm_patchtokens"].float().cpu()  # (B, N, D)
    height, width = (side // backbone.patch_size for side in images.shape[2:])
    flat = patches.flatten(0, 1)
    kept = torch.ones(len(flat), dtype=torch.bool)
    if separate:
        first = _components(flat, 1)[:, 0].view(-1, height, width)
        border = torch.cat([first[:, 0], first[:, -1], first[:, :, 0], first[:, :, -1]], dim=1)
        kept = ((first > 0) != ((border > 0).float().mean() > 0.5)).flatten()
    colours = torch.zeros(len(flat), 3)
    if kept.sum() > 3:
        values = _components(flat[kept], 3)
        low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
        colours[kept] = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    side = max(128, shown.shape[-1])
    tiles = []
    for image, colour in zip(shown, rearrange(colours, "(b h w) c -> b c h w", h=height, w=width), strict=True):
        tiles += [_tile(image, side), F.interpolate(colour[None], size=(side, side), mode="nearest")[0]]
    return _grid_png(tiles, columns=2 * min(3, len(images)))


def _components(features: Tensor, count: int) -> Tensor:
    """(N, D) to their first principal components (N, count); an eigenvector has no sign of its own, so it is fixed."""
    centred = features - features.mean(dim=0)
    axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -count:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return centred @ axes


def scatter(places: np.ndarray, labels: Sequence[str] | None) -> bytes:
    """Points (N, 2), coloured by label; the 20 most frequent labels are named.

    Args:
        labels: (N,), or None.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.add_subplot()
    names, counts = np.unique(labels if labels is not None else [""] * len(places), return_counts=True)
    order = names[np.argsort(-counts, kind="stable")]
    colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(order)))
    for rank, name in enumerate(order):
        chosen = slice(None) if labels is None else np.asarray(labels) == name
        shown = name if labels is not None and rank < 20 else None
        axes.scatter(
            places[chosen, 0], places[chosen, 1], s=9, color=colours[(rank * 7) % len(order)], label=shown, linewidths=0
        )
    if labels is not None:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, markerscale=2, frameon=False)
    axes.set_axis_off()
    return png(figure)


def neighbours_sheet(queries: Sequence[Tensor], neighbours: Sequence[Sequence[Tensor]]) -> bytes:
    """One row an image: the image itself, a gap, and its nearest neighbours, nearest first.

    Args:
        queries: (C, H, W) uint8 each.
        neighbours: as many for each query, (C, H, W) uint8 each.
    """
    side, tiles = 112, []
    for query, row in zip(queries, neighbours, strict=True):
        tiles += [_framed(query, side), torch.full((3, side, side), 0.85), *(_framed(image, side) for image in row)]
    return _grid_png(tiles, columns=2 + len(neighbours[0]))


def mosaic(rows: Sequence[Sequence[Tensor]], side: int = 72) -> bytes:
    """Rows of images (C, H, W) uint8, each whole; shorter rows end in blanks."""
    columns = max(map(len, rows))
    blank = torch.full((3, side, side), 0.85)
    tiles = [
        tile for row in rows for tile in [*(_framed(image, side) for image in row), *[blank] * (columns - len(row))]
    ]
    return _grid_png(tiles, columns)


def shares(before: np.ndarray, after: np.ndarray, title: str) -> bytes:
    """Shares of all clusters (k,) before and after, the largest before first."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(-before, kind="stable")
    place = np.arange(len(order))
    axes.fill_between(place, before[order], step="mid", color=INK, alpha=0.25, linewidth=0, label="before")
    axes.plot(place, after[order], color=TEACHER, linewidth=1.2, drawstyle="steps-mid", label="after")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("clusters, the largest first")
    axes.set_ylabel("share of the images")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0)
    return png(figure)


def bars(charts: dict[str, Sequence[tuple[str, float, float]]], title: str, lines: dict[str, float]) -> bytes:
    """Horizontal bars with spread, a panel for each chart; published or chance levels as dashed lines.

    Args:
        charts: title of the panel to rows of (name, accuracy, spread), in per cent.
        lines: name to level, in per cent.
    """
    heights = [0.5 + 0.36 * len(rows) for rows in charts.values()]
    figure = Figure(figsize=(9.5, 1.1 + 0.17 * len(lines) + sum(heights)), layout="constrained")
    panels = figure.subplots(len(charts), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, charts.items(), strict=True):
        names, values, spreads = zip(*rows, strict=True)
        places = range(len(rows))
        axes.barh(
            places, values, xerr=[spread or float("nan") for spread in spreads], color=INK, height=0.62, capsize=3
        )
        for place, value, spread in zip(places, values, spreads, strict=True):
            axes.text(value + spread + 0.8, place, f"{value:.1f}", va="center", fontsize=9)
        for level in lines.values():
            axes.axvline(level, color=TEACHER, linestyle="--", linewidth=1)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_ylabel(name, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for height, (name, level) in enumerate(lines.items()):
        place = panels[0].get_xaxis_transform()
        offset = 1 + 0.15 * (height + 0.3) / heights[0]
        panels[0].text(level, offset, f" {name} {level:g}", color=TEACHER, fontsize=8, transform=place, clip_on=False)
    panels[0].set_title(title, fontsize=11, loc="left", pad=8 + 13 * len(lines))
    return png(figure)


def confusion_matrix(counts: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """Shares of each true class (rows) that were taken for each class (columns); names carry the row's own share.

    Args:
        counts: (classes, classes).
    """
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = 2.5 + 0.26 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="magma_r", vmin=0, vmax=max(1e-9, shares.max()))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    labels = [f"{name}  {100 * share:.0f} %" for name, share in zip(names, shares.diagonal(), strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set_xlabel("taken for")
    axes.set_title(f"{title}: true alphabet and its accuracy", fontsize=10, loc="left")
    figure.colorbar(shown, shrink=0.6)
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _tile(image: Tensor, side: int | None) -> Tensor:
    """(C, H, W) uint8 to (3, side, side) in [0, 1], or in its own size."""
    pixels = image.float() / 255
    if pixels.shape[0] not in (1, 3):
        pixels = pixels.mean(dim=0, keepdim=True)
    if side is not None:
        pixels = F.interpolate(pixels[None], size=(side, side), mode="nearest")[0]
    return pixels.expand(3, -1, -1)


def _framed(image: Tensor, side: int) -> Tensor:
    """(C, H, W) uint8, whole and in its own shape, in the middle of a (3, side, side) tile."""
    height, width = image.shape[1:]
    scale = side / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    pixels = _tile(image, None)[None]
    resized = F.interpolate(pixels, size=size, mode="bilinear" if scale < 1 else "nearest", antialias=scale < 1)[0]
    tile = torch.full((3, side, side), 0.85)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    tile[:, top : top + size[0], left : left + size[1]] = resized
    return tile


def _grid_png(tiles: list[Tensor], columns: int) -> bytes:
    from PIL import Image

    grid = make_grid(tiles, nrow=columns, padding=3, pad_value=0.85)
    pixels = (grid.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
