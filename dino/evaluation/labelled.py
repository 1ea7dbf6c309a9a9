"""A labelled pool as frozen features with a training and a test part: what k-NN and linear probes start from."""

import math
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from sklearn.model_selection import train_test_split

from dino.data import Pool, open_images
from dino.data.pool import Labels
from dino.errors import UserError
from dino.evaluation.features import Features, cached, content_digest
from dino.models import Backbone


class Labelled(NamedTuple):
    """Features and class numbers of the images to learn from and of those to test on.

    Attributes:
        classes: names, by number.
    """

    train: Features
    train_labels: np.ndarray
    test: Features
    test_labels: np.ndarray
    classes: list[str]


def labelled_features(
    backbone: Backbone,
    data: str,
    test_data: str | None,
    kind: str,
    seed: int,
    accelerator: Accelerator,
    blocks: int = 1,
    precision: str = "auto",
) -> Labelled:
    """Embed a pool whose folders are its classes.

    Args:
        data: to learn from; and, without `test_data`, the test's 30 % too, drawn with `seed` from every class alike.
        blocks, precision: see `extract`.

    Raises:
        UserError: no classes, or too few images to split.
    """
    images, known = _open(data, kind, backbone)
    classes = known.classes
    features = _features(backbone, images, accelerator, blocks, precision)
    labels = known.codes[features.rows]
    if test_data is not None:
        test_images, test_known = _open(test_data, kind, backbone)
        if unknown := sorted(set(test_known.classes) - set(classes)):
            raise UserError(f"{test_data} has classes that {data} has not: {', '.join(unknown[:5])}")
        test_features = _features(backbone, test_images, accelerator, blocks, precision)
        test_labels = np.searchsorted(classes, test_known.classes)[test_known.codes[test_features.rows]]
        return Labelled(features, labels, test_features, test_labels, classes)
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        raise UserError(f"{data}: class '{classes[counts.argmin()]}' has {counts.min()} image(s), too few to split")
    if math.ceil(0.3 * len(labels)) < len(classes):
        raise UserError(f"{data}: {len(labels)} images of {len(classes)} classes are too few to split: name a --test")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
    return Labelled(features.at(train), labels[train], features.at(test), labels[test], classes)


def _open(data: str, kind: str, backbone: Backbone) -> tuple[Pool, Labels]:
    images = open_images(data, kind, backbone.spec.in_chans)
    if images.labels is None:
        raise UserError(f"{data} has no classes: put each class's images into a folder of its own")
    return images, images.labels


def _features(backbone: Backbone, images: Pool, accelerator: Accelerator, blocks: int, precision: str) -> Features:
    indices = range(len(images.names))
    features = cached(
        backbone,
        images,
        indices,
        backbone.preprocess,
        content=content_digest(images, indices),
        preprocessing=f"{blocks} blocks, {backbone.preprocess}",
        accelerator=accelerator,
        blocks=blocks,
        precision=precision,
    )
    if not len(features.rows):
        raise UserError(f"none of {len(images.names)} images can be read, of which the first is {images.names[0]}")
    return features
