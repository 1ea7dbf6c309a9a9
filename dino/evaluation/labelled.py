"""A labelled pool as frozen features with a training and a test part: what k-NN and linear probes start from."""

import logging
import math
import os
import unicodedata
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from sklearn.model_selection import train_test_split

from dino.data import Pool, open_images
from dino.errors import UserError
from dino.evaluation.features import Features, cached, content_digest
from dino.files import shown
from dino.models import Backbone

logger = logging.getLogger(__name__)


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
    labels_by: str | None = None,
) -> Labelled:
    """Embed a pool of known classes.

    Args:
        data: to learn from; and, without `test_data`, to test on too: what lies in its folders train/ and val/ (or
            test/), as it has them, or else 30 % drawn with `seed` from every class alike.
        blocks, precision: see `extract`.
        labels_by: as `data.labels`, of both; images that have none are left out.

    Raises:
        UserError: no classes, or too few images to split.
    """
    images = _opened(data, kind, backbone, labels_by)
    if images.labels is None:
        raise UserError(_no_classes(data, images))
    classes, roles = images.labels.classes, images.roles
    features = _features(backbone, images, accelerator, blocks, precision)
    labels = images.labels.codes[features.rows]
    if test_data is not None:
        test_images = _opened(test_data, kind, backbone, labels_by)
        test_features = _features(backbone, test_images, accelerator, blocks, precision)
        test_labels = _codes_among(classes, test_images, test_data)[test_features.rows]
        return Labelled(features, labels, test_features, test_labels, classes)
    if roles is not None:
        train, test = (np.flatnonzero(roles.is_learn[features.rows] == learn) for learn in (True, False))
        if not len(train) or not len(test):
            raise UserError(f"{shown(data)}: no image to {'test on' if len(train) else 'learn from'} can be read")
        if accelerator.is_main_process:
            logger.info("%s: learns from %s, tests on %s, as its folders are named", shown(data), *roles.described)
    else:
        train, test = _drawn(labels, classes, shown(data), seed)
    return Labelled(features.at(train), labels[train], features.at(test), labels[test], classes)


def _opened(data: str, kind: str, backbone: Backbone, labels_by: str | None) -> Pool:
    levels = backbone.preprocess.levels
    return open_images(data, kind, backbone.spec.in_chans, levels=levels, labels=labels_by, labelled_only=True)


def _no_classes(data: str, images: Pool) -> str:
    """What is said of a pool of which no class is known."""
    has_folder = [("/" in name) for name in images.names]
    ways = "put each class's images into a folder of its own, or say with --labels which column or table has them"
    if any(has_folder) and not all(has_folder):
        stray = shown(images.names[has_folder.index(False)])
        count = f"{len(has_folder) - sum(has_folder):,} image(s) lie"
        return f"{shown(data)} has no classes: {count} beside the folders, for example {stray}: move or remove them"
    return f"{shown(data)} has no classes: {ways}"


def _drawn(labels: np.ndarray, classes: list[str], data: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and to test on; raises `UserError` where there are too few."""
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        name = shown(classes[counts.argmin()])
        raise UserError(f"{data}: class '{name}' has {counts.min()} image(s), too few to split")
    if math.ceil(0.3 * len(labels)) < len(classes):
        raise UserError(f"{data}: {len(labels)} images of {len(classes)} classes are too few to split: name a --test")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
    return train, test


def _codes_among(classes: list[str], images: Pool, data: str) -> np.ndarray:
    """(N,) numbers of the classes of test images: the first folder level at which all are known, be it only one.

    Raises:
        UserError: there are others.
    """
    known = set(classes)
    if images.labels is not None and known.issuperset(images.labels.classes):
        return np.searchsorted(classes, images.labels.classes)[images.labels.codes]
    root = os.path.basename(os.path.abspath(os.path.expanduser(data)))
    paths = [unicodedata.normalize("NFC", f"{root}/{name}").split("/")[:-1] for name in images.names]
    for level in range(min(map(len, paths)) - 1, -1, -1):
        if known.issuperset(path[level] for path in paths):
            return np.searchsorted(classes, [path[level] for path in paths])
    if images.labels is None:
        raise UserError(f"{shown(data)} has none of the classes learnt: {', '.join(map(shown, classes[:5]))}")
    unknown = sorted(set(images.labels.classes) - known)
    raise UserError(f"{shown(data)} has classes that were not learnt: {', '.join(map(shown, unknown[:5]))}")


def _features(backbone: Backbone, images: Pool, accelerator: Accelerator, blocks: int, precision: str) -> Features:
    indices = range(len(images.names))
    features = cached(
        backbone,
        images,
        indices,
        backbone.preprocess.of_levels,
        content=content_digest(images, indices),
        preprocessing=f"{blocks} blocks, {backbone.preprocess}",
        accelerator=accelerator,
        blocks=blocks,
        precision=precision,
    )
    if not len(features.rows):
        raise UserError(f"none of {len(images.names)} images can be read, of which the first is {images.names[0]}")
    return features
