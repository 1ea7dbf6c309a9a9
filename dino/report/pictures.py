"""Sheets of images: crops, attention, patch features, neighbours. Each function gives a PNG."""

import io
from collections.abc import Sequence

import matplotlib
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from dino.models import Backbone

BACKGROUND = 0.85  # grey between and around images


def crop_sheet(views: Sequence[Sequence[Tensor]]) -> bytes:
    """One row an image, its views side by side as the network sees them.

    Args:
        views: for each image its views, (C, size, size) uint8; other than 1 or 3 channels are shown by their mean.
    """
    side = max(view.shape[-1] for row in views for view in row)
    tiles = [_tile(view, max(side, 80)) for row in views for view in row]
    return _grid_png(tiles, columns=len(views[0]))


def attention_sheet(backbone: Backbone, images: Tensor, pixels: Tensor) -> bytes:
    """One row an image: the image, where the class token looks on average over heads, and each of up to 6 heads.

    Args:
        images: (B, C, H, W), preprocessed.
        pixels: the same images as uint8.
    """
    attention = backbone.class_attention(images)  # (B, heads, h, w)
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :6]], dim=1)
    side = max(96, pixels.shape[-1])
    heat = matplotlib.colormaps["inferno"]
    tiles = []
    for image, maps_of_image in zip(pixels, maps, strict=True):
        tiles.append(_tile(image, side))
        for values in maps_of_image:
            relative = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
            colours = torch.from_numpy(heat(relative.cpu().numpy())[..., :3]).permute(2, 0, 1).float()
            tiles.append(F.interpolate(colours[None], size=(side, side), mode="nearest")[0])
    return _grid_png(tiles, columns=1 + maps.shape[1])


def pca_sheet(backbone: Backbone, images: Tensor, pixels: Tensor, separate: bool = False) -> bytes:
    """Pairs of an image and its patches' features, whose first three principal components are red, green and blue.

    The components are those of all patches together, so the same colour says the same in every image.

    Args:
        images: (B, C, H, W), preprocessed.
        pixels: the same images as uint8.
        separate: leave the background black, and take the components of the rest. What is background shows in the
            first component of all patches: of its two sides the one that more of the images' borders lie on.
    """
    patches = backbone.forward_features(images)["x_norm_patchtokens"].float().cpu()  # (B, N, D)
    height, width = (side // backbone.patch_size for side in images.shape[2:])
    flat = patches.flatten(0, 1)
    is_object = torch.ones(len(flat), dtype=torch.bool)
    if separate:
        first = _components(flat, 1)[:, 0].view(-1, height, width)
        border = torch.cat([first[:, 0], first[:, -1], first[:, :, 0], first[:, :, -1]], dim=1)
        is_object = ((first > 0) != ((border > 0).float().mean() > 0.5)).flatten()
    colours = torch.zeros(len(flat), 3)
    if is_object.sum() > 3:
        values = _components(flat[is_object], 3)
        low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
        colours[is_object] = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    side = max(128, pixels.shape[-1])
    tiles = []
    for image, colour in zip(pixels, rearrange(colours, "(b h w) c -> b c h w", h=height, w=width), strict=True):
        tiles += [_tile(image, side), F.interpolate(colour[None], size=(side, side), mode="nearest")[0]]
    return _grid_png(tiles, columns=2 * min(3, len(images)))


def _components(features: Tensor, count: int) -> Tensor:
    """(N, D) to their first principal components (N, count); an eigenvector has no sign of its own, so it is fixed."""
    centered = features - features.mean(dim=0)
    axes = torch.linalg.eigh(centered.mT @ centered).eigenvectors[:, -count:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return centered @ axes


def neighbours_sheet(queries: Sequence[Tensor], neighbours: Sequence[Sequence[Tensor]]) -> bytes:
    """One row an image: the image itself, a gap, and its nearest neighbours, nearest first.

    Args:
        queries: (C, H, W) uint8 each.
        neighbours: as many for each query, (C, H, W) uint8 each.
    """
    side, tiles = 112, []
    for query, nearest in zip(queries, neighbours, strict=True):
        tiles += [_framed(query, side), _blank(side), *(_framed(image, side) for image in nearest)]
    return _grid_png(tiles, columns=2 + len(neighbours[0]))


def mosaic(rows: Sequence[Sequence[Tensor]], side: int = 72) -> bytes:
    """Rows of images (C, H, W) uint8, each whole; shorter rows end in blanks."""
    columns = max(map(len, rows))
    tiles = []
    for row in rows:
        tiles += [_framed(image, side) for image in row]
        tiles += [_blank(side)] * (columns - len(row))
    return _grid_png(tiles, columns)


def _blank(side: int) -> Tensor:
    """A tile that shows nothing."""
    return torch.full((3, side, side), BACKGROUND)


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
    tile = _blank(side)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    tile[:, top : top + size[0], left : left + size[1]] = resized
    return tile


def _grid_png(tiles: list[Tensor], columns: int) -> bytes:
    grid = make_grid(tiles, nrow=columns, padding=3, pad_value=BACKGROUND)
    pixels = (grid.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
