"""The Omniglot readouts: which of 30 alphabets does a drawn character come from?

*article*: as it was published: 9,543 images, 98×98 without antialiasing and without normalisation, class tokens, one
70/30 split, scikit-learn's plain logistic regression. Published that way: ResNet-50 39 %, DINOv2 ViT-S/14 54 %,
ViT-L/14 65–70 %.

*standard*: what a careful person would do: the weights' own preprocessing, class token and mean patch token,
standardised, regularisation chosen inside the training part, five seeds, and splits that ask for more than the random
one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from dino.data import Images
from dino.data.sources.omniglot import TRAINING_DRAWERS, article_subset, held_out, parse
from dino.errors import UserError
from dino.evaluation.readout import Accuracy, knn, tuned_logistic
from dino.models import Backbone

IMAGE_SIZE, RAW_SIZE, SEEDS = 98, 28, 5
FEW = (1, 2, 5, 10)  # labels per alphabet
PUBLISHED = {"resnet50": 39.0, "dinov2_vits14": 54.0, "dinov2_vitl14": 67.5}  # the last: "65–70 %"


@dataclass(frozen=True)
class Drawings:
    """The images of both protocols and the article's split; `train` and `test` index into `indices`."""

    images: Images
    indices: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray

    @property
    def left_out(self) -> np.ndarray:
        """Which test drawings `data.kind=omniglot_train` keeps out of pre-training, (N,) bool."""
        return held_out(self.images.names)[self.indices[self.test]]

    @property
    def chance(self) -> float:
        """Accuracy of always naming the alphabet that is most frequent in the training part."""
        names, counts = np.unique(self.labels[self.train], return_counts=True)
        return float((self.labels[self.test] == names[counts.argmax()]).mean())


def drawings(images: Images) -> Drawings:
    """Draw the protocol's images (see `article_subset`) and split them 70/30 with `random_state=42`."""
    indices = article_subset(images.names)
    labels = np.array([parse(images.names[index]).alphabet for index in indices])
    train, test = train_test_split(np.arange(len(indices)), test_size=0.3, random_state=42)
    return Drawings(images, indices, labels, train, test)


def check_drawings(names: Sequence[str]) -> str:
    """What the pool lacks to be the protocol's, or nothing.

    Raises:
        UserError: fewer than two alphabets.
    """
    alphabets = {parse(name).alphabet for name in names}
    if len(alphabets) < 2:
        raise UserError(f"found drawings of {len(alphabets)} alphabet(s): the readout tells alphabets apart")
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
    patch = getattr(backbone, "patch_size", 1)
    return max(patch, round(size / patch) * patch)


def resize(image: Tensor, size: int, antialias: bool) -> Tensor:
    """(C, H, W) uint8 to (C, size, size) in [0, 1], as `ToTensor` and then `Resize` do."""
    scaled = functional.to_dtype(image, torch.float32, scale=True)
    return functional.resize(scaled, [size, size], InterpolationMode.BILINEAR, antialias=antialias)


class Split(NamedTuple):
    """Which of the drawings are learned from, and which are the test."""

    train: np.ndarray
    test: np.ndarray


def splits(data: Drawings, seed: int) -> dict[str, Split]:
    """The standard protocol's three splits, from the easy one to those that drawers or characters are new in.

    *random*: 70/30. *by drawer*: drawers 1–14 and 15–20, the same for all seeds. *by character*: a fifth of each
    alphabet's characters is the test.
    """
    everything = np.arange(len(data.indices))
    parsed = [parse(data.images.names[index]) for index in data.indices]
    early = np.array([drawing.drawer <= TRAINING_DRAWERS for drawing in parsed])
    new = held_out([data.images.names[index] for index in data.indices], seed, by_drawer=False)
    return {
        "random": Split(*train_test_split(everything, test_size=0.3, random_state=seed)),
        "by drawer": Split(everything[early], everything[~early]),
        "by character": Split(everything[~new], everything[new]),
    }


def few_labels(data: Drawings, per_alphabet: int, seed: int) -> Split:
    """A few drawings of each alphabet to learn from; all others are the test."""
    generator = np.random.default_rng(seed)
    train = np.concatenate(
        [generator.permutation(np.flatnonzero(data.labels == name))[:per_alphabet] for name in np.unique(data.labels)]
    )
    return Split(train, np.setdiff1d(np.arange(len(data.labels)), train))


class Standard(NamedTuple):
    """The standard protocol's outcome for one set of features.

    Attributes:
        logistic, knn: by split, then by labels per alphabet.
        confusion: (30, 30) counts of the random splits' tests, true alphabets in rows, in alphabetical order.
    """

    logistic: dict[str, Accuracy]
    knn: dict[str, Accuracy]
    confusion: np.ndarray


def standard(data: Drawings, features: np.ndarray, title: str, seeds: int = SEEDS) -> Standard:
    """Read features (N, D) out by every split and number of labels.

    With few labels there is nothing to choose regularisation by: scikit-learn's default on standardised features, and
    the nearest neighbour instead of the 20 nearest.
    """
    names = np.unique(data.labels)
    confusion = np.zeros((len(names), len(names)), dtype=int)
    scores: dict[str, dict[str, list[float]]] = {"logistic": {}, "knn": {}}
    with tqdm(total=seeds * (3 + len(FEW)), desc=title, unit="fit", leave=False) as bar:
        for seed in range(seeds):
            for split, predicted in _answers(data, features, seed):
                truth = data.labels[split.indices.test]
                for readout, answers in predicted.items():
                    scores[readout].setdefault(split.name, []).append(float((answers == truth).mean()))
                if split.name == "random":
                    places = np.searchsorted(names, truth), np.searchsorted(names, predicted["logistic"])
                    np.add.at(confusion, places, 1)
                bar.update()
    logistic, nearest = (
        {name: Accuracy.of(values) for name, values in scores[readout].items()} for readout in ("logistic", "knn")
    )
    return Standard(logistic, nearest, confusion)


class _Named(NamedTuple):
    name: str
    indices: Split


def _answers(data: Drawings, features: np.ndarray, seed: int) -> Iterator[tuple[_Named, dict[str, np.ndarray]]]:
    """Every split of a seed with the labels that each readout gives its test."""
    for name, split in splits(data, seed).items():
        train, labels, test = features[split.train], data.labels[split.train], features[split.test]
        answers = {"logistic": tuned_logistic(train, labels, test, seed), "knn": knn(train, labels, test)}
        yield _Named(name, split), answers
    for count in FEW:
        split = few_labels(data, count, seed)
        train, labels, test = features[split.train], data.labels[split.train], features[split.test]
        mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6  # needs no labels
        readout = LogisticRegression(max_iter=1000).fit((train - mean) / deviation, labels)
        answers = {"logistic": readout.predict((test - mean) / deviation), "knn": knn(train, labels, test, k=1)}
        yield _Named(f"{count} label{'s'[: count - 1]}", split), answers
