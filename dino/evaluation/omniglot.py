"""The Omniglot protocols: which of 30 alphabets does a drawn character come from?

*article*: as it was published: 9,543 images, 98×98 without antialiasing and without normalisation, class tokens, one
70/30 split, scikit-learn's plain logistic regression. Published that way: ResNet-50 39 %, DINOv2 ViT-S/14 54 %,
ViT-L/14 65–70 %.

*standard*: what a careful person would do: the weights' own preprocessing, class token and mean patch token,
standardised, regularisation chosen inside the training part, five seeds, and splits that ask for more than the random
one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from dino.evaluation.features import cached, content_digest
from dino.evaluation.probes import Accuracy, few_labelled, knn, logistic, logistic_optimum
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
    return backbone.preprocess(image.expand(backbone.spec.in_chans, -1, -1))


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
    if backbone is None:
        size, features, antialiased_features = RAW_SIZE, raw_pixels(data), None
    else:
        size = input_size(backbone)
        features = _article_tokens(data, backbone, title, antialias=False)
        antialiased_features = _article_tokens(data, backbone, f"{title}, antialiased", antialias=True)
    truth, train_labels = data.labels[data.test], data.labels[data.train]
    train, test = features[data.train], features[data.test]
    answers = logistic(train, train_labels, test)
    correct, is_held_out = answers.labels == truth, data.held_out
    converged = logistic_optimum(train, train_labels, test)
    antialiased = None
    if antialiased_features is not None:
        predicted = logistic(antialiased_features[data.train], train_labels, antialiased_features[data.test]).labels
        antialiased = float((predicted == truth).mean())
    return {
        "input": f"{size}×{size}",
        "accuracy": float(correct.mean()),
        "has_converged": answers.converged,
        "converged": float((converged == truth).mean()),
        "antialiased": antialiased,
        "kept": float(correct[is_held_out].mean()) if is_held_out.any() else None,
    }


def _article_tokens(data: Drawings, backbone: Backbone, title: str, antialias: bool) -> np.ndarray:
    def transform(image: Tensor) -> Tensor:
        return article_input(image, backbone, antialias)

    normalises = "training" in backbone.description
    wording = f"article, {input_size(backbone)} pixels, antialias {antialias}, normalises {normalises}"
    preprocessing = f"{wording}, {backbone.preprocess}"
    return cached(
        backbone,
        data.images,
        data.indices,
        transform,
        content=data.content,
        preprocessing=preprocessing,
        title=title,
    ).class_tokens


class Split(NamedTuple):
    """Which of the drawings are learned from, and which are the test."""

    train: np.ndarray
    test: np.ndarray


def splits(data: Drawings, seed: int) -> dict[str, Split]:
    """The standard protocol's three splits, from the easy one to those that drawers or characters are new in.

    *random*: 70/30. *by drawer*: drawers 1–14 and 15–20, the same for all seeds. *by character*: a fifth of each
    alphabet's characters is the test.
    """
    rows = np.arange(len(data.indices))
    names = [data.images.names[index] for index in data.indices]
    early = np.array([parse(name).drawer <= TRAINING_DRAWERS for name in names])
    new = held_out(names, seed, by_drawer=False)
    return {
        "random": Split(*train_test_split(rows, test_size=0.3, random_state=seed)),
        "by drawer": Split(rows[early], rows[~early]),
        "by character": Split(rows[~new], rows[new]),
    }


class Standard(NamedTuple):
    """The standard protocol's outcome for one set of features.

    Attributes:
        logistic, knn: by split, then by labels per alphabet.
        confusion: (30, 30) counts of the random splits' tests, true alphabets in rows, in alphabetical order.
    """

    logistic: dict[str, Accuracy]
    knn: dict[str, Accuracy]
    confusion: np.ndarray


def probe_splits(data: Drawings, features: np.ndarray, title: str, seeds: int = SEEDS) -> Standard:
    """Probe features (N, D) by every split and number of labels.

    With few labels there is nothing to choose regularisation by: scikit-learn's default on features standardised over
    all drawings, which needs no labels, and the nearest neighbour instead of the 20 nearest.
    """
    alphabets = np.unique(data.labels)
    confusion = np.zeros((len(alphabets), len(alphabets)), dtype=int)
    accuracies: dict[str, dict[str, list[float]]] = {"logistic": {}, "knn": {}}
    with tqdm(total=seeds * (3 + len(FEW)), desc=title, unit="fit", leave=False) as bar:
        for seed in range(seeds):
            named = splits(data, seed)
            named |= {name: Split(*few_labelled(data.labels, count, seed)) for count, name in FEW.items()}
            for name, split in named.items():
                train, test, truth = features[split.train], features[split.test], data.labels[split.test]
                labels, is_few = data.labels[split.train], name in FEW.values()
                if is_few:
                    by_logistic = logistic(train, labels, test, iterations=1000, standardise_by=features)
                else:
                    by_logistic = logistic(train, labels, test, iterations=200, standardise_by=train, tuning_seed=seed)
                answers = {"logistic": by_logistic.labels, "knn": knn(train, labels, test, k=1 if is_few else 20)}
                for probe, predicted in answers.items():
                    accuracies[probe].setdefault(name, []).append(float((predicted == truth).mean()))
                if name == "random":
                    pairs = np.searchsorted(alphabets, truth), np.searchsorted(alphabets, by_logistic.labels)
                    np.add.at(confusion, pairs, 1)
                bar.update()
    means = {probe: {name: Accuracy.of(values) for name, values in of.items()} for probe, of in accuracies.items()}
    return Standard(means["logistic"], means["knn"], confusion)


def standard(data: Drawings, backbone: Backbone | None, title: str) -> dict[str, Any]:
    """Accuracy by every split, and the confusion of the random one.

    Args:
        backbone: None: raw pixels instead of features.
        title: what the progress bar says.
    """
    if backbone is None:
        features = raw_pixels(data)
    else:

        def transform(image: Tensor) -> Tensor:
            return own_input(image, backbone)

        preprocessing = f"own {backbone.preprocess}"
        features = cached(
            backbone,
            data.images,
            data.indices,
            transform,
            content=data.content,
            preprocessing=preprocessing,
            title=title,
        ).both
    outcome = probe_splits(data, features, title)
    accuracies = {
        probe: {name: [accuracy.mean, accuracy.std] for name, accuracy in values.items()}
        for probe, values in (("logistic", outcome.logistic), ("knn", outcome.knn))
    }
    own = outcome.confusion.diagonal() / outcome.confusion.sum(axis=1)
    per_alphabet = dict(zip(np.unique(data.labels).tolist(), own.tolist(), strict=True))
    return {**accuracies, "per_alphabet": per_alphabet, "confusion": outcome.confusion.tolist()}
