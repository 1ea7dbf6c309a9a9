"""The Omniglot readout as the article did it: which of 30 alphabets does a drawn character come from?

30 alphabets, 9,543 images, 98×98 without antialiasing and without normalisation, class tokens, a 70/30 split and
scikit-learn's plain logistic regression. Published that way: ResNet-50 39 %, DINOv2 ViT-S/14 54 %, ViT-L/14 65–70 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.data import Images
from dino.data.omniglot import article_subset, held_out, parse
from dino.errors import UserError
from dino.evaluation.features import class_tokens
from dino.evaluation.readout import LogisticResult, logistic
from dino.models import Backbone

IMAGE_SIZE, RAW_SIZE = 98, 28
PUBLISHED = {"ResNet-50 (published)": 39.0, "DINOv2 ViT-S/14 (published)": 54.0}


@dataclass(frozen=True)
class ArticleData:
    """The images of the protocol and their split; `train` and `test` index into `indices`."""

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


def article_data(images: Images) -> ArticleData:
    """Draw the protocol's images (see `article_subset`) and split them 70/30 with `random_state=42`."""
    indices = article_subset(images.names)
    labels = np.array([parse(images.names[index]).alphabet for index in indices])
    train, test = train_test_split(np.arange(len(indices)), test_size=0.3, random_state=42)
    return ArticleData(images, indices, labels, train, test)


def read_out(data: ArticleData, features: np.ndarray) -> LogisticResult:
    """Plain logistic regression on features (len(indices), D)."""
    return logistic(features[data.train], data.labels[data.train], features[data.test], data.labels[data.test])


def raw_pixels(data: ArticleData) -> np.ndarray:
    """28×28 grey values in [0, 1], flattened: (len(indices), 784)."""
    rows = [resize(data.images.read(int(index)), RAW_SIZE, antialias=True).flatten() for index in data.indices]
    return torch.stack(rows).numpy()


def features(data: ArticleData, backbone: Backbone, title: str) -> np.ndarray:
    """Class tokens (len(indices), D) of the protocol's images."""
    size = input_size(backbone)
    return class_tokens(
        backbone, data.images, data.indices, lambda image: article_input(image, backbone, size), title=title
    )


def article_input(image: Tensor, backbone: Backbone, size: int) -> Tensor:
    """A grey drawing (1, H, W) uint8 as the protocol shows it: 98×98, then at the size the backbone takes.

    The protocol does not normalise. What a run of this project subtracts and divides by is part of its first layer (it
    could be folded into the patch embedding exactly), so it is applied.
    """
    drawing = resize(image, IMAGE_SIZE, antialias=False)
    if size != IMAGE_SIZE:
        drawing = functional.resize(drawing, [size, size], InterpolationMode.BILINEAR, antialias=True)
    preprocess = backbone.preprocess
    return functional.normalize(drawing.expand(backbone.spec.in_chans, -1, -1), preprocess.mean, preprocess.std)


def input_size(backbone: Backbone) -> int:
    """98 pixels, or the weights' own training size where that is smaller, as a multiple of the patch size."""
    size = min(IMAGE_SIZE, backbone.preprocess.image_size)
    patch = getattr(backbone, "patch_size", 1)
    return max(patch, round(size / patch) * patch)


def resize(image: Tensor, size: int, antialias: bool) -> Tensor:
    """(C, H, W) uint8 to (C, size, size) in [0, 1], as `ToTensor` and then `Resize` do."""
    scaled = functional.to_dtype(image, torch.float32, scale=True)
    return functional.resize(scaled, [size, size], InterpolationMode.BILINEAR, antialias=antialias)


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
