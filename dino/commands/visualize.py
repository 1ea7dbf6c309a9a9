"""What do the features look at? Attention, patch features as colours, nearest neighbours, and a map of the images.

    python eval/visualize.py --weights dinov2_vits14 --images path/to/images --out pictures/
    python eval/visualize.py --weights runs/mine --images path/to/images --size 448 --shown 8 --out pictures/

Writes attention.png, pca.png, foreground.png, neighbours.png, map.png and page.html, which holds them all. With folders
as classes, the map is coloured by them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from dino.data import Pool, open_images, read_or_reason
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.evaluation.neighbours import nearest
from dino.models import load_backbone
from dino.report import page as report
from dino.report import pictures

NEIGHBOURS, MAPPED = 8, 2000


@torch.no_grad()
def main() -> None:
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(arguments.weights).to(device)
    images = open_images(arguments.images, arguments.kind, backbone.spec.in_chans)
    shown = readable(images, arguments.shown)
    sections = []
    if backbone.has_patches:
        size = arguments.size or backbone.preprocess.image_size
        size = max(backbone.patch_size, size // backbone.patch_size * backbone.patch_size)
        preprocess = replace(backbone.preprocess, image_size=size, resize=None)
        inputs = torch.stack([preprocess(image) for _, image in shown]).to(device)
        seen = torch.stack([preprocess.crop(image) for _, image in shown])
        sections += [
            report.Picture(
                "attention",
                f"Where the class token looks in the last block at {size}² pixels: mean over heads, then single heads.",
                pictures.attention_sheet(backbone, inputs, seen),
            ),
            report.Picture(
                "pca",
                "Patch features: their first three principal components over all of these images as red, green, blue.",
                pictures.pca_sheet(backbone, inputs, seen),
            ),
            report.Picture(
                "foreground",
                "The same with the background, one side of the first component, left black, and the components of the "
                "rest taken anew.",
                pictures.pca_sheet(backbone, inputs, seen, separate=True),
            ),
        ]
    chosen = np.linspace(0, len(images.names) - 1, min(MAPPED, len(images.names))).astype(int)
    found = extract(backbone, images, chosen, backbone.preprocess, title="embedding")
    if len(found.rows) > NEIGHBOURS:
        sections.append(neighbours(images, chosen[found.rows], found.class_tokens, arguments.shown))
        sections.append(two_dimensions(images, chosen[found.rows], found.class_tokens))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for section in sections:
        (arguments.out / f"{section.title}.png").write_bytes(section.png)
    facts = {"weights": arguments.weights, "images": f"{len(images.names):,} from {arguments.images}"}
    report.write(arguments.out / "page.html", f"Features of {arguments.weights}", facts, sections, "")
    print(*(arguments.out / f"{section.title}.png" for section in sections), arguments.out / "page.html", sep="\n")


def readable(images: Pool, count: int) -> list[tuple[int, torch.Tensor]]:
    """Up to `count` readable images, spread over the pool."""
    candidates = []
    for index in np.linspace(0, len(images.names) - 1, min(4 * count, len(images.names))).astype(int).tolist():
        image, _ = read_or_reason(images, index)
        if image is not None:
            candidates.append((index, image))
    if not candidates:
        raise UserError("none of the images looked at can be read")
    return candidates[:: max(1, len(candidates) // count)][:count]


def neighbours(images: Pool, indices: np.ndarray, tokens: np.ndarray, rows: int) -> report.Picture:
    queries = np.linspace(0, len(indices) - 1, min(rows, len(indices))).astype(int)
    indices_of_nearest, _ = nearest(tokens, tokens, NEIGHBOURS, itself=0)
    sheet = pictures.neighbours_sheet(
        [images.read(int(indices[query])) for query in queries],
        [[images.read(int(indices[other])) for other in row] for row in indices_of_nearest[queries]],
    )
    caption = f"Left, an image; right, the {NEIGHBOURS} most similar of {len(indices):,}, by cosine of class tokens."
    return report.Picture("neighbours", caption, sheet)


def two_dimensions(images: Pool, indices: np.ndarray, tokens: np.ndarray) -> report.Picture:
    reduced = PCA(min(50, *tokens.shape), random_state=0).fit_transform(tokens)
    perplexity = min(30.0, (len(tokens) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(reduced)
    labels = None if images.labels is None else [images.labels[index] for index in indices]
    caption = f"Class tokens of {len(indices):,} images in two dimensions (t-SNE): near is similar, far says little."
    return report.Picture("map", caption, pictures.scatter(places, labels))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="W", help="released name, run directory or file")
    parser.add_argument("--images", required=True, help="folder or zip archive of images")
    parser.add_argument("--kind", default="auto", help="as data.kind")
    parser.add_argument("--size", type=int, help="side in pixels for attention and PCA; default: the weights' own")
    parser.add_argument("--shown", type=int, default=6, help="images in the pictures")
    parser.add_argument("--out", type=Path, required=True, help="directory for the pictures")
    return parser.parse_args()
