"""The Omniglot protocols: which of 30 alphabets does a drawn character come from?

*article*: as it was published: 9,543 images, 98×98 without antialiasing and without normalisation, class tokens, one
70/30 split, scikit-learn's plain logistic regression. Published that way: ResNet-50 39 %, DINOv2 ViT-S/14 54 %,
ViT-L/14 65–70 %.

*standard*: what a careful person would do: the weights' own preprocessing, class token and mean patch token,
standardised, regularisation chosen inside the training part, five seeds, and splits that ask for more than the random
one.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from dino.data import Pool
from dino.data.sources.omniglot import TRAINING_DRAWERS, article_subset, held_out, parse
from dino.errors import UserError
from dino.evaluation.features import Features, cached, content_digest
from dino.evaluation.probes import few_labelled, knn, logistic, logistic_optimum
from dino.models import Backbone

IMAGE_SIZE, RAW_SIZE, SEEDS = 98, 28, 5
FEW = {1: "1 label", 2: "2 labels", 5: "5 labels", 10: "10 labels"}  # per alphabet
PUBLISHED = {"resnet50": 39.0, "dinov2_vits14": 54.0, "dinov2_vitl14": 67.5}  # the last: "65–70 %"


@dataclass(frozen=True)
class Drawings:
    """The images of both protocols and the article's split; `train` and `test` index into `indices`.

    Attributes:
        content: digest of the drawings' pixels.
    """

    images: Pool
    indices: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray
    content: str = ""

    @property
    def held_out(self) -> np.ndarray:
        """Which test drawings `data.kind=omniglot_train` keeps out of pre-training, (N,) bool."""
        return held_out(self.images.names)[self.indices[self.test]]

    @property
    def chance(self) -> float:
        """Accuracy of always naming the alphabet that is most frequent in the training part."""
        names, counts = np.unique(self.labels[self.train], return_counts=True)
        return float((self.labels[self.test] == names[counts.argmax()]).mean())


def drawings(images: Pool) -> Drawings:
    """Draw the protocol's images (see `article_subset`) and split them 70/30 with `random_state=42`."""
    indices = article_subset(images.names)
    labels = np.array([parse(images.names[index]).alphabet for index in indices])
    train, test = train_test_split(np.arange(len(indices)), test_size=0.3, random_state=42)
    return Drawings(images, indices, labels, train, test, content_digest(images, indices))


def check_drawings(names: Sequence[str]) -> str:
    """What the pool lacks to be the protocol's, or nothing.

    Raises:
        UserError: fewer than two alphabets.
    """
    alphabets = {parse(name).alphabet for name in names}
    if len(alphabets) < 2:
        raise UserError(f"found drawings of {len(alphabets)} alphabet(s): the probe tells alphabets apart")
    if len(alphabets) != 30:
        return f"{len(alphabets)} alphabets instead of 30: figures do not compare with published ones"
    return ""


def raw_pixels(data: Drawings) -> np.ndarray:
    """28×28 grey values in [0, 1], flattened: (len(indices), 784)."""
    rows = [resize(data.images.read(int(index)), RAW_SIZE, antialias=True).flatten() for index in data.indices]
    return torch.stack(rows).numpy()


def article_input(image: Tensor, backbone: Backbone, antialias: bool = False) -> Tensor:
    """A grey drawing (1, H, W) uint8 as the article shows it: 98×98, then at the size the backbone takes.

    The article does not normalise. What a run of this project subtracts and divides by is part of its first layer (it
    could be folded into the patch embedding exactly), so it is applied.
    """
    drawing = resize(image, IMAGE_SIZE, antialias)
    size = input_size(backbone)
    if size != IMAGE_SIZE:
        drawing = functional.resize(drawing, [size, size], InterpolationMode.BILINEAR, antialias=True)
    drawing = drawing.expand(backbone.spec.in_chans, -1, -1)
    if "training" not in backbone.description:
        return drawing
    return functional.normalize(drawing, backbone.preprocess.mean, backbone.preprocess.std)


def own_input(image: Tensor, backbone: Backbone) -> Tensor:
    """A grey drawing (1, H, W) uint8 as the weights' own preprocessing has it."""
    return backbone.preprocess.of_levels(image.expand(backbone.spec.in_chans, -1, -1))


def input_size(backbone: Backbone) -> int:
    """98 pixels, or the weights' own size where that is smaller, as a multiple of the patch size."""
    size = min(IMAGE_SIZE, backbone.preprocess.image_size)
    patch = backbone.patch_size
    return max(patch, round(size / patch) * patch)


def resize(image: Tensor, size: int, antialias: bool) -> Tensor:
    """(C, H, W) uint8 to (C, size, size) in [0, 1], as `ToTensor` and then `Resize` do."""
    scaled = functional.to_dtype(image, torch.float32, scale=True)
    return functional.resize(scaled, [size, size], InterpolationMode.BILINEAR, antialias=antialias)


