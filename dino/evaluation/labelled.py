"""A labelled pool as frozen features with a training and a test part: what k-NN and linear readouts start from."""

import math
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from sklearn.model_selection import train_test_split

from dino.data import Images, open_images
from dino.errors import UserError
from dino.evaluation.features import Features, cached, content_digest, extract
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
) -> Labelled:
    """Embed a pool whose folders are its classes.

    Args:
        data: to learn from; and, without `test_data`, the test's 30 % too, drawn with `seed` from every class alike.
        blocks: see `extract`.

    Raises:
        UserError: no classes, or too few images to split.
    """
    images = _open(data, kind, backbone)
    names = sorted(set(images.labels or ()))
    found = _features(backbone, images, accelerator, blocks)
    labels = np.searchsorted(names, np.asarray(images.labels)[found.rows])
    if test_data is not None:
        others = _open(test_data, kind, backbone)
        if unknown := sorted(set(others.labels or ()) - set(names)):
            raise UserError(f"{test_data} has classes that {data} has not: {', '.join(unknown[:5])}")
        tested = _features(backbone, others, accelerator, blocks)
        return Labelled(found, labels, tested, np.searchsorted(names, np.asarray(others.labels)[tested.rows]), names)
    counts = np.bincount(labels, minlength=len(names))
    if counts.min() < 2:
        raise UserError(f"{data}: class '{names[counts.argmin()]}' has {counts.min()} image(s), too few to split")
    if math.ceil(0.3 * len(labels)) < len(names):
        raise UserError(f"{data}: {len(labels)} images of {len(names)} classes are too few to split: name a --test")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
    first, second = (Features(*(values[part] for values in found)) for part in (train, test))
    return Labelled(first, labels[train], second, labels[test], names)


def _open(data: str, kind: str, backbone: Backbone) -> Images:
    images = open_images(data, kind, backbone.spec.in_chans)
    if images.labels is None:
        raise UserError(f"{data} has no classes: put each class's images into a folder of its own")
    return images


def _features(backbone: Backbone, images: Images, accelerator: Accelerator, blocks: int) -> Features:
    everything = range(len(images.names))
    content = content_digest(images, everything)
    found = cached(
        lambda: extract(backbone, images, everything, backbone.preprocess, accelerator=accelerator, blocks=blocks),
        backbone,
        content,
        f"{blocks} blocks, {backbone.preprocess}",
    )
    if not len(found.rows):
        raise UserError(f"none of {len(images.names)} images can be read, of which the first is {images.names[0]}")
    return found
