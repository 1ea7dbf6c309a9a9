"""What do the features look at? Attention, patch features as colours, nearest neighbours, and a map of the images.

    dino visualize --weights dinov2_vits14 --data path/to/images --out pictures/
    dino visualize --weights runs/mine --data path/to/images --size 448 --rows 8 --out pictures/

Writes attention.png, pca.png, foreground.png, neighbours.png, map.png and page.html, which holds them all. Where
classes are known, the map is coloured by them.
"""

from dataclasses import replace

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from dino.commands import common
from dino.data import Pool, open_images, read_or_reason
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.evaluation.neighbours import nearest
from dino.files import write_bytes
from dino.models import Backbone, load_backbone
from dino.report import charts, page, pictures
from dino.report.looks import size_to_look_at
from dino.report.page import Picture

NEIGHBOURS, MAPPED = 8, 2000


@torch.no_grad()
def main() -> None:
    """Write pictures of what features look at, and a page of them.

    Raises:
        UserError: weights that cannot be read, or none of the images can be.
    """
    options = common.parser(
        __doc__,
        weights={},
        heads={},
        data={},
        kind={},
        labels={},
        out={"required": True, "help": "folder for the pictures"},
    )
    options.add_argument(
        "--size",
        type=int,
        help="side in pixels for attention and PCA; default: such that there are at least 14 patches",
    )
    options.add_argument("--rows", type=int, default=6, help="images in the pictures")
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(arguments.weights, arguments.heads).to(device)
    channels, levels = backbone.spec.in_chans, backbone.preprocess.levels
    images = open_images(arguments.data, arguments.kind, channels, levels=levels, labels=arguments.labels)
    samples = readable(images, arguments.rows)
    sections = []
    if backbone.has_patches:
        sections += of_patches(
            backbone, samples, arguments.size or size_to_look_at(backbone.preprocess.image_size, backbone.patch_size)
        )
    indices = np.linspace(0, len(images.names) - 1, min(MAPPED, len(images.names))).astype(int)
    features = extract(backbone, images, indices, backbone.preprocess.of_levels, title="embedding")
    if len(features.rows) > NEIGHBOURS:
        embedded = indices[features.rows]
        sections.append(neighbours(images, embedded, features.class_tokens, arguments.rows))
        sections.append(in_two_dimensions(images, embedded, features.class_tokens))
    for section in sections:
        write_bytes(arguments.out / f"{section.title}.png", section.png)
        print(arguments.out / f"{section.title}.png")
    facts = {"weights": arguments.weights, "images": f"{len(images.names):,} from {arguments.data}"}
    page.write(arguments.out / "page.html", f"Features of {arguments.weights}", facts, sections)
    print(arguments.out / "page.html")


def readable(images: Pool, count: int) -> list[Tensor]:
    """Up to `count` readable images, spread over the pool."""
    candidates = []
    for index in np.linspace(0, len(images.names) - 1, min(4 * count, len(images.names))).astype(int).tolist():
        image, _ = read_or_reason(images, index)
        if image is not None:
            candidates.append(image)
    if not candidates:
        raise UserError("none of the images looked at can be read")
    return candidates[:: max(1, len(candidates) // count)][:count]


def of_patches(backbone: Backbone, images: list[Tensor], size: int) -> list[Picture]:
    """Attention and principal components at about `size` pixels, as patches divide it."""
    size = max(backbone.patch_size, size // backbone.patch_size * backbone.patch_size)
    preprocess = replace(backbone.preprocess, image_size=size, resize=None)
    inputs = torch.stack([preprocess.of_levels(image) for image in images]).to(next(backbone.parameters()).device)
    pixels = torch.stack([preprocess.crop(image) for image in images])
    return [
        Picture(
            "attention",
            f"Where the class token looks in the last block at {size}² pixels: mean over heads, then single heads.",
            pictures.attention_sheet(backbone, inputs, pixels),
        ),
        Picture(
            "pca",
            "Patch features: their first three principal components over all of these images as red, green, blue.",
            pictures.pca_sheet(backbone, inputs, pixels),
        ),
        Picture(
            "foreground",
            "The same with the background, one side of the first component, left black, and the components of the "
            "rest taken anew.",
            pictures.pca_sheet(backbone, inputs, pixels, separate=True),
        ),
    ]


def neighbours(images: Pool, indices: np.ndarray, tokens: np.ndarray, rows: int) -> Picture:
    """Some images beside those that are nearest to them."""
    queries = np.linspace(0, len(indices) - 1, min(rows, len(indices))).astype(int)
    nearest_rows, _ = nearest(tokens, tokens, NEIGHBOURS, itself=0)
    sheet = pictures.neighbours_sheet(
        [images.read(int(indices[query])) for query in queries],
        [[images.read(int(indices[row])) for row in nearest_rows[query]] for query in queries],
    )
    caption = f"Left, an image; right, the {NEIGHBOURS} most similar of {len(indices):,}, by cosine of class tokens."
    return Picture("neighbours", caption, sheet)


def in_two_dimensions(images: Pool, indices: np.ndarray, tokens: np.ndarray) -> Picture:
    """A map of all images."""
    reduced = PCA(min(50, *tokens.shape), random_state=0).fit_transform(tokens)
    perplexity = min(30.0, (len(tokens) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(reduced)
    labels = None if images.labels is None else [images.labels[index] for index in indices]
    caption = f"Class tokens of {len(indices):,} images in two dimensions (t-SNE): near is similar, far says little."
    return Picture("map", caption, charts.scatter(points, labels))