def article(data: Drawings, backbone: Backbone | None, title: str) -> dict[str, Any]:
    """Accuracy as published, at convergence, with antialiasing, and on the drawings kept out of pre-training.

    Args:
        backbone: None: raw pixels instead of features.
        title: what the progress bar says.
    """
    train_labels, truth, is_held_out = data.labels[data.train], data.labels[data.test], data.held_out
    size = RAW_SIZE if backbone is None else input_size(backbone)
    tokens = raw_pixels(data) if backbone is None else _article_tokens(data, backbone, title, antialias=False)
    train, test = tokens[data.train], tokens[data.test]
    answers = logistic(train, train_labels, test)
    correct = answers.labels == truth
    outcome = {
        "input": f"{size}×{size}",
        "accuracy": float(correct.mean()),
        "has_converged": answers.converged,
        "converged": float((logistic_optimum(train, train_labels, test) == truth).mean()),
        "antialiased": None,
        "kept": float(correct[is_held_out].mean()) if is_held_out.any() else None,
    }
    if backbone is not None:
        tokens = _article_tokens(data, backbone, f"{title}, antialiased", antialias=True)
        answers = logistic(tokens[data.train], train_labels, tokens[data.test])
        outcome["antialiased"] = float((answers.labels == truth).mean())
    return outcome


def _article_tokens(data: Drawings, backbone: Backbone, title: str, antialias: bool) -> np.ndarray:
    normalises = "training" in backbone.description
    preprocessing = f"article, {input_size(backbone)} pixels, antialias {antialias}, normalises {normalises}"
    transform = functools.partial(article_input, backbone=backbone, antialias=antialias)
    return _features(data, backbone, transform, f"{preprocessing}, {backbone.preprocess}", title).class_tokens


def _features(data: Drawings, backbone: Backbone, transform: Any, preprocessing: str, title: str) -> Features:
    options = {"content": data.content, "preprocessing": preprocessing, "title": title}
    return cached(backbone, data.images, data.indices, transform, **options)


def splits(data: Drawings, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the standard protocol learns from and tests on, from the easy split to those with new drawers or characters.

    *random*: 70/30. *by drawer*: drawers 1–14 and 15–20, the same for all seeds. *by character*: a fifth of each
    alphabet's characters is the test. The others: a few labels of each alphabet.
    """
    rows = np.arange(len(data.indices))
    names = [data.images.names[index] for index in data.indices]
    early = np.array([parse(name).drawer <= TRAINING_DRAWERS for name in names])
    new = held_out(names, seed, by_drawer=False)
    few = {name: few_labelled(data.labels, count, seed) for count, name in FEW.items()}
    return {
        "random": tuple(train_test_split(rows, test_size=0.3, random_state=seed)),
        "by drawer": (rows[early], rows[~early]),
        "by character": (rows[~new], rows[new]),
        **few,
    }


def standard(data: Drawings, backbone: Backbone | None, title: str) -> dict[str, Any]:
    """Accuracy by every split; see `probe_splits`.

    Args:
        backbone: None: raw pixels instead of features.
        title: what the progress bar says.
    """
    if backbone is None:
        return probe_splits(data, raw_pixels(data), title)
    transform = functools.partial(own_input, backbone=backbone)
    features = _features(data, backbone, transform, f"own {backbone.preprocess}", title)
    return probe_splits(data, features.both, title)


def probe_splits(data: Drawings, features: np.ndarray, title: str, seeds: int = SEEDS) -> dict[str, Any]:
    """Probe features (N, D) by every split.

    With few labels there is nothing to choose regularisation by: scikit-learn's default on features standardised over
    all drawings, which needs no labels, and the nearest neighbour instead of the 20 nearest.

    Returns:
        `logistic`, `knn`: name of the split to mean and deviation over seeds. Of the random split: `confusion`, counts
        with true alphabets in rows, and `per_alphabet`, their own accuracy.
    """
    alphabets = np.unique(data.labels)
    confusion = np.zeros((len(alphabets), len(alphabets)), dtype=int)
    accuracies: dict[str, dict[str, list[float]]] = {"logistic": {}, "knn": {}}
    with tqdm(total=seeds * (3 + len(FEW)), desc=title, unit="fit", leave=False) as bar:
        for seed in range(seeds):
            for name, (train, test) in splits(data, seed).items():
                x, y, x_test, truth = features[train], data.labels[train], features[test], data.labels[test]
                if name in FEW.values():
                    by_logistic = logistic(x, y, x_test, iterations=1000, standardise_by=features)
                    by_neighbours = knn(x, y, x_test, k=1)
                else:
                    by_logistic = logistic(x, y, x_test, iterations=200, standardise_by=x, tuning_seed=seed)
                    by_neighbours = knn(x, y, x_test)
                for probe, predicted in (("logistic", by_logistic.labels), ("knn", by_neighbours)):
                    accuracies[probe].setdefault(name, []).append(float((predicted == truth).mean()))
                if name == "random":
                    pairs = np.searchsorted(alphabets, truth), np.searchsorted(alphabets, by_logistic.labels)
                    np.add.at(confusion, pairs, 1)
                bar.update()
    means = {
        probe: {name: [float(np.mean(values)), float(np.std(values))] for name, values in of.items()}
        for probe, of in accuracies.items()
    }
    own = confusion.diagonal() / confusion.sum(axis=1)
    per_alphabet = dict(zip(alphabets.tolist(), own.tolist(), strict=True))
    return {**means, "per_alphabet": per_alphabet, "confusion": confusion.tolist()}
