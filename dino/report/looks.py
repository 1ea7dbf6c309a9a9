"""What a backbone makes of a few images of its pool: crops, attention, patch features, neighbours."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import Config
from dino.data import Pool, read_or_reason
from dino.evaluation.features import extract
from dino.evaluation.neighbours import nearest, weighted_knn
from dino.methods.network import as_used
from dino.models import Backbone, Preprocess, build_backbone
from dino.report import pictures
from dino.report.page import Picture, Section, Table
from dino.views import DeviceViews, canvas_of, view_spec
from dino.views.draws import sample_key

ROWS, NEIGHBOURS = 6, 8  # images shown, and neighbours of each
POOL = 384  # images, spread over all, among which neighbours are looked for
GRID = 14  # patches a side, at least, where patches are shown: fewer show little
LARGEST_UNTRAINED = 100e6  # parameters of a backbone that is built once more to compare with
FEWEST = 3  # images of a class, on average, below which neighbours cannot name it


class Looks:
    """Sections of a run's page, made anew as its backbone learns."""

    def __init__(self, config: Config, images: Pool):
        self.config, self.images = config, images
        self.preprocess = Preprocess(config.views.global_size, config.views.mean or (), config.views.std or ())
        self.untrained: float | None = None  # how often neighbours name the class before training

    def sections(self, backbone: Backbone) -> dict[str, Section]:
        """Crops, attention, patch features and neighbours of a few images spread over the pool, by name."""
        samples = _readable(self.images)
        if not samples:
            return {}
        sections: dict[str, Section] = {
            "crops": Picture(
                "Crops as the network sees them",
                "One image a row: two global crops, which teacher and student see, then the student's local crops.",
                pictures.crop_sheet(_crops(self.config, samples)),
            )
        }
        with as_used(backbone):
            if backbone.has_patches:
                sections |= _patch_pictures(backbone, self.preprocess, samples)
            return sections | self._neighbours(samples, backbone)

    def _neighbours(self, samples: dict[int, Tensor], backbone: Backbone) -> dict[str, Section]:
        spread = range(0, len(self.images.names), -(-len(self.images.names) // POOL))
        indices = np.unique([*spread, *samples])
        features = extract(backbone, self.images, indices, self.preprocess.of_levels, batch_size=64, title=None)
        readable, tokens = indices[features.rows], features.class_tokens
        caption = (
            f"Left, an image; right, the {NEIGHBOURS} most similar of {min(POOL, len(self.images.names))} others, by "
            "the cosine of class tokens."
        )
        sheet = _neighbours_sheet(self.images, samples, readable, tokens)
        sections: dict[str, Section] = {"neighbours": Picture("Nearest neighbours", caption, sheet)}
        if self.images.labels is not None:
            codes = self.images.labels.codes[readable]
            if 1 < len(np.unique(codes)) <= len(codes) / FEWEST:
                accuracy = name_the_class(tokens, codes)
                sections["classes"] = self._class_table(accuracy, readable, codes, backbone)
        return sections

    def _class_table(self, accuracy: float, indices: np.ndarray, codes: np.ndarray, backbone: Backbone) -> Table:
        """How often neighbours name the class, beside what is had for nothing."""
        if self.untrained is None and sum(map(torch.numel, backbone.parameters())) < LARGEST_UNTRAINED:
            torch.manual_seed(self.config.train.seed)
            untrained = build_backbone(self.config).eval().to(next(backbone.parameters()).device)
            features = extract(untrained, self.images, indices, self.preprocess.of_levels, batch_size=64, title=None)
            self.untrained = name_the_class(features.class_tokens, codes)
        rows = [["this backbone", f"{accuracy:.1%}"]]
        if self.untrained is not None:
            rows.append(["the same network with random weights", f"{self.untrained:.1%}"])
        rows.append(["chance: always the largest class", f"{largest_class(codes):.1%}"])
        caption = (
            f"Of {len(codes)} images spread over the pool, each whole and not augmented, the 20 nearest others vote. "
            "Training saw none of the labels."
        )
        return Table("Do neighbours name the class?", caption, ["features", "right"], rows)


def name_the_class(tokens: np.ndarray, codes: np.ndarray) -> float:
    """Fraction of tokens (N, D) whose 20 nearest others name their class (N,)."""
    features, labels = torch.from_numpy(np.asarray(tokens, np.float32)), torch.from_numpy(codes).long()
    others = ~torch.eye(len(labels), dtype=torch.bool)
    predicted = weighted_knn(features, features, labels, int(labels.max()) + 1, others, k=min(20, len(labels) - 1))
    return float((predicted == labels).float().mean())


def largest_class(codes: np.ndarray) -> float:
    """Share of the most frequent class: what naming it always is right in."""
    return float(np.bincount(codes).max() / len(codes))


def size_to_look_at(image_size: int, patch_size: int) -> int:
    """Side at which a backbone's patches are shown: the weights' own, or larger, so that there are enough of them."""
    return max(image_size, GRID * patch_size) // patch_size * patch_size


def _crops(config: Config, samples: dict[int, Tensor]) -> list[list[Tensor]]:
    """The first epoch's views of each image, by the code that training uses."""
    views = DeviceViews(view_spec(config.views))
    rows = []
    for index, image in samples.items():
        keys = np.array([sample_key(config.train.seed, 0, index)], dtype=np.uint64)
        crops = views.photometric(views.crop(canvas_of(image), keys), keys)
        rows.append([view for of_size in crops for view in of_size])
    return rows


def _patch_pictures(backbone: Backbone, preprocess: Preprocess, samples: dict[int, Tensor]) -> dict[str, Section]:
    larger = replace(preprocess, image_size=size_to_look_at(preprocess.image_size, backbone.patch_size), resize=None)
    device = next(backbone.parameters()).device
    inputs = torch.stack([larger.of_levels(image) for image in samples.values()]).to(device)
    pixels = torch.stack([larger.crop(image) for image in samples.values()])
    return {
        "attention": Picture(
            "Where the class token looks",
            f"Attention of the last block, at {larger.image_size}² pixels: the image, the mean over heads, then single "
            "heads.",
            pictures.attention_sheet(backbone, inputs, pixels),
        ),
        "pca": Picture(
            "What patches have in common",
            "Each image beside its patch features: their first three principal components, taken over all of these "
            "images, as red, green and blue.",
            pictures.pca_sheet(backbone, inputs, pixels),
        ),
    }


def _neighbours_sheet(images: Pool, samples: dict[int, Tensor], readable: np.ndarray, tokens: np.ndarray) -> bytes:
    """Each sample beside its nearest of the images at `readable`, whose class tokens are `tokens`."""
    neighbours, _ = nearest(tokens, tokens, min(NEIGHBOURS, len(tokens) - 1), itself=0, title=None)
    queries, rows = [], []
    for row in np.searchsorted(readable, list(samples)):
        queries.append(images.read(int(readable[row])))
        rows.append([images.read(int(readable[other])) for other in neighbours[row]])
    return pictures.neighbours_sheet(queries, rows)


def _readable(images: Pool) -> dict[int, Tensor]:
    """Up to six readable images by index, evenly spread over the pool."""
    samples = []
    for index in range(0, len(images.names), max(1, len(images.names) // (4 * ROWS))):
        image, _ = read_or_reason(images, index)
        if image is not None:
            samples.append((index, image))
    return dict(samples[:: max(1, len(samples) // ROWS)][:ROWS])
